"""oneDNN's convolutions with post-operations on a CPU, without gradients.

A convolution writes its result once: bias, residual sum and ReLU are applied before. PyTorch's own operations read and
write the result once more for each of them.
"""

from __future__ import annotations

import math
import platform
from functools import cache

import torch
from torch import Tensor

from fastden.ops.modes import runs_as_written
from fastden.ops.tensors import like, wants_gradient

#: Up to this many values of ``x`` the call's own cost can be more than the passes that it saves. The operators of a
#: picture of 512 x 768 pixels, which have more, take 0.4 to 1.1 times the time of PyTorch's operations
#: (``benchmarks/results/post-operations.json``).
FEW_VALUES = 1 << 20


@cache
def missing_parts() -> tuple[str, ...]:
    """What this PyTorch or machine lacks for oneDNN's convolutions with post-operations."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return (f"processor: {platform.machine()}; accepted: x86-64",)
    if not torch.backends.mkldnn.is_available():
        return ("this PyTorch has no oneDNN",)
    wanted = (
        "_convolution_pointwise", "_convolution_pointwise_", "_is_mkldnn_bf16_supported", "_nbytes", "data_ptr",
    )  # fmt: skip
    lacking = [f"torch.ops.mkldnn.{name}" for name in wanted if not hasattr(torch.ops.mkldnn, name)]
    return (f"this PyTorch lacks {', '.join(lacking)}",) if lacking else ()


def has_bf16() -> bool:
    """Whether oneDNN computes bfloat16 on this CPU, natively or through float32; only where nothing is missing."""
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def why_not(device: torch.device, dtype: torch.dtype) -> list[str]:
    """Reasons why these convolutions cannot run; empty where they can."""
    if device.type != "cpu":
        return [f"device: {device}; accepted: cpu"]
    reasons = list(missing_parts())
    if dtype not in (torch.float32, torch.bfloat16):
        reasons.append(f"dtype: {dtype}; accepted: torch.float32, torch.bfloat16")
    elif dtype == torch.bfloat16 and not reasons and not has_bf16():
        reasons.append("dtype: torch.bfloat16, but oneDNN has no bfloat16 on this CPU (AVX-512 at least)")
    if not torch.backends.mkldnn.enabled:
        reasons.append("torch.backends.mkldnn.enabled is False")
    return reasons


def serves(x: Tensor, *others: Tensor | None) -> bool:
    """Whether an operator on these tensors may use this module: it runs once, now, without gradients and autocast.

    ``x`` is what is convolved, or its first source. Small ones are left to PyTorch.
    """
    operands = [x, *(tensor for tensor in others if tensor is not None)]
    return (
        x.is_cpu
        and x.numel() > FEW_VALUES
        and all(map(runs_as_written, operands))
        and not wants_gradient(*operands)
        and not torch.is_autocast_enabled("cpu")
        and not why_not(x.device, x.dtype)
    )


def finite(*tensors: Tensor | None) -> bool:
    """Whether all values of some CPU tensors are finite; also False where their sum is too large for its dtype."""
    return all(math.isfinite(tensor.sum().item()) for tensor in tensors if tensor is not None)


def convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    stride: int = 1,
    padding: int | tuple[int, int] = 0,
    relu: bool = False,
    residual: Tensor | None = None,
) -> Tensor:
    """``relu(conv2d(x, weight, bias) + residual)``.

    A NaN among the weights shows in the result, and so does one among the weights of the layers before: it fills whole
    channels of ``x``. One that is in a few pixels of ``x`` alone becomes 0 where there is a ReLU.

    Args:
        x: (N, C, H, W), not empty, float32 or bfloat16, on the CPU, in any layout.
        weight: (O, C, k, l), dtype of ``x``.
        bias: (O,) or None; rounded to the dtype of ``x``: PyTorch's oneDNN convolutions take a bias of that dtype.
        stride: of both axes.
        padding: zeros on each side; a pair is that of rows and that of columns.
        relu: whether the ReLU is applied.
        residual: of the result's shape and dtype, added before the ReLU.

    Returns:
        (N, O, H', W').
    """
    geometry = _geometry(stride, padding)
    if relu:
        # oneDNN's ReLU is a maximum with 0, which makes zeros of NaN. To look at one pixel costs nothing that shows.
        row, column = x.shape[2] // 2, x.shape[3] // 2
        if not finite(weight, bias, x[:, :, row, column]):
            return convolution(x, weight, bias, stride=stride, padding=padding, residual=residual).relu_()
    if residual is None:
        return torch.ops.mkldnn._convolution_pointwise(
            x, weight, like(bias, x), *geometry, "relu" if relu else "none", [], ""
        )
    if x.dtype == torch.bfloat16:
        # With a plain weight PyTorch may add after the convolution instead (small images, 1x1 kernels on contiguous
        # images), and its sum with ReLU has no bfloat16.
        weight = weight.to_mkldnn()
    return torch.ops.mkldnn._convolution_pointwise.binary(
        x, residual, weight, like(bias, x), *geometry, "add", 1.0, "relu" if relu else None, [], ""
    )


def add_convolution_(
    y: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, *, padding: int | tuple[int, int] = 0
) -> Tensor:
    """``y <- y + conv2d(x, weight, bias)`` in place; returns ``y``. Arguments as of :func:`convolution`."""
    return torch.ops.mkldnn._convolution_pointwise_.binary(
        y, x, weight, like(bias, x), *_geometry(1, padding), "add", 1.0, None, [], ""
    )


def _geometry(stride: int, padding: int | tuple[int, int]) -> tuple[list[int], list[int], list[int], int]:
    """Padding, stride, dilation and groups, as the operators take them."""
    return [padding] * 2 if isinstance(padding, int) else list(padding), [stride] * 2, [1, 1], 1
