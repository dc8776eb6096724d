"""The network's input in one pass over an image: padded by reflection, with its noise level as a channel, and cast.

If the level is a curve over brightness, the same pass looks it up. PyTorch's operations would read and write about
three maps of the image's size for each knot of the curve.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastden.kernels._common import device_guard, locate

#: Pixels per program. Not measured on a GPU.
BLOCK = 256


@triton.jit
def _reflected(position, size):
    """The index of the pixel at a position on an axis of ``size`` pixels, which is mirrored at its end pixels."""
    period = tl.maximum(2 * (size - 1), 1)
    # The remainder of a negative number is negative.
    index = (position % period + period) % period
    # For an axis of one pixel the period is 1: the two candidates are 0 and 1, and the minimum is 0.
    return tl.minimum(index, period - index)


@triton.jit
def _limited(value):
    """``value`` limited to [0, 1]. It uses comparisons, because minimum and maximum would hide a NaN."""
    value = tl.where(value < 0.0, 0.0, value)
    return tl.where(value > 1.0, 1.0, value)


@triton.jit
def _gray(x_ptr, pixel, stride_c, present, C: tl.constexpr):
    """Mean of a pixel's channels, rounded to the dtype of the image, as PyTorch rounds it."""
    total = tl.load(x_ptr + pixel, mask=present, other=0.0).to(tl.float32)
    for channel in tl.static_range(1, C):
        total += tl.load(x_ptr + pixel + channel * tl.cast(stride_c, tl.int64), mask=present, other=0.0).to(tl.float32)
    return tl.div_rn(total, tl.full(total.shape, C, tl.float32)).to(x_ptr.dtype.element_ty).to(tl.float32)


@triton.jit
def _brightness(
    x_ptr, image, row, column, present, height, width, stride_c, stride_h, stride_w, C: tl.constexpr,
    RADIUS: tl.constexpr,
):  # fmt: skip
    """Mean of the gray values in a square around each pixel. It sums columns first, in the order of PyTorch."""
    SIDE: tl.constexpr = 2 * RADIUS + 1
    side = tl.full(row.shape, SIDE, tl.float32)
    total = tl.zeros(row.shape, tl.float32)
    for across in tl.static_range(SIDE):
        left = image + _reflected(column + (across - RADIUS), width).to(tl.int64) * stride_w
        line = tl.zeros(row.shape, tl.float32)
        for down in tl.static_range(SIDE):
            pixel = left + _reflected(row + (down - RADIUS), height).to(tl.int64) * stride_h
            line += _gray(x_ptr, pixel, stride_c, present, C)
        total += tl.div_rn(line, side)
    return tl.div_rn(total, side)


@triton.jit
def _on_curve(curve_ptr, brightness, present, KNOTS: tl.constexpr):
    """The value of the curve at each pixel's ``brightness``: a sum of ramps between evenly spaced knots."""
    position = _limited(brightness) * (KNOTS - 1)
    before = tl.load(curve_ptr, mask=present, other=0.0).to(tl.float32)
    level = before
    for knot in tl.static_range(KNOTS - 1):
        after = tl.load(curve_ptr + (knot + 1), mask=present, other=0.0).to(tl.float32)
        level += (after - before) * _limited(position - knot)
        before = after
    return tl.where(level < 0.0, 0.0, level)


# Sizes, strides and the padding are not compiled in: a new image size does not compile the kernel again.
@triton.jit(
    do_not_specialize=[
        *("batch", "height", "width", "out_height", "out_width", "top", "left"),
        *("stride_n", "stride_c", "stride_h", "stride_w", "level_stride_n", "level_stride_h", "level_stride_w"),
    ],
)
def network_input_kernel(
    x_ptr, level_ptr, y_ptr, image_ptr, batch, height, width, out_height, out_width, top, left,
    stride_n, stride_c, stride_h, stride_w, level_stride_n, level_stride_h, level_stride_w,
    C: tl.constexpr, ROOM: tl.constexpr, HAS_LEVEL: tl.constexpr, KNOTS: tl.constexpr, RADIUS: tl.constexpr,
    HAS_IMAGE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """BLOCK pixels of the padded image. Without KNOTS, the level is a map of the image's size with any strides."""
    CHANNELS: tl.constexpr = C + HAS_LEVEL
    # 64 bits: a tensor may have more than 2^31 elements.
    first = tl.program_id(0).to(tl.int64) * BLOCK
    index = tl.arange(0, BLOCK)
    pixels = first + index
    present = pixels < tl.cast(batch, tl.int64) * out_height * out_width
    row, column, n = locate(first, index, out_height, out_width)
    row = _reflected(row - top, height)
    column = _reflected(column - left, width)
    image = n * stride_n
    source = image + row.to(tl.int64) * stride_h + column.to(tl.int64) * stride_w
    channel = tl.arange(0, ROOM)
    mask = present[:, None] & (channel < C)[None, :]
    value = tl.load(x_ptr + (source[:, None] + channel.to(tl.int64)[None, :] * stride_c), mask=mask, other=0.0)
    if HAS_IMAGE:
        area = tl.cast(out_height, tl.int64) * out_width
        target = (pixels + n * ((C - 1) * area))[:, None] + channel[None, :] * area
        tl.store(image_ptr + target, value, mask=mask)
    value = value.to(tl.float32)
    if HAS_LEVEL:
        if KNOTS > 0:
            brightness = _brightness(
                x_ptr, image, row, column, present, height, width, stride_c, stride_h, stride_w, C, RADIUS
            )
            level = _on_curve(level_ptr + n * level_stride_n, brightness, present, KNOTS)
        else:
            offset = n * level_stride_n + row.to(tl.int64) * level_stride_h + column.to(tl.int64) * level_stride_w
            level = tl.load(level_ptr + offset, mask=present, other=0.0).to(tl.float32)
        # The level is rounded to the image's dtype first, and then to the network's.
        level = level.to(x_ptr.dtype.element_ty).to(tl.float32)
        value = tl.where((channel == C)[None, :], level[:, None], value)
    target = pixels[:, None] * CHANNELS + channel[None, :]
    tl.store(y_ptr + target, value.to(y_ptr.dtype.element_ty), mask=present[:, None] & (channel < CHANNELS)[None, :])


def network_input(
    x: Tensor,
    level: Tensor | None,
    dtype: torch.dtype,
    rows: tuple[int, int],
    columns: tuple[int, int],
    radius: int,
) -> tuple[Tensor, Tensor]:
    """The padded image with its level, in the network's dtype, and the padded image as it is.

    Args:
        x: (N, C, H, W), of any strides.
        level: None; a map (N, 1, H, W) of any strides; or curves (N or 1, knots): levels at values of brightness that
            are evenly spaced from 0 to 1.
        dtype: dtype of the network.
        rows, columns: pixels of padding before and after; a negative number removes pixels.
        radius: for curves: brightness is averaged over this number of pixels on each side.

    Returns:
        (N, C + 1 or C, H', W') in ``dtype``, channels-last, and (N, at least C, H', W') in the dtype of ``x``. If both
        dtypes are equal, both are the same tensor. Else, without padding, the second is a view of ``x``.
    """
    batch, channels, height, width = x.shape
    has_level = level is not None
    knots = level.shape[1] if level is not None and level.dim() == 2 else 0
    shape = (batch, channels + has_level, height + sum(rows), width + sum(columns))
    y = torch.empty(shape, dtype=dtype, device=x.device, memory_format=torch.channels_last)
    has_image = dtype != x.dtype and max(*rows, *columns) > 0
    if dtype == x.dtype:
        image = y
    elif has_image:
        image = torch.empty((batch, channels, *shape[2:]), dtype=x.dtype, device=x.device)
    else:  # nothing is added at a side, so the image is a part of x
        image = x.narrow(2, -rows[0], shape[2]).narrow(3, -columns[0], shape[3])
    count = batch * shape[2] * shape[3]
    if level is None:
        strides = (0, 0, 0)
    elif knots:
        level = level.contiguous()
        strides = (0 if level.shape[0] == 1 else knots, 0, 0)
    else:
        strides = (level.stride(0), level.stride(2), level.stride(3))
    if count:
        with device_guard(x):
            # Products are rounded before they are added, as in PyTorch, so that the level has the same bits.
            network_input_kernel[(triton.cdiv(count, BLOCK),)](
                x, x if level is None else level, y, image, batch, height, width, shape[2], shape[3],
                rows[0], columns[0], *x.stride(), *strides,
                C=channels, ROOM=triton.next_power_of_2(channels + has_level), HAS_LEVEL=has_level, KNOTS=knots,
                RADIUS=radius, HAS_IMAGE=has_image, BLOCK=BLOCK, num_warps=4, enable_fp_fusion=False,
            )  # fmt: skip
    return y, image


def why_not(x: Tensor, **_: Tensor) -> list[str]:
    """Why the kernel does not support these shapes; empty if it does."""
    return [] if x.dim() == 4 else [f"x: shape {tuple(x.shape)}; accepted: (N, C, H, W)"]
