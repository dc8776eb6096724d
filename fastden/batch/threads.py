"""A run over many files: decoding, computing and encoding overlap in threads, in bounded memory."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from fastden.batch.computing import levels
from fastden.batch.grouping import MOST, Equality
from fastden.batch.manifest import Manifest, Record
from fastden.batch.memory import Gate, Stopped
from fastden.batch.picture import Picture
from fastden.batch.plan import Job
from fastden.batch.report import Interrupted, Listener, Report
from fastden.batch.stages import Stages
from fastden.errors import FAILURES, UserError
from fastden.whole_files import drop_unfinished, remove_leftovers

#: Most images that wait between two stages. Usually memory is the tighter limit.
WAITING = 2 * MOST
#: Seconds that an interrupted run waits for outputs that are being written; then it drops them.
GRACE = 5.0
#: A working encoder must finish first: the process would end under it.
LONGEST_GRACE = 120.0
#: Polling interval, seconds: a signal that comes at the wrong moment does not wake a waiting main thread.
POLL = 0.1


class _Thread(threading.Thread):
    """A thread, the picture that it works on, and whether it has ended.

    The main thread cannot use ``join``: where a signal interrupts that, Python 3.11 takes the thread to have ended.
    """

    def __init__(self, name: str, function: Callable[[], None]) -> None:
        super().__init__(target=function, name=name, daemon=True)
        self.picture: Picture | None = None
        self.ended = threading.Event()

    def run(self) -> None:
        try:
            super().run()
        finally:
            self.ended.set()

    def wait(self) -> None:
        """Wait until it has ended."""
        while not self.ended.wait(POLL):
            pass


class ThreadedRun:
    """One run: threads that read, threads that write, and the caller's, which computes.

    Args:
        stages: what is done to each image.
        jobs: the images.
        manifest: takes the records; None for none.
        resume: leave out what the manifest says is done.
        listener: its functions are called when something happens.
        equality: results of the comparisons in earlier runs of the same stages.
        workers: threads that read, and as many that write, at most.
    """

    def __init__(
        self,
        stages: Stages,
        jobs: Sequence[Job],
        *,
        manifest: Manifest | None,
        resume: bool,
        listener: Listener,
        equality: Equality,
        workers: int,
    ) -> None:
        self.stages, self.jobs = stages, jobs
        self.manifest, self.resume, self.listener, self.equality = manifest, resume, listener, equality
        self.report = Report(len(jobs))
        self.gate = Gate(self.stages.settings.budget.images)
        self.coming = iter(jobs)
        self.read: queue.Queue[Picture | None] = queue.Queue(WAITING)
        self.computed: queue.Queue[Picture | None] = queue.Queue(WAITING)
        self.lock = threading.Lock()
        # Images that are computed and not yet written; the part of those that are computed now; the most progress told.
        self.between, self.part, self.highest = 0, 0.0, 0.0
        self.stopping = self.dropped = False
        self.fatal: BaseException | None = None
        self.made: list[Path] = []
        workers = min(workers, max(len(jobs), 1))
        self.caller = threading.current_thread()
        self.readers = [_Thread("fastden-read", self._read) for _ in range(workers)]
        self.writers = [_Thread("fastden-write", self._write) for _ in range(workers)]

    def all(self) -> Report:
        """Do the jobs.

        Raises:
            Interrupted: Ctrl-C.
        """
        start = time.perf_counter()
        if self.resume:
            for folder in {job.target.parent for job in self.jobs}:
                remove_leftovers(folder)
        for thread in (*self.readers, *self.writers):
            thread.start()
        try:
            self._compute()
            for _ in self.writers:
                self._put(self.computed, None)
            for thread in (*self.readers, *self.writers):
                thread.wait()
            if self.fatal is not None:
                raise self.fatal
        except BaseException as error:
            self._stop()
            self._close(start)
            if isinstance(error, KeyboardInterrupt):
                raise Interrupted(self.report) from None
            raise
        self._close(start)
        return self.report

    def has(self, thread: threading.Thread) -> bool:
        """Whether a thread works for this run."""
        return thread in (self.caller, *self.readers, *self.writers)

    def _close(self, start: float) -> None:
        self.report.close(time.perf_counter() - start)
        # Remove the folders that this run made and that are empty.
        for folder in sorted(self.made, key=lambda path: len(path.parts), reverse=True):
            with suppress(OSError):
                folder.rmdir()

    def _stop(self) -> None:
        """Finish outputs that are being written, for a limited time, and drop the rest."""
        self.stopping = True
        self.gate.close()
        started = time.monotonic()
        try:
            with suppress(KeyboardInterrupt):  # pressed twice: stop at once
                for thread in (*self.readers, *self.writers):
                    while time.monotonic() - started < _grace(thread.picture) and not thread.ended.wait(POLL / 2):
                        pass
        finally:  # also where a signal that ends the process came twice
            self.dropped = True
            drop_unfinished((self.caller, *self.readers, *self.writers))

    # In the threads that read.

    def _next(self) -> Job | None:
        with self.lock:
            return None if self.stopping or self.fatal is not None else next(self.coming, None)

    def _read(self) -> None:
        try:
            while (job := self._next()) is not None:
                picture = self._read_one(job)
                if picture is not None:
                    self._put(self.read, picture)
        except Stopped:
            pass
        except BaseException as error:  # a defect: shown by the thread that the caller waits for
            self.fatal = self.fatal or error
        finally:
            with suppress(Stopped):
                self._put(self.read, None)

    def _read_one(self, job: Job) -> Picture | None:
        manifest = self.manifest
        try:
            if self.resume and manifest is not None and self._finished(job, manifest):
                with self.lock:
                    self.report.skipped.append(job)
                    self._tell_progress()
                return None
            self._make_folder(job.target.parent)
            overwrite = self.stages.settings.overwrite
            replaces = self.resume and manifest is not None and manifest.may_replace(job, overwrite=overwrite)
            return self.stages.read(job, self.gate, replaces=replaces, admitted=self._present)
        except FAILURES as error:
            self._fail(job, error)
            return None

    def _finished(self, job: Job, manifest: Manifest) -> bool:
        return manifest.finished(job, self.stages.settings.known_weights, self.stages.settings.options(job))

    def _make_folder(self, folder: Path) -> None:
        with self.lock:
            check_folder(folder)
            missing = [path for path in (folder, *folder.parents) if not path.exists()]
            try:
                folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise UserError(f"output: cannot make the folder {folder}: {error.strerror}") from error
            self.made += missing

    def _put(self, into: queue.Queue[Picture | None], picture: Picture | None) -> None:
        while not self.stopping:
            with suppress(queue.Full):
                into.put(picture, timeout=POLL)
                return
        raise Stopped

    # In the caller's thread.

    def _compute(self) -> None:
        working = len(self.readers)
        waiting: Picture | None = None
        while working or waiting is not None:
            if self.fatal is not None:
                raise self.fatal
            try:
                picture = waiting if waiting is not None else self.read.get(timeout=POLL)
            except queue.Empty:
                continue
            waiting = None
            if picture is None:
                working -= 1
                continue
            if picture.streamed:
                self._stream(picture)
                continue
            group = [picture]
            limit = self.stages.computing.group_limit(picture)
            while len(group) < limit:
                try:
                    another = self.read.get_nowait()
                except queue.Empty:
                    break
                if another is None:
                    working -= 1
                elif another.streamed or not self.stages.computing.alike(picture, another):
                    waiting = another
                    break
                else:
                    group.append(another)
            self._compute_group(group)

    def _compute_group(self, group: list[Picture]) -> None:
        record = None
        if len(group) == 1 or self._may_join(group):
            try:
                self.stages.computing.compute(group, lambda done, total: self._progress(len(group) * done / total))
            except FAILURES as error:
                if len(group) == 1:
                    record = self.stages.writing.failure(group[0].job, error, self.manifest)
            else:
                with self.lock:
                    self.between, self.part = self.between + len(group), 0.0
                for picture in group:
                    self._put(self.computed, picture)
                return
        # The handler was left first: its exception keeps pixels alive.
        if record is not None:
            self._give_back(group[0])
            self._tell(group[0].job, record, computed=True)
            return
        # One by one, so that an error of one does not concern the others.
        for picture in group:
            self._compute_group([picture])

    def _may_join(self, group: list[Picture]) -> bool:
        settings, images = (
            self.stages.settings,
            [picture.image.pixels for picture in group if picture.image is not None],
        )
        network = settings.network(images[0].dtype == "uint8", group[0].all_white)
        memory = settings.budget.network
        try:
            return self.equality.holds(network, images, levels(group), memory)
        except FAILURES:  # an error of one, or too little memory for all: computed alone, each gets its own result
            return False

    def _stream(self, picture: Picture) -> None:
        try:
            record = self.stages.stream(picture, self.manifest, lambda done, total: self._progress(done / total))
        except FAILURES as error:
            record = self.stages.writing.failure(picture.job, error, self.manifest)
        finally:
            self._give_back(picture)
        self._tell(picture.job, record, computed=True)

    # In the threads that write.

    def _write(self) -> None:
        while (picture := self._next_computed()) is not None:
            try:
                self._present(picture)
                try:
                    record = self.stages.writing.write(picture, self.manifest)
                except FAILURES as error:
                    record = self.stages.writing.failure(picture.job, error, self.manifest)
                self._tell(picture.job, record, written=True)
            except BaseException as error:  # a defect, as above; go on, so that no thread waits for this one
                self.fatal = self.fatal or error
            finally:
                self._give_back(picture)

    def _next_computed(self) -> Picture | None:
        while not self.dropped:
            try:
                return self.computed.get(timeout=POLL)
            except queue.Empty:
                if self.stopping:
                    break
        return None

    # In any thread.

    def _present(self, picture: Picture) -> None:
        thread = threading.current_thread()
        assert isinstance(thread, _Thread)
        thread.picture = picture

    def _give_back(self, picture: Picture) -> None:
        picture.drop_pixels()
        self.gate.give_back(picture.size)

    def _progress(self, part: float) -> None:
        with self.lock:
            self.part = part
            self._tell_progress()

    def _tell_progress(self) -> None:
        """Tell the listener, under the lock. What is computed again, in smaller tiles or alone, takes nothing back."""
        ended = self._ended()
        self.highest = max(self.highest, ended + self.between + self.part)
        self.listener.progress(ended, self.highest - ended)

    def _ended(self) -> int:
        return len(self.report.records) + len(self.report.skipped)

    def _tell(self, job: Job, record: Record, *, computed: bool = False, written: bool = False) -> None:
        """Count an image that has ended: in the thread that computes, after it was ``written``, or before both."""
        with self.lock:
            if computed:
                self.part = 0.0
            self.between -= written
            self.report.add(record)
            self.listener.record(job, record)
            self._tell_progress()

    def _fail(self, job: Job, error: BaseException) -> None:
        self._tell(job, self.stages.writing.failure(job, error, self.manifest))


def check_folder(folder: Path) -> None:
    """Raise UserError where a folder cannot be made, because it, or what would hold it, is a file."""
    first = next((path for path in (folder, *folder.parents) if path.exists()), None)
    if first is not None and not first.is_dir():
        raise UserError(f"output: cannot make the folder {folder}: {first} is a file")


def _grace(picture: Picture | None) -> float:
    return LONGEST_GRACE if picture is not None and picture.in_libvips else GRACE
