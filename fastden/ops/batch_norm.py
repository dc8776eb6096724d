"""batch_norm: the state that operators take from a module, its operators on kernels, and their gradient.

Normalisation and ReLU are a separate pass: the next convolution does not apply them when it loads its input. A training
step moves 11.0 GB (64 crops of 128x128 in bfloat16, counted by ``benchmarks/training_traffic.py``). If the 1x1
``expand``, which loads each value once per tile, applied them, this would save 1.0 % of that. If all readers in the
forward pass did, this would save 6.3 %. But a 3x3 convolution would normalise each value nine times, once per tap, and
would have to keep its padding at zero.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastden.kernels._layout import channels_last
from fastden.ops import _recompute
from fastden.ops._gradients import first_derivative_only
from fastden.ops._library import Operator, check, empty_like
from fastden.ops._recompute import Recipe
from fastden.ops.tensors import may_overwrite


class BatchNorm(NamedTuple):
    """The state of a ``torch.nn.BatchNorm2d`` that an operator needs.

    If ``training`` is true, operators normalise with the statistics of the batch, and update the running statistics in
    place, as PyTorch does. Otherwise they use the running statistics. All tensors have shape (channels,).
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
        """The state of ``module``. If it is training, this counts the batch, as ``module.forward`` does.

        Raises:
            ValueError: names the setting that the operators do not support.
        """
        if isinstance(module, nn.SyncBatchNorm) and module.training:
            # Its statistics are those of all processes, but an operator sees only one process.
            raise ValueError("bn: SyncBatchNorm in training; accepted: BatchNorm2d, or SyncBatchNorm in evaluation")
        # Each is read once: a parametrisation may draw, or cost.
        weight, bias, mean, variance = module.weight, module.bias, module.running_mean, module.running_var
        if mean is None or variance is None:
            raise ValueError("bn: track_running_stats=False; accepted: True")
        if weight is None or bias is None:
            raise ValueError("bn: affine=False; accepted: True")
        if module.momentum is None:
            raise ValueError("bn: momentum=None (a cumulative average); accepted: a number")
        if module.training and module.num_batches_tracked is not None:
            module.num_batches_tracked.add_(1)
        return cls(weight, bias, mean, variance, module.training, module.momentum, module.eps)


def batch_statistics(*bns: BatchNorm | None) -> bool:
    """Whether at least one of these normalises with the statistics of the batch."""
    return any(bn is not None and bn.training for bn in bns)


def adds_bias_apart(bias: Tensor) -> bool:
    """Whether PyTorch's convolution adds a bias in a pass over memory of its own, and sums its gradient in one more."""
    return bias.is_cuda


def split_bias(bias: Tensor | None, bn: BatchNorm | None) -> tuple[Tensor | None, Tensor | None]:
    """The bias for PyTorch's convolution, and the one for :func:`finish`; one of them is None.

    Batch statistics remove a constant that was added before them. So where a bias costs passes over memory, no
    convolution adds it. In a training step of 64 crops of 128x128 in bfloat16, the passes of the stem, conv2 and conv3
    move 0.7 GB.

    Args:
        bias: (O,) or None.
        bn: the normalisation that follows, or None.
    """
    apart = bias is not None and bn is not None and bn.training and bn.momentum < 1 and adds_bias_apart(bias)
    return (None, bias) if apart else (bias, None)


def finish(
    y: Tensor, bn: BatchNorm | None, residual: Tensor | None, relu: bool, left_out: Tensor | None = None
) -> Tensor:
    """BN, residual add and ReLU after a convolution: the epilogue of every fused operator.

    ``left_out`` (O,) is a bias that ``y`` lacks, only if ``bn`` is training with a momentum below 1. It moves the
    running mean, and its gradient is zero.
    """
    if bn is not None:
        running_mean, bn_bias = bn.running_mean, bn.bias
        if left_out is not None:
            # What batch_norm keeps of this, a share of 1 - momentum, is momentum times the bias. Not in place, because
            # batch_norm's gradient refuses a mean that is written to later, as the next forward pass does.
            left_out_mean = left_out.detach().to(running_mean.dtype)
            running_mean = torch.add(running_mean, left_out_mean, alpha=bn.momentum / (1 - bn.momentum))
            # Zero times the bias: then it has a gradient, as optimisers and DDP expect, and a NaN in it still shows.
            bn_bias = torch.add(bn_bias, left_out.to(bn_bias.dtype), alpha=0)
        y = F.batch_norm(y, running_mean, bn.running_var, bn.weight, bn_bias, bn.training, bn.momentum, bn.eps)
        if left_out is not None:
            bn.running_mean.copy_(running_mean)
    if residual is not None:
        # Under autocast, the residual's dtype may differ from the result's, which is that of the convolution.
        residual = residual.to(y.dtype)
        y = y.add_(residual) if may_overwrite() else y + residual
    if not relu:
        return y
    # In place: no backward before this point needs y, and a training step has twelve such tensors.
    return torch.relu_(y) if may_overwrite() else torch.relu(y)


def check_values(values: int, name: str = "bn") -> None:
    """Raise ValueError if a channel has too few values in the batch for statistics."""
    if values <= 1:
        raise ValueError(f"{name}: {values} values a channel in the batch; accepted for batch statistics: 2 or more")


@torch.no_grad()
def update_running_statistics(bn: BatchNorm, mean: Tensor, unbiased: Tensor) -> None:
    """Move the running statistics towards the batch's ``mean`` and ``unbiased`` variance, as PyTorch does."""
    running = [bn.running_mean, bn.running_var]
    # One call for both statistics takes one launch on a GPU.
    torch._foreach_lerp_(running, [value.to(bn.running_mean.dtype) for value in (mean, unbiased)], bn.momentum)


def _statistics(x: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    from fastden.kernels.batch_norm import statistics

    return statistics(x, eps)


_STATISTICS = Operator(_statistics, "batch_norm_statistics")


@_STATISTICS.shape
def _(x: Tensor, **_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return vectors(x, x.shape[1])


def vectors(x: Tensor, channels: int) -> tuple[Tensor, Tensor, Tensor]:
    """Empty statistics: mean, rstd and unbiased variance."""
    mean, rstd, unbiased = (x.new_empty(channels, dtype=torch.float32) for _ in range(3))
    return mean, rstd, unbiased


def _affine(
    x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, relu: bool
) -> Tensor:
    from fastden.kernels.batch_norm import affine

    return affine(x, mean, rstd, weight, bias, residual, relu)


_AFFINE = Operator(_affine, "batch_norm_affine")


@_AFFINE.shape
def _(x: Tensor, mean: Tensor, residual: Tensor | None, **_: Any) -> Tensor:
    check(mean.shape[0] == x.shape[1], "mean", mean, "as many as channels of x")
    if residual is not None:
        check(residual.shape == x.shape, "residual", residual, "that of x")
    return empty_like(x, tuple(x.shape))


def _gradient(
    grad: Tensor,
    y: Tensor | None,
    raw: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor,
    bias: Tensor,
    relu: bool,
    residual: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from fastden.kernels.batch_norm import affine_gradient

    grad_raw, grad_residual, *rest = affine_gradient(grad, y, raw, mean, rstd, weight, bias, relu, residual)
    return grad_raw, grad.new_empty(0) if grad_residual is None else grad_residual, *rest


_GRADIENT = Operator(_gradient, "batch_norm_gradient")


@_GRADIENT.shape
def _(grad: Tensor, raw: Tensor, mean: Tensor, residual: bool, **_: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    check(grad.shape == raw.shape, "grad", grad, "that of raw")
    like = empty_like(raw, tuple(raw.shape))
    absent = grad.new_empty(0)
    return like, torch.empty_like(like) if residual else absent, torch.empty_like(mean), torch.empty_like(mean)


class BatchNormReLU(torch.autograd.Function):
    """``relu(batch_norm(raw))`` with the statistics of the batch, for an operator whose kernel does not compute them.

    Returns the result, and the batch's mean and unbiased variance. These two are (C,) float32 and have no gradient.
    """

    @staticmethod
    def forward(
        ctx: Any, raw: Tensor, bn_weight: Tensor, bn_bias: Tensor, relu: bool, eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        mean, rstd, unbiased = torch.ops.fastden.batch_norm_statistics(raw, eps)
        y = torch.ops.fastden.batch_norm_affine(raw, mean, rstd, bn_weight, bn_bias, None, relu)
        ctx.save_for_backward(raw, bn_weight, bn_bias, mean, rstd)
        ctx.relu = relu
        ctx.mark_non_differentiable(mean, unbiased)
        if relu and any(ctx.needs_input_grad):
            _recompute.remember(y, Recipe(raw, mean, rstd, bn_weight, bn_bias))
        return y, mean, unbiased

    @staticmethod
    @first_derivative_only("batch normalisation")
    def backward(ctx: Any, saved: tuple[Any, ...], grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        raw, bn_weight, bn_bias, mean, rstd = saved
        grad_raw, _none, grad_weight, grad_bias = torch.ops.fastden.batch_norm_gradient(
            channels_last(grad), None, raw, mean, rstd, bn_weight, bn_bias, ctx.relu, False
        )
        return grad_raw, grad_weight.to(bn_weight.dtype), grad_bias.to(bn_bias.dtype), None, None


def batch_norm_relu(raw: Tensor, bn: BatchNorm, relu: bool) -> Tensor:
    """:class:`BatchNormReLU`, which also moves the running statistics; ``bn`` in training mode."""
    check_values(raw.shape[0] * raw.shape[2] * raw.shape[3])
    y, mean, unbiased = BatchNormReLU.apply(raw, bn.weight, bn.bias, relu, bn.eps)
    _recompute.forget(y)
    update_running_statistics(bn, mean, unbiased)
    return y
