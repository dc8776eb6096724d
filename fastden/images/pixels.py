"""Image values: the types that pixels come in, their scales, and what is accepted."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

#: Rows that are converted at a time: temporary values of a whole image would take more memory than the image.
ROWS = 64


def full_scale(dtype: np.dtype[Any]) -> float:
    """The value that stands for white: 255, 65535, or 1 for floating dtypes."""
    return 1.0 if dtype.kind == "f" else float(np.iinfo(dtype).max)


def check_finite(values: Array, error: type[Exception]) -> None:
    """Raise ``error`` unless all values of a floating image are finite."""
    low, high = (float(values.min()), float(values.max())) if values.size else (0.0, 0.0)
    if not (np.isfinite(low) and np.isfinite(high)):  # a NaN anywhere is the minimum
        raise error("floating image: NaN or infinity among the values; accepted: finite values on the scale [0, 1]")


def check_plain(array: Any, name: str) -> None:
    """Raise TypeError for a kind of array that carries more than values: a mask, a unit, names of fields.

    Its valid values would be mixed with those under the mask, and what it carries would be lost. Memory maps are plain.

    Args:
        array: any object; a Dask array is judged by its chunks.
        name: of the argument.
    """
    chunk = getattr(array, "_meta", array)
    if isinstance(chunk, np.ma.MaskedArray):
        accepted = "a plain array (array.filled(value), or fastden.denoise for a single image)"
        raise TypeError(f"{name}: a masked array; accepted: {accepted}")
    if isinstance(chunk, np.ndarray) and type(chunk) not in (np.ndarray, np.memmap):
        kind = f"{type(chunk).__module__}.{type(chunk).__qualname__}"
        raise TypeError(f"{name}: {kind}, of which more than the values would be lost; accepted: numpy.asarray of it")


def check_pixels(image: Any) -> None:
    """Raise TypeError or ValueError unless ``image`` has a dtype and a shape that can be denoised.

    Accepted: uint8, uint16, float16, float32 or float64; (H, W), (H, W, 1), (H, W, 3) or (H, W, 4), not empty.
    """
    if not isinstance(image, np.ndarray):
        raise TypeError(f"image: {type(image).__name__}; accepted: a NumPy array")
    check_plain(image, "image")
    if (image.dtype.kind, image.dtype.itemsize) not in (("u", 1), ("u", 2), ("f", 2), ("f", 4), ("f", 8)):
        raise TypeError(f"image: dtype {image.dtype}; accepted: uint8, uint16, or float16, float32, float64 in [0, 1]")
    if image.ndim not in (2, 3) or (image.ndim == 3 and image.shape[2] not in (1, 3, 4)):
        raise ValueError(f"image: shape {image.shape}; accepted: (H, W), (H, W, 1), (H, W, 3) or (H, W, 4)")
    if 0 in image.shape:
        raise ValueError(f"image: shape {image.shape}; accepted: height and width of at least 1")


def without_mask(array: np.ma.MaskedArray[Any, Any]) -> Array:
    """The pixels of a masked image, those under the mask equal to their nearest valid ones; 0 where none is valid.

    Raises:
        TypeError, ValueError: as of :func:`check_pixels`.
    """
    check_pixels(np.asarray(array.data))
    mask = np.ma.getmaskarray(array)
    values = np.array(array.data)
    hidden: Array = np.asarray(mask if mask.ndim == 2 else mask.any(2))
    if hidden.all() and mask.ndim == 3:  # no pixel is valid in all channels: each channel has its own neighbours
        for channel in range(values.shape[2]):
            _fill(values[:, :, channel], np.asarray(mask[:, :, channel]))
    else:
        _fill(values, hidden)
    return np.where(mask, values, array.data)


def _fill(values: Array, hidden: Array) -> None:
    """Replace each hidden pixel by the nearest one that is not; all may be hidden."""
    from scipy.ndimage import distance_transform_edt

    if hidden.any() and not hidden.all():
        nearest = distance_transform_edt(hidden, return_distances=False, return_indices=True)
        values[hidden] = values[tuple(nearest)][hidden]
    elif hidden.all():
        values[:] = 0


def to_dtype(values: Array, dtype: Any) -> Array:
    """Image values at another depth, rounded and clipped: uint8, uint16, and float32 on [0, 1].

    Raises:
        ValueError: NaN or infinity, which integers cannot hold.
    """
    dtype = np.dtype(dtype)
    if values.dtype == dtype:
        return values
    if values.ndim == 0:
        return _converted(values, dtype)
    result: Array = np.empty_like(values, dtype, subok=False)
    for top in range(0, len(values), ROWS):
        result[top : top + ROWS] = _converted(values[top : top + ROWS], dtype)
    return result


def _converted(values: Array, dtype: np.dtype[Any]) -> Array:
    source = full_scale(values.dtype)
    if dtype.kind == "f":
        return values.astype(dtype) / dtype.type(source)
    if values.dtype.kind == "f" and not np.isfinite(values.sum(dtype=np.float64)):
        raise ValueError("values: NaN or infinity, which integers cannot hold; accepted: finite values")
    scale = np.iinfo(dtype).max / source
    return np.rint(np.clip(values.astype(np.float32) * np.float32(scale), 0, np.iinfo(dtype).max)).astype(dtype)
