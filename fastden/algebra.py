"""Exact changes of weights: linear chains are composed, batch normalisation is folded, kernels are rearranged.

A rearranged kernel turns a strided or transposed convolution into a plain one; oneDNN runs plain ones faster. Its taps
are moved, and zeros are added. The values of the taps do not change.

All functions take weights; none takes a module or an activation. All are differentiable: a training step composes the
factors, runs the shorter network, and the gradient reaches the factors. They compute in the dtype of their arguments.
For inference, give them float64 and cast the result.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

#: Number of pixels on each side by which the network's padded input is larger than the image. conv0 (5x5) and out (3x3)
#: have no padding, so they remove 2 and 1 pixels from each side.
BORDER = 3


class StemWeights(NamedTuple):
    """conv1 o conv0: ``weight`` (4, O, C, 7, 7) and ``bias`` (4, O).

    The four sets are for the inside, the first row, the first column and the corner of the result.
    """

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

    conv1 pads conv0's output with zeros. The composed kernel would read the image there instead. Only the first row and
    column of the result touch that padding, because sizes are even. They get kernels without those taps.

    Args:
        conv0_weight: (M, C, 5, 5).
        conv0_bias: (M,).
        conv1_weight: (O, M, 3, 3).
        conv1_bias: (O,).
    """
    # Masks of the four cases over conv1's 3x3 taps. They are built from a range, so that tracing sees no constant on a
    # device.
    row = (torch.arange(3, device=conv1_weight.device) > 0).to(conv1_weight.dtype)
    ones = torch.ones_like(row)
    keep = torch.stack([torch.outer(ones, ones), torch.outer(row, ones), torch.outer(ones, row), torch.outer(row, row)])
    masked = conv1_weight * keep[:, None, None]
    bias = conv1_bias + torch.einsum("somij,m->so", masked, conv0_bias)
    return StemWeights(_chained(conv1_weight, conv0_weight, keep), bias)


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
    image_weight = _chained(from_image, conv0_weight)[0]
    # correlated[m, k, d] sums the products of out's tap a and up3's tap a + d - 3. (For d = 0 and 7 there is no such
    # tap, and the sum is zero.) It is the weight from feature i to pixel 2 i - 4 + d. The parity of d gives the phase.
    correlated = _chained(from_up3.flip(2, 3), up3_weight.transpose(0, 1))[0].transpose(0, 1)
    correlated = F.pad(correlated, (1, 1, 1, 1))
    m, k = correlated.shape[:2]
    phases = correlated.view(m, k, 4, 2, 4, 2).flip(2, 4).permute(1, 3, 5, 0, 2, 4)
    bias = out_bias + (from_image.sum((2, 3)) @ conv0_bias) + (from_up3.sum((2, 3)) @ up3_bias)
    return HeadWeights(phases.reshape(4 * k, m, 4, 4), image_weight, bias)


def _chained(second: Tensor, first: Tensor, keep: Tensor | None = None) -> Tensor:
    """Kernels of a convolution after another of stride 1: all products of a tap of each, summed by their offsets.

    Both are matrix products, and so are their gradients. ``conv_transpose2d`` computes the same, but its gradients
    would be the only convolutions of PyTorch in a training step on kernels.

    Args:
        second: (O, M, i, i).
        first: (M, C, j, j).
        keep: (sets, i, i), 1 for the taps of ``second`` that a set of kernels has and 0 for the others; None for one
            set that has all.

    Returns:
        (sets, O, C, i + j - 1, i + j - 1).
    """
    taps, side = second.shape[2], first.shape[2]
    size = taps + side - 1
    products = torch.einsum("omij,mcpq->ocpqij", second, first)
    # 1 where the taps p and i have the offset y. Built from ranges, so that tracing sees no constant on a device.
    p, i, y = (torch.arange(length, device=second.device) for length in (side, taps, size))
    lands = (p[:, None, None] + i[:, None] == y).to(second.dtype)
    places = (lands[:, None, :, None, :, None] * lands[None, :, None, :, None, :])[None]
    if keep is not None:
        places = places * keep[:, None, None, :, :, None, None]
    kernels = products.flatten(0, 1).flatten(1) @ places.flatten(5).flatten(1, 4)
    return kernels.view(len(places), *products.shape[:2], size, size)


def unshuffled_weight(weight: Tensor, taps: int, zero_channels: int) -> Tensor:
    """A stride-2 kernel as a stride-1 kernel on the ``pixel_unshuffle(2)`` of its input.

    Args:
        weight: (O, C, k, k), k <= 2 ``taps``.
        taps: height and width of the resulting kernel.
        zero_channels: number of zero channels that are added after the C channels.

    Returns:
        (O, 4 (C + zero_channels), taps, taps).
    """
    short = 2 * taps - weight.shape[-1]
    weight = F.pad(weight, (0, short, 0, short, 0, zero_channels))
    return F.pixel_unshuffle(weight, 2)


def image_phases(weight: Tensor) -> Tensor:
    """The image's 7x7 kernel as four stride-2 kernels, one for each output phase.

    Args:
        weight: (K, C, 7, 7).

    Returns:
        (4 K, C, 9, 9), phases in the order of ``pixel_shuffle``; the input has one more pixel in front.
    """
    shifted = [F.pad(weight, (1 + px, 1 - px, 1 + py, 1 - py)) for py in (0, 1) for px in (0, 1)]
    return torch.stack(shifted, 1).flatten(0, 1)


def phase_weights(weight: Tensor) -> list[Tensor]:
    """A transposed convolution (kernel 4, stride 2, padding 1) as four 2x2 convolutions with padding 1.

    Args:
        weight: (C, O, 4, 4).

    Returns:
        Four weights (O, C, 2, 2), one for each phase, row by row. Phase p of an axis is the output of its convolution
        from index p on.
    """
    # Output pixel 2 q + p reads inputs q - 1 + p and q + p through taps 3 - p and 1 - p.
    taps = weight.transpose(0, 1)
    return [taps[:, :, [3 - p, 1 - p]][:, :, :, [3 - q, 1 - q]].contiguous() for p in (0, 1) for q in (0, 1)]


def separated_head(weight: Tensor) -> tuple[Tensor, Tensor]:
    """The head's 4x4 convolution as 1x4 convolutions, one for each of its rows, and a 4x1 one that adds the rows.

    Each output phase uses three of the four rows. So this form computes six rows of taps; the plain form computes
    eight. The shorter sums also have a smaller error.

    Args:
        weight: (4 K, M, 4, 4).

    Returns:
        (ROWS, M, 1, 4) and (4 K, ROWS, 4, 1) of zeros and ones; ROWS is 12 K, rounded up to a multiple of 16.
    """
    outputs = len(weight)
    used = [(o, row) for o in range(outputs) for row in range(4) if (o // 2 % 2, row) not in ((0, 3), (1, 0))]
    of, at = torch.tensor(used, device=weight.device).T
    rows = F.pad(weight[of, :, at], (0, 0, 0, 0, 0, -len(used) % 16))[:, :, None]
    merge = weight.new_zeros(outputs, len(rows), 4, 1)
    merge[of, torch.arange(len(used), device=weight.device), at] = 1
    return rows, merge
