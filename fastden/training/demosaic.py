"""Colour filter arrays and demosaicing: how neighbours and channels come to share a sensor's noise.

Each function takes and returns float32 tensors (N, 3, H, W) or (N, 1, H, W) on any device.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

#: Colour (0 red, 1 green, 2 blue) of each pixel of the repeating cell.
BAYER = ((0, 1), (1, 2))
#: Fujifilm's cell of 6 x 6: every row and column holds all three colours.
X_TRANS = (
    (1, 2, 1, 1, 0, 1),
    (0, 1, 0, 2, 1, 2),
    (1, 2, 1, 1, 0, 1),
    (1, 0, 1, 1, 2, 1),
    (2, 1, 2, 0, 1, 0),
    (1, 0, 1, 1, 2, 1),
)
#: Kernels of Malvar, He and Cutler, "High-quality linear interpolation for demosaicing of Bayer-patterned color images"
#: (ICASSP 2004), in eighths: green at red or blue; red at green in red's row (its transpose: in red's column); red at
#: blue.
_GREEN = ((0, 0, -1, 0, 0), (0, 0, 2, 0, 0), (-1, 2, 4, 2, -1), (0, 0, 2, 0, 0), (0, 0, -1, 0, 0))
_ROW = ((0, 0, 0.5, 0, 0), (0, -1, 0, -1, 0), (-1, 4, 5, 4, -1), (0, -1, 0, -1, 0), (0, 0, 0.5, 0, 0))
_CROSS = ((0, 0, -1.5, 0, 0), (0, 2, 0, 2, 0), (-1.5, 0, 6, 0, -1.5), (0, 2, 0, 2, 0), (0, 0, -1.5, 0, 0))


def color_masks(pattern: tuple[tuple[int, ...], ...], height: int, width: int, shift: tuple[int, int]) -> Tensor:
    """Masks (1, 3, H, W), 1 where the pixel of a colour filter array has the channel's colour.

    Args:
        pattern: colours of the repeating cell.
        height, width: pixels.
        shift: rows and columns by which the cell is moved.
    """
    cell = torch.tensor(pattern)
    rows = (torch.arange(height) + shift[0]) % cell.shape[0]
    columns = (torch.arange(width) + shift[1]) % cell.shape[1]
    colors = cell[rows][:, columns]
    return torch.stack([(colors == channel).float() for channel in range(3)])[None]


def interpolate(samples: Tensor, masks: Tensor, kernel: Tensor) -> Tensor:
    """Keep each channel's samples; fill its gaps with a weighted mean of the samples around (normalised convolution).

    With the 3x3 tent this is bilinear demosaicing of a Bayer array; a 5x5 kernel reaches across X-Trans' cell.

    Args:
        samples: (N, C, H, W), zero where there is no sample.
        masks: (1, C, H, W).
        kernel: (k, k), k odd.
    """
    channels, pad = samples.shape[1], kernel.shape[0] // 2
    weight = kernel.to(samples).expand(channels, 1, -1, -1)

    def spread(x: Tensor) -> Tensor:
        return F.conv2d(F.pad(x, (pad, pad, pad, pad)), weight, groups=channels)

    filled = spread(samples) / spread(masks).clamp(min=1e-6)
    return torch.where(masks > 0, samples, filled)


def tent(radius: int) -> Tensor:
    """The (2 r + 1, 2 r + 1) kernel of linear interpolation over ``radius`` pixels."""
    line = (radius + 1 - torch.arange(-radius, radius + 1).abs()).float()
    return torch.outer(line, line)


def bilinear(raw: Tensor, masks: Tensor) -> Tensor:
    """Bilinear demosaicing: raw (N, 1, H, W) -> (N, 3, H, W)."""
    return interpolate(raw * masks, masks, tent(1))


def x_trans(raw: Tensor, masks: Tensor) -> Tensor:
    """Interpolation of an X-Trans mosaic: raw (N, 1, H, W) -> (N, 3, H, W)."""
    return interpolate(raw * masks, masks, tent(2))


def malvar(raw: Tensor, masks: Tensor) -> Tensor:
    """Gradient-corrected linear demosaicing (Malvar, He and Cutler 2004): raw (N, 1, H, W) -> (N, 3, H, W)."""
    padded = F.pad(raw, (2, 2, 2, 2), mode="reflect")
    row = torch.tensor(_ROW)
    kernels = torch.stack([torch.tensor(_GREEN, dtype=torch.float32), row, row.T, torch.tensor(_CROSS)])
    green, along_row, along_column, cross = F.conv2d(padded, (kernels[:, None] / 8).to(raw)).split(1, 1)
    red_mask, green_mask, blue_mask = masks.split(1, 1)
    # Rows with red samples: each pixel of such a row, or its horizontal neighbour, has red.
    red_row = (red_mask.amax(3, keepdim=True) > 0).expand_as(red_mask)
    at_green = green_mask > 0
    red = torch.where(at_green, torch.where(red_row, along_row, along_column), cross)
    blue = torch.where(at_green, torch.where(red_row, along_column, along_row), cross)
    return torch.cat(
        [
            torch.where(red_mask > 0, raw, red),
            torch.where(at_green, raw, green),
            torch.where(blue_mask > 0, raw, blue),
        ],
        1,
    )


def edge_directed(raw: Tensor, masks: Tensor) -> Tensor:
    """Green along the smaller gradient, red and blue by their difference to green: raw (N, 1, H, W) -> (N, 3, H, W).

    The method of Hamilton and Adams (US patent 5,629,734, expired). Noise decides the direction in flat areas, which
    draws it out into short lines: the maze pattern of many cameras.
    """
    padded = F.pad(raw, (2, 2, 2, 2), mode="reflect")
    height, width = raw.shape[2:]

    def moved(rows: int, columns: int) -> Tensor:
        return padded[:, :, 2 + rows : 2 + rows + height, 2 + columns : 2 + columns + width]

    left, right, up, down = moved(0, -1), moved(0, 1), moved(-1, 0), moved(1, 0)
    curve_h = 2 * raw - moved(0, -2) - moved(0, 2)
    curve_v = 2 * raw - moved(-2, 0) - moved(2, 0)
    slope_h = (left - right).abs() + curve_h.abs()
    slope_v = (up - down).abs() + curve_v.abs()
    horizontal, vertical = (left + right) / 2 + curve_h / 4, (up + down) / 2 + curve_v / 4
    chosen = torch.where(slope_h < slope_v, horizontal, vertical)
    green = torch.where(masks[:, 1:2] > 0, raw, chosen)
    sampled = masks[:, [0, 2]]
    differences = interpolate((raw - green) * sampled, sampled, tent(1))
    return torch.cat([green + differences[:, :1], green, green + differences[:, 1:]], 1)
