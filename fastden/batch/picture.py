"""An image of a batch on its way from file to file: what each stage adds to it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from torch import Tensor

from fastden.batch.plan import Job
from fastden.batch.transfer import Pending
from fastden.images.image_file import Header, ImageFile
from fastden.images.ranges import ORDINARY, ValueRange
from fastden.inference.estimate import NoiseEstimate


@dataclass
class Picture:
    """An image on its way.

    Attributes:
        job: what to read and to write.
        format_name: of the output.
        stamp: size, time and number of the input when it was opened; see :func:`stamp`.
        header: None where it cannot be read; decoding the file then tells why.
        size: bytes in the host's memory.
        streamed: whether it is read, denoised and written strip by strip.
        overwrites: whether its output may replace a file.
        image: its pixels, then the denoised ones.
        level, sigma: the network's noise level, curves (N, 8) if estimated for several pages; and its mean on the scale
            0-255.
        noise: the estimate, for a single page.
        white: for each page, whether it has white noise, so that another network may take it; empty where nothing is
            estimated.
        values: what the values of each page span.
        seconds: spent in each stage.
        notes: for the user.
        pinned: the image as a batch of one in pinned memory, on the way to a CUDA device.
        pending: the pass on a CUDA device that denoises it, its index in the pass, and how many images the pass has.
        in_libvips: whether libvips is decoding or encoding it: that cannot be interrupted.
    """

    job: Job
    format_name: str
    stamp: tuple[int, ...]
    header: Header | None
    size: int
    streamed: bool
    overwrites: bool = False
    image: ImageFile | None = None
    level: float | Tensor | None = None
    sigma: float | None = None
    noise: NoiseEstimate | None = None
    white: tuple[bool, ...] = ()
    values: tuple[ValueRange, ...] = (ORDINARY,)
    seconds: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    pinned: Tensor | None = None
    pending: tuple[Pending, int, int] | None = None
    in_libvips: bool = False

    @property
    def all_white(self) -> bool:
        """Whether all pages have white noise."""
        return bool(self.white) and all(self.white)

    def drop_pixels(self) -> None:
        """Let go of all that is large, before its claim is given back: threads and queues may know it for longer."""
        self.image = self.pinned = self.pending = self.level = None

    @contextmanager
    def libvips(self) -> Iterator[None]:
        """A context around decoding and encoding."""
        self.in_libvips = True
        try:
            yield
        finally:
            self.in_libvips = False


def stamp(status: os.stat_result) -> tuple[int, ...]:
    """Properties that differ if a file was changed: size, time, number; and its kind."""
    return status.st_size, status.st_mtime_ns, status.st_ino, status.st_mode
