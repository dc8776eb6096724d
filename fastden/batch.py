"""A run over many files: each image read, denoised and written, with progress, and no failure stopping the rest."""

from __future__ import annotations

import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from fastden.errors import UserError

if TYPE_CHECKING:
    from fastden.jobs import Job

#: What goes wrong with one image, as opposed to a defect of the program.
FAILURES = (UserError, ValueError, TypeError, OSError, MemoryError, RuntimeError)


def say(text: str, *, error: bool = False, console: Console | None = None) -> None:
    """Print a line, to standard error if it is an error or a note; on ``console`` if given."""
    # Paths may hold what rich takes for markup, and are to be copied: no markup, no wrapping, no colours.
    (console or Console(stderr=error)).print(text, markup=False, highlight=False, soft_wrap=True, emoji=False)


def in_one_line(error: BaseException) -> str:
    """What to tell the user of an error."""
    name = type(error).__name__
    if isinstance(error, OSError) and error.filename and error.strerror:
        return f"{error.filename}: {error.strerror}"
    text = " ".join(str(error).split())
    if isinstance(error, MemoryError) or name == "OutOfMemoryError" or "can't allocate memory" in text:
        return "out of memory; a smaller --max-memory or --tile needs less"
    return text or name


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


def _show_part(bar: Progress, task: TaskID, before: int, done: int, total: int) -> None:
    """Count an image as a fraction while its tiles are done."""
    bar.update(task, completed=before + done / total)


@contextmanager
def _folder(folder: Path) -> Iterator[None]:
    """Make a folder and its parents; if what follows fails, those that were made and are empty go again."""
    made: list[Path] = []
    try:
        try:
            made = [path for path in (folder, *folder.parents) if not path.exists()]
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"output: cannot make the folder {folder}: {error.strerror}") from error
        yield
    except BaseException:
        with suppress(OSError):
            for path in made:
                path.rmdir()
        raise


class Run:
    """One call of ``fastden denoise``: what to do with each file, and the sums at its end."""

    def __init__(
        self,
        *,
        sigma: str | float,
        load: Callable[[bool], Any],
        options: dict[str, Any],
        overwrite: bool,
        strip: bool,
        max_pixels: int,
    ) -> None:
        self.sigma, self.load, self.options = sigma, load, options
        self.overwrite, self.strip, self.max_pixels = overwrite, strip, max_pixels
        self.pixels = 0
        self.failed: list[str] = []
        self._bar: Console | None = None

    def all(self, jobs: list[Job], output: Path) -> int:
        """Do the jobs, print the summary, return the exit code."""
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
        with bar:
            self._bar = console if console.is_terminal else None
            task = bar.add_task("denoising", total=len(jobs))
            for index, job in enumerate(jobs):
                self._one(job, output, partial(_show_part, bar, task, index))
                bar.update(task, completed=index + 1)
        seconds = time.perf_counter() - start
        done, megapixels = len(jobs) - len(self.failed), self.pixels / 1e6
        if done:
            rate = f"{megapixels / seconds:.2f} MP/s, files read and written"
            say(f"{done} image{'s' * (done != 1)}, {megapixels:.2f} megapixels, {seconds:.2f} s ({rate})")
        if self.failed and len(jobs) > 1:
            say(f"error: {len(self.failed)} of {len(jobs)} files failed: {', '.join(self.failed)}", error=True)
        return 1 if self.failed else 0

    def _say(self, text: str, *, error: bool = False) -> None:
        """Above the bar where the line goes to the same terminal, else where it belongs."""
        say(text, error=error, console=self._bar if error or sys.stdout.isatty() else None)

    def _one(self, job: Job, output: Path, progress: Callable[[int, int], None]) -> None:
        try:
            self._denoise(job, output, progress)
        except FAILURES as error:
            text = in_one_line(error)
            named = text.startswith((str(job.source), str(job.target)))
            self._say(f"error: {text}" if named else f"error: {job.source}: {text}", error=True)
            self.failed.append(str(job.source))

    def _denoise(self, job: Job, output: Path, progress: Callable[[int, int], None]) -> None:
        import numpy as np

        from fastden.api import denoise_pixels
        from fastden.io import check_alpha, check_target, format_for, read_image, write_image

        # What cannot be written is found before the work, not behind it.
        format_name = format_for(job.target)
        folder = job.target.parent
        with nullcontext() if folder == output.parent else _folder(folder):
            check_target(job.target, self.overwrite)
            image = read_image(job.source, max_pixels=self.max_pixels)
            check_alpha(image, format_name)
            network = self.load(image.pixels.dtype == np.uint8)
            pixels, level = denoise_pixels(image.pixels, self.sigma, network, progress=progress, **self.options)
            notes = write_image(job.target, replace(image, pixels=pixels), overwrite=self.overwrite, strip=self.strip)
        height, width = pixels.shape[:2]
        self.pixels += height * width
        estimated = " (estimated)" if self.sigma == "auto" else ""
        shown = "" if level is None else f", sigma {level:.1f}{estimated}"
        self._say(f"{job.source} -> {job.target}, {width} x {height}{shown}")
        for note in (*image.notes, *notes):
            self._say(f"note: {job.target}: {note}", error=True)
