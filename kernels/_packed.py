"""Weights in the order in which a kernel reads them, made once for weights that do not change.

Reordering takes several small kernels, as long as a small image's convolution. At inference weights are constant.
"""

from __future__ import annotations

from collections.abc import Callable
from threading import Lock
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.weak import WeakTensorKeyDictionary


class _Entry(NamedTuple):
    """A reordered weight, and the state of the weight that it was made of."""

    state: tuple[Any, ...]
    # Weak, so that memory which the weight no longer has is freed; while it lives, no other storage has its id.
    storage: StorageWeakRef
    packed: Tensor


class PackedWeights:
    """Reordered weights, each kept for as long as the weight itself.

    A weight that was written to, or was given other memory (``weight.data = ...``), is reordered again. Not noticed, as
    PyTorch counts it nowhere, is a write through ``weight.data``, which weights averaged during training are fond of:
    hence what requires a gradient is never kept, even where no gradient is recorded.

    Attributes:
        hits: calls that found what they needed.
    """

    def __init__(self) -> None:
        self.hits = 0
        self._lock = Lock()
        self._kept = WeakTensorKeyDictionary()

    def __len__(self) -> int:
        return len(self._kept)

    def get(self, pack: Callable[..., Tensor], weight: Tensor, *options: Any) -> Tensor:
        """``pack(weight, *options)``, not to be written to."""
        if not keepable(weight):
            return pack(weight, *options)
        storage = weight.untyped_storage()
        state = (
            weight._version, storage._cdata, weight.data_ptr(), weight.dtype, weight.shape, weight.stride(),
        )  # fmt: skip
        # Each stream has its own: what another one makes may not be finished.
        stream = torch.cuda.current_stream(weight.device).cuda_stream if weight.is_cuda else None
        key = (pack, options, stream)
        with self._lock:
            found: _Entry | None = self._kept.get(weight, {}).get(key)
            if found is not None and found.state == state:
                self.hits += 1
                return found.packed
        packed = pack(weight, *options)
        # A view costs nothing to make, and would keep the weight alive.
        if packed.untyped_storage()._cdata != storage._cdata:
            with self._lock:
                self._kept.setdefault(weight, {})[key] = _Entry(state, StorageWeakRef(storage), packed)
        return packed


def keepable(weight: Tensor) -> bool:
    """Whether changes of ``weight`` show, and what is made of it now is there later.

    Tensors of inference mode count no writes. What is made while a CUDA graph is captured has its values only when the
    graph runs; and a graph that read something made before would miss later changes of the weight, and read memory that
    they freed.
    """
    return (
        type(weight) in (Tensor, torch.nn.Parameter)
        and not (weight.requires_grad or weight.is_inference())
        and not (torch.compiler.is_compiling() or torch.jit.is_tracing())
        and not (weight.is_cuda and torch.cuda.is_current_stream_capturing())
    )


#: Of all kernels.
PACKED = PackedWeights()
