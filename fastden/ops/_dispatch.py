"""Dispatcher operators over the Triton kernels, and the autograd functions outside them.

``torch.ops.fastden.*`` take tensors and numbers alone, know their output's shape without running (so that
``torch.compile`` and ``torch.export`` trace them), and have no gradient of their own: :class:`Conv`,
:class:`ConvBatchNorm` and :class:`Upsample` give it. Gradients of convolutions are cuDNN's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

LIBRARY = torch.library.Library("fastden", "DEF")

_SCHEMAS = (
    "conv(Tensor a, Tensor? b, Tensor weight, Tensor? bias, Tensor? residual, bool relu, int stride, int padding)"
    " -> Tensor",
    "conv_statistics(Tensor a, Tensor? b, Tensor weight, Tensor? bias, int stride, int padding)"
    " -> (Tensor, Tensor, Tensor)",
    "affine(Tensor x, Tensor mean, Tensor scale, Tensor bias, Tensor? residual, bool relu) -> Tensor",
    "affine_gradient(Tensor grad, Tensor y, Tensor raw, Tensor mean, Tensor rstd, Tensor weight, bool relu,"
    " bool residual) -> (Tensor, Tensor, Tensor, Tensor)",
    "upsample(Tensor x, Tensor weight, Tensor? bias) -> Tensor",
    "bottleneck(Tensor x, Tensor reduce, Tensor conv, Tensor expand, Tensor? reduce_bias, Tensor? conv_bias,"
    " Tensor? expand_bias) -> Tensor",
    "stem(Tensor x, Tensor weight, Tensor bias, bool relu) -> Tensor",
    "head(Tensor features, Tensor x, Tensor weight, Tensor image_weight, Tensor bias, bool add_input) -> Tensor",
)
for _schema in _SCHEMAS:
    LIBRARY.define(_schema)


def _implementation(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register a function for CUDA, and for the CPU, where Triton interprets."""

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        for key in ("CUDA", "CPU"):
            LIBRARY.impl(name, function, key)
        return function

    return register


@_implementation("conv")
def _conv(
    a: Tensor,
    b: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    relu: bool,
    stride: int,
    padding: int,
) -> Tensor:
    from fastden.kernels.concat_conv_bn_relu import concat_conv_bn_relu
    from fastden.kernels.conv_bn_relu import conv_bn_relu

    if b is None:
        return conv_bn_relu(a, weight, bias, residual, relu, stride, padding)
    if residual is not None or stride != 1:
        raise ValueError(f"b: given with a residual or stride {stride}; accepted beside it: no residual, stride 1")
    return concat_conv_bn_relu(a, b, weight, bias, relu, padding)


@_implementation("conv_statistics")
def _conv_statistics(
    a: Tensor, b: Tensor | None, weight: Tensor, bias: Tensor | None, stride: int, padding: int
) -> tuple[Tensor, Tensor, Tensor]:
    from fastden.kernels.conv_bn_relu import conv_statistics

    return conv_statistics(a, b, weight, bias, stride, padding)


@_implementation("affine")
def _affine(x: Tensor, mean: Tensor, scale: Tensor, bias: Tensor, residual: Tensor | None, relu: bool) -> Tensor:
    from fastden.kernels.batch_norm import affine

    return affine(x, mean, scale, bias, residual, relu)


@_implementation("affine_gradient")
def _affine_gradient(
    grad: Tensor, y: Tensor, raw: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, relu: bool, residual: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from fastden.kernels.batch_norm import affine_gradient

    grad_raw, grad_residual, *rest = affine_gradient(grad, y, raw, mean, rstd, weight, relu, residual)
    return grad_raw, grad.new_empty(0) if grad_residual is None else grad_residual, *rest


@_implementation("upsample")
def _upsample(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    from fastden.kernels.upsample import upsample

    return upsample(x, weight, bias)


@_implementation("bottleneck")
def _bottleneck(
    x: Tensor,
    reduce: Tensor,
    conv: Tensor,
    expand: Tensor,
    reduce_bias: Tensor | None,
    conv_bias: Tensor | None,
    expand_bias: Tensor | None,
) -> Tensor:
    from fastden.kernels.bottleneck import bottleneck

    return bottleneck(x, reduce, conv, expand, (reduce_bias, conv_bias, expand_bias))


@_implementation("stem")
def _stem(x: Tensor, weight: Tensor, bias: Tensor, relu: bool) -> Tensor:
    from fastden.kernels.stem import stem

    return stem(x, weight, bias, relu)


@_implementation("head")
def _head(features: Tensor, x: Tensor, weight: Tensor, image_weight: Tensor, bias: Tensor, add_input: bool) -> Tensor:
    from fastden.kernels.head import head

    return head(features, x, weight, image_weight, bias, add_input)


def _empty(like: Tensor, shape: tuple[Any, ...]) -> Tensor:
    return like.new_empty(shape).to(memory_format=torch.channels_last)


def _conv_shape(a: Tensor, weight: Tensor, stride: int, padding: int) -> tuple[Any, ...]:
    kernel = weight.shape[2]
    sizes = [(size + 2 * padding - kernel) // stride + 1 for size in a.shape[2:]]
    return (a.shape[0], weight.shape[0], *sizes)


@torch.library.register_fake("fastden::conv", lib=LIBRARY)
def _(
    a: Tensor,
    b: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    relu: bool,
    stride: int,
    padding: int,
) -> Tensor:
    return _empty(a, _conv_shape(a, weight, stride, padding))


@torch.library.register_fake("fastden::conv_statistics", lib=LIBRARY)
def _(
    a: Tensor, b: Tensor | None, weight: Tensor, bias: Tensor | None, stride: int, padding: int
) -> tuple[Tensor, Tensor, Tensor]:
    statistic = a.new_empty(weight.shape[0], dtype=torch.float32)
    return _empty(a, _conv_shape(a, weight, stride, padding)), statistic, torch.empty_like(statistic)


@torch.library.register_fake("fastden::affine", lib=LIBRARY)
def _(x: Tensor, mean: Tensor, scale: Tensor, bias: Tensor, residual: Tensor | None, relu: bool) -> Tensor:
    return torch.empty_like(x, memory_format=torch.channels_last)


@torch.library.register_fake("fastden::affine_gradient", lib=LIBRARY)
def _(
    grad: Tensor, y: Tensor, raw: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, relu: bool, residual: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    like = torch.empty_like(raw, memory_format=torch.channels_last)
    return (
        like,
        torch.empty_like(like) if residual else grad.new_empty(0),
        torch.empty_like(mean),
        torch.empty_like(mean),
    )


@torch.library.register_fake("fastden::upsample", lib=LIBRARY)
def _(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    n, _, height, width = x.shape
    return _empty(x, (n, weight.shape[1], 2 * height, 2 * width))


@torch.library.register_fake("fastden::bottleneck", lib=LIBRARY)
def _(
    x: Tensor,
    reduce: Tensor,
    conv: Tensor,
    expand: Tensor,
    reduce_bias: Tensor | None,
    conv_bias: Tensor | None,
    expand_bias: Tensor | None,
) -> Tensor:
    return torch.empty_like(x, memory_format=torch.channels_last)


@torch.library.register_fake("fastden::stem", lib=LIBRARY)
def _(x: Tensor, weight: Tensor, bias: Tensor, relu: bool) -> Tensor:
    n, _, height, width = x.shape
    return _empty(x, (n, weight.shape[1], (height - 4) // 2, (width - 4) // 2))


@torch.library.register_fake("fastden::head", lib=LIBRARY)
def _(features: Tensor, x: Tensor, weight: Tensor, image_weight: Tensor, bias: Tensor, add_input: bool) -> Tensor:
    n, _, height, width = x.shape
    return features.new_empty((n, image_weight.shape[0], height - 6, width - 6))


def _channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def _conv_gradients(
    needed: tuple[bool, ...], grad: Tensor, a: Tensor, b: Tensor | None, weight: Tensor, stride: int, padding: int
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of both sources and of the weight, as far as ``needed``; the sources stay apart."""

    def backward(x: Tensor, w: Tensor, want: tuple[bool, bool]) -> tuple[Tensor | None, Tensor | None]:
        if not any(want):
            return None, None
        return torch.ops.aten.convolution_backward(
            grad, x, w, None, [stride] * 2, [padding] * 2, [1, 1], False, [0, 0], 1, [*want, False]
        )[:2]

    if b is None:
        grad_a, grad_weight = backward(a, weight, (needed[0], needed[2]))
        return grad_a, None, grad_weight
    split = a.shape[1]
    grad_a, weight_a = backward(a, weight[:, :split], (needed[0], needed[2]))
    grad_b, weight_b = backward(b, weight[:, split:], (needed[1], needed[2]))
    if weight_a is None or weight_b is None:
        return grad_a, grad_b, None
    return grad_a, grad_b, torch.cat([weight_a, weight_b], 1)


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
    ) -> Tensor:
        y = torch.ops.fastden.conv(a, b, weight, bias, residual, relu, stride, padding)
        ctx.save_for_backward(a, b, weight, y if relu else None)
        ctx.settings = stride, padding
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        a, b, weight, y = ctx.saved_tensors
        grad = _channels_last(grad)
        if y is not None:
            grad = torch.ops.aten.threshold_backward(grad, y, 0)
        needed = ctx.needs_input_grad
        sources = _conv_gradients(needed[:3], grad, a, b, weight, *ctx.settings)
        bias = grad.sum((0, 2, 3)) if needed[3] else None
        return *sources, bias, grad if needed[4] else None, None, None, None


class ConvBatchNorm(torch.autograd.Function):
    """``relu(batch_norm(conv2d(cat([a, b], 1), weight, bias)) + residual)`` with the statistics of the batch.

    Returns the result, and the batch's mean and biased variance, (O,) float32, which carry no gradient.
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
        raw, mean, variance = torch.ops.fastden.conv_statistics(a, b, weight, bias, stride, padding)
        rstd = torch.rsqrt(variance + eps)
        y = torch.ops.fastden.affine(raw, mean, bn_weight.float() * rstd, bn_bias.float(), residual, relu)
        ctx.save_for_backward(a, b, weight, bn_weight, raw, y, mean, rstd)
        ctx.settings = relu, stride, padding, None if bias is None else bias.dtype, bn_bias.dtype
        ctx.mark_non_differentiable(mean, variance)
        return y, mean, variance

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        a, b, weight, bn_weight, raw, y, mean, rstd = ctx.saved_tensors
        relu, stride, padding, bias_dtype, bn_bias_dtype = ctx.settings
        needed = ctx.needs_input_grad
        grad_raw, grad_residual, grad_bn_weight, grad_bn_bias = torch.ops.fastden.affine_gradient(
            _channels_last(grad), y, raw, mean, rstd, bn_weight, relu, needed[6]
        )
        sources = _conv_gradients(needed[:3], grad_raw, a, b, weight, stride, padding)
        # A constant in front of batch statistics changes nothing.
        bias = torch.zeros(len(mean), dtype=bias_dtype, device=mean.device) if needed[3] else None
        return (
            *sources,
            bias,
            grad_bn_weight.to(bn_weight.dtype),
            grad_bn_bias.to(bn_bias_dtype),
            grad_residual if needed[6] else None,
            *(None,) * 4,
        )


class Upsample(torch.autograd.Function):
    """Transposed convolution of kernel 4, stride 2, padding 1."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return torch.ops.fastden.upsample(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        needed = ctx.needs_input_grad
        grad = _channels_last(grad)
        grad_x = grad_weight = None
        if needed[0] or needed[1]:
            grad_x, grad_weight, _ = torch.ops.aten.convolution_backward(
                grad, x, weight, None, [2, 2], [1, 1], [1, 1], True, [0, 0], 1, [needed[0], needed[1], False]
            )
        return grad_x, grad_weight, grad.sum((0, 2, 3)) if needed[2] else None


class Stem(torch.autograd.Function):
    """conv1 o conv0, with a ReLU or without; x is given the gradient only where it wants one."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, relu: bool) -> Tensor:
        y = torch.ops.fastden.stem(x, weight, bias, relu)
        ctx.save_for_backward(x, weight, y if relu else None)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, y = ctx.saved_tensors
        grad = _channels_last(grad)
        if y is not None:
            grad = torch.ops.aten.threshold_backward(grad, y, 0)
        padded = torch.nn.functional.pad(x, (1, 0, 1, 0))
        grad_padded = torch.zeros_like(padded) if ctx.needs_input_grad[0] else None
        weights, biases = [], []
        first, rest = slice(None, 1), slice(1, None)
        # Each region of the output has its own weights; output row i reads rows 2 i to 2 i + 6 of the padded image.
        for index, (rows, columns) in enumerate(((rest, rest), (first, rest), (rest, first), (first, first))):
            part = grad[:, :, rows, columns]
            window = (..., *(slice(None, 7) if side is first else slice(2, None) for side in (rows, columns)))
            if 0 in part.shape:
                weights.append(torch.zeros_like(weight[index]))
                biases.append(torch.zeros_like(weight[index, :, 0, 0, 0]))
                continue
            wanted = [grad_padded is not None, ctx.needs_input_grad[1], False]
            grad_x, grad_weight, _ = torch.ops.aten.convolution_backward(
                part, padded[window], weight[index], None, [2, 2], [0, 0], [1, 1], False, [0, 0], 1, wanted
            )
            if grad_padded is not None:
                grad_padded[window] += grad_x
            weights.append(grad_weight)
            biases.append(part.sum((0, 2, 3)))
        return (
            None if grad_padded is None else grad_padded[:, :, 1:, 1:],
            torch.stack(weights) if ctx.needs_input_grad[1] else None,
            torch.stack(biases) if ctx.needs_input_grad[2] else None,
            None,
        )


class Head(torch.autograd.Function):
    """out o cat(conv0, up3), with the input added or without."""

    @staticmethod
    def forward(
        ctx: Any, features: Tensor, x: Tensor, weight: Tensor, image_weight: Tensor, bias: Tensor, add_input: bool
    ) -> Tensor:
        ctx.save_for_backward(features, x, weight, image_weight)
        ctx.add_input = add_input
        return torch.ops.fastden.head(features, x, weight, image_weight, bias, add_input)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        features, x, weight, image_weight = ctx.saved_tensors
        needed = ctx.needs_input_grad
        grad_features = grad_weight = grad_x = grad_image_weight = None
        if needed[0] or needed[2]:
            phases = _channels_last(torch.nn.functional.pixel_unshuffle(grad, 2))
            grad_features, grad_weight, _ = torch.ops.aten.convolution_backward(
                phases, features, weight, None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1, [needed[0], needed[2], False]
            )
        if needed[1] or needed[3]:
            grad_x, grad_image_weight, _ = torch.ops.aten.convolution_backward(
                grad, x, image_weight, None, [1, 1], [0, 0], [1, 1], False, [0, 0], 1, [needed[1], needed[3], False]
            )
        if grad_x is not None and ctx.add_input:
            grad_x[:, : grad.shape[1], 3:-3, 3:-3] += grad
        bias = grad.sum((0, 2, 3)) if needed[4] else None
        return grad_features, grad_x, grad_weight, grad_image_weight, bias, None
