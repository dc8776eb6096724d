"""upsample on Triton: the transposed convolution as four 2x2 convolutions, one for each parity of the output pixel."""

from __future__ import annotations

from torch import Tensor

from fastden.kernels._conv import launch_conv
from fastden.kernels._layout import channels_last
from fastden.kernels._packed import PACKED
from fastden.kernels._tiles import ConvConfig


def upsample(x: Tensor, weight: Tensor, bias: Tensor | None = None, config: ConvConfig | None = None) -> Tensor:
    """Twice the height and width; arguments as :func:`fastden.ops.upsample`, or a kernel of 8 with a padding of 3.

    Returns:
        (N, O, 2 H, 2 W), channels-last.
    """
    weight = PACKED.get(phase_weights, weight)
    padding = weight.shape[-1] // 2
    return launch_conv(
        channels_last(x), None, weight, bias, None, relu=False, padding=padding, phases=4, config=config
    )[0]


def phase_weights(weight: Tensor) -> Tensor:
    """The kernels of the four phases: (C, O, 2 t, 2 t) -> (4, O, C, t, t), each channels-last; t is even.

    Output row 2 i + p reads input rows from i - t / 2 + p on; for a kernel of 4 i - 1 + p and i + p, through its rows
    3 - p and 1 - p.
    """
    channels, outputs, kernel = weight.shape[:3]
    t = kernel // 2
    # Kernel row 2 t - 1 - p - 2 i is tap i of phase p: reversed, row r = 2 i + p.
    taps = weight.flip(2, 3).view(channels, outputs, t, 2, t, 2)  # C, O, t_y, p_y, t_x, p_x
    ordered = taps.permute(3, 5, 1, 2, 4, 0).reshape(4, outputs, t, t, channels)
    return ordered.contiguous().permute(0, 1, 4, 2, 3)


def why_not(x: Tensor, weight: Tensor, **_: Tensor) -> list[str]:
    """Why the kernel cannot do these shapes; empty where it can."""
    if tuple(weight.shape[2:]) != (4, 4):
        return [f"weight: kernel {tuple(weight.shape[2:])}; accepted: (4, 4)"]
    if weight.shape[0] != x.shape[1]:
        return [f"weight: {weight.shape[0]} input channels; accepted: {x.shape[1]}, those of x"]
    return []
