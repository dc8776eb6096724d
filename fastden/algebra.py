"""Exact changes of weights: linear chains are composed, batch normalisation is folded, kernels are rearranged.

A rearranged kernel turns a strided or transposed convolution into a plain one; oneDNN runs plain ones faster. Its taps
are moved, and zeros are added. The values of the taps do not change.

All functions take weights; none takes a module or an activation. All are differentiable: a training step composes the
factors, runs the shorter network, and the gradient reaches the factors. They compute in the dtype of their arguments.
For inference, give them float64 and cast the result.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
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
    places, keep = (_constant(make, conv1_weight) for make in (_stem_places, _stem_taps))
    weight = _chained(conv1_weight, conv0_weight, places).unflatten(2, (4, 7, 7)).permute(2, 0, 1, 3, 4)
    of_taps = conv1_weight.permute(0, 2, 3, 1) @ conv0_bias
    # In this order the four biases lie one behind the other: oneDNN and kernels read them without strides.
    return StemWeights(weight, keep.flatten(1) @ of_taps.flatten(1).T + conv1_bias)


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
    image_weight = _chained(from_image, conv0_weight, _constant(_image_places, out_weight)).unflatten(2, (7, 7))
    phases = _chained(from_up3, up3_weight.transpose(0, 1), _constant(_phase_places, out_weight))
    weight = phases.unflatten(2, (2, 2, 4, 4)).permute(0, 2, 3, 1, 4, 5).flatten(0, 2)
    bias = out_bias + out_weight.sum((2, 3)) @ torch.cat([conv0_bias, up3_bias])
    return HeadWeights(weight, image_weight, bias)


def _chained(second: Tensor, first: Tensor, places: Tensor) -> Tensor:
    """Kernels of a convolution after another: all products of a tap of each, summed by the places where they land.

    Both are matrix products, and so are their gradients. ``conv_transpose2d`` computes the same, but its gradients
    would be the only convolutions of PyTorch in a training step on kernels.

    Args:
        second: (O, M, i, i).
        first: (M, C, j, j).
        places: (j, j, i, i, ...), 1 where the product of two taps belongs, else 0.

    Returns:
        (O, C, product of the last dimensions of ``places``).
    """
    products = torch.einsum("omij,mcpq->ocpqij", second, first)
    return products.flatten(2) @ places.flatten(4).flatten(0, 3)


def _places(along: Tensor) -> Tensor:
    """The places of two axes, (j, j, i, i, n, n), from those of one, (j, i, n)."""
    return along[:, None, :, None, :, None] * along[None, :, None, :, None, :]


def _stem_taps(device: torch.device) -> Tensor:
    """(4, 3, 3): the taps of conv1 inside, in the first row, in the first column and in the corner."""
    tap = torch.arange(3, device=device)
    kept = torch.stack([torch.ones_like(tap), (tap > 0).to(tap.dtype)])
    columns, rows = kept[:, None, None, :], kept[None, :, :, None]
    return (rows * columns).flatten(0, 1)


def _stem_places(device: torch.device) -> Tensor:
    """(5, 5, 3, 3, 4, 7, 7): where products of conv0's taps and conv1's land in the four sets of the stem."""
    return _image_places(device)[:, :, :, :, None] * _stem_taps(device).permute(1, 2, 0)[..., None, None]


def _image_places(device: torch.device) -> Tensor:
    """(5, 5, 3, 3, 7, 7): where products of conv0's taps and out's land in the image's own kernel."""
    p, i, y = (torch.arange(length, device=device) for length in (5, 3, 7))
    return _places((p[:, None, None] + i[:, None] == y).long())


def _phase_places(device: torch.device) -> Tensor:
    """(4, 4, 3, 3, 2, 2, 4, 4): where products of up3's taps and out's land, by phase and by feature.

    Out's tap a and up3's tap a + d - 3 are the way from feature i to pixel 2 i - 4 + d. The parity of d gives the
    phase. No taps are so far apart that d is 0 or 7.
    """
    p, a, phase, feature = (torch.arange(length, device=device) for length in (4, 3, 2, 4))
    d = phase[:, None] + 2 * (3 - feature)
    along = (p[:, None, None] - a[:, None] + 3 == d.flatten()).long()
    return _places(along).unflatten(5, (2, 4)).unflatten(4, (2, 4)).transpose(5, 6)


#: What :func:`_constant` made, by the arguments that it depends on.
_constants: dict[tuple[object, ...], Tensor] = {}


def _constant(make: Callable[[torch.device], Tensor], like: Tensor) -> Tensor:
    """``make(device)`` on the device and in the dtype of ``like``: made once, unless the call is recorded.

    ``make`` starts from ranges, so that tracing sees no constant on a device. Making them took some 35 of the 520
    kernels of a training step on an H200, whose host needs longer to start them all than the GPU to compute.
    """
    recorded = (
        torch.compiler.is_compiling()
        or torch._C._get_tracing_state() is not None
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._ops._len_torch_dispatch_stack_pre_dispatch() > 0
        or torch._C._are_functorch_transforms_active()
        or type(like) not in (Tensor, nn.Parameter)
    )
    key = make, like.device, like.dtype
    if not recorded and key in _constants:
        return _constants[key]
    with torch.inference_mode(False):  # a gradient refuses tensors that were made in it
        made = make(like.device).to(like.dtype, memory_format=torch.contiguous_format)
    # What is captured is computed in the replay, not now.
    if not recorded and not (like.is_cuda and torch.cuda.is_current_stream_capturing()):
        if like.is_cuda:
            torch.cuda.current_stream(like.device).synchronize()  # the next call may run on another stream
        _constants[key] = made
    return made


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


def paired_stem(weight: Tensor, zero_channels: int) -> Tensor:
    """The stem's stride-2 kernels on pairs of pixels: what :func:`unshuffled_weight` makes, in fewer operations.

    Args:
        weight: (4, O, C, 7, 7).
        zero_channels: number of zero channels that are added after the C channels.

    Returns:
        (4, O, 4 (C + zero_channels), 4, 4), channels innermost.
    """
    # Composed weights lie in this order in memory.
    sets = _with_zeros(weight.permute(1, 2, 0, 3, 4), zero_channels, 1).flatten(3)
    moved = sets @ _constant(_pair_places, weight)[:, :, 0, 0].flatten(2).flatten(0, 1)
    pairs = moved.unflatten(3, (4, 2, 4, 2)).permute(2, 0, 3, 5, 1, 4, 6)
    return pairs.flatten(4).permute(0, 1, 4, 2, 3)


def paired_head(weight: Tensor, image_weight: Tensor, zero_channels: int) -> tuple[Tensor, Tensor]:
    """Kernels of the head whose outputs are the pixels 2 i - 1 and 2 i, for features i and pairs of the image's pixels.

    Both pixels read the features i - 1, i and i + 1: a phase of a composed kernel has three taps of four in each axis.
    So the features' kernel has 9 taps, and that of the image's pairs 16.

    Args:
        weight: (4 K, M, 4, 4), composed.
        image_weight: (K, C, 7, 7).
        zero_channels: number of zero channels that are added after the C channels.

    Returns:
        (4 K, M, 3, 3), with a padding of 1; (4 K, 4 (C + zero_channels), 4, 4) on the ``pixel_unshuffle`` of the input
        with one more pixel on each side; both channels-last. Their outputs are in the order of ``pixel_shuffle``, whose
        result has one more pixel on each side than the image.
    """
    phases = weight.unflatten(0, (-1, 4)).transpose(1, 2).flatten(2)
    taps = (phases @ _constant(_used_taps, weight)).unflatten(2, (4, 3, 3)).permute(0, 2, 3, 4, 1)
    image_weight = _with_zeros(image_weight, zero_channels, 1)
    moved = image_weight.flatten(2) @ _constant(_pair_places, weight).flatten(2).flatten(0, 1)
    pairs = moved.unflatten(2, (2, 2, 4, 2, 4, 2)).permute(0, 2, 3, 4, 6, 1, 5, 7)
    return (
        taps.flatten(0, 1).contiguous().permute(0, 3, 1, 2),
        pairs.flatten(5).flatten(0, 2).permute(0, 3, 1, 2),
    )


def _with_zeros(weight: Tensor, channels: int, dim: int) -> Tensor:
    """``weight`` with more channels along ``dim``, all zero."""
    if not channels:
        return weight
    shape = list(weight.shape)
    shape[dim] = channels
    return torch.cat([weight, weight.new_zeros(shape)], dim)


def _used_taps(device: torch.device) -> Tensor:
    """(64, 36): which of the 4 x 4 taps of which phase each of the four pixels has as its 3 x 3 taps.

    Pixel 2 i - 1 is phase 1 of i - 1, and pixel 2 i is phase 0 of i.
    """
    index = torch.arange(4, device=device)
    phase, tap, pixel, used = index[:2, None, None, None], index[:, None, None], index[:2, None], index[:3]
    along = ((phase == 1 - pixel) & (tap == used + phase)).long()
    return torch.einsum("ptiu,qsjv->pqtsijuv", along, along).flatten(4).flatten(0, 3)


def _pair_places(device: torch.device) -> Tensor:
    """(7, 7, 2, 2, 8, 8): where the image's taps lie in the kernel of each of the four pixels."""
    tap, pixel, y = (torch.arange(length, device=device) for length in (7, 2, 8))
    return _places((tap[:, None, None] + pixel[:, None] == y).long())


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
