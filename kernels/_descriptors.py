"""A second form of the convolution of stride 1: TMA copies its inputs through tensor descriptors (sm_90 and later).

A tile is a rectangle of output pixels. For each tap, the tile reads one box of the source (N, H, W, C), shifted by the
tap. One instruction of one thread copies the box to shared memory, so no register holds an address for each pixel.
Elements outside the source arrive as zeros: this is the padding. Everything else is as in ``_conv.py``.

The host makes the descriptors and passes them to the kernel as arguments. If the kernel made them, it would need an
allocator in a variable that belongs to the caller (``triton.set_allocator``).

Only ``ConvConfig(descriptors=True)`` selects this form. It is the default where it was measured to be the fastest
(``MEASURED`` in ``_tiles.py``).
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from fastden.kernels._common import INTERPRETED, device_guard, dot, precision
from fastden.kernels._tiles import ConvConfig, finish, second_block

#: TMA exists from this compute capability on.
CAPABILITY = (9, 0)
#: Bytes. The address of a descriptor and all its strides, except the innermost (which is 1), are multiples of this.
ALIGNMENT = 16


@triton.jit
def _accumulate_boxes(
    acc,
    x_desc,
    w_desc,
    image,
    top,
    left,
    first_output,
    C: tl.constexpr,
    OFFSET: tl.constexpr,
    TOTAL: tl.constexpr,
    KERNEL: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """``acc`` plus the taps of one source with C of the TOTAL input channels, from channel OFFSET of the weights on.

    ``acc`` is (outputs, pixels), so that the box is the second operand. As the second operand, Triton 3.6 passes a
    reshaped box to sm_90's matrix instruction directly from shared memory. As the first, it goes through registers.

    If C is not a multiple of BLOCK_K, the last step also reads weights of other channels or taps. They are multiplied
    by the zeros of channels that the source does not have.
    """
    STEPS: tl.constexpr = (C + BLOCK_K - 1) // BLOCK_K
    for step in range(KERNEL * KERNEL * STEPS):
        tap = step // STEPS
        channel = (step % STEPS) * BLOCK_K
        box = x_desc.load([image, top + tap // KERNEL, left + tap % KERNEL, channel])
        weights = w_desc.load([first_output, tap * TOTAL + OFFSET + channel])
        acc = dot(weights, tl.trans(tl.reshape(box, (BLOCK_M, BLOCK_K))), acc, PRECISION)
    return acc


@triton.jit(do_not_specialize=["out_height", "out_width"])
def descriptor_conv_kernel(
    a_desc,
    b_desc,
    w_desc,
    b_w_desc,
    bias_ptr,
    residual_ptr,
    y_ptr,
    out_height,
    out_width,
    A: tl.constexpr,
    B: tl.constexpr,
    O: tl.constexpr,
    KERNEL: tl.constexpr,
    PADDING: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    RELU: tl.constexpr,
    TILE_HEIGHT: tl.constexpr,
    TILE_WIDTH: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_B: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One TILE_HEIGHT x TILE_WIDTH tile of ``relu(conv(cat(a, b)) + bias + residual)``.

    Boxes of ``a_desc`` and ``b_desc`` are (1, TILE_HEIGHT, TILE_WIDTH, BLOCK_K or BLOCK_B). The weights,
    (O, KERNEL * KERNEL * (A + B)), have one descriptor for each source, with boxes (BLOCK_N, BLOCK_K or BLOCK_B).
    """
    BLOCK_M: tl.constexpr = TILE_HEIGHT * TILE_WIDTH
    down = tl.cdiv(out_height, TILE_HEIGHT)
    across = tl.cdiv(out_width, TILE_WIDTH)
    # Programs that read the same pixels have consecutive numbers: all but the first find them in the level-2 cache.
    BLOCKS: tl.constexpr = (O + BLOCK_N - 1) // BLOCK_N
    tile = tl.program_id(0) // BLOCKS
    image = tile // (down * across)
    top = (tile // across) % down * TILE_HEIGHT
    left = tile % across * TILE_WIDTH
    first = tl.program_id(0) % BLOCKS * BLOCK_N

    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    acc = _accumulate_boxes(
        acc, a_desc, w_desc, image, top - PADDING, left - PADDING, first,
        A, 0, A + B, KERNEL, BLOCK_M, BLOCK_K, PRECISION,
    )  # fmt: skip
    if B > 0:
        acc = _accumulate_boxes(
            acc, b_desc, b_w_desc, image, top - PADDING, left - PADDING, first,
            B, A, A + B, KERNEL, BLOCK_M, BLOCK_B, PRECISION,
        )  # fmt: skip

    acc = tl.trans(acc)
    outputs = first + tl.arange(0, BLOCK_N)
    if HAS_BIAS:
        acc += tl.load(bias_ptr + outputs, mask=outputs < O, other=0.0).to(tl.float32)[None, :]
    pixel = tl.arange(0, BLOCK_M)
    y = top + pixel // TILE_WIDTH
    x = left + pixel % TILE_WIDTH
    # 64 bits: a 24-megapixel image with 256 channels has more elements than 32 bits can count.
    target = ((image.to(tl.int64) * out_height + y) * out_width + x)[:, None] * O + outputs[None, :]
    mask = ((y < out_height) & (x < out_width))[:, None] & (outputs < O)[None, :]
    finish(acc, residual_ptr, y_ptr, target, mask, HAS_RESIDUAL, RELU)


def launch_descriptor_conv(
    a: Tensor,
    b: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    y: Tensor,
    *,
    relu: bool,
    padding: int,
    config: ConvConfig,
) -> None:
    """Write :func:`descriptor_conv_kernel`'s result to ``y``; the rest as in :func:`fastden.kernels._conv.launch_conv`.

    Raises:
        ValueError: the tensors cannot be described.
    """
    reasons = why_not(a, b, weight)
    if reasons:
        raise ValueError(f"config: descriptors=True; accepted: False here ({'; '.join(reasons)})")
    channels, others, outputs, kernel = a.shape[1], 0 if b is None else b.shape[1], weight.shape[0], weight.shape[-1]
    constants = constants_of(channels, others, outputs, kernel, padding, config)
    box = [1, constants["TILE_HEIGHT"], constants["TILE_WIDTH"]]
    weights = [outputs, kernel**2 * (channels + others)]
    out_height, out_width = y.shape[2:]
    tiles = y.shape[0] * triton.cdiv(out_height, box[1]) * triton.cdiv(out_width, box[2])
    described = {
        "a_desc": _describe(a, _channels_innermost(a), [*box, constants["BLOCK_K"]]),
        "w_desc": _describe(weight, weights, [config.block_n, constants["BLOCK_K"]]),
    }
    if b is not None:
        described["b_desc"] = _describe(b, _channels_innermost(b), [*box, constants["BLOCK_B"]])
        described["b_w_desc"] = _describe(weight, weights, [config.block_n, constants["BLOCK_B"]])
    with device_guard(a):
        if a.is_cuda:
            # A thread's first call: Triton 3.6 encodes descriptors before it makes the device's context.
            torch.cuda.set_device(a.device)
        descriptor_conv_kernel[(tiles * triton.cdiv(outputs, config.block_n),)](
            **described, bias_ptr=a if bias is None else bias, residual_ptr=a if residual is None else residual,
            y_ptr=y, out_height=out_height, out_width=out_width,
            HAS_BIAS=bias is not None, HAS_RESIDUAL=residual is not None, RELU=relu, PRECISION=precision(a),
            **constants, num_warps=config.warps, num_stages=config.stages,
        )  # fmt: skip


def why_not(a: Tensor, b: Tensor | None, weight: Tensor) -> list[str]:
    """Why descriptors cannot describe these channels-last tensors; empty if they can."""
    reasons = []
    found = capability(a)
    if found is not None and found < CAPABILITY:
        reasons.append(f"device: compute capability {_version(found)}")
    elif found is None and a.is_cuda:
        reasons.append("device: a GPU of AMD; accepted: one of NVIDIA")
    elif not a.is_cuda and not INTERPRETED.value:
        reasons.append(f"device: {a.device.type}; accepted: cuda")
    for name, tensor in {"a": a, "b": b, "weight": weight}.items():
        if tensor is None:
            continue
        if tensor.shape[1] * tensor.element_size() % ALIGNMENT:
            accepted = f"a multiple of {ALIGNMENT // tensor.element_size()}"
            reasons.append(f"{name}: {tensor.shape[1]} channels; accepted: {accepted}")
        if tensor.data_ptr() % ALIGNMENT:
            reasons.append(f"{name}: begins at {tensor.data_ptr():#x}; accepted: a multiple of {ALIGNMENT} bytes")
    return reasons


def capability(x: Tensor) -> tuple[int, int] | None:
    """The compute capability of the GPU that ``x`` is on; None on a CPU, and on AMD's, whose numbers are others."""
    return torch.cuda.get_device_capability(x.device) if x.is_cuda and not torch.version.hip else None


def constants_of(
    channels: int, others: int, outputs: int, kernel: int, padding: int, config: ConvConfig
) -> dict[str, Any]:
    """Compile-time arguments, except those of epilogue and products. Without source ``b`` its descriptors are None."""
    # As near to square as powers of two allow, and wider than high: then the tiles read the fewest pixels twice.
    height = 1 << (config.block_m.bit_length() - 1) // 2
    absent = {} if others else {"b_desc": None, "b_w_desc": None}
    return absent | {
        "A": channels, "B": others, "O": outputs, "KERNEL": kernel, "PADDING": padding, "TILE_HEIGHT": height,
        "TILE_WIDTH": config.block_m // height, "BLOCK_N": config.block_n, "BLOCK_K": config.block_k,
        "BLOCK_B": second_block(others, config),
    }  # fmt: skip


def _describe(tensor: Tensor, shape: list[int], box: list[int]) -> TensorDescriptor:
    strides = [1]
    for size in reversed(shape[1:]):
        strides.insert(0, strides[0] * size)
    return TensorDescriptor(tensor, shape, strides, box)


def _channels_innermost(x: Tensor) -> list[int]:
    batch, channels, height, width = x.shape
    return [batch, height, width, channels]


def _version(found: tuple[int, int]) -> str:
    return f"{found[0]}.{found[1]}; accepted: {CAPABILITY[0]}.{CAPABILITY[1]} or later"
