"""Noisy crops that are learned from more than once: making a camera's noise takes longer than a GPU's step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from fastden.training.data import sent


class Past:
    """The last crops, on the device of the training.

    Images are kept in half precision. In [0, 1] that errs by at most an eighth of a step of 8 bits.

    Args:
        capacity: crops.
        device: of the training.
        judge: makes more tensors (N, ...) of a batch, none of which depends on how the crops are turned, to be kept
            with it; None for none.
        before: crops that were put before the first, and whose places it follows.
    """

    def __init__(
        self,
        capacity: int,
        device: torch.device,
        judge: Callable[[dict[str, Tensor]], dict[str, Tensor]] | None = None,
        before: int = 0,
    ) -> None:
        self.capacity, self.device, self.judge = capacity, device, judge
        self.count = 0
        self._next = before % capacity
        self._kept: dict[str, Tensor] = {}

    def put(self, batch: dict[str, Tensor]) -> None:
        """Keep tensors (N, ...) by name, in the place of the oldest."""
        size = len(next(iter(batch.values())))
        if size > self.capacity:
            raise ValueError(f"batch: {size} crops; accepted: up to {self.capacity}, the capacity")
        places = (torch.arange(size, device=self.device) + self._next) % self.capacity
        moved = {name: values.to(self.device) for name, values in batch.items()}
        for name, values in (moved | (self.judge(moved) if self.judge else {})).items():
            kept = values.half() if _is_image(values) else values
            if name not in self._kept:
                self._kept[name] = kept.new_zeros(self.capacity, *kept.shape[1:])
            self._kept[name].index_copy_(0, places, kept)
        self._next = (self._next + size) % self.capacity
        self.count = min(self.count + size, self.capacity)

    def draw(self, size: int, random: np.random.Generator) -> dict[str, Tensor]:
        """As many crops as ``size``, with repetitions, all turned and mirrored alike; images in single precision."""
        chosen = sent(torch.from_numpy(random.integers(self.count, size=size)), self.device)
        turns, mirror = int(random.integers(4)), bool(random.random() < 0.5)
        drawn = {}
        for name, kept in self._kept.items():
            values = kept[chosen]
            if _is_image(values):
                values = torch.rot90(values.flip(3) if mirror else values, turns, (2, 3)).float()
            drawn[name] = values
        return drawn


def _is_image(values: Tensor) -> bool:
    return values.dim() == 4


class Replay:
    """An epoch of batches: ``times`` draws from the past behind each new batch.

    Args:
        fresh: new batches, of the whole epoch.
        times: draws for each of them.
        past: what is drawn from; it outlives the epoch.
        key: seed of the draws.
        done: draws of the epoch that an earlier part of the run learned from; they are made and left out.
    """

    def __init__(self, fresh: DataLoader[Any], times: int, past: Past, key: tuple[int, ...], done: int = 0) -> None:
        self.fresh, self.times, self.past, self.key, self.done = fresh, times, past, key, done

    def __len__(self) -> int:
        return len(self.fresh) * self.times

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        random = np.random.default_rng(self.key)
        left_out = self.done
        for batch in self.fresh:
            self.past.put(batch)
            size = len(next(iter(batch.values())))
            for _ in range(self.times):
                drawn = self.past.draw(size, random)
                if left_out:
                    left_out -= 1
                else:
                    yield drawn
