"""concat_conv_bn_relu: conv_bn_relu on two inputs concatenated along the channels."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from fastden.ops import post_operations
from fastden.ops._checks import check_convolution
from fastden.ops._convolution import convolve
from fastden.ops.backends import choose
from fastden.ops.batch_norm import BatchNorm, batch_statistics, finish, split_bias
from fastden.ops.tensors import in_autocast, like


def concat_conv_bn_relu(
    a: Tensor,
    b: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    bn: BatchNorm | None = None,
    relu: bool = True,
    padding: int = 1,
    backend: str | None = None,
) -> Tensor:
    """``relu(bn(conv2d(cat([a, b], 1), weight, bias)))``.

    Args:
        a: (N, A, H, W), any floating dtype.
        b: (N, B, H, W), same dtype as ``a``.
        weight: (O, A + B, k, k).
        bias: (O,) or None; float32 or the dtype of ``a``.
        bn: batch normalisation over O channels; None if it is folded.
        relu: whether the ReLU is applied.
        padding: as in ``torch.nn.functional.conv2d``.
        backend: see :mod:`fastden.ops.backends`; None leaves it to the context, the environment or fastden.

    Returns:
        (N, O, H', W').

    Raises:
        TypeError, ValueError: names the argument, its value and the accepted values.
        RuntimeError: the requested backend cannot run; the message gives every backend's reasons.
    """
    check_convolution({"a": a, "b": b}, weight, bias, bn, None, relu, 1, padding)
    tensors = {"a": a, "b": b, "weight": weight, "bias": bias}
    plain = bn is None and relu and padding == 1
    backend = choose(
        "concat_conv_bn_relu", backend, batch_statistics=batch_statistics(bn), as_measured=plain, **tensors
    )
    if backend != "torch":
        a, b, weight = in_autocast(a, b, weight)
        return convolve(a, b, weight, bias, bn, None, relu, 1, padding, backend)
    x = torch.cat([a, b], 1)
    if bn is None and relu and post_operations.serves(a, b, weight, bias):
        return post_operations.convolution(x, weight, bias, padding=padding, relu=True)
    added, left_out = split_bias(bias, bn)
    return finish(F.conv2d(x, weight, like(added, a), 1, padding), bn, None, relu, left_out)
