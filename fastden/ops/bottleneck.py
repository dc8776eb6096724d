"""bottleneck: 1x1, 3x3 and 1x1 convolutions around a residual connection (res1, res2, res3)."""

from __future__ import annotations

from torch import Tensor

from fastden.ops._types import BatchNorm
from fastden.ops.conv_bn_relu import conv_bn_relu


def bottleneck(
    x: Tensor,
    reduce: Tensor,
    conv: Tensor,
    expand: Tensor,
    *,
    biases: tuple[Tensor | None, Tensor | None, Tensor | None] = (None, None, None),
    bns: tuple[BatchNorm | None, BatchNorm | None, BatchNorm | None] = (None, None, None),
) -> Tensor:
    """``relu(x + expand(relu(conv(relu(reduce(x))))))``, each convolution followed by its BN.

    Args:
        x: (N, C, H, W), any floating dtype.
        reduce: (M, C, 1, 1).
        conv: (M, M, 3, 3), padding 1.
        expand: (C, M, 1, 1).
        biases: of the three convolutions; they appear where BN is folded.
        bns: batch normalisation of the three convolutions; None where folded.

    Returns:
        (N, C, H, W).
    """
    y = conv_bn_relu(x, reduce, biases[0], bn=bns[0])
    y = conv_bn_relu(y, conv, biases[1], bn=bns[1], padding=1)
    return conv_bn_relu(y, expand, biases[2], bn=bns[2], residual=x)
