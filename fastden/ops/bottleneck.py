"""bottleneck: 1x1, 3x3 and 1x1 convolutions around a residual connection (res1, res2, res3)."""

from __future__ import annotations

import torch
from torch import Tensor

from fastden.ops._checks import check_batch_norm, check_shape, check_tensors
from fastden.ops._types import BatchNorm, batch_statistics, in_autocast, wants_gradient
from fastden.ops.backends import choose
from fastden.ops.conv_bn_relu import conv_bn_relu


def bottleneck(
    x: Tensor,
    reduce: Tensor,
    conv: Tensor,
    expand: Tensor,
    *,
    biases: tuple[Tensor | None, Tensor | None, Tensor | None] = (None, None, None),
    bns: tuple[BatchNorm | None, BatchNorm | None, BatchNorm | None] = (None, None, None),
    backend: str | None = None,
) -> Tensor:
    """``relu(x + expand(relu(conv(relu(reduce(x))))))``, each convolution followed by its BN.

    Args:
        x: (N, C, H, W), any floating dtype.
        reduce: (M, C, 1, 1).
        conv: (M, M, 3, 3), padding 1.
        expand: (C, M, 1, 1).
        biases: of the three convolutions; they appear where BN is folded.
        bns: batch normalisation of the three convolutions; None where folded.
        backend: see :mod:`fastden.ops.backends`; None leaves it to the context, the environment or fastden.
            A kernel for all three serves inference; training takes the kernels of :func:`conv_bn_relu`, and with batch
            statistics stores, of all that lies inside, the two narrow convolutions' outputs alone.

    Returns:
        (N, C, H, W).

    Raises:
        TypeError, ValueError: naming the argument, its value and what is accepted.
        RuntimeError: the backend that was asked for cannot run, with every backend's reasons.
    """
    names = ("reduce_bias", "conv_bias", "expand_bias")
    tensors = {"x": x, "reduce": reduce, "conv": conv, "expand": expand, **dict(zip(names, biases, strict=True))}
    if not torch.compiler.is_compiling():
        check_tensors(**tensors)
        check_shape("x", x, "N", "C", "H", "W")
        check_shape("reduce", reduce, "M", x.shape[1], 1, 1)
        channels, middle = x.shape[1], reduce.shape[0]
        check_shape("conv", conv, middle, middle, 3, 3)
        check_shape("expand", expand, channels, middle, 1, 1)
        for index, size in enumerate((middle, middle, channels)):
            check_shape(names[index], biases[index], size)
            check_batch_norm(f"bns[{index}]", bns[index], size)
    backend = choose("bottleneck", backend, batch_statistics=batch_statistics(*bns), **tensors)
    if backend != "torch":
        from fastden.ops._autograd import bottleneck_with_batch_statistics
        from fastden.ops._dispatch import OPERATORS

        if all(bn is not None and bn.training for bn in bns) and biases == (None, None, None):
            x, reduce, conv, expand = in_autocast(x, reduce, conv, expand)
            return bottleneck_with_batch_statistics(x, reduce, conv, expand, bns)
        if bns == (None, None, None) and not wants_gradient(*tensors.values()):
            return OPERATORS[backend].bottleneck(*in_autocast(*tensors.values()))
    y = conv_bn_relu(x, reduce, biases[0], bn=bns[0], backend=backend)
    y = conv_bn_relu(y, conv, biases[1], bn=bns[1], padding=1, backend=backend)
    return conv_bn_relu(y, expand, biases[2], bn=bns[2], residual=x, backend=backend)
