"""Types that several operators share."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F


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
