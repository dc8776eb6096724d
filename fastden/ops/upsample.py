"""upsample: transposed 4x4 convolution of stride 2 (up2, and up3 where the head is not composed)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from fastden.ops._checks import check_shape, check_tensors
from fastden.ops._types import in_autocast
from fastden.ops.backends import choose


def upsample(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, backend: str | None = None) -> Tensor:
    """Twice the height and width by a transposed convolution, kernel 4, stride 2, padding 1.

    Args:
        x: (N, C, H, W), any floating dtype.
        weight: (C, O, 4, 4), same dtype as ``x``.
        bias: (O,) or None.
        backend: see :mod:`fastden.ops.backends`; None leaves it to the context, the environment or fastden.

    Returns:
        (N, O, 2 H, 2 W).

    Raises:
        TypeError, ValueError: naming the argument, its value and what is accepted.
        RuntimeError: the backend that was asked for cannot run, with every backend's reasons.
    """
    if not torch.compiler.is_compiling():
        check_tensors(x=x, weight=weight, bias=bias)
        check_shape("x", x, "N", "C", "H", "W")
        check_shape("weight", weight, x.shape[1], "O", 4, 4)
        check_shape("bias", bias, weight.shape[1])
    backend = choose("upsample", backend, x=x, weight=weight, bias=bias)
    if backend != "torch":
        from fastden.ops._autograd import Upsample

        return Upsample.apply(*in_autocast(x, weight, bias), backend)
    return F.conv_transpose2d(x, weight, bias, stride=2, padding=1)
