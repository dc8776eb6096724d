"""The parts of an image that its noise is estimated from, and maps of noise levels."""

from __future__ import annotations

import numpy as np

from fastden.images.pixels import Array, to_dtype

#: The highest noise level that the shipped models were trained for, on the scale 0-255.
MAX_SIGMA = 75.0
#: An image of at most this side, pixels, is judged as a whole.
WHOLE = 1024
#: Side of the crops of a larger one, pixels, and their number along an axis that is longer.
CROP, CROPS = 256, 4


def sample_windows(height: int, width: int) -> list[tuple[slice, slice]]:
    """Rows and columns of the crops from which an image's noise is estimated: at most a megapixel in all."""
    return [(rows, columns) for rows in crop_windows(height) for columns in crop_windows(width)]


def crop_windows(size: int) -> list[slice]:
    """The whole axis if it is at most WHOLE long, else CROPS pieces of CROP pixels, evenly spread."""
    if size <= WHOLE:
        return [slice(0, size)]
    # Multiples of 8 keep the cells of the estimate on the blocks of a JPEG.
    starts = [(2 * index + 1) * size // (2 * CROPS) - CROP // 2 for index in range(CROPS)]
    return [slice(start // 8 * 8, start // 8 * 8 + CROP) for start in starts]


def sigma_of_gray(values: Array) -> Array:
    """Noise levels on the scale 0-255, float32, that a gray image stands for: white is 255, at any depth."""
    return to_dtype(values, np.float32) * np.float32(255)
