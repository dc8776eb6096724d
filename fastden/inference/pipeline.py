"""Batches of image files: decoding, computing and encoding overlap, in bounded memory."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch

from fastden.errors import FAILURES, UserError
from fastden.files import check_target, drop_unfinished, remove_leftovers
from fastden.fused import FusedDenoiser
from fastden.inference.batching import MOST, Equality
from fastden.inference.memory import Gate, Stopped
from fastden.inference.stages import Stages, Work
from fastden.inference.tiling import check_tile
from fastden.io import MAX_PIXELS
from fastden.jobs import Job, plan
from fastden.loading import Model, check_max_pixels, check_strength, parse_memory
from fastden.manifest import NAME, Manifest, Record

#: Images that wait between two stages, at most; memory is what usually bounds them.
WAITING = 2 * MOST
#: Seconds that an interrupted run gives to what is being written; then it is dropped.
GRACE = 5.0
#: An encoder that is at work cannot be left alone: the process would end below it.
LONGEST_GRACE = 120.0


@dataclass
class Report:
    """What became of a run.

    Attributes:
        jobs: how many images were asked for.
        records: of the images that were done or failed, in the order in which they ended.
        skipped: jobs that an earlier run had done.
        left: jobs that an interrupted run has not come to.
        seconds: from beginning to end.
        compute_seconds: in which the network was at work on images that were done; on a CUDA device as its clock says.
    """

    jobs: int
    records: list[Record] = field(default_factory=list)
    skipped: list[Job] = field(default_factory=list)
    left: int = 0
    seconds: float = 0.0
    compute_seconds: float = 0.0

    @property
    def done(self) -> list[Record]:
        return [record for record in self.records if record.status == "done"]

    @property
    def failed(self) -> list[Record]:
        return [record for record in self.records if record.status == "failed"]

    @property
    def megapixels(self) -> float:
        """Of the images that were done."""
        return sum(record.width * record.height for record in self.done) / 1e6

    @property
    def compute_share(self) -> float:
        """Part of the time in which the network was at work: 0 to 1."""
        return self.compute_seconds / self.seconds if self.seconds else 0.0


class Interrupted(KeyboardInterrupt):
    """Ctrl-C during a run: what was begun is finished or gone.

    Attributes:
        report: of what was done until then.
    """

    def __init__(self, report: Report) -> None:
        super().__init__("interrupted")
        self.report = report


@dataclass(frozen=True)
class Listener:
    """What a run tells while it goes on. The functions are called in one thread at a time, which may be any.

    Attributes:
        record: an image is done, or has failed: its job, its record.
        progress: an image's tiles are done: how many images have ended, and the part of the present one.
        note: something that concerns the whole run.
    """

    record: Callable[[Job, Record], None] = lambda job, record: None
    progress: Callable[[int, float], None] = lambda ended, part: None
    note: Callable[[str], None] = lambda text: None


class BatchDenoiser:
    """Denoise many image files: what ``fastden denoise`` does.

    While one image is denoised others are decoded and encoded, in threads; images that are not finished are held back
    so that they fit in ``max_memory``, and an image that does not fit alone is streamed through strip by strip. A file
    that fails does not stop the others. Outputs appear under their names whole.

        >>> batch = fastden.BatchDenoiser("color", sigma=15)
        >>> report = batch.run("photographs/", "clean/", resume=True)
        >>> report.failed
        []

    Args:
        model, device, dtype, tile, strength, max_pixels: as in :func:`fastden.denoise`.
        sigma: ``"auto"``, or a number on the scale 0-255.
        sigma_map: an image file of the images' size, gray: its values are the noise level, white standing for 255 at
            any depth (an 8-bit value is the sigma itself). With ``sigma="auto"`` alone.
        max_memory: bytes or such as ``"4GiB"``. Half of it is for the network's tensors, half for images that are not
            finished; None is 1 GiB each. On an accelerator the network's half is the device's memory. Python and
            PyTorch themselves come on top.
        overwrite: replace existing files.
        strip_metadata: drop EXIF, XMP, IPTC and comments; the ICC profile stays.
        workers: threads that decode, and as many that encode; None is 1 on a CPU, which has nothing to spare, and 4 on
            an accelerator.

    Raises:
        ValueError, TypeError: naming the argument, what it was and what is accepted.
        UserError: the map cannot be read.
    """

    def __init__(
        self,
        model: Model = "color",
        *,
        sigma: Literal["auto"] | float = "auto",
        sigma_map: str | Path | None = None,
        strength: float = 1.0,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype = "auto",
        tile: int | Literal["auto"] | None = "auto",
        max_memory: int | str | None = None,
        overwrite: bool = False,
        strip_metadata: bool = False,
        max_pixels: int = MAX_PIXELS,
        workers: int | None = None,
    ) -> None:
        check_strength(strength)
        check_max_pixels(max_pixels)
        memory = parse_memory(max_memory)
        check_tile(tile, memory)
        if sigma != "auto" and (isinstance(sigma, str) or not 0 <= sigma <= 255):
            raise ValueError(f"sigma: {sigma!r}; accepted: 'auto', or 0 to 255 (the scale of 8-bit values)")
        if sigma_map is not None and sigma != "auto":
            raise ValueError(f"sigma_map: given together with sigma={sigma:g}; accepted: one of them")
        if workers is not None and (not isinstance(workers, int) or workers < 1):
            raise ValueError(f"workers: {workers!r}; accepted: None, or a whole number of at least 1")
        self._listener = Listener()
        self.stages = Stages(
            model,
            sigma=sigma,
            sigma_map=None if sigma_map is None else Path(sigma_map),
            strength=strength,
            device=device,
            dtype=dtype,
            tile=tile,
            max_memory=memory,
            overwrite=overwrite,
            strip=strip_metadata,
            max_pixels=max_pixels,
            say=self._note,
        )
        on_cpu = self.stages.network(eight_bit=True).device.type == "cpu"
        self.workers = workers or (1 if on_cpu else 4)
        self._equality = Equality()

    def run(
        self,
        inputs: str | Path | Sequence[str | Path],
        output: str | Path,
        *,
        recursive: bool = False,
        format: str | None = None,
        manifest: str | Path | None = "auto",
        resume: bool = False,
        listener: Listener | None = None,
    ) -> Report:
        """Denoise files, folders and patterns.

        Args:
            inputs: files, folders (their images by suffix) and glob patterns.
            output: a file for one input file, else a folder.
            recursive: descend into folders, keeping their structure.
            format: ``jpeg``, ``png``, ``tiff``, ``webp`` or ``avif``; None for that of each input.
            manifest: file of the records; ``"auto"`` is ``.fastden-manifest.jsonl`` in an output folder, and none for
                an output file; None writes none.
            resume: leave out what a run on record has done: same input, weights and options, output unchanged. Other
                outputs on record are replaced. No other run may be writing to the same folders.
            listener: is told what happens.

        Raises:
            UserError: nothing to do, two inputs with one output, no place for the outputs.
            Interrupted: Ctrl-C.
        """
        names = [inputs] if isinstance(inputs, str | Path) else list(inputs)
        jobs = plan([str(name) for name in names], Path(output), recursive=recursive, format_name=format)
        return self.run_jobs(jobs, Path(output), manifest=manifest, resume=resume, listener=listener)

    def run_jobs(
        self,
        jobs: Sequence[Job],
        output: Path,
        *,
        manifest: str | Path | None = "auto",
        resume: bool = False,
        listener: Listener | None = None,
    ) -> Report:
        """:meth:`run` for jobs that are planned already, see :func:`fastden.jobs.plan`."""
        book = open_manifest(manifest, jobs, output)
        if resume and book is None:
            raise UserError("resume: there is no manifest to resume from; accepted: an output folder, or a manifest")
        self._listener = listener or Listener()
        run = _Run(self, list(jobs), output, book, resume, self._listener, self._equality)
        return run.all()

    def _note(self, text: str) -> None:
        self._listener.note(text)

    def network(self, eight_bit: bool) -> FusedDenoiser:
        """The network for images of 8 bits, or of more."""
        return self.stages.network(eight_bit)

    def one(self, job: Job, manifest: Manifest | None = None, *, replaces: bool = False) -> Record:
        """Denoise one file in this thread; for engines that bring parallelism of their own.

        Args:
            job: whose output's folder exists.
            manifest: to write the record to.
            replaces: the output may be replaced, whatever ``overwrite`` says.

        Returns:
            The record, of a failure too.
        """
        stages = self.stages
        try:
            work = stages.open(job, replaces=replaces)
            stages.read(work)
            if work.streamed:
                return stages.stream(work, manifest)
            stages.compute([work])
            return stages.write(work, manifest)
        except FAILURES as error:
            return stages.failure(job, error, manifest)


def open_manifest(manifest: str | Path | None, jobs: Sequence[Job], output: Path) -> Manifest | None:
    """The manifest that :meth:`BatchDenoiser.run` means; None for none."""
    if manifest is None:
        return None
    if manifest != "auto":
        path = Path(manifest)
        if path.parent != output:  # which may have to be made
            check_target(path, overwrite=True)
        return Manifest(path)
    is_file = len(jobs) == 1 and jobs[0].target == output
    return None if is_file else Manifest(output / NAME, eager=False)


class _Thread(threading.Thread):
    """A thread, and what it is working on."""

    work: Work | None = None


class _Run:
    """One run: threads that read, threads that write, and this one, which computes."""

    def __init__(
        self,
        batch: BatchDenoiser,
        jobs: list[Job],
        output: Path,
        manifest: Manifest | None,
        resume: bool,
        listener: Listener,
        equality: Equality,
    ) -> None:
        self.stages, self.jobs, self.output = batch.stages, jobs, output
        self.manifest, self.resume, self.listener, self.equality = manifest, resume, listener, equality
        self.report = Report(len(jobs))
        self.gate = Gate(self.stages.budget.images)
        self.coming = iter(jobs)
        self.read: queue.Queue[Work | None] = queue.Queue(WAITING)
        self.computed: queue.Queue[Work | None] = queue.Queue(WAITING)
        self.lock = threading.Lock()
        self.stopping = self.dropped = False
        self.fatal: BaseException | None = None
        self.made: list[Path] = []
        workers = min(batch.workers, max(len(jobs), 1))
        self.readers = [_Thread(target=self._read, name="fastden-read", daemon=True) for _ in range(workers)]
        self.writers = [_Thread(target=self._write, name="fastden-write", daemon=True) for _ in range(workers)]

    def all(self) -> Report:
        start = time.perf_counter()
        if self.resume:
            for folder in {job.target.parent for job in self.jobs}:
                remove_leftovers(folder)
        for thread in (*self.readers, *self.writers):
            thread.start()
        try:
            self._compute()
            for _ in self.writers:
                self.computed.put(None)
            for thread in (*self.readers, *self.writers):
                thread.join()
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
                while thread.is_alive() and time.monotonic() - started < _grace(thread.work):
                    thread.join(0.05)
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
            work = self.stages.open(job, replaces=self.resume and manifest is not None and manifest.knows(job))
            # An image that is streamed keeps to all of the limit.
            work.size = min(work.size, self.gate.limit) if not work.streamed else self.gate.limit
            self.gate.take(work.size)
            taken = work.size
            self._present(work)
            self.stages.read(work)
            return work
        except FAILURES as error:
            self.gate.give_back(taken)
            self._fail(job, error)
            return None

    def _finished(self, job: Job, manifest: Manifest) -> bool:
        return manifest.finished(job, self.stages.weights, self.stages.options(job))

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
                into.put(work, timeout=0.1)
                return
        raise Stopped

    # In the caller's thread.

    def _compute(self) -> None:
        working = len(self.readers)
        waiting: Work | None = None
        while working or waiting is not None:
            if self.fatal is not None:
                raise self.fatal
            work = waiting if waiting is not None else self.read.get()
            waiting = None
            if work is None:
                working -= 1
                continue
            if work.streamed:
                self._stream(work)
                continue
            group = [work]
            limit = self.stages.group_limit(work)
            while len(group) < limit:
                try:
                    another = self.read.get_nowait()
                except queue.Empty:
                    break
                if another is None:
                    working -= 1
                elif another.streamed or not _alike(work, another):
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
            self.stages.compute(group, lambda done, total: self._progress(ended, len(group) * done / total))
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
            self.computed.put(work)

    def _may_join(self, group: list[Work]) -> bool:
        stages, images = self.stages, [work.image.pixels for work in group if work.image is not None]
        levels = [work.level for work in group if isinstance(work.level, float)]
        network = stages.network(images[0].dtype == "uint8")
        memory = stages.budget.network
        try:
            return self.equality.holds(network, images, levels or None, memory)
        except FAILURES:  # of one of them, or of memory for all: alone each has its own answer
            return False

    def _stream(self, work: Work) -> None:
        try:
            ended = self._ended()
            record = self.stages.stream(work, self.manifest, lambda done, total: self._progress(ended, done / total))
        except FAILURES as error:
            record = self.stages.failure(work.job, error, self.manifest)
        finally:
            self.gate.give_back(work.size)
        self._tell(work.job, record)

    # In the threads that write.

    def _write(self) -> None:
        while (work := self._next_computed()) is not None:
            try:
                self._present(work)
                try:
                    record = self.stages.write(work, self.manifest)
                except FAILURES as error:
                    record = self.stages.failure(work.job, error, self.manifest)
                self._tell(work.job, record)
            except BaseException as error:  # a defect, as above; go on, so that nobody waits for this thread
                self.fatal = self.fatal or error
            finally:
                self.gate.give_back(work.size)

    def _next_computed(self) -> Work | None:
        while not self.dropped:
            try:
                return self.computed.get(timeout=0.1)
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
        self._tell(job, self.stages.failure(job, error, self.manifest))


def _grace(work: Work | None) -> float:
    return LONGEST_GRACE if work is not None and work.in_libvips else GRACE


def _alike(one: Work, another: Work) -> bool:
    """Whether two images may go through the network together."""
    if one.image is None or another.image is None or isinstance(another.level, torch.Tensor):
        return False
    a, b = one.image.pixels, another.image.pixels
    return a.shape == b.shape and a.dtype == b.dtype
