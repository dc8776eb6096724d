"""Tiles of the fused network's activations on a CPU: their spans, their inputs with neighbours, joined phases."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from fastden.ops.activations import FEW_POSITIONS


def channels_last_empty(n: int, c: int, h: int, w: int, dtype: torch.dtype) -> Tensor:
    """An uninitialised CPU tensor (n, c, h, w), channels-last."""
    return torch.empty(n, h, w, c, dtype=dtype, device="cpu").permute(0, 3, 1, 2)


def gathered(
    skip: Tensor, upsampled: Tensor, rows: tuple[int, int], columns: tuple[int, int], outside: int = 0
) -> Tensor:
    """Build conv3's input for the given output rows and columns.

    The result holds the channels of both sources, and one more pixel on each side.

    Args:
        skip: (N, A, H, W), the first source.
        upsampled: (N, B, H, W), the second source.
        rows, columns: [start, stop) of the outputs.
        outside: value beyond the image in the channels of the second source, where it stands for zero.

    Returns:
        (N, A + B, rows + 2, columns + 2), channels-last.
    """
    n, a, height, width = skip.shape
    sides = rows[1] - rows[0] + 2, columns[1] - columns[0] + 2
    whole = (rows, columns) == ((0, height), (0, width))
    if whole and outside == 0 and n * sides[0] * sides[1] <= FEW_POSITIONS:
        return F.pad(torch.cat([skip, upsampled], 1), (1, 1, 1, 1))
    tile = channels_last_empty(n, a + upsampled.shape[1], *sides, skip.dtype)
    top, bottom = max(rows[0] - 1, 0), min(rows[1] + 1, height)
    left, right = max(columns[0] - 1, 0), min(columns[1] + 1, width)
    into = tile[:, :, top - rows[0] + 1 : bottom - rows[0] + 1, left - columns[0] + 1 : right - columns[0] + 1]
    into[:, :a] = skip[:, :, top:bottom, left:right]
    into[:, a:] = upsampled[:, :, top:bottom, left:right]
    # conv3 sees zeros beyond the image.
    at_edge = rows[0] == 0, rows[1] == height, columns[0] == 0, columns[1] == width
    edges = tile[:, :, 0], tile[:, :, -1], tile[:, :, :, 0], tile[:, :, :, -1]
    for edge in (edge for edge, reached in zip(edges, at_edge, strict=True) if reached):
        edge[:, :a] = 0
        edge[:, a:] = outside
    return tile


def tile_spans(length: int, tile: int) -> list[tuple[int, int]]:
    """Split [0, length) into the fewest spans [start, stop) of at most ``tile``; their lengths are nearly equal."""
    count = -(-length // tile)
    return [(length * i // count, length * (i + 1) // count) for i in range(count)]


def tile_regions(outputs: int, inputs: int, tile: int, before: int, behind: int) -> list[tuple[int, int, int, int]]:
    """Split an axis into tiles. A tile makes the outputs [start, stop) and reads the inputs [first, last).

    All tiles read the same number of inputs, also at the borders. So there are few shapes; weights are packed for each
    shape.

    Args:
        outputs, inputs: lengths of the axis.
        tile: largest number of outputs of a tile.
        before, behind: number of inputs that an output needs before and behind its own position, where they exist.

    Returns:
        ``(start, stop, first, last)`` of each tile.
    """
    spans = tile_spans(outputs, tile)
    size = min(max(stop - start for start, stop in spans) + before + behind, inputs)
    firsts = [min(max(start - before, 0), inputs - size) for start, _ in spans]
    return [(start, stop, first, first + size) for (start, stop), first in zip(spans, firsts, strict=True)]


def join_phases(phases: Tensor) -> Tensor:
    """Move the four phases of :func:`fastden.algebra.phase_weights` to their pixels.

    Args:
        phases: (N, 4 O, h + 1, w + 1), the results for the concatenated weights.

    Returns:
        (N, O, 2 h, 2 w), channels-last.
    """
    n, channels, height, width = phases.shape
    h, w, c = height - 1, width - 1, channels // 4
    image, channel, row, column = phases.stride()
    # Phase p of an axis is read from index p on. One view holds all phases, so that one copy moves them.
    size, stride = (n, h, 2, w, 2, c), (image, row, row + 2 * c * channel, column, column + c * channel, channel)
    return phases.as_strided(size, stride).contiguous().view(n, 2 * h, 2 * w, c).permute(0, 3, 1, 2)
