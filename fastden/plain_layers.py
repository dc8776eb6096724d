"""Whether layers are what their classes compute, so that a fused operator may stand for their calls."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeGuard, TypeVar

from torch import nn

_Layer = TypeVar("_Layer", bound=nn.Module)
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
#: PyTorch's own methods, as they were at import. Where one is replaced later, the replacement must run.
_CONV_FORWARD, _CONV_FORWARD_WITH = nn.Conv2d.forward, nn.Conv2d._conv_forward
_NORM_FORWARDS = (nn.BatchNorm2d.forward, nn.SyncBatchNorm.forward)


def is_hooked(module: nn.Module) -> bool:
    """Whether calling ``module`` runs hooks of its own."""
    return any(getattr(module, name) for name in _HOOKS)


def is_untouched(
    layer: nn.Module, kind: type[_Layer] | tuple[type[_Layer], ...], *forwards: Any, hooks: bool
) -> TypeGuard[_Layer]:
    """Whether calling ``layer`` is what the class ``kind`` does, and nothing else; its settings may be any.

    Args:
        layer: any module.
        kind: its class, or one of several.
        *forwards: what ``forward`` of its class may be; without any, that of ``kind``.
        hooks: whether it may have hooks of its own.
    """
    if not isinstance(layer, kind) or not (hooks or not is_hooked(layer)):
        return False
    own = forwards or (kind.forward,)  # type: ignore[union-attr]
    return type(layer).forward in own and not has_own_forward(layer)


def is_plain_conv(layer: nn.Module, *, hooks: bool = False) -> bool:
    """Whether calling ``layer`` is a square convolution with zero padding, computed of ``weight`` and ``bias``.

    Args:
        layer: any module.
        hooks: whether it may have hooks of its own.
    """
    return (
        is_untouched(layer, nn.Conv2d, _CONV_FORWARD, hooks=hooks)
        and type(layer)._conv_forward is _CONV_FORWARD_WITH
        and layer.padding_mode == "zeros"
        and layer.groups == 1
        and tuple(layer.dilation) == (1, 1)
        and _is_square(layer.kernel_size, layer.stride, layer.padding)
    )


def is_plain_norm(layer: nn.Module) -> bool:
    """Whether calling ``layer`` normalises as its :class:`fastden.ops.BatchNorm` does."""
    if not is_untouched(layer, (nn.BatchNorm2d, nn.SyncBatchNorm), *_NORM_FORWARDS, hooks=False):
        return False
    if layer.training and isinstance(layer, nn.SyncBatchNorm):  # the statistics of all processes
        return False
    if layer.training and not layer.track_running_stats:  # then PyTorch leaves the running statistics as they are
        return False
    tensors = ("weight", "bias", "running_mean", "running_var")
    return layer.momentum is not None and all(has_tensor(layer, name) for name in tensors)


def is_parametrised(layer: nn.Module, name: str | None = None) -> bool:
    """Whether reading a tensor of ``layer``, or any, runs a parametrisation.

    PyTorch's own function raises and catches an error for each layer without one.
    """
    parametrised: Any = layer._modules.get("parametrizations")
    return parametrised is not None and (name is None or name in parametrised)


def has_tensor(layer: nn.Module, name: str) -> bool:
    """Whether ``layer`` has a tensor of this name, and not None; no parametrisation runs: it may draw, or cost."""
    return is_parametrised(layer, name) or getattr(layer, name) is not None


def has_own_forward(layer: nn.Module) -> bool:
    """Whether this very object has methods of its own, as hooks of some libraries set them, or its class a call."""
    own = "forward" in layer.__dict__ or "_conv_forward" in layer.__dict__
    return own or type(layer).__call__ is not nn.Module.__call__


def _is_square(kernel: tuple[int, ...], stride: tuple[int, ...], padding: Any) -> bool:
    numbers = not isinstance(padding, str)
    return numbers and kernel[0] == kernel[1] and stride[0] == stride[1] and padding[0] == padding[1]


def has_geometry(conv: nn.Conv2d, kernel: int, stride: int, padding: int) -> bool:
    """Whether ``conv`` has this size of kernel, stride and padding."""
    geometry = tuple(conv.kernel_size), tuple(conv.stride), conv.padding
    return geometry == ((kernel, kernel), (stride, stride), (padding, padding))


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Set ``module`` to evaluation mode inside the context; afterwards each part has its own mode again."""
    modes = {part: part.training for part in module.modules()}
    try:
        for part in modes:
            part.training = False
        yield
    finally:
        for part, mode in modes.items():
            part.training = mode
