"""Convolution as an implicit matrix product, shared by the operators: forward, inference and training.

Rows of the product are output pixels, and columns are output channels. The inner dimension runs over taps and input
channels. Tensors are channels-last (NHWC in memory). Weights are (O, kernel rows, kernel columns, C): a channels-last
convolution weight has this order in memory. Sums are float32. A transposed convolution of stride 2 is four such
products, one for each parity of the output pixel ("phases"). They read the taps from its kernel without a copy.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastden.kernels._common import device_guard, dot, locate, precision
from fastden.kernels._descriptors import capability, launch_descriptor_conv
from fastden.kernels._descriptors import why_not as cannot_describe
from fastden.kernels._tiles import MEASURED, ONE_WAVE, ConvConfig, config_for, finish, second_block
from fastden.kernels._tuned import choose


@triton.jit
def _accumulate(
    acc,
    x_ptr,
    w_ptr,
    origin,
    top,
    left,
    rows,
    outputs,
    height,
    width,
    C: tl.constexpr,
    OFFSET: tl.constexpr,
    TOTAL: tl.constexpr,
    KERNEL: tl.constexpr,
    BLOCK_K: tl.constexpr,
    O: tl.constexpr,
    PRECISION: tl.constexpr,
    PHASE: tl.constexpr = False,
):
    """``acc`` plus the taps of one source with C of the TOTAL input channels, from channel OFFSET of the weights on.

    ``origin`` is the pixel under the first tap, counted over the batch; ``top`` and ``left`` are its row and column.
    The taps of a PHASE are every second tap, in reverse order, of a kernel twice as large. ``w_ptr`` points to the
    first of them.
    """
    STEPS: tl.constexpr = (C + BLOCK_K - 1) // BLOCK_K
    TAPS: tl.constexpr = KERNEL * KERNEL * (4 if PHASE else 1)
    k = tl.arange(0, BLOCK_K)
    for step in range(KERNEL * KERNEL * STEPS):
        tap = step // STEPS
        channel = (step % STEPS) * BLOCK_K + k
        y = top + tap // KERNEL
        x = left + tap % KERNEL
        inside = rows & (y >= 0) & (y < height) & (x >= 0) & (x < width)
        pixel = origin + ((tap // KERNEL).to(tl.int64) * width + tap % KERNEL)
        source = tl.load(
            x_ptr + pixel[:, None] * C + channel[None, :],
            mask=inside[:, None] & (channel < C)[None, :],
            other=0.0,
        )
        weight_tap = tap
        if PHASE:
            weight_tap = -(tap // KERNEL * (4 * KERNEL) + tap % KERNEL * 2)
        weights = tl.load(
            w_ptr + (outputs[:, None] * TAPS + weight_tap) * TOTAL + OFFSET + channel[None, :],
            mask=(outputs < O)[:, None] & (channel < C)[None, :],
            other=0.0,
        )
        acc = dot(source, tl.trans(weights), acc, PRECISION)
    return acc


@triton.jit
def _store_statistics(acc, statistics_ptr, tile, present, mask, outputs, O: tl.constexpr):
    """Mean and sum of squared deviations of each column of ``acc`` over its first ``present`` rows."""
    mean = tl.sum(tl.where(mask, acc, 0.0), 0) / present
    deviation = tl.where(mask, acc - mean[None, :], 0.0)
    statistics = statistics_ptr + tile.to(tl.int64) * (2 * O) + outputs
    tl.store(statistics, mean, mask=outputs < O)
    tl.store(statistics + O, tl.sum(deviation * deviation, 0), mask=outputs < O)


# Image sizes are not compiled in: a new image size does not compile the kernel again.
@triton.jit(do_not_specialize=["batch", "height", "width", "out_height", "out_width"])
def conv_kernel(
    a_ptr,
    b_ptr,
    w_ptr,
    bias_ptr,
    residual_ptr,
    y_ptr,
    statistics_ptr,
    batch,
    height,
    width,
    out_height,
    out_width,
    A: tl.constexpr,
    B: tl.constexpr,
    O: tl.constexpr,
    KERNEL: tl.constexpr,
    STRIDE: tl.constexpr,
    PADDING: tl.constexpr,
    PHASES: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    RELU: tl.constexpr,
    STATISTICS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_B: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One tile of ``relu(conv(cat(a, b)) + bias + residual)``; with STATISTICS, also the tile's statistics.

    ``out_height`` and ``out_width`` are the size of one phase. Statistics are the mean and the sum of squared
    deviations of each channel in each tile, (tiles, 2, O) in float32. They combine without cancellation, even if the
    mean is large.
    """
    # Programs that read the same pixels have consecutive numbers: all but the first find them in the level-2 cache.
    BLOCKS: tl.constexpr = (O + BLOCK_N - 1) // BLOCK_N
    program = tl.program_id(0)
    tile = program // (BLOCKS * PHASES)
    phase = program // BLOCKS % PHASES
    outputs = program % BLOCKS * BLOCK_N + tl.arange(0, BLOCK_N)
    phase_y = phase // 2
    phase_x = phase % 2
    # 64 bits from here on: a 24-megapixel image with 256 channels has more elements than 32 bits can count.
    pixels = tile.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    count = batch.to(tl.int64) * out_height * out_width
    rows = pixels < count
    row, column, image = locate(tile.to(tl.int64) * BLOCK_M, tl.arange(0, BLOCK_M), out_height, out_width)
    top = row * STRIDE - PADDING
    left = column * STRIDE - PADDING
    if PHASES == 4:
        top += phase_y
        left += phase_x
        w_ptr += ((2 * KERNEL - 1 - phase_y) * (2 * KERNEL) + 2 * KERNEL - 1 - phase_x) * (A + B)

    origin = (image * height + top) * width + left
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    acc = _accumulate(
        acc, a_ptr, w_ptr, origin, top, left, rows, outputs, height, width,
        A, 0, A + B, KERNEL, BLOCK_K, O, PRECISION, PHASES == 4,
    )  # fmt: skip
    if B > 0:
        acc = _accumulate(
            acc, b_ptr, w_ptr, origin, top, left, rows, outputs, height, width,
            B, A, A + B, KERNEL, BLOCK_B, O, PRECISION,
        )  # fmt: skip

    mask = rows[:, None] & (outputs < O)[None, :]
    if HAS_BIAS:
        acc += tl.load(bias_ptr + outputs, mask=outputs < O, other=0.0).to(tl.float32)[None, :]
    if STATISTICS:
        # The statistics are those of the stored (rounded) values, because normalisation reads these.
        acc = acc.to(y_ptr.dtype.element_ty).to(tl.float32)
        present = tl.minimum(count - tile.to(tl.int64) * BLOCK_M, BLOCK_M).to(tl.float32)
        _store_statistics(acc, statistics_ptr, tile, present, mask, outputs, O)
    if PHASES == 4:
        line = (image * out_height + row) * 2 + phase_y
        target = (line * (out_width * 2) + column * 2 + phase_x)[:, None] * O + outputs[None, :]
    else:
        target = pixels[:, None] * O + outputs[None, :]
    finish(acc, residual_ptr, y_ptr, target, mask, HAS_RESIDUAL, RELU)


def chosen_config(
    a: Tensor, b: Tensor | None, weight: Tensor, pixels: int, stride: int = 1, phases: int = 1, statistics: bool = False
) -> ConvConfig:
    """A launch's configuration: tuned or default. Arguments as in :func:`launch_conv`; ``pixels`` counts one phase."""
    channels, others = a.shape[1], 0 if b is None else b.shape[1]
    outputs, kernel = weight.shape[0], weight.shape[-1]
    plain = config_for(channels, outputs, pixels, a.element_size(), precision(a))
    default = plain
    if (stride, phases, statistics) == (1, 1, False) and pixels >= ONE_WAVE:
        default = MEASURED.get((capability(a), a.dtype, channels, others, outputs, kernel), plain)
    key = f"{channels}+{others} to {outputs}, kernel {kernel}, stride {stride}, phases {phases}, {precision(a)}"
    config = choose("conv", f"{key}, statistics" if statistics else key, pixels, a, default)
    # The search, or the measurement, may have used tensors with other addresses: descriptors may not work for these.
    return plain if config.descriptors and cannot_describe(a, b, weight) else config


def output_size(x: Tensor, weight: Tensor, stride: int, padding: int) -> tuple[int, int]:
    """Height and width of a convolution's result."""
    height, width = ((size + 2 * padding - weight.shape[-1]) // stride + 1 for size in x.shape[2:])
    return height, width


def _check_described(stride: int, phases: int, statistics: bool) -> None:
    if stride != 1 or phases != 1 or statistics:
        launch = f"stride {stride}, {phases} phases, {'' if statistics else 'no '}statistics"
        raise ValueError(f"config: descriptors=True with {launch}; accepted: stride 1, 1 phase, no statistics")


def launch_conv(
    a: Tensor,
    b: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    *,
    relu: bool,
    stride: int = 1,
    padding: int = 0,
    phases: int = 1,
    statistics: bool = False,
    config: ConvConfig | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Run :func:`conv_kernel` on channels-last tensors.

    Args:
        a: (N, A, H, W).
        b: (N, B, H, W) or None.
        weight: (O, A + B, k, k), channels-last; for four phases (O, A, 2 k, 2 k), too.
        bias: (O,) or None.
        residual: a tensor of the output's shape, or None.
        relu, stride, padding: of the convolution; the padding of a phase is 1 minus its parity.
        phases: 1, or 4 for a transposed convolution of kernel 2 k, stride 2, padding k - 1; k is even.
        statistics: also return each tile's statistics.
        config: None for the default.

    Returns:
        (N, O, H', W'), channels-last, and (tiles, 2, O) float32 or None.
    """
    bias = None if bias is None else bias.contiguous()
    batch, channels, height, width = a.shape
    others = 0 if b is None else b.shape[1]
    scale = 2 if phases == 4 else 1
    outputs, kernel = weight.shape[0], weight.shape[-1] // scale
    out_height, out_width = (height, width) if phases == 4 else output_size(a, weight, stride, padding)
    shape = (batch, outputs, out_height * scale, out_width * scale)
    y = torch.empty(shape, dtype=a.dtype, device=a.device, memory_format=torch.channels_last)
    count = batch * out_height * out_width
    config = config or chosen_config(a, b, weight, count, stride, phases, statistics)
    tiles = triton.cdiv(count, config.block_m)
    tile_statistics = torch.empty((tiles, 2, outputs), dtype=torch.float32, device=a.device) if statistics else None
    if count == 0:
        return y, tile_statistics
    if config.descriptors:
        _check_described(stride, phases, statistics)
        launch_descriptor_conv(a, b, weight, bias, residual, y, relu=relu, padding=padding, config=config)
        return y, None
    grid = tiles * phases * triton.cdiv(outputs, config.block_n)
    with device_guard(a):
        conv_kernel[(grid,)](
            a, a if b is None else b, weight, a if bias is None else bias, a if residual is None else residual,
            y, y if tile_statistics is None else tile_statistics,
            batch, height, width, out_height, out_width,
            A=channels, B=others, O=outputs, KERNEL=kernel, STRIDE=stride, PADDING=padding, PHASES=phases,
            HAS_BIAS=bias is not None, HAS_RESIDUAL=residual is not None, RELU=relu, STATISTICS=statistics,
            BLOCK_M=config.block_m, BLOCK_N=config.block_n, BLOCK_K=config.block_k,
            BLOCK_B=second_block(others, config), PRECISION=precision(a),
            num_warps=config.warps, num_stages=config.stages,
        )  # fmt: skip
    return y, tile_statistics
