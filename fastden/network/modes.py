"""In which mode of PyTorch a call runs: plainly, under a transform, or watched while it is recorded."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad


def transforming() -> bool:
    """Whether values of tensors may not be looked at: in code that is compiled, traced or transformed.

    True inside ``torch.compile`` and ``torch.export``, ``torch.jit.trace``, the transforms of ``torch.func`` and
    ``torch.vmap``, and forward-mode differentiation.
    """
    return (
        torch.compiler.is_compiling()
        or torch._C._get_tracing_state() is not None
        or bool(torch._C._are_functorch_transforms_active())
        or forward_ad._current_level >= 0
    )


def runs_as_written(x: Tensor) -> bool:
    """Whether code on ``x`` runs once, now, on plain memory, with nobody recording PyTorch's operations.

    Where it does not, only operations that PyTorch differentiates, batches and counts will do: under
    :func:`transforming`, under a dispatch mode (``FlopCounterMode``, fake tensors, ``make_fx``), for tensor subclasses.
    """
    return not transforming() and torch._C._len_torch_dispatch_stack() == 0 and type(x) in (Tensor, nn.Parameter)


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """A context in which autocast is off for ``device``; nothing where it is off anyway, or unknown (meta)."""
    kind = device.type
    if not torch.amp.is_autocast_available(kind) or not torch.is_autocast_enabled(kind):
        return nullcontext()
    return torch.autocast(kind, enabled=False)
