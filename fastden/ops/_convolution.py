"""Convolutions of one or two sources with fused BN, residual and ReLU: operators on kernels, and their gradients.

Operators store little for gradients. A convolution with batch statistics stores only its raw output. The next operator
makes its input from it again (``_recompute.py``).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastden.algebra import fold_batch_norm
from fastden.kernels._layout import channels_last
from fastden.ops import _recompute
from fastden.ops._gradients import conv_gradients, first_derivative_only, kind_of, ways
from fastden.ops._library import OPERATORS, Operator, check, check_not_empty, empty_like
from fastden.ops._recompute import Recipe
from fastden.ops.batch_norm import BatchNorm, check_values, update_running_statistics, vectors


def _conv_bn_relu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    relu: bool,
    stride: int,
    padding: int,
) -> Tensor:
    from fastden.kernels.conv_bn_relu import conv_bn_relu

    return conv_bn_relu(x, weight, bias, residual, relu, stride, padding)


_CONV_BN_RELU = Operator(_conv_bn_relu, "conv_bn_relu")


@_CONV_BN_RELU.shape
def _(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, stride: int, padding: int, **_: Any
) -> Tensor:
    y = _empty_result("x", x, None, weight, bias, stride, padding)
    if residual is not None:
        check(residual.shape == y.shape, "residual", residual, str(tuple(y.shape)))
    return y


def _concat_conv_bn_relu(a: Tensor, b: Tensor, weight: Tensor, bias: Tensor | None, relu: bool, padding: int) -> Tensor:
    from fastden.kernels.concat_conv_bn_relu import concat_conv_bn_relu

    return concat_conv_bn_relu(a, b, weight, bias, relu, padding)


_CONCAT_CONV_BN_RELU = Operator(_concat_conv_bn_relu, "concat_conv_bn_relu")


@_CONCAT_CONV_BN_RELU.shape
def _(a: Tensor, b: Tensor, weight: Tensor, bias: Tensor | None, padding: int, **_: Any) -> Tensor:
    return _empty_result("a", a, b, weight, bias, 1, padding)


def _statistics(
    a: Tensor, b: Tensor | None, weight: Tensor, bias: Tensor | None, stride: int, padding: int, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from fastden.kernels.conv_bn_relu import conv_statistics

    return conv_statistics(a, b, weight, bias, stride, padding, eps)


_STATISTICS = Operator(_statistics, "conv_bn_relu_statistics")


@_STATISTICS.shape
def _(
    a: Tensor, b: Tensor | None, weight: Tensor, bias: Tensor | None, stride: int, padding: int, **_: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _empty_result("a", a, b, weight, bias, stride, padding), *vectors(a, weight.shape[0])


def _empty_result(
    name: str, a: Tensor, b: Tensor | None, weight: Tensor, bias: Tensor | None, stride: int, padding: int
) -> Tensor:
    """The empty result of a convolution. Refuses shapes with which the kernel would read outside a tensor.

    ``name`` is what the operator calls its first source.
    """
    check(a.dim() == 4, name, a, "4 dimensions")
    channels = a.shape[1]
    if b is not None:
        fits = b.dim() == 4 and (b.shape[0], *b.shape[2:]) == (a.shape[0], *a.shape[2:])
        check(fits, "b", b, f"({a.shape[0]}, B, {a.shape[2]}, {a.shape[3]})")
        channels += b.shape[1]
    fits = weight.dim() == 4 and weight.shape[1] == channels and weight.shape[2] == weight.shape[3]
    check(fits, "weight", weight, f"(O, {channels}, k, k)")
    check_not_empty(weight=weight)
    outputs, kernel = weight.shape[0], weight.shape[2]
    if bias is not None:
        check(bias.dim() == 1 and bias.shape[0] == outputs, "bias", bias, f"({outputs},)")
    sizes = [(size + 2 * padding - kernel) // stride + 1 for size in a.shape[2:]]
    return empty_like(a, (a.shape[0], outputs, *sizes))


class Conv(torch.autograd.Function):
    """``relu(conv2d(cat([a, b], 1), weight, bias) + residual)``; b, bias and residual may be None."""

    @staticmethod
    def forward(
        ctx: Any,
        a: Tensor,
        b: Tensor | None,
        weight: Tensor,
        bias: Tensor | None,
        residual: Tensor | None,
        relu: bool,
        stride: int,
        padding: int,
        backend: str,
    ) -> Tensor:
        operators = OPERATORS[backend]
        if b is None:
            y = operators.conv_bn_relu(a, weight, bias, residual, relu, stride, padding)
        else:  # stride 1, no residual
            y = operators.concat_conv_bn_relu(a, b, weight, bias, relu, padding)
        ctx.save_for_backward(a, b, weight, y if relu else None)
        ctx.settings = stride, padding, ways(backend, kind_of(b, stride))
        ctx.bias_dtype = None if bias is None else bias.dtype
        return y

    @staticmethod
    @first_derivative_only("convolution")
    def backward(ctx: Any, saved: tuple[Any, ...], grad: Tensor) -> tuple[Tensor | None, ...]:
        a, b, weight, y = saved
        grad = channels_last(grad)
        if y is not None:
            grad = torch.ops.aten.threshold_backward(grad, y, 0)
        needed = ctx.needs_input_grad
        sources = conv_gradients(needed[:3], grad, a, b, weight, *ctx.settings)
        bias = grad.sum((0, 2, 3), dtype=ctx.bias_dtype) if needed[3] else None
        return *sources, bias, grad if needed[4] else None, None, None, None, None


class ConvBatchNorm(torch.autograd.Function):
    """``relu(batch_norm(conv2d(cat([a, b], 1), weight, bias)) + residual)`` with the statistics of the batch.

    Returns the result, and the batch's mean and unbiased variance. These two are (O,) float32 and have no gradient.
    """

    @staticmethod
    def forward(
        ctx: Any,
        a: Tensor,
        b: Tensor | None,
        weight: Tensor,
        bias: Tensor | None,
        bn_weight: Tensor,
        bn_bias: Tensor,
        residual: Tensor | None,
        relu: bool,
        stride: int,
        padding: int,
        eps: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        raw, mean, rstd, unbiased = torch.ops.fastden.conv_bn_relu_statistics(a, b, weight, bias, stride, padding, eps)
        y = torch.ops.fastden.batch_norm_affine(raw, mean, rstd, bn_weight, bn_bias, residual, relu)
        # Without a residual, raw gives the sign of the ReLU's input, so the gradient's kernels read one tensor less.
        result = None if residual is None else y
        ctx.save_for_backward(*_recompute.save(a), b, weight, bn_weight, bn_bias, raw, result, mean, rstd)
        ctx.settings = stride, padding, ways("triton", kind_of(b, stride))
        ctx.relu = relu
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.mark_non_differentiable(mean, unbiased)
        if relu and residual is None and any(ctx.needs_input_grad):
            _recompute.remember(y, Recipe(raw, mean, rstd, bn_weight, bn_bias))
        return y, mean, unbiased

    @staticmethod
    @first_derivative_only("convolution with batch normalisation")
    def backward(ctx: Any, saved: tuple[Any, ...], grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        b, weight, bn_weight, bn_bias, raw, y, mean, rstd = saved[_recompute.SAVED :]
        needed = ctx.needs_input_grad
        grad_raw, grad_residual, grad_bn_weight, grad_bn_bias = torch.ops.fastden.batch_norm_gradient(
            channels_last(grad), y, raw, mean, rstd, bn_weight, bn_bias, ctx.relu, needed[6]
        )
        a = _recompute.restore(saved[: _recompute.SAVED])
        sources = conv_gradients(needed[:3], grad_raw, a, b, weight, *ctx.settings)
        # The normalisation removes a constant that was added before it.
        bias = torch.zeros(len(mean), dtype=ctx.bias_dtype, device=mean.device) if needed[3] else None
        return (
            *sources,
            bias,
            grad_bn_weight.to(bn_weight.dtype),
            grad_bn_bias.to(bn_bias.dtype),
            grad_residual if needed[6] else None,
            *(None,) * 4,
        )


def convolve(
    a: Tensor,
    b: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    bn: BatchNorm | None,
    residual: Tensor | None,
    relu: bool,
    stride: int,
    padding: int,
    backend: str,
) -> Tensor:
    """``relu(bn(conv2d(cat([a, b], 1), weight, bias)) + residual)`` on a backend's kernels, with gradients."""
    if bn is not None and bn.training:
        kernel = weight.shape[2]
        values = a.shape[0] * ((a.shape[2] + 2 * padding - kernel) // stride + 1)
        values *= (a.shape[3] + 2 * padding - kernel) // stride + 1
        check_values(values)
        y, mean, unbiased = ConvBatchNorm.apply(
            a, b, weight, bias, bn.weight, bn.bias, residual, relu, stride, padding, bn.eps
        )
        _recompute.forget(y)
        update_running_statistics(bn, mean, unbiased)
        return y
    if bn is not None:
        weight, bias = fold_batch_norm(
            weight.float(), None if bias is None else bias.float(), bn.weight, bn.bias, bn.running_mean, bn.running_var,
            bn.eps,
        )  # fmt: skip
        # The bias stays in float32: the kernels add it to their float32 sums.
        weight = weight.to(a.dtype)
    return Conv.apply(a, b, weight, bias, residual, relu, stride, padding, backend)
