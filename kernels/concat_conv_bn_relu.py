"""concat_conv_bn_relu on Triton: one sum over the taps and channels of two inputs; they are never concatenated."""

from __future__ import annotations

from torch import Tensor

from fastden.kernels._common import Specimen, channels_last
from fastden.kernels._conv import ConvConfig, conv_specimen, launch_conv
from fastden.kernels.conv_bn_relu import LARGEST_KERNEL


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
    """Why the kernel cannot do these shapes; empty where it can."""
    kernel = weight.shape[-1]
    if kernel > LARGEST_KERNEL or weight.shape[-2] != kernel:
        return [f"weight: kernel {tuple(weight.shape[-2:])}; accepted: square, up to {LARGEST_KERNEL}"]
    return []


def specimens() -> list[Specimen]:
    """Default kernels at the network's sizes, for checks by compilation alone."""
    return [
        conv_specimen(
            f"concat_conv_bn_relu conv3{' with statistics' if statistics else ''}",
            dtype,
            channels=128,
            others=32,
            outputs=256,
            kernel=3,
            statistics=statistics,
        )
        for statistics in (False, True)
        for dtype in ("bf16", "fp16")
    ]
