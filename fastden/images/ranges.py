"""The range that a picture's values take, found before anything is computed, and its own scale [0, 1].

The networks know pictures on [0, 1]. A photograph times 2.5 is hardly denoised, nor is one whose camera fills 12 of a
file's 16 bits. Such a picture, and its noise level with it, is divided by its own range first. Everything here counts,
so that strips, chunks and whole pictures find the same range.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from fastden.images.pixels import Array, full_scale
from fastden.images.samples import MAX_SIGMA

#: Values that are taken as they are, white being 1: a picture is brought to its own range where its robust extremes
#: lie outside of the interval, or where white is below LEAST_WHITE. (With a quarter of the range filled the estimated
#: network errs by 13 % more than with all of it, with half by 3 %, with an eighth by 35 %: the demo's photograph, 10.)
LOWEST, HIGHEST, LEAST_WHITE = -0.25, 1.25, 0.25
#: Beyond these, values are on another scale, such as 0-255, and what a noise level means cannot be known.
OTHER_SCALE = 16.0
#: Side of the blocks whose median tells bright pixels from noise and lone hot pixels.
BLOCK = 8
#: Share of the blocks, and of the values, that may lie beyond a range without changing it.
FEW_BLOCKS, FEW_VALUES = 0.01, 0.001
#: The highest level that the shipped models know, on the scale 0-1. Noise goes to six times a level.
STRONGEST, _NOISE_REACH = MAX_SIGMA / 255, 6.0
# A bin holds the floats that share sign, exponent and five bits of the mantissa: it is 3 % wide.
_SHIFT = 18
_BINS = 1 << (31 - _SHIFT)
#: Rows that are counted at a time: a multiple of BLOCK.
_ROWS = 64
#: What is counted of a picture, a record that sums: :class:`RangeFinder`.
COUNTS = np.dtype(
    [
        ("low", np.float64),
        ("high", np.float64),
        ("values", np.int64),
        ("lit", np.int64),
        ("blocks", np.int64),
        ("positive", np.int64, _BINS),
        ("bright", np.int64, _BINS),
        ("deep", np.int64, _BINS),
    ]
)


@dataclass(frozen=True)
class ValueRange:
    """What a picture's values span, on the scale where white of their dtype is 1.

    Attributes:
        black, white: what becomes 0 and 1 for the network; 0 and 1 themselves for an ordinary picture.
        low, high: the extremes.
        reason: why the range is another one; empty for an ordinary picture.
    """

    black: float = 0.0
    white: float = 1.0
    low: float = 0.0
    high: float = 1.0
    reason: str = ""

    @property
    def span(self) -> float:
        """What a noise level is divided by."""
        return self.white - self.black

    @property
    def ordinary(self) -> bool:
        """Whether values are taken as they are."""
        return self.black == 0 and self.white == 1

    def limits(self, level: float | None = None) -> tuple[float, float] | None:
        """Between which values, on the picture's own scale, the network sees them; None where all are.

        What lies beyond is no noise of that level. It would change the pixels around it, so that the network sees the
        limit, and the excess is added to the result, except for lone pixels.

        Args:
            level: the highest noise level on the picture's own scale; None for one that is not known.
        """
        reach = _NOISE_REACH * min(STRONGEST if level is None else level, 1.0)
        low, high = LOWEST - reach, HIGHEST + reach
        inside = low <= (self.low - self.black) / self.span and (self.high - self.black) / self.span <= high
        return None if inside else (low, high)

    def own_scale(self, values: Array) -> Array:
        """``values`` of any dtype as float32 on the picture's own scale, cut off where no noise can be."""
        own = np.ascontiguousarray(values, np.float32) / np.float32(full_scale(values.dtype))
        if not self.ordinary:
            own = (own - np.float32(self.black)) / np.float32(self.span)
        limits = self.limits()
        return own if limits is None else np.clip(own, *limits, dtype=np.float32)

    def describe(self, dtype: np.dtype[Any]) -> str:
        """One line for a person; empty for an ordinary picture."""
        if self.ordinary:
            return ""
        white = full_scale(dtype)
        black, top = (f"{value * white:.0f}" if white > 1 else f"{value:.3g}" for value in (self.black, self.white))
        of = f" of {white:.0f}" if white > 1 else ""
        return f"{self.reason}: denoised on the range {black} to {top}{of}, and sigma divided with it"

    def as_record(self) -> dict[str, Any]:
        """For JSON."""
        return {"black": self.black, "white": self.white, "reason": self.reason}


#: Values as they are.
ORDINARY = ValueRange()


class RangeFinder:
    """Counts the values of a picture that comes by rows, and says what range they take.

    Args:
        shape: (H, W, C) of the picture, without alpha.
        dtype: uint8, uint16 or floating.
        stated: the highest value that the file says there may be, of integers; 0 where it says nothing.

    Attributes:
        counts: a record of :data:`COUNTS`.
    """

    def __init__(self, shape: tuple[int, ...], dtype: np.dtype[Any], stated: int = 0) -> None:
        self.height, self.width = shape[:2]
        self.dtype, self.stated = np.dtype(dtype), stated
        self.counts = np.zeros((), COUNTS)
        self.counts["low"], self.counts["high"] = np.inf, -np.inf
        self._most = FEW_VALUES * self.height * self.width * shape[2]

    @property
    def settled(self) -> bool:
        """Whether further rows change nothing: of 8 bits at once, of 16 when the picture is seen to fill them."""
        if self.dtype == np.uint8:
            return True
        return self.dtype.kind != "f" and not self._limited and int(self.counts["lit"]) > self._most

    @property
    def _limited(self) -> bool:
        return 0 < self.stated < full_scale(self.dtype)

    def add(self, rows: Array) -> None:
        """Count the next rows (n, W, C); all but the last have a multiple of :data:`BLOCK` rows.

        Raises:
            ValueError: NaN or infinity.
        """
        for start in range(0, len(rows), _ROWS):
            if self.settled:
                return
            self._count(rows[start : start + _ROWS])

    def _count(self, rows: Array) -> None:
        counts = self.counts
        low, high = float(rows.min()), float(rows.max())
        if not (np.isfinite(low) and np.isfinite(high)):  # a NaN anywhere is the minimum
            raise ValueError("NaN or infinity among the values; accepted: finite values on the scale [0, 1]")
        if max(-low, high) > float(np.finfo(np.float32).max):  # of float64: beyond what is counted and computed in
            raise ValueError(f"values from {low:g} to {high:g}; accepted: the scale [0, 1] (divide by the maximum)")
        white = full_scale(self.dtype)
        counts["low"] = min(float(counts["low"]), low / white)
        counts["high"] = max(float(counts["high"]), high / white)
        counts["values"] += rows.size
        counts["lit"] += np.count_nonzero(rows >= LEAST_WHITE * white)
        if int(counts["lit"]) <= self._most or self._limited:
            counts["positive"] += _histogram(rows)
        if self.dtype.kind == "f":
            height, width = min(BLOCK, self.height), min(BLOCK, self.width)
            counts["blocks"] += (len(rows) // height) * (rows.shape[1] // width) * rows.shape[2]
            if high > HIGHEST:
                counts["bright"] += _histogram(_medians(rows, height, width, HIGHEST))
            if low < LOWEST:
                counts["deep"] += _histogram(_medians(-rows, height, width, -LOWEST))

    def result(self) -> ValueRange:
        """The range.

        Raises:
            ValueError: values on another scale than [0, 1].
        """
        if self.settled:
            return ORDINARY
        return range_of(self.counts, self.dtype, self.stated)


def range_of(counts: Any, dtype: np.dtype[Any], stated: int = 0) -> ValueRange:
    """The range of a picture, from its counts; see :class:`RangeFinder`.

    Args:
        counts: a record of :data:`COUNTS`.
        dtype: of the picture.
        stated: the highest value that the file states; 0 for none.

    Raises:
        ValueError: values on another scale than [0, 1].
    """
    low, high, values = float(counts["low"]), float(counts["high"]), int(counts["values"])
    few = FEW_VALUES * values
    if dtype.kind != "f":
        return _of_integers(counts, full_scale(dtype), stated, few)
    some = FEW_BLOCKS * int(counts["blocks"])
    white, black, reason = 1.0, 0.0, ""
    if counts["bright"].sum() > some:
        white = _quantile(counts["bright"], some)
        reason = f"values go up to {high:.3g}"
    if counts["deep"].sum() > some:
        black = -_quantile(counts["deep"], some)
        reason = f"values go from {low:.3g} to {high:.3g}"
    if max(white, -black) > OTHER_SCALE:
        raise ValueError(f"values from {low:g} to {high:g}; accepted: the scale [0, 1] (divide by the maximum)")
    if white == 1 and black == 0 and int(counts["lit"]) <= few:
        top = _quantile(counts["positive"], few)
        if 0 < top < LEAST_WHITE:
            white, reason = top, f"values are below {top:.2g}, except for at most 1 of 1000"
    return ValueRange(black, white, low, high, reason)


def _of_integers(counts: Any, most: float, stated: int, few: float) -> ValueRange:
    low, high = float(counts["low"]), float(counts["high"])
    positive = counts["positive"]
    if positive.sum() > few:
        least, top = _bin(_rank(positive, few))
        if 0 < stated < most and least <= stated <= top / LEAST_WHITE:
            return ValueRange(0.0, stated / most, low, high, f"the file states values up to {stated}")
        if int(counts["lit"]) <= few:
            # Bins begin at powers of two.
            bits = int(np.log2(least)) + 1
            reason = f"values fill {bits} of {int(most).bit_length()} bits"
            return ValueRange(0.0, (2**bits - 1) / most, low, high, reason)
    return ValueRange(low=low, high=high)


def find_range(image: Array, stated: int = 0) -> ValueRange:
    """The range of a whole picture (H, W, C), without alpha; see :class:`RangeFinder`."""
    finder = RangeFinder(image.shape, image.dtype, stated)
    finder.add(image)
    return finder.result()


def count_range(part: Array, shape: tuple[int, ...]) -> Any:
    """Counts of a part (h, w, C) of a picture, whose sides are multiples of :data:`BLOCK` unless the picture ends.

    Args:
        part: without alpha.
        shape: (H, W, C) of the picture.
    """
    finder = RangeFinder(shape, part.dtype)
    finder._most = np.inf  # how many are few depends on the whole picture
    finder.add(part)
    return finder.counts


def joined(counts: Array) -> Any:
    """The counts of a picture from those of its parts, records of :data:`COUNTS`."""
    whole = np.zeros((), COUNTS)
    flat = counts.reshape(-1)
    for name in COUNTS.names or ():
        whole[name] = {"low": np.min, "high": np.max}.get(name, np.sum)(flat[name], 0)
    return whole


def _histogram(values: Array) -> Array:
    """How many positive values lie in each bin."""
    values = np.ascontiguousarray(values, np.float32).reshape(-1)
    bits = values[values > 0].view(np.uint32)
    return np.bincount(bits >> _SHIFT, minlength=_BINS)[:_BINS]


def _rank(histogram: Array, above: float) -> int:
    """The bin in which, counted from the top, more than ``above`` values have come."""
    return _BINS - 1 - int(np.argmax(np.cumsum(histogram[::-1]) > above))


def _quantile(histogram: Array, above: float) -> float:
    """The upper end of the bin beyond which at most ``above`` values lie; 0 where there are not so many."""
    return _bin(_rank(histogram, above))[1] if histogram.sum() > above else 0.0


def _bin(index: int) -> tuple[float, float]:
    """The ends of a bin."""
    low, high = np.array([index << _SHIFT, (index + 1) << _SHIFT], np.uint32).view(np.float32)
    return float(low), float(high)


def _medians(rows: Array, height: int, width: int, least: float) -> Array:
    """Medians above ``least`` of the blocks of rows (n, W, C), each channel on its own."""
    channels = rows.shape[2]
    down, across = len(rows) // height, rows.shape[1] // width
    blocks = rows[: down * height, : across * width].reshape(down, height, across, width, channels)
    bright = np.count_nonzero(blocks > least, axis=(1, 3)) > height * width // 2
    at = np.nonzero(bright)
    chosen = blocks.transpose(0, 2, 4, 1, 3)[at[0], at[1], at[2]].reshape(len(at[0]), height * width)
    return np.median(chosen, axis=1) if len(chosen) else chosen.reshape(-1)
