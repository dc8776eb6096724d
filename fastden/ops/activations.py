"""The folded input of oneDNN's convolutions: pairs of pixels as channels."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

#: Up to this many positions (N H W of the result), few operations that copy twice are faster than many operations that
#: copy once. In a trial whose figures were not kept, both ways were equal for 64 x 64 pixels.
FEW_POSITIONS = 1024


def fold(x: Tensor, dtype: torch.dtype, zero_channels: int = 0, outside: Tensor | None = None) -> Tensor:
    """Pad ``x`` by one pixel on each side, then apply ``pixel_unshuffle(2)``.

    The pixel in front aligns the windows of the stem and of the image's own path to pairs of pixels.

    Args:
        x: (N, C, H, W), H and W even.
        dtype: dtype of the result.
        zero_channels: number of zero channels that are added after the C channels.
        outside: (C,), values of the added pixels; None for zeros.

    Returns:
        (N, 4 (C + zero_channels), H / 2 + 1, W / 2 + 1), channels-last.
    """
    n, c, height, width = x.shape
    h, w = height // 2 + 1, width // 2 + 1
    if outside is None and n * h * w <= FEW_POSITIONS:
        padded = F.pad(x.to(dtype), (1, 1, 1, 1, 0, zero_channels))
        return F.pixel_unshuffle(padded, 2).contiguous(memory_format=torch.channels_last)
    folded = torch.empty(n, h, w, c + zero_channels, 2, 2, dtype=dtype, device=x.device)
    for edge in (folded[:, 0], folded[:, -1], folded[:, :, 0], folded[:, :, -1]):
        edge[..., :c, :, :] = 0 if outside is None else outside.to(dtype)[:, None, None]
    folded[:, :, :, c:] = 0
    pixels = x.permute(0, 2, 3, 1)
    # Four strided copies write each value once; pad, pixel_unshuffle and a change of layout write it three times.
    for row in (0, 1):
        for column in (0, 1):
            into = folded[:, 1 - row : h - row, 1 - column : w - column, :c, row, column]
            into.copy_(pixels[:, 1 - row :: 2, 1 - column :: 2])
    return folded.flatten(3).permute(0, 3, 1, 2)


def zeros_for(dtype: torch.dtype, channels: int) -> int:
    """The number of ``zero_channels`` with which convolutions of a folded input are fastest.

    oneDNN's bf16 kernels are three times slower on 12 channels, which are 3 folded ones, than on 16: a blind colour
    network gets a channel of zeros. Float32 is faster without it.
    """
    return 1 if dtype == torch.bfloat16 and channels == 3 else 0
