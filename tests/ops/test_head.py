"""head: features at half resolution and the padded image to the denoised image."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastden import ops
from fastden.algebra import compose_head
from tests.helpers import max_error
from tests.ops import naive
from tests.ops.test_conv_bn_relu import random
from tests.ops.test_stem import on


def by_pixels(features: Tensor, x: Tensor, weight: Tensor, image_weight: Tensor, bias: Tensor) -> Tensor:
    """Pixel (2 i + p, 2 j + q) sums the 4x4 features from (i - 1, j - 1) on with the taps of phase (p, q)."""
    k = image_weight.shape[0]
    phases = weight.view(k, 2, 2, *weight.shape[1:])
    y = naive.conv(x, image_weight, bias) + x[:, :k, 3:-3, 3:-3]
    around = naive.pad(features, 1)
    for row in range(y.shape[2]):
        for column in range(y.shape[3]):
            i, j = row // 2, column // 2
            window = around[:, :, i : i + 4, j : j + 4]
            y[:, :, row, column] += torch.einsum("nmab,kmab->nk", window, phases[:, row % 2, column % 2])
    return y


def arguments(size: tuple[int, int], batch: int = 1, channels: tuple[int, int] = (4, 3)) -> tuple[Tensor, ...]:
    """features, x, weight, image_weight, bias; ``size`` of the features."""
    c, k = channels
    return (
        random(batch, 5, *size),
        random(batch, c, 2 * size[0] + 4, 2 * size[1] + 4),
        random(4 * k, 5, 4, 4),
        random(k, c, 7, 7),
        random(k),
    )


@settings(max_examples=20)
@given(
    size=st.tuples(st.integers(2, 6), st.integers(2, 6)),
    batch=st.integers(1, 2),
    channels=st.sampled_from([(1, 1), (2, 1), (3, 3), (4, 3)]),
)
@example(size=(2, 2), batch=1, channels=(4, 3))
def test_formula(size: tuple[int, int], batch: int, channels: tuple[int, int]) -> None:
    inputs = arguments(size, batch, channels)
    y = ops.head(*inputs)
    assert y.shape == (batch, channels[1], 2 * size[0] - 2, 2 * size[1] - 2)
    assert max_error(y, by_pixels(*inputs)) < 1e-12


def composed_arguments(
    size: tuple[int, int], batch: int = 1, channels: tuple[int, int] = (4, 3), dtype: torch.dtype = torch.float64
) -> tuple[Tensor, ...]:
    """As :func:`arguments`, with composed weights."""
    c, k = channels
    shapes = ((4, c, 5, 5), (4,), (5, 3, 4, 4), (3,), (k, 7, 3, 3), (k,))
    weights = compose_head(*(random(*shape) / 3 for shape in shapes))
    features, x, *_ = arguments(size, batch, channels)
    return tuple(value.to(dtype) for value in (features, x, *weights))


@settings(max_examples=20)
@given(
    size=st.tuples(st.integers(2, 6), st.integers(2, 6)),
    batch=st.integers(0, 2),
    channels=st.sampled_from([(1, 1), (2, 1), (3, 3), (4, 3)]),
)
@example(size=(2, 2), batch=1, channels=(4, 3))
@example(size=(3, 5), batch=2, channels=(3, 3))
@example(size=(3, 5), batch=0, channels=(3, 3))
def test_pairs_of_pixels(size: tuple[int, int], batch: int, channels: tuple[int, int]) -> None:
    """As on a GPU, from weights that are composed; other weights have more taps than pairs can have."""
    inputs = composed_arguments(size, batch, channels)
    with on(True):
        y = ops.head(*inputs, composed=True)
        other = ops.head(*inputs)
    assert y.shape == other.shape == (batch, channels[1], 2 * size[0] - 2, 2 * size[1] - 2)
    if batch:
        assert max_error(y, by_pixels(*inputs)) < 1e-12
        assert max_error(other, by_pixels(*inputs)) < 1e-12


def test_gradients_on_pairs_of_pixels() -> None:
    """All but those of taps that are zero in all composed weights, which get none."""
    gradients, drawn = [], composed_arguments((4, 5), batch=2)
    for pairs in (False, True):
        inputs = [value.detach().requires_grad_() for value in drawn]
        with on(pairs):
            y = ops.head(*inputs, composed=True)
        y.backward(torch.arange(y.numel(), dtype=y.dtype).view(y.shape).sin())
        gradients.append([value.grad for value in inputs])
    used = drawn[2] != 0
    assert int(used.sum()) == 12 * 5 * 9
    gradients[0][2] *= used
    for one, other in zip(*gradients, strict=True):
        assert max_error(one, other) < 1e-11


def test_pairs_round_no_more() -> None:
    features, x, *weights = composed_arguments((12, 10), batch=4)
    exact = ops.head(features, x, *weights, add_input=False)
    errors = []
    for pairs in (False, True):
        with on(pairs), torch.autocast("cpu", torch.bfloat16):
            inputs = (value.float() for value in (features, x, *weights))
            errors.append((ops.head(*inputs, add_input=False, composed=True) - exact).square().mean().sqrt())
    assert errors[1] < 1.2 * errors[0]


def test_compiled_on_pairs_of_pixels() -> None:
    inputs = composed_arguments((4, 5))
    with on(True):
        compiled = torch.compile(partial(ops.head, composed=True), fullgraph=True, backend="aot_eager")(*inputs)
    assert max_error(compiled, ops.head(*inputs)) < 1e-12


def test_without_the_input() -> None:
    inputs = arguments((4, 3))
    image = inputs[1][:, :3, 3:-3, 3:-3]
    assert max_error(ops.head(*inputs, add_input=False) + image, ops.head(*inputs)) < 1e-12


def test_the_input_keeps_its_precision() -> None:
    """Weights of zero return the image as it was, though the products would round it."""
    features, x, weight, image_weight, bias = (value.float() for value in arguments((4, 5)))
    y = ops.head(features, x, weight * 0, image_weight * 0, bias * 0)
    assert torch.equal(y, x[:, :3, 3:-3, 3:-3])


def test_gradcheck() -> None:
    features, x, weight, image_weight, bias = arguments((3, 2), channels=(2, 1))
    inputs = (features[:, :2].contiguous(), x, weight[:, :2].contiguous(), image_weight, bias)
    assert torch.autograd.gradcheck(ops.head, tuple(value.requires_grad_() for value in inputs))


@pytest.mark.parametrize("layout", ["expanded", "sliced", "channels last"])
def test_gradient_from_any_layout(layout: str) -> None:
    inputs = [value.requires_grad_() for value in arguments((4, 5), batch=2)]
    gradient = {
        "expanded": random(1, 3, 1, 1).expand(2, 3, 6, 8),
        "sliced": random(2, 6, 6, 16)[:, ::2, :, ::2],
        "channels last": random(2, 3, 6, 8).contiguous(memory_format=torch.channels_last),
    }[layout]
    given_layout = torch.autograd.grad(ops.head(*inputs), inputs, gradient)
    dense = torch.autograd.grad(ops.head(*inputs), inputs, gradient.contiguous())
    for one, other in zip(given_layout, dense, strict=True):
        assert max_error(one, other) < 1e-12


def test_inputs_are_left_alone() -> None:
    inputs = arguments((3, 3))
    before = [value.clone() for value in inputs]
    ops.head(*inputs).zero_()
    assert all(torch.equal(value, old) for value, old in zip(inputs, before, strict=True))
