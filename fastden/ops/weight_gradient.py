"""weight_gradient: the gradient of a convolution's weight, for one or two sources, and of the stem's four weights."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.grad import conv2d_weight

from fastden.ops._library import Operator, check, empty_like


def reference(grad: Tensor, a: Tensor, b: Tensor | None, kernel: int, stride: int, padding: int) -> Tensor:
    """The gradient of the weight of ``conv2d(cat([a, b], 1), weight)``, by PyTorch's own operations.

    Args:
        grad: gradient of the result, (N, O, H', W').
        a: (N, A, H, W), dtype of ``grad``, any floating dtype.
        b: (N, B, H, W) or None.
        kernel, stride, padding: of the convolution.

    Returns:
        (O, A + B, kernel, kernel).
    """
    x = a if b is None else torch.cat([a, b], 1)
    shape = (grad.shape[1], x.shape[1], kernel, kernel)
    return conv2d_weight(x, shape, grad, stride, padding)


def stem_reference(grad: Tensor, x: Tensor) -> Tensor:
    """The gradients of the stem's four sets of weights, by PyTorch's own operations.

    Args:
        grad: gradient of the result, (N, O, (H - 4) / 2, (W - 4) / 2).
        x: (N, C, H, W), dtype of ``grad``, any floating dtype.

    Returns:
        (4, O, C, 7, 7): inside, first row, first column, corner.
    """
    padded = F.pad(x, (1, 0, 1, 0))
    sets = []
    for first_column in (False, True):
        for first_row in (False, True):
            own = torch.zeros_like(grad)
            part = (..., slice(0, 1) if first_row else slice(1, None), slice(0, 1) if first_column else slice(1, None))
            own[part] = grad[part]
            sets.append(reference(own, padded, None, 7, 2, 0))
    return torch.stack(sets)


def _operator(grad: Tensor, a: Tensor, b: Tensor | None, kernel: int, stride: int, padding: int) -> Tensor:
    from fastden.kernels.weight_gradient import weight_gradient

    return weight_gradient(grad, a, b, kernel, stride, padding)


_OPERATOR = Operator(_operator, "weight_gradient")


@_OPERATOR.shape
def _(grad: Tensor, a: Tensor, b: Tensor | None, kernel: int, stride: int, padding: int) -> Tensor:
    sizes = [(size + 2 * padding - kernel) // stride + 1 for size in a.shape[2:]]
    fits = (grad.shape[0], *grad.shape[2:]) == (a.shape[0], *sizes)
    check(fits, "grad", grad, "the shape of the convolution's result")
    if b is not None:
        check((b.shape[0], *b.shape[2:]) == (a.shape[0], *a.shape[2:]), "b", b, "as a, except for the channels")
    return empty_like(a, (grad.shape[1], a.shape[1] + (0 if b is None else b.shape[1]), kernel, kernel))


def _of_stem(grad: Tensor, x: Tensor) -> Tensor:
    from fastden.kernels.weight_gradient import stem_weight_gradient

    return stem_weight_gradient(grad, x)


_OF_STEM = Operator(_of_stem, "weight_gradient_stem")


@_OF_STEM.shape
def _(grad: Tensor, x: Tensor) -> Tensor:
    height, width = (x.shape[2] - 4) // 2, (x.shape[3] - 4) // 2
    fits = (grad.shape[0], *grad.shape[2:]) == (x.shape[0], height, width)
    check(fits, "grad", grad, "the shape of the stem's result")
    return x.new_empty((4, grad.shape[1], 7, 7, x.shape[1])).permute(0, 1, 4, 2, 3)
