"""conv_bn_relu: convolution, batch normalisation, optional residual, ReLU."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from fastden.ops import post_operations
from fastden.ops._checks import check_convolution
from fastden.ops._convolution import convolve
from fastden.ops.backends import choose
from fastden.ops.batch_norm import BatchNorm, batch_statistics, finish, split_bias
from fastden.ops.tensors import in_autocast, like


def conv_bn_relu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    bn: BatchNorm | None = None,
    residual: Tensor | None = None,
    relu: bool = True,
    stride: int = 1,
    padding: int = 0,
    backend: str | None = None,
) -> Tensor:
    """``relu(bn(conv2d(x, weight, bias)) + residual)``.

    Args:
        x: (N, C, H, W), any floating dtype.
        weight: (O, C, k, k), same dtype as ``x``.
        bias: (O,) or None; float32 or the dtype of ``x``.
        bn: batch normalisation over O channels; None if it is folded into ``weight`` and ``bias``.
        residual: tensor of the output's shape, added before the ReLU.
        relu: whether the ReLU is applied.
        stride, padding: as in ``torch.nn.functional.conv2d``.
        backend: see :mod:`fastden.ops.backends`; None leaves it to the context, the environment or fastden.

    Returns:
        (N, O, H', W') with H' = (H + 2 * padding - k) // stride + 1, in the dtype of ``x``. Under autocast the result
        has autocast's dtype, and ``residual`` is rounded to it.

    Raises:
        TypeError, ValueError: names the argument, its value and the accepted values.
        RuntimeError: the requested backend cannot run; the message gives every backend's reasons.
    """
    check_convolution({"x": x}, weight, bias, bn, residual, relu, stride, padding)
    tensors = {"x": x, "weight": weight, "bias": bias, "residual": residual}
    backend = choose(
        "conv_bn_relu", backend, batch_statistics=batch_statistics(bn), as_measured=bn is None and relu, **tensors
    )
    if backend != "torch":
        x, weight, residual = in_autocast(x, weight, residual)
        return convolve(x, None, weight, bias, bn, residual, relu, stride, padding, backend)
    if bn is None and (relu or residual is not None) and post_operations.serves(x, weight, bias, residual):
        return post_operations.convolution(
            x, weight, bias, stride=stride, padding=padding, relu=relu, residual=residual
        )
    added, left_out = split_bias(bias, bn)
    return finish(F.conv2d(x, weight, like(added, x), stride, padding), bn, residual, relu, left_out)
