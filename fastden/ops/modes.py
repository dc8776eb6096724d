"""The mode of PyTorch in which a call runs: plain, transformed, or recorded."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from fastden.ops._tracing import has_autocast, transform_active


def transforming() -> bool:
    """Whether code may not read the values of tensors, because it is compiled, traced or transformed.

    True inside ``torch.compile`` and ``torch.export``, ``torch.jit.trace``, the transforms of ``torch.func`` and
    ``torch.vmap``, and forward-mode differentiation.
    """
    return torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None or transform_active()


def runs_as_written(x: Tensor) -> bool:
    """Whether code on ``x`` runs once, now, on plain memory, and nothing records PyTorch's operations.

    It is false under :func:`transforming`, under a dispatch mode (``FlopCounterMode``, fake tensors, ``make_fx``) and
    for tensor subclasses. Then code may use only operations that PyTorch can differentiate, batch and count.
    """
    return not transforming() and torch._C._len_torch_dispatch_stack() == 0 and type(x) in (Tensor, nn.Parameter)


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """A context in which autocast is off for ``device``. It may be off already, or not exist (meta)."""
    kind = device.type
    if not has_autocast(kind) or not torch.is_autocast_enabled(kind):
        return nullcontext()
    return torch.autocast(kind, enabled=False)
