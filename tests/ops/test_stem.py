"""stem: one convolution with its own weights on the first row, the first column and the corner."""

from __future__ import annotations

from functools import partial
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastden import ops
from fastden.network.model import Denoiser
from fastden.ops import batch_norm, pixel_pairs
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


def on(pairs: bool) -> Any:
    """A context in which convolutions of the image read pairs of pixels, as on a GPU, or single pixels."""

    def suit(x: Tensor, weight: Tensor) -> bool:  # a mock could not be compiled
        return pairs

    return mock.patch.object(pixel_pairs, "suit", suit)


@settings(max_examples=40)
@given(
    size=st.tuples(st.integers(4, 9), st.integers(4, 9)),
    batch=st.integers(1, 2),
    channels=st.sampled_from([1, 3, 4]),
    relu=st.booleans(),
    pairs=st.booleans(),
)
@example(size=(4, 4), batch=1, channels=4, relu=True, pairs=False)
@example(size=(4, 4), batch=1, channels=4, relu=True, pairs=True)
@example(size=(5, 7), batch=2, channels=3, relu=False, pairs=True)
def test_formula(size: tuple[int, int], batch: int, channels: int, relu: bool, pairs: bool) -> None:
    x = random(batch, channels, 2 * size[0], 2 * size[1])
    weight, bias = random(4, 5, channels, 7, 7), random(4, 5)
    with on(pairs):
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


@pytest.mark.parametrize("pairs", [False, True])
@pytest.mark.parametrize(("training", "apart"), [(False, False), (True, False), (True, True)])
def test_gradcheck(training: bool, apart: bool, pairs: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch_norm, "adds_bias_apart", lambda bias: apart)
    monkeypatch.setattr(pixel_pairs, "suit", lambda x, weight: pairs)
    module = random_bn(2, training)

    def run(x: Tensor, weight: Tensor, bias: Tensor, scale: Tensor) -> Tensor:
        return ops.stem(x, weight, bias, bn=ops.BatchNorm.of(module)._replace(weight=scale))

    inputs = (random(1, 1, 8, 10), random(4, 2, 1, 7, 7), random(4, 2), random(2))
    assert torch.autograd.gradcheck(run, tuple(value.requires_grad_() for value in inputs))


def test_pairs_in_float32_are_convolutions_alone() -> None:
    """On a GPU all of the result then rounds alike, whether or not convolutions may round to TF32."""
    x, weight, bias = torch.rand(2, 4, 12, 16), torch.randn(4, 5, 4, 7, 7), torch.randn(4, 5)
    ran: list[str] = []

    class Names(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            ran.append(func._schema.name)
            return func(*args, **(kwargs or {}))

    with on(True), Names():
        y = ops.stem(x, weight, bias)
    assert ran.count("aten::convolution") == 2
    assert "aten::addmm" not in ran
    assert max_error(y, by_cases(x.double(), weight.double(), bias.double()).clamp(min=0)) < 1e-4


@pytest.mark.parametrize("pairs", [False, True])
def test_second_and_forward_derivatives(pairs: bool) -> None:
    inputs = random(1, 1, 8, 10), random(4, 2, 1, 7, 7), random(4, 2)
    leaves = tuple(value.requires_grad_() for value in inputs)
    with on(pairs):
        assert torch.autograd.gradcheck(partial(ops.stem, relu=False), leaves, check_forward_ad=True)
        assert torch.autograd.gradgradcheck(lambda *values: ops.stem(*values, relu=False).sin(), leaves)


@pytest.mark.parametrize("pairs", [False, True])
def test_transforms_and_compiled_code(pairs: bool) -> None:
    x, weight, bias = random(3, 4, 10, 12), random(4, 5, 4, 7, 7), random(4, 5)
    with on(pairs):
        y = ops.stem(x, weight, bias)
        each = torch.func.vmap(lambda image: ops.stem(image[None], weight, bias)[0])(x)
        compiled = torch.compile(ops.stem, fullgraph=True, backend="aot_eager")(x, weight.requires_grad_(), bias)
        gradients = [torch.autograd.grad(one.sum(), weight)[0] for one in (compiled, ops.stem(x, weight, bias))]
    assert max_error(each, y) < 1e-12
    assert max_error(compiled, y) < 1e-12
    assert max_error(*gradients) < 1e-11


def test_pairs_are_for_composed_weights_in_training(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other weights may have more taps; what is recorded, and inference, run as they were measured."""
    factor = torch.randn(4, 5, 4, 7, 7).requires_grad_()
    x, composed = torch.rand(1, 4, 8, 10), 2 * factor

    class OnGPU:
        is_cuda, dtype = True, torch.float32

    image: Any = OnGPU()
    assert pixel_pairs.suit(image, composed)
    assert not pixel_pairs.suit(image, factor)
    assert not pixel_pairs.suit(image, composed.detach())
    assert not pixel_pairs.suit(x, composed)
    with torch.no_grad():
        assert not pixel_pairs.suit(image, composed)
    monkeypatch.setattr(pixel_pairs, "transforming", lambda: True)
    assert not pixel_pairs.suit(image, composed)


def test_a_training_step_asks_for_pairs_with_composed_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU all else that :func:`pixel_pairs.suit` asks for holds there, for the stem and the head."""
    asked: list[tuple[bool, bool, bool]] = []

    def suit(x: Tensor, weight: Tensor) -> bool:
        asked.append((weight.requires_grad, weight.is_leaf, pixel_pairs.transforming()))
        return False

    monkeypatch.setattr(pixel_pairs, "suit", suit)
    Denoiser(composed=True).train()(torch.rand(1, 3, 16, 16), 0.1)
    assert asked == 2 * [(True, False, False)]


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_pairs_make_all_channels_last(layout: torch.memory_format) -> None:
    """PyTorch pads by reflection on a GPU into contiguous memory; what follows the stem would be contiguous, too."""
    x, weight = torch.rand(2, 4, 16, 20).contiguous(memory_format=layout), torch.randn(4, 8, 4, 7, 7).requires_grad_()
    seen: list[bool] = []

    class Operands(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            if func._schema.name.startswith(("aten::convolution", "aten::native_batch_norm", "aten::threshold")):
                four = [one for one in tree_leaves((args, result)) if isinstance(one, Tensor) and one.dim() == 4]
                seen.extend(one.is_contiguous(memory_format=torch.channels_last) for one in four)
            return result

    with on(True), Operands():
        y = ops.stem(x, weight, torch.randn(4, 8), bn=ops.BatchNorm.of(torch.nn.BatchNorm2d(8)))
        y.backward(torch.randn_like(y))
    assert len(seen) >= 12
    assert all(seen)


def test_the_border_costs_one_copy_of_the_gradient() -> None:
    """PyTorch's own gradients of writes into a tensor copy all of it for each."""
    x, weight, bias = torch.rand(2, 4, 16, 20), torch.randn(4, 8, 4, 7, 7).requires_grad_(), torch.randn(4, 8)
    with on(True):
        y = ops.stem(x, weight, bias, relu=False)
    copied: list[str] = []

    class Copies(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            if isinstance(result, Tensor) and result.shape == y.shape and func._schema.name != "aten::detach":
                copied.append(func._schema.name)
            return result

    with Copies():
        y.backward(torch.ones_like(y))
    assert copied == ["aten::ones_like", "aten::clone"]


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
