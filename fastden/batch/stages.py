"""The way of each image of a batch: the stages in turn, or all stages strip by strip."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from fastden.batch.computing import Computing
from fastden.batch.manifest import Manifest, Record
from fastden.batch.memory import Gate
from fastden.batch.picture import Picture
from fastden.batch.plan import Job
from fastden.batch.reading import Reading
from fastden.batch.settings import Settings
from fastden.batch.streaming import denoise_strips, side_for_strips
from fastden.batch.writing import Writing
from fastden.errors import UserError, drop_locals
from fastden.images.decoding import DECODER
from fastden.images.encoding import plan_encoding
from fastden.images.image_file import Header
from fastden.images.pixels import Array
from fastden.images.strips import StripReader, StripWriter
from fastden.inference.run import Progress
from fastden.inference.tiling import automatic_tile
from fastden.network.fused import FusedDenoiser
from fastden.whole_files import digest, sync, whole_file


class Stages:
    """The stages of a run. Each may run in a thread of its own; :meth:`stream` belongs to the thread that computes.

    Args:
        settings: of the run.

    Attributes:
        reading, computing, writing: the stages.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.reading = Reading(settings)
        self.computing = Computing(settings)
        self.writing = Writing(settings)

    def read(
        self,
        job: Job,
        gate: Gate,
        *,
        replaces: bool = False,
        admitted: Callable[[Picture], None] = lambda picture: None,
    ) -> Picture:
        """Open an image, wait until it fits in memory, and read it. Where that fails, its memory is given back.

        Args:
            job: the folder of its output must exist.
            gate: of the run.
            replaces: the output may be replaced, whatever ``overwrite`` says.
            admitted: called when the image has its memory, before it is read.

        Returns:
            The image; its ``size`` is the memory that it claimed.
        """
        picture = self.reading.open(job, replaces=replaces)
        picture.size = gate.admit(picture.size, whole=picture.streamed)
        try:
            admitted(picture)
            self.reading.read(picture)
        except BaseException as error:
            drop_locals(error)
            picture.drop_pixels()
            gate.give_back(picture.size)
            raise
        return picture

    def stream(self, picture: Picture, manifest: Manifest | None = None, progress: Progress | None = None) -> Record:
        """Read, denoise and write an image strip by strip; record it as :meth:`Writing.write` does."""
        start = time.perf_counter()
        reader = StripReader(picture.job.source, max_pixels=self.settings.max_pixels)
        header = reader.header
        self.check_streamable(picture, header)
        with whole_file(picture.job.target, overwrite=picture.overwrites) as temporary:
            self._copy_by_strips(picture, reader, temporary, progress)
            self.reading.check_unchanged(picture)
            sync(temporary)
            picture.seconds["write"] = time.perf_counter() - start - picture.seconds["compute"]
            output: dict[str, Any] = {"output_size": temporary.stat().st_size, "output_sha256": digest(temporary)}
            record = self.writing.begin(picture, manifest, width=header.width, height=header.height, **output)
        return self.writing.finish(record, manifest)

    def check_streamable(self, picture: Picture, header: Header) -> None:
        """Raise a UserError or ValueError where the output cannot be made without the whole image in memory."""
        if picture.format_name == "heic":
            raise UserError("is larger than --max-memory, and heic is not written by strips; accepted: avif, tiff, ...")
        turned = int(header.metadata.get("orientation", 1)) > 1
        if self.settings.strip_metadata and turned:
            raise UserError("is larger than --max-memory and cannot be turned upright; accepted: its metadata kept")
        # Raises where memory holds no strips of this width.
        _StripTiles(self.settings, self.computing, header, self.settings.network(header.dtype == np.uint8)).side()

    def _copy_by_strips(self, picture: Picture, reader: StripReader, target: Path, progress: Progress | None) -> None:
        """Denoise what ``reader`` reads into the file ``target``; note the seconds of computing."""
        settings, header = self.settings, reader.header
        network = settings.network(header.dtype == np.uint8, picture.all_white)
        extras, metadata = reader.extras()
        dtype, metadata, notes = plan_encoding(
            header.channels, header.dtype, header.bits, metadata, picture.format_name
        )
        picture.notes += [*header.notes, *notes, *_whole_image_notes(header, picture.format_name)]
        writer = StripWriter(
            target,
            (header.height, header.width, header.bands),
            dtype,
            picture.format_name,
            bits=header.bits,
            lossless=header.lossless,
            metadata=metadata,
            strip_metadata=settings.strip_metadata,
            extras=extras,
        )
        picture.notes += [writer.note] if writer.note else []
        tiles = _StripTiles(settings, self.computing, header, network)

        def write(rows: Array) -> None:
            with _errors_of(picture.job.target):
                writer.write(rows)

        try:
            picture.seconds["compute"] = denoise_strips(
                network,
                reader,
                write,
                self._strip_level(picture),
                side=tiles.side,
                dtype=dtype,
                wishes=settings.wishes,
                attempt=tiles.attempt,
                progress=progress,
                values=picture.values[0],
            )
            with _errors_of(picture.job.target):
                writer.close()
        except BaseException:
            writer.abort()
            raise

    def _strip_level(self, picture: Picture) -> float | Tensor | StripReader | None:
        """The noise level as :func:`denoise_strips` takes it."""
        if self.settings.sigma_map is not None:
            return StripReader(self.settings.sigma_map, max_pixels=self.settings.max_pixels)
        return picture.level


@contextmanager
def _errors_of(target: Path) -> Iterator[None]:
    """Errors of an encoder name the output: those of a picture that is streamed are taken for its input's otherwise."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{target}: {error}") from error


def _whole_image_notes(header: Header, target: str) -> list[str]:
    """Notes on coders that hold the whole image in memory, whatever the size of strips."""
    coders = [
        f"{coder} of {name}" for name, coder in ((header.format, "decoder"), (target, "encoder")) if name in DECODER
    ]
    if header.interlaced:
        passes = "a progressive" if header.format == "jpeg" else "an interlaced"
        coders.append(f"decoder of {passes} {header.format}")
    return [f"the {coder} holds the whole image in memory" for coder in coders]


class _StripTiles:
    """Tiles of a streamed image: as large as memory, the user and earlier failures allow.

    Args:
        settings: of the run.
        computing: the stage; it knows to which side tiles were halved.
        header: of the image.
        network: the network for it.
    """

    def __init__(self, settings: Settings, computing: Computing, header: Header, network: FusedDenoiser) -> None:
        self.settings, self.computing, self.header, self.network = settings, computing, header, network

    def side(self) -> int:
        """The side of the tiles now, pixels."""
        settings, header = self.settings, self.header
        if isinstance(settings.tile, int):
            largest = settings.tile
        else:
            largest = automatic_tile(self.network, header.height, header.width, 1, settings.budget.network)[0]
        with_map = settings.sigma_map is not None
        limit = side_for_strips(largest, header, settings.budget.images, with_map=with_map)
        smaller = self.computing.smaller
        return limit if smaller is None else min(limit, smaller)

    def attempt(self, run: Callable[[int], Tensor]) -> Tensor:
        """Call ``run`` with a side; where the device runs out of memory, call it again with a smaller one."""
        side = self.side()
        result: Tensor = self.computing.attempt(self.network, (1, side, side), partial(self._once, run, side))
        return result

    @staticmethod
    def _once(run: Callable[[int], Tensor], side: int, tile: Any, _memory: int | None) -> Tensor:
        return run(min(side, tile) if isinstance(tile, int) else side)
