"""Batches of image files: :class:`BatchDenoiser`."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor
from contextlib import contextmanager
from functools import partial
from numbers import Integral, Real
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch

from fastden.batch.grouping import Equality
from fastden.batch.manifest import Manifest, Record, made_before, open_for_run
from fastden.batch.memory import Gate
from fastden.batch.plan import Job, plan
from fastden.batch.report import Listener, Report
from fastden.batch.settings import Settings
from fastden.batch.stages import Stages
from fastden.batch.threads import ThreadedRun
from fastden.choices import Format, Quality
from fastden.errors import FAILURES, UserError
from fastden.images.codec import MAX_PIXELS, check_format
from fastden.inference.arguments import check_max_pixels, parse_memory
from fastden.inference.estimate import NoiseEstimate
from fastden.inference.run import Wishes, check_sigma
from fastden.inference.tiling import check_tile
from fastden.network.fused import FusedDenoiser
from fastden.network.loading import Model

_T = TypeVar("_T")


def default_workers(on_cpu: bool) -> int:
    """Threads that decode, and as many that encode. A CPU that computes is busy, so it gets one of each."""
    return 1 if on_cpu else 4


class BatchDenoiser:
    """Denoise many image files: what ``fastden denoise`` does.

    While one image is denoised, threads decode and encode others. Images wait until they fit in ``max_memory``; an
    image that never fits is streamed strip by strip. A file that fails does not stop the others. An output gets its
    name when it is complete.

    Threads may share one object: their calls of :meth:`run` wait for each other, so that together they keep to
    ``max_memory``. A copy, or what ``pickle`` makes of it in another process, is built anew from the same arguments.

        >>> batch = fastden.BatchDenoiser("color", sigma=15)
        >>> report = batch.run("photographs/", "clean/", resume=True)
        >>> report.failed
        []

    Args:
        model, device, dtype, tile, strength, chroma, quality, max_pixels: as in :func:`fastden.denoise`.
        sigma: ``"auto"``, a number on the scale 0-255, or a :class:`fastden.NoiseEstimate` that all images share, as
            those of one camera do.
        sigma_map: an image file of the images' size, gray: its values are the noise level, white standing for 255 at
            any depth (an 8-bit value is the sigma itself). It needs ``sigma="auto"``.
        max_memory: bytes or such as ``"4GiB"``. Half of it is for the network's tensors, half for images that are not
            finished; None is 1 GiB each. On an accelerator the network's half is the device's memory. Python and
            PyTorch themselves come on top.
        overwrite: replace existing files.
        strip_metadata: drop EXIF, XMP, IPTC and comments; the ICC profile stays.
        workers: threads that decode, and as many that encode; None is 1 on a CPU and 4 on an
            accelerator.

    Raises:
        ValueError, TypeError: naming the argument, what it was and what is accepted.
        UserError: the map cannot be read.
    """

    def __init__(
        self,
        model: Model | None = None,
        *,
        sigma: Literal["auto"] | float | NoiseEstimate = "auto",
        sigma_map: str | Path | None = None,
        strength: float = 1.0,
        chroma: float | None = None,
        quality: Quality = "normal",
        device: str | torch.device | None = None,
        dtype: str | torch.dtype = "auto",
        tile: int | Literal["auto"] | None = "auto",
        max_memory: int | str | None = None,
        overwrite: bool = False,
        strip_metadata: bool = False,
        max_pixels: int = MAX_PIXELS,
        workers: int | None = None,
    ) -> None:
        # What copies are made of. It is the first statement: no other name is local yet.
        self._arguments = dict(locals())
        del self._arguments["self"]
        wishes = Wishes(_plain(strength), None if chroma is None else _plain(chroma), quality)
        sigma = sigma if isinstance(sigma, str) else _plain(sigma)
        check_max_pixels(max_pixels)
        memory = parse_memory(max_memory)
        check_tile(tile, memory)
        check_sigma(sigma)
        if sigma_map is not None and sigma != "auto":
            shown = f"{sigma:g}" if isinstance(sigma, Real) else type(sigma).__name__
            raise ValueError(f"sigma_map: given together with sigma={shown}; accepted: one of them")
        if workers is not None and (not isinstance(workers, Integral) or workers < 1):
            raise ValueError(f"workers: {workers!r}; accepted: None, or a whole number of at least 1")
        self._listener = Listener()
        self.settings = Settings(
            model,
            sigma=sigma,
            sigma_map=None if sigma_map is None else Path(sigma_map),
            wishes=wishes,
            device=device,
            dtype=dtype,
            tile=tile,
            max_memory=memory,
            overwrite=overwrite,
            strip_metadata=strip_metadata,
            max_pixels=max_pixels,
            say=self._note,
        )
        self.stages = Stages(self.settings)
        on_cpu = self.settings.network(eight_bit=True).device.type == "cpu"
        self.workers = default_workers(on_cpu) if workers is None else int(workers)
        self._equality = Equality()
        self._gate = Gate(self.settings.budget.images)
        self._turn = threading.RLock()
        self._running: ThreadedRun | None = None

    def __reduce__(self) -> tuple[Callable[[], BatchDenoiser], tuple[()]]:
        return partial(type(self), **self._arguments), ()

    def run(
        self,
        inputs: str | Path | Sequence[str | Path],
        output: str | Path,
        *,
        recursive: bool = False,
        format: Format | None = None,
        manifest: str | Path | None = "auto",
        resume: bool = False,
        listener: Listener | None = None,
    ) -> Report:
        """Denoise files, folders and patterns.

        Args:
            inputs: files, folders (their images by suffix) and glob patterns.
            output: a file for one input file, else a folder; text that ends in a separator is a folder.
            recursive: descend into folders, keeping their structure.
            format: ``jpeg``, ``png``, ``tiff``, ``webp``, ``avif`` or ``heic``; None for that of each input.
            manifest: file of the records; ``"auto"`` is ``.fastden-manifest.jsonl`` in an output folder, and none for
                an output file; None writes none.
            resume: skip an image where the manifest says that it is done: same input, weights and options, output
                unchanged. Other outputs in the manifest are replaced where they are as fastden wrote them; one that was
                changed since then fails without ``overwrite``, and one that replaced its input, and is as fastden wrote
                it, fails with it too. Outputs that lie beside their inputs are not taken as inputs. No other run may
                write to the same folders at the same time.
            listener: a :class:`fastden.Listener`. Its functions are called when something happens, until the run ends.
                The run waits for them: they must not wait for another run of this object, in whatever thread.

        Returns:
            A :class:`fastden.Report`; a file that fails is in it, and raises nothing. So is one that cannot be looked
            at, one of several inputs that is not there, and files whose outputs would share a name.

        Raises:
            UserError: nothing to do, an output that is another one's input, no place for the outputs.
            OSError: a folder cannot be read, or none of its images be looked at.
            ValueError: a format that cannot be written.
            RuntimeError: called by a function of the ``listener`` of a run that is going on.
            Interrupted: Ctrl-C; its ``report`` is that of the run until then.
        """
        check_format(format)
        if output == "":  # it would be this folder
            raise UserError("output: ''; accepted: a file or a folder")
        given: Any = inputs
        names = list(given) if isinstance(given, Iterable) and not isinstance(given, str | Path) else [given]
        for name in names:
            if not isinstance(name, str | Path):
                raise TypeError(f"inputs: {type(name).__name__}; accepted: a path or glob pattern, or several")
        left_out: list[Path] = []
        unreadable: list[OSError] = []
        planning: dict[str, Any] = {"recursive": recursive, "format_name": format}
        planning |= {"left_out": left_out, "unreadable": unreadable}
        with self._its_turn():  # before it is planned: an earlier run may still write into these folders
            planning["made"] = made_before(manifest, Path(output)) if resume else None
            jobs = plan([str(name) for name in names], output, **planning)
            report = self.run_jobs(jobs, Path(output), manifest=manifest, resume=resume, listener=listener)
        report.left_out += left_out
        report.unreadable += unreadable
        return report

    def run_jobs(
        self,
        jobs: Sequence[Job],
        output: Path,
        *,
        manifest: str | Path | None = "auto",
        resume: bool = False,
        listener: Listener | None = None,
    ) -> Report:
        """:meth:`run` for jobs that are planned already, see :func:`fastden.batch.plan.plan`; errors as of it."""
        with self._its_turn():
            opened = open_for_run(manifest, jobs, output, resume=resume)
            try:
                self._listener = listener or Listener()
                self._running = ThreadedRun(
                    self.stages,
                    jobs,
                    manifest=opened,
                    resume=resume,
                    listener=self._listener,
                    equality=self._equality,
                    workers=self.workers,
                )
                return self._running.all()
            finally:
                self._running, self._listener = None, Listener()

    @contextmanager
    def _its_turn(self) -> Iterator[None]:
        """A context that no other thread is in; a thread of the run that is going on is refused."""
        running = self._running
        if running is not None and running.has(threading.current_thread()):
            raise RuntimeError("run: called by its own listener; accepted: when it has ended, or another BatchDenoiser")
        with self._turn:
            yield

    def _note(self, text: str) -> None:
        self._listener.note(text)

    def network(self, eight_bit: bool, white: bool = False) -> FusedDenoiser:
        """The network for images of 8 bits, or of more; ``white``: of white noise."""
        return self.settings.network(eight_bit, white)

    def one(
        self,
        job: Job,
        manifest: Manifest | None = None,
        *,
        replaces: bool = False,
        computer: Executor | None = None,
    ) -> Record:
        """Denoise one file, for engines that have their own parallelism.

        With a ``computer`` of one thread several threads may call it at once. They read and write in parallel; one
        computes at a time. A thread waits where ``max_memory`` has no room for its image.

        Args:
            job: the folder of its output must exist.
            manifest: to write the record to.
            replaces: the output may be replaced, whatever ``overwrite`` says.
            computer: runs the network; None is this thread.

        Returns:
            The record; a failure has one too.
        """
        stages = self.stages
        try:
            picture = stages.read(job, self._gate, replaces=replaces)
        except FAILURES as error:
            return stages.writing.failure(job, error, manifest)
        try:
            if picture.streamed:
                return _run(computer, lambda: stages.stream(picture, manifest))
            _run(computer, lambda: stages.computing.compute([picture]))
            return stages.writing.write(picture, manifest)
        except FAILURES as error:
            return stages.writing.failure(job, error, manifest)
        finally:
            picture.drop_pixels()
            self._gate.give_back(picture.size)


def _run(computer: Executor | None, function: Callable[[], _T]) -> _T:
    return function() if computer is None else computer.submit(function).result()


def _plain(value: Any) -> Any:
    """A number of NumPy or PyTorch as one of Python's, which the manifest can hold."""
    return value.item() if getattr(value, "ndim", None) == 0 and hasattr(value, "item") else value
