"""The noise and the range of each image of an array, as elements of arrays that broadcast against the images."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fastden.images.pixels import Array
from fastden.images.ranges import ValueRange
from fastden.images.samples import crop_windows, sample_windows
from fastden.inference.estimate import NoiseEstimate, estimator_of, noise_of_samples
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
