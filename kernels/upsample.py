"""upsample on Triton: the transposed convolution as four 2x2 convolutions, one for each parity of the output pixel."""

from __future__ import annotations

from torch import Tensor

from fastden.kernels._common import Specimen, channels_last
from fastden.kernels._conv import ConvConfig, conv_specimen, launch_conv
from fastden.kernels._packed import PACKED


def upsample(x: Tensor, weight: Tensor, bias: Tensor | None = None, config: ConvConfig | None = None) -> Tensor:
    """Twice the height and width; arguments as :func:`fastden.ops.upsample`.

    Returns:
        (N, O, 2 H, 2 W), channels-last.
    """
    weight = PACKED.get(phase_weights, weight)
    return launch_conv(channels_last(x), None, weight, bias, None, relu=False, padding=1, phases=4, config=config)[0]


def phase_weights(weight: Tensor) -> Tensor:
    """The kernels of the four phases: (C, O, 4, 4) -> (4, O, C, 2, 2), each channels-last.

    Output row 2 i + p reads input rows i - 1 + p and i + p, through rows 3 - p and 1 - p of the kernel.
    """
    channels, outputs = weight.shape[:2]
    # Kernel row 3 - p - 2 t is tap t of phase p: reversed, row r = 2 t + p.
    taps = weight.flip(2, 3).view(channels, outputs, 2, 2, 2, 2)  # C, O, t_y, p_y, t_x, p_x
    ordered = taps.permute(3, 5, 1, 2, 4, 0).reshape(4, outputs, 2, 2, channels)
    return ordered.contiguous().permute(0, 1, 4, 2, 3)


def why_not(x: Tensor, weight: Tensor, **_: Tensor) -> list[str]:
    """Why the kernel cannot do these shapes; empty where it can."""
    if tuple(weight.shape[2:]) != (4, 4):
        return [f"weight: kernel {tuple(weight.shape[2:])}; accepted: (4, 4)"]
    return []


def specimens() -> list[Specimen]:
    """Default kernels at the network's sizes, for checks by compilation alone."""
    return [
        conv_specimen("upsample up2", dtype, channels=128, outputs=32, kernel=2, phases=4, relu=False)
        for dtype in ("bf16", "fp16")
    ]
