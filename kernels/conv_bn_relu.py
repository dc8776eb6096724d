"""conv_bn_relu on Triton: an implicit matrix product with bias, residual, ReLU and statistics in its epilogue."""

from __future__ import annotations

from torch import Tensor

from fastden.kernels._conv import chosen_config, launch_conv, output_size
from fastden.kernels._layout import channels_last
from fastden.kernels._tiles import ConvConfig
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
    a: Tensor, b: Tensor | None, weight: Tensor, bias: Tensor | None, stride: int, padding: int, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Convolution of ``cat([a, b], 1)``, and the statistics of each output channel, for training.

    Returns:
        (N, O, H', W'), channels-last; mean, 1 / sqrt(biased variance + eps) and unbiased variance, (O,) float32.
    """
    a, weight = channels_last(a), channels_last(weight)
    height, width = output_size(a, weight, stride, padding)
    pixels = a.shape[0] * height * width
    b = None if b is None else channels_last(b)
    config = chosen_config(a, b, weight, pixels, stride, statistics=True)
    y, statistics = launch_conv(
        a,
        b,
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
    return y, *combine(statistics, pixels, config.block_m, eps)


def why_not(x: Tensor, weight: Tensor, **_: Tensor) -> list[str]:
    """Why the kernel does not support these shapes; empty if it does."""
    return why_not_weight(weight, x.shape[1])


def why_not_weight(weight: Tensor, channels: int) -> list[str]:
    """Why the kernel does not support this weight with this number of input channels; empty if it does."""
    kernel = weight.shape[-1]
    reasons = []
    if kernel > LARGEST_KERNEL or weight.shape[-2] != kernel:
        reasons.append(f"weight: kernel {tuple(weight.shape[-2:])}; accepted: square, up to {LARGEST_KERNEL}")
    if weight.shape[1] != channels:
        reasons.append(f"weight: {weight.shape[1]} input channels; accepted: {channels}, those of the inputs")
    return reasons
