"""upsample on Triton: the transposed convolution as four 2x2 convolutions, one for each parity of the output pixel."""

from __future__ import annotations

from torch import Tensor

from fastden.kernels._conv import launch_conv
from fastden.kernels._layout import channels_last
from fastden.kernels._tiles import ConvConfig


def upsample(x: Tensor, weight: Tensor, bias: Tensor | None = None, config: ConvConfig | None = None) -> Tensor:
    """Twice the height and width; arguments as :func:`fastden.ops.upsample`, or a kernel of 8 with a padding of 3.

    Returns:
        (N, O, 2 H, 2 W), channels-last.
    """
    # Output row 2 i + p reads input rows from i - t / 2 + p on, for a kernel of 2 t: for one of 4 i - 1 + p and i + p,
    # through its rows 3 - p and 1 - p. Its memory is in this order where fastden.fuse made it, and nothing is copied.
    weight = channels_last(weight.transpose(0, 1))
    padding = weight.shape[-1] // 4
    return launch_conv(
        channels_last(x), None, weight, bias, None, relu=False, padding=padding, phases=4, config=config
    )[0]


def why_not(x: Tensor, weight: Tensor, **_: Tensor) -> list[str]:
    """Why the kernel cannot do these shapes; empty where it can."""
    if tuple(weight.shape[2:]) != (4, 4):
        return [f"weight: kernel {tuple(weight.shape[2:])}; accepted: (4, 4)"]
    if weight.shape[0] != x.shape[1]:
        return [f"weight: {weight.shape[0]} input channels; accepted: {x.shape[1]}, those of x"]
    return []
