"""The mode of PyTorch in which a call runs: plain, transformed, or recorded."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fastden.ops.tracing import autocast_enabled, transform_active

_PLAIN = {Tensor, nn.Parameter, type(None)}


def transforming() -> bool:
    """Whether code may not read the values of tensors, because it is compiled, traced or transformed.

    True inside ``torch.compile`` and ``torch.export``, ``torch.jit.trace``, the transforms of ``torch.func`` and
    ``torch.vmap``, and forward-mode differentiation.
    """
    return torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None or transform_active()


def runs_as_written(*tensors: Tensor | None) -> bool:
    """Whether code on ``tensors`` runs once, now, on plain memory, and nothing records PyTorch's operations.

    It is false under :func:`transforming`, under a dispatch mode (``FlopCounterMode``, fake tensors, ``make_fx``) and
    for tensor subclasses. Then code may use only operations that PyTorch can differentiate, batch and count.
    """
    if transforming() or not _PLAIN.issuperset(map(type, tensors)):
        return False
    # make_fx(pre_dispatch=True) has a stack of its own.
    return torch._C._len_torch_dispatch_stack() == 0 and torch._ops._len_torch_dispatch_stack_pre_dispatch() == 0


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """A context in which autocast is off for ``device``. It may be off already, or not exist (meta)."""
    kind = device.type
    if not autocast_enabled(kind):
        return nullcontext()
    return torch.autocast(kind, enabled=False)


class Undrawn(TorchFunctionMode):
    """A context in which layers do not draw their first weights, for networks whose weights are read next.

    The caller's random numbers then go on as if nothing had been loaded. It counts in this thread alone. A network on
    meta would draw none either, but that loads SymPy.
    """

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(function, "__module__", None) == "torch.nn.init":
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        return function(*args, **kwargs)
