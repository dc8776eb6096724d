"""conv_bn_relu on Triton: an implicit matrix product with bias, residual, ReLU and statistics in its epilogue."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor

from fastden.kernels._common import Specimen, channels_last
from fastden.kernels._conv import ConvConfig, config_for, conv_specimen, launch_conv
from fastden.kernels.batch_norm import combine

LARGEST_KERNEL = 7


def conv_bn_relu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    relu: bool = True,
    stride: int = 1,
    padding: int = 0,
    config: ConvConfig | None = None,
) -> Tensor:
    """``relu(conv2d(x, weight, bias) + residual)``, BN folded; arguments as :func:`fastden.ops.conv_bn_relu`.

    Returns:
        (N, O, H', W'), channels-last.
    """
    y, _ = launch_conv(
        channels_last(x),
        None,
        channels_last(weight),
        bias,
        None if residual is None else channels_last(residual),
        relu=relu,
        stride=stride,
        padding=padding,
        config=config,
    )
    return y


def conv_statistics(
    a: Tensor, b: Tensor | None, weight: Tensor, bias: Tensor | None, stride: int, padding: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Convolution of ``cat([a, b], 1)``, and mean and biased variance of each output channel, for training.

    Returns:
        (N, O, H', W'), channels-last; (O,) and (O,), float32.
    """
    a, weight = channels_last(a), channels_last(weight)
    pixels = a.shape[0] * _size(a.shape[2], weight, stride, padding) * _size(a.shape[3], weight, stride, padding)
    config = config_for(a.shape[1], weight.shape[0], pixels, a.element_size())
    y, statistics = launch_conv(
        a,
        None if b is None else channels_last(b),
        weight,
        bias,
        None,
        relu=False,
        stride=stride,
        padding=padding,
        statistics=True,
        config=config,
    )
    assert statistics is not None
    return y, *combine(statistics, pixels, config.block_m)


def why_not(x: Tensor, weight: Tensor, **_: Tensor) -> list[str]:
    """Why the kernel cannot do these shapes; empty where it can."""
    kernel = weight.shape[-1]
    if kernel > LARGEST_KERNEL or weight.shape[-2] != kernel:
        return [f"weight: kernel {tuple(weight.shape[-2:])}; accepted: square, up to {LARGEST_KERNEL}"]
    return []


def specimens() -> list[Specimen]:
    """Kernels at the network's sizes, by default and with descriptors, for checks by compilation alone."""
    shapes: dict[str, dict[str, Any]] = {
        "conv2": {"channels": 128, "outputs": 128, "kernel": 3, "stride": 2},
        "reduce": {"channels": 256, "outputs": 64, "kernel": 1},
        "expand": {"channels": 64, "outputs": 256, "kernel": 1, "residual": True},
        "conv2 with statistics": {"channels": 128, "outputs": 128, "kernel": 3, "stride": 2, "statistics": True},
    }
    # What a bottleneck's 3x3 convolution is on descriptors.
    described = replace(config_for(64, 64, 1 << 20, itemsize=2), descriptors=True)
    shapes["conv"] = {"channels": 64, "outputs": 64, "kernel": 3, "config": described}
    return [
        conv_specimen(f"conv_bn_relu {name}", dtype, **shape)
        for name, shape in shapes.items()
        for dtype in ("bf16", "fp16")
    ]


def _size(size: int, weight: Tensor, stride: int, padding: int) -> int:
    return int((size + 2 * padding - weight.shape[-1]) // stride + 1)
