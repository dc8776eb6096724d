"""Noisy crops that are learned from more than once: making a camera's noise takes longer than a GPU's step."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader


class Past:
    """The last crops, on the device of the training.

    Floating-point numbers are kept in half precision. In [0, 1] that errs by at most an eighth of a step of 8 bits.

    Args:
        capacity: crops.
        device: of the training.
    """

    def __init__(self, capacity: int, device: torch.device) -> None:
        self.capacity, self.device = capacity, device
        self.count = 0
        self._next = 0
        self._kept: dict[str, Tensor] = {}

    def put(self, batch: dict[str, Tensor]) -> None:
        """Keep tensors (N, ...) by name, in the place of the oldest."""
        size = len(next(iter(batch.values())))
        if size > self.capacity:
            raise ValueError(f"batch: {size} crops; accepted: up to {self.capacity}, the capacity")
        places = (torch.arange(size, device=self.device) + self._next) % self.capacity
        for name, values in batch.items():
            moved = values.to(self.device, non_blocking=True)
            moved = moved.half() if moved.is_floating_point() else moved
            if name not in self._kept:
                self._kept[name] = moved.new_zeros(self.capacity, *moved.shape[1:])
            self._kept[name].index_copy_(0, places, moved)
        self._next = (self._next + size) % self.capacity
        self.count = min(self.count + size, self.capacity)

    def draw(self, size: int, random: np.random.Generator) -> dict[str, Tensor]:
        """As many crops as ``size``, with repetitions, all turned and mirrored alike; images in single precision."""
        chosen = torch.from_numpy(random.integers(self.count, size=size)).to(self.device)
        turns, mirror = int(random.integers(4)), bool(random.random() < 0.5)
        drawn = {}
        for name, kept in self._kept.items():
            values = kept[chosen]
            if values.dim() == 4:
                values = torch.rot90(values.flip(3) if mirror else values, turns, (2, 3))
            drawn[name] = values.float() if values.is_floating_point() else values
        return drawn


class Replay:
    """An epoch of batches: ``times`` draws from the past behind each new batch.

    A run that is resumed begins with an empty past.

    Args:
        fresh: new batches.
        times: draws for each of them.
        past: what is drawn from; it outlives the epoch.
        key: seed of the draws.
    """

    def __init__(self, fresh: DataLoader[Any], times: int, past: Past, key: tuple[int, ...]) -> None:
        self.fresh, self.times, self.past, self.key = fresh, times, past, key

    def __len__(self) -> int:
        return len(self.fresh) * self.times

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        random = np.random.default_rng(self.key)
        for batch in self.fresh:
            self.past.put(batch)
            size = len(next(iter(batch.values())))
            for _ in range(self.times):
                yield self.past.draw(size, random)
