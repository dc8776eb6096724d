"""Inputs of the operators, and the comparison with eager PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastden import ops
from tests.rounding import assert_as_exact, slack

DTYPES = [torch.float16, torch.bfloat16]
Tensors = dict[str, Tensor | None]


def random(device: str, dtype: torch.dtype, *shape: int, fan_in: int = 1) -> Tensor:
    """Normal numbers; as weights, scaled by their number of inputs."""
    return (torch.randn(shape) / fan_in**0.5).to(device, dtype)


def convolution(
    device: str,
    dtype: torch.dtype,
    batch: int,
    channels: int,
    outputs: int,
    size: tuple[int, int],
    kernel: int = 3,
    stride: int = 1,
    bias: bool = True,
    residual: bool = False,
) -> Tensors:
    """Inputs of conv_bn_relu, with a padding of half the kernel."""
    out = [(length + 2 * (kernel // 2) - kernel) // stride + 1 for length in size]
    fan_in = channels * kernel**2
    return {
        "x": random(device, dtype, batch, channels, *size),
        "weight": random(device, dtype, outputs, channels, kernel, kernel, fan_in=fan_in),
        "bias": random(device, dtype, outputs) if bias else None,
        "residual": random(device, dtype, batch, outputs, *out) if residual else None,
    }


def concatenation(
    device: str, dtype: torch.dtype, batch: int, a: int, b: int, outputs: int, size: tuple[int, int]
) -> Tensors:
    """Inputs of concat_conv_bn_relu."""
    return {
        "a": random(device, dtype, batch, a, *size),
        "b": random(device, dtype, batch, b, *size),
        "weight": random(device, dtype, outputs, a + b, 3, 3, fan_in=9 * (a + b)),
        "bias": random(device, dtype, outputs),
    }


def upsampling(
    device: str, dtype: torch.dtype, batch: int, channels: int, outputs: int, size: tuple[int, int], bias: bool = True
) -> Tensors:
    """Inputs of upsample."""
    return {
        "x": random(device, dtype, batch, channels, *size),
        "weight": random(device, dtype, channels, outputs, 4, 4, fan_in=4 * channels),
        "bias": random(device, dtype, outputs) if bias else None,
    }


def block(device: str, dtype: torch.dtype, batch: int, channels: int, middle: int, size: tuple[int, int]) -> Tensors:
    """Inputs of bottleneck; biases by their names in the dispatcher's operator."""
    return {
        "x": random(device, dtype, batch, channels, *size),
        "reduce": random(device, dtype, middle, channels, 1, 1, fan_in=channels),
        "conv": random(device, dtype, middle, middle, 3, 3, fan_in=9 * middle),
        "expand": random(device, dtype, channels, middle, 1, 1, fan_in=middle),
        "reduce_bias": random(device, dtype, middle),
        "conv_bias": random(device, dtype, middle),
        "expand_bias": random(device, dtype, channels),
    }


def first_layer(
    device: str, dtype: torch.dtype, batch: int, channels: int, outputs: int, size: tuple[int, int]
) -> Tensors:
    """Inputs of stem; ``size`` of the result. The four sets of weights differ everywhere, unlike composed ones."""
    return {
        "x": random(device, dtype, batch, channels, 2 * size[0] + 4, 2 * size[1] + 4),
        "weight": random(device, dtype, 4, outputs, channels, 7, 7, fan_in=49 * channels),
        "bias": random(device, dtype, 4, outputs),
    }


def last_layer(
    device: str, dtype: torch.dtype, batch: int, maps: int, channels: tuple[int, int], size: tuple[int, int]
) -> Tensors:
    """Inputs of head; ``size`` of the features, ``channels`` of the input and of the image."""
    c, k = channels
    return {
        "features": random(device, dtype, batch, maps, *size),
        "x": random(device, dtype, batch, c, 2 * size[0] + 4, 2 * size[1] + 4),
        "weight": random(device, dtype, 4 * k, maps, 4, 4, fan_in=16 * maps),
        "image_weight": random(device, dtype, k, c, 7, 7, fan_in=49 * c),
        "bias": random(device, dtype, k),
    }


def bottleneck(*, backend: str, **tensors: Tensor | None) -> Tensor:
    """:func:`fastden.ops.bottleneck` on the tensors of :func:`block`."""
    x, reduce, conv, expand, *biases = tensors.values()
    assert x is not None
    assert reduce is not None
    assert conv is not None
    assert expand is not None
    return ops.bottleneck(x, reduce, conv, expand, biases=tuple(biases), backend=backend)  # type: ignore[arg-type]


def steps(*, backend: str, **tensors: Tensor | None) -> Tensor:
    """The same as three convolutions, each rounded."""
    x, reduce, conv, expand, a, b, c = tensors.values()
    y = eager(ops.conv_bn_relu, {"x": x, "weight": reduce, "bias": a})
    y = eager(ops.conv_bn_relu, {"x": y, "weight": conv, "bias": b}, padding=1)
    return eager(ops.conv_bn_relu, {"x": y, "weight": expand, "bias": c, "residual": x})


def eager(function: Callable[..., Tensor], tensors: Tensors, **settings: Any) -> Tensor:
    """PyTorch's own result in the tensors' dtype.

    On a CPU that is float32 rounded at the end: oneDNN 3.12's own bfloat16 convolution leaves NaN in outputs that are
    one column wide.
    """
    given = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    first = next(iter(given.values()))
    if first.is_cuda:
        return function(**given, **settings, backend="torch")
    return function(**{name: x.float() for name, x in given.items()}, **settings, backend="torch").to(first.dtype)


def assert_as_exact_as_eager(function: Callable[..., Tensor], tensors: Tensors, **settings: Any) -> Tensor:
    """The kernel errs, against float64, at most twice as much as eager PyTorch in the same dtype; also on each border.

    Rounding is allowed for, see :func:`tests.rounding.slack`.

    Returns:
        The kernel's result.
    """
    kernel = function(**tensors, **settings, backend="cuda")
    doubles = {name: None if x is None else x.double() for name, x in tensors.items()}
    exact = function(**doubles, **settings, backend="torch")
    expected = steps(**tensors, backend="torch") if function is bottleneck else eager(function, tensors, **settings)
    assert kernel.is_contiguous(memory_format=torch.contiguous_format if function is ops.head else torch.channels_last)
    empty = not kernel.numel()
    unit = 0 if empty else slack(function, **tensors, **settings, backend="torch", exact=exact, dtype=kernel.dtype)
    assert_as_exact(kernel, expected, exact, unit)
    return kernel
