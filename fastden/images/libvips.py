"""libvips: loaded on first use, its types, and its errors."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, BinaryIO

import numpy as np

from fastden.errors import UserError
from fastden.images.kinds import unknown_format, why_not_read

VIPS_DTYPES = {"uchar": np.uint8, "ushort": np.uint16, "float": np.float32, "double": np.float64}
VIPS_FORMATS = {np.dtype(np.uint8): "uchar", np.dtype(np.uint16): "ushort", np.dtype(np.float32): "float"}


def load_vips() -> Any:
    """The module pyvips.

    Raises:
        UserError: it cannot be loaded.
    """
    try:
        import pyvips
    except (ImportError, OSError) as error:  # OSError: pyvips is there, the libvips library is not
        message = f"pyvips cannot be loaded ({error}); install it with its library: pip install 'pyvips[binary]'"
        raise UserError(message) from error
    return pyvips


def detail(error: Exception) -> str:
    """The most useful line of a libvips error: causes stand below the failed call."""
    lines = [line.strip() for line in str(error).splitlines()]
    return next((line for line in reversed(lines) if len(line) > 12), "no further reason given")


@contextlib.contextmanager
def vips_errors(file: BinaryIO | None = None) -> Iterator[None]:
    """Turns libvips' error about a file into the user's error.

    Args:
        file: what is read: a sound file of a kind that is not read here is told from a damaged one.
    """
    try:
        yield
    except load_vips().Error as error:
        text = detail(error)
        told = None if file is None else why_not_read(file, text)
        if told is not None:
            raise told from error
        if "known format" in text:
            raise unknown_format() from error
        raise UserError(f"corrupt or truncated ({text})") from error
