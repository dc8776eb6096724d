"""Errors: UserError, which a command shows as one line, and errors that end one image but not the run."""

from __future__ import annotations

import traceback


class UserError(Exception):
    """A mistake that the user can mend: the message names the argument, the value and what is accepted."""


class ScaleWarning(UserWarning):
    """An image that was given to a network seems to be on another scale than [0, 1], such as 0-255.

    Networks show it once in a process. :func:`fastden.denoise` warns, too, where the noise level of an 8-bit image
    seems to be on the scale 0-1, and :func:`fastden.denoise_array` where one for integers exceeds their given range.
    ``warnings.filterwarnings("ignore", category=fastden.ScaleWarning)`` or the environment variable
    ``FASTDEN_SCALE_WARNING=0`` turns it off.
    """


#: Errors that a single image can cause. All others are defects of the program.
FAILURES = (UserError, ValueError, TypeError, OSError, MemoryError, RuntimeError)


def shown_bytes(count: int) -> str:
    """A number of bytes for a user: ``4.38 MiB``; rounded up, so that it can be given as a limit."""
    for factor, unit in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if count >= factor:
            return f"{-(-100 * count // factor) / 100:g} {unit}"
    return f"{count} bytes"


def in_one_line(error: BaseException, remedy: str = "a smaller --max-memory or --tile needs less") -> str:
    """The message of an error in one line, for a user.

    Args:
        error: what was raised.
        remedy: what needs less memory, where it is used up.
    """
    if isinstance(error, OSError) and error.filename and error.strerror:
        return f"{error.filename}: {error.strerror}"
    if is_out_of_memory(error):
        return f"out of memory; {remedy}"
    return " ".join(str(error).split()) or type(error).__name__


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory is used up: Python's, or that of a device, by PyTorch's errors."""
    name = type(error).__name__
    return isinstance(error, MemoryError) or name == "OutOfMemoryError" or "can't allocate memory" in str(error)


def drop_locals(error: BaseException) -> None:
    """Drop what the calls hold that an error, and what led to it, came through: pixels live as long as they do.

    Calls that are going on keep theirs.
    """
    seen: list[BaseException] = []
    chain = [error]
    while chain:
        one = chain.pop()
        if one not in seen:
            seen.append(one)
            traceback.clear_frames(one.__traceback__)
            chain += [other for other in (one.__cause__, one.__context__) if other is not None]
