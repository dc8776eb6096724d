"""Batch normalisation in training: statistics, the affine map with ReLU, and its gradient.

The statistics of most convolutions come out of their own epilogue (``_conv.py``); :func:`statistics` reads a tensor for
the others.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastden.kernels._common import Specimen, channels_last, device_guard

#: Rows (pixels) and channels of an element-wise tile. Not measured on a GPU: 16 KiB of bfloat16 a block.
BLOCK_ROWS, BLOCK_CHANNELS = 128, 64
#: Rows of a tile of :func:`statistics`, which holds it whole: 128 of them spill on sm_90.
STATISTICS_ROWS = 64
#: Rows that one program of a reduction sums, at most.
REDUCTION_ROWS = 4096


def combine(statistics: Tensor, count: int, block: int) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of all rows from each tile's mean and sum of squared deviations (Chan et al. 1979).

    Args:
        statistics: (tiles, 2, C), float32.
        count: rows altogether.
        block: rows of every tile but the last.

    Returns:
        (C,) and (C,), float32.
    """
    tiles = statistics.shape[0]
    rows = torch.full((tiles, 1), float(block), device=statistics.device)
    rows[-1] = count - (tiles - 1) * block
    means, squares = statistics[:, 0], statistics[:, 1]
    # Means are averaged as differences to the first, which are small where the mean is large against the deviation.
    first = means[:1]
    mean = first[0] + ((means - first) * rows).sum(0) / count
    variance = (squares.sum(0) + ((means - mean).square() * rows).sum(0)) / count
    return mean, variance


@triton.jit(do_not_specialize=["rows"])
def statistics_kernel(
    x_ptr, statistics_ptr, rows, C: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr
):
    """Mean and sum of squared deviations of each channel over one tile of rows of (rows, C)."""
    tile = tl.program_id(0).to(tl.int64)
    row = tile * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    channel = tl.program_id(1) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    mask = (row < rows)[:, None] & (channel < C)[None, :]
    x = tl.load(x_ptr + row[:, None] * C + channel[None, :], mask=mask, other=0.0).to(tl.float32)
    mean = tl.sum(x, 0) / tl.minimum(rows - tile * BLOCK_ROWS, BLOCK_ROWS).to(tl.float32)
    deviation = tl.where(mask, x - mean[None, :], 0.0)
    place = statistics_ptr + tile * (2 * C) + channel
    tl.store(place, mean, mask=channel < C)
    tl.store(place + C, tl.sum(deviation * deviation, 0), mask=channel < C)


def statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of each channel of (N, C, H, W): (C,) and (C,), float32."""
    x = channels_last(x)
    channels = x.shape[1]
    rows = x.numel() // channels
    tiles = triton.cdiv(rows, STATISTICS_ROWS)
    found = torch.empty((tiles, 2, channels), dtype=torch.float32, device=x.device)
    with device_guard(x):
        statistics_kernel[(tiles, triton.cdiv(channels, BLOCK_CHANNELS))](
            x, found, rows, C=channels, BLOCK_ROWS=STATISTICS_ROWS, BLOCK_CHANNELS=BLOCK_CHANNELS
        )
    return combine(found, rows, STATISTICS_ROWS)


@triton.jit(do_not_specialize=["rows"])
def affine_kernel(
    x_ptr,
    mean_ptr,
    scale_ptr,
    bias_ptr,
    residual_ptr,
    y_ptr,
    rows,
    C: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    RELU: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
):
    """``relu((x - mean) * scale + bias + residual)`` of (rows, C); the mean goes first, lest it cancel."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    channel = tl.program_id(1) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    mask = (row < rows)[:, None] & (channel < C)[None, :]
    place = row[:, None] * C + channel[None, :]
    scale = tl.load(scale_ptr + channel, mask=channel < C, other=0.0)
    bias = tl.load(bias_ptr + channel, mask=channel < C, other=0.0).to(tl.float32)
    mean = tl.load(mean_ptr + channel, mask=channel < C, other=0.0)
    x = tl.load(x_ptr + place, mask=mask, other=0.0).to(tl.float32)
    y = (x - mean[None, :]) * scale[None, :] + bias[None, :]
    if HAS_RESIDUAL:
        y += tl.load(residual_ptr + place, mask=mask, other=0.0).to(tl.float32)
    if RELU:
        y = tl.where(y < 0.0, 0.0, y)
    tl.store(y_ptr + place, y.to(y_ptr.dtype.element_ty), mask=mask)


def affine(x: Tensor, mean: Tensor, scale: Tensor, bias: Tensor, residual: Tensor | None, relu: bool) -> Tensor:
    """``relu((x - mean) * scale + bias + residual)``.

    Args:
        x: (N, C, H, W).
        mean, scale, bias: (C,), float32.
        residual: as ``x``, or None.
        relu: whether the ReLU is applied.
    """
    x = channels_last(x)
    residual = None if residual is None else channels_last(residual)
    mean, scale, bias = mean.contiguous(), scale.contiguous(), bias.contiguous()
    y = torch.empty_like(x, memory_format=torch.channels_last)
    if not x.numel():
        return y
    channels = x.shape[1]
    rows = x.numel() // channels
    grid = (triton.cdiv(rows, BLOCK_ROWS), triton.cdiv(channels, BLOCK_CHANNELS))
    with device_guard(x):
        affine_kernel[grid](
            x, mean, scale, bias, x if residual is None else residual, y, rows,
            C=channels, HAS_RESIDUAL=residual is not None, RELU=relu,
            BLOCK_ROWS=BLOCK_ROWS, BLOCK_CHANNELS=BLOCK_CHANNELS,
        )  # fmt: skip
    return y


@triton.jit(do_not_specialize=["rows"])
def gradient_sums_kernel(
    grad_ptr,
    y_ptr,
    raw_ptr,
    mean_ptr,
    rstd_ptr,
    weight_ptr,
    bias_ptr,
    sums_ptr,
    rows,
    C: tl.constexpr,
    RELU: tl.constexpr,
    HAS_RESULT: tl.constexpr,
    PROGRAM_ROWS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
):
    """Each program's sums, over its rows, of the gradient behind the ReLU and of that times the normalised input."""
    program = tl.program_id(0).to(tl.int64)
    channel = tl.program_id(1) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    mean = tl.load(mean_ptr + channel, mask=channel < C, other=0.0)
    rstd = tl.load(rstd_ptr + channel, mask=channel < C, other=0.0)
    scale = tl.load(weight_ptr + channel, mask=channel < C, other=0.0).to(tl.float32) * rstd
    bias = tl.load(bias_ptr + channel, mask=channel < C, other=0.0).to(tl.float32)
    total = tl.zeros((BLOCK_CHANNELS,), tl.float32)
    product = tl.zeros((BLOCK_CHANNELS,), tl.float32)
    for start in range(0, PROGRAM_ROWS, BLOCK_ROWS):
        row = program * PROGRAM_ROWS + start + tl.arange(0, BLOCK_ROWS)
        mask = (row < rows)[:, None] & (channel < C)[None, :]
        place = row[:, None] * C + channel[None, :]
        grad = tl.load(grad_ptr + place, mask=mask, other=0.0).to(tl.float32)
        centred = tl.load(raw_ptr + place, mask=mask, other=0.0).to(tl.float32) - mean[None, :]
        if RELU:
            if HAS_RESULT:
                y = tl.load(y_ptr + place, mask=mask, other=0.0).to(tl.float32)
            else:
                y = centred * scale[None, :] + bias[None, :]
            grad = tl.where(y > 0.0, grad, 0.0)
        # Rows beyond the last have a gradient of 0.
        total += tl.sum(grad, 0)
        product += tl.sum(grad * centred * rstd[None, :], 0)
    place = sums_ptr + program * (2 * C) + channel
    tl.store(place, total, mask=channel < C)
    tl.store(place + C, product, mask=channel < C)


@triton.jit(do_not_specialize=["rows"])
def gradient_kernel(
    grad_ptr,
    y_ptr,
    raw_ptr,
    mean_ptr,
    factor_ptr,
    slope_ptr,
    offset_ptr,
    bias_ptr,
    grad_raw_ptr,
    grad_residual_ptr,
    rows,
    C: tl.constexpr,
    RELU: tl.constexpr,
    HAS_RESULT: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
):
    """``g * factor + (raw - mean) * slope + offset`` where g, the gradient behind the ReLU, is the residual's.

    Without the result, which is ``(raw - mean) * factor + bias`` where there is no residual, its sign is found again.
    """
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    channel = tl.program_id(1) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    mask = (row < rows)[:, None] & (channel < C)[None, :]
    place = row[:, None] * C + channel[None, :]
    factor = tl.load(factor_ptr + channel, mask=channel < C, other=0.0)
    slope = tl.load(slope_ptr + channel, mask=channel < C, other=0.0)
    offset = tl.load(offset_ptr + channel, mask=channel < C, other=0.0)
    mean = tl.load(mean_ptr + channel, mask=channel < C, other=0.0)
    grad = tl.load(grad_ptr + place, mask=mask, other=0.0).to(tl.float32)
    centred = tl.load(raw_ptr + place, mask=mask, other=0.0).to(tl.float32) - mean[None, :]
    if RELU:
        if HAS_RESULT:
            y = tl.load(y_ptr + place, mask=mask, other=0.0).to(tl.float32)
        else:
            bias = tl.load(bias_ptr + channel, mask=channel < C, other=0.0).to(tl.float32)
            y = centred * factor[None, :] + bias[None, :]
        grad = tl.where(y > 0.0, grad, 0.0)
    result = grad * factor[None, :] + centred * slope[None, :] + offset[None, :]
    tl.store(grad_raw_ptr + place, result.to(grad_raw_ptr.dtype.element_ty), mask=mask)
    if HAS_RESIDUAL:
        tl.store(grad_residual_ptr + place, grad.to(grad_residual_ptr.dtype.element_ty), mask=mask)


def affine_gradient(
    grad: Tensor,
    y: Tensor | None,
    raw: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor,
    bias: Tensor,
    relu: bool,
    residual: bool,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """Gradients of ``relu(batch_norm(raw) + residual)`` with batch statistics.

    Args:
        grad: of the result, (N, C, H, W).
        y: the result; None, where there was no residual: the ReLU's side is found again from ``raw``.
        raw: the convolution's output.
        mean, rstd: (C,), float32: batch mean, and 1 / sqrt(variance + eps).
        weight, bias: (C,), BN's.
        relu: whether there was a ReLU.
        residual: whether the residual's gradient is wanted.

    Returns:
        Gradients of ``raw``, of the residual (or None), of BN's weight and bias, these two (C,) float32.
    """
    if y is None and residual:
        raise ValueError("y: None with a residual; accepted: the result")
    grad, raw = channels_last(grad), channels_last(raw)
    result = raw if y is None else channels_last(y)
    weight, bias = weight.contiguous(), bias.contiguous()
    channels = raw.shape[1]
    rows = raw.numel() // channels
    programs = triton.cdiv(rows, REDUCTION_ROWS)
    sums = torch.empty((programs, 2, channels), dtype=torch.float32, device=raw.device)
    blocks = triton.cdiv(channels, BLOCK_CHANNELS)
    with device_guard(raw):
        gradient_sums_kernel[(programs, blocks)](
            grad, result, raw, mean, rstd, weight, bias, sums, rows,
            C=channels, RELU=relu, HAS_RESULT=y is not None, PROGRAM_ROWS=REDUCTION_ROWS,
            BLOCK_ROWS=BLOCK_ROWS, BLOCK_CHANNELS=BLOCK_CHANNELS,
        )  # fmt: skip
        bias_grad, weight_grad = sums[:, 0].sum(0), sums[:, 1].sum(0)
        # d raw = weight * rstd * (g - mean(g) - normalised * mean(g * normalised)), multiplied out a channel.
        factor = weight.float() * rstd
        slope = -factor * rstd * weight_grad / rows
        offset = -factor * bias_grad / rows
        grad_raw = torch.empty_like(raw, memory_format=torch.channels_last)
        grad_residual = torch.empty_like(raw, memory_format=torch.channels_last) if residual else None
        gradient_kernel[(triton.cdiv(rows, BLOCK_ROWS), blocks)](
            grad, result, raw, mean, factor, slope, offset, bias,
            grad_raw, grad_raw if grad_residual is None else grad_residual, rows,
            C=channels, RELU=relu, HAS_RESULT=y is not None, HAS_RESIDUAL=residual,
            BLOCK_ROWS=BLOCK_ROWS, BLOCK_CHANNELS=BLOCK_CHANNELS,
        )  # fmt: skip
    return grad_raw, grad_residual, weight_grad, bias_grad


def specimens() -> list[Specimen]:
    """All kernels at 256 channels, for checks by compilation alone."""
    found = []
    for label, kernel, options in (
        ("statistics", statistics_kernel, {"BLOCK_ROWS": STATISTICS_ROWS}),
        ("affine", affine_kernel, {"HAS_RESIDUAL": True, "RELU": True}),
        ("gradient sums", gradient_sums_kernel, {"RELU": True, "HAS_RESULT": False, "PROGRAM_ROWS": REDUCTION_ROWS}),
        ("gradient, residual", gradient_kernel, {"HAS_RESULT": True, "HAS_RESIDUAL": True, "RELU": True}),
        ("gradient", gradient_kernel, {"HAS_RESULT": False, "HAS_RESIDUAL": False, "RELU": True}),
    ):
        constants = {"C": 256, "BLOCK_ROWS": BLOCK_ROWS, "BLOCK_CHANNELS": BLOCK_CHANNELS, **options}
        activations = {"x_ptr", "residual_ptr", "y_ptr", "grad_ptr", "raw_ptr", "grad_raw_ptr", "grad_residual_ptr"}
        for dtype in ("bf16", "fp16"):
            signature = {}
            for name in kernel.arg_names:
                kind = f"*{dtype}" if name in activations else "*fp32" if name.endswith("_ptr") else "i64"
                signature[name] = "constexpr" if name in constants else kind
            found.append(Specimen(kernel, signature, constants, 4, 3, f"batch_norm {label} {dtype}"))
    return found
