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
    # With a kernel of 2 t, output row 2 i + p reads input rows from i - t / 2 + p on. With a kernel of 4, these are the
    # rows i - 1 + p and i + p, with kernel rows 3 - p and 1 - p. Weights that fastden.fuse made have this order in
    # memory already, and are not copied.
    weight = channels_last(weight.transpose(0, 1))
    padding = weight.shape[-1] // 4
    return launch_conv(
        channels_last(x), None, weight, bias, None, relu=False, padding=padding, phases=4, config=config
    )[0]


def why_not(x: Tensor, weight: Tensor, **_: Tensor) -> list[str]:
    """Why the kernel does not support these shapes; empty if it does."""
    if tuple(weight.shape[2:]) != (4, 4):
        return [f"weight: kernel {tuple(weight.shape[2:])}; accepted: (4, 4)"]
    if weight.shape[0] != x.shape[1]:
        return [f"weight: {weight.shape[0]} input channels; accepted: {x.shape[1]}, those of x"]
    return []
