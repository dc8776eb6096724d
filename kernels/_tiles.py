"""Tiles of a convolution: their sizes, and how every form of the kernel stores a finished tile."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

#: Pixels of one wave: a tile of 128 pixels on each of an H100's 132 multiprocessors.
ONE_WAVE = 128 * 132


@dataclass(frozen=True)
class ConvConfig:
    """Sizes of a tile and how it is run: output pixels, output channels, inner dimension, warps, pipeline stages.

    With ``descriptors`` the kernel of ``_descriptors.py`` runs: stride 1, no statistics, sm_90 and later.
    """

    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int
    descriptors: bool = False


#: Tiles that a GPU showed to be the fastest, used from :data:`ONE_WAVE` pixels on: by compute capability, dtype,
#: channels of both sources, output channels and kernel. conv3 on an H200, 540 x 960: 0.658 ms, and 0.851 ms with the
#: tile of :func:`config_for` (benchmarks/results/h200/conv3-tiles.json).
MEASURED = {
    ((9, 0), torch.bfloat16, 128, 32, 256, 3): ConvConfig(128, 256, 64, warps=8, stages=3, descriptors=True),
}


def config_for(channels: int, outputs: int, pixels: int, itemsize: int, products: str = "tf32") -> ConvConfig:
    """Default tile of a convolution that :data:`MEASURED` does not have.

    Not measured on a GPU. The tiles are chosen so that nothing spills on sm_80, sm_90 and sm_100, and that the buffers
    of the pipeline take at most 96 KiB of shared memory: two blocks fit on sm_90, and one on sm_80.
    """
    # Sums and products of float32 have no matrix instruction, and spill at 128 x 128.
    block_n = min(128 if itemsize <= 2 else 64, max(16, triton.next_power_of_2(outputs)))
    block_k = min(64 if itemsize <= 2 else 32, max(16, triton.next_power_of_2(channels)))
    # Few pixels: smaller tiles keep more multiprocessors busy.
    block_m = 128 if pixels >= ONE_WAVE else 64
    if block_m == 64 and itemsize <= 2 and channels <= block_k < outputs:
        # All channels in one step of 64: 8 bytes spill on sm_80 (Triton 3.9).
        block_k = min(block_k, 32)
    if itemsize > 2 and products == "ieee":
        # Without matrix instructions operands fill registers, too: larger tiles, or fewer warps, spill on sm_80 or
        # sm_100, and few channels in steps of 32 on sm_90.
        return ConvConfig(64, block_n, min(block_k, 16) if channels <= 64 else block_k, warps=8, stages=3)
    # Addresses are 64-bit: 128 x 64 of them in four warps spill on sm_80. The sums of a TF32 tile of 64 x 64 spill on
    # sm_100.
    warps = 8 if block_m * max(block_n, block_k) >= 128 * 64 or (itemsize > 2 and block_n == 64) else 4
    return ConvConfig(block_m, block_n, block_k, warps, stages=3)


def second_block(others: int, config: ConvConfig) -> int:
    """Inner dimension of a step over the second source: not wider than its channels, which are 32 of conv3's 160."""
    return min(config.block_k, max(16, int(triton.next_power_of_2(others))))


@triton.jit
def finish(acc, residual_ptr, y_ptr, target, mask, HAS_RESIDUAL: tl.constexpr, RELU: tl.constexpr):
    """Store ``relu(acc + residual)`` at ``target``."""
    if HAS_RESIDUAL:
        acc += tl.load(residual_ptr + target, mask=mask, other=0.0).to(tl.float32)
    if RELU:
        # maximum(acc, 0) alone would hide a NaN.
        acc = tl.where(acc < 0.0, 0.0, acc)
    tl.store(y_ptr + target, acc.to(y_ptr.dtype.element_ty), mask=mask)
