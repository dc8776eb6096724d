"""What ``fastden denoise`` prints about a run over images: a bar, a line an image, the sums."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from fastden.cli.console import INTERRUPTED, ExistingOutputs, error_line, printable, say, size_of
from fastden.errors import in_one_line

if TYPE_CHECKING:
    from fastden.batch.manifest import Record
    from fastden.batch.report import Report

#: Files that the last line of a run names, of those that failed.
NAMED = 5


class Display:
    """What ``fastden denoise`` prints about a run over images, on any engine: a bar, a line an image, the sums.

    It is a context; inside, the bar is shown where standard error is a terminal.

    Args:
        total: images in all.
        unreadable: errors of inputs and folders that are no jobs; they count as failures.
        earlier: whether an earlier run has left a record, and this one does not resume it.
    """

    def __init__(self, total: int, unreadable: Sequence[OSError] = (), *, earlier: bool = False) -> None:
        self.unreadable = unreadable
        self._existing = ExistingOutputs(several=total + len(unreadable) > 1, resumable=earlier)
        self._console = Console(stderr=True)
        self._bar = Progress(
            TextColumn("{task.completed:.0f} of {task.total:.0f}"),
            BarColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=self._console,
            disable=not self._console.is_terminal,
            transient=True,
            redirect_stdout=False,
        )
        self._task = self._bar.add_task("denoising", total=total)
        self._shown = False
        self._start = time.perf_counter()

    def __enter__(self) -> Display:
        self._bar.start()
        self._shown = self._console.is_terminal
        for error in self.unreadable:
            self._say(f"error: {in_one_line(error)}", error=True)
        return self

    def __exit__(self, *_: object) -> None:
        if self._shown:  # rich 13 would print an empty line also where no bar is shown
            self._bar.stop()
        self._shown = False

    def progress(self, ended: float) -> None:
        """Move the bar to ``ended`` images, which may be a fraction."""
        self._bar.update(self._task, completed=ended)

    def note(self, text: str) -> None:
        """Print a note about the whole run."""
        self._say(f"note: {text}", error=True)

    def record(self, source: str | Path, target: str | Path, record: Record) -> None:
        """Print the result of an image."""
        if record.error is not None:
            self._say(error_line(source, target, self._existing.shortened(record.error)), error=True)
            return
        white = ", white noise" if (record.noise or {}).get("is_white") else ""
        # The noise may have chosen the model, and with another one the same level does something else.
        model = Path(record.model["name"]).name
        estimated = f" (estimated{white}; model {model})" if record.sigma_source == "estimated" else ""
        level = record.sigma or 0.0
        shown = f"{level:.2g}" if record.values is not None and level < 1 else f"{level:.1f}"
        sigma = "" if record.sigma is None else f", sigma {shown}{estimated}"
        self._say(f"{source} -> {target}, {size_of(record)}{sigma}")
        for note in record.notes:
            self._say(f"note: {target}: {note}", error=True)

    def _say(self, text: str, *, error: bool = False) -> None:
        """Print above the bar if the line goes to the same terminal, else on its own stream."""
        if self._shown and (error or sys.stdout.isatty()):
            # Users copy paths, and paths may look like markup to rich: no markup, no wrapping, no colours.
            text = printable(text, self._console.file)
            self._console.print(text, markup=False, highlight=False, soft_wrap=True, emoji=False)
        else:
            say(text, error=error)

    def summary(
        self, report: Report, *, interrupted: bool = False, resumable: bool = False, including: str = ""
    ) -> int:
        """Print the sums of a run, below the bar.

        Args:
            report: of the run.
            interrupted: by Ctrl-C.
            resumable: whether a manifest records it.
            including: what the time holds besides reading, computing and writing.

        Returns:
            The exit code.
        """
        seconds = time.perf_counter() - self._start
        done, skipped, failed = len(report.done), len(report.skipped), [record.input for record in report.failed]
        if skipped:
            say(f"{_images(skipped)} done before")
        if done:
            rate = f"{report.megapixels / seconds:.2f} MP/s, files read and written{including}"
            say(f"{_images(done)}, {report.megapixels:.2f} megapixels, {seconds:.2f} s ({rate})")
        if report.jobs > 1:
            self._table(report)
        names = [*failed, *(str(error.filename) for error in self.unreadable)]
        total = report.jobs + len(self.unreadable)
        if names and total > 1:
            more = f" and {len(names) - NAMED} more, told above" if len(names) > NAMED else ""
            shown = ", ".join(names[:NAMED])
            say(f"error: {len(names)} of {total} files failed: {shown}{more}", error=True)
        self._existing.say()
        if interrupted:
            rest = "--resume goes on from here" if resumable else "what is named above is complete"
            say(f"error: interrupted; {rest}", error=True)
            return INTERRUPTED
        return 1 if failed or report.left or self.unreadable else 0

    def _table(self, report: Report) -> None:
        table = Table("done", "done before", "failed", "not begun", "read", "compute", "write", "compute share")
        read, write = (sum(record.seconds.get(name, 0) for record in report.done) for name in ("read", "write"))
        counts = (len(report.done), len(report.skipped), len(report.failed), report.left)
        times = (read, report.compute_seconds, write)
        share = f"{100 * report.compute_share:.0f} %"
        table.add_row(*map(str, counts), *(f"{value:.1f} s" for value in times), share)
        Console(width=None if sys.stdout.isatty() else 120).print(table)


def _images(count: int) -> str:
    return f"{count} image{'s' * (count != 1)}"
