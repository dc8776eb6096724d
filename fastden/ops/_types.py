"""Types that several operators share."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastden.algebra import fold_batch_norm


class BatchNorm(NamedTuple):
    """What an operator needs to know of a ``torch.nn.BatchNorm2d``.

    ``training`` selects batch statistics (and updates the running ones in place, as PyTorch does); otherwise the
    running statistics normalise. All tensors have shape (channels,).
    """

    weight: Tensor
    bias: Tensor
    running_mean: Tensor
    running_var: Tensor
    training: bool
    momentum: float
    eps: float

    @classmethod
    def of(cls, module: nn.BatchNorm2d) -> BatchNorm:
        """The state of ``module``; a training module counts its batch here, as ``module.forward`` would."""
        if module.running_mean is None or module.running_var is None or module.momentum is None:
            raise ValueError("bn: a BatchNorm2d with running statistics and a fixed momentum is needed")
        if module.training and module.num_batches_tracked is not None:
            module.num_batches_tracked.add_(1)
        return cls(
            module.weight,
            module.bias,
            module.running_mean,
            module.running_var,
            module.training,
            module.momentum,
            module.eps,
        )


def finish(y: Tensor, bn: BatchNorm | None, residual: Tensor | None, relu: bool) -> Tensor:
    """BN, residual add and ReLU behind a convolution: the epilogue that every fused operator shares."""
    if bn is not None:
        y = F.batch_norm(y, bn.running_mean, bn.running_var, bn.weight, bn.bias, bn.training, bn.momentum, bn.eps)
    if residual is not None:
        y = y.add_(residual) if residual.dtype == y.dtype else y + residual
    # In place: no backward before this point needs y, and a training step has twelve such tensors.
    return torch.relu_(y) if relu else y


def wants_gradient(*tensors: Tensor | None) -> bool:
    """Whether autograd records what is done with these."""
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


def batch_statistics(*bns: BatchNorm | None) -> bool:
    """Whether any of these normalises with the statistics of the batch."""
    return any(bn is not None and bn.training for bn in bns)


def in_autocast(*tensors: Tensor | None) -> tuple[Any, ...]:
    """The tensors in autocast's dtype where autocast is on for their device, as PyTorch's convolutions take them."""
    device = next(tensor.device.type for tensor in tensors if tensor is not None)
    if not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(
        tensor.to(dtype) if tensor is not None and tensor.dtype != torch.float64 else tensor for tensor in tensors
    )


def convolve(
    a: Tensor,
    b: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    bn: BatchNorm | None,
    residual: Tensor | None,
    relu: bool,
    stride: int,
    padding: int,
    backend: str,
) -> Tensor:
    """``relu(bn(conv2d(cat([a, b], 1), weight, bias)) + residual)`` on a backend's kernels, with gradients."""
    from fastden.ops._autograd import Conv, ConvBatchNorm, settle

    if bn is not None and bn.training:
        kernel = weight.shape[2]
        values = a.shape[0] * ((a.shape[2] + 2 * padding - kernel) // stride + 1)
        values *= (a.shape[3] + 2 * padding - kernel) // stride + 1
        check_values(values)
        y, mean, variance = ConvBatchNorm.apply(
            a, b, weight, bias, bn.weight, bn.bias, residual, relu, stride, padding, bn.eps
        )
        settle(y)
        update_running_statistics(bn, mean, variance, values)
        return y
    if bn is not None:
        weight, bias = fold_batch_norm(
            weight.float(), None if bias is None else bias.float(), bn.weight, bn.bias, bn.running_mean, bn.running_var,
            bn.eps,
        )  # fmt: skip
        weight, bias = weight.to(a.dtype), bias.to(a.dtype)
    return Conv.apply(a, b, weight, bias, residual, relu, stride, padding, backend)


def check_values(values: int, name: str = "bn") -> None:
    """Raise ValueError where a channel has too few values in the batch for statistics."""
    if values <= 1:
        raise ValueError(f"{name}: {values} values a channel in the batch; accepted for batch statistics: 2 or more")


@torch.no_grad()
def update_running_statistics(bn: BatchNorm, mean: Tensor, variance: Tensor, values: int) -> None:
    """Move the running statistics towards the batch's, as PyTorch does: the variance unbiased.

    Args:
        bn: whose statistics change.
        mean, variance: of the batch, (channels,); the variance biased.
        values: of each channel in the batch, at least 2.
    """
    bn.running_mean.lerp_(mean.to(bn.running_mean.dtype), bn.momentum)
    unbiased = variance * (values / (values - 1))
    bn.running_var.lerp_(unbiased.to(bn.running_var.dtype), bn.momentum)
