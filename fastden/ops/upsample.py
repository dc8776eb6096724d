"""upsample: transposed 4x4 convolution of stride 2 (up2, and up3 where the head is not composed)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fastden.kernels._layout import channels_last
from fastden.ops._checks import check_filled, check_shape, check_tensors
from fastden.ops._gradients import first_derivative_only, upsample_gradients, ways
from fastden.ops._library import OPERATORS, Operator, check, check_not_empty, empty_like
from fastden.ops.backends import choose
from fastden.ops.tensors import in_autocast, like


def upsample(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, backend: str | None = None) -> Tensor:
    """Twice the height and width by a transposed convolution, kernel 4, stride 2, padding 1.

    Args:
        x: (N, C, H, W), any floating dtype.
        weight: (C, O, 4, 4), same dtype as ``x``.
        bias: (O,) or None; float32 or the dtype of ``x``.
        backend: see :mod:`fastden.ops.backends`; None leaves it to the context, the environment or fastden.

    Returns:
        (N, O, 2 H, 2 W).

    Raises:
        TypeError, ValueError: names the argument, its value and the accepted values.
        RuntimeError: the requested backend cannot run; the message gives every backend's reasons.
    """
    if not torch.compiler.is_compiling():
        check_tensors(("bias",), x=x, weight=weight, bias=bias)
        check_shape("x", x, "N", "C", "H", "W")
        check_shape("weight", weight, x.shape[1], "O", 4, 4)
        check_filled(weight=weight)
        check_shape("bias", bias, weight.shape[1])
    backend = choose("upsample", backend, x=x, weight=weight, bias=bias)
    if backend != "torch":
        return Upsample.apply(*in_autocast(x, weight), bias, backend)
    return F.conv_transpose2d(x, weight, like(bias, x), stride=2, padding=1)


def _operator(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    from fastden.kernels.upsample import upsample

    return upsample(x, weight, bias)


_OPERATOR = Operator(_operator, "upsample")


@_OPERATOR.shape
def _(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    check(x.dim() == 4, "x", x, "4 dimensions")
    n, channels, height, width = x.shape
    # Gradients also use a kernel of 8.
    sizes = weight.dim() == 4 and tuple(weight.shape[2:]) in ((4, 4), (8, 8))
    check(sizes and weight.shape[0] == channels, "weight", weight, f"({channels}, O, 4, 4)")
    check_not_empty(weight=weight)
    outputs = weight.shape[1]
    if bias is not None:
        check(bias.dim() == 1 and bias.shape[0] == outputs, "bias", bias, f"({outputs},)")
    return empty_like(x, (n, outputs, 2 * height, 2 * width))


class Upsample(torch.autograd.Function):
    """:func:`upsample` on a backend's kernels."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, backend: str) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.ways = ways(backend, "upsample")
        ctx.bias_dtype = None if bias is None else bias.dtype
        return OPERATORS[backend].upsample(x, weight, bias)

    @staticmethod
    @first_derivative_only("upsample")
    def backward(ctx: Any, saved: tuple[Any, ...], grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = saved
        needed = ctx.needs_input_grad
        grad = channels_last(grad)
        bias = grad.sum((0, 2, 3), dtype=ctx.bias_dtype) if needed[2] else None
        return *upsample_gradients(needed[:2], grad, x, weight, ctx.ways), bias, None
