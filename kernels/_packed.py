"""Weights in the order in which a kernel reads them: the order is kept, never the weights.

Reordering by pads, flips and copies takes several small kernels, as long as a small image's convolution. Where each
position takes its value from depends on the weight's shape alone, so it is found once, and one gather makes a reordered
weight of the present values. A reordered weight that is kept could become stale: writes through ``weight.data``, by
collective operations, from other processes or in a replayed CUDA graph are counted nowhere.
"""

from __future__ import annotations

from collections.abc import Callable
from threading import Lock
from typing import Any, NamedTuple

import torch
from torch import Tensor

#: Orders kept; a network has four for each of its weights' shapes.
LARGEST = 64


class _Order(NamedTuple):
    """Where each position of a reordered weight's memory takes its value from, and how that memory is looked at."""

    index: Tensor
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int


class PackedWeights:
    """Reorders weights by functions that move values and put zeros between them, and do nothing else.

    Attributes:
        hits: calls that found their order.
    """

    def __init__(self) -> None:
        self.hits = 0
        self._lock = Lock()
        self._kept: dict[tuple[Any, ...], _Order] = {}

    def __len__(self) -> int:
        return len(self._kept)

    def get(self, pack: Callable[..., Tensor], weight: Tensor, *options: Any) -> Tensor:
        """``pack(weight, *options)``, made of the present values of ``weight``."""
        if not indexable(weight):
            return pack(weight, *options)
        key = (pack, options, weight.shape, weight.device)
        order = self._kept.get(key)
        if order is None:
            if weight.is_cuda and torch.cuda.is_current_stream_capturing():
                return pack(weight, *options)  # an order's copy to the device cannot be captured
            order = _order(pack, weight, options)
            with self._lock:
                if len(self._kept) >= LARGEST:
                    self._kept = {}
                self._kept[key] = order
        else:
            self.hits += 1
        # A zero behind the weight, for the positions that take none of its values.
        values = torch.cat([weight.reshape(-1), weight.new_zeros(1)])
        return values.index_select(0, order.index).as_strided(*order[1:])


def _order(pack: Callable[..., Tensor], weight: Tensor, options: tuple[Any, ...]) -> _Order:
    """The order that ``pack`` makes, seen on a weight whose values are their own positions, counted from 1."""
    count = weight.numel()
    positions = pack(torch.arange(1, count + 1).view(weight.shape), *options)
    memory = positions.as_strided((positions.untyped_storage().nbytes() // positions.itemsize,), (1,), 0)
    memory = torch.where(memory == 0, count, memory - 1)
    # Made on the CPU and copied at once, so that every stream of the device may read it.
    return _Order(
        memory.to(torch.int32).to(weight.device), tuple(positions.shape), positions.stride(), positions.storage_offset()
    )


def indexable(weight: Tensor) -> bool:
    """Whether a gather may stand for the function: on plain tensors that nobody traces."""
    return (
        type(weight) in (Tensor, torch.nn.Parameter)
        and weight.numel() < 2**31 - 1
        and not (torch.compiler.is_compiling() or torch.jit.is_tracing())
    )


#: Of all kernels.
PACKED = PackedWeights()
