"""A run over many files: decoding, computing and encoding overlap in threads, in bounded memory."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from fastden.batch.computing import alike, levels
from fastden.batch.grouping import MOST, Equality
from fastden.batch.manifest import Manifest, Record
from fastden.batch.memory import Gate, Stopped
from fastden.batch.plan import Job
from fastden.batch.report import Interrupted, Listener, Report
from fastden.batch.stages import Stages
from fastden.batch.work import Work
from fastden.errors import FAILURES, UserError
from fastden.images.whole_files import drop_unfinished, remove_leftovers

#: Images that wait between two stages, at most; memory is what usually bounds them.
WAITING = 2 * MOST
#: Seconds that an interrupted run gives to what is being written; then it is dropped.
GRACE = 5.0
#: An encoder that is at work cannot be left alone: the process would end below it.
LONGEST_GRACE = 120.0
#: Seconds after which who waits looks up: a signal that comes at the wrong moment does not wake the main thread.
POLL = 0.1


class _Thread(threading.Thread):
    """A thread, what it is working on, and its end.

    ``join`` does not do for a main thread whose waiting a signal may break off: Python 3.11 takes the thread for ended
    then.
    """

    def __init__(self, name: str, work: Callable[[], None]) -> None:
        super().__init__(target=work, name=name, daemon=True)
        self.work: Work | None = None
        self.ended = threading.Event()

    def run(self) -> None:
        try:
            super().run()
        finally:
            self.ended.set()

    def wait(self) -> None:
        """Until it has ended."""
        while not self.ended.wait(POLL):
            pass


class ThreadedRun:
    """One run: threads that read, threads that write, and the caller's, which computes.

    Args:
        stages: what is done to each image.
        jobs: the images.
        output: file or folder.
        manifest: takes the records; None for none.
        resume: leave out what the manifest says is done.
        listener: is told what happens.
        equality: what earlier runs of the same stages have found.
        workers: threads that read, and as many that write, at most.
    """

    def __init__(
        self,
        stages: Stages,
        jobs: Sequence[Job],
        output: Path,
        *,
        manifest: Manifest | None,
        resume: bool,
        listener: Listener,
        equality: Equality,
        workers: int,
    ) -> None:
        self.stages, self.jobs, self.output = stages, jobs, output
        self.manifest, self.resume, self.listener, self.equality = manifest, resume, listener, equality
        self.report = Report(len(jobs))
        self.gate = Gate(self.stages.settings.budget.images)
        self.coming = iter(jobs)
        self.read: queue.Queue[Work | None] = queue.Queue(WAITING)
        self.computed: queue.Queue[Work | None] = queue.Queue(WAITING)
        self.lock = threading.Lock()
        self.stopping = self.dropped = False
        self.fatal: BaseException | None = None
        self.made: list[Path] = []
        workers = min(workers, max(len(jobs), 1))
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

    def _close(self, start: float) -> None:
        report = self.report
        report.left = report.jobs - len(report.records) - len(report.skipped)
        report.seconds = time.perf_counter() - start
        # The folders that were made and are empty go again.
        for folder in sorted(self.made, key=lambda path: len(path.parts), reverse=True):
            with suppress(OSError):
                folder.rmdir()

    def _stop(self) -> None:
        """Finish what is being written, within measure, and drop the rest."""
        self.stopping = True
        self.gate.close()
        started = time.monotonic()
        with suppress(KeyboardInterrupt):  # pressed twice: no more patience
            for thread in (*self.readers, *self.writers):
                while time.monotonic() - started < _grace(thread.work) and not thread.ended.wait(POLL / 2):
                    pass
        self.dropped = True
        drop_unfinished()

    # In the threads that read.

    def _next(self) -> Job | None:
        with self.lock:
            return None if self.stopping or self.fatal is not None else next(self.coming, None)

    def _read(self) -> None:
        try:
            while (job := self._next()) is not None:
                work = self._read_one(job)
                if work is not None:
                    self._put(self.read, work)
        except Stopped:
            pass
        except BaseException as error:  # a defect: shown by the thread that the caller waits for
            self.fatal = self.fatal or error
        finally:
            with suppress(Stopped):
                self._put(self.read, None)

    def _read_one(self, job: Job) -> Work | None:
        manifest, taken = self.manifest, 0
        try:
            if self.resume and manifest is not None and self._finished(job, manifest):
                with self.lock:
                    self.report.skipped.append(job)
                    self.listener.progress(self._ended(), 0)
                return None
            self._make_folder(job.target.parent)
            work = self.stages.reading.open(job, replaces=self.resume and manifest is not None and manifest.knows(job))
            # An image that is streamed keeps to all of the limit.
            work.size = min(work.size, self.gate.limit) if not work.streamed else self.gate.limit
            self.gate.take(work.size)
            taken = work.size
            self._present(work)
            self.stages.reading.read(work)
            return work
        except FAILURES as error:
            self.gate.give_back(taken)
            self._fail(job, error)
            return None

    def _finished(self, job: Job, manifest: Manifest) -> bool:
        return manifest.finished(job, self.stages.settings.weights, self.stages.settings.options(job))

    def _make_folder(self, folder: Path) -> None:
        if folder == self.output.parent and folder != self.output:
            return  # of an output file: it has to be there
        with self.lock:
            missing = [path for path in (folder, *folder.parents) if not path.exists()]
            try:
                folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise UserError(f"output: cannot make the folder {folder}: {error.strerror}") from error
            self.made += missing

    def _put(self, into: queue.Queue[Work | None], work: Work | None) -> None:
        while not self.stopping:
            with suppress(queue.Full):
                into.put(work, timeout=POLL)
                return
        raise Stopped

    # In the caller's thread.

    def _compute(self) -> None:
        working = len(self.readers)
        waiting: Work | None = None
        while working or waiting is not None:
            if self.fatal is not None:
                raise self.fatal
            try:
                work = waiting if waiting is not None else self.read.get(timeout=POLL)
            except queue.Empty:
                continue
            waiting = None
            if work is None:
                working -= 1
                continue
            if work.streamed:
                self._stream(work)
                continue
            group = [work]
            limit = self.stages.computing.group_limit(work)
            while len(group) < limit:
                try:
                    another = self.read.get_nowait()
                except queue.Empty:
                    break
                if another is None:
                    working -= 1
                elif another.streamed or not alike(work, another):
                    waiting = another
                    break
                else:
                    group.append(another)
            self._compute_group(group)

    def _compute_group(self, group: list[Work]) -> None:
        if len(group) > 1 and not self._may_join(group):
            for work in group:
                self._compute_group([work])
            return
        ended = self._ended()
        try:
            self.stages.computing.compute(group, lambda done, total: self._progress(ended, len(group) * done / total))
        except FAILURES as error:
            if len(group) > 1:
                # One by one: what is wrong with one does not concern the others.
                for work in group:
                    self._compute_group([work])
            else:
                self.gate.give_back(group[0].size)
                self._fail(group[0].job, error)
            return
        for work in group:
            self._put(self.computed, work)

    def _may_join(self, group: list[Work]) -> bool:
        settings, images = self.stages.settings, [work.image.pixels for work in group if work.image is not None]
        network = settings.network(images[0].dtype == "uint8")
        memory = settings.budget.network
        try:
            return self.equality.holds(network, images, levels(group), memory)
        except FAILURES:  # of one of them, or of memory for all: alone each has its own answer
            return False

    def _stream(self, work: Work) -> None:
        try:
            ended = self._ended()
            record = self.stages.stream(work, self.manifest, lambda done, total: self._progress(ended, done / total))
        except FAILURES as error:
            record = self.stages.writing.failure(work.job, error, self.manifest)
        finally:
            self.gate.give_back(work.size)
        self._tell(work.job, record)

    # In the threads that write.

    def _write(self) -> None:
        while (work := self._next_computed()) is not None:
            try:
                self._present(work)
                try:
                    record = self.stages.writing.write(work, self.manifest)
                except FAILURES as error:
                    record = self.stages.writing.failure(work.job, error, self.manifest)
                self._tell(work.job, record)
            except BaseException as error:  # a defect, as above; go on, so that nobody waits for this thread
                self.fatal = self.fatal or error
            finally:
                self.gate.give_back(work.size)

    def _next_computed(self) -> Work | None:
        while not self.dropped:
            try:
                return self.computed.get(timeout=POLL)
            except queue.Empty:
                if self.stopping:
                    break
        return None

    # In any thread.

    def _present(self, work: Work) -> None:
        thread = threading.current_thread()
        assert isinstance(thread, _Thread)
        thread.work = work

    def _progress(self, ended: int, part: float) -> None:
        with self.lock:
            self.listener.progress(ended, part)

    def _ended(self) -> int:
        return len(self.report.records) + len(self.report.skipped)

    def _tell(self, job: Job, record: Record) -> None:
        with self.lock:
            self.report.records.append(record)
            self.report.compute_seconds += record.seconds.get("compute", 0.0)
            self.listener.record(job, record)
            self.listener.progress(self._ended(), 0)

    def _fail(self, job: Job, error: BaseException) -> None:
        self._tell(job, self.stages.writing.failure(job, error, self.manifest))


def _grace(work: Work | None) -> float:
    return LONGEST_GRACE if work is not None and work.in_libvips else GRACE
