"""head: out o cat(conv0, up3) + input, directly from half-resolution features to the image."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fastden.algebra import BORDER, image_phases, paired_head, separated_head, unshuffled_weight
from fastden.kernels._layout import channels_last
from fastden.ops import pixel_pairs, post_operations
from fastden.ops._checks import check_filled, check_flags, check_shape, check_tensors
from fastden.ops._gradients import Ways, conv_gradients, first_derivative_only, ways
from fastden.ops._library import OPERATORS, Operator, check, check_not_empty
from fastden.ops.activations import fold, zeros_for
from fastden.ops.backends import choose
from fastden.ops.stem import check_input_size
from fastden.ops.tensors import in_autocast, like, wants_gradient
from fastden.ops.tracing import autocast_enabled, exporting


def head(
    features: Tensor,
    x: Tensor,
    weight: Tensor,
    image_weight: Tensor,
    bias: Tensor,
    *,
    add_input: bool = True,
    image: Tensor | None = None,
    clamp: bool = False,
    composed: bool = False,
    backend: str | None = None,
) -> Tensor:
    """Denoised image from the last feature map and the padded network input.

    Args:
        features: (N, M, h, w), the last feature map, h = (H - 4) / 2, w = (W - 4) / 2.
        x: (N, C, H, W), the padded network input; its first K channels are the image.
        weight: (4 K, M, 4, 4), output phases in the order of ``pixel_shuffle``.
        image_weight: (K, C, 7, 7), without the identity: the input is added separately, at its own precision.
        bias: (K,); float32 or the dtype of ``features``.
        add_input: False does not add the input.
        image: the image to add instead of ``x``, (N, at least K, H, W). It may have any floating dtype, and the result
            has the same: so a half-precision network corrects a float32 image without rounding it. Kernels round a
            float64 image to float32.
        clamp: limit the result to [0, 1].
        composed: promises that ``weight`` comes from :func:`fastden.algebra.compose_head`: phase 0 has zeros on the
            last row (column) of its taps, and phase 1 on the first. A kernel then skips these taps.
        backend: see :mod:`fastden.ops.backends`; None leaves it to the context, the environment or fastden.

    Returns:
        (N, K, H - 6, W - 6). With ``image``, it has the dtype of ``image``; else that of ``features``. Under autocast
        without ``image``, it has the dtype of ``x``, which is added without rounding, or, if nothing is added,
        autocast's dtype.

    Raises:
        TypeError, ValueError: names the argument, its value and the accepted values.
        RuntimeError: the requested backend cannot run; the message gives every backend's reasons.
    """
    tensors = {"features": features, "x": x, "weight": weight, "image_weight": image_weight, "bias": bias}
    if not torch.compiler.is_compiling():
        _check(tensors, image)
        check_flags(add_input=add_input, clamp=clamp, composed=composed)
    k = image_weight.shape[0]
    if not add_input:
        image = None
    plain = composed and add_input and not wants_gradient(image)
    backend = choose("head", backend, batch_statistics=False, as_measured=plain, **tensors)
    if backend != "torch":
        if add_input and image is None and autocast_enabled(x.device.type):
            image = x[:, :k]
        # The gradient needs to know if a value was outside the limits; a clamped value does not show this.
        later = clamp and wants_gradient(*tensors.values(), image)
        run = in_autocast(features, x, weight, image_weight)
        y = Head.apply(*run, bias, image, add_input, clamp and not later, composed, backend)
        return y.clamp(0, 1) if later else y
    if composed and post_operations.serves(*tensors.values()):
        y = F.pixel_shuffle(_phases(*tensors.values()), 2)
    elif composed and x.shape[0] and pixel_pairs.suit(x, weight):
        y = _on_pairs(*tensors.values())
    else:
        y = _plain(*tensors.values())
    if add_input:
        source = x if image is None else image
        y = (y if image is None else y.to(image.dtype)) + source[:, :k, BORDER:-BORDER, BORDER:-BORDER]
    return y.clamp(0, 1) if clamp else y


def _plain(features: Tensor, x: Tensor, weight: Tensor, image_weight: Tensor, bias: Tensor) -> Tensor:
    """The result without the added image and the limits."""
    phases = F.conv2d(features, weight, None, padding=1)
    if exporting():
        # The layout of the shuffled image depends on its width, which may be symbolic here.
        phases = phases.clone(memory_format=torch.contiguous_format)
    # PyTorch 2.13's pixel_shuffle has no gradient for an empty batch.
    if x.shape[0]:
        y = F.pixel_shuffle(phases, 2)
    else:
        y = phases.reshape(0, len(image_weight), x.shape[2] - 6, x.shape[3] - 6)
    return y + F.conv2d(x, image_weight, like(bias, x))


def _on_pairs(features: Tensor, x: Tensor, weight: Tensor, image_weight: Tensor, bias: Tensor) -> Tensor:
    """What :func:`_plain` returns, by convolutions that suit cuDNN; ``weight`` is a composed one."""
    weight, image_weight = in_autocast(weight, image_weight)
    of_features, of_image = paired_head(weight, image_weight, pixel_pairs.zeros_for(x.shape[1]))
    pairs = pixel_pairs.folded(x, weight.dtype)
    y = F.conv2d(pairs, of_image, bias.to(pairs.dtype).repeat_interleave(4))
    return F.pixel_shuffle(F.conv2d(features, of_features, None, padding=1) + y, 2)[:, :, 1:-1, 1:-1]


def _phases(features: Tensor, x: Tensor, weight: Tensor, image_weight: Tensor, bias: Tensor) -> Tensor:
    """What :func:`_plain` returns, before ``pixel_shuffle``, on oneDNN; ``weight`` is a composed one.

    The image's convolution reads pairs of pixels: 12 or 16 channels fill oneDNN's vectors, 3 or 4 do not. The
    convolution of the features adds its sums to the image's.
    """
    zeros = zeros_for(x.dtype, x.shape[1])
    paired = unshuffled_weight(image_phases(image_weight), 5, zeros)
    y = post_operations.convolution(fold(x, x.dtype, zeros), paired, None)
    bias = bias.repeat_interleave(4)
    if x.dtype == torch.bfloat16:
        # Rows that are rounded to bfloat16 before they are added would err more than PyTorch's own convolution.
        return post_operations.add_convolution_(y, features, weight, bias, padding=1)
    rows, merge = separated_head(weight)
    return post_operations.add_convolution_(
        y, post_operations.convolution(features, rows, None, padding=(0, 1)), merge, bias, padding=(1, 0)
    )


def _check(tensors: dict[str, Tensor], image: Tensor | None) -> None:
    check_tensors(**tensors)
    features, x, weight, image_weight, bias = tensors.values()
    check_input_size(x)
    batch, channels, height, width = x.shape
    check_shape("image_weight", image_weight, "K", channels, 7, 7)
    k = image_weight.shape[0]
    if k > channels:
        accepted = f"(K, {channels}, 7, 7), K <= {channels}"
        raise ValueError(f"image_weight: shape {tuple(image_weight.shape)}; accepted: {accepted}")
    check_shape("features", features, batch, "M", (height - 4) // 2, (width - 4) // 2)
    check_shape("weight", weight, 4 * k, features.shape[1], 4, 4)
    check_filled(weight=weight, image_weight=image_weight)
    check_shape("bias", bias, k)
    if image is not None:
        check_tensors(image=image)
        check_shape("image", image, batch, "K", height, width)
        if image.shape[1] < k or image.device != x.device:
            accepted = f"at least {k} channels, on {x.device}"
            raise ValueError(f"image: shape {tuple(image.shape)} on {image.device}; accepted: {accepted}")


def _operator(
    features: Tensor,
    x: Tensor,
    weight: Tensor,
    image_weight: Tensor,
    bias: Tensor,
    image: Tensor | None,
    add_input: bool,
    clamp: bool,
    composed: bool,
) -> Tensor:
    from fastden.kernels.head import head

    out_dtype = features.dtype if image is None else image.dtype
    return head(features, x, weight, image_weight, bias, add_input, clamp, image, out_dtype, composed)


_OPERATOR = Operator(_operator, "head")


@_OPERATOR.shape
def _(
    features: Tensor,
    x: Tensor,
    weight: Tensor,
    image_weight: Tensor,
    bias: Tensor,
    image: Tensor | None,
    **_: Any,
) -> Tensor:
    check(x.dim() == 4, "x", x, "4 dimensions")
    n, channels, height, width = x.shape
    even = height % 2 == 0 and width % 2 == 0 and height >= 8 and width >= 8
    check(even, "x", x, "(N, C, H, W), H and W even and at least 8")
    k, maps = image_weight.shape[0], features.shape[1]
    shape = (n, maps, (height - 4) // 2, (width - 4) // 2)
    check(tuple(features.shape) == shape, "features", features, str(shape))
    fits = k <= channels and tuple(image_weight.shape) == (k, channels, 7, 7)
    check(fits, "image_weight", image_weight, f"(K, {channels}, 7, 7), K <= {channels}")
    check(tuple(weight.shape) == (4 * k, maps, 4, 4), "weight", weight, f"({4 * k}, {maps}, 4, 4)")
    check_not_empty(weight=weight, image_weight=image_weight)
    check(tuple(bias.shape) == (k,), "bias", bias, f"({k},)")
    if image is not None:
        fits = image.shape[1] >= k and (image.shape[0], *image.shape[2:]) == (n, height, width)
        check(fits, "image", image, f"({n}, at least {k}, {height}, {width})")
    dtype = features.dtype if image is None else image.dtype
    return features.new_empty((n, k, height - 6, width - 6), dtype=dtype)


class Head(torch.autograd.Function):
    """out o cat(conv0, up3), with or without adding the image."""

    @staticmethod
    def forward(
        ctx: Any,
        features: Tensor,
        x: Tensor,
        weight: Tensor,
        image_weight: Tensor,
        bias: Tensor,
        image: Tensor | None,
        add_input: bool,
        clamp: bool,
        composed: bool,
        backend: str,
    ) -> Tensor:
        ctx.save_for_backward(features, x, weight, image_weight)
        ctx.add_to_input = add_input and image is None
        ctx.image_shape = None if image is None else image.shape
        ctx.composed, ctx.ways, ctx.bias_dtype = composed, ways(backend, "head"), bias.dtype
        return OPERATORS[backend].head(features, x, weight, image_weight, bias, image, add_input, clamp, composed)

    @staticmethod
    @first_derivative_only("head")
    def backward(ctx: Any, saved: tuple[Any, ...], full_grad: Tensor) -> tuple[Tensor | None, ...]:
        features, x, weight, image_weight = saved
        needed = ctx.needs_input_grad
        grad_image = None
        grad = full_grad.to(features.dtype)
        of_features = _feature_gradients((needed[0], needed[2]), grad, features, weight, ctx.composed, ctx.ways)
        grad_x, _none, grad_image_weight = conv_gradients(
            (needed[1], False, needed[3]), channels_last(grad), x, None, image_weight, 1, 0, ctx.ways
        )
        if grad_x is not None and ctx.add_to_input:
            grad_x[:, : grad.shape[1], BORDER:-BORDER, BORDER:-BORDER] += grad
        if needed[5]:
            grad_image = full_grad.new_zeros(ctx.image_shape)
            grad_image[:, : grad.shape[1], BORDER:-BORDER, BORDER:-BORDER] = full_grad
        bias = grad.sum((0, 2, 3), dtype=ctx.bias_dtype) if needed[4] else None
        return of_features[0], grad_x, of_features[1], grad_image_weight, bias, grad_image, None, None, None, None


def _feature_gradients(
    needed: tuple[bool, bool], grad: Tensor, features: Tensor, weight: Tensor, composed: bool, ways: Ways
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of the features and of their weight. Taps that are always zero in a composed weight get no gradient."""
    wanted = (needed[0], False, needed[1])
    if not composed or ways.input == "aten":
        phases = _unshuffled(grad)
        grad_features, _none, grad_weight = conv_gradients(wanted, phases, features, None, weight, 1, 1, ways)
        return grad_features, grad_weight
    # Pixels 2 i - 1 (phase 1 of i - 1) and 2 i (phase 0 of i) both read the features i - 1, i and i + 1. Grouped like
    # this, all pixels are the result of a 3x3 convolution: 9 taps instead of 16.
    pixels = _unshuffled(F.pad(grad, (1, 1, 1, 1)))
    taps = weight.unflatten(0, (-1, 2, 2))  # K, p, q, M, 4, 4
    rows = torch.stack([taps[:, 1, ..., 1:, :], taps[:, 0, ..., :3, :]], 1)
    merged = torch.stack([rows[:, :, 1, ..., 1:], rows[:, :, 0, ..., :3]], 2).flatten(0, 2)
    grad_features, _none, grad_merged = conv_gradients(wanted, pixels, features, None, merged, 1, 1, ways)
    if grad_merged is None:
        return grad_features, None
    parts = grad_merged.unflatten(0, (-1, 2, 2))
    back = [
        F.pad(parts[:, 1 - p, 1 - q], (q, 1 - q, p, 1 - p)) for p in (0, 1) for q in (0, 1)
    ]  # phase 0 has its taps first, phase 1 last
    return grad_features, torch.stack(back, 1).flatten(0, 1)


def _unshuffled(x: Tensor) -> Tensor:
    """``F.pixel_unshuffle(x, 2)``, channels-last, in one copy instead of two.

    PyTorch 2.13's function gives an empty batch the shape of ``x``.
    """
    batch, channels, height, width = x.shape[0], x.shape[1], x.shape[2] // 2, x.shape[3] // 2
    pairs = x.reshape(batch, channels, height, 2, width, 2).permute(0, 2, 4, 1, 3, 5)
    return channels_last(pairs.reshape(batch, height, width, 4 * channels).permute(0, 3, 1, 2))
