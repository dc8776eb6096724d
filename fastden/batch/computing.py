"""The second stage of a batch: the network, and smaller tiles where the device runs out of memory."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastden.batch.grouping import together
from fastden.batch.picture import Picture
from fastden.batch.settings import Settings
from fastden.batch.transfer import Pending, Transfer
from fastden.images.image_file import ImageFile
from fastden.images.pixels import Array
from fastden.images.ranges import ValueRange
from fastden.inference.run import Progress, denoise_batch, own_scale, part_of, run_network
from fastden.inference.tiling import SMALLEST, automatic_tile
from fastden.network.fused import FusedDenoiser
from fastden.network.padding import ALIGNMENT


class Computing:
    """The stage that computes; in one thread.

    Args:
        settings: of the run.

    Attributes:
        smaller: side of the tiles after they were halved, because the device ran out of memory; None before that.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.smaller: int | None = None

    def compute(self, pictures: list[Picture], progress: Progress | None = None) -> None:
        """Denoise images of one size and type together; a single image may have any size."""
        images = [picture.image for picture in pictures if picture.image is not None]
        start = time.perf_counter()
        if images[0].pages > 1:
            results = [self._denoised_pages(images[0], pictures[0], progress)]
        elif self.settings.transfer is not None and self._compute_on_device(self.settings.transfer, pictures, progress):
            return
        else:
            network = self._network(pictures[0])
            results = self._denoised(
                [image.pixels for image in images], levels(pictures), network, pictures[0].values[0], progress
            )
            if len(results) > 1:
                # They are views of one tensor, which would live until the last of them is written.
                results = [result.copy() for result in results]
        seconds = (time.perf_counter() - start) / len(pictures)
        for picture, image, result in zip(pictures, images, results, strict=True):
            picture.image = replace(image, pixels=result)
            picture.seconds["compute"] = seconds

    def _network(self, picture: Picture) -> FusedDenoiser:
        """The network for a picture that is decoded."""
        assert picture.image is not None
        return self.settings.network(picture.image.pixels.dtype == np.uint8, picture.all_white)

    def _denoised(
        self,
        pixels: list[Array],
        level: float | Tensor | None,
        network: FusedDenoiser,
        values: ValueRange,
        progress: Progress | None,
    ) -> list[Array]:
        shape = (len(pixels), *pixels[0].shape[:2])
        options: dict[str, Any] = {"wishes": self.settings.wishes, "progress": progress, "values": values}
        results: list[Array] = self.attempt(
            network,
            shape,
            lambda tile, memory: denoise_batch(pixels, level, network, tile=tile, max_memory=memory, **options),
        )
        return results

    def _denoised_pages(self, image: ImageFile, picture: Picture, progress: Progress | None) -> Array:
        """One page after another: each page is denoised as if it were a file of its own."""
        level, white = picture.level, picture.white or (False,) * image.pages
        result = np.empty_like(image.pixels)
        pages = zip(image.split(), np.split(result, image.pages), strict=True)
        for index, (page, target) in enumerate(pages):
            own: float | Tensor | None = level
            if isinstance(level, Tensor) and level.dim() == 2 and len(level) > 1:
                own = level[index : index + 1]

            part = part_of(progress, index, image.pages)
            network = self.settings.network(page.dtype == np.uint8, white[index])
            (target[:],) = self._denoised([page], own, network, picture.values[index], part)
        return result

    def _compute_on_device(self, transfer: Transfer, pictures: list[Picture], progress: Progress | None) -> bool:
        """Queue a pass over whole images on the device; False where they are too large for it."""
        pinned = [picture.pinned for picture in pictures if picture.pinned is not None]
        batch = pinned[0] if len(pinned) == 1 else transfer.pin(torch.cat(pinned))
        if not transfer.fits(batch, self.settings.budget.network):
            return False
        network, level = self._network(pictures[0]), levels(pictures)
        n, _, height, width = batch.shape

        def once(tile: Any, memory: int | None) -> Pending:
            options: dict[str, Any] = {"tile": tile, "max_memory": memory, "wishes": self.settings.wishes}
            options["values"] = pictures[0].values[0]
            return transfer.run(batch, lambda image: run_network(network, image, level, progress=progress, **options))

        pending = self.attempt(network, (n, height, width), once)
        for index, picture in enumerate(pictures):
            picture.pending, picture.pinned = (pending, index, n), None
        return True

    def group_limit(self, picture: Picture) -> int:
        """How many images like this one may go through the network together; 1 where it goes alone."""
        if not self._joins(picture):
            return 1
        assert picture.image is not None
        height, width = picture.image.pixels.shape[:2]
        return together(self._network(picture), height, width, self.settings.budget.network)

    def alike(self, one: Picture, another: Picture) -> bool:
        """Whether two images may go through the network together, which gives each what it gets alone."""
        if not (self._joins(one) and self._joins(another)) or one.white != another.white:
            return False
        assert one.image is not None
        assert another.image is not None
        a, b = one.image.pixels, another.image.pixels
        return a.shape == b.shape and a.dtype == b.dtype

    def _joins(self, picture: Picture) -> bool:
        """Whether an image may go through the network with others: one page whose values the network sees as they are.

        Alone, its own level says which of its values are no noise and are kept from the network.
        """
        if picture.image is None or picture.image.pages > 1 or _is_map(picture.level):
            return False
        return own_scale(picture.level, picture.values[0], self.settings.wishes)[1] is None

    def attempt(
        self, network: FusedDenoiser, shape: tuple[int, int, int], run: Callable[[Any, int | None], Any]
    ) -> Any:
        """Call ``run`` with tiles and memory; where the device runs out of memory, call it again with smaller tiles."""
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
            # The handler is left first: its exception keeps the tensors of the failed pass alive.
            if network.device.type == "cuda":
                torch.cuda.empty_cache()


def levels(pictures: list[Picture]) -> float | Tensor | None:
    """The noise levels of images that go together."""
    if len(pictures) == 1 or pictures[0].level is None:
        return pictures[0].level
    values = [picture.level for picture in pictures]
    if isinstance(values[0], Tensor):  # curves
        return torch.cat([value for value in values if isinstance(value, Tensor)])
    return torch.tensor(values, dtype=torch.float64, device="cpu")


def _is_map(level: float | Tensor | None) -> bool:
    return isinstance(level, Tensor) and level.dim() == 4
