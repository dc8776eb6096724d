"""bottleneck: three convolutions around a residual connection."""

from __future__ import annotations

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastden import ops
from fastden.algebra import fold_batch_norm
from tests.helpers import max_error
from tests.ops import naive
from tests.ops.test_conv_bn_relu import random, random_bn


@settings(max_examples=25)
@given(size=st.tuples(st.integers(1, 8), st.integers(1, 8)), batch=st.integers(1, 2), bias=st.booleans())
@example(size=(1, 1), batch=1, bias=True)
def test_formula(size: tuple[int, int], batch: int, bias: bool) -> None:
    x = random(batch, 5, *size)
    reduce, conv, expand = random(3, 5, 1, 1), random(3, 3, 3, 3), random(5, 3, 1, 1)
    biases = (random(3), random(3), random(5)) if bias else (None, None, None)
    y = naive.conv(x, reduce, biases[0]).clamp(min=0)
    y = naive.conv(y, conv, biases[1], padding=1).clamp(min=0)
    expected = (x + naive.conv(y, expand, biases[2])).clamp(min=0)
    assert (ops.bottleneck(x, reduce, conv, expand, biases=biases) - expected).abs().max() < 1e-10


def test_batch_norm_and_its_folded_form() -> None:
    x = random(2, 5, 4, 6)
    weights = (random(3, 5, 1, 1), random(3, 3, 3, 3), random(5, 3, 1, 1))
    modules = (random_bn(3), random_bn(3), random_bn(5))
    first, second, third = modules
    y = first(naive.conv(x, weights[0])).clamp(min=0)
    y = second(naive.conv(y, weights[1], padding=1)).clamp(min=0)
    expected = (third(naive.conv(y, weights[2])) + x).clamp(min=0)
    bns = tuple(ops.BatchNorm.of(module) for module in modules)
    assert max_error(ops.bottleneck(x, *weights, bns=bns), expected) < 1e-12
    folded = [
        fold_batch_norm(weight, None, bn.weight, bn.bias, bn.running_mean, bn.running_var, bn.eps)
        for weight, bn in zip(weights, bns, strict=True)
    ]
    reduce, conv, expand = (weight for weight, _ in folded)
    biases = tuple(bias for _, bias in folded)
    assert max_error(ops.bottleneck(x, reduce, conv, expand, biases=biases), expected) < 1e-12


@pytest.mark.parametrize("training", [False, True])
def test_gradcheck(training: bool) -> None:
    modules = [random_bn(channels, training) for channels in (2, 2, 3)]

    def run(x: Tensor, reduce: Tensor, conv: Tensor, expand: Tensor, *scales: Tensor) -> Tensor:
        bns = tuple(ops.BatchNorm.of(m)._replace(weight=scale) for m, scale in zip(modules, scales, strict=True))
        return ops.bottleneck(x, reduce, conv, expand, bns=bns)

    inputs = (
        random(2, 3, 2, 3),
        random(2, 3, 1, 1),
        random(2, 2, 3, 3),
        random(3, 2, 1, 1),
        random(2),
        random(2),
        random(3),
    )
    assert torch.autograd.gradcheck(run, tuple(value.requires_grad_() for value in inputs))


def test_statistics_move_once() -> None:
    modules = [random_bn(channels, training=True) for channels in (3, 3, 5)]
    bns = tuple(ops.BatchNorm.of(module) for module in modules)
    ops.bottleneck(random(2, 5, 4, 4), random(3, 5, 1, 1), random(3, 3, 3, 3), random(5, 3, 1, 1), bns=bns)
    assert [int(module.num_batches_tracked) for module in modules] == [1, 1, 1]


def test_the_residual_is_left_alone() -> None:
    x = random(1, 4, 3, 3)
    before = x.clone()
    ops.bottleneck(x, random(2, 4, 1, 1), random(2, 2, 3, 3), random(4, 2, 1, 1)).zero_()
    assert torch.equal(x, before)
