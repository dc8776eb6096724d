"""The range of a picture's values: what the network's input and the noise level are divided by.

The network was trained on pictures in [0, 1]. Measured on a photograph at sigma 7.5: multiplied by 1.25 it gains 7.1 dB
instead of 7.3, by 2.5 3.4, by 0.25 6.6, by 0.06 (12 bits in a file of 16) 4.9. Within these bounds values are left as
they are; beyond them image and sigma are divided by the picture's own range, and the result is multiplied back.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from fastden.images.pixels import Array, full_scale

#: Ranges within these bounds stay: the highest value from 0.25 to 1.25, the lowest from -0.25 on.
LOWEST, SMALLEST, LARGEST = -0.25, 0.25, 1.25
#: Side of the squares whose means count: their noise is an eighth of a pixel's, and so does not look like a highlight.
BLOCK = 8
#: The noise level that the network was trained for at most, on the scale 0-1.
_MOST_NOISE = 75 / 255
# Values are counted in bins of 1 % on a logarithmic scale: counts of strips and chunks add up, in little memory.
_STEP = np.log(1.01)
_LEAST = 2.0**-20
_BINS = int(np.ceil(np.log(2.0**44) / _STEP))
# Values above four times that of nine tenths of the picture, or of a thousandth of it, do not decide: they would leave
# the rest too small a part of the network's range, and their own noise is small against them.
_MOST, _BODY, _BODY_FACTOR = 0.999, 0.9, 4.0
# Pictures on another scale, such as 0-255, for which a sigma on the scale of [0, 1] would be meaningless.
_OTHER, _OTHER_MEDIAN = (-4.0, 64.0), 8.0
# What the network is shown as it is. Beyond, a pixel that exceeds all squares by a factor is a defect.
_ORDINARY, _OUTLIER = (-4.0, 5.0), 8.0
# Of pixels one of so many on each axis is looked at; rows that are taken at a time.
_SAMPLED, _ROWS = 2, 256


@dataclass(frozen=True)
class ValueRange:
    """Which values of a picture stand for the network's 0 and 1, on the scale on which the dtype's white is 1.

    Attributes:
        low, high: 0 and 1 for ordinary pictures.
        outliers: whether values lie so far beyond that the network must not see them as they are.
    """

    low: float = 0.0
    high: float = 1.0
    outliers: bool = False

    @property
    def span(self) -> float:
        """By which image and noise level are divided."""
        return self.high - self.low

    @property
    def ordinary(self) -> bool:
        """Whether nothing is changed."""
        return self.low == 0 and self.high == 1 and not self.outliers

    def for_level(self, level: float | None) -> ValueRange:
        """This range, or the wider one in which a noise level on the scale 0-1 is one that the network knows."""
        if level is None or self.high >= 1 or level <= _MOST_NOISE * self.span:
            return self
        return ValueRange(self.low, min(1.0, self.low + level / _MOST_NOISE), self.outliers)

    def normalised(self, values: Array) -> Array:
        """Values of any dtype in this range, float32: what lies far beyond is cut."""
        scaled = values.astype(np.float32) / np.float32(full_scale(values.dtype) * self.span)
        return np.clip(scaled - np.float32(self.low / self.span), LOWEST - 1, LARGEST + 1)

    def note(self, dtype: np.dtype[Any]) -> str:
        """What a user should know of it; empty for ordinary pictures."""
        if self.ordinary:
            return ""
        white = full_scale(dtype)
        return (
            f"values from {self.low * white:.4g} to {self.high * white:.4g}: image and sigma are divided by this "
            "range, and the result is multiplied back"
        )


#: That of pictures which stay as they are.
ORDINARY = ValueRange()
#: Numbers of :meth:`RangeFinder.state`.
STATE = 3 * _BINS + 4


class RangeFinder:
    """Finds the range of a picture from its rows, in little memory.

    Args:
        dtype: of the values.
        error: raised where the values are not finite, or on another scale than [0, 1].
        name: what the error's message begins with.
    """

    def __init__(self, dtype: np.dtype[Any], error: type[Exception] = ValueError, name: str = "image") -> None:
        self.dtype, self.error, self.name = np.dtype(dtype), error, name
        # How many means of squares lie below zero and above it, and pixels above it, by their size.
        self.counts = np.zeros((3, _BINS), np.int64)
        # The lowest and highest pixel, then mean.
        self.extremes = np.array([np.inf, -np.inf, np.inf, -np.inf])

    def add(self, rows: Array) -> None:
        """Count rows (h, W, C), of which h is a multiple of 8 unless the picture ends there."""
        if self.dtype == np.uint8:  # what is stored in 8 bits was made to fill them
            return
        white = full_scale(self.dtype)
        low, high = float(rows.min()) / white, float(rows.max()) / white
        # A NaN anywhere is the minimum.
        if not (np.isfinite(low) and np.isfinite(high)):
            accepted = "accepted: finite values on the scale [0, 1]"
            raise self.error(f"{self.name}: NaN or infinity among the values; {accepted}")
        means = _block_means(rows) / white
        self.extremes[::2] = np.minimum(self.extremes[::2], (low, means.min()))
        self.extremes[1::2] = np.maximum(self.extremes[1::2], (high, means.max()))
        self.counts[0] += _count(-means)
        self.counts[1] += _count(means)
        self.counts[2] += _count(rows[::_SAMPLED, ::_SAMPLED].astype(np.float32) / np.float32(white))

    def state(self) -> Array:
        """What was counted, as numbers: (:data:`STATE`,) float64."""
        return np.concatenate([self.counts.ravel(), self.extremes])

    def join(self, state: Array) -> None:
        """Count what another finder has counted: its :meth:`state`."""
        self.counts += state[:-4].reshape(self.counts.shape).astype(np.int64)
        self.extremes[::2] = np.minimum(self.extremes[::2], state[-4::2])
        self.extremes[1::2] = np.maximum(self.extremes[1::2], state[-3::2])

    def result(self) -> ValueRange:
        """The range of what was added.

        Raises:
            error: floating values on another scale than [0, 1], or a pixel that stands far out of the picture.
        """
        below, above, pixels = self.counts
        if not above.any():
            return ORDINARY
        lowest, highest, low_mean, high_mean = (float(value) for value in self.extremes)
        low = max(-_quantile(below, _MOST), low_mean)
        high = min(_quantile(above, _MOST), _BODY_FACTOR * max(_quantile(above, _BODY), 1.0), high_mean)
        if self.dtype.kind == "f":
            self._check(low, high, _quantile(above, 0.5))
        bottom = low if low < LOWEST else 0.0
        if high > LARGEST:
            top = high
        elif bottom:
            top = max(high, bottom + SMALLEST)
        else:
            # A picture's noise counts where it is dark: the network must know the level that it is told.
            dark = min(_quantile(pixels, _MOST), highest)
            top = dark if 0 < dark < SMALLEST else 1.0
        return ValueRange(bottom, top, outliers=highest > _ORDINARY[1] or lowest < _ORDINARY[0])

    def _check(self, low: float, high: float, median: float) -> None:
        lowest, highest, low_mean, high_mean = (float(value) for value in self.extremes)
        if low < _OTHER[0] or high > _OTHER[1] or median > _OTHER_MEDIAN:
            accepted = "the scale [0, 1] (divide by the maximum)"
        elif lowest < min(_OUTLIER * low_mean, _ORDINARY[0]) or highest > max(_OUTLIER * high_mean, _ORDINARY[1]):
            accepted = "the scale [0, 1], no pixels that stand far out (clip them)"
        else:
            return
        raise self.error(f"{self.name}: values from {lowest:g} to {highest:g}; accepted: {accepted}")


def find_range(*images: Array, error: type[Exception] = ValueError, name: str = "image") -> ValueRange:
    """The range of the values of a picture, or of a file's pages together; see :class:`RangeFinder`.

    Args:
        *images: (H, W, C), uint8, uint16 or floating, of one dtype.
        error, name: as of :class:`RangeFinder`.
    """
    finder = RangeFinder(images[0].dtype, error, name)
    for image in images:
        for top in range(0, image.shape[0], _ROWS):
            finder.add(image[top : top + _ROWS])
    return finder.result()


def _block_means(rows: Array) -> Array:
    """Means of squares of 8 pixels, of smaller ones at the edges: (h, w, C) float64."""
    starts = [np.arange(0, size, BLOCK) for size in rows.shape[:2]]
    sums = np.add.reduceat(np.add.reduceat(rows, starts[0], axis=0, dtype=np.float64), starts[1], axis=1)
    sizes = [np.diff(np.append(start, size)) for start, size in zip(starts, rows.shape[:2], strict=True)]
    means: Array = sums / (sizes[0][:, None] * sizes[1])[:, :, None]
    return means


def _count(values: Array) -> Array:
    """How many values lie in each bin; the first bin holds all that are not above zero."""
    logarithms = np.log(np.maximum(values, _LEAST) / _LEAST) / _STEP
    return np.bincount(np.minimum(np.ceil(logarithms), _BINS - 1).astype(np.intp).ravel(), minlength=_BINS)


def _quantile(counts: Array, share: float) -> float:
    """The value up to which a share of what was counted lies, at most 1 % too high."""
    index = int(np.searchsorted(np.cumsum(counts), share * counts.sum()))
    return float(_LEAST * np.exp(index * _STEP)) if index else 0.0
