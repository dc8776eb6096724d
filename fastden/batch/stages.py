"""What is done to each image of a batch: the stages one after another, or strip by strip all of them at once."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
from torch import Tensor

from fastden.batch.computing import Computing
from fastden.batch.manifest import Manifest, Record
from fastden.batch.reading import Reading
from fastden.batch.settings import Settings
from fastden.batch.streaming import denoise_strips, side_for_strips
from fastden.batch.work import Progress, Work
from fastden.batch.writing import Writing
from fastden.errors import UserError
from fastden.images.encoding import plan_encoding
from fastden.images.strips import StripReader, StripWriter
from fastden.images.whole_files import digest, sync, whole_file
from fastden.inference.tiling import automatic_tile


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

    def stream(self, work: Work, manifest: Manifest | None = None, progress: Progress | None = None) -> Record:
        """Read, denoise and write an image strip by strip; on record as by :meth:`Writing.write`."""
        job, settings = work.job, self.settings
        start = time.perf_counter()
        reader = StripReader(job.source, max_pixels=settings.max_pixels)
        header = reader.header
        network = settings.network(header.dtype == np.uint8)
        turned = int(header.metadata.get("orientation", 1)) > 1
        if settings.strip and turned:
            raise UserError("is larger than --max-memory and cannot be turned upright; accepted: its metadata kept")
        shape = (header.channels, header.dtype, header.bits)
        dtype, metadata, notes = plan_encoding(*shape, header.metadata, work.format_name, strip=settings.strip)
        for name, coder in ((header.format, "decoder"), (work.format_name, "encoder")):
            if name in ("webp", "avif"):
                notes.append(f"the {coder} of {name} holds the whole image in memory")
        work.notes += [*header.notes, *notes]
        level: float | Tensor | StripReader | None = None
        if settings.sigma_map is not None:
            level = StripReader(settings.sigma_map, max_pixels=settings.max_pixels)
        elif work.level is not None:
            level = work.level

        def side() -> int:
            largest = automatic_tile(network, header.height, header.width, 1, settings.budget.network)[0]
            if isinstance(settings.tile, int):
                largest = settings.tile
            with_map = settings.sigma_map is not None
            limit = side_for_strips(largest, header, settings.budget.images, with_map=with_map)
            return limit if self.computing.smaller is None else min(limit, self.computing.smaller)

        def attempt(run: Callable[[int], Tensor]) -> Tensor:
            limit = side()

            def once(tile: Any, _memory: int | None) -> Tensor:
                return run(min(limit, tile) if isinstance(tile, int) else limit)

            return self.computing.attempt(network, (1, limit, limit), once)

        with whole_file(job.target) as temporary:
            writer = StripWriter(
                temporary,
                (header.height, header.width, header.bands),
                dtype,
                work.format_name,
                bits=header.bits,
                lossless=header.lossless,
                metadata=metadata,
                strip=settings.strip,
            )
            try:
                work.seconds["compute"] = denoise_strips(
                    network,
                    reader,
                    writer.write,
                    level,
                    side=side,
                    dtype=dtype,
                    wishes=settings.wishes,
                    attempt=attempt,
                    progress=progress,
                )
                writer.close()
            except BaseException:
                writer.abort()
                raise
            self.reading.check_unchanged(work)
            sync(temporary)
            work.seconds["write"] = time.perf_counter() - start - work.seconds["compute"]
            output: dict[str, Any] = {"output_size": temporary.stat().st_size, "output_sha256": digest(temporary)}
            record = self.writing.record(work, manifest, "writing", width=header.width, height=header.height, **output)
            if manifest is not None:
                manifest.add(record)
        return self.writing.finish(record, manifest)
