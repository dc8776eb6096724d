"""stem on Triton: the 7x7 convolution of stride 2 as an implicit matrix product, one row of taps per step.

Three or four channels alone would use only a small part of a matrix instruction. So one step of the product takes a row
of seven taps with all their channels. The first row, the first column and the corner have their own weights. They have
their own tiles too, so that no tile computes anything twice.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from fastden.kernels._common import device_guard, dot, locate, precision
from fastden.kernels._packed import PACKED
from fastden.kernels._tuned import choose

SMALLEST = 8
TAPS = tl.constexpr(7)


@dataclass(frozen=True)
class StemConfig:
    """Sizes of a tile and how it is run: output pixels, output channels, warps, pipeline stages."""

    block_m: int
    block_n: int
    warps: int
    stages: int


def config_for(outputs: int, itemsize: int) -> StemConfig:
    """Default tile, not measured on a GPU.

    One tile has all output channels, so that the image is gathered once. Eight warps for 64 pixels take 64 registers
    per thread on sm_90. Four blocks then fit on a multiprocessor: one gathers while others multiply or store. Four
    warps spill on sm_80.
    """
    if itemsize > 2:
        return StemConfig(64, min(64, max(16, triton.next_power_of_2(outputs))), warps=8, stages=3)
    return StemConfig(64, min(128, max(16, triton.next_power_of_2(outputs))), warps=8, stages=3)


def pixel_room(channels: int) -> int:
    """Positions for a pixel's channels in a row of taps: a power of two, so that shifts can split an index."""
    return int(triton.next_power_of_2(channels))


def row_block(room: int) -> int:
    """Inner dimension of a step, which takes a row of taps."""
    return max(16, int(triton.next_power_of_2(TAPS.value * room)))


def is_dense(x: Tensor) -> bool:
    """Whether the channels of a pixel, and the pixels of a row, are contiguous in memory."""
    return x.stride(1) == 1 and x.stride(3) == x.shape[1]


@triton.jit
def gather(x_ptr, corner, exists, inner, wants):
    """(BLOCK_M, BLOCK_K) elements of an image, each ``inner`` elements after the ``corner`` of its row's window.

    Bit t of ``exists`` says whether column t of a window may be read. ``wants`` has the bit of each element's column,
    or no bit for an element that is always zero. An element whose column may not be read is zero too.
    """
    mask = (exists[:, None] & wants[None, :]) != 0
    return tl.load(x_ptr + (corner[:, None] + inner[None, :]), mask=mask, other=0.0)


@triton.jit
def _tile_pixels(tile, batch, out_height, out_width, BLOCK_M: tl.constexpr):
    """The region of a tile; and, for each of its pixels, the row, the column, the image, and whether it exists.

    Regions are the inside (0), the first row (1), the first column (2) and the corner (3).
    """
    images = tl.cast(batch, tl.int64)
    corner_tiles = tl.cdiv(images, BLOCK_M)
    column_tiles = corner_tiles + tl.cdiv(images * (out_height - 1), BLOCK_M)
    row_tiles = column_tiles + tl.cdiv(images * (out_width - 1), BLOCK_M)
    # Border regions come first, because the pixels of their tiles are the most scattered.
    region = 3 - (tile >= corner_tiles).to(tl.int32) - (tile >= column_tiles) - (tile >= row_tiles)
    begin = tl.where(
        region == 3, 0, tl.where(region == 2, corner_tiles, tl.where(region == 1, column_tiles, row_tiles))
    )
    first_row = region % 2
    first_column = region // 2
    region_height = tl.where(first_row == 1, 1, out_height - 1)
    region_width = tl.where(first_column == 1, 1, out_width - 1)
    first = (tile - begin) * BLOCK_M
    present = first + tl.arange(0, BLOCK_M) < images * region_height * region_width
    row, column, image = locate(first, tl.arange(0, BLOCK_M), region_height, region_width)
    # The inside region begins at row 1 and column 1.
    return region, row + (1 - first_row), column + (1 - first_column), image, present


@triton.jit
def _add_tap_rows(
    acc, x_ptr, w_ptr, start, stride_h, inner, exists, wants, first_row, outputs,
    OUTPUTS: tl.constexpr, ROW: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``acc`` plus the products of the seven rows of taps; the first row of the image has no row before it."""
    k = tl.arange(0, BLOCK_K)
    for step in range(TAPS):
        source = gather(
            x_ptr,
            start + tl.cast(step, tl.int64) * stride_h,
            tl.where(step >= first_row, exists, 0),
            inner,
            wants,
        )
        weights = tl.load(
            w_ptr + (outputs[:, None] * TAPS + step) * ROW + k[None, :],
            mask=(outputs < OUTPUTS)[:, None] & (k < ROW)[None, :],
            other=0.0,
        )
        acc = dot(source, tl.trans(weights), acc, PRECISION)
    return acc


# Sizes and strides of images are not compiled in: a new image size does not compile the kernel again.
@triton.jit(
    do_not_specialize=["batch", "out_height", "out_width", "stride_n", "stride_c", "stride_h", "stride_w"],
)
def stem_kernel(
    x_ptr,
    w_ptr,
    bias_ptr,
    y_ptr,
    batch,
    out_height,
    out_width,
    stride_n,
    stride_c,
    stride_h,
    stride_w,
    C: tl.constexpr,
    OUTPUTS: tl.constexpr,
    ROOM: tl.constexpr,
    ROW: tl.constexpr,
    DENSE: tl.constexpr,
    RELU: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One tile of one region. Each region has its own weights.

    Weights are (4, O, 7, ROW): a row of taps has ROOM positions for the channels of each tap, and then zeros.
    """
    region, row, column, image, present = _tile_pixels(tl.program_id(0), batch, out_height, out_width, BLOCK_M)
    target = ((image * out_height + row) * out_width + column) * OUTPUTS
    outputs = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    tap = k // ROOM
    channel = k % ROOM
    wants = tl.where((tap < TAPS) & (channel < C), 1 << tap, 0)
    # All seven taps, except on the first column: tap 0 would read one pixel before the image.
    exists = tl.where(present, 0b1111111 - region // 2, 0)
    if DENSE:
        inner = (tap * C + channel).to(tl.int64)
        left = (column * 2 - 1).to(tl.int64) * C
    else:
        inner = tap.to(tl.int64) * stride_w + channel.to(tl.int64) * stride_c
        left = (column * 2 - 1).to(tl.int64) * stride_w
    start = image * stride_n + (row * 2 - 1).to(tl.int64) * stride_h + left
    w_ptr += region * (OUTPUTS * TAPS * ROW)

    acc = _add_tap_rows(
        tl.zeros((BLOCK_M, BLOCK_N), tl.float32), x_ptr, w_ptr, start, stride_h, inner, exists, wants, region % 2,
        outputs, OUTPUTS, ROW, BLOCK_K, PRECISION,
    )  # fmt: skip
    acc += tl.load(bias_ptr + region * OUTPUTS + outputs, mask=outputs < OUTPUTS, other=0.0).to(tl.float32)[None, :]
    if RELU:
        # maximum(acc, 0) alone would hide a NaN.
        acc = tl.where(acc < 0.0, 0.0, acc)
    mask = present[:, None] & (outputs < OUTPUTS)[None, :]
    tl.store(y_ptr + target[:, None] + outputs[None, :], acc.to(y_ptr.dtype.element_ty), mask=mask)


def stem(x: Tensor, weight: Tensor, bias: Tensor, relu: bool = True, config: StemConfig | None = None) -> Tensor:
    """First feature map, BN folded; arguments as in :func:`fastden.ops.stem`. ``x`` may have any strides.

    Args:
        x: (N, C, H, W); H and W even, at least 8.
        weight: (4, O, C, 7, 7): inside, first row, first column, corner.
        bias: (4, O), in the same order.
        relu: whether the ReLU is applied.
        config: None for the default.

    Returns:
        (N, O, (H - 4) / 2, (W - 4) / 2), channels-last.
    """
    batch, channels, height, width = x.shape
    outputs = weight.shape[1]
    out_height, out_width = (height - 4) // 2, (width - 4) // 2
    shape = (batch, outputs, out_height, out_width)
    y = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    if batch == 0:
        return y
    config = config or choose(
        "stem", f"{channels} to {outputs}, {precision(x)}", batch * out_height * out_width, x,
        config_for(outputs, x.element_size()),
    )  # fmt: skip
    room = pixel_room(channels)
    block_k = row_block(room)
    # If the channels fill their positions, the kernel reads the weights without a copy; fastden.fuse arranges this.
    if room == channels:
        rows = weight.permute(0, 1, 3, 4, 2).contiguous().flatten(3)
    else:
        rows = PACKED.get(tap_rows, weight, room, block_k)
    regions = ((out_height - 1) * (out_width - 1), out_width - 1, out_height - 1, 1)
    tiles = sum(triton.cdiv(batch * pixels, config.block_m) for pixels in regions)
    with device_guard(x):
        stem_kernel[(tiles, triton.cdiv(outputs, config.block_n))](
            x, rows, bias.contiguous(), y, batch, out_height, out_width, *x.stride(),
            C=channels, OUTPUTS=outputs, ROOM=room, ROW=rows.shape[3], DENSE=is_dense(x), RELU=relu,
            BLOCK_M=config.block_m, BLOCK_N=config.block_n, BLOCK_K=block_k, PRECISION=precision(x),
            num_warps=config.warps, num_stages=config.stages,
        )  # fmt: skip
    return y


def tap_rows(weight: Tensor, room: int, block: int) -> Tensor:
    """Weights in the product's order: (..., C, rows, columns) -> (..., rows, positions); unused positions are zero.

    A row has ``room`` positions for the channels of each tap. The length of a row is a multiple of the block.
    """
    channels, rows, columns = weight.shape[-3:]
    taps = F.pad(weight.movedim(-3, -1), (0, room - channels)).reshape(*weight.shape[:-3], rows, columns * room)
    return F.pad(taps, (0, -columns * room % block)).contiguous()


def why_not(x: Tensor, weight: Tensor, bias: Tensor, **_: Tensor) -> list[str]:
    """Why the kernel does not support these shapes; empty if it does."""
    reasons = []
    if x.dim() != 4 or any(size % 2 or size < SMALLEST for size in x.shape[2:]):
        reasons.append(f"x: {tuple(x.shape)}; accepted: (N, C, H, W), H and W even and at least {SMALLEST}")
    elif tuple(weight.shape[:1] + weight.shape[2:]) != (4, x.shape[1], TAPS.value, TAPS.value):
        reasons.append(f"weight: {tuple(weight.shape)}; accepted: (4, O, {x.shape[1]}, {TAPS.value}, {TAPS.value})")
    if bias.shape != weight.shape[:2]:
        reasons.append(f"bias: {tuple(bias.shape)}; accepted: {tuple(weight.shape[:2])}")
    return reasons
