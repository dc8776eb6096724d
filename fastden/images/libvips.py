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
    _decode_all_errors(pyvips.error)
    return pyvips


def _decode_all_errors(module: Any) -> None:
    """Let pyvips read errors that are not UTF-8, such as those that quote a damaged file.

    pyvips decodes libvips' buffer of errors before it clears it. Where that fails, the bytes stay there, and every
    later error of the process fails in the same way.

    Args:
        module: pyvips.error; its exceptions decode with the function that is replaced here.
    """
    if hasattr(module, "_to_string"):
        module._to_string = _decoded


def _decoded(pointer: Any) -> str:
    from pyvips import ffi

    if pointer == ffi.NULL:
        return "NULL"
    text = ffi.string(pointer)
    return text.decode("utf-8", errors="replace") if isinstance(text, bytes) else str(text)


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
