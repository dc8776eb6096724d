"""head: out o cat(conv0, up3) + input, from half-resolution features straight to the image."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from fastden.ops._checks import check_shape, check_tensors
from fastden.ops._types import in_autocast, wants_gradient
from fastden.ops.backends import choose
from fastden.ops.stem import check_input_size


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
        image_weight: (K, C, 7, 7), without the identity: the input is added apart, at its own precision.
        bias: (K,).
        add_input: False leaves the input out.
        image: what is added instead of ``x``, (N, at least K, H, W), with a floating dtype of its own, which is then
            the result's: a half-precision network corrects a float32 image without rounding it.
        clamp: limit the result to [0, 1].
        composed: promises that ``weight`` is what :func:`fastden.algebra.compose_head` makes: phase 0 has nothing on
            the last row (column) of its taps, phase 1 nothing on the first. A kernel then leaves these out.
        backend: see :mod:`fastden.ops.backends`; None leaves it to the context, the environment or fastden.

    Returns:
        (N, K, H - 6, W - 6), in the dtype of ``image`` where that is given, else of ``features``.

    Raises:
        TypeError, ValueError: naming the argument, its value and what is accepted.
        RuntimeError: the backend that was asked for cannot run, with every backend's reasons.
    """
    tensors = {"features": features, "x": x, "weight": weight, "image_weight": image_weight, "bias": bias}
    if not torch.compiler.is_compiling():
        _check(tensors, image)
    k = image_weight.shape[0]
    if not add_input:
        image = None
    backend = choose("head", backend, batch_statistics=False, **tensors)
    if backend != "torch":
        from fastden.ops._autograd_image import Head

        # A limit hides which side of it a value was on, which its gradient needs.
        later = clamp and wants_gradient(*tensors.values(), image)
        y = Head.apply(*in_autocast(*tensors.values()), image, add_input, clamp and not later, composed, backend)
        return y.clamp(0, 1) if later else y
    y = F.pixel_shuffle(F.conv2d(features, weight, None, padding=1), 2)
    y = y + F.conv2d(x, image_weight, bias)
    if add_input:
        source = x if image is None else image
        y = (y if image is None else y.to(image.dtype)) + source[:, :k, 3:-3, 3:-3]
    return y.clamp(0, 1) if clamp else y


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
    check_shape("bias", bias, k)
    if image is not None:
        check_tensors(image=image)
        check_shape("image", image, batch, "K", height, width)
        if image.shape[1] < k or image.device != x.device:
            accepted = f"at least {k} channels, on {x.device}"
            raise ValueError(f"image: shape {tuple(image.shape)} on {image.device}; accepted: {accepted}")
