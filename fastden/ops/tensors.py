"""Checks and conversions of tensors before a kernel runs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils import checkpoint
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode_stack

from fastden.ops.tracing import autocast_enabled, transform_active

#: The modes of selective activation checkpointing, in the forward pass and when it is repeated. A PyTorch that names
#: them otherwise may use any mode.
_CHECKPOINTING = tuple(
    getattr(checkpoint, name, TorchDispatchMode) for name in ("_CachingTorchDispatchMode", "_CachedTorchDispatchMode")
)


def wants_gradient(*tensors: Tensor | None) -> bool:
    """Whether autograd records operations on these tensors."""
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


def in_autocast(*tensors: Tensor | None) -> tuple[Any, ...]:
    """The tensors in autocast's dtype if autocast is on for their device, as for PyTorch's convolutions."""
    device = next(tensor.device.type for tensor in tensors if tensor is not None)
    if not autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(
        tensor.to(dtype) if tensor is not None and tensor.dtype != torch.float64 else tensor for tensor in tensors
    )


def untransformed() -> bool:
    """Whether an operator may run what has no derivative and no batching rule, for tensors that need no gradient.

    Not under the transforms of ``torch.func`` and forward-mode differentiation, except where the compiler handles them.
    """
    return torch.compiler.is_compiling() or not transform_active()


def differentiated_otherwise(*tensors: Tensor | None) -> bool:
    """Whether operations on these tensors need more than a gradient: kernels have no other derivative.

    Under a transform of ``torch.func`` all have. In forward-mode differentiation those have that carry a tangent.
    """
    if torch._C._are_functorch_transforms_active():
        return True
    if forward_ad._current_level < 0:
        return False
    return any(tensor is not None and forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors)


def may_overwrite() -> bool:
    """Whether an operator may write into its own intermediate results.

    Not under the transforms of ``torch.func``: only one of the two tensors may be batched, or carry a tangent. Not
    under selective activation checkpointing, which keeps results and refuses those that are written to later.
    """
    # The compiler handles transforms and checkpoints itself.
    if torch.compiler.is_compiling():
        return True
    if transform_active():
        return False
    modes = torch._C._len_torch_dispatch_stack() and _get_current_dispatch_mode_stack()
    return not modes or not any(isinstance(mode, _CHECKPOINTING) for mode in modes)


def like(bias: Tensor | None, x: Tensor) -> Tensor | None:
    """A bias in the dtype of ``x``. PyTorch's convolutions need this dtype; kernels also take float32."""
    return None if bias is None else bias.to(x.dtype)
