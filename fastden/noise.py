"""How noisy an image is: what ``sigma="auto"`` means."""

from __future__ import annotations

import math
import warnings

import numpy as np

from fastden.values import Array, full_scale

#: The range of noise levels that the shipped models were trained for, on the scale [0, 1].
MAX_SIGMA = 75 / 255
#: Side of a crop that the estimate looks at; a larger image is judged by four of them.
CROP = 512


def estimate_sigma(image: Array) -> float:
    """Standard deviation of an image's noise, on the scale [0, 1].

    The median absolute deviation of the finest diagonal wavelet coefficients (``skimage.restoration.estimate_sigma``),
    averaged over the channels. An image larger than 512 pixels along an axis is judged by crops of 512 pixels in the
    middle of its halves (at most four), of which the median counts: the cost does not grow with the image.

    The estimate takes noise for white and Gaussian. Fine texture raises it; it is too low where neighbouring pixels
    share their noise (raw conversion, scaling, JPEG compression) and in clipped shadows and highlights. Pass a number
    where you know better.

    Args:
        image: (H, W) or (H, W, C), uint8, uint16, or floating in [0, 1].

    Returns:
        0 to 75/255, the range that the models were trained for. 0 for an image without variation.
    """
    if image.ndim == 2:
        image = image[:, :, None]
    found = [
        _estimate_crop(image[rows, columns])
        for rows in _windows(image.shape[0])
        for columns in _windows(image.shape[1])
    ]
    return min(max(float(np.median(found)), 0.0), MAX_SIGMA)


def _windows(size: int) -> list[slice]:
    """The whole axis if it is at most CROP long, else CROP pixels in the middle of each half (or as near as fits)."""
    if size <= CROP:
        return [slice(0, size)]
    starts = (max(size // 4 - CROP // 2, 0), min(3 * size // 4 - CROP // 2, size - CROP))
    return [slice(start, start + CROP) for start in starts]


def _estimate_crop(crop: Array) -> float:
    from skimage.restoration import estimate_sigma as wavelet_estimate

    values = crop.astype(np.float32) / np.float32(full_scale(crop.dtype))
    with warnings.catch_warnings():
        # Without a single non-zero coefficient (a flat crop, one pixel) the median is of nothing: NaN, with a warning.
        # Another one suspects colour in an image of less than five columns.
        warnings.simplefilter("ignore")
        sigma = float(wavelet_estimate(values, average_sigmas=True, channel_axis=-1))
    return sigma if math.isfinite(sigma) else 0.0
