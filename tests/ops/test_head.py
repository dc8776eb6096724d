"""head: features at half resolution and the padded image to the denoised image."""

from __future__ import annotations

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastden import ops
from tests.helpers import max_error
from tests.ops import naive
from tests.ops.test_conv_bn_relu import random


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
