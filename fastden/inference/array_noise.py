"""The noise and the range of each image of an array, as elements of arrays that broadcast against the images."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from fastden.errors import ScaleWarning
from fastden.images.pixels import Array, full_scale
from fastden.images.ranges import ValueRange
from fastden.images.samples import crop_windows, sample_windows
from fastden.inference.estimate import NoiseEstimate, check_dense, estimator_of, noise_of_samples
from fastden.inference.run import noise_level_of
from fastden.network.fused import FusedDenoiser
from fastden.network.inputs import SCALE_ENVIRONMENT, as_tensor
from fastden.network.level import KNOTS

#: Fields of an estimate beside its curve.
OTHERS = ("coarseness", "uncertainty", "black", "white")
#: An estimate as one element, so that it broadcasts against an image as a number does.
CURVE = np.dtype([("sigmas", np.float64, KNOTS), *((name, np.float64) for name in OTHERS)])
#: A :class:`ValueRange` likewise.
RANGE = np.dtype([(name, np.float64) for name in ("black", "white", "low", "high")])


def as_ranges(ranges: Sequence[ValueRange]) -> Array:
    """Ranges as elements of :data:`RANGE`, (N,)."""
    return np.array([(one.black, one.white, one.low, one.high) for one in ranges], RANGE)


def value_range_of(ranges: Array) -> ValueRange:
    """The range of an image, (1, 1, 1) of :data:`RANGE`."""
    black, white, low, high = (float(value) for value in ranges.reshape(-1)[0])
    return ValueRange(black, white, low, high)


def estimates(da: Any, planes: Any, ranges: Any, model: str | Path | None = None) -> Any:
    """The estimated curve of each image, lazily: (..., 1, 1, 1) of :data:`CURVE` for (..., Y, X, C)."""
    pieces: list[int] = []
    for axis in (planes.ndim - 3, planes.ndim - 2):
        before = (slice(None),) * axis
        crops = [(*before, part) for part in crop_windows(planes.shape[axis])]
        pieces.append(len(crops))
        planes = da.concatenate([planes[crop] for crop in crops], axis)
    planes = planes.rechunk(dict.fromkeys(range(planes.ndim - 3, planes.ndim), -1))
    chunks = (*planes.chunks[:-3], (1,), (1,), (1,))
    meta = np.empty((0,) * planes.ndim, CURVE)
    settings = {"model": model, "pieces": tuple(pieces)}
    return da.map_blocks(estimate_block, planes, ranges, chunks=chunks, dtype=CURVE, meta=meta, **settings)


def estimate_block(
    planes: Array, ranges: Array, model: str | Path | None = None, pieces: tuple[int, int] | None = None
) -> Array:
    """Curves of images (..., Y, X, C), or of their crops side by side: ``pieces`` along Y and along X."""
    estimator = estimator_of(model)
    curves = np.zeros((*planes.shape[:-3], 1, 1, 1), CURVE)
    spread = np.broadcast_to(ranges, curves.shape)
    for index in np.ndindex(planes.shape[:-3]):
        image = planes[index][..., :3]
        if pieces is None:
            windows = [image[rows, columns] for rows, columns in sample_windows(*image.shape[:2])]
        else:
            windows = [crop for rows in np.split(image, pieces[0], 0) for crop in np.split(rows, pieces[1], 1)]
        estimate = noise_of_samples(windows, value_range_of(spread[index]), estimator)
        curves[index] = element(estimate)
    return curves


def element(estimate: NoiseEstimate) -> tuple[Any, ...]:
    """An estimate as an element of :data:`CURVE`."""
    return (estimate.sigmas, *(getattr(estimate, name) for name in OTHERS))


def noise_estimate(element: Array) -> NoiseEstimate:
    """The inverse of :func:`element`; ``element`` has one item. Its ``sigma`` is the mean of the curve."""
    sigmas = element["sigmas"].reshape(KNOTS)
    fields: dict[str, Any] = {name: float(element[name].item()) for name in OTHERS}
    return NoiseEstimate(tuple(sigmas.tolist()), float(sigmas.mean()), **fields)


def levels_of_images(sigma: Any, network: FusedDenoiser, planes: Any) -> Array | None:
    """``sigma`` on the scale 0-255 as a float64 array (..., Y, X, 1) that broadcasts against ``planes`` (..., Y, X, C).

    NaN for a blind network; of :data:`CURVE` for an estimate; None where it is to be estimated.

    Raises:
        TypeError, ValueError: as of :func:`fastden.inference.run.noise_level_of`.
    """
    lead, (height, width) = planes.shape[:-3], planes.shape[-3:-1]
    ones = (1,) * len(lead)
    if isinstance(sigma, str) and sigma == "auto":
        return None if network.noise_level_input else np.full((*ones, 1, 1, 1), np.nan)
    if isinstance(sigma, NoiseEstimate):
        noise_level_of(sigma, network, [], (height, width))
        curve = np.zeros((*ones, 1, 1, 1), CURVE)
        curve[...] = element(sigma)
        return curve
    if isinstance(sigma, list | tuple | Tensor):
        sigma = _as_array(sigma)
    if isinstance(sigma, np.ndarray) and sigma.ndim:
        if sigma.shape == lead:
            shape = (*lead, 1, 1, 1)
        elif sigma.shape == (height, width):
            shape = (*ones, height, width, 1)
        else:
            each = f"{lead} (one for each image), " if lead else ""
            raise ValueError(f"sigma: shape {sigma.shape}; accepted: a number, {each}{(height, width)} (a map)")
        # Range and kind are checked as for one image of this many pixels.
        noise_level_of(sigma.reshape(1, -1), network, [], (1, sigma.size))
        return np.array(sigma, np.float64).reshape(shape)
    noise_level_of(sigma, network, [], (height, width))
    return np.full((*ones, 1, 1, 1), float(sigma))


def _as_array(sigma: Any) -> Array:
    """The values of a list or a tensor; refuses what :func:`fastden.network.inputs.as_tensor` refuses."""
    tensor = as_tensor(sigma)
    check_dense(tensor, "sigma")
    if isinstance(sigma, list | tuple) and not any(isinstance(value, Tensor) for value in sigma):
        return np.array(sigma)  # in double precision
    host = tensor.detach().cpu().resolve_neg()
    return (host.double() if host.is_floating_point() else host).numpy()


def warn_of_levels(levels: Array | None, fixed: ValueRange | None, dtype: np.dtype[Any]) -> None:
    """Warn where a level for integers exceeds the range that was given: white of the dtype was hardly meant."""
    if levels is None or levels.dtype == CURVE or fixed is None or dtype.kind == "f":
        return
    highest = float(levels.max())
    if not highest / 255 > fixed.span or os.environ.get(SCALE_ENVIRONMENT) == "0":  # False for NaN too
        return
    white = full_scale(dtype)
    counts, span = highest / 255 * white, fixed.span * white
    warnings.warn(
        f"sigma: {highest:g}, which for {dtype} is a deviation of {counts:.4g} counts, more than the {span:.4g} of"
        f" value_range: for integers 255 is white of the dtype; {highest:g} of 255 of this range is sigma ="
        f" {highest * fixed.span:.3g}",
        ScaleWarning,
        stacklevel=3,
    )
