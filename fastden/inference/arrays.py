"""``fastden.denoise_array``: Dask and Zarr arrays chunk by chunk, with the result of the whole image.

A chunk starts at a multiple of 4 pixels, so that every stage of stride 2 keeps its phase, and is denoised together with
24 pixels of its neighbours (the halo of :mod:`fastden.inference.tiling`). At the image's own border it has no
neighbour and ends where the image ends, so that the network pads it there as it pads the whole image.
"""

from __future__ import annotations

import errno
import math
import os
import secrets
import shutil
import sys
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from itertools import accumulate, pairwise
from numbers import Integral
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from fastden.choices import Quality
from fastden.errors import UserError
from fastden.images.pixels import Array, check_finite, check_plain, full_scale
from fastden.images.ranges import BLOCK, COUNTS, ORDINARY, ValueRange, count_range, joined, range_of
from fastden.inference.arguments import parse_memory
from fastden.inference.array_noise import (
    CURVE,
    RANGE,
    as_ranges,
    estimate_block,
    estimates,
    levels_of_images,
    noise_estimate,
    value_range_of,
    warn_of_levels,
)
from fastden.inference.run import Wishes, check_strengths, denoise_pixels
from fastden.inference.tiling import HALO
from fastden.network.calibrated import calibrated_ranges
from fastden.network.hub import files_of, model_folder, models
from fastden.network.loading import choose_dtype, default_model, load_exact, load_network
from fastden.network.padding import ALIGNMENT

DTYPES = ("uint8", "uint16", "float16", "float32", "float64")
#: Side of the blocks that small chunks of Zarr arrays are joined to, pixels. The halo of 24 pixels a side is 10 % of
#: the work at 1024, a third at 256.
JOINED = 1024

#: Bytes of an image of a Dask array up to which its range is looked for.
LARGEST_KEPT = 1 << 30
# One chunk at a time in a process: a network already uses all of PyTorch's threads, and the memory of one pass is the
# memory of all. It guards the loading of the model too.
_COMPUTING = threading.Lock()

#: Kinds of devices that workers may have, with the dtypes in which ``quality="fast"`` can run there.
_DEVICES = {
    "cpu": (torch.float32, torch.bfloat16),
    "cuda": (torch.float16, torch.bfloat16),
    "mps": (),
}

#: Errors of a file system that cannot take more.
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)


@dataclass(frozen=True)
class _Settings:
    """What travels with every chunk: names, no weights."""

    model: str | None
    device: str | None
    dtype: str | torch.dtype
    max_memory: int | None
    wishes: Wishes
    #: Whether a number or a map is on the scale 0-255 of each image's range, not of the dtype.
    of_range: bool


def denoise_array(
    array: Any,
    sigma: Any = "auto",
    *,
    model: str | Path | None = None,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype = "auto",
    max_memory: int | str | None = None,
    strength: float = 1.0,
    chroma: float | None = None,
    quality: Quality = "normal",
    channel_axis: int | Literal["auto"] | None = "auto",
    value_range: tuple[float, float] | None = None,
    out: Any = None,
) -> Any:
    """Denoise a Dask, Zarr or NumPy array of one image or many, of any size.

    Each image's result is that of :func:`fastden.denoise` on the whole image: chunks leave no seam. (Where chunks
    change the order of a sum, it differs in the last bits of float32.) Chunks whose borders lie off multiples of 4
    pixels, or that are narrower than the halo, are rechunked to their nearest multiples.

    Args:
        array: a ``dask.array.Array``, ``zarr.Array`` or ``numpy.ndarray`` (..., Y, X, C) or (..., Y, X); leading axes
            (frames, slices) number independent images. uint8, uint16, or floating in [0, 1].
        sigma: the noise's standard deviation on the scale 0-255 whatever the dtype, as in :func:`fastden.denoise`: a
            number, an array of one for each image (the shape of the leading axes), a map (Y, X) for all images, a
            :class:`fastden.NoiseEstimate`, or ``"auto"``, which estimates it from each image. Of floating arrays with a
            ``value_range``, white of a number or a map is white of that range, for these have no other: with
            ``value_range=(0, 4095)`` sigma 25 is a deviation of 25 / 255 * 4095. Of integers it stays white of the
            dtype, 255 or 65535, as in a file: noise of 120 counts in uint16 is sigma 120 / 65535 * 255.
        model: a bundled name, a folder or a Hugging Face Hub id. Each process loads it once; it does not travel with
            the chunks.
        device, dtype, strength, chroma, quality: as in :func:`fastden.denoise`. Machines of several kinds give the same
            result only with one dtype named.
        max_memory: what the network's tensors may take in each process, bytes or such as ``"2GiB"``; None is 1 GiB.
        channel_axis: the axis of colour: ``"auto"`` is the last one where it is 1, 3 or 4 long (gray, RGB, RGB and
            alpha) and there are three axes or more. None: gray images without such an axis, for instance the channels
            of a microscope, (C, Y, X).
        value_range: the values (black, white) of ``array`` that become 0 and 1 for the network, for all images; None
            finds the range of each image, as :func:`fastden.denoise` does. Deep images (not uint8) are read twice for
            it. Of a Dask array, whose chunks Dask would keep meanwhile, images above 1 GiB are taken as they are, with
            a warning.
        out: None, or where to write, chunk by chunk in parallel: the path of a Zarr array that does not exist yet,
            which appears when it is complete and has the chunks, codecs, fill value and attributes of a Zarr array that
            is denoised, or a writable ``zarr.Array`` of the same shape and dtype.

    Returns:
        With ``out`` the written ``zarr.Array``; else a Dask array, computed when asked for, or for a NumPy array a
        NumPy array. Shape and dtype are those of ``array``.

    Raises:
        TypeError, ValueError: naming the argument, its value and what is accepted; what concerns pixel values
            (NaN, another scale) when chunks are computed.
        UserError: ``out`` exists, cannot be written, or a package is missing.

    Warns:
        ScaleWarning: ``sigma`` for integers exceeds all of ``value_range``.
    """
    wishes = Wishes(strength, chroma, quality)
    named = None if model is None else _model_name(model)
    memory = parse_memory(max_memory)
    # Wrong settings raise here, not in the first worker. Workers may have devices that this process does not have.
    network = load_network(named or default_model(sigma), "cpu", "float32")
    check_strengths(network, wishes)
    axis = _colour_axis(array, channel_axis)
    of_range = value_range is not None and array.dtype.kind == "f"
    settings = _Settings(named, _text(device), dtype, memory, wishes, of_range)
    if isinstance(array, np.ndarray) and out is None:
        planes = _planes(array, axis)
        levels, fixed = levels_of_images(sigma, network, planes), _fixed_range(value_range, planes)
        warn_of_levels(levels, fixed, planes.dtype)
        if fixed is None:
            ranges = _range_block(_count_block(planes, planes.shape[-3:]), dtype=planes.dtype)
        else:
            ranges = as_ranges([fixed]).reshape((1,) * planes.ndim)
        used = estimate_block(planes, ranges, named) if levels is None else levels
        done = _denoise_block(planes, used, ranges, settings=settings)
        return np.ascontiguousarray(_restored(done, axis))
    _check_settings(settings, named or default_model(sigma))
    da = _package("dask.array")
    planes = _planes(_lazy(da, array, axis), axis)
    levels, fixed = levels_of_images(sigma, network, planes), _fixed_range(value_range, planes)
    warn_of_levels(levels, fixed, planes.dtype)
    ranges = _ranges(da, array, planes, axis, fixed)
    result = _restored(_overlapped(da, planes, levels, ranges, settings), axis)
    return result if out is None else _write(da, result, out, array)


def _check_settings(settings: _Settings, model: str) -> None:
    """Raise ValueError for what no worker could do, whatever its devices."""
    device, kinds = settings.device, list(_DEVICES)
    if device is not None:
        try:
            kinds = [torch.device(device).type]
        except RuntimeError:
            kinds = []
        if not kinds or kinds[0] not in _DEVICES:
            raise ValueError(f"device: {device!r}; accepted: {', '.join(_DEVICES)}, or one of several such as cuda:1")
    chosen = choose_dtype(settings.dtype, torch.device("cpu"), False)
    if not settings.wishes.fast:
        return
    able = {dtype for kind in kinds for dtype in _DEVICES[kind]}
    if not able or (settings.dtype != "auto" and chosen not in able):
        which = f"dtype {chosen}" if able else f"device {device}"
        raise ValueError(f"quality: 'fast', but {which}; accepted: cpu in float32 or bfloat16, cuda in 16 bits")
    calibrated_ranges(load_exact(files_of(model), torch.float32))  # as workers load it


def _text(device: str | torch.device | None) -> str | None:
    return None if device is None else str(device)


def _model_name(model: Any) -> str:
    if not isinstance(model, str | Path):
        accepted = "a bundled name, a folder or a Hub id (write a network with save_pretrained)"
        raise TypeError(f"model: {type(model).__name__}, which would travel with every chunk; accepted: {accepted}")
    # Workers have working directories of their own, and a Path is a folder whatever its name.
    is_folder = isinstance(model, Path) or (model not in models() and model_folder(model).is_dir())
    return str(Path(model).resolve()) if is_folder else str(model)


def _package(name: str) -> Any:
    try:
        return import_module(name)
    except ModuleNotFoundError as error:
        too_old = name == "zarr" and sys.version_info < (3, 11)
        how = "Python 3.11 or later" if too_old else "pip install 'fastden[arrays]'"
        raise UserError(f"array: the package {error.name} is missing; install: {how}") from error


def _is(kind: str, value: Any) -> bool:
    """Whether ``value`` is an array of ``dask.array`` or ``zarr``; imports neither."""
    module = sys.modules.get(kind)
    return module is not None and isinstance(value, module.Array)


def _colour_axis(array: Any, channel_axis: int | Literal["auto"] | None) -> int | None:
    """Which axis of ``array`` is the colour's, counted from the first; None for gray images. Checks the array too."""
    if not (isinstance(array, np.ndarray) or _is("dask.array", array) or _is("zarr", array)):
        raise TypeError(f"array: {type(array).__name__}; accepted: a Dask, Zarr or NumPy array")
    check_plain(array, "array")
    shape = tuple(array.shape)
    if any(math.isnan(size) for size in shape):
        raise ValueError(f"array: shape {shape}; accepted: known sizes (Dask's compute_chunk_sizes() finds them)")
    axis = channel_axis
    if axis == "auto":
        axis = -1 if len(shape) > 2 and shape[-1] in (1, 3, 4) else None
    if axis is not None and (
        isinstance(axis, bool) or not isinstance(axis, Integral) or not -len(shape) <= axis < len(shape)
    ):
        raise ValueError(f"channel_axis: {channel_axis!r}; accepted: 'auto', None, or an axis of the shape {shape}")
    if len(shape) < (2 if axis is None else 3) or 0 in shape:
        raise ValueError(f"array: shape {shape}; accepted: (..., Y, X, C) or (..., Y, X), not empty")
    if axis is not None and shape[axis] not in (1, 3, 4):
        raise ValueError(f"channel_axis: {axis}, {shape[axis]} channels; accepted: 1, 3 or 4, or None for gray")
    if array.dtype.newbyteorder("=") not in DTYPES:
        raise TypeError(f"array: dtype {array.dtype}; accepted: {', '.join(DTYPES)}, floating ones in [0, 1]")
    return None if axis is None else int(axis) % len(shape)


def _planes(array: Any, axis: int | None) -> Any:
    """(..., Y, X, C)."""
    return array[..., None] if axis is None else np.moveaxis(array, axis, -1)


def _restored(planes: Any, axis: int | None) -> Any:
    return planes[..., 0] if axis is None else np.moveaxis(planes, -1, axis)


def _lazy(da: Any, array: Any, axis: int | None, *, again: bool = False) -> Any:
    """A Dask array; ``axis`` is that of colour.

    ``again``: under another name than before, so that what is read twice is not kept.
    """
    if _is("zarr", array):
        # Frames and slices stay in chunks as they are stored: joined, they would take as many times the memory.
        sides = [other for other in range(array.ndim) if other != axis][-2:]
        unit = enumerate(_unit(array))
        joined = [-(-JOINED // size) * size if other in sides else size for other, size in unit]
        name = {"name": f"fastden-range-{secrets.token_hex(8)}"} if again else {}
        return da.from_zarr(array, chunks=tuple(map(min, joined, array.shape)), **name)
    if isinstance(array, np.ndarray):
        return da.from_array(array, name=False if again else None)
    return array


def _overlapped(da: Any, planes: Any, levels: Array | None, ranges: Any, settings: _Settings) -> Any:
    """The lazy result for lazy ``planes`` (..., Y, X, C)."""
    at_y, at_x, at_c = range(planes.ndim - 3, planes.ndim)
    chunks = {axis: snapped(planes.chunks[axis], ALIGNMENT, HALO) for axis in (at_y, at_x)}
    planes = planes.rechunk({**chunks, at_c: -1})
    # An axis of one chunk has no neighbours, and may be shorter than the halo.
    depth = {axis: HALO if len(sizes) > 1 else 0 for axis, sizes in chunks.items()}
    noise = estimates(da, planes, ranges, settings.model) if levels is None else da.from_array(levels, chunks=-1)
    noise_depth = {axis: halo if noise.shape[axis] > 1 else 0 for axis, halo in depth.items()}
    return da.map_overlap(
        _denoise_block,
        planes,
        noise,
        ranges,
        depth=[depth, noise_depth, dict.fromkeys(depth, 0)],
        boundary="none",
        dtype=planes.dtype,
        meta=planes._meta,
        settings=settings,
    )


def snapped(sizes: Sequence[int], multiple: int, least: int = 1) -> tuple[int, ...]:
    """Chunk sizes near ``sizes`` that start at multiples of ``multiple``, and are at least ``least`` if they fit."""
    total = sum(sizes)
    borders = [0]
    for end in accumulate(sizes):
        border = round(end / multiple) * multiple
        if border - borders[-1] >= max(least, 1) and total - border >= least:
            borders.append(border)
    return tuple(stop - start for start, stop in pairwise([*borders, total]))


def _fixed_range(value_range: tuple[float, float] | None, planes: Any) -> ValueRange | None:
    """The range where it need not be found, or cannot be."""
    if value_range is not None:
        try:
            black, white = (float(value) / full_scale(planes.dtype) for value in value_range)
        except (TypeError, ValueError):
            black = white = 0.0
        if not -math.inf < black < white < math.inf:
            raise ValueError(f"value_range: {value_range}; accepted: None, or (black, white) with black below white")
        return ValueRange(black, white, -math.inf, math.inf, reason="given")
    return ORDINARY if planes.dtype == np.uint8 else None


def _ranges(da: Any, array: Any, planes: Any, axis: int | None, fixed: ValueRange | None) -> Any:
    """What the values of each image span, lazily: (..., 1, 1, 1) of :data:`RANGE` for (..., Y, X, C).

    Zarr and NumPy arrays are read twice: kept until all was counted, an image would fill the memory.
    """
    at_y, at_x = planes.ndim - 3, planes.ndim - 2
    if fixed is None and not isinstance(array, np.ndarray) and not _is("zarr", array):
        size = math.prod(planes.shape[at_y:]) * planes.dtype.itemsize
        if size > LARGEST_KEPT:
            warnings.warn(
                f"array: an image of {size} bytes, whose range of values is not looked for, since Dask would keep all"
                " of it: taken to fill its dtype's range, or [0, 1]; value_range=(black, white) says this or another",
                stacklevel=3,
            )
            fixed = ORDINARY
    if fixed is not None:
        return da.from_array(as_ranges([fixed]).reshape((1,) * planes.ndim), chunks=-1)
    again = _lazy(da, array, axis, again=True)
    source = _planes(again, axis)[..., :3]
    source = source.rechunk({axis: snapped(source.chunks[axis], BLOCK) for axis in (at_y, at_x)} | {at_y + 2: -1})
    ones = tuple((1,) * len(source.chunks[axis]) for axis in (at_y, at_x))
    meta = np.empty((0,) * planes.ndim, COUNTS)
    count = partial(_count_block, shape=tuple(planes.shape[-3:]))
    counts = source.map_blocks(count, chunks=(*source.chunks[:-3], *ones, (1,)), dtype=COUNTS, meta=meta)
    chunks = (*counts.chunks[:-3], (1,), (1,), (1,))
    counts = counts.rechunk({at_y: -1, at_x: -1})
    # Named otherwise, dtype would be the result's.
    block = partial(_range_block, dtype=planes.dtype)
    return counts.map_blocks(block, chunks=chunks, dtype=RANGE, meta=np.empty((0,) * planes.ndim, RANGE))


def _count_block(planes: Array, shape: tuple[int, ...]) -> Array:
    """Counts of parts (..., y, x, C) of images of a shape: (..., 1, 1, 1)."""
    counts = np.zeros((*planes.shape[:-3], 1, 1, 1), COUNTS)
    for index in np.ndindex(planes.shape[:-3]):
        part = planes[index][..., :3]
        try:
            counts[index] = count_range(part, (*shape[:2], part.shape[2]))
        except ValueError as error:
            raise ValueError(f"image: {error}") from error
    return counts


def _range_block(counts: Array, *, dtype: np.dtype[Any]) -> Array:
    """Ranges from the counts of images' parts (..., y, x, 1): (..., 1, 1, 1)."""
    lead = counts.shape[:-3]
    try:
        found = [range_of(joined(counts[index]), dtype.newbyteorder("=")) for index in np.ndindex(lead)]
    except ValueError as error:
        raise ValueError(f"image: {error}") from error
    return as_ranges(found).reshape(*lead, 1, 1, 1)


def _denoise_block(planes: Array, levels: Array, ranges: Array, *, settings: _Settings) -> Array:
    """Denoise (..., Y, X, C) with noise levels and ranges that broadcast against it; runs in any process."""
    result = np.empty_like(planes)
    spread = np.broadcast_to(levels, (*planes.shape[:-3], *levels.shape[-3:]))
    own = np.broadcast_to(ranges, (*planes.shape[:-3], 1, 1, 1))
    with _COMPUTING:
        for index in np.ndindex(planes.shape[:-3]):
            level = spread[index][..., 0]
            if level.dtype == CURVE:
                sigma: Any = noise_estimate(level)
            else:
                sigma = level if level.size > 1 else float(level.item())
            network = load_network(
                settings.model or default_model(sigma),
                settings.device,
                settings.dtype,
                eight_bit=planes.dtype == np.uint8,
                fast=settings.wishes.fast,
            )
            if planes.dtype.kind == "f":
                check_finite(planes[index][..., :3], ValueError)
            result[index][..., :3], _ = denoise_pixels(
                planes[index][..., :3],
                sigma if network.noise_level_input else "auto",
                network,
                max_memory=settings.max_memory,
                wishes=settings.wishes,
                values=value_range_of(own[index]),
                of_range=settings.of_range,
            )
            result[index][..., 3:] = planes[index][..., 3:]
    return result


def _unit(array: Any) -> tuple[int, ...]:
    """The block of a Zarr array that is written at once, on each axis."""
    return tuple(array.shards or array.chunks)


def _write(da: Any, result: Any, out: Any, source: Any) -> Any:
    """Compute ``result`` into ``out``; see :func:`denoise_array`."""
    zarr = _package("zarr")
    if isinstance(out, zarr.Array):
        if out.shape != result.shape or out.dtype != result.dtype:
            raise ValueError(f"out: {out.shape} {out.dtype}; accepted: {result.shape} {result.dtype}, as the array")
        if _is("zarr", source) and out.store_path == source.store_path:
            # Chunks read their neighbours, which may be denoised already.
            raise ValueError("out: the array itself; accepted: another one")
        return _store(da, result, out)
    if not isinstance(out, str | Path):
        raise TypeError(f"out: {type(out).__name__}; accepted: a path, or a writable zarr.Array")
    if "://" in str(out):  # Path would make a folder of it here
        raise UserError(f"out: {out} is a URL; accepted: a path, or zarr.create_array(...) at that URL")
    path = Path(out)
    if os.path.lexists(path):
        raise UserError(f"out: {path} exists; accepted: a new path, or an opened zarr.Array")
    like: dict[str, Any] = {"chunks": tuple(max(sizes) for sizes in result.chunks)}
    if _is("zarr", source):
        names = getattr(source.metadata, "dimension_names", None)
        like = {"chunks": source.chunks, "shards": source.shards, "attributes": dict(source.attrs)}
        like |= {"dimension_names": names, "zarr_format": source.metadata.zarr_format}
        like |= {name: getattr(source, name) for name in ("compressors", "filters", "fill_value")}
        like |= {"serializer": source.serializer} if source.metadata.zarr_format == 3 else {"order": source.order}
    temporary = path.with_name(f".fastden-{secrets.token_hex(8)}.tmp")
    try:
        with _writing(path):
            made = zarr.create_array(str(temporary), shape=result.shape, dtype=result.dtype, **like)
        try:
            _store(da, result, made)
        except OSError as error:
            # It reads the source too: an error of a file of the source, or of none, passes as it is.
            if error.errno in _FULL or str(error.filename or "").startswith(str(temporary)):
                raise UserError(f"out: {path}: cannot be written: {error.strerror or error}") from error
            raise
        with _writing(path):
            os.rename(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return zarr.open_array(str(path), mode="r+")


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Turns an OSError into a UserError that names the argument ``out``."""
    try:
        yield
    except OSError as error:
        raise UserError(f"out: {path}: cannot be written: {error.strerror or error}") from error


def _store(da: Any, result: Any, target: Any) -> Any:
    # Two chunks in one chunk of the target would overwrite each other's part of it.
    whole = {
        axis: snapped(sizes, unit) for axis, (sizes, unit) in enumerate(zip(result.chunks, _unit(target), strict=True))
    }
    da.store(result.rechunk(whole), target, lock=False)
    return target
