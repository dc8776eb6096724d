"""stem: one convolution with its own weights on the first row, the first column and the corner."""

from __future__ import annotations

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastden import ops
from fastden.ops import batch_norm
from tests.helpers import max_error, poison_freed_memory
from tests.ops import naive
from tests.ops.test_conv_bn_relu import random, random_bn


def by_cases(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The four weight sets, each applied everywhere and kept where it belongs."""
    windows = naive.pad(x, 1)[:, :, :-1, :-1]
    inside, row, column, corner = (
        naive.conv(windows, one, shift, stride=2) for one, shift in zip(weight, bias, strict=True)
    )
    rows = torch.arange(inside.shape[2])[:, None] == 0
    columns = torch.arange(inside.shape[3])[None] == 0
    y = torch.where(rows, row, inside)
    y = torch.where(columns, column, y)
    return torch.where(rows & columns, corner, y)


@settings(max_examples=25)
@given(
    size=st.tuples(st.integers(4, 9), st.integers(4, 9)),
    batch=st.integers(1, 2),
    channels=st.sampled_from([1, 3, 4]),
    relu=st.booleans(),
)
@example(size=(4, 4), batch=1, channels=4, relu=True)
def test_formula(size: tuple[int, int], batch: int, channels: int, relu: bool) -> None:
    x = random(batch, channels, 2 * size[0], 2 * size[1])
    weight, bias = random(4, 5, channels, 7, 7), random(4, 5)
    y = ops.stem(x, weight, bias, relu=relu)
    expected = by_cases(x, weight, bias)
    expected = expected.clamp(min=0) if relu else expected
    assert y.shape == (batch, 5, size[0] - 2, size[1] - 2)
    assert max_error(y, expected) < 1e-12


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_batch_norm(training: bool, apart: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where no convolution adds the bias, as on a GPU."""
    monkeypatch.setattr(batch_norm, "adds_bias_apart", lambda bias: apart)
    x, weight, bias = random(2, 3, 10, 12), random(4, 5, 3, 7, 7), random(4, 5)
    module, twin = random_bn(5, training), random_bn(5, training)
    twin.load_state_dict(module.state_dict())
    y = ops.stem(x, weight, bias, bn=ops.BatchNorm.of(module))
    assert max_error(y, twin(by_cases(x, weight, bias)).clamp(min=0)) < 1e-12
    for (name, value), other in zip(module.named_buffers(), twin.buffers(), strict=True):
        assert torch.allclose(value, other, rtol=1e-12), name


@pytest.mark.parametrize(("training", "apart"), [(False, False), (True, False), (True, True)])
def test_gradcheck(training: bool, apart: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch_norm, "adds_bias_apart", lambda bias: apart)
    module = random_bn(2, training)

    def run(x: Tensor, weight: Tensor, bias: Tensor, scale: Tensor) -> Tensor:
        return ops.stem(x, weight, bias, bn=ops.BatchNorm.of(module)._replace(weight=scale))

    inputs = (random(1, 1, 8, 10), random(4, 2, 1, 7, 7), random(4, 2), random(2))
    assert torch.autograd.gradcheck(run, tuple(value.requires_grad_() for value in inputs))


@pytest.mark.parametrize("layout", ["expanded", "sliced", "channels last"])
def test_gradient_from_any_layout(layout: str) -> None:
    x, weight = random(2, 3, 12, 10).requires_grad_(), random(4, 5, 3, 7, 7).requires_grad_()
    bias = random(4, 5).requires_grad_()
    gradient = {
        "expanded": random(1, 5, 1, 1).expand(2, 5, 4, 3),
        "sliced": random(2, 10, 4, 6)[:, ::2, :, ::2],
        "channels last": random(2, 5, 4, 3).contiguous(memory_format=torch.channels_last),
    }[layout]
    given_layout = torch.autograd.grad(ops.stem(x, weight, bias), (x, weight, bias), gradient)
    dense = torch.autograd.grad(ops.stem(x, weight, bias), (x, weight, bias), gradient.contiguous())
    for one, other in zip(given_layout, dense, strict=True):
        assert max_error(one, other) < 1e-12


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("size", [(40, 8), (40, 40), (8, 40), (8, 8)], ids=str)
def test_bfloat16_reads_only_what_was_written(size: tuple[int, int], memory_format: torch.memory_format) -> None:
    """This concerns the left border: oneDNN 3.12 reads freed memory where an output is one column wide."""
    x = torch.rand(2, 4, *size).to(memory_format=memory_format)
    weight, bias = torch.randn(4, 128, 4, 7, 7), torch.randn(4, 128)
    exact = ops.stem(x, weight, bias)
    for _ in range(5):
        poison_freed_memory()
        with torch.autocast("cpu", torch.bfloat16):
            y = ops.stem(x, weight, bias)
        assert y.dtype == torch.bfloat16
        assert max_error(y, exact) < 0.02


def test_inputs_are_left_alone() -> None:
    inputs = random(1, 3, 8, 8), random(4, 5, 3, 7, 7), random(4, 5)
    before = [value.clone() for value in inputs]
    ops.stem(*inputs).zero_()
    assert all(torch.equal(value, old) for value, old in zip(inputs, before, strict=True))
