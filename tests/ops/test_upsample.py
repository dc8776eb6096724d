"""upsample: transposed convolution, kernel 4, stride 2, padding 1."""

from __future__ import annotations

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fastden import ops
from tests.helpers import max_error
from tests.ops import naive
from tests.ops.test_conv_bn_relu import random


@settings(max_examples=25)
@given(size=st.tuples(st.integers(1, 7), st.integers(1, 7)), batch=st.integers(1, 2), bias=st.booleans())
@example(size=(1, 1), batch=1, bias=True)
@example(size=(1, 7), batch=2, bias=False)
def test_formula(size: tuple[int, int], batch: int, bias: bool) -> None:
    x, weight, shift = random(batch, 3, *size), random(3, 2, 4, 4), random(2) if bias else None
    y = ops.upsample(x, weight, shift)
    assert y.shape == (batch, 2, 2 * size[0], 2 * size[1])
    assert (y - naive.transposed_conv(x, weight, shift)).abs().max() < 1e-11


def test_gradcheck() -> None:
    inputs = (random(2, 2, 2, 3), random(2, 2, 4, 4), random(2))
    assert torch.autograd.gradcheck(ops.upsample, tuple(value.requires_grad_() for value in inputs))


@pytest.mark.parametrize("layout", ["expanded", "sliced"])
def test_gradient_from_any_layout(layout: str) -> None:
    x, weight = random(1, 3, 3, 4).requires_grad_(), random(3, 2, 4, 4).requires_grad_()
    gradient = random(1, 2, 1, 1).expand(1, 2, 6, 8) if layout == "expanded" else random(1, 4, 12, 8)[:, 1:3, ::2]
    given_layout = torch.autograd.grad(ops.upsample(x, weight), (x, weight), gradient)
    dense = torch.autograd.grad(ops.upsample(x, weight), (x, weight), gradient.contiguous())
    for one, other in zip(given_layout, dense, strict=True):
        assert max_error(one, other) < 1e-12
