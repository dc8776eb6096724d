"""Many image files on many devices and machines through Ray Data.

A row is a pair of names, with ``"replaces": "yes"`` where the output, an earlier run's, may be replaced. ``"absent"``
instead says that no output was there when the run began: Ray repeats a row whose worker died, perhaps when its output
was there. Each actor reads its inputs and writes its outputs itself: no pixel passes through Ray's object store.
Records come back.
Ray places the actors, restarts those that die, and balances the load.
"""

from __future__ import annotations

import errno
import glob
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import takewhile
from pathlib import Path
from typing import Any

from fastden.batch.manifest import Manifest, Record, WorkersManifest
from fastden.batch.plan import InputError, Job, collisions, plan, suffix_of_result
from fastden.errors import UserError, in_one_line
from fastden.images.codec import SUFFIXES, check_format, format_for, format_of_suffix
from fastden.images.finder import has_image_name, is_left_out
from fastden.whole_files import EXISTS, INSTEAD

Row = dict[str, str]


@dataclass(frozen=True)
class Pool:
    """How many workers there are, and what each takes.

    Attributes:
        workers: actors in the whole cluster.
        gpus: of each; a part of one where several share a device.
        cpus: of each.
    """

    workers: int
    gpus: float
    cpus: float


#: Environment of workers. By default glibc gives each thread an arena of its own, and returns its memory to the system
#: again and again: the network then takes 1.0 to 1.1 s for 4 megapixels on 2 cores, instead of 0.87 to 0.92.
ENVIRONMENT = {"MALLOC_ARENA_MAX": "1"}


def files_at_once(pool: Pool) -> int:
    """Files that a worker handles at once: it reads, computes and writes in parallel, as the local engine does."""
    from fastden.batch.denoiser import default_workers

    return 2 * default_workers(on_cpu=not pool.gpus) + 1


def has_scheme(name: str) -> bool:
    """Whether ``name`` is a URL, which fsspec opens, rather than a path."""
    return "://" in name


def plan_rows(
    inputs: Sequence[str],
    output: str,
    *,
    recursive: bool = False,
    format_name: str | None = None,
    unreadable: list[OSError] | None = None,
    made: Callable[[Path], bool] | None = None,
    left_out: list[Path] | None = None,
) -> list[Row]:
    """What to read and where to write it: a row ``{"input", "output"}`` for each image.

    Args:
        inputs: files, folders and patterns: paths, or URLs that fsspec knows.
        output: a folder, or for one file a file; of URLs one that an image's suffix says.
        recursive: descend into folders, keeping their structure.
        format_name: of the results; the inputs' suffixes otherwise.
        unreadable, made: as in :func:`fastden.batch.plan.plan`; the latter of paths alone.
        left_out: takes files of the folders that are images which are not read here.

    Raises:
        UserError: as :func:`fastden.batch.plan.plan`.
        ValueError: a format that cannot be written.
    """
    check_format(format_name)
    if not any(map(has_scheme, (*inputs, output))):
        options: dict[str, Any] = {"recursive": recursive, "format_name": format_name}
        jobs = plan(list(inputs), output, unreadable=unreadable, made=made, left_out=left_out, **options)
        return [{"input": os.path.abspath(job.source), "output": os.path.abspath(job.target)} for job in jobs]
    as_file = format_of_suffix(os.path.splitext(output)[1]) is not None and not _is_folder(output)
    if not has_scheme(output):
        output = os.path.abspath(output)  # workers have working folders of their own
    if as_file and inputs:
        # First: where the one input is missing, what the output names would mislead.
        found = _sources(inputs[0], output, recursive, left_out) if len(inputs) == 1 else []
        if not found or not _is_file(inputs[0]):
            raise UserError(f"output: {output} names a file; accepted for more than one input: a folder")
        format_for(output, format_name)
        return [{"input": found[0][0], "output": output}]
    rows: dict[str, list[str]] = {}
    errors: list[InputError] = []
    for name in inputs:
        try:
            sources = _sources(name, output, recursive, left_out)
        except InputError as error:
            if unreadable is None or len(inputs) == 1:
                raise
            errors.append(error)
            continue
        for source, relative in sources:
            stem, suffix = os.path.splitext(relative)
            same = rows.setdefault(f"{output.rstrip('/')}/{stem}{suffix_of_result(suffix, format_name)}", [])
            same += [] if source in same else [source]
    errors += collisions([(source, target) for source in same] for target, same in rows.items())
    alone = [{"input": same[0], "output": target} for target, same in rows.items() if len(same) == 1]
    if errors and (unreadable is None or not alone):
        raise errors[0]
    if unreadable is not None:
        unreadable += errors
    return alone


def check_places(rows: Iterable[Row]) -> None:
    """Raise UserError where two rows have one output, or an output is an input: a URL may name a local file, too.

    Args:
        rows: of :func:`plan_rows`.
    """
    writers: dict[Any, Row] = {}
    for row in rows:
        writer = writers.setdefault(_place(row["output"]), row)
        if writer is not row:
            names = f"{writer['input']}, {row['input']}"
            raise UserError(f"output: {names} would both be written to {row['output']}; accepted: different names")
    for row in writers.values():
        writer = writers.get(_place(row["input"]), {})
        if writer is row:
            raise UserError(f"output: {row['output']} is the input; accepted with --engine ray: another folder")
        if writer:  # chance would decide whether it is read before or after it is replaced
            what = f"{writer['output']}, of {writer['input']}"
            raise UserError(f"output: {what}, is an input too; accepted: another folder")


def _place(name: str) -> Any:
    """The same for all names of one file."""
    if not has_scheme(name):
        return os.path.realpath(name)
    system, path = _filesystem(name)
    return os.path.realpath(path) if getattr(system, "local_file", False) else (system, path)


def _is_folder(name: str) -> bool:
    system, path = _filesystem(name)
    try:
        return name.endswith("/") or bool(system.isdir(path))
    except Exception:  # each kind of store has its own errors; writing meets them again
        return False


def _is_file(name: str) -> bool:
    system, path = _filesystem(name)
    try:
        return bool(system.isfile(path)) and not system.isdir(path)
    except Exception:  # as above; the input is looked at again, with a message
        return True


def mark_absent(rows: Sequence[Row], output: str) -> list[Row]:
    """The rows, with ``"absent": "yes"`` where there is no output yet.

    Args:
        rows, output: of :func:`plan_rows`.
    """
    try:
        system, folder = _filesystem(output) if has_scheme(output) else (None, "")
        there = set() if system is None else set(system.find(folder))  # one request, not one for each file
    except Exception:  # each kind of store has its own errors; where it cannot be listed, no output is absent
        return list(rows)

    def is_absent(name: str) -> bool:
        return _is_missing(name) if system is None else system._strip_protocol(name) not in there

    return [{**row, "absent": "yes"} if is_absent(row["output"]) else row for row in rows]


def _is_missing(path: str) -> bool:
    try:
        os.stat(path)
    except OSError as error:  # another error does not say that nothing is there
        return error.errno in (errno.ENOENT, errno.ENOTDIR)
    return False


def _sources(name: str, output: str, recursive: bool, left_out: list[Path] | None) -> list[tuple[str, str]]:
    """Names of images, each with its path below the output. As in :func:`plan`, hidden folders and results are none."""
    system, path = _filesystem(name)
    folder = ""
    try:
        if system.isdir(path):
            folder = path.rstrip("/")
            files = _inputs(system.find(folder, maxdepth=None if recursive else 1), folder, folder, system, output)
        elif system.isfile(path):  # before patterns: the name may have a bracket in it
            files = [path]
        elif glob.has_magic(path):
            top = "/".join(takewhile(lambda part: not glob.has_magic(part), path.split("/")))
            files = _inputs(system.glob(path), path, top, system, output)
        else:
            files = []
    except (OSError, ValueError) as error:  # some patterns are none for fsspec, such as **.png
        raise InputError(f"input: {name}: {getattr(error, 'strerror', None) or error}", name) from error
    if left_out is not None and files != [path]:
        left_out += [Path(file) for file in files if is_left_out(file)]
    images = [file for file in files if has_image_name(file)]
    if not images:
        accepted = f"files, folders and patterns, suffixes {', '.join(SUFFIXES)}"
        raise InputError(f"input: no images at {name}; accepted: {accepted}", name)
    full = system.unstrip_protocol if has_scheme(name) else os.path.abspath
    return [(full(file), file[len(folder) + 1 :] if folder else Path(file).name) for file in images]


def _inputs(files: Iterable[str], asked: str, top: str, system: Any, output: str) -> list[str]:
    """The files below ``top`` that are no results of an earlier run, and in no hidden folder unless it is asked for."""
    other, results = _filesystem(output)
    results = f"{results.rstrip('/')}/"
    inside = other == system and results.startswith(f"{top}/") and results != f"{top}/"
    hidden = "/." not in asked[len(top) :]
    return sorted(
        file
        for file in files
        if not (inside and file.startswith(results)) and not (hidden and "/." in os.path.dirname(file)[len(top) :])
    )


def _filesystem(name: str) -> tuple[Any, str]:
    try:
        from fsspec.core import url_to_fs

        return url_to_fs(name)
    except ImportError as error:  # fsspec itself, or what it needs for this kind of URL
        raise UserError(f"{name}: {error}; install what fsspec names for these URLs") from error
    except ValueError as error:
        raise UserError(f"{name}: {error}; accepted: a path, or a URL that fsspec knows") from error


class Worker:
    """One actor: a network on its device. Ray calls it from several threads, each with a file; one thread computes.

    Args:
        settings: keyword arguments of :class:`fastden.BatchDenoiser`.
        cpus: threads to compute with.
        manifest: of the driver; None for none. The worker records in a file beside it what it is about to name.

    What keeps it from starting is told by its calls: of an actor that cannot be made, Ray prints 300 lines.
    """

    def __init__(self, settings: dict[str, Any], cpus: float, manifest: str | None = None) -> None:
        import torch

        from fastden.batch.denoiser import BatchDenoiser
        from fastden.network.onednn import keep_freed_memory

        keep_freed_memory()
        torch.set_num_threads(max(int(cpus), 1))
        self.broken = ""
        try:
            self.denoiser = BatchDenoiser(**settings)
        except Exception as error:
            self.broken = in_one_line(error)
        self.overwrite = bool(settings.get("overwrite"))
        self.computer = ThreadPoolExecutor(1, "fastden-compute")
        self.manifest = None if manifest is None else Path(manifest)
        self.named = None if self.manifest is None else WorkersManifest(self.manifest)

    def __call__(self, row: Row) -> dict[str, str]:
        """The record of a row, its names those of the row, as one JSON text: Ray's columns hold no mixed types.

        Beside it is ``"broken"``, why this worker can do nothing; empty where it can.
        """
        if self.broken:
            return {"record": "", "broken": self.broken}
        source, target = row["input"], row["output"]
        job = Job(Path(source), Path(target))
        try:
            replaces = self._replaces(row, job)
        except UserError as error:
            record = self._failure(job, error)
        else:
            by_copies = has_scheme(source) or has_scheme(target)
            record = self._through_copies(source, target, replaces) if by_copies else self._one(job, replaces)
        return {"record": replace(record, input=source, output=target).as_json(), "broken": ""}

    def _replaces(self, row: Row, job: Job) -> bool:
        """Whether the row's output may be replaced. One that was absent may if a worker of this run has named it since.

        Raises:
            UserError: somebody has changed it since then.
        """
        if "absent" not in row:
            return row.get("replaces") == "yes"
        if self.manifest is None:  # nobody knows who made it
            return True
        return os.path.lexists(job.target) and Manifest(self.manifest).may_replace(job, overwrite=False)

    def _one(self, job: Job, replaces: bool) -> Record:
        folder = job.target.parent
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            return self._failure(job, UserError(f"output: cannot make the folder {folder}: {error.strerror}"))
        return self.denoiser.one(job, self.named, replaces=replaces, computer=self.computer)

    def _through_copies(self, source: str, target: str, replaces: bool) -> Record:
        with tempfile.TemporaryDirectory(prefix="fastden-") as folder:
            job = Job(
                Path(folder, "input" + Path(source).suffix) if has_scheme(source) else Path(source),
                Path(folder, "output" + Path(target).suffix) if has_scheme(target) else Path(target),
            )
            try:
                if has_scheme(source):
                    _fetch(source, job.source)
                if has_scheme(target):
                    system, path = _filesystem(target)
                    if not (self.overwrite or replaces) and system.exists(path):
                        raise UserError(f"{target}: {EXISTS}{INSTEAD}")
                record = self._one(job, replaces)
                if record.status == "done" and has_scheme(target):
                    _send(job.target, target)
            except Exception as error:  # each kind of store has its own errors
                record = self._failure(job, error)
        if record.error is not None:  # the copies are gone
            text = record.error.replace(str(job.source), source).replace(str(job.target), target)
            record = replace(record, error=text)
        return record

    def _failure(self, job: Job, error: Exception) -> Record:
        return self.denoiser.stages.writing.failure(job, error)


def _fetch(source: str, here: Path) -> None:
    system, path = _filesystem(source)
    with system.open(path, "rb") as remote, here.open("xb") as local:
        shutil.copyfileobj(remote, local, 1 << 20)


def _send(here: Path, target: str) -> None:
    """Copy a file; it appears under its name when it is complete."""
    system, path = _filesystem(target)
    system.makedirs(system._parent(path), exist_ok=True)
    with system.transaction, here.open("rb") as local, system.open(path, "wb") as remote:
        shutil.copyfileobj(local, remote, 1 << 20)


def _ray() -> Any:
    try:
        import ray
        import ray.data
    except ModuleNotFoundError as error:
        raise UserError(
            f"engine: ray, but the package {error.name} is missing; install: pip install 'fastden[ray]'"
        ) from error
    return ray


def choose_pool(resources: dict[str, float], workers: int | None, per_device: int, device: str | None) -> Pool:
    """The pool for a cluster's resources.

    Args:
        resources: of the cluster, as ``ray.cluster_resources()`` gives them.
        workers: how many; None is ``per_device`` on each GPU, or without GPUs one on each machine.
        per_device: workers that share a GPU.
        device: ``"cpu"`` leaves GPUs alone.

    Raises:
        UserError: less than one worker, or CUDA where the cluster has no GPU.
    """
    for name, value in (("workers", workers), ("workers_per_device", per_device)):
        if value is not None and value < 1:
            raise UserError(f"{name}: {value}; accepted: 1 or more")
    gpus, cpus = resources.get("GPU", 0.0), max(resources.get("CPU", 1.0), 1.0)
    if not gpus and device is not None and device.startswith("cuda"):
        raise UserError(f"device: {device}, but the Ray cluster has no GPU; accepted: cpu, or none given")
    if gpus and device != "cpu":
        count = workers or int(gpus) * per_device
        return Pool(count, 1 / per_device, max(cpus // count, 1))
    machines = sum(name.startswith("node:") and name != "node:__internal_head__" for name in resources)
    count = workers or max(machines, 1)
    return Pool(count, 0, max(cpus // count, 1))


def connect(workers: int | None, workers_per_device: int, device: str | None) -> Pool:
    """Connect to the Ray cluster that this process finds, or else start Ray on this machine; the pool that it gives.

    Args:
        workers, workers_per_device, device: as in :func:`choose_pool`.

    Raises:
        UserError: Ray is missing, does not start, or finds no cluster where ``RAY_ADDRESS`` says.
    """
    import logging

    ray = _ray()
    if not ray.is_initialized():
        try:
            ray.init(log_to_driver=False, logging_level=logging.ERROR)
        except Exception as error:  # Ray raises this class itself where a machine's processes do not start
            raise UserError(f"engine: ray cannot be started or reached: {error}") from error
    return choose_pool(ray.cluster_resources(), workers, workers_per_device, device)


def told_by_ray(error: Exception) -> str:
    """The cause in an error of Ray's own, such as that of a worker that died: the last line; empty for other errors.

    Empty too where Ray wraps what was raised in a worker, which is a defect of fastden: its trace is in Ray's error.
    """
    exceptions = sys.modules.get("ray.exceptions")
    if exceptions is None or not isinstance(error, exceptions.RayError):
        return ""
    if isinstance(error, exceptions.RayTaskError):
        # Ray Data first wraps it in an error that is Ray's by its class, in older versions in one that is not.
        defect = getattr(exceptions, "UserCodeException", ())
        if not isinstance(error.cause, exceptions.RayError) or isinstance(error.cause, defect):
            return ""
    lines = [line.strip() for line in re.sub(r"\x1b\[[0-9;]*m", "", str(error)).splitlines()]
    return next((line for line in reversed(lines) if line), type(error).__name__)


def distribute(
    rows: Sequence[Row], settings: dict[str, Any], pool: Pool, manifest: str | None = None
) -> Generator[Record, None, None]:
    """Denoise files on the workers of a Ray cluster.

    Args:
        rows: from :func:`plan_rows`, at least one.
        settings: keyword arguments of :class:`fastden.BatchDenoiser`; they travel to every worker.
        pool: from :func:`connect`.
        manifest: path of the run's manifest; None for none.

    Yields:
        The record of each row as it is finished, in no particular order; its names are those of the row.

    Raises:
        UserError: a worker cannot start.
    """
    ray = _ray()
    with _quiet(ray):
        # One row a block: a worker that is free takes the next file, even where files differ much in size.
        dataset = ray.data.from_items(list(rows), override_num_blocks=len(rows))
        at_once = files_at_once(pool)
        results = dataset.map(
            Worker,
            fn_constructor_args=(settings, pool.cpus, manifest),
            compute=ray.data.ActorPoolStrategy(
                size=min(pool.workers, len(rows)),
                max_concurrent_calls_per_actor=at_once,
                max_tasks_in_flight_per_actor=at_once,
                enable_true_multi_threading=True,
            ),
            num_cpus=pool.cpus if not pool.gpus else None,
            num_gpus=pool.gpus or None,
            runtime_env={"env_vars": ENVIRONMENT},
        )
        for row in results.iter_rows():
            if row.get("broken"):
                raise UserError(f"engine: ray, but a worker cannot start: {row['broken']}")
            yield Record.from_json(row["record"])


@contextmanager
def _quiet(ray: Any) -> Iterator[None]:
    """Ray Data shows no bars and logs errors alone, without stack traces; these settings are the whole process's."""
    import logging

    context = ray.data.DataContext.get_current()
    bars = context.enable_progress_bars
    loggers = {logging.getLogger("ray.data"): logging.ERROR, logging.getLogger("ray.data.exceptions"): logging.CRITICAL}
    levels = {logger: logger.level for logger in loggers}
    context.enable_progress_bars = False
    for logger, level in loggers.items():
        logger.setLevel(level)
    try:
        yield
    finally:
        context.enable_progress_bars = bars
        for logger, level in levels.items():
            logger.setLevel(level)
