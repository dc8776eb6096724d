"""concat_conv_bn_relu: two inputs, one convolution."""

from __future__ import annotations

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastden import ops
from fastden.ops import batch_norm
from tests.helpers import max_error
from tests.ops import naive
from tests.ops.test_conv_bn_relu import random, random_bn


@settings(max_examples=25)
@given(
    size=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    batch=st.integers(1, 2),
    channels=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    relu=st.booleans(),
    bias=st.booleans(),
)
@example(size=(1, 1), batch=1, channels=(1, 3), relu=True, bias=True)
def test_formula(size: tuple[int, int], batch: int, channels: tuple[int, int], relu: bool, bias: bool) -> None:
    a, b = (random(batch, count, *size) for count in channels)
    weight, shift = random(5, sum(channels), 3, 3), random(5) if bias else None
    # A convolution of two inputs is the sum of two convolutions.
    expected = naive.conv(a, weight[:, : channels[0]], shift, padding=1)
    expected = expected + naive.conv(b, weight[:, channels[0] :], padding=1)
    expected = expected.clamp(min=0) if relu else expected
    assert (ops.concat_conv_bn_relu(a, b, weight, shift, relu=relu) - expected).abs().max() < 1e-11


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_batch_norm(training: bool, apart: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where no convolution adds the bias, as on a GPU."""
    monkeypatch.setattr(batch_norm, "adds_bias_apart", lambda bias: apart)
    a, b, weight, bias = random(2, 3, 4, 5), random(2, 2, 4, 5), random(6, 5, 3, 3), random(6)
    module, twin = random_bn(6, training), random_bn(6, training)
    twin.load_state_dict(module.state_dict())
    y = ops.concat_conv_bn_relu(a, b, weight, bias, bn=ops.BatchNorm.of(module))
    expected = twin(naive.conv(torch.cat([a, b], 1), weight, bias, padding=1)).clamp(min=0)
    assert max_error(y, expected) < 1e-12
    for (name, value), other in zip(module.named_buffers(), twin.buffers(), strict=True):
        assert torch.allclose(value, other, rtol=1e-12), name


@pytest.mark.parametrize("training", [False, True])
def test_gradcheck(training: bool) -> None:
    module = random_bn(2, training)

    def run(a: Tensor, b: Tensor, weight: Tensor, bias: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
        bn = ops.BatchNorm.of(module)._replace(weight=gamma, bias=beta)
        return ops.concat_conv_bn_relu(a, b, weight, bias, bn=bn)

    inputs = (random(2, 2, 3, 2), random(2, 1, 3, 2), random(2, 3, 3, 3), random(2), random(2), random(2))
    assert torch.autograd.gradcheck(run, tuple(value.requires_grad_() for value in inputs))


def test_inputs_are_left_alone() -> None:
    inputs = random(1, 2, 3, 3), random(1, 1, 3, 3), random(4, 3, 3, 3), random(4)
    before = [value.clone() for value in inputs]
    ops.concat_conv_bn_relu(*inputs).zero_()
    assert all(torch.equal(value, old) for value, old in zip(inputs, before, strict=True))
