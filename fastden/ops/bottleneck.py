"""bottleneck: 1x1, 3x3 and 1x1 convolutions around a residual connection (res1, res2, res3)."""

from __future__ import annotations

import torch
from torch import Tensor

from fastden.backends import choose
from fastden.ops._types import BatchNorm, in_autocast
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
        backend: see :mod:`fastden.backends`; None leaves it to the context, the environment or fastden.
            A kernel for all three serves inference; training takes the kernels of :func:`conv_bn_relu`.

    Returns:
        (N, C, H, W).
    """
    names = ("reduce_bias", "conv_bias", "expand_bias")
    tensors = {"x": x, "reduce": reduce, "conv": conv, "expand": expand, **dict(zip(names, biases, strict=True))}
    backend = choose("bottleneck", backend, **tensors)
    if backend != "torch" and bns == (None, None, None) and not _wants_gradient(*tensors.values()):
        from fastden.ops import _dispatch  # noqa: F401 - registers the operator

        return torch.ops.fastden.bottleneck(*in_autocast(*tensors.values()))
    y = conv_bn_relu(x, reduce, biases[0], bn=bns[0], backend=backend)
    y = conv_bn_relu(y, conv, biases[1], bn=bns[1], padding=1, backend=backend)
    return conv_bn_relu(y, expand, biases[2], bn=bns[2], residual=x, backend=backend)


def _wants_gradient(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)
