"""The first stage of a batch: it looks at an image file, and decodes it."""

from __future__ import annotations

import os
import stat
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from fastden.batch.picture import Picture, stamp
from fastden.batch.plan import Job, format_of_result
from fastden.batch.settings import Settings
from fastden.errors import UserError, shown_bytes
from fastden.images.attachments import check_colour
from fastden.images.codec import read_image
from fastden.images.decoding import decoding_memory
from fastden.images.encoding import check_alpha, check_pages, check_sides, encoding_memory, plan_encoding
from fastden.images.image_file import Header
from fastden.images.pixels import Array
from fastden.images.ranges import ValueRange
from fastden.images.samples import sigma_of_gray
from fastden.images.strips import CHUNK, StripReader, read_header, read_samples
from fastden.inference.estimate import estimate_of, noise_of_samples
from fastden.inference.run import Level, adapted, estimated_level, noise_level_of, to_batch
from fastden.whole_files import check_readable, check_target, reason


class Reading:
    """The stage that reads; in several threads at once.

    Args:
        settings: of the run.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self._lock = threading.Lock()
        self._map: Array | None = None
        self._mean: float | None = None

    def open(self, job: Job, *, replaces: bool = False) -> Picture:
        """Find errors before anything is computed, and the memory that the image takes.

        Args:
            job: the folder of its output must exist.
            replaces: the output may be replaced, whatever ``overwrite`` says.
        """
        overwrites = self.settings.overwrite or replaces
        check_target(job.target, overwrites)
        picture = self.look(job)
        picture.overwrites = overwrites
        return picture

    def look(self, job: Job) -> Picture:
        """The part of :meth:`open` that looks at the input alone.

        Raises:
            UserError: an input that cannot be read, or whose result cannot be written; a map of another size.
            ValueError: a colour image for a gray model.
        """
        try:
            status = os.stat(job.source)
        except OSError as error:
            raise UserError(f"{job.source}: cannot be read: {reason(error)}") from error
        header = None
        if stat.S_ISREG(status.st_mode):
            # Decoding finds the file's fault.
            with suppress(UserError):
                header = read_header(job.source, max_pixels=self.settings.max_pixels, several=True)
        else:
            try:
                check_readable(job.source)
            except UserError as error:
                raise UserError(f"{job.source}: {error}") from error
        format_name = format_of_result(job, self.settings.max_pixels)
        size = 2 * status.st_size
        if header is not None:
            check_alpha(header.has_alpha, format_name)
            check_pages(header.pages, format_name)
            check_sides(header.width, header.height, format_name)
            # Raises for a colour image and a gray model. All networks of a run have one form.
            adapted(self.settings.network(eight_bit=True), header.channels, self.settings.wishes)
            self._check_map(header.height, header.width)
            # Bytes of the decoded and of the denoised image; alpha is cut off the former, and joined to the latter.
            size += (4 if header.has_alpha else 2) * header.nbytes
            if self.settings.transfer is not None:
                size += 2 * header.nbytes
            if self.settings.sigma_map is not None:
                size += 12 * header.width * header.height
        # An image that fits but for its codecs goes through whole, alone if need be: most take no less for strips.
        streamed = header is not None and size > self.settings.budget.images
        if streamed and header is not None and header.pages > 1:
            raise UserError(
                f"{job.source}: {header.pages} pages take {shown_bytes(size)}; accepted: less than half of --max-memory"
            )
        if header is not None:
            decoding = 2 * status.st_size + decoding_memory(header)
            size = max(size, decoding, header.nbytes + self._for_encoding(header, format_name))
        return Picture(job, format_name, stamp(status), header, size, streamed)

    def _for_encoding(self, header: Header, format_name: str) -> int:
        """Bytes that writing takes beside the denoised image."""
        dtype, _, _ = plan_encoding(header.channels, header.dtype, header.bits, header.metadata, format_name)
        nbytes = header.nbytes // header.dtype.itemsize * dtype.itemsize
        copied = nbytes if header.has_alpha or dtype != header.dtype else 0
        return copied + encoding_memory(format_name, nbytes)

    def read(self, picture: Picture) -> None:
        """Decode an image and find its noise level; an image that is streamed is not decoded here."""
        start = time.perf_counter()
        job = picture.job
        if picture.streamed and picture.header is not None:
            network = self.settings.network(picture.header.dtype == np.uint8)
            sigma: Any = self.settings.sigma
            estimated = sigma == "auto" and self.settings.sigma_map is None and network.noise_level_input
            with picture.libvips():
                crops, values = read_samples(job.source, max_pixels=self.settings.max_pixels, for_noise=estimated)
            self._set_values(picture, (values,), picture.header.dtype)
            if estimated:
                sigma = noise_of_samples(crops, values, network.estimator)
            if self.settings.sigma_map is None and network.noise_level_input:
                self._set_level(picture, noise_level_of(sigma, network, [], (0, 0), [values]))
            if self.settings.sigma_map is not None:
                picture.sigma = self._mean_of_map(self.settings.sigma_map)
        else:
            with picture.libvips():
                image = read_image(job.source, max_pixels=self.settings.max_pixels, several=True)
            self.check_unchanged(picture)
            check_alpha(image.alpha is not None, picture.format_name)
            check_colour(image.extras, picture.format_name, has_profile="icc-profile-data" in image.metadata)
            pages = image.split()
            height, width = pages[0].shape[:2]
            check_sides(width, height, picture.format_name)
            if picture.header is None:  # else its size is known, and was compared
                self._check_map(height, width)
            sigma_map = self.settings.sigma_map
            asked = self.settings.sigma if sigma_map is None else self._loaded_map(sigma_map)
            network = self.settings.network(image.pixels.dtype == np.uint8)
            ranges = image.ranges
            if image.pages > 1 and isinstance(asked, str) and network.noise_level_input:
                pairs = zip(pages, ranges, strict=True)
                estimates = [estimate_of(page, values, network.estimator) for page, values in pairs]
                self._set_level(picture, estimated_level(estimates))
                picture.white = tuple(estimate.is_white for estimate in estimates)
            else:
                self._set_level(picture, noise_level_of(asked, network, list(pages), (height, width), ranges))
            self._set_values(picture, ranges, image.pixels.dtype)
            picture.image = image
            picture.notes += image.notes
            if self.settings.transfer is not None and image.pages == 1:
                picture.pinned = self.settings.transfer.pin(to_batch([image.pixels], network))
        picture.seconds["read"] = time.perf_counter() - start

    @staticmethod
    def _set_values(picture: Picture, ranges: tuple[ValueRange, ...], dtype: np.dtype[Any]) -> None:
        picture.values = ranges
        for number, values in enumerate(ranges, 1):
            if not values.ordinary:
                page = f"page {number}: " if len(ranges) > 1 else ""
                picture.notes.append(f"{page}{values.describe(dtype)}")
        low, high = min(values.low for values in ranges), max(values.high for values in ranges)
        if dtype.kind == "f" and picture.format_name != "tiff" and not 0 <= low <= high <= 1:
            held = f"{picture.format_name} holds 0 to 1 and cuts off the rest (tiff keeps it)"
            picture.notes.append(f"values go from {low:.3g} to {high:.3g}: {held}")

    def _set_level(self, picture: Picture, level: Level) -> None:
        picture.level, picture.sigma, found = level
        picture.noise = found if self.settings.sigma == "auto" else None  # else it was given
        picture.white = () if picture.noise is None else (picture.noise.is_white,)
        if picture.noise is not None and not picture.noise.decided:
            picture.notes.append(f"noise: {picture.noise.describe()}")

    def _check_map(self, height: int, width: int) -> None:
        """Compare the size of the map of noise levels with an image's."""
        path = self.settings.sigma_map
        if path is None:
            return
        header = read_header(path, max_pixels=self.settings.max_pixels)
        if header.bands != 1:
            raise UserError(f"sigma_map: {path} has {header.bands} channels; accepted: 1 (gray)")
        if (header.height, header.width) != (height, width):
            size = f"{header.width} x {header.height}"
            raise UserError(f"sigma_map: {path} is {size} pixels; accepted: {width} x {height}, the image's")

    def _loaded_map(self, path: Path) -> Array:
        """(H, W) on the scale 0-255."""
        with self._lock:
            if self._map is None:
                self._map = sigma_of_gray(read_image(path, max_pixels=self.settings.max_pixels).pixels[:, :, 0])
            return self._map

    def _mean_of_map(self, path: Path) -> float:
        """The mean on the scale 0-255 of a map that is not in memory, as :func:`noise_level_of` tells it."""
        with self._lock:
            if self._mean is None:
                reader = StripReader(path, max_pixels=self.settings.max_pixels)
                height, width = reader.header.height, reader.header.width
                total = 0.0
                while reader.position < height:
                    rows = reader.read(min(CHUNK, height - reader.position))
                    total += float(sigma_of_gray(rows).sum(dtype=np.float64))
                self._mean = total / (height * width)
            return self._mean

    def check_unchanged(self, picture: Picture) -> None:
        """Raise UserError where an input has changed since it was opened."""
        try:
            now = stamp(os.stat(picture.job.source))
        except OSError as error:
            raise UserError(f"{picture.job.source}: cannot be read: {reason(error)}") from error
        if now != picture.stamp and stat.S_ISREG(picture.stamp[3]):
            raise UserError(f"{picture.job.source}: changed while it was read")
