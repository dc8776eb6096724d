"""weight_gradient: the formula of its references, and the shapes that the operator refuses."""

from __future__ import annotations

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from fastden import ops
from fastden.ops.weight_gradient import reference, stem_reference
from tests.helpers import max_error
from tests.ops import naive
from tests.ops.test_conv_bn_relu import random


@settings(max_examples=25)
@given(
    size=st.tuples(st.integers(1, 9), st.integers(1, 9)), batch=st.integers(1, 3), channels=st.integers(0, 3),
    kernel=st.sampled_from([1, 3, 4]), stride=st.sampled_from([1, 2]), padding=st.integers(0, 2),
)  # fmt: skip
@example(size=(1, 1), batch=1, channels=0, kernel=1, stride=2, padding=0)
@example(size=(7, 5), batch=2, channels=3, kernel=3, stride=2, padding=1)
def test_formula(
    size: tuple[int, int], batch: int, channels: int, kernel: int, stride: int, padding: int
) -> None:  # fmt: skip
    """``channels`` of a second source; 0: there is none."""
    if min(size) + 2 * padding < kernel:
        return
    a, b = random(batch, 2, *size), random(batch, channels, *size)
    x = torch.cat([a, b], 1)
    windows = naive.pad(x, padding).unfold(2, kernel, stride).unfold(3, kernel, stride)
    grad = random(batch, 4, *windows.shape[2:4])
    found = reference(grad, a, b if channels else None, kernel, stride, padding)
    assert found.shape == (4, 2 + channels, kernel, kernel)
    # An absolute error: where every output reads the padding alone, the gradient is zero.
    assert (found - torch.einsum("nohw,nchwij->ocij", grad, windows)).abs().max() < 1e-11


def test_of_the_stem() -> None:
    """The gradient of what the stem computes, for weights that differ in all four sets."""
    x, weight, bias = random(2, 3, 10, 14), random(4, 5, 3, 7, 7), random(4, 5)
    y = ops.stem(x, weight.requires_grad_(), bias, relu=False, backend="torch")
    grad = random(*y.shape)
    (expected,) = torch.autograd.grad(y, weight, grad)
    assert max_error(stem_reference(grad, x), expected) < 1e-11


@pytest.mark.parametrize(
    ("grad", "a", "b", "message"),
    [
        ((2, 4, 5, 5), (2, 3, 5, 6), None, r"grad: shape \(2, 4, 5, 5\); accepted: the shape of the convolution's re"),
        ((1, 4, 5, 6), (2, 3, 5, 6), None, r"grad: shape \(1, 4, 5, 6\); accepted: the shape"),
        ((2, 4, 5, 6), (2, 3, 5, 6), (2, 3, 5, 5), r"b: shape \(2, 3, 5, 5\); accepted: as a, except for the channels"),
    ],
)
def test_shapes_that_do_not_fit(
    grad: tuple[int, ...], a: tuple[int, ...], b: tuple[int, ...] | None, message: str
) -> None:
    """The kernel would read beyond these; traced code meets the shape function alone."""
    with FakeTensorMode():
        tensors = [None if shape is None else torch.empty(shape) for shape in (grad, a, b)]
        with pytest.raises(RuntimeError, match=message):
            torch.ops.fastden.weight_gradient(*tensors, 3, 1, 1)


def test_a_shape_that_does_not_fit_the_stem() -> None:
    with FakeTensorMode(), pytest.raises(RuntimeError, match=r"grad: .* accepted: the shape of the stem's result"):
        torch.ops.fastden.weight_gradient_stem(torch.empty(1, 8, 3, 5), torch.empty(1, 3, 10, 12))
