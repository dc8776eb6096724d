"""concat_conv_bn_relu on Triton: one sum over the taps and channels of two inputs; they are never concatenated."""

from __future__ import annotations

from torch import Tensor

from fastden.kernels._conv import launch_conv
from fastden.kernels._layout import channels_last
from fastden.kernels._tiles import ConvConfig
from fastden.kernels.conv_bn_relu import why_not_weight

#: Tiles with descriptors for conv3, for comparison (``benchmarks/conv3_tiles.py``). The second reads each box of the
#: input once for all outputs. The third reads each box of weights once for twice as many pixels.
DESCRIBED = (
    ConvConfig(128, 128, 64, warps=8, stages=3, descriptors=True),
    ConvConfig(128, 256, 64, warps=8, stages=3, descriptors=True),
    ConvConfig(256, 128, 64, warps=8, stages=3, descriptors=True),
)


def concat_conv_bn_relu(
    a: Tensor,
    b: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    relu: bool = True,
    padding: int = 1,
    config: ConvConfig | None = None,
) -> Tensor:
    """``relu(conv2d(cat([a, b], 1), weight, bias))``, BN folded; arguments as :func:`fastden.ops.concat_conv_bn_relu`.

    Returns:
        (N, O, H', W'), channels-last.
    """
    a, b, weight = channels_last(a), channels_last(b), channels_last(weight)
    return launch_conv(a, b, weight, bias, None, relu=relu, padding=padding, config=config)[0]


def why_not(a: Tensor, b: Tensor, weight: Tensor, **_: Tensor) -> list[str]:
    """Why the kernel does not support these shapes; empty if it does."""
    reasons = why_not_weight(weight, a.shape[1] + b.shape[1])
    if (a.shape[0], *a.shape[2:]) != (b.shape[0], *b.shape[2:]):
        accepted = f"({a.shape[0]}, B, {a.shape[2]}, {a.shape[3]})"
        reasons.append(f"b: {tuple(b.shape)}; accepted: {accepted}")
    return reasons
