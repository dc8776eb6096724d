"""concat_conv_bn_relu on Triton: one sum over the taps and channels of two inputs; they are never concatenated."""

from __future__ import annotations

from torch import Tensor

from fastden.kernels._common import Specimen, channels_last
from fastden.kernels._conv import ConvConfig, conv_specimen, launch_conv
from fastden.kernels.conv_bn_relu import LARGEST_KERNEL

#: Tiles with descriptors for conv3, to be measured on a GPU of sm_90 or later. The second reads each box of input once
#: for all outputs, the third each box of weights once for twice the pixels.
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
    """Why the kernel cannot do these shapes; empty where it can."""
    kernel = weight.shape[-1]
    if kernel > LARGEST_KERNEL or weight.shape[-2] != kernel:
        return [f"weight: kernel {tuple(weight.shape[-2:])}; accepted: square, up to {LARGEST_KERNEL}"]
    return []


def specimens() -> list[Specimen]:
    """Kernels at the network's sizes, the default ones and those with descriptors, for checks by compilation alone."""
    conv3 = {"channels": 128, "others": 32, "outputs": 256, "kernel": 3}
    label = "concat_conv_bn_relu conv3"
    found = []
    for dtype in ("bf16", "fp16"):
        found.append(conv_specimen(label, dtype, **conv3))
        found.append(conv_specimen(f"{label} with statistics", dtype, statistics=True, **conv3))
        found += [conv_specimen(label, dtype, config=config, **conv3) for config in DESCRIBED]
    return found
