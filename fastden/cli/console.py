"""Lines that the command prints, and its end by a signal."""

from __future__ import annotations

import re
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from fastden.whole_files import EXISTS, INSTEAD

if TYPE_CHECKING:
    from fastden.batch.dry_run import Step
    from fastden.batch.manifest import Record

_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")
#: Exit code of a command that Ctrl-C ended.
INTERRUPTED = 130


def say(text: str, *, error: bool = False) -> None:
    """Print a line, to standard error if it is an error or a note."""
    stream = sys.stderr if error else sys.stdout
    stream.write(printable(text, stream) + "\n")
    stream.flush()


def printable(text: str, stream: IO[str]) -> str:
    """``text`` with escapes for the characters that ``stream`` cannot hold, and for those that command a terminal."""
    # A file's name may hold any of them.
    text = _CONTROL.sub(lambda found: f"\\x{ord(found[0]):02x}", text)
    encoding = getattr(stream, "encoding", None) or "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding)


@contextmanager
def clean_termination() -> Iterator[None]:
    """Make a termination signal raise an exception, so that half-written and temporary files are removed.

    It is SIGTERM, or SIGHUP: the terminal was closed.
    """

    def stop(number: int, _frame: Any) -> None:
        sys.exit(128 + number)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {signal.SIGTERM: signal.signal(signal.SIGTERM, stop)}
    # nohup ignores SIGHUP: the command goes on. Windows has none.
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) == signal.SIG_DFL:
        before[signal.SIGHUP] = signal.signal(signal.SIGHUP, stop)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def error_line(source: str | Path, target: str | Path, error: str) -> str:
    """The line about an image's failure; it names the file once."""
    named = error.startswith((str(source), str(target)))
    return f"error: {error}" if named else f"error: {source}: {error}"


class ExistingOutputs:
    """Outputs of a run that were there already. What to do about them is told once, at the end, not for each.

    Args:
        several: whether the run is over several files; of a single one its error says it.
        resumable: whether an earlier run has left a record, and this one does not resume it.
    """

    def __init__(self, *, several: bool, resumable: bool) -> None:
        self._several, self._resumable = several, resumable
        self._count = 0

    def shortened(self, error: str) -> str:
        """The error of an image, without what is told at the end."""
        if not self._several or not error.endswith(EXISTS + INSTEAD):
            return error
        self._count += 1
        return error.removesuffix(INSTEAD)

    def say(self) -> None:
        """Print what to do, if there were any."""
        if self._count:
            resume = "--resume, which goes on with the earlier run; " if self._resumable else ""
            outputs = "1 output exists" if self._count == 1 else f"{self._count} outputs exist"
            accepted = f"{resume}--overwrite, which replaces {'it' if self._count == 1 else 'them'}; another folder"
            say(f"error: {outputs} already; accepted: {accepted}", error=True)


def size_of(image: Record | Step) -> str:
    """An image's size in words."""
    return f"{image.width} x {image.height}" + (f", {image.pages} pages" if image.pages > 1 else "")


def duration(seconds: float) -> str:
    """A time in words, with two digits."""
    for factor, unit in ((86400, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= 2 * factor:
            number = seconds / factor
            return f"{number:.1f} {unit}" if number < 9.95 else f"{number:.0f} {unit}"
    return f"{seconds:.2g} s" if seconds < 9.95 else f"{seconds:.0f} s"
