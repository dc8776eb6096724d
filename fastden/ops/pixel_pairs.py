"""Pairs of pixels as channels, for the convolutions of the image by cuDNN."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from fastden.ops.modes import transforming


def suit(x: Tensor, weight: Tensor) -> bool:
    """Whether PyTorch's convolutions of an image read pairs of its pixels, in both axes.

    cuDNN's matrix kernels multiply blocks of at least 32 input channels for each tap, and an image with its noise level
    has four. In a training step on an H200 (64 crops of 128 pixels, bfloat16) the stem's 49 taps took 0.32 ms. cuDNN
    gave the head's three output channels to a kernel without matrix instructions, which took 0.48 ms. Pairs have 16
    channels and 16 taps, and the head's result has 12 channels, one for each pixel of a pair.

    A pixel that is NaN or infinite reaches the windows of its neighbour, too.

    No GPU has timed the pairs. The finding is of training: so only where weights are composed in this call, and get a
    gradient. At inference they would be rearranged at each call. Not in float64, which cuDNN computes without such
    blocks, nor where the call is compiled, traced or transformed: what is recorded may run anywhere.

    Args:
        x: the image.
        weight: the composed weight. A leaf is no result of a composition: it may have taps for which pairs have no
            place.
    """
    composed = x.is_cuda and weight.requires_grad and torch.is_grad_enabled() and x.dtype != torch.float64
    return composed and not transforming() and not weight.is_leaf


def zeros_for(channels: int) -> int:
    """The number of channels of zeros that make those of pairs a multiple of 8, as matrix kernels need in 16 bits."""
    return channels % 2


def folded(x: Tensor, dtype: torch.dtype) -> Tensor:
    """``x`` with one pixel of zeros on each side, and then its pairs of pixels as channels.

    What :func:`fastden.ops.activations.fold` returns, in operations that can be differentiated and transformed.

    Args:
        x: (N, C, H, W), H and W even.
        dtype: of the result.

    Returns:
        (N, 4 (C + :func:`zeros_for`), H / 2 + 1, W / 2 + 1), channels-last, in the order of ``pixel_unshuffle``.
    """
    padded = F.pad(x, (1, 1, 1, 1, 0, zeros_for(x.shape[1])))
    pairs = padded.unflatten(3, (-1, 2)).unflatten(2, (-1, 2)).permute(0, 2, 4, 1, 3, 5)
    # One copy casts and changes the layout.
    return pairs.to(dtype, memory_format=torch.contiguous_format).flatten(3).permute(0, 3, 1, 2)
