"""bottleneck on Triton, at inference: ``relu(x + expand(relu(conv(relu(reduce(x))))))``, BN folded into biases.

Triton cannot read registers or shared memory at shifted positions. A program that makes a map and then applies the 3x3
convolution to it would need this. The table compares four solutions for (C, M) bottlenecks of (128, 32) and (256, 64)
in 16-bit storage. All numbers are per pixel. Products are multiply-accumulates. DRAM is the bytes that must pass
through DRAM. L2 is the bytes of activations that programs read and write (weights add about 400 and 800):

==================================  ===========================================  =========  ==========
way                                 products                                     DRAM       L2
==================================  ===========================================  =========  ==========
reduce again for each of 9 taps     9 C M + 9 M M + M C = 50200, 200700          512, 1024  2800, 5600
two kernels, the map in memory      C M + 9 M M + M C = 17400, 69600             896, 1792  1400, 2800
one kernel, the map in scratch      1.5 C M + 9 M M + M C = 19500, 77800         512, 1024  1500, 3000
``tl.gather`` of a map's rows       1.5 C M + 9 M M + M C = 19500, 77800         512, 1024  900, 1700
==================================  ===========================================  =========  ==========

``fused`` is the third way. A program owns a tile of output pixels. It reduces the tile and its one-pixel margin, stores
the result in its own scratch, waits for its own threads, and reads the scratch at the nine shifts. Programs are
persistent, so they write the same scratch again and again, and it stays in L2 (3 and 6 MiB for all programs of an
H100). The factor 1.5 comes from the margin and from the last block of its pixels, which is partly filled. The second
way does the same steps in two kernels; it exists for comparison. The first way multiplies 2.9 times as much and reads x
nine times. The last way writes the map to shared memory and reads it there, one element at a time, for each tap.

Nothing here was measured on a GPU: bytes and products are counted, and tiles are chosen so that registers do not spill.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastden.kernels._common import device_guard, dot, locate, multiprocessors, precision
from fastden.kernels._conv import _accumulate, launch_conv
from fastden.kernels._layout import channels_last
from fastden.kernels._tiles import ONE_WAVE
from fastden.kernels._tuned import choose

#: One program holds all sums of the 3x3 convolution of a pixel.
LARGEST_MIDDLE = 128


@dataclass(frozen=True)
class BottleneckConfig:
    """How the bottleneck is run.

    Args:
        block_m: output pixels that a program holds at once, a power of two, at least 16. A fused tile is as near to
            square as powers of two allow, and wider than high.
        warps, stages: warps of a program, and pipeline stages of its loads.
        fused: True for one kernel; False for two, which pass the middle map through memory.
        programs: programs of the fused kernel for each multiprocessor.
    """

    block_m: int
    warps: int
    stages: int
    fused: bool
    programs: int = 2

    @property
    def tile(self) -> tuple[int, int]:
        """Height and width of a fused tile."""
        height = 1 << (self.block_m.bit_length() - 1) // 2
        return height, self.block_m // height


def config_for(channels: int, middle: int, pixels: int, itemsize: int, products: str = "tf32") -> BottleneckConfig:
    """Default configuration for C = ``channels``, M = ``middle`` and N * H * W = ``pixels``; not measured on a GPU."""
    if itemsize > 2 and products == "ieee":
        # Without matrix instructions, operands also fill registers: 64 pixels of (256, 64) spill 8 bytes on sm_80.
        return BottleneckConfig(block_m=64 if middle <= 32 else 32, warps=8, stages=2, fused=True)
    # Few pixels: smaller tiles keep more multiprocessors busy. Other types and sizes: twice the bytes or sums a pixel.
    if pixels < ONE_WAVE or itemsize > 2 or middle > 64:
        return BottleneckConfig(block_m=64, warps=4, stages=2, fused=True)
    if middle <= 32:
        return BottleneckConfig(block_m=128, warps=4, stages=3, fused=True)
    # Every tile reads all weights again, so large weights need a larger tile. Registers suffice for one program.
    return BottleneckConfig(block_m=256, warps=8, stages=3, fused=True, programs=1)


@triton.jit
def _relu(values):
    # maximum(values, 0) would hide a NaN.
    return tl.where(values < 0.0, 0.0, values)


@triton.jit
def _reduce(
    x_ptr,
    reduce_ptr,
    bias_ptr,
    middle_ptr,
    image,
    top,
    left,
    height,
    width,
    C: tl.constexpr,
    M: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    MARGIN_WIDTH: tl.constexpr,
    CHUNKS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_MID: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Store ``relu(reduce(x) + bias)`` of the tile and its margin in the scratch; the first pixel is (top, left).

    Outside the image the value is 0, not ``relu(bias)``: the convolution pads the reduced map. The channels from M to
    BLOCK_MID are also 0, so that reads need no mask.
    """
    STEPS: tl.constexpr = (C + BLOCK_K - 1) // BLOCK_K
    k = tl.arange(0, BLOCK_K)
    middles = tl.arange(0, BLOCK_MID)
    acc = tl.zeros((BLOCK_R, BLOCK_MID), tl.float32)
    # One loop over blocks of pixels and of channels keeps the pipeline of loads full between blocks.
    for step in range(CHUNKS * STEPS):
        position = (step // STEPS) * BLOCK_R + tl.arange(0, BLOCK_R)
        channel = (step % STEPS) * BLOCK_K + k
        y = top + position // MARGIN_WIDTH
        x = left + position % MARGIN_WIDTH
        inside = (y >= 0) & (y < height) & (x >= 0) & (x < width)
        pixel = (image * height + y) * width + x
        source = tl.load(
            x_ptr + pixel[:, None] * C + channel[None, :],
            mask=inside[:, None] & (channel < C)[None, :],
            other=0.0,
        )
        weights = tl.load(
            reduce_ptr + middles[:, None] * C + channel[None, :],
            mask=(middles < M)[:, None] & (channel < C)[None, :],
            other=0.0,
        )
        acc = dot(source, tl.trans(weights), acc, PRECISION)
        if step % STEPS == STEPS - 1:
            if HAS_BIAS:
                acc += tl.load(bias_ptr + middles, mask=middles < M, other=0.0).to(tl.float32)[None, :]
            values = tl.where(inside[:, None], _relu(acc), 0.0)
            tl.store(
                middle_ptr + position[:, None] * BLOCK_MID + middles[None, :], values.to(middle_ptr.dtype.element_ty)
            )
            acc = tl.zeros((BLOCK_R, BLOCK_MID), tl.float32)


@triton.jit
def _convolve_scratch(
    acc,
    middle_ptr,
    conv_ptr,
    M: tl.constexpr,
    MARGIN_WIDTH: tl.constexpr,
    TILE_WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_MID: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """``acc`` plus the 3x3 convolution of the scratch."""
    STEPS: tl.constexpr = BLOCK_MID // BLOCK_K
    k = tl.arange(0, BLOCK_K)
    outputs = tl.arange(0, BLOCK_MID)
    pixel = tl.arange(0, BLOCK_M)
    corner = (pixel // TILE_WIDTH) * MARGIN_WIDTH + pixel % TILE_WIDTH
    for step in range(9 * STEPS):
        tap = step // STEPS
        channel = (step % STEPS) * BLOCK_K + k
        position = corner + (tap // 3) * MARGIN_WIDTH + tap % 3
        source = tl.load(middle_ptr + position[:, None] * BLOCK_MID + channel[None, :])
        weights = tl.load(
            conv_ptr + (outputs[:, None] * 9 + tap) * M + channel[None, :],
            mask=(outputs < M)[:, None] & (channel < M)[None, :],
            other=0.0,
        )
        acc = dot(source, tl.trans(weights), acc, PRECISION)
    return acc


@triton.jit
def _expand(
    acc,
    conv_bias_ptr,
    expand_ptr,
    bias_ptr,
    x_ptr,
    y_ptr,
    pixels,
    rows,
    C: tl.constexpr,
    M: tl.constexpr,
    HAS_CONV_BIAS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_MID: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Store ``relu(x + expand(relu(acc + conv_bias)) + bias)`` at ``pixels``, one block of channels at a time."""
    middles = tl.arange(0, BLOCK_MID)
    if HAS_CONV_BIAS:
        acc += tl.load(conv_bias_ptr + middles, mask=middles < M, other=0.0).to(tl.float32)[None, :]
    middle = _relu(acc).to(x_ptr.dtype.element_ty)
    # The sums of all channels would not fit into registers.
    for first in range(0, C, BLOCK_N):
        outputs = first + tl.arange(0, BLOCK_N)
        weights = tl.load(
            expand_ptr + outputs[:, None] * M + middles[None, :],
            mask=(outputs < C)[:, None] & (middles < M)[None, :],
            other=0.0,
        )
        values = dot(middle, tl.trans(weights), tl.zeros((BLOCK_M, BLOCK_N), tl.float32), PRECISION)
        if HAS_BIAS:
            values += tl.load(bias_ptr + outputs, mask=outputs < C, other=0.0).to(tl.float32)[None, :]
        mask = rows[:, None] & (outputs < C)[None, :]
        target = pixels[:, None] * C + outputs[None, :]
        values += tl.load(x_ptr + target, mask=mask, other=0.0).to(tl.float32)
        tl.store(y_ptr + target, _relu(values).to(y_ptr.dtype.element_ty), mask=mask)


# Image sizes are not compiled in: a new image size does not compile the kernel again.
@triton.jit(do_not_specialize=["batch", "height", "width"])
def bottleneck_kernel(
    x_ptr,
    reduce_ptr,
    conv_ptr,
    expand_ptr,
    reduce_bias_ptr,
    conv_bias_ptr,
    expand_bias_ptr,
    middle_ptr,
    y_ptr,
    batch,
    height,
    width,
    C: tl.constexpr,
    M: tl.constexpr,
    HAS_REDUCE_BIAS: tl.constexpr,
    HAS_CONV_BIAS: tl.constexpr,
    HAS_EXPAND_BIAS: tl.constexpr,
    TILE_HEIGHT: tl.constexpr,
    TILE_WIDTH: tl.constexpr,
    CHUNKS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_MID: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The fused bottleneck on tiles of TILE_HEIGHT x TILE_WIDTH pixels.

    Program p of P makes the tiles p, p + P, p + 2 P and so on. ``middle_ptr`` is the scratch of all programs:
    (programs, CHUNKS * BLOCK_R, BLOCK_MID).
    """
    BLOCK_M: tl.constexpr = TILE_HEIGHT * TILE_WIDTH
    MARGIN_WIDTH: tl.constexpr = TILE_WIDTH + 2
    program = tl.program_id(0)
    middle_ptr += program.to(tl.int64) * (CHUNKS * BLOCK_R * BLOCK_MID)
    down = tl.cdiv(height, TILE_HEIGHT)
    across = tl.cdiv(width, TILE_WIDTH)
    pixel = tl.arange(0, BLOCK_M)
    tile = program
    # No tl.range: with numpy 2.4, the interpreter of Triton 3.6 cannot handle its bounds.
    while tile < batch * down * across:
        # 64 bits: a 24-megapixel image with 256 channels has more elements than 32 bits can count.
        image = (tile // (down * across)).to(tl.int64)
        top = (tile // across) % down * TILE_HEIGHT
        left = tile % across * TILE_WIDTH
        # Wait until every thread has read the scratch of the previous tile, before a thread overwrites it.
        tl.debug_barrier()
        _reduce(
            x_ptr, reduce_ptr, reduce_bias_ptr, middle_ptr, image, top - 1, left - 1, height, width,
            C, M, HAS_REDUCE_BIAS, MARGIN_WIDTH, CHUNKS, BLOCK_R, BLOCK_K, BLOCK_MID, PRECISION,
        )  # fmt: skip
        # Wait until every thread has written the scratch of this tile, before a thread reads it.
        tl.debug_barrier()
        acc = tl.zeros((BLOCK_M, BLOCK_MID), tl.float32)
        acc = _convolve_scratch(
            acc, middle_ptr, conv_ptr,
            M, MARGIN_WIDTH, TILE_WIDTH, BLOCK_M, min(BLOCK_K, BLOCK_MID), BLOCK_MID, PRECISION,
        )  # fmt: skip
        y = top + pixel // TILE_WIDTH
        x = left + pixel % TILE_WIDTH
        _expand(
            acc, conv_bias_ptr, expand_ptr, expand_bias_ptr, x_ptr, y_ptr,
            (image * height + y) * width + x, (y < height) & (x < width),
            C, M, HAS_CONV_BIAS, HAS_EXPAND_BIAS, BLOCK_M, BLOCK_C, BLOCK_MID, PRECISION,
        )  # fmt: skip
        tile += tl.num_programs(0)


@triton.jit(do_not_specialize=["batch", "height", "width"])
def conv_expand_kernel(
    x_ptr,
    middle_ptr,
    conv_ptr,
    expand_ptr,
    conv_bias_ptr,
    expand_bias_ptr,
    y_ptr,
    batch,
    height,
    width,
    C: tl.constexpr,
    M: tl.constexpr,
    HAS_CONV_BIAS: tl.constexpr,
    HAS_EXPAND_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_MID: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The second of two kernels: ``relu(x + expand(relu(conv(middle))))``, BLOCK_M pixels per program."""
    outputs = tl.arange(0, BLOCK_MID)
    pixels = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    row, column, image = locate(tl.program_id(0).to(tl.int64) * BLOCK_M, tl.arange(0, BLOCK_M), height, width)
    rows = image < batch
    origin = (image * height + row - 1) * width + column - 1
    acc = tl.zeros((BLOCK_M, BLOCK_MID), tl.float32)
    acc = _accumulate(
        acc, middle_ptr, conv_ptr, origin, row - 1, column - 1, rows, outputs,
        height, width, M, 0, M, 3, min(BLOCK_K, BLOCK_MID), M, PRECISION,
    )  # fmt: skip
    _expand(
        acc, conv_bias_ptr, expand_ptr, expand_bias_ptr, x_ptr, y_ptr, pixels, rows,
        C, M, HAS_CONV_BIAS, HAS_EXPAND_BIAS, BLOCK_M, BLOCK_C, BLOCK_MID, PRECISION,
    )  # fmt: skip


def bottleneck(
    x: Tensor,
    reduce: Tensor,
    conv: Tensor,
    expand: Tensor,
    biases: tuple[Tensor | None, Tensor | None, Tensor | None] = (None, None, None),
    config: BottleneckConfig | None = None,
) -> Tensor:
    """``relu(x + expand(relu(conv(relu(reduce(x))))))``, BN folded.

    Args:
        x: (N, C, H, W), float16, bfloat16 or float32.
        reduce: (M, C, 1, 1).
        conv: (M, M, 3, 3), padding 1.
        expand: (C, M, 1, 1).
        biases: of the three convolutions: (M,), (M,) and (C,); each may be None.
        config: None for the default.

    Returns:
        (N, C, H, W), channels-last.
    """
    x, conv = (channels_last(tensor) for tensor in (x, conv))
    reduce, expand = reduce.contiguous(), expand.contiguous()
    b1, b2, b3 = (None if bias is None else bias.contiguous() for bias in biases)
    batch, channels, height, width = x.shape
    middle = reduce.shape[0]
    y = torch.empty_like(x, memory_format=torch.channels_last)
    if y.numel() == 0:
        return y
    pixels = batch * height * width
    config = config or choose(
        "bottleneck", f"{channels}, {middle}, {precision(x)}", pixels, x,
        config_for(channels, middle, pixels, x.element_size(), precision(x)),
    )  # fmt: skip
    constants = _constants(channels, middle, x.element_size(), precision(x), config)
    if not config.fused:
        reduced, _ = launch_conv(x, None, reduce, b1, None, relu=True)
        with device_guard(x):
            conv_expand_kernel[(triton.cdiv(pixels, config.block_m),)](
                x, reduced, conv, expand, x if b2 is None else b2, x if b3 is None else b3, y, batch, height, width,
                HAS_CONV_BIAS=b2 is not None, HAS_EXPAND_BIAS=b3 is not None, **constants,
                num_warps=config.warps, num_stages=config.stages,
            )  # fmt: skip
        return y
    tile_height, tile_width = config.tile
    tiles = batch * triton.cdiv(height, tile_height) * triton.cdiv(width, tile_width)
    # Interpreted, two programs are enough to test that they do not share scratch.
    programs = min(tiles, config.programs * multiprocessors(x, interpreted=1))
    scratch = x.new_empty(programs, constants["CHUNKS"] * constants["BLOCK_R"], constants["BLOCK_MID"])
    with device_guard(x):
        bottleneck_kernel[(programs,)](
            x, reduce, conv, expand, x if b1 is None else b1, x if b2 is None else b2, x if b3 is None else b3,
            scratch, y, batch, height, width,
            HAS_REDUCE_BIAS=b1 is not None, HAS_CONV_BIAS=b2 is not None, HAS_EXPAND_BIAS=b3 is not None, **constants,
            num_warps=config.warps, num_stages=config.stages,
        )  # fmt: skip
    return y


def why_not(x: Tensor, reduce: Tensor, conv: Tensor, expand: Tensor, **_: Tensor) -> list[str]:
    """Why the kernel does not support these shapes; empty if it does."""
    channels, middle = expand.shape[0], reduce.shape[0]
    expected = {
        "x": (x, (*x.shape[:1], channels, *x.shape[2:])),
        "reduce": (reduce, (middle, channels, 1, 1)),
        "conv": (conv, (middle, middle, 3, 3)),
        "expand": (expand, (channels, middle, 1, 1)),
    }
    reasons = [
        f"{name}: {tuple(tensor.shape)}; accepted: {shape}"
        for name, (tensor, shape) in expected.items()
        if tensor.ndim != 4 or tuple(tensor.shape) != shape
    ]
    if not 1 <= middle <= LARGEST_MIDDLE:
        reasons.append(f"M: {middle}; accepted: 1 up to {LARGEST_MIDDLE}")
    if channels < 1:
        reasons.append(f"C: {channels}; accepted: from 1 on")
    return reasons


def _constants(channels: int, middle: int, itemsize: int, products: str, config: BottleneckConfig) -> dict[str, Any]:
    """Compile-time arguments of the kernel that ``config`` selects, except those that say which biases exist."""
    block_c = max(16, triton.next_power_of_2(channels))
    shared = {
        "C": channels,
        "M": middle,
        "BLOCK_C": min(64 if config.fused and middle <= 32 else 32, block_c),
        "BLOCK_K": min(64 if itemsize <= 2 else 32, block_c),
        "BLOCK_MID": max(16, triton.next_power_of_2(middle)),
        "PRECISION": products,
    }
    if not config.fused:
        return {**shared, "BLOCK_M": config.block_m}
    height, width = config.tile
    # At least as many as the rows of sm_90's matrix instruction.
    block_r = min(128, max(64, config.block_m // 2))
    chunks = triton.cdiv((height + 2) * (width + 2), block_r)
    return {**shared, "TILE_HEIGHT": height, "TILE_WIDTH": width, "CHUNKS": chunks, "BLOCK_R": block_r}
