"""The last stage of a batch: encoding, and the record of each image."""

from __future__ import annotations

import os
import time
from contextlib import suppress
from dataclasses import replace
from datetime import datetime, timezone
from hashlib import sha256
from typing import Any

from fastden.batch.manifest import Manifest, Record
from fastden.batch.picture import Picture
from fastden.batch.plan import Job
from fastden.batch.settings import Settings
from fastden.errors import UserError, drop_locals, in_one_line
from fastden.images.codec import encode_image
from fastden.whole_files import check_target, whole_file, write_synced


class Writing:
    """The stage that writes; in several threads at once.

    Args:
        settings: of the run.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings

    def write(self, picture: Picture, manifest: Manifest | None = None) -> Record:
        """Encode an image and write it; record it before it gets its name, and after."""
        start = time.perf_counter()
        assert picture.image is not None
        job = picture.job
        if picture.pending is not None:
            pending, index, count = picture.pending
            dtype = picture.image.pixels.dtype
            picture.image = replace(picture.image, pixels=pending.image(index).astype(dtype, copy=False))
            picture.seconds["compute"] = pending.seconds() / count
            picture.pending = None
        try:
            with picture.libvips():
                data, notes = encode_image(
                    picture.image, picture.format_name, strip_metadata=self.settings.strip_metadata
                )
        except UserError as error:
            raise UserError(f"{job.target}: {error}") from error
        picture.notes += notes
        height, width, pages = picture.image.pixels.shape[0], picture.image.pixels.shape[1], picture.image.pages
        with whole_file(job.target, overwrite=picture.overwrites) as temporary:
            write_synced(temporary, data)
            picture.seconds["write"] = time.perf_counter() - start
            output: dict[str, Any] = {"output_size": len(data), "output_sha256": sha256(data).hexdigest()}
            size = {"width": width, "height": height // pages, "pages": pages}
            record = self.begin(picture, manifest, **size, **output)
        return self.finish(record, manifest)

    def begin(self, picture: Picture, manifest: Manifest | None, **values: Any) -> Record:
        """Record that an output is whole and about to get its name: ``values`` are fields of the record."""
        record = self._record(picture, manifest, **values)
        # Another process may have made the file since the image was opened: the record must not claim that file.
        check_target(picture.job.target, picture.overwrites)
        if manifest is not None:
            manifest.add(record)
        return record

    def finish(self, record: Record, manifest: Manifest | None) -> Record:
        """Record that an output has its name."""
        record = replace(record, status="done", time=_now())
        if manifest is not None:
            manifest.add(record)
        return record

    def failure(self, job: Job, error: BaseException, manifest: Manifest | None = None) -> Record:
        """The record of an image that failed; the error lets go of the pixels that it holds."""
        drop_locals(error)
        record = Record(
            input=os.path.abspath(job.source),
            output=str(job.target) if manifest is None else manifest.name_of(job.target),
            status="failed",
            time=_now(),
            model=self.settings.weights(),
            options={},
            error=in_one_line(error),
        )
        if manifest is not None:
            # The disk may be full; the user still hears of the failure.
            with suppress(UserError):
                manifest.add(record)
        return record

    def _record(self, picture: Picture, manifest: Manifest | None, **values: Any) -> Record:
        job = picture.job
        source = "blind" if picture.sigma is None else "estimated" if self.settings.sigma == "auto" else "given"
        return Record(
            input=os.path.abspath(job.source),
            output=str(job.target) if manifest is None else manifest.name_of(job.target),
            status="writing",
            time=_now(),
            model=self.settings.weights(picture.all_white),
            options=self.settings.options(job),
            sigma=picture.sigma,
            sigma_source="map" if self.settings.sigma_map is not None else source,
            noise=None if picture.noise is None else picture.noise.as_record(),
            values=None
            if all(values.ordinary for values in picture.values)
            else [values.as_record() for values in picture.values],
            seconds={name: round(seconds, 4) for name, seconds in picture.seconds.items()},
            input_size=picture.stamp[0],
            input_mtime_ns=picture.stamp[1],
            streamed=picture.streamed,
            notes=tuple(picture.notes),
            **values,
        )


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="milliseconds")
