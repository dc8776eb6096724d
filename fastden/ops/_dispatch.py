"""Dispatcher operators over the kernels: ``torch.ops.fastden`` over Triton's, ``torch.ops.fastden_cuda`` over CUDA's.

They take tensors and numbers alone, know their output's shape without running (so that ``torch.compile`` and
``torch.export`` trace them), and have no gradient of their own: :mod:`fastden.ops._autograd` gives it. Those of CUDA
are registered, with the same schemas, when :mod:`fastden.cuda.extension` loads the library (``csrc/bindings.cpp``).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastden.cuda import extension

LIBRARY = torch.library.Library("fastden", "DEF")

_SCHEMAS = (
    "conv(Tensor a, Tensor? b, Tensor weight, Tensor? bias, Tensor? residual, bool relu, int stride, int padding)"
    " -> Tensor",
    "conv_statistics(Tensor a, Tensor? b, Tensor weight, Tensor? bias, int stride, int padding)"
    " -> (Tensor, Tensor, Tensor)",
    "statistics(Tensor x) -> (Tensor, Tensor)",
    "affine(Tensor x, Tensor mean, Tensor scale, Tensor bias, Tensor? residual, bool relu) -> Tensor",
    "affine_gradient(Tensor grad, Tensor? y, Tensor raw, Tensor mean, Tensor rstd, Tensor weight, Tensor bias,"
    " bool relu, bool residual) -> (Tensor, Tensor, Tensor, Tensor)",
    "upsample(Tensor x, Tensor weight, Tensor? bias) -> Tensor",
    "bottleneck(Tensor x, Tensor reduce, Tensor conv, Tensor expand, Tensor? reduce_bias, Tensor? conv_bias,"
    " Tensor? expand_bias) -> Tensor",
    "stem(Tensor x, Tensor weight, Tensor bias, bool relu) -> Tensor",
    "head(Tensor features, Tensor x, Tensor weight, Tensor image_weight, Tensor bias, Tensor? image, bool add_input,"
    " bool clamp, bool composed) -> Tensor",
)
for _schema in _SCHEMAS:
    LIBRARY.define(_schema)

#: The operators of each backend that has kernels.
OPERATORS = {"triton": torch.ops.fastden, "cuda": torch.ops.fastden_cuda}
_SHAPES: dict[str, Callable[..., Any]] = {}


def _implementation(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register a function for CUDA, and for the CPU, where Triton interprets."""

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        for key in ("CUDA", "CPU"):
            LIBRARY.impl(name, function, key)
        return function

    return register


def _shape(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Keep an operator's shape function for :func:`register_shapes`."""

    def keep(function: Callable[..., Any]) -> Callable[..., Any]:
        _SHAPES[name] = function
        return function

    return keep


def register_shapes(namespace: str) -> None:
    """Register the shape functions of the operators that ``torch.ops.NAMESPACE`` has."""
    for name, function in _SHAPES.items():
        if hasattr(getattr(torch.ops, namespace), name):
            torch.library.register_fake(f"{namespace}::{name}", function)


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


@_implementation("statistics")
def _statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    from fastden.kernels.batch_norm import statistics

    return statistics(x)


@_implementation("affine")
def _affine(x: Tensor, mean: Tensor, scale: Tensor, bias: Tensor, residual: Tensor | None, relu: bool) -> Tensor:
    from fastden.kernels.batch_norm import affine

    return affine(x, mean, scale, bias, residual, relu)


@_implementation("affine_gradient")
def _affine_gradient(
    grad: Tensor,
    y: Tensor | None,
    raw: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor,
    bias: Tensor,
    relu: bool,
    residual: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from fastden.kernels.batch_norm import affine_gradient

    grad_raw, grad_residual, *rest = affine_gradient(grad, y, raw, mean, rstd, weight, bias, relu, residual)
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
def _head(
    features: Tensor,
    x: Tensor,
    weight: Tensor,
    image_weight: Tensor,
    bias: Tensor,
    image: Tensor | None,
    add_input: bool,
    clamp: bool,
    composed: bool,
) -> Tensor:
    from fastden.kernels.head import head

    out_dtype = features.dtype if image is None else image.dtype
    return head(features, x, weight, image_weight, bias, add_input, clamp, image, out_dtype, composed)


def _empty(like: Tensor, shape: tuple[Any, ...]) -> Tensor:
    return like.new_empty(shape).to(memory_format=torch.channels_last)


def _conv_shape(a: Tensor, weight: Tensor, stride: int, padding: int) -> tuple[Any, ...]:
    kernel = weight.shape[2]
    sizes = [(size + 2 * padding - kernel) // stride + 1 for size in a.shape[2:]]
    return (a.shape[0], weight.shape[0], *sizes)


@_shape("conv")
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


@_shape("conv_statistics")
def _(
    a: Tensor, b: Tensor | None, weight: Tensor, bias: Tensor | None, stride: int, padding: int
) -> tuple[Tensor, Tensor, Tensor]:
    statistic = a.new_empty(weight.shape[0], dtype=torch.float32)
    return _empty(a, _conv_shape(a, weight, stride, padding)), statistic, torch.empty_like(statistic)


@_shape("statistics")
def _(x: Tensor) -> tuple[Tensor, Tensor]:
    statistic = x.new_empty(x.shape[1], dtype=torch.float32)
    return statistic, torch.empty_like(statistic)


@_shape("affine")
def _(x: Tensor, mean: Tensor, scale: Tensor, bias: Tensor, residual: Tensor | None, relu: bool) -> Tensor:
    return torch.empty_like(x, memory_format=torch.channels_last)


@_shape("affine_gradient")
def _(
    grad: Tensor,
    y: Tensor | None,
    raw: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor,
    bias: Tensor,
    relu: bool,
    residual: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    like = torch.empty_like(raw, memory_format=torch.channels_last)
    return (
        like,
        torch.empty_like(like) if residual else grad.new_empty(0),
        torch.empty_like(mean),
        torch.empty_like(mean),
    )


@_shape("upsample")
def _(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    n, _, height, width = x.shape
    return _empty(x, (n, weight.shape[1], 2 * height, 2 * width))


@_shape("bottleneck")
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


@_shape("stem")
def _(x: Tensor, weight: Tensor, bias: Tensor, relu: bool) -> Tensor:
    n, _, height, width = x.shape
    return _empty(x, (n, weight.shape[1], (height - 4) // 2, (width - 4) // 2))


@_shape("head")
def _(
    features: Tensor,
    x: Tensor,
    weight: Tensor,
    image_weight: Tensor,
    bias: Tensor,
    image: Tensor | None,
    add_input: bool,
    clamp: bool,
    composed: bool,
) -> Tensor:
    n, _, height, width = x.shape
    dtype = features.dtype if image is None else image.dtype
    return features.new_empty((n, image_weight.shape[0], height - 6, width - 6), dtype=dtype)


register_shapes("fastden")
extension.after_loading(partial(register_shapes, "fastden_cuda"))
