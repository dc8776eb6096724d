"""The record of a batch run, a line of JSON for each event. It makes an interrupted run resumable."""

from __future__ import annotations

import json
import os
import re
import secrets
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from fastden.batch.plan import Job
from fastden.errors import UserError
from fastden.whole_files import check_target, digest, reason

#: The manifest's name in an output folder.
NAME = ".fastden-manifest.jsonl"
_BEGINNING = b'{"input": '


@dataclass(frozen=True)
class Record:
    """One line of the manifest: what happened to one image.

    Attributes:
        input, output: paths; the input's absolute, the output's from the manifest's folder where it lies there, else
            absolute.
        status: ``writing`` (whole, about to get its name), ``done`` or ``failed``.
        sigma: the noise level used, on the scale 0-255, of a map its mean; None for a blind model, or a failure.
        sigma_source: ``given``, ``estimated``, ``map`` or ``blind``.
        noise: what was estimated of a file of one page: ``sigmas`` (0-255 scale, at eight values of brightness),
            ``coarseness``, ``uncertainty``, ``kind`` and ``is_white`` of :class:`fastden.NoiseEstimate`.
        values: where the values are not on [0, 1], the range of each page on which it was denoised: ``black`` and
            ``white``, white of the dtype being 1, and the ``reason``.
        model: name and SHA-256 of the weights; the estimated noise may have chosen them.
        options: the other settings that decide the result.
        time: when the line was written, UTC.
        seconds: spent reading, computing and writing, by name.
        input_size, input_mtime_ns: of the input when it was read: bytes, nanoseconds.
        output_size, output_sha256: of the output.
        width, height: pixels, of a page.
        pages: of the file.
        streamed: whether it went through strip by strip.
        notes: what the user was told.
        error: the message of a failure.
    """

    input: str
    output: str
    status: Literal["writing", "done", "failed"]
    time: str
    model: dict[str, str]
    options: dict[str, Any]
    sigma: float | None = None
    sigma_source: str | None = None
    noise: dict[str, Any] | None = None
    values: list[dict[str, Any]] | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    input_size: int = 0
    input_mtime_ns: int = 0
    output_size: int = 0
    output_sha256: str = ""
    width: int = 0
    height: int = 0
    pages: int = 1
    streamed: bool = False
    notes: tuple[str, ...] = ()
    error: str | None = None

    def as_json(self) -> str:
        """One line."""
        return _line(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Record:
        """The record that :meth:`as_json` wrote."""
        values = json.loads(text)
        return cls(**{**values, "notes": tuple(values["notes"])})


def _line(values: dict[str, Any]) -> str:
    return json.dumps(values, ensure_ascii=False)


class Manifest:
    """A file of records; lines are appended, down to the disk, and never changed.

    The files of a cluster's workers beside it (:class:`WorkersManifest`) are read too.

    Args:
        path: of the file. Lines that are not records are skipped, such as one that was cut off when a process was
            killed.
        eager: make the file with its first line. Otherwise the first output makes it: where all files fail there is
            none.

    Raises:
        UserError: the file cannot be read, or is another kind of file.
    """

    def __init__(self, path: Path, *, eager: bool = True) -> None:
        self.path = path
        self._folder = Path(os.path.abspath(path)).parent
        self._lock = threading.Lock()
        self._held: list[bytes] | None = None if eager or path.exists() else []
        self._last: dict[str, dict[str, Any]] = {}
        # Checksums of all that was written under a name: a run that was killed left the file of the one before.
        self._digests: dict[str, set[str]] = {}
        data = _read(path)
        for _, record in self._records(data):
            self._keep(record["output"], record)
        # A run that was killed early leaves one incomplete line.
        if not self._last and data[: len(_BEGINNING)] != _BEGINNING[: len(data)]:
            raise UserError(f"manifest: {path} is no record of a run; accepted: a new file, or one that a run has made")
        for beside in self._of_workers():
            for _, record in self._records(_read(beside)):
                self._keep(record["output"], record)

    def _records(self, data: bytes) -> Iterator[tuple[bytes, dict[str, Any]]]:
        """The lines of a manifest that are records, each with what it says."""
        for line in data.split(b"\n"):
            try:
                record = json.loads(line)
                names = (record["input"], record["output"])
                if isinstance(record["model"], dict) and all(
                    isinstance(name, str) for name in (*names, record["status"])
                ):
                    record["input"], record["output"] = (_of_this_locale(name, self._folder) for name in names)
                    yield line, record
            except (ValueError, KeyError, TypeError, RecursionError):  # the last: brackets in brackets
                continue

    def _keep(self, output: str, record: dict[str, Any]) -> None:
        # Without a checksum it says nothing of the file that is there, which may be anybody's.
        if record["status"] == "writing" and not record.get("output_sha256"):
            return
        # A failure does not touch the output of an earlier run, so that run's record still holds.
        if record["status"] != "failed" or not self._last.get(output, {}).get("output_sha256"):
            self._last[output] = record
        if record.get("output_sha256"):
            self._digests.setdefault(output, set()).add(record["output_sha256"])

    def _of_workers(self) -> list[Path]:
        """The files of a cluster's workers; those of a run that ended early are still there."""
        ours = re.compile(re.escape(self.path.name) + r"\.[0-9a-f]{16}")
        try:
            return sorted(self._folder / name for name in os.listdir(self._folder) if ours.fullmatch(name))
        except OSError:  # the folder may have to be made
            return []

    def take_over(self) -> None:
        """Move what a cluster's workers recorded into this file; none may be at work.

        Raises:
            UserError: the system refuses.
        """
        paths = self._of_workers()
        known = {_made(record) for _, record in self._records(_read(self.path))} if paths else set()
        for path in paths:
            news = [line + b"\n" for line, record in self._records(_read(path)) if _made(record) not in known]
            try:
                with self._lock:
                    if news:
                        self._append(b"".join([*(self._held or ()), *news]))
                        self._held = None
                path.unlink()
            except OSError as error:
                raise UserError(f"manifest: {self.path} cannot be written: {reason(error)}") from error

    def name_of(self, output: Path) -> str:
        """An output's path as records give it."""
        path = Path(os.path.abspath(output))
        return path.relative_to(self._folder).as_posix() if path.is_relative_to(self._folder) else str(path)

    def add(self, record: Record) -> None:
        """Append a line and flush it to the disk.

        Raises:
            UserError: the system refuses.
        """
        # File names are bytes. Python shows a byte that is not UTF-8 as a lone surrogate.
        values = asdict(record)
        names = {"input": _of_any_locale(record.input), "output": _of_any_locale(record.output)}
        line = _line({**values, **names}).encode("utf-8", "surrogatepass") + b"\n"
        with self._lock:
            self._keep(record.output, values)
            if self._held is not None:
                self._held.append(line)
                if record.status == "failed":
                    return
                line, self._held = b"".join(self._held), None
            try:
                self._append(line)
            except OSError as error:
                raise UserError(f"manifest: {self.path} cannot be written: {reason(error)}") from error

    def _append(self, line: bytes) -> None:
        with self.path.open("ab+") as file:
            # A line that a crash or a full disk cut off has no end: the new line must not continue it.
            if file.tell():
                file.seek(-1, os.SEEK_END)
                if file.read(1) != b"\n":
                    line = b"\n" + line
            file.write(line)
            file.flush()
            os.fsync(file.fileno())

    def knows(self, job: Job) -> bool:
        """Whether a run on record wrote the job's output, or was about to, from the same input."""
        record = self._last.get(self.name_of(job.target))
        if record is None or record.get("status") not in ("writing", "done"):
            return False
        return _location(record["input"]) == _location(job.source)

    def may_replace(self, job: Job, *, overwrite: bool) -> bool:
        """Whether a resumed run may replace the job's output: an earlier run wrote it, and it is as that run left it.

        Args:
            job: what is to be done.
            overwrite: of the run: its user accepts that other files are replaced.

        Raises:
            UserError: somebody has changed the output, and ``overwrite`` is off; or the output is its own input, and
                denoised already.
        """
        name = self.name_of(job.target)
        digests = self._digests.get(name, ())
        in_place = os.path.realpath(job.source) == os.path.realpath(job.target)
        known = self.knows(job)
        if not digests or (not in_place and overwrite):
            return known
        try:
            found = digest(job.target)
            status = os.stat(job.target)
        except FileNotFoundError:  # what appears there meanwhile is someone else's
            return False
        except OSError:  # the caller tells of it when it looks at the output
            return known
        if in_place and found in digests:
            raise UserError(f"{job.target}: denoised already, in place; accepted for other settings: its original")
        if not known or overwrite or found in digests:
            return known
        record = self._last[name]
        # A run in place that was killed before it replaced the input.
        if in_place and (record.get("input_size"), record.get("input_mtime_ns")) == (
            status.st_size,
            status.st_mtime_ns,
        ):
            return True
        raise UserError(
            f"{job.target}: changed since fastden wrote it; accepted: another name, or overwrite (--overwrite)"
        )

    def written(self) -> dict[Path, dict[str, Any]]:
        """The outputs that runs on record wrote, or were about to, each with its record."""
        return {
            self._folder / name: record
            for name, record in self._last.items()
            if record.get("status") in ("writing", "done")
        }

    def finished(self, job: Job, weights: Sequence[str], options: dict[str, Any]) -> bool:
        """Whether the job is done already: same input, weights and options, and the output has not changed.

        Args:
            job: what is to be done.
            weights: the SHA-256 of each of the weights that the picture's noise may choose.
            options: the other settings that decide the result.
        """
        record = self._last.get(self.name_of(job.target))
        if record is None or record.get("status") not in ("writing", "done"):
            return False
        if record["model"].get("sha256") not in weights or record.get("options") != options:
            return False
        try:
            if os.stat(job.target).st_size != record.get("output_size"):
                return False
            source = os.stat(job.source)
            same = (record.get("input_size"), record.get("input_mtime_ns")) == (source.st_size, source.st_mtime_ns)
            # The result replaced its input: the file is a different one now.
            in_place = os.path.realpath(job.source) == os.path.realpath(job.target)
            same_path = _location(record["input"]) == _location(job.source)
            return same_path and (same or in_place) and digest(job.target) == record.get("output_sha256")
        except OSError:
            return False


class WorkersManifest(Manifest):
    """What a worker of a cluster is about to name: the driver, which hears of it later, may be killed before.

    Its file lies beside the driver's, in whose name a number follows.

    Args:
        path: of the driver's manifest.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path.with_name(f"{path.name}.{secrets.token_hex(8)}"))

    def add(self, record: Record) -> None:
        """As of :class:`Manifest`, what is about to get its name alone; the driver records the rest."""
        if record.status == "writing":
            super().add(record)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes() if path.exists() else b""
    except OSError as error:
        raise UserError(f"manifest: {path} cannot be read: {reason(error)}") from error


def _made(record: dict[str, Any]) -> tuple[str, str | None]:
    """The file that a record is about: its name and its checksum."""
    return record["output"], record.get("output_sha256")


def open_for_run(manifest: str | Path | None, jobs: Sequence[Job], output: Path, *, resume: bool) -> Manifest | None:
    """:func:`open_manifest` for a run on this machine, which cannot be resumed without one.

    Raises:
        UserError: there is no manifest to resume from.
    """
    opened = open_manifest(manifest, jobs, output)
    if resume and opened is None:
        raise UserError("resume: there is no manifest to resume from; accepted: an output folder, or a manifest")
    if opened is not None:
        opened.take_over()
    return opened


def open_manifest(manifest: str | Path | None, jobs: Sequence[Job], output: Path) -> Manifest | None:
    """The manifest that :meth:`fastden.BatchDenoiser.run` means; None for none.

    Raises:
        UserError: it cannot be read or written, or is an input or an output of the run.
    """
    if manifest is None:
        return None
    if manifest != "auto":
        path = Path(manifest)
        place = os.path.realpath(path)
        for job in jobs:
            for what, file in (("an output", job.target), ("an input", job.source)):
                if os.path.realpath(file) == place:
                    raise UserError(f"manifest: {path} is {what} of this run; accepted: another file")
        if path.parent != output:  # the folder may have to be made
            try:
                check_target(path, overwrite=True)
            except UserError as error:
                raise UserError(f"manifest: {error}") from error
        return Manifest(path)
    return Manifest(output / NAME, eager=False) if has_manifest(manifest, jobs, output) else None


def has_manifest(manifest: str | Path | None, jobs: Sequence[Job], output: Path) -> bool:
    """Whether :func:`open_manifest` opens one: with ``auto`` a folder of outputs has it, a single file has none."""
    is_file = len(jobs) == 1 and jobs[0].target == output
    return manifest is not None and not (manifest == "auto" and is_file)


def has_earlier(manifest: str | Path | None, jobs: Sequence[Job], output: Path) -> bool:
    """Whether an earlier run has left the manifest that :func:`open_manifest` opens."""
    if manifest is None or not has_manifest(manifest, jobs, output):
        return False
    return (output / NAME if manifest == "auto" else Path(manifest)).exists()


def made_before(manifest: str | Path | None, output: Path) -> Callable[[Path], bool]:
    """A function that tells whether an earlier run made a file. The resumed run does not take such a file as input.

    Otherwise a run with outputs beside its inputs would denoise its own outputs when it is resumed.

    Args:
        manifest, output: as of :meth:`fastden.BatchDenoiser.run`.

    Raises:
        UserError: the manifest cannot be read.
    """
    made: dict[str, dict[str, Any]] = {}
    if manifest is not None:
        earlier = Manifest(output / NAME if manifest == "auto" else Path(manifest), eager=False)
        made = {_location(path): record for path, record in earlier.written().items()}

    def is_made(path: Path) -> bool:
        record = made.get(_location(path))
        if record is None or _location(record["input"]) == _location(path):
            return False
        if os.path.lexists(record["input"]):
            return True
        try:  # its input is gone, so a file of this name may be a different one
            return digest(path) == record.get("output_sha256")
        except OSError:
            return False

    return is_made


def _location(path: str | Path) -> str:
    """The place of a file, with links to its folder resolved; a link to a file counts as a file of its own."""
    folder, name = os.path.split(os.path.abspath(path))
    return os.path.join(os.path.realpath(folder), name)


def _of_any_locale(name: str) -> str:
    """A path as manifests hold it: its bytes taken for UTF-8, whatever the locale of this process."""
    try:
        return os.fsencode(name).decode("utf-8", "surrogateescape")
    except UnicodeError:
        return name


def _of_this_locale(name: str, folder: Path) -> str:
    """The path that a manifest in ``folder`` holds, as Python names the file here."""
    try:
        here = os.fsdecode(name.encode("utf-8", "surrogateescape"))
    except UnicodeError:
        return name
    # Earlier versions wrote names as their own locale showed them.
    return name if here != name and not os.path.lexists(folder / here) and os.path.lexists(folder / name) else here
