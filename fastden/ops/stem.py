"""stem: conv1 o conv0 as one 7x7 convolution of stride 2 on the raw image, exact on the border too."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from fastden.ops._checks import check_batch_norm, check_shape, check_tensors
from fastden.ops._types import BatchNorm, batch_statistics, finish, in_autocast
from fastden.ops.backends import choose


def stem(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    bn: BatchNorm | None = None,
    relu: bool = True,
    backend: str | None = None,
) -> Tensor:
    """First feature map at half resolution, straight from the padded image.

    conv1 pads conv0's *output* with zeros, so on the first row and column of the result the taps that would read that
    padding do not exist: four weight sets, see :func:`fastden.algebra.compose_stem`.

    Args:
        x: (N, C, H, W), the padded network input; H and W even, at least 8.
        weight: (4, O, C, 7, 7): inside, first row, first column, corner.
        bias: (4, O), likewise.
        bn: batch normalisation over O channels; None where it is folded.
        relu: whether the ReLU is applied.
        backend: see :mod:`fastden.ops.backends`; None leaves it to the context, the environment or fastden.

    Returns:
        (N, O, (H - 4) / 2, (W - 4) / 2).

    Raises:
        TypeError, ValueError: naming the argument, its value and what is accepted.
        RuntimeError: the backend that was asked for cannot run, with every backend's reasons.
    """
    if not torch.compiler.is_compiling():
        check_tensors(x=x, weight=weight, bias=bias)
        check_input_size(x)
        check_shape("weight", weight, 4, "O", x.shape[1], 7, 7)
        check_shape("bias", bias, 4, weight.shape[1])
        check_batch_norm("bn", bn, weight.shape[1])
    backend = choose("stem", backend, batch_statistics=batch_statistics(bn), x=x, weight=weight, bias=bias)
    if backend != "torch":
        from fastden.ops._autograd import batch_norm_relu
        from fastden.ops._autograd_image import Stem

        y = Stem.apply(*in_autocast(x, weight, bias), relu and bn is None, backend)
        if bn is not None and bn.training:
            return batch_norm_relu(y, bn, relu)
        return y if bn is None else finish(y, bn, None, relu)
    x = F.pad(x, (1, 0, 1, 0))
    y = F.conv2d(x, weight[0], bias[0], stride=2)
    # Written into the convolution's own output: conv2d's backward does not need it, so no copy is made.
    y[:, :, :1] = F.conv2d(x[:, :, :7], weight[1], bias[1], stride=2)
    # Nine columns for the sake of the first: oneDNN 3.12's bf16 convolution reads memory that nothing wrote when this
    # kernel meets an output one column wide (NaN in 10 of 10 runs on poisoned memory).
    y[:, :, :, :1] = F.conv2d(x[..., :9], weight[2], bias[2], stride=2)[..., :1]
    y[:, :, :1, :1] = F.conv2d(x[:, :, :7, :7], weight[3], bias[3], stride=2)
    return finish(y, bn, None, relu)


def check_input_size(x: Tensor) -> None:
    """Raise ValueError unless ``x`` is a padded network input: (N, C, H, W), H and W even and at least 8."""
    check_shape("x", x, "N", "C", "H", "W")
    if any(size % 2 or size < 8 for size in x.shape[2:]):
        raise ValueError(f"x: shape {tuple(x.shape)}; accepted: (N, C, H, W), H and W even and at least 8")
