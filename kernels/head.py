"""head on Triton: the last feature map and the padded input to the image, as one implicit matrix product.

Rows of the product are squares of GROUP x GROUP pixels at half resolution, which share most of the features that they
read; columns are the 2 GROUP x 2 GROUP pixels of the image that each makes, by channel. The inner dimension runs over
the group's window of features, then over its window of the input.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from fastden.kernels._common import channels_last, device_guard, dot, locate, precision
from fastden.kernels._packed import PACKED
from fastden.kernels.stem import SMALLEST, gather, is_dense, pixel_room, tap_rows


@dataclass(frozen=True)
class HeadConfig:
    """Sizes of a tile and how it is run: groups, columns, features, side of a group, warps, pipeline stages."""

    block_m: int
    block_n: int
    block_k: int
    group: int
    warps: int
    stages: int


def config_for(features: int, channels: int, itemsize: int) -> HeadConfig:
    """Default tile, not measured on a GPU.

    With groups of 2x2 a tile reads 25 features for 4 pixels instead of 16 for each, at 48 of 64 columns' worth of
    products: the few columns of one pixel would make reading, not arithmetic, the limit.
    """
    group = 2
    block_n = min(64, max(16, triton.next_power_of_2(4 * channels * group**2)))
    block_k = min(64 if itemsize <= 2 else 32, max(16, triton.next_power_of_2(features)))
    # Eight warps for 64 groups: with 128, Triton 3.9 (not 3.6) holds the addresses of 16 groups a thread, and spills.
    return HeadConfig(64, block_n, block_k, group, warps=8 if itemsize <= 2 else 4, stages=3)


def row_block(columns: int, room: int) -> int:
    """Inner dimension of a step over the input. More than 32 would spill registers: each element has its address."""
    return min(32, max(16, triton.next_power_of_2(columns * room)))


# Sizes and strides of images are no part of the compiled kernel: no new image size compiles it again.
@triton.jit(
    do_not_specialize=[
        *("batch", "height", "width", "stride_n", "stride_c", "stride_h", "stride_w"),
        *("image_stride_n", "image_stride_c", "image_stride_h", "image_stride_w"),
    ],
)
def head_kernel(
    features_ptr,
    x_ptr,
    image_ptr,
    w_ptr,
    image_w_ptr,
    bias_ptr,
    y_ptr,
    batch,
    height,
    width,
    stride_n,
    stride_c,
    stride_h,
    stride_w,
    image_stride_n,
    image_stride_c,
    image_stride_h,
    image_stride_w,
    M: tl.constexpr,
    C: tl.constexpr,
    K: tl.constexpr,
    ROOM: tl.constexpr,
    DENSE: tl.constexpr,
    GROUP: tl.constexpr,
    SKIPPED: tl.constexpr,
    ADD_INPUT: tl.constexpr,
    CLAMP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_ROW: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One tile of the image; ``height`` and ``width`` are those of the features.

    Group (a, b) makes the pixels from (2 GROUP a - SKIPPED, 2 GROUP b - SKIPPED) on, from a window of features whose
    corner is (GROUP a - 1, GROUP b - 1). Weights are (columns, window, window, M) and (columns, rows, places), where a
    row of the input's window has ROOM places for the channels of each pixel, and zeros to whole blocks of BLOCK_ROW.
    """
    SIDE: tl.constexpr = 2 * GROUP
    COLUMNS: tl.constexpr = K * SIDE * SIDE
    WINDOW: tl.constexpr = GROUP + 3 - SKIPPED
    PATCH: tl.constexpr = SIDE + 6
    out_height = 2 * height - 2
    out_width = 2 * width - 2
    groups_down = tl.cdiv(out_height + SKIPPED, SIDE)
    groups_across = tl.cdiv(out_width + SKIPPED, SIDE)

    # 64 bits from here on: a 24-megapixel image with 256 channels has more elements than 32 bits count.
    first = tl.program_id(0).to(tl.int64) * BLOCK_M
    index = tl.arange(0, BLOCK_M)
    present = first + index < tl.cast(batch, tl.int64) * groups_down * groups_across
    a, b, n = locate(first, index, groups_down, groups_across)
    outputs = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)

    top = a * GROUP - 1
    left = b * GROUP - 1
    start = ((n * height + top) * width + left) * M
    STEPS: tl.constexpr = (M + BLOCK_K - 1) // BLOCK_K
    k = tl.arange(0, BLOCK_K)
    for step in range(WINDOW * WINDOW * STEPS):
        tap = step // STEPS
        down = tap // WINDOW
        across = tap % WINDOW
        channel = (step % STEPS) * BLOCK_K + k
        inside = present & (top + down >= 0) & (top + down < height) & (left + across >= 0) & (left + across < width)
        source = tl.load(
            features_ptr + (start + (tl.cast(down, tl.int64) * width + across) * M)[:, None] + channel[None, :],
            mask=inside[:, None] & (channel < M)[None, :],
            other=0.0,
        )
        weights = tl.load(
            w_ptr + (outputs[:, None] * (WINDOW * WINDOW) + tap) * M + channel[None, :],
            mask=(outputs < COLUMNS)[:, None] & (channel < M)[None, :],
            other=0.0,
        )
        acc = dot(source, tl.trans(weights), acc, PRECISION)

    top = a * SIDE - SKIPPED
    left = b * SIDE - SKIPPED
    start = n * stride_n + top.to(tl.int64) * stride_h
    if DENSE:
        start += left.to(tl.int64) * C
    else:
        start += left.to(tl.int64) * stride_w
    # The input is larger than the features by 2 pixels on each side, at full resolution.
    in_height = 2 * height + 4
    in_width = 2 * width + 4
    # Columns of the window that lie in the input, as bits: from -left on, up to in_width - left.
    exists = (1 << tl.minimum(in_width - left, PATCH)) - (1 << tl.maximum(-left, 0))
    PARTS: tl.constexpr = (PATCH * ROOM + BLOCK_ROW - 1) // BLOCK_ROW
    for step in range(PATCH * PARTS):
        down = step // PARTS
        place = (step % PARTS) * BLOCK_ROW + tl.arange(0, BLOCK_ROW)
        across = place // ROOM
        channel = place % ROOM
        wants = tl.where((across < PATCH) & (channel < C), 1 << across, 0)
        if DENSE:
            inner = (across * C + channel).to(tl.int64)
        else:
            inner = across.to(tl.int64) * stride_w + channel.to(tl.int64) * stride_c
        inside = present & (top + down >= 0) & (top + down < in_height)
        source = gather(x_ptr, start + tl.cast(down, tl.int64) * stride_h, tl.where(inside, exists, 0), inner, wants)
        weights = tl.load(
            image_w_ptr + (outputs[:, None] * PATCH + down) * (PARTS * BLOCK_ROW) + place[None, :],
            mask=(outputs < COLUMNS)[:, None],
            other=0.0,
        )
        acc = dot(source, tl.trans(weights), acc, PRECISION)

    # With the group's rows innermost, the threads of a warp run along groups, and have one each. They would run along a
    # group's columns, were those innermost, and keep the places of 16 groups in registers through both loops.
    channel = outputs // (SIDE * SIDE)
    across = outputs // SIDE % SIDE
    down = outputs % SIDE
    acc += tl.load(bias_ptr + channel, mask=outputs < COLUMNS, other=0.0).to(tl.float32)[None, :]
    # The group's rows and columns that lie in the image as bits, SIDE of each; one more bit that no group has.
    rows = (1 << tl.minimum(out_height - top, SIDE)) - (1 << tl.maximum(-top, 0))
    columns = (1 << tl.minimum(out_width - left, SIDE)) - (1 << tl.maximum(-left, 0))
    exists = tl.where(present, rows | (columns << SIDE), 0)
    wants = tl.where(outputs < COLUMNS, (1 << down) | (1 << (across + SIDE)), 1 << (2 * SIDE))
    kept = (exists[:, None] & wants[None, :]) == wants[None, :]
    if ADD_INPUT:
        corner = n * image_stride_n + (top + 3).to(tl.int64) * image_stride_h + (left + 3).to(tl.int64) * image_stride_w
        inner = channel.to(tl.int64) * image_stride_c + down.to(tl.int64) * image_stride_h
        inner += across.to(tl.int64) * image_stride_w
        acc += tl.load(image_ptr + (corner[:, None] + inner[None, :]), mask=kept, other=0.0).to(tl.float32)
    if CLAMP:
        # Comparisons, not maximum and minimum, which would hide a NaN.
        acc = tl.where(acc < 0.0, 0.0, acc)
        acc = tl.where(acc > 1.0, 1.0, acc)
    corner = (n * (K * out_height) + top) * out_width + left
    inner = (channel.to(tl.int64) * out_height + down) * out_width + across
    tl.store(y_ptr + (corner[:, None] + inner[None, :]), acc.to(y_ptr.dtype.element_ty), mask=kept)


def head(
    features: Tensor,
    x: Tensor,
    weight: Tensor,
    image_weight: Tensor,
    bias: Tensor,
    add_input: bool = True,
    clamp: bool = False,
    image: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    composed: bool = False,
    config: HeadConfig | None = None,
) -> Tensor:
    """Denoised image; arguments as :func:`fastden.ops.head` and below. A NaN shows in the pixels of its group too.

    Args:
        features: (N, M, h, w).
        x: (N, C, 2 h + 4, 2 w + 4), the network's input, read as it lies in memory.
        weight: (4 K, M, 4, 4).
        image_weight: (K, C, 7, 7).
        bias: (K,).
        add_input: whether the image is added.
        clamp: whether the result is limited to [0, 1].
        image: what is added, of the size of ``x``, K channels at least, with a dtype of its own; None for ``x``.
        out_dtype: of the result; None for that of ``features``. Sums are float32.
        composed: promises what :func:`fastden.algebra.compose_head` makes: phase 0 has no weight on the last row
            (column) of its taps, phase 1 none on the first. These are not read then: 9 taps instead of 16.
        config: None for the default.

    Returns:
        (N, K, 2 h - 2, 2 w - 2), contiguous.
    """
    batch, maps, height, width = features.shape
    channels, of_image = image_weight.shape[:2]
    out_height, out_width = 2 * height - 2, 2 * width - 2
    shape = (batch, channels, out_height, out_width)
    y = torch.empty(shape, dtype=out_dtype or features.dtype, device=features.device)
    if batch == 0:
        return y
    config = config or config_for(maps, channels, features.element_size())
    skipped, side = int(composed), 2 * config.group
    image = x if image is None else image
    room = pixel_room(of_image)
    block_row = row_block(side + 6, room)
    groups = batch * triton.cdiv(out_height + skipped, side) * triton.cdiv(out_width + skipped, side)
    grid = (triton.cdiv(groups, config.block_m), triton.cdiv(channels * side**2, config.block_n))
    with device_guard(features):
        head_kernel[grid](
            channels_last(features), x, image, PACKED.get(feature_weights, weight, config.group, composed),
            PACKED.get(image_weights, image_weight, config.group, room, block_row), bias.contiguous(), y,
            batch, height, width, *x.stride(), *image.stride(),
            M=maps, C=of_image, K=channels, ROOM=room, DENSE=is_dense(x), GROUP=config.group, SKIPPED=skipped,
            ADD_INPUT=add_input, CLAMP=clamp, BLOCK_M=config.block_m, BLOCK_N=config.block_n, BLOCK_K=config.block_k,
            BLOCK_ROW=block_row, PRECISION=precision(features), num_warps=config.warps, num_stages=config.stages,
        )  # fmt: skip
    return y


def slide(taps: Tensor, count: int) -> Tensor:
    """``count`` copies of the last dimension's taps, each a place further: (..., t) -> (..., count, count + t - 1)."""
    *lead, size = taps.shape
    # Rows of count + t elements, read as rows of one less: each falls one place behind the row before.
    rows = F.pad(taps, (0, count)).unsqueeze(-2).expand(*lead, count, size + count)
    return rows.flatten(-2)[..., : count * (size + count - 1)].unflatten(-1, (count, size + count - 1))


def slide_both(taps: Tensor, count: int) -> Tensor:
    """:func:`slide` on rows and columns: (..., t, u) -> (..., count, count + t - 1, count, count + u - 1)."""
    columns = slide(taps, count)  # ..., t, count, count + u - 1
    return slide(columns.movedim(-3, -1), count).movedim((-2, -1), (-4, -3))


def feature_weights(weight: Tensor, group: int, composed: bool) -> Tensor:
    """From a group's window of features to its pixels: (4 K, M, 4, 4) -> (K (2 group)^2, window, window, M)."""
    phases = weight.unflatten(0, (-1, 2, 2))  # K, p, q, M, 4, 4
    if composed:
        # Pixels 2 i - 1 (phase 1 of i - 1) and 2 i (phase 0 of i) both read the features i - 1, i and i + 1.
        rows = torch.stack([phases[:, 1, ..., 1:, :], phases[:, 0, ..., :3, :]], 1)
        phases = torch.stack([rows[:, :, 1, ..., 1:], rows[:, :, 0, ..., :3]], 2)
    moved = slide_both(phases, group)  # K, p, q, M, a, window, b, window
    return moved.permute(0, 6, 2, 4, 1, 5, 7, 3).flatten(0, 4).contiguous()


def image_weights(weight: Tensor, group: int, room: int, block: int) -> Tensor:
    """From a group's window of the input to its pixels: (K, C, 7, 7) -> (K (2 group)^2, rows, places)."""
    windows = slide_both(weight, 2 * group).permute(0, 4, 2, 1, 3, 5).flatten(0, 2)
    return tap_rows(windows, room, block)


def why_not(features: Tensor, x: Tensor, weight: Tensor, image_weight: Tensor, bias: Tensor, **_: Tensor) -> list[str]:
    """Why the kernel cannot do these shapes; empty where it can."""
    if x.dim() != 4 or any(size % 2 or size < SMALLEST for size in x.shape[2:]):
        return [f"x: {tuple(x.shape)}; accepted: (N, C, H, W), H and W even and at least {SMALLEST}"]
    batch, channels, height, width = x.shape
    reasons = []
    if features.dim() != 4 or (features.shape[0], *features.shape[2:]) != (batch, (height - 4) // 2, (width - 4) // 2):
        accepted = f"({batch}, M, {(height - 4) // 2}, {(width - 4) // 2})"
        reasons.append(f"features: {tuple(features.shape)}; accepted: {accepted}")
    k = image_weight.shape[0]
    if k > channels or tuple(image_weight.shape[1:]) != (channels, 7, 7):
        reasons.append(f"image_weight: {tuple(image_weight.shape)}; accepted: (K, {channels}, 7, 7), K <= {channels}")
    if tuple(weight.shape) != (4 * k, features.shape[1], 4, 4):
        reasons.append(f"weight: {tuple(weight.shape)}; accepted: {(4 * k, features.shape[1], 4, 4)}")
    if tuple(bias.shape) != (k,):
        reasons.append(f"bias: {tuple(bias.shape)}; accepted: {(k,)}")
    return reasons
