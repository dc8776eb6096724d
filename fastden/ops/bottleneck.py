"""bottleneck: 1x1, 3x3 and 1x1 convolutions around a residual connection (res1, res2, res3)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastden.kernels._layout import channels_last
from fastden.ops import _recompute
from fastden.ops._checks import check_batch_norm, check_filled, check_shape, check_tensors
from fastden.ops._gradients import conv_gradients, first_derivative_only, ways
from fastden.ops._library import OPERATORS, Operator, check, check_not_empty, empty_like
from fastden.ops._recompute import Recipe
from fastden.ops.backends import choose
from fastden.ops.batch_norm import BatchNorm, batch_statistics, check_values, update_running_statistics
from fastden.ops.conv_bn_relu import conv_bn_relu
from fastden.ops.tensors import in_autocast, untransformed, wants_gradient


def bottleneck(
    x: Tensor,
    reduce: Tensor,
    conv: Tensor,
    expand: Tensor,
    *,
    biases: tuple[Tensor | None, Tensor | None, Tensor | None] = (None, None, None),
    bns: tuple[BatchNorm | None, BatchNorm | None, BatchNorm | None] = (None, None, None),
    backend: str | None = None,
) -> Tensor:
    """``relu(x + expand(relu(conv(relu(reduce(x))))))``, each convolution followed by its BN.

    Args:
        x: (N, C, H, W), any floating dtype.
        reduce: (M, C, 1, 1).
        conv: (M, M, 3, 3), padding 1.
        expand: (C, M, 1, 1).
        biases: of the three convolutions; they exist if BN is folded.
        bns: batch normalisation of the three convolutions; None if it is folded.
        backend: see :mod:`fastden.ops.backends`; None leaves it to the context, the environment or fastden.
            At inference, one kernel computes all three convolutions. Training uses the kernels of
            :func:`conv_bn_relu`. With batch statistics it stores only the outputs of the two narrow convolutions.

    Returns:
        (N, C, H, W).

    Raises:
        TypeError, ValueError: names the argument, its value and the accepted values.
        RuntimeError: the requested backend cannot run; the message gives every backend's reasons.
    """
    names = ("reduce_bias", "conv_bias", "expand_bias")
    for what, given in (("biases", biases), ("bns", bns)):
        if not isinstance(given, tuple | list) or len(given) != 3:
            told = type(given).__name__ + (f" of {len(given)}" if isinstance(given, tuple | list) else "")
            raise TypeError(f"{what}: {told}; accepted: a tuple of three, one for each convolution (None for none)")
    tensors = {"x": x, "reduce": reduce, "conv": conv, "expand": expand, **dict(zip(names, biases, strict=True))}
    if not torch.compiler.is_compiling():
        check_tensors(names, **tensors)
        check_shape("x", x, "N", "C", "H", "W")
        check_shape("reduce", reduce, "M", x.shape[1], 1, 1)
        channels, middle = x.shape[1], reduce.shape[0]
        check_shape("conv", conv, middle, middle, 3, 3)
        check_shape("expand", expand, channels, middle, 1, 1)
        check_filled(reduce=reduce)
        for index, size in enumerate((middle, middle, channels)):
            check_shape(names[index], biases[index], size)
            check_batch_norm(f"bns[{index}]", bns[index], size)
    backend = choose(
        "bottleneck",
        backend,
        batch_statistics=batch_statistics(*bns),
        as_measured=all(bn is None for bn in bns),
        **tensors,
    )
    if backend != "torch":
        if all(bn is not None and bn.training for bn in bns) and all(bias is None for bias in biases):
            x, reduce, conv, expand = in_autocast(x, reduce, conv, expand)
            return _with_batch_statistics(x, reduce, conv, expand, bns)
        # The operator alone has no derivative, and would drop a tangent without a word.
        if all(bn is None for bn in bns) and not wants_gradient(*tensors.values()) and untransformed():
            return OPERATORS[backend].bottleneck(*in_autocast(x, reduce, conv, expand), *biases)
    y = conv_bn_relu(x, reduce, biases[0], bn=bns[0], backend=backend)
    y = conv_bn_relu(y, conv, biases[1], bn=bns[1], padding=1, backend=backend)
    return conv_bn_relu(y, expand, biases[2], bn=bns[2], residual=x, backend=backend)


def _operator(
    x: Tensor,
    reduce: Tensor,
    conv: Tensor,
    expand: Tensor,
    reduce_bias: Tensor | None,
    conv_bias: Tensor | None,
    expand_bias: Tensor | None,
) -> Tensor:
    from fastden.kernels.bottleneck import bottleneck

    return bottleneck(x, reduce, conv, expand, (reduce_bias, conv_bias, expand_bias))


_OPERATOR = Operator(_operator, "bottleneck")


@_OPERATOR.shape
def _(
    x: Tensor,
    reduce: Tensor,
    conv: Tensor,
    expand: Tensor,
    reduce_bias: Tensor | None,
    conv_bias: Tensor | None,
    expand_bias: Tensor | None,
) -> Tensor:
    check(x.dim() == 4, "x", x, "4 dimensions")
    channels, middle = x.shape[1], reduce.shape[0]
    for name, weight, shape in (
        ("reduce", reduce, (middle, channels, 1, 1)),
        ("conv", conv, (middle, middle, 3, 3)),
        ("expand", expand, (channels, middle, 1, 1)),
        ("reduce_bias", reduce_bias, (middle,)),
        ("conv_bias", conv_bias, (middle,)),
        ("expand_bias", expand_bias, (channels,)),
    ):
        if weight is not None:
            check(tuple(weight.shape) == shape, name, weight, str(shape))
    check_not_empty(reduce=reduce)
    return empty_like(x, tuple(x.shape))


class BottleneckBatchNorm(torch.autograd.Function):
    """``relu(x + bn(expand(relu(bn(conv(relu(bn(reduce(x)))))))))`` with the statistics of the batch.

    It stores x, the result, and the raw outputs of ``reduce`` and ``conv``. Each of these two has a quarter of the
    channels. So the network stores 36 % of what eager training of the plain network stores
    (``tests/kernels/test_training.py``). The backward pass computes the rest again: two affine maps, and ``expand``,
    which is a quarter of the block's forward products. For the three blocks, this is 1.3 % of the products of a
    training step.
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
        saved: list[Tensor] = []
        source = x
        for index, weight in enumerate((reduce, conv, expand)):
            raw, mean, rstd, unbiased = torch.ops.fastden.conv_bn_relu_statistics(
                source, None, weight, None, 1, int(index == 1), eps[index]
            )
            recipe = Recipe(raw, mean, rstd, *affine[2 * index : 2 * index + 2])
            statistics += [mean, unbiased]
            if index < 2:
                source = recipe.make()
                saved += recipe[:3]
        y = torch.ops.fastden.batch_norm_affine(*recipe, x, True)
        ctx.save_for_backward(*_recompute.save(x), y, reduce, conv, expand, *affine, *saved, mean, rstd)
        ctx.ways = ways("triton", "convolution")
        ctx.mark_non_differentiable(*statistics)
        return (y, *statistics)

    @staticmethod
    @first_derivative_only("bottleneck")
    def backward(ctx: Any, saved: tuple[Any, ...], grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        y, reduce, conv, expand, *rest = saved[_recompute.SAVED :]
        w1, b1, w2, b2, w3, b3 = rest[:6]
        raw1, mean1, rstd1, raw2, mean2, rstd2, mean3, rstd3 = rest[6:]
        first, second = Recipe(raw1, mean1, rstd1, w1, b1), Recipe(raw2, mean2, rstd2, w2, b2)
        needed, ways = ctx.needs_input_grad, ctx.ways
        gradient = torch.ops.fastden.batch_norm_gradient
        y2 = second.make()
        raw3 = torch.ops.fastden.conv_bn_relu(y2, expand, None, None, False, 1, 0)
        grad_raw, grad_x, grad_w3, grad_b3 = gradient(
            channels_last(grad), y, raw3, mean3, rstd3, w3, b3, True, needed[0]
        )
        del raw3, y
        grad_y, _none, grad_expand = conv_gradients((True, False, needed[3]), grad_raw, y2, None, expand, 1, 0, ways)
        del y2
        grad_raw, _none, grad_w2, grad_b2 = gradient(grad_y, None, *second[:4], b2, True, False)
        y1 = first.make()
        grad_y, _none, grad_conv = conv_gradients((True, False, needed[2]), grad_raw, y1, None, conv, 1, 1, ways)
        del y1
        grad_raw, _none, grad_w1, grad_b1 = gradient(grad_y, None, *first[:4], b1, True, False)
        x = _recompute.restore(saved[: _recompute.SAVED])
        added = grad_x if needed[0] else None
        grad_x, _none, grad_reduce = conv_gradients(
            (needed[0], False, needed[1]), grad_raw, x, None, reduce, 1, 0, ways, added
        )
        gradients = (grad_w1, grad_b1, grad_w2, grad_b2, grad_w3, grad_b3)
        return (
            grad_x,
            grad_reduce,
            grad_conv,
            grad_expand,
            None,
            *(grad.to(own.dtype) for grad, own in zip(gradients, rest, strict=False)),
        )


def _with_batch_statistics(
    x: Tensor, reduce: Tensor, conv: Tensor, expand: Tensor, bns: tuple[BatchNorm | None, ...]
) -> Tensor:
    """:class:`BottleneckBatchNorm`, which also moves the running statistics; all three ``bns`` are in training mode."""
    used = [bn for bn in bns if bn is not None]
    check_values(x.shape[0] * x.shape[2] * x.shape[3], "bns[0]")
    affine = [part for bn in used for part in (bn.weight, bn.bias)]
    y, *statistics = BottleneckBatchNorm.apply(x, reduce, conv, expand, tuple(bn.eps for bn in used), *affine)
    for bn, mean, unbiased in zip(used, statistics[::2], statistics[1::2], strict=True):
        update_running_statistics(bn, mean, unbiased)
    return y
