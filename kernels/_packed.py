"""Weights in the order in which a kernel reads them: the order is cached, the weights never are.

Reordering with pads, flips and copies launches several small kernels. They take as long as the convolution of a small
image. The source of each position depends only on the shape of the weight. So it is computed once, and one gather then
makes the reordered weight from the current values. A cached weight could become stale: no version counter sees writes
through ``weight.data``, by collective operations, from other processes or in a replayed CUDA graph.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from threading import Lock
from typing import Any, NamedTuple

import torch
from torch import Tensor

#: Largest number of cached orders, apart from those that captured graphs read; a network has four for each shape of its
#: weights.
LARGEST = 64


class _Order(NamedTuple):
    """The source of each position in the memory of a reordered weight, and the layout of that memory."""

    index: Tensor
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int


class PackedWeights:
    """Reorders weights with functions that only move values and put zeros between them.

    Attributes:
        hits: number of calls that found their order in the cache.
    """

    def __init__(self) -> None:
        self.hits = 0
        self._lock = Lock()
        self._kept: dict[tuple[Any, ...], _Order] = {}
        # Orders that captured CUDA graphs read: a graph does not hold the tensors whose addresses it has.
        self._captured: dict[tuple[Any, ...], _Order] = {}

    def __len__(self) -> int:
        return len(self._kept)

    def get(self, pack: Callable[..., Tensor], weight: Tensor, *options: Any) -> Tensor:
        """``pack(weight, *options)``, made from the current values of ``weight``."""
        if not indexable(weight):
            return pack(weight, *options)
        key = (pack, options, weight.shape, weight.device)
        capturing = weight.is_cuda and torch.cuda.is_current_stream_capturing()
        order = self._kept.get(key)
        if order is None:
            if capturing:
                return pack(weight, *options)  # a graph cannot capture the copy of an order
            # In a thread of its own, which has no mode, no default device and no memory pool of the caller. In the
            # first call of a network, the compiler's CUDA graphs own what the calling thread allocates, and refuse
            # what stays.
            with ThreadPoolExecutor(1) as thread:
                order = thread.submit(_order, pack, weight.shape, weight.device, options).result()
            with self._lock:
                if len(self._kept) >= LARGEST:
                    self._kept = dict(self._captured)
                self._kept[key] = order
        else:
            self.hits += 1
            if capturing:
                with self._lock:
                    order = self._captured.setdefault(key, order)
        # A zero after the weight, for the positions that take none of its values.
        values = torch.cat([weight.reshape(-1), weight.new_zeros(1)])
        packed = values.index_select(0, order.index).as_strided(*order[1:])
        if order.index.is_cuda and not capturing:
            # The cache may drop the order while this stream still reads it.
            order.index.record_stream(torch.cuda.current_stream(weight.device))
        return packed


def _order(pack: Callable[..., Tensor], shape: torch.Size, device: torch.device, options: tuple[Any, ...]) -> _Order:
    """The order that ``pack`` makes, read from a weight whose values are their own positions, counted from 1."""
    count = shape.numel()
    positions = pack(torch.arange(1, count + 1, device="cpu").view(shape), *options)
    memory = positions.as_strided((positions.untyped_storage().nbytes() // positions.itemsize,), (1,), 0)
    memory = torch.where(memory == 0, count, memory - 1)
    # The order is made on the CPU and copied synchronously, so that every stream of the device can read it.
    return _Order(
        memory.to(torch.int32).to(device), tuple(positions.shape), positions.stride(), positions.storage_offset()
    )


def indexable(weight: Tensor) -> bool:
    """Whether a gather may replace the function: only on plain tensors that are not traced."""
    return (
        type(weight) in (Tensor, torch.nn.Parameter)
        and weight.numel() < 2**31 - 1
        and not (torch.compiler.is_compiling() or torch.jit.is_tracing())
    )


#: The weights of all kernels.
PACKED = PackedWeights()
