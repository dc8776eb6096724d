"""The second stage of a batch: the network, and what to do where the device's memory does not suffice."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastden.batch.grouping import together
from fastden.batch.settings import Settings
from fastden.batch.transfer import Lane, Pending
from fastden.batch.work import Progress, Work
from fastden.images.codec import ImageFile
from fastden.images.pixels import Array
from fastden.inference.run import denoise_batch, run_network
from fastden.inference.tiling import SMALLEST, automatic_tile
from fastden.network.fused import FusedDenoiser
from fastden.network.padding import ALIGNMENT


class Computing:
    """The stage that computes; in one thread.

    Args:
        settings: of the run.

    Attributes:
        smaller: side to which tiles were halved because memory did not suffice; None as long as it does.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.smaller: int | None = None

    def compute(self, works: list[Work], progress: Progress | None = None) -> None:
        """Denoise images of one size and type together; one of them may be of any size."""
        images = [work.image for work in works if work.image is not None]
        start = time.perf_counter()
        if images[0].pages > 1:
            results = [self._denoised_pages(images[0], works[0].level, progress)]
        elif self.settings.lane is not None and self._compute_on_device(self.settings.lane, works, progress):
            return
        else:
            results = self._denoised([image.pixels for image in images], levels(works), progress)
        seconds = (time.perf_counter() - start) / len(works)
        for work, image, result in zip(works, images, results, strict=True):
            work.image = replace(image, pixels=result)
            work.seconds["compute"] = seconds

    def _denoised(self, pixels: list[Array], level: float | Tensor | None, progress: Progress | None) -> list[Array]:
        network = self.settings.network(pixels[0].dtype == np.uint8)
        shape = (len(pixels), *pixels[0].shape[:2])
        options: dict[str, Any] = {"wishes": self.settings.wishes, "progress": progress}
        results: list[Array] = self.attempt(
            network,
            shape,
            lambda tile, memory: denoise_batch(pixels, level, network, tile=tile, max_memory=memory, **options),
        )
        return results

    def _denoised_pages(self, image: ImageFile, level: float | Tensor | None, progress: Progress | None) -> Array:
        """One page after another: each gets what it gets as a file of its own."""
        result = np.empty_like(image.pixels)
        pages = zip(image.split(), np.split(result, image.pages), strict=True)
        for index, (page, target) in enumerate(pages):
            own: float | Tensor | None = level
            if isinstance(level, Tensor) and level.dim() == 2 and len(level) > 1:
                own = level[index : index + 1]

            def part(done: int, total: int, index: int = index) -> None:
                if progress is not None:
                    progress(index * total + done, image.pages * total)

            (target[:],) = self._denoised([page], own, part)
        return result

    def _compute_on_device(self, lane: Lane, works: list[Work], progress: Progress | None) -> bool:
        """Queue a pass over whole images on the device; False where they are too large for it."""
        pinned = [work.pinned for work in works if work.pinned is not None]
        batch = pinned[0] if len(pinned) == 1 else lane.pin(torch.cat(pinned))
        if not lane.fits(batch, self.settings.budget.network):
            return False
        assert works[0].image is not None
        network, level = self.settings.network(works[0].image.pixels.dtype == np.uint8), levels(works)
        n, _, height, width = batch.shape

        def once(tile: Any, memory: int | None) -> Pending:
            options: dict[str, Any] = {"tile": tile, "max_memory": memory, "wishes": self.settings.wishes}
            return lane.run(batch, lambda image: run_network(network, image, level, progress=progress, **options))

        pending = self.attempt(network, (n, height, width), once)
        for index, work in enumerate(works):
            work.pending, work.pinned = (pending, index, n), None
        return True

    def group_limit(self, work: Work) -> int:
        """How many images like this one may go through the network together; 1 for alone."""
        if work.image is None or work.image.pages > 1 or _is_map(work.level):
            return 1
        height, width = work.image.pixels.shape[:2]
        network = self.settings.network(work.image.pixels.dtype == np.uint8)
        return together(network, height, width, self.settings.budget.network)

    def attempt(
        self, network: FusedDenoiser, shape: tuple[int, int, int], run: Callable[[Any, int | None], Any]
    ) -> Any:
        """Call ``run`` with tiles and memory; as long as the device's memory does not suffice, with smaller tiles."""
        n, height, width = shape
        limit = self.settings.budget.network
        while True:
            tile, memory = self.settings.tile, limit if self.settings.tile == "auto" else None
            if self.smaller is not None:
                tile, memory = self.smaller, None
            try:
                return run(tile, memory)
            except torch.OutOfMemoryError:
                side = max(height, width) if tile is None else tile
                if side == "auto":
                    side = automatic_tile(network, height, width, n, limit)[0]
                side = min(int(side), max(height, width)) // 2 // ALIGNMENT * ALIGNMENT
                if side < SMALLEST:
                    raise
                if self.smaller is None:
                    self.settings.say(f"out of memory on {network.device}: going on in tiles of {side} pixels or less")
                self.smaller = side
            # Outside the handler, whose exception keeps the tensors of the failed pass alive.
            if network.device.type == "cuda":
                torch.cuda.empty_cache()


def alike(one: Work, another: Work) -> bool:
    """Whether two images may go through the network together."""
    if one.image is None or another.image is None or another.image.pages > 1 or _is_map(another.level):
        return False
    a, b = one.image.pixels, another.image.pixels
    return a.shape == b.shape and a.dtype == b.dtype


def levels(works: list[Work]) -> float | Tensor | None:
    """The noise levels of images that go together."""
    if len(works) == 1 or works[0].level is None:
        return works[0].level
    values = [work.level for work in works]
    if isinstance(values[0], Tensor):  # curves
        return torch.cat([value for value in values if isinstance(value, Tensor)])
    return torch.tensor(values, dtype=torch.float64)


def _is_map(level: float | Tensor | None) -> bool:
    return isinstance(level, Tensor) and level.dim() == 4
