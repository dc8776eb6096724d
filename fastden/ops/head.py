"""head: out o cat(conv0, up3) + input, from half-resolution features straight to the image."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from fastden.backends import choose
from fastden.ops._types import in_autocast


def head(
    features: Tensor,
    x: Tensor,
    weight: Tensor,
    image_weight: Tensor,
    bias: Tensor,
    *,
    add_input: bool = True,
    backend: str | None = None,
) -> Tensor:
    """Denoised image from the last feature map and the padded network input.

    Args:
        features: (N, M, h, w), the last feature map, h = (H - 4) / 2, w = (W - 4) / 2.
        x: (N, C, H, W), the padded network input; its first K channels are the image.
        weight: (4 K, M, 4, 4), output phases in the order of ``pixel_shuffle``.
        image_weight: (K, C, 7, 7), without the identity: the input is added apart, at its own precision.
        bias: (K,).
        add_input: False leaves the input out, for a caller that adds it at a higher precision.
        backend: see :mod:`fastden.backends`; None leaves it to the context, the environment or fastden.

    Returns:
        (N, K, H - 6, W - 6).
    """
    tensors = {"features": features, "x": x, "weight": weight, "image_weight": image_weight, "bias": bias}
    if choose("head", backend, **tensors) != "torch":
        from fastden.ops._dispatch import Head

        return Head.apply(*in_autocast(*tensors.values()), add_input)
    k = image_weight.shape[0]
    y = F.pixel_shuffle(F.conv2d(features, weight, None, padding=1), 2)
    y = y + F.conv2d(x, image_weight, bias)
    return y + x[:, :k, 3:-3, 3:-3] if add_input else y
