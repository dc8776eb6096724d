"""``fastden.denoise``: one function for paths, PIL images, NumPy arrays and tensors."""

from __future__ import annotations

import os
import sys
import warnings
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar, overload

import numpy as np
import torch
from torch import Tensor

from fastden.choices import Quality
from fastden.errors import ScaleWarning
from fastden.images.codec import MAX_PIXELS, read_image
from fastden.images.pixels import Array, check_pixels, without_mask
from fastden.images.ranges import ORDINARY, ValueRange
from fastden.inference.arguments import check_max_pixels, parse_memory
from fastden.inference.estimate import check_dense, estimate_of
from fastden.inference.run import (
    Progress,
    Wishes,
    denoise_pixels,
    estimated_level,
    noise_level_of,
    own_scale,
    part_of,
    range_of_image,
    run_network,
)
from fastden.network.fused import FusedDenoiser
from fastden.network.inputs import SCALE_ENVIRONMENT
from fastden.network.loading import Model, default_model, load_network

if TYPE_CHECKING:
    from PIL.Image import Image as PILImage

#: Standard deviation of the rounding to 8 bits, on the scale 0-255: the root of 1 / 12, and a little more.
ROUNDING = 0.3
#: An image in memory; the result is of the same kind.
_Image = TypeVar("_Image", np.ndarray[Any, Any], Tensor, "PILImage")


@overload
def denoise(
    image: str | Path,
    sigma: Any = "auto",
    *,
    model: Model | None = None,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype = "auto",
    tile: int | Literal["auto"] | None = "auto",
    max_memory: int | str | None = None,
    strength: float = 1.0,
    chroma: float | None = None,
    quality: Quality = "normal",
    progress: Progress | None = None,
    max_pixels: int = MAX_PIXELS,
) -> Array: ...


@overload
def denoise(
    image: _Image,
    sigma: Any = "auto",
    *,
    model: Model | None = None,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype = "auto",
    tile: int | Literal["auto"] | None = "auto",
    max_memory: int | str | None = None,
    strength: float = 1.0,
    chroma: float | None = None,
    quality: Quality = "normal",
    progress: Progress | None = None,
    max_pixels: int = MAX_PIXELS,
) -> _Image: ...


def denoise(
    image: Any,
    sigma: Any = "auto",
    *,
    model: Model | None = None,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype = "auto",
    tile: int | Literal["auto"] | None = "auto",
    max_memory: int | str | None = None,
    strength: float = 1.0,
    chroma: float | None = None,
    quality: Quality = "normal",
    progress: Progress | None = None,
    max_pixels: int = MAX_PIXELS,
) -> Any:
    """Denoise an image and return the same kind of thing.

    Args:
        image: one of

            - a path (str or Path) of an image file: the result is a NumPy array of the file's depth (uint8, uint16 or
              float32), (H, W) if gray, else (H, W, 3), with alpha as one more channel. The EXIF orientation is applied,
              because an array cannot carry it;
            - a PIL image of mode 1, L, LA, P, RGB, RGBA, I;16 or F (values in [0, 1]): a PIL image of the same mode (a
              palette becomes RGB or RGBA, mode 1 becomes L) with the same ``info``. A transparent colour becomes
              an alpha channel (LA, RGBA), because denoised pixels would not have that colour any more; with I;16,
              which has no alpha, it is dropped;
            - a NumPy array (H, W), (H, W, 1), (H, W, 3) RGB or (H, W, 4) RGB and alpha; uint8, uint16, or floating in
              [0, 1]: an array of the same shape and dtype. In a masked array the valid pixels are denoised; pixels
              under the mask count as equal to their nearest valid ones. The mask and the values under it stay.
              Other subclasses that carry more than values (units, names) are refused; memory maps are read;
            - a tensor (C, H, W) or (N, C, H, W), C 1 or 3; torch.uint8, torch.uint16, or floating in [0, 1]: a tensor
              of the same shape, dtype and device, without gradient.

            Gray is denoised as a colour image with equal channels, and averaged back. Alpha is not touched. Integer
            results are rounded and clipped, floating ones are not clipped. An image whose values leave [0, 1], or fill
            a small part of it or of 16 bits, is denoised on its own range (:mod:`fastden.images.ranges`); highlights
            above 1 stay.
        sigma: the noise's standard deviation **on the scale 0-255, whatever the image's dtype** (the habit of the
            field; ``model(x, sigma)`` by contrast takes the scale of ``x``), white of the dtype being 255. Where an
            image has a range of its own, sigma is divided with it. ``"auto"`` estimates it from each image
            (:func:`fastden.estimate_noise`), as a curve of level over brightness; an estimate may be passed too. Else a
            number, a map (H, W), or for a batch of tensors also (N,), (N, 1), (N, 1, 1, 1) or (N, 1, H, W); arrays,
            tensors or lists. ``color`` knows 0 to 75, ``photo`` 0 to 60. Where sigma times ``strength`` is above 75,
            the image is divided until it is 75, denoised, and multiplied again; of a map, values above 100 count as
            100. A blind model takes only ``"auto"``, and ignores it.
        model: None is ``"color"``, which knows white noise best, where sigma is given or the estimate finds white noise
            (``is_white`` of :class:`fastden.NoiseEstimate`), and ``"photo"`` for all other noise. Else a bundled name
            (:func:`fastden.models`), a folder, a Hugging Face Hub id, or a network. Networks loaded by name are kept
            for the next call; a :class:`fastden.Denoiser` is fused anew by each: for several images call
            :func:`fastden.fuse` once and pass what it returns.
        device: where to compute, ``"cpu"``, ``"cuda"``, ...; None is CUDA where there is a device, else the CPU (of a
            network: where it is).
        dtype: of the computation, ``"float32"``, ``"bfloat16"``, ``"float16"``, ``"float64"`` or a torch dtype.
            ``"auto"`` takes bfloat16 for 8-bit images on machines with native bfloat16 matrix units, else float32.
        tile: ``"auto"`` (tiles that fit ``max_memory``), a side in pixels, or None for the whole image at once. The
            result is the same, up to rounding.
        max_memory: with ``tile="auto"``, what the network's tensors may take: bytes or such as ``"2GiB"``; None is
            1 GiB.
        strength: 0 to 2: factor of the noise level. 0 returns the image; above 1 it removes more. A blind model
            takes no noise level: there 0 to 1 blends its result with the image.
        chroma: the same for colour noise alone; None follows ``strength``. Where they differ the network runs twice.
        quality: ``"best"`` averages the results of all eight flips and quarter turns, at eight times the work.
            ``"fast"`` computes in 8-bit integers, on CPUs with VNNI and with models that know the ranges of their
            activations (the bundled ones, and others behind :func:`fastden.calibrate`): 1.5 (AMX) to
            1.8 times (without) as fast as bfloat16. ``color`` loses 0.01 to 0.02 dB of white noise's result
            (``benchmarks/results/int8.json``), ``photo`` up to 0.06 dB of 8-bit photographs',
            in the mean of a set (``benchmarks/results/real-photos-fast.json``). On GPUs of compute capability 9.0 it
            computes conv3 in 8-bit floating point, in 0.8 of the time of bfloat16, with ``color`` 0.003 dB worse
            (:func:`fastden.fuse`).
        progress: called with (pixels done, pixels in all) as tiles are finished.
        max_pixels: an image file of more pixels is refused before it is decoded; other kinds of images are not.

    Raises:
        UserError: a file that cannot be read (see :func:`fastden.images.codec.read_image`).
        ValueError, TypeError: naming the argument, what it was and what is accepted.

    Warns:
        ScaleWarning: a number above 0 is too small to matter in 8 bits, as the ``sigma`` of a network would be.
    """
    wishes = Wishes(strength, chroma, quality)
    options = _Options(model, device, dtype, tile, max_memory, wishes, progress, max_pixels)
    if isinstance(image, str | Path):
        return _denoise_path(image, sigma, options)
    if isinstance(image, Tensor):
        return _denoise_tensor(image, sigma, options)
    if isinstance(image, np.ma.MaskedArray):
        return _denoise_masked(image, sigma, options)
    if isinstance(image, np.ndarray):
        return _denoise_array(image, sigma, options)
    # An instance can exist only where the module is loaded: no need to import it otherwise.
    pil = sys.modules.get("PIL.Image")
    if pil is not None and isinstance(image, pil.Image):
        return _denoise_pil(image, sigma, options)
    lazy = " (fastden.denoise_array takes Dask and Zarr arrays)" if hasattr(image, "chunks") else ""
    accepted = f"a path, a PIL image, a NumPy array or a torch tensor{lazy}"
    raise TypeError(f"image: {type(image).__name__}; accepted: {accepted}")


class _Options:
    """The keyword arguments of :func:`denoise`, checked."""

    def __init__(
        self,
        model: Model | None,
        device: str | torch.device | None,
        dtype: str | torch.dtype,
        tile: int | Literal["auto"] | None,
        max_memory: int | str | None,
        wishes: Wishes,
        progress: Progress | None,
        max_pixels: int,
    ) -> None:
        check_max_pixels(max_pixels)
        if progress is not None and not callable(progress):
            raise TypeError(f"progress: {type(progress).__name__}; accepted: None, or a function of two numbers")
        self.model, self.device, self.dtype = model, device, dtype
        self.tile, self.max_memory = tile, parse_memory(max_memory)
        self.wishes, self.progress, self.max_pixels = wishes, progress, max_pixels

    def network(self, sigma: Any, eight_bit: bool) -> FusedDenoiser:
        """The network for a noise level; an estimate may choose it."""
        if eight_bit:
            _warn_of_sigma(sigma)
        model = default_model(sigma) if self.model is None else self.model
        return load_network(model, self.device, self.dtype, eight_bit=eight_bit, fast=self.wishes.fast)

    def estimates_first(self, sigma: Any) -> bool:
        """Whether the estimate chooses the network."""
        return self.model is None and isinstance(sigma, str) and sigma == "auto"

    def run(
        self,
        network: FusedDenoiser,
        batch: Tensor,
        level: float | Tensor | None,
        values: ValueRange,
        progress: Progress | None,
    ) -> Tensor:
        return run_network(
            network,
            batch,
            level,
            tile=self.tile,
            max_memory=self.max_memory,
            wishes=self.wishes,
            progress=progress,
            values=values,
        )


def _warn_of_sigma(sigma: Any) -> None:
    """Warn where a number for an 8-bit image is probably on the scale 0-1: nothing else would tell."""
    if not isinstance(sigma, Real) or not 0 < float(sigma) < ROUNDING or os.environ.get(SCALE_ENVIRONMENT) == "0":
        return
    frame, level = sys._getframe(), 1
    # Code that exec() runs may have no name.
    while frame.f_back is not None and str(frame.f_globals.get("__name__")).partition(".")[0] == "fastden":
        frame, level = frame.f_back, level + 1
    warnings.warn(
        f"sigma: {float(sigma):.2g}, which on the scale 0-255 is less than the rounding of 8 bits and removes next to"
        " nothing; 25 / 255 of a network is 25 here",
        ScaleWarning,
        stacklevel=level,
    )


def _denoise_array(array: Array, sigma: Any, options: _Options, stated: int = 0) -> Array:
    check_pixels(array)
    planes = array.reshape(array.shape[0], array.shape[1], -1)
    alpha = planes[:, :, 3:]
    network = options.network(sigma, array.dtype == np.uint8)
    colours = planes[:, :, :3]
    values = range_of_image(colours, stated)
    if options.estimates_first(sigma):
        sigma = estimate_of(colours, values)
        network = options.network(sigma, array.dtype == np.uint8)
    pixels, _ = denoise_pixels(
        colours,
        sigma,
        network,
        values=values,
        tile=options.tile,
        max_memory=options.max_memory,
        wishes=options.wishes,
        progress=options.progress,
    )
    if alpha.shape[2]:
        pixels = np.concatenate([pixels, alpha], 2)
    return pixels.reshape(array.shape)


def _denoise_masked(array: np.ma.MaskedArray[Any, Any], sigma: Any, options: _Options) -> Any:
    """Denoise the valid pixels; pixels under the mask count as equal to their nearest valid ones, and stay."""
    values, mask = without_mask(array), np.ma.getmaskarray(array)
    if mask.all():
        return array.copy()
    result = np.ma.MaskedArray(_denoise_array(values, sigma, options), mask=mask.copy(), fill_value=array.fill_value)
    result.data[mask] = array.data[mask]
    return result


def _denoise_path(path: str | Path, sigma: Any, options: _Options) -> Array:
    image = read_image(path, max_pixels=options.max_pixels).upright()
    gray = image.pixels.shape[2] == 1
    pixels = _denoise_array(image.pixels[:, :, 0] if gray else image.pixels, sigma, options, image.stated)
    if image.alpha is None:
        return pixels
    return np.dstack([pixels, image.alpha])


def _denoise_pil(image: Any, sigma: Any, options: _Options) -> Any:
    from PIL import Image

    mode = {"1": "L", "P": "RGB", "PA": "RGBA"}.get(image.mode, image.mode)
    if "transparency" in image.info:
        mode = {"L": "LA", "RGB": "RGBA"}.get(mode, mode)
    if mode not in ("L", "LA", "RGB", "RGBA", "F") and not mode.startswith("I;16"):
        raise TypeError(f"image: PIL mode {image.mode}; accepted: 1, L, LA, P, RGB, RGBA, I;16, F (or convert('RGB'))")
    array = np.array(image if mode == image.mode else image.convert(mode))
    if mode == "LA":
        array = np.dstack([_denoise_array(array[:, :, 0], sigma, options), array[:, :, 1]])
    else:
        array = _denoise_array(array, sigma, options)
    result = Image.fromarray(array)
    result.info = {key: value for key, value in image.info.items() if key != "transparency"}
    return result


def _denoise_tensor(tensor: Tensor, sigma: Any, options: _Options) -> Tensor:
    check_dense(tensor)
    if not tensor.is_floating_point() and tensor.dtype not in (torch.uint8, torch.uint16):
        raise TypeError(f"image: dtype {tensor.dtype}; accepted: torch.uint8, torch.uint16, or floating in [0, 1]")
    if tensor.dim() not in (3, 4) or tensor.shape[-3] not in (1, 3):
        raise ValueError(f"image: shape {tuple(tensor.shape)}; accepted: (C, H, W) or (N, C, H, W) with C 1 or 3")
    if 0 in tensor.shape:
        raise ValueError(f"image: shape {tuple(tensor.shape)}; accepted: no empty dimension")
    host = tensor.detach().cpu().resolve_neg()
    # A subclass that only adds to a tensor would keep the network from its fast form, for which tiles are planned.
    if type(host) is not Tensor and type(host).__torch_dispatch__ is Tensor.__torch_dispatch__:
        host = host.as_subclass(Tensor)
    batch = host.reshape(-1, *tensor.shape[-3:])
    network = options.network(sigma, tensor.dtype == torch.uint8)
    if batch.is_floating_point():
        batch = batch.to(torch.float64 if network.dtype == torch.float64 else torch.float32)
    images = [item.permute(1, 2, 0).numpy() for item in batch]
    ranges = [range_of_image(image) for image in images]
    networks = [network] * len(images)
    if options.estimates_first(sigma):
        estimates = [estimate_of(image, values) for image, values in zip(images, ranges, strict=True)]
        networks = [options.network(estimate, tensor.dtype == torch.uint8) for estimate in estimates]
        level = estimated_level(estimates)
    else:
        level = noise_level_of(sigma, network, images, (int(tensor.shape[-2]), int(tensor.shape[-1])), ranges)
    each = level.value
    levels = [each] * len(batch)
    if isinstance(each, Tensor) and each.dim() > 0 and len(each) == len(batch):
        levels = list(each.split(1))
    as_they_are = all(
        own_scale(own, values, options.wishes)[1] is None for own, values in zip(levels, ranges, strict=True)
    )
    if as_they_are and all(one is networks[0] for one in networks):
        result = options.run(networks[0], batch, each, ORDINARY, options.progress)
    else:
        result = torch.empty_like(batch)
        for index, (own, values) in enumerate(zip(levels, ranges, strict=True)):
            item, part = batch[index : index + 1], part_of(options.progress, index, len(batch))
            result[index : index + 1] = options.run(networks[index], item, own, values, part)
    # Nothing is removed: a network of single precision would round double values.
    return tensor.detach().clone() if options.wishes.idle else result.reshape(tensor.shape).to(tensor)
