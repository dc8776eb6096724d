"""What the command says and shows: lines, progress, errors, and the sums of a run over many files."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from fastden.errors import in_one_line

if TYPE_CHECKING:
    from fastden.batch.denoiser import BatchDenoiser
    from fastden.batch.dry_run import Step
    from fastden.batch.manifest import Record
    from fastden.batch.plan import Job
    from fastden.batch.report import Report


def say(text: str, *, error: bool = False, console: Console | None = None) -> None:
    """Print a line, to standard error if it is an error or a note; on ``console`` if given."""
    # Paths may hold what rich takes for markup, and are to be copied: no markup, no wrapping, no colours.
    console = console or Console(stderr=error)
    # A file's name may hold what the terminal's encoding does not.
    encoding = getattr(console.file, "encoding", None) or "utf-8"
    text = text.encode(encoding, "backslashreplace").decode(encoding)
    console.print(text, markup=False, highlight=False, soft_wrap=True, emoji=False)


@contextmanager
def clean_termination() -> Iterator[None]:
    """Let a termination unwind the stack, so that a half-written file is removed."""

    def stop(number: int, _frame: Any) -> None:
        sys.exit(128 + number)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


class Run:
    """One call of ``fastden denoise`` as its user sees it: lines, progress, and the sums at its end."""

    def __init__(self, batch: BatchDenoiser, *, manifest: str | Path | None, resume: bool) -> None:
        self.batch, self.manifest, self.resume = batch, manifest, resume
        self._bar: Console | None = None

    def all(self, jobs: list[Job], output: Path, unreadable: Sequence[OSError] = ()) -> int:
        """Do the jobs, print the summary, return the exit code.

        Args:
            jobs: from :func:`fastden.batch.plan.plan`.
            output: file or folder.
            unreadable: folders that could not be looked into; they count as failures.
        """
        from fastden.batch.report import Interrupted, Listener

        start = time.perf_counter()
        console = Console(stderr=True)
        columns = (TextColumn("{task.completed:.0f} of {task.total:.0f}"), BarColumn(), TimeElapsedColumn())
        bar = Progress(
            *columns,
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
            transient=True,
            redirect_stdout=False,
        )
        interrupted = False
        with bar:
            self._bar = console if console.is_terminal else None
            for error in unreadable:
                self._say(f"error: {in_one_line(error)}", error=True)
            task = bar.add_task("denoising", total=len(jobs))
            listener = Listener(
                record=self._tell,
                progress=lambda ended, part: bar.update(task, completed=ended + part),
                note=lambda text: self._say(f"note: {text}", error=True),
            )
            try:
                report = self.batch.run_jobs(
                    jobs, output, manifest=self.manifest, resume=self.resume, listener=listener
                )
            except Interrupted as error:
                report, interrupted = error.report, True
        self._summarise(report, unreadable, time.perf_counter() - start)
        if interrupted:
            say("error: interrupted; --resume goes on from here", error=True)
            return 130
        return 1 if report.failed or report.left or unreadable else 0

    def rehearse(self, jobs: list[Job], output: Path, unreadable: Sequence[OSError] = ()) -> int:
        """Print what :meth:`all` would do, return the exit code; nothing is written."""
        from fastden.batch.dry_run import rehearse

        plan = rehearse(self.batch, jobs, output, manifest=self.manifest, resume=self.resume)
        for error in unreadable:
            say(f"error: {in_one_line(error)}", error=True)
        for step in plan.steps:
            if step.error is not None:
                self._show_error(step.job, step.error)
            elif step.done:
                say(f"{step.job.target}: done before")
            else:
                how = ", streamed" if step.streamed else ""
                say(f"{step.job.source} -> {step.job.target}, {_size(step)}, {step.sigma}{how}")
        failed = sum(step.error is not None for step in plan.steps) + len(unreadable)
        todo = sum(step.error is None and not step.done for step in plan.steps)
        if todo:
            expected = f"about {plan.seconds:.2g} s at {plan.rate:.2f} MP/s, measured now"
            memory = f"at most {plan.memory / 2**30:.2f} GiB beside Python and PyTorch"
            say(
                f"would denoise {todo} image{'s' * (todo != 1)}, {plan.megapixels:.2f} megapixels: {expected}; {memory}"
            )
        return 1 if failed else 0

    def _summarise(self, report: Report, unreadable: Sequence[OSError], seconds: float) -> None:
        done, failed = len(report.done), [record.input for record in report.failed]
        if done:
            rate = f"{report.megapixels / seconds:.2f} MP/s, files read and written"
            say(f"{done} image{'s' * (done != 1)}, {report.megapixels:.2f} megapixels, {seconds:.2f} s ({rate})")
        if report.jobs == 1:
            return
        table = Table("done", "done before", "failed", "not begun", "read", "compute", "write", "compute share")
        times = [sum(record.seconds.get(name, 0) for record in report.done) for name in ("read", "write")]
        counts = [done, len(report.skipped), len(failed), report.left]
        spent = [times[0], report.compute_seconds, times[1]]
        share = f"{100 * report.compute_share:.0f} %"
        table.add_row(*map(str, counts), *(f"{value:.1f} s" for value in spent), share)
        Console(width=None if sys.stdout.isatty() else 120).print(table)
        names = [os.path.relpath(name) if not os.path.isabs(name) else name for name in failed]
        names += [str(error.filename) for error in unreadable]
        if names:
            total = report.jobs + len(unreadable)
            say(f"error: {len(names)} of {total} files failed: {', '.join(names)}", error=True)

    def _say(self, text: str, *, error: bool = False) -> None:
        """Above the bar where the line goes to the same terminal, else where it belongs."""
        say(text, error=error, console=self._bar if error or sys.stdout.isatty() else None)

    def _tell(self, job: Job, record: Record) -> None:
        if record.error is not None:
            self._show_error(job, record.error)
            return
        estimated = " (estimated)" if record.sigma_source == "estimated" else ""
        shown = "" if record.sigma is None else f", sigma {record.sigma:.1f}{estimated}"
        self._say(f"{job.source} -> {job.target}, {_size(record)}{shown}")
        for note in record.notes:
            self._say(f"note: {job.target}: {note}", error=True)

    def _show_error(self, job: Job, error: str) -> None:
        named = error.startswith((str(job.source), str(job.target)))
        self._say(f"error: {error}" if named else f"error: {job.source}: {error}", error=True)


def _size(image: Record | Step) -> str:
    return f"{image.width} x {image.height}" + (f", {image.pages} pages" if image.pages > 1 else "")
