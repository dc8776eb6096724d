"""Gradient of a convolution's weight on Triton: a product over all output pixels, split between programs.

The result is a matrix. Its rows are output channels. Its columns are the weights of one output, in the order of memory
(tap, then input channel). The inner dimension runs over the output's pixels. There are far more of them than rows or
columns, so each program sums a run of pixels for one tile. A second kernel then adds the runs, one after the other. The
order of additions never depends on time, so results repeat bit by bit.

Two sources, concatenated along the channels, are never copied: each has its own programs in the same launch. The stem's
four sets of weights belong to four sets of output pixels. A run has pixels of one set only.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastden.kernels._common import INTERPRETED, device_guard, dot, locate, multiprocessors, precision
from fastden.kernels._descriptors import capability
from fastden.kernels._layout import channels_last
from fastden.kernels._tuned import choose

#: Elements that a program of the second kernel sums.
BLOCK_SUM = 256
#: Programs of the first kernel for each multiprocessor; not measured on a GPU.
PROGRAMS = 2
STEM_KERNEL, STEM_STRIDE = 7, 2


@dataclass(frozen=True)
class WeightGradientConfig:
    """Sizes of a tile and how it is run: output channels, columns, pixels of a step, steps of a loop, warps, stages.

    A run is several loops of ``loop`` steps. The pipeline of loads fills and drains once per loop: Triton pipelines
    only loops whose end it knows, and the size of an image must not be compiled in.
    """

    block_m: int
    block_n: int
    block_k: int
    loop: int
    warps: int
    stages: int


def config_for(
    columns: int, outputs: int, itemsize: int, products: str = "tf32", gpu: tuple[int, int] | None = None
) -> WeightGradientConfig:
    """Default tile for the widest source's ``columns``; not measured on a GPU, chosen so that nothing spills.

    Args:
        columns, outputs: of the gradient's matrix.
        itemsize: bytes of an element.
        products: of float32, "ieee" or "tf32".
        gpu: its compute capability; None on a CPU.
    """
    if itemsize > 2:
        return _of_float32(columns, outputs, products, gpu)
    largest = 128
    block_m = min(largest, max(16, triton.next_power_of_2(outputs)))
    block_n = min(largest, max(16, triton.next_power_of_2(columns)))
    # 64 pixels of a 64 x 128 tile spill on sm_100. 32 pixels of a 16 x 128 tile spill on sm_90 and sm_100.
    block_k = 32 if (block_m, block_n) == (64, 128) else 64
    if block_m == 16 and columns % block_n:
        # A tile's columns are of several taps: 128 columns, or 64 and 64 pixels, spill 8 bytes (sm_80 and sm_90).
        block_n, block_k = min(block_n, 64), 32
    # With eight warps for a narrower tile, a thread has few registers, and some spill on sm_80 and sm_100.
    warps = 8 if block_m * block_n >= 128 * 128 else 4
    # In the interpreter, steps after the last pixel take as long as the others.
    return WeightGradientConfig(block_m, block_n, block_k, 1 if INTERPRETED.value else 16, warps, stages=3)


def _of_float32(columns: int, outputs: int, products: str, gpu: tuple[int, int] | None) -> WeightGradientConfig:
    """:func:`config_for` in float32, whose tiles are at most 64 x 64."""
    block_m = min(64, max(16, triton.next_power_of_2(outputs)))
    block_n = min(64, max(16, triton.next_power_of_2(columns)))
    # Without matrix instructions, 64 x 64 spills 8 to 16 bytes for conv2 and up2 on sm_100 (Triton 3.6).
    halved = products == "ieee" and gpu is not None and gpu >= (10, 0) and block_m * block_n == 64 * 64
    # With 32 pixels, 16 x 64 spills 8 to 16 bytes.
    block_k = 16 if products == "ieee" or block_m == 16 else 32
    # With four warps, 64 x 64 spills up to 1008 bytes without matrix instructions, and 8 to 16 in TF32 for up2 (512
    # columns) on sm_100. With eight, TF32 spills for conv3 (1440 and 288) and for the stem (196).
    few = columns <= 1024 and columns % block_n == 0
    warps = 8 if block_m * block_n >= 64 * 64 and (products == "ieee" or few) else 4
    block_m = 32 if halved else block_m
    return WeightGradientConfig(block_m, block_n, block_k, 1 if INTERPRETED.value else 16, warps, stages=3)


@triton.jit
def _source(
    x_ptr, origin, y, x, present, column_block, columns, height, width,
    C: tl.constexpr, KERNEL: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """(pixels, columns) of a source: the element of each column's tap and channel.

    Taps count from (``y``, ``x``), which is pixel ``origin`` of the batch.
    """
    tap = columns // C
    channel = columns % C
    if C % BLOCK_N == 0:
        # All columns of the tile have the same tap, so each pixel needs one mask and one address.
        tap_row = column_block * BLOCK_N // C // KERNEL
        tap_column = column_block * BLOCK_N // C % KERNEL
        inside = (y + tap_row >= 0) & (y + tap_row < height) & (x + tap_column >= 0) & (x + tap_column < width)
        pixel = origin + (tap_row.to(tl.int64) * width + tap_column)
        source = tl.load(x_ptr + pixel[:, None] * C + channel[None, :], mask=(present & inside)[:, None], other=0.0)
    else:
        down = tap // KERNEL
        across = tap % KERNEL
        exists = columns < KERNEL * KERNEL * C
        tap_y = y[:, None] + down[None, :]
        tap_x = x[:, None] + across[None, :]
        inside = (tap_y >= 0) & (tap_y < height) & (tap_x >= 0) & (tap_x < width) & exists[None, :]
        pixel = origin[:, None] + (down.to(tl.int64) * width + across)[None, :]
        source = tl.load(x_ptr + pixel * C + channel[None, :], mask=inside & present[:, None], other=0.0)
    return source


@triton.jit
def _region_of(run, images, out_height, out_width, span):
    """One of the stem's runs of ``span`` pixels: its number in its region, and the region's height, width and origin.

    The origin is 0 on the first row (column). It is 1 inside, because that region begins one pixel later.
    """
    row_runs = tl.cdiv(images * (out_height - 1) * (out_width - 1), span)
    column_runs = row_runs + tl.cdiv(images * (out_width - 1), span)
    corner_runs = column_runs + tl.cdiv(images * (out_height - 1), span)
    on_first_row = ((run >= row_runs) & (run < column_runs)) | (run >= corner_runs)
    on_first_column = run >= column_runs
    begin = tl.where(
        run >= corner_runs,
        corner_runs,
        tl.where(run >= column_runs, column_runs, tl.where(run >= row_runs, row_runs, 0)),
    )
    height = tl.where(on_first_row, 1, out_height - 1)
    width = tl.where(on_first_column, 1, out_width - 1)
    return run - begin, height, width, 1 - on_first_row.to(tl.int32), 1 - on_first_column.to(tl.int32)


@triton.jit
def _tile(
    grad_ptr,
    x_ptr,
    partial_ptr,
    column_block,
    output_block,
    first,
    count,
    region_height,
    region_width,
    first_row,
    first_column,
    height,
    width,
    out_height,
    out_width,
    loops,
    C: tl.constexpr,
    OFFSET: tl.constexpr,
    TOTAL: tl.constexpr,
    O: tl.constexpr,
    KERNEL: tl.constexpr,
    STRIDE: tl.constexpr,
    PADDING: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    LOOP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One tile's sum over LOOP * ``loops`` blocks of pixels from ``first`` on, of a source with C channels."""
    outputs = output_block * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = column_block * BLOCK_N + tl.arange(0, BLOCK_N)
    index = tl.arange(0, BLOCK_K)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    last = first + loops * (LOOP * BLOCK_K)
    while first < last:
        for step in range(LOOP):
            start = first + step * BLOCK_K
            present = start + index < count
            row, column, image = locate(start, index, region_height, region_width)
            row += first_row
            column += first_column
            target = (image * out_height + row) * out_width + column
            grad = tl.load(
                grad_ptr + target[:, None] * O + outputs[None, :],
                mask=present[:, None] & (outputs < O)[None, :],
                other=0.0,
            )
            y = row * STRIDE - PADDING
            x = column * STRIDE - PADDING
            origin = (image * height + y) * width + x
            source = _source(
                x_ptr, origin, y, x, present, column_block, columns, height, width, C, KERNEL, BLOCK_N
            )  # fmt: skip
            acc = dot(tl.trans(grad), source, acc, PRECISION)
        first += LOOP * BLOCK_K
    weight_column = columns // C * TOTAL + OFFSET + columns % C
    offset = outputs.to(tl.int64)[:, None] * (KERNEL * KERNEL * TOTAL) + weight_column[None, :]
    tl.store(partial_ptr + offset, acc, mask=(outputs < O)[:, None] & (columns < KERNEL * KERNEL * C)[None, :])


# Image sizes are not compiled in: a new image size does not compile the kernel again.
@triton.jit(do_not_specialize=["batch", "height", "width", "out_height", "out_width", "loops"])
def weight_gradient_kernel(
    grad_ptr,
    a_ptr,
    b_ptr,
    partial_ptr,
    batch,
    height,
    width,
    out_height,
    out_width,
    loops,
    A: tl.constexpr,
    B: tl.constexpr,
    O: tl.constexpr,
    KERNEL: tl.constexpr,
    STRIDE: tl.constexpr,
    PADDING: tl.constexpr,
    REGIONS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    LOOP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """A run of pixels for one tile. Runs are (runs, O, KERNEL, KERNEL, A + B), float32.

    With REGIONS, the runs have the order of the stem's weights: inside, first row, first column, corner.
    """
    OUTPUT_BLOCKS: tl.constexpr = (O + BLOCK_M - 1) // BLOCK_M
    A_BLOCKS: tl.constexpr = (KERNEL * KERNEL * A + BLOCK_N - 1) // BLOCK_N
    # Programs that read the same pixels have consecutive numbers, and find them in the cache.
    output_block = tl.program_id(0) % OUTPUT_BLOCKS
    column_block = tl.program_id(0) // OUTPUT_BLOCKS
    run = tl.program_id(1).to(tl.int64)
    images = tl.cast(batch, tl.int64)
    partial_ptr += run * (O * KERNEL * KERNEL * (A + B))
    span = tl.cast(loops, tl.int64) * (LOOP * BLOCK_K)
    first_row = 0
    first_column = 0
    region_height = out_height
    region_width = out_width
    if REGIONS:
        run, region_height, region_width, first_row, first_column = _region_of(
            run, images, out_height, out_width, span
        )  # fmt: skip
    count = images * region_height * region_width
    if column_block < A_BLOCKS:
        _tile(
            grad_ptr, a_ptr, partial_ptr, column_block, output_block, run * span, count, region_height, region_width,
            first_row, first_column, height, width, out_height, out_width, tl.cast(loops, tl.int64),
            A, 0, A + B, O, KERNEL, STRIDE, PADDING, BLOCK_M, BLOCK_N, BLOCK_K, LOOP, PRECISION,
        )  # fmt: skip
    elif B > 0:
        _tile(
            grad_ptr, b_ptr, partial_ptr, column_block - A_BLOCKS, output_block, run * span, count, region_height,
            region_width, first_row, first_column, height, width, out_height, out_width, tl.cast(loops, tl.int64),
            B, A, A + B, O, KERNEL, STRIDE, PADDING, BLOCK_M, BLOCK_N, BLOCK_K, LOOP, PRECISION,
        )  # fmt: skip


@triton.jit(do_not_specialize=["begin", "end", "size"])
def sum_kernel(partial_ptr, y_ptr, begin, end, size, BLOCK: tl.constexpr):
    """``y`` (size) is the sum of rows ``begin`` to ``end`` of (rows, size), added one after the other."""
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = index < size
    acc = tl.zeros((BLOCK,), tl.float32)
    row = tl.cast(begin, tl.int64)
    while row < end:
        acc += tl.load(partial_ptr + row * size + index, mask=mask, other=0.0)
        row += 1
    tl.store(y_ptr + index, acc.to(y_ptr.dtype.element_ty), mask=mask)


def weight_gradient(
    grad: Tensor,
    a: Tensor,
    b: Tensor | None,
    kernel: int,
    stride: int,
    padding: int,
    config: WeightGradientConfig | None = None,
) -> Tensor:
    """Gradient of the weight of ``conv2d(cat([a, b], 1), weight)``.

    Args:
        grad: gradient of the result, (N, O, H', W').
        a: (N, A, H, W).
        b: (N, B, H, W) or None.
        kernel, stride, padding: of the convolution.
        config: None for the default.

    Returns:
        (O, A + B, kernel, kernel), channels-last, in the dtype of ``a``; the same bits at every call.
    """
    partial, runs = _launch(grad, a, b, kernel, stride, padding, regions=False, config=config)
    return _sum(partial, 0, sum(runs), a.dtype).permute(0, 3, 1, 2)


def stem_weight_gradient(grad: Tensor, x: Tensor, config: WeightGradientConfig | None = None) -> Tensor:
    """Gradient of the stem's four sets of weights.

    Args:
        grad: gradient of the result, (N, O, (H - 4) / 2, (W - 4) / 2).
        x: (N, C, H, W).
        config: None for the default.

    Returns:
        (4, O, C, 7, 7) in the dtype of ``x``: inside, first row, first column, corner.
    """
    partial, runs = _launch(grad, x, None, STEM_KERNEL, STEM_STRIDE, 1, regions=True, config=config)
    ends = [sum(runs[: index + 1]) for index in range(4)]
    sets = [_sum(partial, end - count, end, x.dtype) for end, count in zip(ends, runs, strict=True)]
    return torch.stack(sets).permute(0, 1, 4, 2, 3)


def _launch(
    grad: Tensor,
    a: Tensor,
    b: Tensor | None,
    kernel: int,
    stride: int,
    padding: int,
    *,
    regions: bool,
    config: WeightGradientConfig | None,
) -> tuple[Tensor, list[int]]:
    """The sums of the runs, (runs, O, kernel, kernel, A + B), and the number of runs of each region."""
    grad, a = channels_last(grad), channels_last(a)
    b = None if b is None else channels_last(b)
    batch, channels, height, width = a.shape
    others = 0 if b is None else b.shape[1]
    outputs, out_height, out_width = grad.shape[1:]
    config = config or choose(
        "weight_gradient",
        f"{channels}+{others} to {outputs}, kernel {kernel}, stride {stride}, regions {regions}, {precision(a)}",
        batch * out_height * out_width, a,
        config_for(kernel**2 * channels, outputs, a.element_size(), precision(a), capability(a)),
    )  # fmt: skip
    blocks = triton.cdiv(kernel**2 * channels, config.block_n) + triton.cdiv(kernel**2 * others, config.block_n)
    blocks *= triton.cdiv(outputs, config.block_m)
    h, w = out_height, out_width
    sizes = [(h - 1) * (w - 1), w - 1, h - 1, 1] if regions else [h * w]
    loops = _loops(batch * sizes[0], blocks, config.loop * config.block_k, a)
    runs = [triton.cdiv(batch * size, loops * config.loop * config.block_k) for size in sizes]
    shape = (sum(runs), outputs, kernel, kernel, channels + others)
    partial = torch.empty(shape, dtype=torch.float32, device=a.device)
    if partial.numel():
        with device_guard(a):
            weight_gradient_kernel[(blocks, sum(runs))](
                grad, a, a if b is None else b, partial, batch, height, width, out_height, out_width, loops,
                A=channels, B=others, O=outputs, KERNEL=kernel, STRIDE=stride, PADDING=padding, REGIONS=regions,
                BLOCK_M=config.block_m, BLOCK_N=config.block_n, BLOCK_K=config.block_k, LOOP=config.loop,
                PRECISION=precision(a), num_warps=config.warps, num_stages=config.stages,
            )  # fmt: skip
    return partial, runs


def _loops(pixels: int, blocks: int, in_loop: int, x: Tensor) -> int:
    """Loops of a run, each of ``in_loop`` pixels. There are as few runs as keep the GPU busy."""
    # Interpreted, a few programs are enough to test that runs are added.
    runs = max(1, triton.cdiv(PROGRAMS * multiprocessors(x, interpreted=4), blocks))
    return max(1, int(triton.cdiv(triton.cdiv(pixels, in_loop), runs)))


def _sum(partial: Tensor, begin: int, end: int, dtype: torch.dtype) -> Tensor:
    """The sum of runs ``begin`` to ``end``, (O, kernel, kernel, C)."""
    y = torch.empty(partial.shape[1:], dtype=dtype, device=partial.device)
    if y.numel():
        with device_guard(partial):
            sum_kernel[(triton.cdiv(y.numel(), BLOCK_SUM),)](partial, y, begin, end, y.numel(), BLOCK=BLOCK_SUM)
    return y
