"""The padding before the network: reflection, up to the next size that can be halved twice."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from fastden.algebra import BORDER
from fastden.ops.tracing import exporting

#: Height and width of conv0's output must be multiples of this: there are two stages of stride 2.
ALIGNMENT = 4


def padding_for(size: int) -> tuple[int, int]:
    """Pixels to add before and after an axis of ``size`` pixels, so that conv0's output is a multiple of 4."""
    behind_conv0 = size + 2 * BORDER - 4
    # Quarter resolution has at least two pixels. Batch statistics need them, and oneDNN 3.12's bf16 convolution reads
    # uninitialised memory where an output is one column wide.
    aligned = max(behind_conv0 + (-behind_conv0) % ALIGNMENT, 2 * ALIGNMENT)
    return BORDER, BORDER + aligned - behind_conv0


def pad_image(x: Tensor) -> Tensor:
    """Reflect-pad (N, C, H, W) for the network: 3 pixels a side, and up to the next multiple of 4 after conv0."""
    height, width = x.shape[2], x.shape[3]
    if exporting():
        # The choice below would limit the exported graph to the sizes of the example.
        rows = exported_index(height, x.device)
        columns = exported_index(width, x.device)
        return x[:, :, rows][:, :, :, columns]
    (top, bottom), (left, right) = padding_for(height), padding_for(width)
    if height > bottom and width > right:
        return F.pad(x, (left, right, top, bottom), mode="reflect")
    # The image is smaller than the padding. F.pad refuses that; here the index goes back and forth.
    rows = reflected_index(-top, height + bottom, height, x.device)
    columns = reflected_index(-left, width + right, width, x.device)
    return x[:, :, rows][:, :, :, columns]


def reflected_index(start: int, stop: int, size: int, device: torch.device) -> Tensor:
    """Indices in [0, size) for the positions [start, stop) of an axis that is mirrored at its end pixels."""
    period = max(2 * (size - 1), 1)
    index = torch.arange(start, stop, device=device) % period
    return torch.minimum(index, period - index) if size > 1 else torch.zeros_like(index)


def exported_index(size: int, device: torch.device) -> Tensor:
    """:func:`reflected_index` of the padded axis. ``size`` may be symbolic: no condition depends on it."""
    quarter = (size + 5) // ALIGNMENT
    # At least 2, as in padding_for. PyTorch 2.14 cannot prove its own guards on sym_max(quarter, 2).
    length = ALIGNMENT * (quarter + 1 // quarter) + ALIGNMENT
    period = torch.sym_max(2 * (size - 1), 1)
    index = (torch.arange(length, device=device) - BORDER) % period
    # An axis of one pixel has the period 1: index is 0, period - index is 1, and the minimum is 0.
    return torch.minimum(index, period - index)
