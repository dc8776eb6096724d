"""Checks of a user's numbers: strengths, pixels, sizes of memory."""

from __future__ import annotations

import re
from numbers import Integral, Real

#: Binary exponents of the units of memory.
_UNITS = {"": 1, "K": 10, "M": 20, "G": 30, "T": 40}


def check_strength(strength: float, name: str = "strength") -> None:
    """Raise ValueError unless ``strength`` is a number in [0, 2]."""
    if not isinstance(strength, Real) or isinstance(strength, bool) or not 0 <= strength <= 2:
        raise ValueError(f"{name}: {strength!r}; accepted: a number from 0 to 2")


def check_max_pixels(max_pixels: float) -> None:
    """Raise ValueError unless ``max_pixels`` is a number of at least 1."""
    if not isinstance(max_pixels, Real) or not max_pixels >= 1:  # refuses NaN too
        raise ValueError(f"max_pixels: {max_pixels!r}; accepted: a number of at least 1")


def parse_memory(value: int | str | None) -> int | None:
    """Bytes of a size: ``2GiB``, ``500 MB`` (decimal without the i), ``4G`` (binary) or an integer; None stays None.

    Raises:
        ValueError: ``value`` has another form, or is less than 1 byte.
    """
    if value is None:
        return None
    number = int(value) if isinstance(value, Integral) else 0
    if isinstance(value, str):
        match = re.fullmatch(r"\s*(\d+(?:\.\d*)?)\s*([KMGT]?)(i?B)?\s*", value, re.IGNORECASE)
        if match:
            unit, ending = match[2].upper(), (match[3] or "").lower()
            factor = 10 ** (_UNITS[unit] * 3 // 10) if ending == "b" else 2 ** _UNITS[unit] if unit else 1
            number = int(float(match[1]) * factor)
    if isinstance(value, bool) or number < 1:
        raise ValueError(f"max_memory: {value!r}; accepted: bytes, or a size such as 500MB or 2GiB")
    return number
