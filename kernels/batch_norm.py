"""Batch normalisation in training: statistics, the affine map with ReLU, and its gradient.

Most convolutions compute their statistics in their own epilogue (``_conv.py``). For the others, :func:`statistics`
reads a tensor.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastden.kernels._common import device_guard, multiprocessors
from fastden.kernels._layout import channels_last

#: Bytes that an element-wise tile reads from one tensor. Not measured on a GPU. Twice as many in float32 spill on sm_90
#: and sm_100 (Triton 3.9), in the gradient of a result with a residual.
TILE_BYTES = 16 << 10
#: Elements of a tile of :func:`statistics`. A program holds the whole tile: twice as many spill on sm_90.
STATISTICS_ELEMENTS = 64 * 64
#: Largest number of channels of a tile.
LARGEST_BLOCK = 256
#: Tiles and channels that a program of :func:`combine` holds at once, and its warps. The channels are few, to get
#: several programs; their 32 bytes are what memory hands out at least. Of 64 crops of 128 x 128 the stem has 8,192
#: tiles: 16 steps in each of two loops, on 16 programs.
COMBINED_TILES, COMBINED_CHANNELS, COMBINED_WARPS = 512, 8, 8
#: Bytes that a step of the gradient's sums reads from one tensor, and its warps: a sum for each place of the tile stays
#: in registers. At most 99 of them in bfloat16 (sm_80, sm_90, sm_100; Triton 3.6 and 3.9): a multiprocessor holds two
#: programs. Twice the bytes spill on sm_90 and sm_100 (Triton 3.9), and so does half the warps with a sum in each step.
SUMS_BYTES, SUMS_WARPS = 8 << 10, 8
#: Largest number of elements that one program of the gradient's sums adds up.
REDUCTION_ELEMENTS = 4096 * 64
#: Programs of the gradient's sums for each multiprocessor, where there are rows. With the above alone, layers of
#: 64 crops of 128 x 128 had 8 to 64 programs on 132 multiprocessors.
REDUCTION_PROGRAMS = 2


def tile(channels: int, elements: int) -> tuple[int, int]:
    """Rows (pixels) and channels of a tile: all channels if they are few enough, so that programs read whole rows.

    The widths of the network are powers of two, so every GPU thread of a tile has a channel.
    """
    block = min(LARGEST_BLOCK, max(16, int(triton.next_power_of_2(channels))))
    return elements // block, block


# The numbers of tiles and rows are not compiled in.
@triton.jit(do_not_specialize=["tiles", "rows"])
def combine_kernel(
    statistics_ptr,
    mean_ptr,
    rstd_ptr,
    unbiased_ptr,
    tiles,
    rows,
    eps,
    C: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_TILES: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
):
    """Mean, 1 / sqrt(variance + eps) and unbiased variance of BLOCK_CHANNELS channels from each tile's statistics."""
    channel = tl.program_id(0) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    exists = channel < C
    index = tl.arange(0, BLOCK_TILES)
    total = tl.cast(rows, tl.int64)
    count = total.to(tl.float32)
    # Averages the differences to the first mean. They are small even if the mean is large against the deviation.
    first = tl.load(statistics_ptr + channel, mask=exists, other=0.0)
    # A sum for each place of the block, and one sum of those behind the loop: with a sum in each step, the warps would
    # wait for each other at its barriers.
    difference = tl.zeros((BLOCK_TILES, BLOCK_CHANNELS), tl.float32)
    start = tl.cast(0, tl.int64)
    # No tl.range: with numpy 2.4, the interpreter of Triton 3.6 cannot handle its bounds.
    while start < tiles:
        tile = start + index
        mask = (tile < tiles)[:, None] & exists[None, :]
        in_tile = tl.minimum(tl.maximum(total - tile * BLOCK_ROWS, 0), BLOCK_ROWS).to(tl.float32)
        mean = tl.load(statistics_ptr + tile[:, None] * (2 * C) + channel[None, :], mask=mask, other=0.0)
        difference += tl.where(mask, (mean - first[None, :]) * in_tile[:, None], 0.0)
        start += BLOCK_TILES
    average = first + tl.sum(difference, 0) / count
    squares = tl.zeros((BLOCK_TILES, BLOCK_CHANNELS), tl.float32)
    start = tl.cast(0, tl.int64)
    while start < tiles:
        tile = start + index
        mask = (tile < tiles)[:, None] & exists[None, :]
        in_tile = tl.minimum(tl.maximum(total - tile * BLOCK_ROWS, 0), BLOCK_ROWS).to(tl.float32)
        source = statistics_ptr + tile[:, None] * (2 * C) + channel[None, :]
        mean = tl.load(source, mask=mask, other=0.0)
        deviation = tl.where(mask, mean - average[None, :], 0.0)
        squares += tl.load(source + C, mask=mask, other=0.0) + deviation * deviation * in_tile[:, None]
        start += BLOCK_TILES
    total_squares = tl.sum(squares, 0)
    tl.store(mean_ptr + channel, average, mask=exists)
    tl.store(rstd_ptr + channel, 1.0 / tl.sqrt(total_squares / count + eps), mask=exists)
    tl.store(unbiased_ptr + channel, total_squares / (count - 1.0), mask=exists)


def combine(statistics: Tensor, count: int, block: int, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Statistics of all rows, from the mean and the sum of squared deviations of each tile (Chan et al. 1979).

    Args:
        statistics: (tiles, 2, C), float32.
        count: number of all rows, at least 2.
        block: rows of every tile except the last.
        eps: the normalisation's epsilon.

    Returns:
        Mean, 1 / sqrt(biased variance + eps), and unbiased variance, each (C,) float32.
    """
    tiles, _, channels = statistics.shape
    merged = [statistics.new_empty(channels) for _ in range(3)]
    with device_guard(statistics):
        combine_kernel[(triton.cdiv(channels, COMBINED_CHANNELS),)](
            statistics, *merged, tiles, count, eps, C=channels, BLOCK_ROWS=block, BLOCK_TILES=COMBINED_TILES,
            BLOCK_CHANNELS=COMBINED_CHANNELS, num_warps=COMBINED_WARPS,
        )  # fmt: skip
    mean, rstd, unbiased = merged
    return mean, rstd, unbiased


@triton.jit(do_not_specialize=["rows"])
def statistics_kernel(
    x_ptr, statistics_ptr, rows, C: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr
):
    """Mean and sum of squared deviations of each channel over one tile of rows of (rows, C)."""
    tile = tl.program_id(0).to(tl.int64)
    row = tile * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    channel = tl.program_id(1) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    mask = (row < rows)[:, None] & (channel < C)[None, :]
    x = tl.load(x_ptr + row[:, None] * C + channel[None, :], mask=mask, other=0.0).to(tl.float32)
    mean = tl.sum(x, 0) / tl.minimum(rows - tile * BLOCK_ROWS, BLOCK_ROWS).to(tl.float32)
    deviation = tl.where(mask, x - mean[None, :], 0.0)
    target = statistics_ptr + tile * (2 * C) + channel
    tl.store(target, mean, mask=channel < C)
    tl.store(target + C, tl.sum(deviation * deviation, 0), mask=channel < C)


def statistics(x: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, 1 / sqrt(biased variance + eps) and unbiased variance of each channel of (N, C, H, W): (C,) float32."""
    x = channels_last(x)
    channels = x.shape[1]
    rows = x.numel() // channels
    block_rows, block = tile(channels, STATISTICS_ELEMENTS)
    tiles = triton.cdiv(rows, block_rows)
    tile_statistics = torch.empty((tiles, 2, channels), dtype=torch.float32, device=x.device)
    with device_guard(x):
        statistics_kernel[(tiles, triton.cdiv(channels, block))](
            x, tile_statistics, rows, C=channels, BLOCK_ROWS=block_rows, BLOCK_CHANNELS=block
        )
    return combine(tile_statistics, rows, block_rows, eps)


@triton.jit(do_not_specialize=["rows"])
def affine_kernel(
    x_ptr,
    mean_ptr,
    rstd_ptr,
    weight_ptr,
    bias_ptr,
    residual_ptr,
    y_ptr,
    rows,
    C: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    RELU: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
):
    """``relu((x - mean) * rstd * weight + bias + residual)`` of (rows, C).

    It subtracts the mean first, to avoid cancellation.
    """
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    channel = tl.program_id(1) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    mask = (row < rows)[:, None] & (channel < C)[None, :]
    offset = row[:, None] * C + channel[None, :]
    scale = tl.load(weight_ptr + channel, mask=channel < C, other=0.0).to(tl.float32)
    scale *= tl.load(rstd_ptr + channel, mask=channel < C, other=0.0)
    bias = tl.load(bias_ptr + channel, mask=channel < C, other=0.0).to(tl.float32)
    mean = tl.load(mean_ptr + channel, mask=channel < C, other=0.0)
    x = tl.load(x_ptr + offset, mask=mask, other=0.0).to(tl.float32)
    y = (x - mean[None, :]) * scale[None, :] + bias[None, :]
    if HAS_RESIDUAL:
        y += tl.load(residual_ptr + offset, mask=mask, other=0.0).to(tl.float32)
    if RELU:
        y = tl.where(y < 0.0, 0.0, y)
    tl.store(y_ptr + offset, y.to(y_ptr.dtype.element_ty), mask=mask)


def affine(
    x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, relu: bool
) -> Tensor:
    """``relu((x - mean) * rstd * weight + bias + residual)``.

    Args:
        x: (N, C, H, W).
        mean, rstd: (C,), float32.
        weight, bias: (C,).
        residual: as ``x``, or None.
        relu: whether the ReLU is applied.
    """
    x = channels_last(x)
    residual = None if residual is None else channels_last(residual)
    mean, rstd, weight, bias = (vector.contiguous() for vector in (mean, rstd, weight, bias))
    y = torch.empty_like(x, memory_format=torch.channels_last)
    if not x.numel():
        return y
    channels = x.shape[1]
    rows = x.numel() // channels
    block_rows, block = tile(channels, TILE_BYTES // x.element_size())
    grid = (triton.cdiv(rows, block_rows), triton.cdiv(channels, block))
    with device_guard(x):
        affine_kernel[grid](
            x, mean, rstd, weight, bias, x if residual is None else residual, y, rows,
            C=channels, HAS_RESIDUAL=residual is not None, RELU=relu, BLOCK_ROWS=block_rows, BLOCK_CHANNELS=block,
        )  # fmt: skip
    return y


# The rows of a program follow those of the image and the GPU: they are not compiled in.
@triton.jit(do_not_specialize=["rows", "program_rows"])
def gradient_sums_kernel(
    grad_ptr,
    y_ptr,
    raw_ptr,
    mean_ptr,
    rstd_ptr,
    weight_ptr,
    bias_ptr,
    sums_ptr,
    rows,
    program_rows,
    C: tl.constexpr,
    RELU: tl.constexpr,
    HAS_RESULT: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
):
    """Each program sums two values over its rows: the gradient ``g`` of the ReLU's input, and ``g * normalised``.

    There is a sum for each place of the tile, and one sum of those behind the loop, as in :func:`combine_kernel`.
    """
    program = tl.program_id(0).to(tl.int64)
    channel = tl.program_id(1) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    mean = tl.load(mean_ptr + channel, mask=channel < C, other=0.0)
    rstd = tl.load(rstd_ptr + channel, mask=channel < C, other=0.0)
    scale = tl.load(weight_ptr + channel, mask=channel < C, other=0.0).to(tl.float32) * rstd
    bias = tl.load(bias_ptr + channel, mask=channel < C, other=0.0).to(tl.float32)
    total = tl.zeros((BLOCK_ROWS, BLOCK_CHANNELS), tl.float32)
    product = tl.zeros((BLOCK_ROWS, BLOCK_CHANNELS), tl.float32)
    first = program * program_rows
    end = tl.minimum(first + program_rows, rows)
    # No tl.range: with numpy 2.4, the interpreter of Triton 3.6 cannot handle its bounds.
    while first < end:
        row = first + tl.arange(0, BLOCK_ROWS)
        mask = (row < rows)[:, None] & (channel < C)[None, :]
        offset = row[:, None] * C + channel[None, :]
        grad = tl.load(grad_ptr + offset, mask=mask, other=0.0).to(tl.float32)
        centred = tl.load(raw_ptr + offset, mask=mask, other=0.0).to(tl.float32) - mean[None, :]
        if RELU:
            if HAS_RESULT:
                y = tl.load(y_ptr + offset, mask=mask, other=0.0).to(tl.float32)
            else:
                y = centred * scale[None, :] + bias[None, :]
            grad = tl.where(y > 0.0, grad, 0.0)
        # Rows after the last have a gradient of 0.
        total += grad
        product += grad * centred
        first += BLOCK_ROWS
    target = sums_ptr + program * (2 * C) + channel
    tl.store(target, tl.sum(total, 0), mask=channel < C)
    tl.store(target + C, tl.sum(product, 0) * rstd, mask=channel < C)


@triton.jit(do_not_specialize=["rows"])
def gradient_kernel(
    grad_ptr,
    y_ptr,
    raw_ptr,
    mean_ptr,
    rstd_ptr,
    weight_ptr,
    bias_ptr,
    weight_grad_ptr,
    bias_grad_ptr,
    grad_raw_ptr,
    grad_residual_ptr,
    rows,
    C: tl.constexpr,
    RELU: tl.constexpr,
    HAS_RESULT: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
):
    """``weight * rstd * (g - mean(g) - normalised * mean(g * normalised))``; g is also the residual's gradient.

    ``g`` is the gradient of the ReLU's input. The two means are the gradients of BN's bias and weight, divided by the
    number of rows. If the result is not stored, its sign is computed again: without a residual, the result is
    ``relu((raw - mean) * weight * rstd + bias)``.
    """
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    channel = tl.program_id(1) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    mask = (row < rows)[:, None] & (channel < C)[None, :]
    offset = row[:, None] * C + channel[None, :]
    rstd = tl.load(rstd_ptr + channel, mask=channel < C, other=0.0)
    factor = tl.load(weight_ptr + channel, mask=channel < C, other=0.0).to(tl.float32) * rstd
    share = factor / tl.cast(rows, tl.int64).to(tl.float32)
    slope = -share * rstd * tl.load(weight_grad_ptr + channel, mask=channel < C, other=0.0)
    shift = -share * tl.load(bias_grad_ptr + channel, mask=channel < C, other=0.0)
    mean = tl.load(mean_ptr + channel, mask=channel < C, other=0.0)
    grad = tl.load(grad_ptr + offset, mask=mask, other=0.0).to(tl.float32)
    centred = tl.load(raw_ptr + offset, mask=mask, other=0.0).to(tl.float32) - mean[None, :]
    if RELU:
        if HAS_RESULT:
            y = tl.load(y_ptr + offset, mask=mask, other=0.0).to(tl.float32)
        else:
            bias = tl.load(bias_ptr + channel, mask=channel < C, other=0.0).to(tl.float32)
            y = centred * factor[None, :] + bias[None, :]
        grad = tl.where(y > 0.0, grad, 0.0)
    result = grad * factor[None, :] + centred * slope[None, :] + shift[None, :]
    tl.store(grad_raw_ptr + offset, result.to(grad_raw_ptr.dtype.element_ty), mask=mask)
    if HAS_RESIDUAL:
        tl.store(grad_residual_ptr + offset, grad.to(grad_residual_ptr.dtype.element_ty), mask=mask)


def rows_of_program(rows: int, block_rows: int, block: int, multiprocessors: int) -> int:
    """Rows that a program of the gradient's sums adds up: whole tiles, and so few that no multiprocessor is idle.

    The sums' order follows from them: their bits are the same at every call on GPUs of one kind.
    """
    share = triton.cdiv(rows, REDUCTION_PROGRAMS * multiprocessors)
    return int(triton.cdiv(max(1, min(REDUCTION_ELEMENTS // block, share)), block_rows) * block_rows)


def affine_gradient(
    grad: Tensor,
    y: Tensor | None,
    raw: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor,
    bias: Tensor,
    relu: bool,
    residual: bool,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """Gradients of ``relu(batch_norm(raw) + residual)`` with batch statistics.

    Args:
        grad: gradient of the result, (N, C, H, W).
        y: the result; may be None if there was no residual. Then its sign is computed again from ``raw``.
        raw: the convolution's output.
        mean, rstd: (C,), float32: batch mean, and 1 / sqrt(variance + eps).
        weight, bias: (C,), of BN.
        relu: whether there was a ReLU.
        residual: whether the residual's gradient is wanted.

    Returns:
        Gradients of ``raw``, the residual (or None), and BN's weight and bias. The last two are (C,) float32.
    """
    if y is None and residual:
        raise ValueError("y: None with a residual; accepted: the result")
    grad, raw = channels_last(grad), channels_last(raw)
    result = raw if y is None else channels_last(y)
    weight, bias = weight.contiguous(), bias.contiguous()
    channels = raw.shape[1]
    rows = raw.numel() // channels
    block_rows, block = tile(channels, TILE_BYTES // raw.element_size())
    sums_rows, _ = tile(channels, SUMS_BYTES // raw.element_size())
    program_rows = rows_of_program(rows, sums_rows, block, multiprocessors(raw, interpreted=4))
    programs = triton.cdiv(rows, program_rows)
    sums = torch.empty((programs, 2, channels), dtype=torch.float32, device=raw.device)
    blocks = triton.cdiv(channels, block)
    with device_guard(raw):
        gradient_sums_kernel[(programs, blocks)](
            grad, result, raw, mean, rstd, weight, bias, sums, rows, program_rows,
            C=channels, RELU=relu, HAS_RESULT=y is not None, BLOCK_ROWS=sums_rows, BLOCK_CHANNELS=block,
            num_warps=SUMS_WARPS,
        )  # fmt: skip
        bias_grad, weight_grad = sums[:, 0].sum(0), sums[:, 1].sum(0)
        grad_raw = torch.empty_like(raw, memory_format=torch.channels_last)
        grad_residual = torch.empty_like(raw, memory_format=torch.channels_last) if residual else None
        gradient_kernel[(triton.cdiv(rows, block_rows), blocks)](
            grad, result, raw, mean, rstd, weight, bias, weight_grad, bias_grad,
            grad_raw, grad_raw if grad_residual is None else grad_residual, rows,
            C=channels, RELU=relu, HAS_RESULT=y is not None, HAS_RESIDUAL=residual, BLOCK_ROWS=block_rows,
            BLOCK_CHANNELS=block,
        )  # fmt: skip
    return grad_raw, grad_residual, weight_grad, bias_grad
