"""concat_conv_fp8: conv3 at inference with both factors of its products in 8-bit floating point (e4m3)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from fastden.ops._checks import check_convolution, check_shape, check_tensors
from fastden.ops._library import OPERATORS, check, check_not_empty, empty_like, shape_of_cuda
from fastden.ops.backends import choose
from fastden.ops.modes import without_autocast
from fastden.ops.tensors import in_autocast, like, untransformed, wants_gradient

E4M3 = torch.float8_e4m3fn
LARGEST = torch.finfo(E4M3).max
#: Smallest range of a channel, and smallest of the weights of an output: a channel may be zero everywhere.
LEAST_RANGE = 1e-6
LEAST_WEIGHT = 1e-30
KERNEL = 3


def concat_conv_fp8(
    a: Tensor,
    b: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    ranges: Tensor,
    relu: bool = True,
    backend: str | None = None,
) -> Tensor:
    """``relu(conv2d(cat([a, b], 1), weight, bias, padding=1))``, both factors of the products rounded to e4m3.

    A channel of ``a`` or ``b`` is rounded in steps that make its range 448, the largest number of e4m3; what lies
    beyond becomes 448, and a NaN stays. The weights absorb these steps. Then the weights of each output are rounded, in
    steps that make their largest 448. Products of e4m3 numbers are exact in float32, and are summed in float32. (The
    kernel makes sums of 96 or 128 products with about 14 bits, which Hopper's instruction has, and adds these in
    float32.) There is no gradient.

    Args:
        a: (N, A, H, W), any floating dtype. The kernel accepts A = 128, B = 32, and O in multiples of 256.
        b: (N, B, H, W), same dtype as ``a``.
        weight: (O, A + B, 3, 3), same dtype as ``a``.
        bias: (O,) or None; float32 or the dtype of ``a``.
        ranges: (A + B,), float32: the largest magnitude of each channel that is expected (:func:`fastden.calibrate`).
        relu: whether the ReLU is applied.
        backend: see :mod:`fastden.ops.backends`; None leaves it to the context, the environment or fastden.

    Returns:
        (N, O, H, W), in the dtype of ``a``.

    Raises:
        TypeError, ValueError: names the argument, its value and the accepted values.
        RuntimeError: a gradient is wanted; or the requested backend cannot run, with every backend's reasons.
    """
    if not torch.compiler.is_compiling():
        check_convolution({"a": a, "b": b}, weight, bias, None, None, relu, 1, 1)
        check_shape("weight", weight, *weight.shape[:2], KERNEL, KERNEL)
        check_tensors(ranges=ranges)
        if ranges.dtype != torch.float32 or ranges.device != a.device:
            raise TypeError(f"ranges: {ranges.dtype} on {ranges.device}; accepted: torch.float32 on {a.device}")
        check_shape("ranges", ranges, weight.shape[1])
    if wants_gradient(a, b, weight, bias, ranges) or not untransformed():
        raise RuntimeError(
            "concat_conv_fp8 has no gradient; accepted: tensors that need none, or torch.no_grad(), and no transform of"
            " torch.func or forward mode"
        )
    backend = choose("concat_conv_fp8", backend, a=a, b=b, weight=weight, bias=bias, ranges=ranges)
    if backend != "torch":
        a, b, weight = in_autocast(a, b, weight)
        return OPERATORS[backend].concat_conv_fp8(a, b, weight, bias, ranges, relu)
    with without_autocast(a.device):
        codes, weights, scales = rounded_factors(torch.cat([a, b], 1), weight, ranges)
        if a.dtype == torch.float64:
            codes, weights, scales = codes.double(), weights.double(), scales.double()
        y = F.conv2d(codes, weights, padding=KERNEL // 2) * scales[:, None, None]
        added = like(bias, y)
        y = y if added is None else y + added[:, None, None]
        return (y.relu() if relu else y).to(a.dtype)


def rounded(x: Tensor) -> Tensor:
    """``x`` rounded to e4m3 and clamped to its range, in its own dtype; NaN stays."""
    return x.clamp(-LARGEST, LARGEST).to(E4M3).to(x.dtype)


def rounded_factors(x: Tensor, weight: Tensor, ranges: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The rounded sources (N, C, H, W) and weights (O, C, 3, 3), and what each output's sums are multiplied by, (O,).

    All in float32; arguments as those of :func:`concat_conv_fp8`.
    """
    # A tensor: PyTorch on a GPU multiplies by the reciprocal of a number, and the step may be a unit in the last place
    # off. Values at ties got other codes than the kernel's then: 7 codes moved sums by up to 0.02 (tests on an H200).
    largest = ranges.new_full((), LARGEST)
    steps = (ranges.clamp_min(LEAST_RANGE) / largest)[:, None, None]
    exact = weight.float() * steps
    scales = exact.abs().amax((1, 2, 3)).clamp_min(LEAST_WEIGHT) / largest
    return rounded(x.float() * steps.reciprocal()), rounded(exact / scales[:, None, None, None]), scales


@shape_of_cuda("concat_conv_fp8")
def _(a: Tensor, b: Tensor, weight: Tensor, bias: Tensor | None, ranges: Tensor, relu: bool) -> Tensor:
    check(a.dim() == 4, "a", a, "4 dimensions")
    n, channels, height, width = a.shape
    fits = b.dim() == 4 and (b.shape[0], *b.shape[2:]) == (n, height, width)
    check(fits, "b", b, f"({n}, B, {height}, {width})")
    channels += b.shape[1]
    fits = weight.dim() == 4 and tuple(weight.shape[1:]) == (channels, KERNEL, KERNEL)
    check(fits, "weight", weight, f"(O, {channels}, {KERNEL}, {KERNEL})")
    check_not_empty(weight=weight)
    outputs = weight.shape[0]
    if bias is not None:
        check(bias.dim() == 1 and bias.shape[0] == outputs, "bias", bias, f"({outputs},)")
    check(ranges.dim() == 1 and ranges.shape[0] == channels, "ranges", ranges, f"({channels},)")
    return empty_like(a, (n, outputs, height, width))
