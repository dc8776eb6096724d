"""Image values: the types that pixels come in, their scales, and what is accepted."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

#: Floating images are on the scale [0, 1]; unclipped noise may leave it, values on the scale 0-255 leave it further.
FLOAT_RANGE = (-4.0, 5.0)


def full_scale(dtype: np.dtype[Any]) -> float:
    """The value that stands for white: 255, 65535, or 1 for floating dtypes."""
    return 1.0 if dtype.kind == "f" else float(np.iinfo(dtype).max)


def check_floats(values: Array, error: type[Exception], name: str = "floating image") -> None:
    """Raise ``error`` unless all values are finite and on the scale [0, 1], which noise may leave."""
    low, high = (float(values.min()), float(values.max())) if values.size else (0.0, 0.0)
    # A NaN anywhere is the minimum.
    if not (np.isfinite(low) and np.isfinite(high)):
        raise error(f"{name}: NaN or infinity among the values; accepted: finite values on the scale [0, 1]")
    if low < FLOAT_RANGE[0] or high > FLOAT_RANGE[1]:
        raise error(f"{name}: values from {low:g} to {high:g}; accepted: the scale [0, 1] (divide by the maximum)")


def to_dtype(values: Array, dtype: Any) -> Array:
    """Image values at another depth, rounded and clipped: uint8, uint16, and float32 on [0, 1]."""
    dtype = np.dtype(dtype)
    if values.dtype == dtype:
        return values
    source = full_scale(values.dtype)
    if dtype.kind == "f":
        return values.astype(dtype) / dtype.type(source)
    scale = np.iinfo(dtype).max / source
    return np.rint(np.clip(values.astype(np.float32) * np.float32(scale), 0, np.iinfo(dtype).max)).astype(dtype)
