"""The session of one visitor: the pictures, their noise, their results, and the folder that holds them."""

from __future__ import annotations

import io
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal
from zipfile import ZIP_STORED, ZipFile

import numpy as np

from fastden.batch.denoiser import BatchDenoiser
from fastden.batch.manifest import Record
from fastden.batch.plan import SUFFIX_OF, Job
from fastden.batch.report import Listener
from fastden.errors import FAILURES, UserError, in_one_line
from fastden.images.codec import SUFFIXES, read_image
from fastden.images.encoding import INTERPRETATIONS, described
from fastden.images.formats import open_file, read_suffixes, result_suffix
from fastden.images.kinds import check_supported
from fastden.images.libvips import VIPS_FORMATS, detail, load_vips, vips_errors
from fastden.images.strips import StripReader, read_samples
from fastden.inference.estimate import NoiseEstimate, noise_of_samples
from fastden.whole_files import reason, replacing

#: Called with the picture at work, its index, and the part of the run that is done, 0 to 1.
Progress = Callable[[int, float], None]


@dataclass(frozen=True)
class Limits:
    """Limits of the page's uploads.

    Attributes:
        files: pictures at a time.
        pixels: of one picture.
        upload: bytes of one file.
    """

    files: int = 100
    pixels: int = 100_000_000
    upload: int = 500_000_000


@dataclass(frozen=True)
class Choice:
    """The visitor's settings, as the options of ``fastden denoise``."""

    model: str | None = None
    sigma: Literal["auto"] | float = "auto"
    strength: float = 1.0


@dataclass
class Picture:
    """One picture.

    Attributes:
        name: as the visitor knows it.
        source, target: files of the session; the target of a name that says no format has its suffix when the picture
            has been read.
        estimate: of its noise; None where it cannot be read.
        error: why there is no result, or None.
        model: the name of the model that was used, or None.
        notes: what the visitor should know of the result.
    """

    name: str
    source: Path
    target: Path
    estimate: NoiseEstimate | None = None
    error: str | None = None
    model: str | None = None
    notes: tuple[str, ...] = ()

    @property
    def done(self) -> bool:
        """Whether there is a result."""
        return self.target.is_file()

    @property
    def result_name(self) -> str:
        """The result's file name for the visitor."""
        return f"{Path(self.name).stem}-clean{self.target.suffix}"

    def told(self, text: str) -> str:
        """A message without the paths of this machine."""
        for path in (self.source, self.target):
            text = text.replace(str(path), self.name)
        return text


class Cancelled(BaseException):
    """The visitor has pressed *Cancel*, or left. No :class:`Exception`: no stage takes it for a picture's failure."""


class Superseded(Cancelled):
    """The visitor has dropped other pictures."""


@dataclass(frozen=True)
class Turns:
    """Locks of all sessions of a page: the pictures of several visitors would share the memory.

    Attributes:
        looking: held while the noise of pictures is estimated.
        running: held while pictures are denoised.
    """

    looking: threading.Lock = field(default_factory=threading.Lock)
    running: threading.Lock = field(default_factory=threading.Lock)


class Session:
    """The pictures of one visitor, in a folder that is removed with the session.

    Args:
        root: the folder in which the session's is made.
        limits: of the page.
        device: as in :func:`fastden.denoise`.
        turns: of the page's sessions.

    Attributes:
        folder: the session's.
        pictures: what is worked on.
        fresh: whether nothing was done yet with the pictures that were taken.
        waiting: whether it is another visitor's turn.
        used: when the visitor last asked for something, as of :func:`time.monotonic`.
    """

    def __init__(self, root: Path, limits: Limits, device: str | None = None, turns: Turns | None = None) -> None:
        self.limits, self.device, self.turns = limits, device, turns or Turns()
        self.folder = Path(tempfile.mkdtemp(prefix="session-", dir=root))
        self.pictures: list[Picture] = []
        self._stop = threading.Event()
        self._closed = False
        self._running = threading.Lock()
        self._round = 0
        self.fresh = self.waiting = False
        self.used = time.monotonic()

    def take(self, uploads: Sequence[str | Path], progress: Callable[[int], None] = lambda index: None) -> None:
        """Work on these files from now on, instead of the earlier ones; they are moved into the session's folder.

        Args:
            uploads: the files.
            progress: called with the index of each when its noise is to be estimated.

        Raises:
            UserError: too many, which are removed then; a file that no visitor has uploaded.
            Cancelled: :meth:`cancel` or :meth:`close` was called, and there are no pictures then.
            Superseded: :meth:`take` was called again.
        """
        _check_uploaded(self.folder.parent, uploads)
        self._round += 1
        number = self._round
        self.cancel()
        with self._running:
            self._stop.clear()
            self.fresh = False
            if self._closed or number != self._round:
                remove_uploads(self.folder.parent, uploads)
                self._check(number)
            self._empty()
            if len(uploads) > self.limits.files:
                remove_uploads(self.folder.parent, uploads)
                raise UserError(f"{len(uploads)} pictures at a time; accepted: at most {self.limits.files}")
            for index, upload in enumerate(uploads):
                path = Path(upload)
                suffix = path.suffix if path.suffix.lower() in (*SUFFIXES, *read_suffixes()) else ""
                directory = self.folder / f"{number}-{index}"
                directory.mkdir()
                # Uploads of the same bytes share a path: a visitor's own copy outlives the other's.
                source = directory / f"in{suffix}"
                picture = Picture(path.name, source, directory / f"out{result_suffix(suffix)}")
                self.pictures.append(picture)
                try:
                    _link_or_copy(path, source)
                except FileNotFoundError:  # another visitor's upload of the same bytes was taken meanwhile
                    picture.error = f"{picture.name}: the upload was lost; drop it again"
                except OSError as error:  # such as a full disk
                    picture.error = f"{picture.name}: the upload cannot be kept: {reason(error)}"
            # The same file may be among them twice: they go when all have been taken.
            remove_uploads(self.folder.parent, uploads)
            try:
                with self._turn(self.turns.looking, number):
                    for index, picture in enumerate(self.pictures):
                        self._check(number)
                        progress(index)
                        if picture.error is None:
                            self._look(picture)
            except Cancelled:
                self._empty()
                self._stop.clear()
                raise
            self.fresh = True

    def _check(self, number: int) -> None:
        """Raise Cancelled where what is done for the drop of this number is to end."""
        if number != self._round:
            raise Superseded
        if self._stop.is_set() or self._closed:
            raise Cancelled

    @contextmanager
    def _turn(self, lock: threading.Lock, number: int) -> Iterator[None]:
        """Hold a lock of all sessions; to wait for it can be cancelled."""
        try:
            while not lock.acquire(timeout=0.1):
                self.waiting = True
                self._check(number)
        finally:
            self.waiting = False
        try:
            yield
        finally:
            lock.release()

    def _look(self, picture: Picture) -> None:
        """Estimate the noise of a picture, or find its error; what is in the file decides, not its name."""
        try:
            crops, values = read_samples(picture.source, max_pixels=self.limits.pixels, several=True)
            if not picture.target.suffix:
                picture.target = picture.target.with_suffix(self._suffix_by_content(picture.source))
            picture.estimate = noise_of_samples(crops, values)
        except FAILURES as error:
            picture.error = picture.told(in_one_line(error))

    def _suffix_by_content(self, path: Path) -> str:
        """The suffix of a result whose source's name says no format that is written: the command has a name given."""
        found = StripReader(path, max_pixels=self.limits.pixels, several=True).header.format
        return {**SUFFIX_OF, "raw": result_suffix(".dng")}.get(found, ".png")

    def run(self, choice: Choice, progress: Progress = lambda index, part: None) -> None:
        """Denoise the pictures that can be read: what ``fastden denoise`` would write for them.

        Raises:
            Cancelled: :meth:`cancel` or :meth:`close` was called; there are no results then.
            Superseded: :meth:`take` was called.
            UserError, ValueError, TypeError: a setting that no picture can be denoised with.
        """
        with self._running:
            if not self.fresh:  # what was pressed between a drop and its run counts
                self._stop.clear()
            self.fresh, number = False, self._round
            try:
                self._check(number)
                with self._turn(self.turns.running, number):
                    self._denoise(choice, progress, number)
            finally:
                self._stop.clear()

    def _denoise(self, choice: Choice, progress: Progress, number: int) -> None:
        todo = [picture for picture in self.pictures if picture.estimate is not None]
        by_target = {picture.target: picture for picture in todo}
        for old in (*self.folder.glob("save-*"), *self.folder.glob("*/out*")):
            shutil.rmtree(old) if old.is_dir() else old.unlink()
        for picture in todo:
            picture.error, picture.model, picture.notes = None, None, ()

        def finished(job: Job, record: Record) -> None:
            picture = by_target[job.target]
            picture.model = None if record.error is not None else record.model.get("name")
            picture.notes = tuple(picture.told(note) for note in record.notes)
            picture.error = None if record.error is None else picture.told(record.error)

        def part_done(ended: int, part: float) -> None:
            self._check(number)
            progress(min(ended, len(todo) - 1), (ended + part) / len(todo))

        listener = Listener(record=finished, progress=part_done)
        try:
            batch = BatchDenoiser(
                choice.model,
                sigma=choice.sigma,
                strength=choice.strength,
                device=self.device,
                max_pixels=self.limits.pixels,
            )
            jobs = [Job(picture.source, picture.target) for picture in todo]
            if jobs:
                batch.run_jobs(jobs, self.folder, manifest=None, listener=listener)
            self._check(number)
        except BaseException:
            for picture in todo:
                picture.target.unlink(missing_ok=True)
            raise

    @property
    def busy(self) -> bool:
        """Whether pictures are taken or denoised, or wait for their turn."""
        return self._running.locked()

    @property
    def ending(self) -> bool:
        """Whether what is going on was cancelled."""
        return self._stop.is_set()

    def cancel(self) -> None:
        """End what is going on; it leaves nothing behind."""
        self._stop.set()

    def close(self) -> None:
        """End what is going on, and remove everything."""
        self._closed = True
        self.cancel()
        with self._running:
            shutil.rmtree(self.folder, ignore_errors=True)
            self.pictures = []

    def previews(self, picture: Picture) -> tuple[Path, Path]:
        """The picture before and after, upright and in sRGB, as PNG files that every browser shows.

        A picture with a range of its own, such as floats beyond 1 or 12 bits in a file of 16, is shown from that
        range's black to its white, before and after alike: as viewers of measured data do (ImageJ, napari), without a
        curve, since no such file says whether its values are linear light. Results stay on the picture's scale.

        Raises:
            OSError, UserError: they cannot be written.
        """
        made = []
        for path in (picture.source, picture.target):
            preview = path.with_name(f"{path.stem}-{path.stat().st_mtime_ns}.png")
            if not preview.exists():
                _write_preview(path, preview, picture.estimate)
            made.append(preview)
        return made[0], made[1]

    def download(self) -> Path | None:
        """The result under its own name, or a zip of several; None where there is none.

        Raises:
            OSError: it cannot be written.
        """
        done = [picture for picture in self.pictures if picture.done]
        if not done:
            return None
        directory = Path(tempfile.mkdtemp(prefix="save-", dir=self.folder))
        try:
            return self._save(done, directory)
        except BaseException:  # such as a full disk
            shutil.rmtree(directory, ignore_errors=True)
            raise

    def _save(self, done: list[Picture], directory: Path) -> Path:
        if len(self.pictures) == 1:
            path = directory / done[0].result_name
            _link_or_copy(done[0].target, path)
            return path
        path = directory / "denoised.zip"
        with ZipFile(path, "w", ZIP_STORED) as archive:  # pictures are compressed already
            for name, picture in zip(_unique([picture.result_name for picture in done]), done, strict=True):
                archive.write(picture.target, name)
        return path

    def _empty(self) -> None:
        self.pictures = []
        for directory in self.folder.iterdir():
            shutil.rmtree(directory, ignore_errors=True)


def remove_uploads(root: Path, uploads: Sequence[str | Path]) -> None:
    """Remove uploads that no session takes; ``root`` as of :class:`Session`.

    Raises:
        UserError: a file that no visitor has uploaded.
    """
    _check_uploaded(root, uploads)
    for upload in uploads:
        Path(upload).unlink(missing_ok=True)


def _check_uploaded(root: Path, uploads: Sequence[str | Path]) -> None:
    if not all(Path(upload).resolve().is_relative_to(root.resolve()) for upload in uploads):
        raise UserError("a file that was not uploaded; accepted: uploads")


def _link_or_copy(source: Path, target: Path) -> None:
    """Make a second name for a file; a copy where the file system has none."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def _unique(names: list[str]) -> list[str]:
    """Names without repeats: a second ``a.jpg`` becomes ``a (2).jpg``."""
    taken: set[str] = set()
    result = []
    for name in names:
        path, count, new = Path(name), 1, name
        while new.casefold() in taken:
            count += 1
            new = f"{path.stem} ({count}){path.suffix}"
        taken.add(new.casefold())
        result.append(new)
    return result


def _upright(path: Path) -> Any:
    """A pyvips image of a file, turned upright."""
    vips, data = load_vips(), path.read_bytes()
    if open_file(io.BytesIO(data)) is None:
        check_supported(io.BytesIO(data))
        return vips.Image.new_from_buffer(data, "").autorot()
    # Of these files libvips reads nothing, or a small picture that a camera has put in.
    image = read_image(path).upright()
    planes = image.pixels if image.alpha is None else np.concatenate([image.pixels, image.alpha[:, :, None]], 2)
    height, width, bands = planes.shape
    kind = VIPS_FORMATS[planes.dtype]
    picture = vips.Image.new_from_memory(np.ascontiguousarray(planes).data, width, height, bands, kind)
    return described(picture, image.metadata, strip_metadata=True)


def _on_own_range(image: Any, estimate: NoiseEstimate) -> Any:
    """A pyvips image of gray or RGB from the black to the white of the picture that was judged; alpha stays."""
    most = {"uchar": 255, "ushort": 65535}.get(image.format, 1)
    gain = 1 / (estimate.white - estimate.black)
    alpha = int(image.hasalpha())
    colours = image.bands - alpha
    scaled = image.linear([gain] * colours + [1] * alpha, [-gain * estimate.black * most] * colours + [0] * alpha)
    return scaled.cast(image.format)


def _write_preview(path: Path, target: Path, estimate: NoiseEstimate | None) -> None:
    vips = load_vips()
    with vips_errors():
        image = _upright(path)
        if image.bands > 2 and image.interpretation in ("b-w", "grey16", "multiband"):
            # A TIFF that does not declare RGB: read_image takes it for RGB, libvips for gray with more channels.
            image = image.copy(interpretation=INTERPRETATIONS.get(image.format, ("", "scrgb"))[1])
        if estimate is not None and (estimate.black, estimate.white) != (0, 1) and image.interpretation != "cmyk":
            image = _on_own_range(image, estimate)
        if image.get_typeof("icc-profile-data") and image.format in ("uchar", "ushort"):
            try:
                image = image.icc_transform("srgb", intent="relative")
            except vips.Error:  # a profile of colours in a gray file does not fit, and is passed over
                image = image.colourspace("srgb")
        elif image.format in ("float", "double"):
            image = (image * 255).cast("uchar").copy(interpretation="b-w" if image.bands < 3 else "srgb")
        else:
            image = image.colourspace("srgb")
        with replacing(target, ".png") as temporary:
            try:
                image.cast("uchar").pngsave(str(temporary), compression=1, keep="none")
            except vips.Error as error:
                raise UserError(detail(error)) from error


def in_words(estimate: NoiseEstimate) -> str:
    """How noisy a picture is, for a person who knows no sigma."""
    if estimate.kind == "unknown":
        return "Too little to judge by (flat, clipped or tiny): taken as clean."
    if estimate.kind == "clean":
        return f"Hardly any noise (level {estimate.sigma:.1f})."
    amounts = ((5.0, "A little noise"), (15.0, "Clear noise"), (35.0, "Strong noise"))
    own = estimate.sigma / (estimate.white - estimate.black)
    amount = next((name for most, name in amounts if own < most), "Very strong noise")
    shadows, lights = estimate.at(0.15), estimate.at(0.8)
    where = ""
    if max(shadows, lights) > 1.4 * min(shadows, lights):
        where = f", most in the {'shadows' if shadows > lights else 'lights'}"
    return f"{amount} of {estimate.kind} grain{where} (level {estimate.sigma:.1f} of 255)."
