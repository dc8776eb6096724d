"""Checks of the operators' tensors, and their errors."""

from __future__ import annotations

import torch
from torch import Tensor

from fastden.ops.batch_norm import BatchNorm
from fastden.ops.tracing import autocast_enabled


def check_tensors(optional: tuple[str, ...] = (), /, **tensors: Tensor | None) -> None:
    """Raise unless all are floating tensors on the device of the first and, outside autocast, with its dtype.

    Biases may always be float32.

    Args:
        optional: names of those that may be None.
        **tensors: by the names of the operator's arguments.

    Raises:
        TypeError, ValueError: names the argument, its value and the accepted values.
    """
    reference: tuple[str, Tensor] | None = None
    for name, tensor in tensors.items():
        if tensor is None and name in optional:
            continue
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name}: {type(tensor).__name__}; accepted: a torch.Tensor")
        if not tensor.is_floating_point():
            raise TypeError(f"{name}: dtype {tensor.dtype}; accepted: a floating dtype")
        if reference is None:
            reference = name, tensor
            continue
        other, first = reference
        if tensor.device != first.device:
            raise ValueError(f"{name}: on {tensor.device}; accepted: {first.device}, that of {other}")
        wide = name.endswith("bias") and tensor.dtype == torch.float32
        if tensor.dtype != first.dtype and not wide and not autocast_enabled(first.device.type):
            raise TypeError(f"{name}: dtype {tensor.dtype}; accepted: {first.dtype}, that of {other} (or use autocast)")


def check_shape(name: str, tensor: Tensor | None, *accepted: int | str) -> None:
    """Raise unless ``tensor`` has the shape ``accepted``. A letter accepts any size; equal letters mean equal sizes.

    Raises:
        ValueError: names the argument, its shape and the accepted shape.
    """
    if tensor is None:
        return
    sizes: dict[str, int] = {}
    fits = tensor.dim() == len(accepted)
    for size, wanted in zip(tensor.shape, accepted, strict=False):
        # Under tracing with symbolic shapes, sizes are torch.SymInt, which is no int and has no hash.
        fits = fits and size == (sizes.setdefault(wanted, size) if isinstance(wanted, str) else wanted)
    if not fits:
        comma = "," if len(accepted) == 1 else ""
        raise ValueError(f"{name}: shape {tuple(tensor.shape)}; accepted: ({', '.join(map(str, accepted))}{comma})")


def check_filled(**tensors: Tensor) -> None:
    """Raise unless no dimension of any of these is empty: no backend has a convolution of nothing.

    Raises:
        ValueError: names the argument, its shape and the accepted shape.
    """
    for name, tensor in tensors.items():
        if 0 in tuple(tensor.shape):
            raise ValueError(f"{name}: shape {tuple(tensor.shape)}; accepted: no empty dimension")


def check_flags(**flags: bool) -> None:
    """Raise unless all are truth values.

    Raises:
        ValueError: names the argument, its value and the accepted values.
    """
    for name, flag in flags.items():
        if not isinstance(flag, bool):
            raise ValueError(f"{name}: {flag!r}; accepted: True or False")


def check_batch_norm(name: str, bn: BatchNorm | None, channels: int) -> None:
    """Raise unless ``bn`` is a :class:`fastden.ops.BatchNorm` over ``channels``.

    Raises:
        TypeError, ValueError: names the argument, its value and the accepted values.
    """
    if bn is None:
        return
    if not isinstance(bn, BatchNorm):
        raise TypeError(f"{name}: {type(bn).__name__}; accepted: fastden.ops.BatchNorm (BatchNorm.of(module)) or None")
    for part in ("weight", "bias", "running_mean", "running_var"):
        check_shape(f"{name}.{part}", getattr(bn, part), channels)


def check_convolution(
    sources: dict[str, Tensor],
    weight: Tensor,
    bias: Tensor | None,
    bn: BatchNorm | None,
    residual: Tensor | None,
    relu: bool,
    stride: int,
    padding: int,
) -> None:
    """Raise unless the arguments fit ``relu(bn(conv2d(cat(sources), weight, bias)) + residual)``.

    Traced code is not checked here: the shape functions of the operators refuse shapes that do not fit.

    Raises:
        TypeError, ValueError: names the argument, its value and the accepted values.
    """
    if torch.compiler.is_compiling():
        return
    check_tensors(("bias", "residual"), **sources, weight=weight, bias=bias, residual=residual)
    check_flags(relu=relu)
    name, first = next(iter(sources.items()))
    check_shape(name, first, "N", "C", "H", "W")
    batch, _, height, width = first.shape
    for other, tensor in sources.items():
        check_shape(other, tensor, batch, "C", height, width)
    check_shape("weight", weight, "O", sum(tensor.shape[1] for tensor in sources.values()), "k", "k")
    check_filled(weight=weight)
    outputs, kernel = weight.shape[0], weight.shape[-1]
    for what, value, least in (("stride", stride, 1), ("padding", padding, 0)):
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise ValueError(f"{what}: {value!r}; accepted: a whole number of at least {least}")
    if min(height, width) + 2 * padding < kernel:
        raise ValueError(
            f"{name}: shape {tuple(first.shape)}; accepted: height and width of at least {max(kernel - 2 * padding, 1)}"
            f" for a kernel of {kernel} with padding {padding}"
        )
    check_shape("bias", bias, outputs)
    check_batch_norm("bn", bn, outputs)
    sizes = [(size + 2 * padding - kernel) // stride + 1 for size in (height, width)]
    check_shape("residual", residual, batch, outputs, *sizes)
