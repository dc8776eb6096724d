"""head on Triton: one implicit matrix product makes the image from the last feature map and the padded input.

A row of the product is a group of SIDE x SIDE pixels of the image, with SIDE = 2 GROUP. The pixels of a group share
most of the features that they read. A column is one of these pixels, in one channel. The inner dimension runs over the
group's window of features, and then over its window of the input.

Along one axis, group ``a`` of GROUP = 2 makes four pixels. Weights of any kind have four taps, 0 to 3, in each phase::

    features    2a-1   2a    2a+1  2a+2  2a+3       a window of GROUP + 3
    phase 0      0-----1-----2-----3                makes pixel 4a
    phase 1      0-----1-----2-----3                makes pixel 4a + 1
    phase 0            0-----1-----2-----3          makes pixel 4a + 2
    phase 1            0-----1-----2-----3          makes pixel 4a + 3

Composed weights are zero on tap 3 of phase 0 and on tap 0 of phase 1. Groups that begin one pixel earlier (SKIPPED = 1)
then read fewer features::

    features    2a-1   2a    2a+1  2a+2             a window of GROUP + 2
    phase 1      1-----2-----3                      makes pixel 4a - 1
    phase 0      0-----1-----2                      makes pixel 4a
    phase 1            1-----2-----3                makes pixel 4a + 1
    phase 0            0-----1-----2                makes pixel 4a + 2

Pixels outside the image, such as -1, are computed but not stored. Pixel ``p`` also reads the pixels ``p`` to ``p + 6``
of the input. The middle one is the pixel itself, because the input has BORDER more pixels than the image on each side.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from fastden.kernels._common import device_guard, dot, locate, precision
from fastden.kernels._layout import channels_last
from fastden.kernels._packed import PACKED
from fastden.kernels._tuned import choose
from fastden.kernels.stem import SMALLEST, gather, is_dense, pixel_room, tap_rows

#: The input is larger than the image by this number of pixels, on each side.
BORDER = 3


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

    A group of 2x2 positions of the feature map reads 16 features for 4 positions with composed weights (25 with any
    weights). A single position would read 9 (16). With three channels the group uses 48 of 64 columns of the product. A
    single position would use 12 of 16: then reading, not arithmetic, would be the limit.
    """
    group = 2
    block_n = min(64, max(16, triton.next_power_of_2(4 * channels * group**2)))
    block_k = min(64 if itemsize <= 2 else 32, max(16, triton.next_power_of_2(features)))
    # Eight warps for 64 groups. With 128, each thread has addresses of 16 groups and spills in Triton 3.9 (not 3.6).
    # With four warps, 120 to 344 bytes of a thread spill in float32 and TF32.
    return HeadConfig(64, block_n, block_k, group, warps=8, stages=3)


def row_block(columns: int, room: int) -> int:
    """Inner dimension of a step over the input. More than 32 spills, because each element has its own address."""
    return min(32, max(16, triton.next_power_of_2(columns * room)))


@triton.jit
def _add_features(
    acc,
    features_ptr,
    w_ptr,
    n,
    top,
    left,
    present,
    valid,
    channel,
    pixel_down,
    pixel_across,
    height,
    width,
    M: tl.constexpr,
    WINDOW: tl.constexpr,
    SKIPPED: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """``acc`` plus the products of each group's WINDOW x WINDOW features, from (``top``, ``left``) of image ``n`` on.

    Features outside the image are zero. Weights are (4 K, 4, 4, M). A column of the product is pixel (``pixel_down``,
    ``pixel_across``) of a group, in one ``channel``. It has the weights of its phase at those positions of the window
    that are its taps, and zeros at the others.
    """
    STEPS: tl.constexpr = (M + BLOCK_K - 1) // BLOCK_K
    phase_y = (pixel_down + SKIPPED) % 2
    phase_x = (pixel_across + SKIPPED) % 2
    weights_of_phase = w_ptr + (channel * 4 + phase_y * 2 + phase_x) * (16 * M)
    # The tap that the window's first row and column have; it may be negative. Each row and column adds one.
    first_y = SKIPPED - (pixel_down + SKIPPED) // 2
    first_x = SKIPPED - (pixel_across + SKIPPED) // 2
    corner = ((n * height + top) * width + left) * M
    k = tl.arange(0, BLOCK_K)
    for step in range(WINDOW * WINDOW * STEPS):
        tap = step // STEPS
        down = tap // WINDOW
        across = tap % WINDOW
        feature = (step % STEPS) * BLOCK_K + k
        inside = present & (top + down >= 0) & (top + down < height) & (left + across >= 0) & (left + across < width)
        source = tl.load(
            features_ptr + (corner + (tl.cast(down, tl.int64) * width + across) * M)[:, None] + feature[None, :],
            mask=inside[:, None] & (feature < M)[None, :],
            other=0.0,
        )
        tap_y = first_y + down
        tap_x = first_x + across
        # In composed weights, phase 0 has no last tap, and phase 1 has no first tap.
        exists = valid & (tap_y >= phase_y * SKIPPED) & (tap_y < 4 - (1 - phase_y) * SKIPPED)
        exists = exists & (tap_x >= phase_x * SKIPPED) & (tap_x < 4 - (1 - phase_x) * SKIPPED)
        weights = tl.load(
            (weights_of_phase + (tap_y * 4 + tap_x) * M)[:, None] + feature[None, :],
            mask=exists[:, None] & (feature < M)[None, :],
            other=0.0,
        )
        acc = dot(source, tl.trans(weights), acc, PRECISION)
    return acc


@triton.jit
def _add_input_window(
    acc,
    x_ptr,
    image_w_ptr,
    n,
    top,
    left,
    present,
    columns,
    valid,
    image_channel,
    pixel_down,
    pixel_across,
    in_height,
    in_width,
    stride_n,
    stride_c,
    stride_h,
    stride_w,
    C: tl.constexpr,
    TAPS: tl.constexpr,
    PATCH: tl.constexpr,
    ROOM: tl.constexpr,
    PACKED_ROWS: tl.constexpr,
    DENSE: tl.constexpr,
    BLOCK_ROW: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """``acc`` plus the products of each group's PATCH x PATCH pixels of the input, from (``top``, ``left``) on.

    A row of the window has ROOM positions for the channels of each pixel. Weights are (K, TAPS, TAPS, C). With
    PACKED_ROWS they are the result of :func:`image_weights`: (columns, PATCH, positions), with zeros up to a multiple
    of BLOCK_ROW.
    """
    BLOCKS: tl.constexpr = (PATCH * ROOM + BLOCK_ROW - 1) // BLOCK_ROW
    corner = n * stride_n + top.to(tl.int64) * stride_h
    if DENSE:
        corner += left.to(tl.int64) * C
    else:
        corner += left.to(tl.int64) * stride_w
    # Columns of the window that lie in the input, as bits: from -left up to in_width - left.
    exists = (1 << tl.minimum(in_width - left, PATCH)) - (1 << tl.maximum(-left, 0))
    for step in range(PATCH * BLOCKS):
        down = step // BLOCKS
        position = (step % BLOCKS) * BLOCK_ROW + tl.arange(0, BLOCK_ROW)
        across = position // ROOM
        channel = position % ROOM
        wants = tl.where((across < PATCH) & (channel < C), 1 << across, 0)
        if DENSE:
            inner = (across * C + channel).to(tl.int64)
        else:
            inner = across.to(tl.int64) * stride_w + channel.to(tl.int64) * stride_c
        inside = present & (top + down >= 0) & (top + down < in_height)
        source = gather(x_ptr, corner + tl.cast(down, tl.int64) * stride_h, tl.where(inside, exists, 0), inner, wants)
        if PACKED_ROWS:
            weights = tl.load(
                image_w_ptr + (columns[:, None] * PATCH + down) * (BLOCKS * BLOCK_ROW) + position[None, :],
                mask=valid[:, None],
                other=0.0,
            )
        else:
            tap_y = down - pixel_down
            tap_x = across[None, :] - pixel_across[:, None]
            row = (image_channel * TAPS + tap_y) * (TAPS * C)
            weights = tl.load(
                image_w_ptr + row[:, None] + tap_x * C + channel[None, :],
                mask=(valid & (tap_y >= 0) & (tap_y < TAPS))[:, None] & (tap_x >= 0) & (tap_x < TAPS),
                other=0.0,
            )
        acc = dot(source, tl.trans(weights), acc, PRECISION)
    return acc


@triton.jit
def _pixels_in_image(top, left, present, down, across, valid, out_height, out_width, SIDE: tl.constexpr):
    """(BLOCK_M, BLOCK_N): whether a group's pixel lies in the image and the product's column is ``valid``."""
    # A group's rows and columns that lie in the image, as bits: SIDE bits each, and one bit that is never set.
    rows = (1 << tl.minimum(out_height - top, SIDE)) - (1 << tl.maximum(-top, 0))
    columns = (1 << tl.minimum(out_width - left, SIDE)) - (1 << tl.maximum(-left, 0))
    exists = tl.where(present, rows | (columns << SIDE), 0)
    wants = tl.where(valid, (1 << down) | (1 << (across + SIDE)), 1 << (2 * SIDE))
    return (exists[:, None] & wants[None, :]) == wants[None, :]


@triton.jit
def _image_pixels(
    image_ptr, n, row, column, channel, down, across, stride_n, stride_c, stride_h, stride_w, mask
):  # fmt: skip
    """The image's values ``down`` rows and ``across`` columns after (``row``, ``column``), in float32."""
    source = n * stride_n + row.to(tl.int64) * stride_h
    source += column.to(tl.int64) * stride_w
    inner = channel.to(tl.int64) * stride_c + down.to(tl.int64) * stride_h
    inner += across.to(tl.int64) * stride_w
    return tl.load(image_ptr + (source[:, None] + inner[None, :]), mask=mask, other=0.0).to(tl.float32)


# Sizes and strides of images are not compiled in: a new image size does not compile the kernel again.
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
    PACKED_ROWS: tl.constexpr,
    DENSE: tl.constexpr,
    BORDER: tl.constexpr,
    GROUP: tl.constexpr,
    SKIPPED: tl.constexpr,
    ADD_INPUT: tl.constexpr,
    CLAMP: tl.constexpr,
    SEPARATE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_ROW: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One tile of the image: BLOCK_M groups, and BLOCK_N of their COLUMNS, in the order (channel, across, down).

    ``height`` and ``width`` are those of the features. With SEPARATE, features and input have sums of their own.
    """
    SIDE: tl.constexpr = 2 * GROUP
    COLUMNS: tl.constexpr = K * SIDE * SIDE
    out_height = 2 * height - 2
    out_width = 2 * width - 2
    groups_down = tl.cdiv(out_height + SKIPPED, SIDE)
    groups_across = tl.cdiv(out_width + SKIPPED, SIDE)

    # 64 bits from here on: a 24-megapixel image with 256 channels has more elements than 32 bits can count.
    first = tl.program_id(0).to(tl.int64) * BLOCK_M
    index = tl.arange(0, BLOCK_M)
    present = first + index < tl.cast(batch, tl.int64) * groups_down * groups_across
    a, b, n = locate(first, index, groups_down, groups_across)
    # The rows of a group are innermost, so that the threads of a warp run along groups, and each has one group. If the
    # columns were innermost, threads would run along the columns of a group. Each would then keep the addresses of 16
    # groups in registers through both loops.
    columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    valid = columns < COLUMNS
    channel = columns // (SIDE * SIDE)
    across = columns // SIDE % SIDE
    down = columns % SIDE

    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    acc = _add_features(
        acc, features_ptr, w_ptr, n, a * GROUP - 1, b * GROUP - 1, present, valid, channel, down, across,
        height, width, M, GROUP + 3 - SKIPPED, SKIPPED, BLOCK_K, PRECISION,
    )  # fmt: skip
    if SEPARATE:
        # Rounding errors grow with a sum. One sum of 227 terms, emulated term by term, errs 1.7 times as much (root
        # mean square) as PyTorch on a CPU, which adds the results of two convolutions. Two sums err 1.0 times as much.
        of_features = acc
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    # The row and column of a group's first pixel in the image are those of its window in the larger input.
    top = a * SIDE - SKIPPED
    left = b * SIDE - SKIPPED
    acc = _add_input_window(
        acc, x_ptr, image_w_ptr, n, top, left, present, columns, valid, channel, down, across,
        out_height + 2 * BORDER, out_width + 2 * BORDER, stride_n, stride_c, stride_h, stride_w,
        C, 2 * BORDER + 1, SIDE + 2 * BORDER, ROOM, PACKED_ROWS, DENSE, BLOCK_ROW, PRECISION,
    )  # fmt: skip
    if SEPARATE:
        acc += of_features

    acc += tl.load(bias_ptr + channel, mask=valid, other=0.0).to(tl.float32)[None, :]
    mask = _pixels_in_image(top, left, present, down, across, valid, out_height, out_width, SIDE)
    if ADD_INPUT:
        acc += _image_pixels(
            image_ptr, n, top + BORDER, left + BORDER, channel, down, across,
            image_stride_n, image_stride_c, image_stride_h, image_stride_w, mask,
        )  # fmt: skip
    if CLAMP:
        # These are comparisons, because maximum and minimum would hide a NaN.
        acc = tl.where(acc < 0.0, 0.0, acc)
        acc = tl.where(acc > 1.0, 1.0, acc)
    target = (n * (K * out_height) + top) * out_width + left
    offset = (channel.to(tl.int64) * out_height + down) * out_width + across
    tl.store(y_ptr + (target[:, None] + offset[None, :]), acc.to(y_ptr.dtype.element_ty), mask=mask)


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
    """Denoised image; arguments as in :func:`fastden.ops.head` and below. A NaN spreads to the pixels of its group.

    Args:
        features: (N, M, h, w).
        x: (N, C, 2 h + 4, 2 w + 4), the network's input, of any strides.
        weight: (4 K, M, 4, 4).
        image_weight: (K, C, 7, 7).
        bias: (K,).
        add_input: whether the image is added.
        clamp: whether the result is limited to [0, 1].
        image: the image to add, of the size of ``x``, with at least K channels and any dtype; None for ``x``.
        out_dtype: dtype of the result; None for that of ``features``. Sums are float32.
        composed: promises a ``weight`` from :func:`fastden.algebra.compose_head`: phase 0 has zeros on the last row
            (column) of its taps, and phase 1 on the first. The kernel does not read these: 9 taps instead of 16.
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
    config = config or choose(
        "head", f"{maps}+{of_image} to {channels}, {9 if composed else 16} taps, {precision(features)}",
        batch * out_height * out_width, features, config_for(maps, channels, features.element_size()),
    )  # fmt: skip
    skipped, side = int(composed), 2 * config.group
    image = x if image is None else image
    room = pixel_room(of_image)
    block_row = row_block(side + 2 * BORDER, room)
    # If the channels fill their positions, the kernel reads the weights without a copy; fastden.fuse arranges this.
    packed = room != of_image
    if packed:
        image_weight = PACKED.get(image_weights, image_weight, config.group, room, block_row)
    else:
        image_weight = channels_last(image_weight)
    groups = batch * triton.cdiv(out_height + skipped, side) * triton.cdiv(out_width + skipped, side)
    grid = (triton.cdiv(groups, config.block_m), triton.cdiv(channels * side**2, config.block_n))
    with device_guard(features):
        head_kernel[grid](
            channels_last(features), x, image, channels_last(weight), image_weight, bias.contiguous(), y,
            batch, height, width, *x.stride(), *image.stride(),
            M=maps, C=of_image, K=channels, ROOM=room, PACKED_ROWS=packed, DENSE=is_dense(x), BORDER=BORDER,
            GROUP=config.group, SKIPPED=skipped, ADD_INPUT=add_input, CLAMP=clamp,
            # In other dtypes, and in TF32, the rounding of the factors is most of the error.
            SEPARATE=features.dtype == torch.float32 and precision(features) == "ieee", BLOCK_M=config.block_m,
            BLOCK_N=config.block_n, BLOCK_K=config.block_k, BLOCK_ROW=block_row, PRECISION=precision(features),
            num_warps=config.warps, num_stages=config.stages,
        )  # fmt: skip
    return y


def slide(taps: Tensor, count: int) -> Tensor:
    """``count`` copies of the last dimension's taps, each shifted by one: (..., t) -> (..., count, count + t - 1)."""
    *lead, size = taps.shape
    # Rows of count + t elements are read as rows of count + t - 1, so each row is shifted by one against the last.
    rows = F.pad(taps, (0, count)).unsqueeze(-2).expand(*lead, count, size + count)
    return rows.flatten(-2)[..., : count * (size + count - 1)].unflatten(-1, (count, size + count - 1))


def slide_both(taps: Tensor, count: int) -> Tensor:
    """:func:`slide` on rows and columns: (..., t, u) -> (..., count, count + t - 1, count, count + u - 1)."""
    columns = slide(taps, count)  # ..., t, count, count + u - 1
    return slide(columns.movedim(-3, -1), count).movedim((-2, -1), (-4, -3))


def image_weights(weight: Tensor, group: int, room: int, block: int) -> Tensor:
    """Weights from a group's window of the input to its pixels: (K, C, 7, 7) -> (K (2 group)^2, rows, positions)."""
    windows = slide_both(weight, 2 * group).permute(0, 4, 2, 1, 3, 5).flatten(0, 2)
    return tap_rows(windows, room, block)


def why_not(features: Tensor, x: Tensor, weight: Tensor, image_weight: Tensor, bias: Tensor, **_: Tensor) -> list[str]:
    """Why the kernel does not support these shapes; empty if it does."""
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
