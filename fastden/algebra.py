"""Exact composition of the network's linear chains, and batch-normalisation folding.

Functions of weights alone: no modules, no activations. All are differentiable, so a training step can compose the
factor weights, run the shorter network and let the gradient reach the factors. They compute in the dtype that they are
given; for inference, give them float64 and cast the result.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F


class StemWeights(NamedTuple):
    """conv1 o conv0. ``weight`` (4, O, C, 7, 7) and ``bias`` (4, O): inside, first row, first column, corner."""

    weight: Tensor
    bias: Tensor


class HeadWeights(NamedTuple):
    """out o cat(conv0, up3), without the added input.

    ``weight`` (4 K, M, 4, 4) maps the features to the 2x2 phases of the image in the order of ``pixel_shuffle``,
    ``image_weight`` (K, C, 7, 7) maps the raw input, ``bias`` is (K,).
    """

    weight: Tensor
    image_weight: Tensor
    bias: Tensor


def fold_batch_norm(
    weight: Tensor,
    bias: Tensor | None,
    bn_weight: Tensor,
    bn_bias: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """Weight and bias of the convolution that equals a convolution followed by BN with running statistics.

    Args:
        weight: (O, C, k, k).
        bias: (O,) or None.
        bn_weight, bn_bias, running_mean, running_var: (O,).
        eps: the normalisation's epsilon.

    Returns:
        (O, C, k, k) and (O,).
    """
    scale = bn_weight * torch.rsqrt(running_var + eps)
    shift = running_mean if bias is None else running_mean - bias
    return weight * scale[:, None, None, None], bn_bias - shift * scale


def compose_stem(conv0_weight: Tensor, conv0_bias: Tensor, conv1_weight: Tensor, conv1_bias: Tensor) -> StemWeights:
    """conv1 (3x3, stride 2, padding 1) o conv0 (5x5, no padding) as one 7x7 convolution of stride 2.

    conv1's padding lies outside conv0's output, where the composed kernel would see the image instead of zero. Only
    the first output row and column touch it (sizes are even), so they get kernels without those taps.

    Args:
        conv0_weight: (M, C, 5, 5).
        conv0_bias: (M,).
        conv1_weight: (O, M, 3, 3).
        conv1_bias: (O,).
    """
    # Masks of the four cases over conv1's 3x3 taps; built from a range so that tracing sees no constants on a device.
    row = (torch.arange(3, device=conv1_weight.device) > 0).to(conv1_weight.dtype)
    ones = torch.ones_like(row)
    keep = torch.stack([torch.outer(ones, ones), torch.outer(row, ones), torch.outer(ones, row), torch.outer(row, row)])
    masked = conv1_weight * keep[:, None, None]
    sets, out_channels = masked.shape[:2]
    weight = F.conv_transpose2d(masked.flatten(0, 1), conv0_weight)
    bias = conv1_bias + torch.einsum("somij,m->so", masked, conv0_bias)
    return StemWeights(weight.view(sets, out_channels, *weight.shape[1:]), bias)


def compose_head(
    conv0_weight: Tensor,
    conv0_bias: Tensor,
    up3_weight: Tensor,
    up3_bias: Tensor,
    out_weight: Tensor,
    out_bias: Tensor,
) -> HeadWeights:
    """out (3x3, no padding) o cat(conv0, up3) as a 4x4 convolution on up3's input and a 7x7 one on the image.

    Args:
        conv0_weight: (A, C, 5, 5).
        conv0_bias: (A,).
        up3_weight: (M, B, 4, 4), of a transposed convolution with stride 2 and padding 1.
        up3_bias: (B,).
        out_weight: (K, A + B, 3, 3).
        out_bias: (K,).
    """
    from_image, from_up3 = out_weight.split([conv0_weight.shape[0], up3_weight.shape[1]], dim=1)
    image_weight = F.conv_transpose2d(from_image, conv0_weight)
    # correlated[m, k, d] sums out's tap a with up3's tap a + d - 3 (d = 0 and 7 meet nothing and are zero): the weight
    # from feature i to pixel 2 i - 4 + d. Splitting d by parity gives the phases.
    correlated = F.pad(F.conv2d(up3_weight, from_up3, padding=2), (1, 1, 1, 1))
    m, k = correlated.shape[:2]
    phases = correlated.view(m, k, 4, 2, 4, 2).flip(2, 4).permute(1, 3, 5, 0, 2, 4)
    bias = out_bias + (from_image.sum((2, 3)) @ conv0_bias) + (from_up3.sum((2, 3)) @ up3_bias)
    return HeadWeights(phases.reshape(4 * k, m, 4, 4), image_weight, bias)
