"""How noisy an image is: what ``sigma="auto"`` means."""

from __future__ import annotations

import math
import warnings

import numpy as np

from fastden.images.pixels import Array, check_floats, check_pixels, full_scale, to_dtype

#: The highest noise level that the shipped models were trained for, on the scale 0-255.
MAX_SIGMA = 75.0
#: Side of a crop that the estimate looks at; a larger image is judged by four of them.
CROP = 512


def estimate_sigma(image: Array) -> float:
    """Standard deviation of an image's noise on the scale 0-255, whatever its dtype: what ``denoise(sigma=)`` takes.

    The median absolute deviation of the finest diagonal wavelet coefficients (``skimage.restoration.estimate_sigma``),
    averaged over the channels. An image larger than 512 pixels along an axis is judged by crops of 512 pixels in the
    middle of its halves (at most four), of which the median counts: the cost does not grow with the image.

    The estimate takes noise for white and Gaussian. Fine texture raises it; clipped shadows and highlights lower it.
    On real camera noise, which neighbouring pixels share after demosaicing, scaling or JPEG compression, it was
    measured to be several times too low: pass a number where you know better.

    Args:
        image: (H, W), (H, W, 1), (H, W, 3) RGB or (H, W, 4) RGB and alpha, which is left out; uint8, uint16, or
            floating in [0, 1].

    Returns:
        0 to 75, the range that the shipped models were trained for. 0 for an image without variation.

    Raises:
        TypeError: ``image`` is no NumPy array, or of another dtype.
        ValueError: another shape, or floating values that are not finite or on another scale.
    """
    check_pixels(image)
    planes = image.reshape(*image.shape[:2], -1)[:, :, :3]
    if planes.dtype.kind == "f":
        check_floats(planes, ValueError, "image")
    windows = sample_windows(planes.shape[0], planes.shape[1])
    return sigma_of_samples([planes[rows, columns] for rows, columns in windows])


def sample_windows(height: int, width: int) -> list[tuple[slice, slice]]:
    """Rows and columns of the crops by which :func:`estimate_sigma` judges an image."""
    return [(rows, columns) for rows in crop_windows(height) for columns in crop_windows(width)]


def sigma_of_samples(crops: list[Array]) -> float:
    """The estimate from an image's crops (H, W, C), which :func:`sample_windows` chose; see :func:`estimate_sigma`."""
    return min(max(float(np.median([_estimate_crop(crop) for crop in crops])), 0.0), MAX_SIGMA)


def sigma_of_gray(values: Array) -> Array:
    """Noise levels on the scale 0-255, float32, that a gray image stands for: white is 255, at any depth."""
    return to_dtype(values, np.float32) * np.float32(255)


def crop_windows(size: int) -> list[slice]:
    """The whole axis if it is at most CROP long, else CROP pixels in the middle of each half (or as near as fits)."""
    if size <= CROP:
        return [slice(0, size)]
    starts = (max(size // 4 - CROP // 2, 0), min(3 * size // 4 - CROP // 2, size - CROP))
    return [slice(start, start + CROP) for start in starts]


def _estimate_crop(crop: Array) -> float:
    from skimage.restoration import estimate_sigma as wavelet_estimate

    values = crop.astype(np.float32) * np.float32(255 / full_scale(crop.dtype))
    with warnings.catch_warnings():
        # Without a single non-zero coefficient (a flat crop, one pixel) the median is of nothing: NaN, with a warning.
        # Another one suspects colour in an image of less than five columns.
        warnings.simplefilter("ignore")
        sigma = float(wavelet_estimate(values, average_sigmas=True, channel_axis=-1))
    # What a flat crop leaves is the wavelet transform's rounding.
    return sigma if math.isfinite(sigma) and sigma > 1e-9 else 0.0
