"""Gradients of the operators that run on kernels: autograd functions outside the dispatcher's operators.

Those that take a backend's name run forward on its operators; those with batch statistics on Triton's, which alone
make them.

Gradients of convolutions are those of ``torch.ops.aten.convolution_backward``: cuDNN's, on a GPU. What is stored for
them is little: of a convolution with batch statistics its raw output alone, from which an operator behind it makes its
input again (normalisation and ReLU cost one pass over memory); of a bottleneck not even the last raw output. Of
everything that eager training of the plain network stores, that is 36 % (``tests/kernels/test_training.py``).

Normalisation and ReLU are a pass of their own, not done by the next convolution as it loads. Of the 11.6 GB that a step
moves (64 crops of 128x128 in bfloat16, counted by ``benchmarks/training_traffic.py``), the 1x1 ``expand``, which loads
each value once a tile, would spare 1.0 %, all readers in the forward pass 6.0 %: the 3x3 convolutions among them would
normalise each value once for each of nine taps, and have to keep their padding at zero.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastden.ops._dispatch import OPERATORS
from fastden.ops._types import BatchNorm, check_values, update_running_statistics


def channels_last(x: Tensor) -> Tensor:
    """``x`` (4-D), channels innermost in memory, without a copy where it is so already."""
    return x.contiguous(memory_format=torch.channels_last)


def _conv_gradients(
    needed: tuple[bool, ...], grad: Tensor, a: Tensor, b: Tensor | None, weight: Tensor, stride: int, padding: int
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of both sources and of the weight, as far as ``needed``; the sources stay apart."""

    def backward(x: Tensor, w: Tensor, want: tuple[bool, bool]) -> tuple[Tensor | None, Tensor | None]:
        if not any(want):
            return None, None
        return torch.ops.aten.convolution_backward(
            grad, x, w, None, [stride] * 2, [padding] * 2, [1, 1], False, [0, 0], 1, [*want, False]
        )[:2]

    if b is None:
        grad_a, grad_weight = backward(a, weight, (needed[0], needed[2]))
        return grad_a, None, grad_weight
    split = a.shape[1]
    grad_a, weight_a = backward(a, weight[:, :split], (needed[0], needed[2]))
    grad_b, weight_b = backward(b, weight[:, split:], (needed[1], needed[2]))
    if weight_a is None or weight_b is None:
        return grad_a, grad_b, None
    return grad_a, grad_b, torch.cat([weight_a, weight_b], 1)


class Conv(torch.autograd.Function):
    """``relu(conv2d(cat([a, b], 1), weight, bias) + residual)``; b, bias and residual may be None."""

    @staticmethod
    def forward(
        ctx: Any,
        a: Tensor,
        b: Tensor | None,
        weight: Tensor,
        bias: Tensor | None,
        residual: Tensor | None,
        relu: bool,
        stride: int,
        padding: int,
        backend: str,
    ) -> Tensor:
        y = OPERATORS[backend].conv(a, b, weight, bias, residual, relu, stride, padding)
        ctx.save_for_backward(a, b, weight, y if relu else None)
        ctx.settings = stride, padding
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        a, b, weight, y = ctx.saved_tensors
        grad = channels_last(grad)
        if y is not None:
            grad = torch.ops.aten.threshold_backward(grad, y, 0)
        needed = ctx.needs_input_grad
        sources = _conv_gradients(needed[:3], grad, a, b, weight, *ctx.settings)
        bias = grad.sum((0, 2, 3)) if needed[3] else None
        return *sources, bias, grad if needed[4] else None, None, None, None, None


class _Recipe(NamedTuple):
    """How ``relu(batch_norm(raw))`` is made again from what its own gradient keeps anyway."""

    raw: Tensor
    mean: Tensor
    rstd: Tensor
    bn_weight: Tensor
    bn_bias: Tensor

    def make(self) -> Tensor:
        scale = self.bn_weight.float() * self.rstd
        return torch.ops.fastden.affine(self.raw, self.mean, scale, self.bn_bias.float(), None, True)


_RECIPE = "_fastden_recipe"


def _attach(y: Tensor, recipe: _Recipe) -> None:
    """Let an operator that takes ``y``, this very tensor, keep the recipe instead of ``y`` for its own gradient."""
    if not (torch.compiler.is_compiling() or y.is_inference()):  # which counts no versions
        setattr(y, _RECIPE, (y._version, recipe))


def settle(y: Tensor) -> None:
    """Drop the recipe of a result that no gradient is asked of: it would keep ``raw`` alive for nothing.

    Inside ``forward`` gradients are always off, and parameters always want them: only here it is known.
    """
    if not torch.compiler.is_compiling() and not y.requires_grad and hasattr(y, _RECIPE):
        delattr(y, _RECIPE)


def _keep(x: Tensor) -> tuple[Tensor | None, ...]:
    """What has to be saved of an operator's input: itself, or its recipe; as many tensors either way."""
    found = None if torch.compiler.is_compiling() else getattr(x, _RECIPE, None)
    if found is None or found[0] != x._version:  # no recipe, or written to since
        return (x, *(None,) * len(_Recipe._fields))
    return (None, *found[1])


def _restore(kept: Sequence[Tensor | None]) -> Tensor:
    """The input that :func:`_keep` was given."""
    x, *recipe = kept
    return _Recipe(*recipe).make() if x is None else x  # type: ignore[arg-type]


_KEPT = 1 + len(_Recipe._fields)


class ConvBatchNorm(torch.autograd.Function):
    """``relu(batch_norm(conv2d(cat([a, b], 1), weight, bias)) + residual)`` with the statistics of the batch.

    Returns the result, and the batch's mean and biased variance, (O,) float32, which carry no gradient.
    """

    @staticmethod
    def forward(
        ctx: Any,
        a: Tensor,
        b: Tensor | None,
        weight: Tensor,
        bias: Tensor | None,
        bn_weight: Tensor,
        bn_bias: Tensor,
        residual: Tensor | None,
        relu: bool,
        stride: int,
        padding: int,
        eps: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        raw, mean, variance = torch.ops.fastden.conv_statistics(a, b, weight, bias, stride, padding)
        rstd = torch.rsqrt(variance + eps)
        y = torch.ops.fastden.affine(raw, mean, bn_weight.float() * rstd, bn_bias.float(), residual, relu)
        # Without a residual, raw tells the ReLU's side, and the gradient's kernels read a tensor less.
        result = None if residual is None else y
        ctx.save_for_backward(*_keep(a), b, weight, bn_weight, bn_bias, raw, result, mean, rstd)
        ctx.settings = relu, stride, padding, None if bias is None else bias.dtype
        ctx.mark_non_differentiable(mean, variance)
        if relu and residual is None and any(ctx.needs_input_grad):
            _attach(y, _Recipe(raw, mean, rstd, bn_weight, bn_bias))
        return y, mean, variance

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        b, weight, bn_weight, bn_bias, raw, y, mean, rstd = saved[_KEPT:]
        relu, stride, padding, bias_dtype = ctx.settings
        needed = ctx.needs_input_grad
        grad_raw, grad_residual, grad_bn_weight, grad_bn_bias = torch.ops.fastden.affine_gradient(
            channels_last(grad), y, raw, mean, rstd, bn_weight, bn_bias, relu, needed[6]
        )
        a = _restore(saved[:_KEPT])
        sources = _conv_gradients(needed[:3], grad_raw, a, b, weight, stride, padding)
        # A constant in front of batch statistics changes nothing.
        bias = torch.zeros(len(mean), dtype=bias_dtype, device=mean.device) if needed[3] else None
        return (
            *sources,
            bias,
            grad_bn_weight.to(bn_weight.dtype),
            grad_bn_bias.to(bn_bias.dtype),
            grad_residual if needed[6] else None,
            *(None,) * 4,
        )


class BatchNormReLU(torch.autograd.Function):
    """``relu(batch_norm(raw))`` with the statistics of the batch, for an operator whose kernel does not make them.

    Returns the result, and the batch's mean and biased variance, (C,) float32, which carry no gradient.
    """

    @staticmethod
    def forward(
        ctx: Any, raw: Tensor, bn_weight: Tensor, bn_bias: Tensor, relu: bool, eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        mean, variance = torch.ops.fastden.statistics(raw)
        rstd = torch.rsqrt(variance + eps)
        y = torch.ops.fastden.affine(raw, mean, bn_weight.float() * rstd, bn_bias.float(), None, relu)
        ctx.save_for_backward(raw, bn_weight, bn_bias, mean, rstd)
        ctx.relu = relu
        ctx.mark_non_differentiable(mean, variance)
        if relu and any(ctx.needs_input_grad):
            _attach(y, _Recipe(raw, mean, rstd, bn_weight, bn_bias))
        return y, mean, variance

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        raw, bn_weight, bn_bias, mean, rstd = ctx.saved_tensors
        grad_raw, _none, grad_weight, grad_bias = torch.ops.fastden.affine_gradient(
            channels_last(grad), None, raw, mean, rstd, bn_weight, bn_bias, ctx.relu, False
        )
        return grad_raw, grad_weight.to(bn_weight.dtype), grad_bias.to(bn_bias.dtype), None, None


def batch_norm_relu(raw: Tensor, bn: BatchNorm, relu: bool) -> Tensor:
    """:class:`BatchNormReLU`, which also moves the running statistics; ``bn`` in training mode."""
    values = raw.shape[0] * raw.shape[2] * raw.shape[3]
    check_values(values)
    y, mean, variance = BatchNormReLU.apply(raw, bn.weight, bn.bias, relu, bn.eps)
    settle(y)
    update_running_statistics(bn, mean, variance, values)
    return y


class BottleneckBatchNorm(torch.autograd.Function):
    """``relu(x + bn(expand(relu(bn(conv(relu(bn(reduce(x)))))))))`` with the statistics of the batch.

    Stored are x, the result, and the raw outputs of ``reduce`` and ``conv``, which have a quarter of the channels each.
    The backward pass makes the rest again: two affine maps, and ``expand``, a quarter of the block's forward products
    (of a whole training step's, 1.3 % for the three blocks).
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        reduce: Tensor,
        conv: Tensor,
        expand: Tensor,
        eps: tuple[float, float, float],
        *affine: Tensor,
    ) -> tuple[Tensor, ...]:
        statistics: list[Tensor] = []
        kept: list[Tensor] = []
        source = x
        for index, weight in enumerate((reduce, conv, expand)):
            raw, mean, variance = torch.ops.fastden.conv_statistics(source, None, weight, None, 1, int(index == 1))
            recipe = _Recipe(raw, mean, torch.rsqrt(variance + eps[index]), *affine[2 * index : 2 * index + 2])
            statistics += [mean, variance]
            if index < 2:
                source = recipe.make()
                kept += recipe[:3]
        y = torch.ops.fastden.affine(raw, mean, recipe.bn_weight.float() * recipe.rstd, recipe.bn_bias.float(), x, True)
        ctx.save_for_backward(*_keep(x), y, reduce, conv, expand, *affine, *kept, mean, recipe.rstd)
        ctx.mark_non_differentiable(*statistics)
        return (y, *statistics)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors  # read once: activation checkpointing hands each tensor out a single time
        y, reduce, conv, expand, *rest = saved[_KEPT:]
        w1, b1, w2, b2, w3, b3 = rest[:6]
        raw1, mean1, rstd1, raw2, mean2, rstd2, mean3, rstd3 = rest[6:]
        first, second = _Recipe(raw1, mean1, rstd1, w1, b1), _Recipe(raw2, mean2, rstd2, w2, b2)
        needed = ctx.needs_input_grad
        gradient = torch.ops.fastden.affine_gradient
        y2 = second.make()
        raw3 = torch.ops.fastden.conv(y2, None, expand, None, None, False, 1, 0)
        grad_raw, grad_x, grad_w3, grad_b3 = gradient(
            channels_last(grad), y, raw3, mean3, rstd3, w3, b3, True, needed[0]
        )
        del raw3, y
        grad_y, _none, grad_expand = _conv_gradients((True, False, needed[3]), grad_raw, y2, None, expand, 1, 0)
        del y2
        grad_raw, _none, grad_w2, grad_b2 = gradient(grad_y, None, *second[:4], b2, True, False)
        y1 = first.make()
        grad_y, _none, grad_conv = _conv_gradients((True, False, needed[2]), grad_raw, y1, None, conv, 1, 1)
        del y1
        grad_raw, _none, grad_w1, grad_b1 = gradient(grad_y, None, *first[:4], b1, True, False)
        x = _restore(saved[:_KEPT])
        through, _none, grad_reduce = _conv_gradients((needed[0], False, needed[1]), grad_raw, x, None, reduce, 1, 0)
        gradients = (grad_w1, grad_b1, grad_w2, grad_b2, grad_w3, grad_b3)
        return (
            grad_x.add_(through) if needed[0] else None,
            grad_reduce,
            grad_conv,
            grad_expand,
            None,
            *(found.to(own.dtype) for found, own in zip(gradients, rest, strict=False)),
        )


def bottleneck_with_batch_statistics(
    x: Tensor, reduce: Tensor, conv: Tensor, expand: Tensor, bns: tuple[BatchNorm | None, ...]
) -> Tensor:
    """:class:`BottleneckBatchNorm`, which also moves the running statistics; ``bns`` are three in training mode."""
    used = [bn for bn in bns if bn is not None]
    values = x.shape[0] * x.shape[2] * x.shape[3]
    check_values(values, "bns[0]")
    affine = [part for bn in used for part in (bn.weight, bn.bias)]
    y, *statistics = BottleneckBatchNorm.apply(x, reduce, conv, expand, tuple(bn.eps for bn in used), *affine)
    for bn, mean, variance in zip(used, statistics[::2], statistics[1::2], strict=True):
        update_running_statistics(bn, mean, variance, values)
    return y


class Upsample(torch.autograd.Function):
    """Transposed convolution of kernel 4, stride 2, padding 1."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, backend: str) -> Tensor:
        ctx.save_for_backward(x, weight)
        return OPERATORS[backend].upsample(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        needed = ctx.needs_input_grad
        grad = channels_last(grad)
        grad_x = grad_weight = None
        if needed[0] or needed[1]:
            grad_x, grad_weight, _ = torch.ops.aten.convolution_backward(
                grad, x, weight, None, [2, 2], [1, 1], [1, 1], True, [0, 0], 1, [needed[0], needed[1], False]
            )
        return grad_x, grad_weight, grad.sum((0, 2, 3)) if needed[2] else None, None
