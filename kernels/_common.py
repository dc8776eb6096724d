"""What every kernel's launch needs: the device guard, the precision of products, and a product for the interpreter."""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

#: Whether kernels are interpreted on the CPU (``TRITON_INTERPRET=1``).
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """``acc + a @ b`` with float32 sums."""
    if INTERPRETED:
        # The interpreter (Triton 3.6 to 3.9) multiplies the bits of bfloat16 numbers as integers.
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def locate(first, index, height, width):
    """Row and column (32 bits) and image (64 bits) of pixels ``first + index`` of a batch of ``height`` x ``width``.

    ``first`` is 64 bits wide. Only it is divided in 64 bits, by the width and then by the height, once for all pixels.
    Each pixel then needs 32-bit divisions only, by the same two numbers.
    """
    line = first // width
    offset = (first % width).to(tl.int32) + index
    image = line // height
    rows = (line % height).to(tl.int32) + offset // width
    return rows % height, offset % width, image + rows // height


def precision(x: Tensor) -> str:
    """How products of float32 are computed: in TF32 if torch allows it for convolutions."""
    if x.dtype != torch.float32 or not x.is_cuda:
        return "ieee"
    try:
        allowed = torch.backends.cudnn.allow_tf32
    except RuntimeError:  # PyTorch refuses to tell where its newer setting, for convolutions alone, was used
        allowed = torch.backends.cudnn.conv.fp32_precision == "tf32"
    return "tf32" if allowed else "ieee"


def multiprocessors(x: Tensor, interpreted: int) -> int:
    """The number of multiprocessors of the GPU that ``x`` is on; ``interpreted`` on the CPU, one program at a time.

    AMD's GPUs, which PyTorch calls "cuda" too, have compute units in their place.
    """
    return _multiprocessors_of(x.device.index) if x.is_cuda else interpreted


@functools.cache
def _multiprocessors_of(index: int) -> int:
    """Asked once for each GPU: launches of small images wait for the host."""
    return int(torch.cuda.get_device_properties(index).multi_processor_count)


def device_guard(x: Tensor) -> torch.cuda.device:
    """Make the device of ``x`` the current one, on which kernels launch. On the CPU (interpreter) this does nothing."""
    return torch.cuda.device(x.device if x.is_cuda else -1)
