"""The padding in front of the network: by reflection, up to the next size that it can halve twice."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

#: Image height and width behind conv0 must be multiples of this: two stages of stride 2.
ALIGNMENT = 4
#: Padding of the image on each side: half of what conv0 (5x5) and out (3x3), both unpadded, take off.
BORDER = 3


def padding_for(size: int) -> tuple[int, int]:
    """Pixels to add before and after an axis of ``size`` pixels, so that conv0's output is a multiple of 4."""
    behind_conv0 = size + 2 * BORDER - 4
    # At least two pixels at quarter resolution: batch statistics need them, and oneDNN 3.12's bf16 convolution reads
    # memory that nothing wrote where an output is one column wide.
    aligned = max(behind_conv0 + (-behind_conv0) % ALIGNMENT, 2 * ALIGNMENT)
    return BORDER, BORDER + aligned - behind_conv0


def pad_image(x: Tensor) -> Tensor:
    """Reflect-pad (N, C, H, W) for the network: 3 pixels a side, and up to the next multiple behind conv0."""
    height, width = x.shape[2], x.shape[3]
    if torch.compiler.is_exporting():
        # One way for every size: the choice below would tie the exported graph to the sizes for which it holds.
        rows = _exported_index(height, x.device)
        columns = _exported_index(width, x.device)
        return x[:, :, rows][:, :, :, columns]
    (top, bottom), (left, right) = padding_for(height), padding_for(width)
    if height > bottom and width > right:
        return F.pad(x, (left, right, top, bottom), mode="reflect")
    # Smaller than the padding: reflect back and forth, which F.pad refuses.
    rows = reflected_index(-top, height + bottom, height, x.device)
    columns = reflected_index(-left, width + right, width, x.device)
    return x[:, :, rows][:, :, :, columns]


def reflected_index(start: int, stop: int, size: int, device: torch.device) -> Tensor:
    """Indices in [0, size) of the positions [start, stop) of an axis that is mirrored at its end pixels for ever."""
    period = max(2 * (size - 1), 1)
    index = torch.arange(start, stop, device=device) % period
    return torch.minimum(index, period - index) if size > 1 else torch.zeros_like(index)


def _exported_index(size: int, device: torch.device) -> Tensor:
    """:func:`reflected_index` of the padded axis, without a question about ``size``, which may be symbolic."""
    length = ALIGNMENT * torch.sym_max((size + 5) // ALIGNMENT, 2) + ALIGNMENT
    period = torch.sym_max(2 * (size - 1), 1)
    index = (torch.arange(length, device=device) - BORDER) % period
    # Of an axis of one pixel the period is 1 and the index 0; the other side of the minimum is 1.
    return torch.minimum(index, period - index)
