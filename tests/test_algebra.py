"""Composed and folded weights equal the chains that they stand for."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from fastden import algebra, ops
from fastden.algebra import compose_head, compose_stem, fold_batch_norm
from fastden.bench.compare import TOLERANCE
from fastden.network.model import Denoiser
from fastden.ops import pixel_pairs
from tests.helpers import border_rms, level, max_error, random_network

SIZES = [(1, 1), (1, 6), (2, 3), (7, 5), (13, 30), (33, 46), (48, 64)]


def chain_weights(
    in_channels: int, image_channels: int, *, middle: int = 5, dtype: torch.dtype = torch.float64
) -> dict[str, Tensor]:
    """Random weights of conv0, conv1, up3 and out with few channels; every count differs."""
    shapes = {
        "conv0_weight": (middle, in_channels, 5, 5),
        "conv0_bias": (middle,),
        "conv1_weight": (6, middle, 3, 3),
        "conv1_bias": (6,),
        "up3_weight": (7, 4, 4, 4),
        "up3_bias": (4,),
        "out_weight": (image_channels, middle + 4, 3, 3),
        "out_bias": (image_channels,),
    }
    return {name: torch.randn(shape, dtype=dtype) for name, shape in shapes.items()}


def stem_of(weights: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    return compose_stem(weights["conv0_weight"], weights["conv0_bias"], weights["conv1_weight"], weights["conv1_bias"])


def head_of(weights: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    names = ("conv0_weight", "conv0_bias", "up3_weight", "up3_bias", "out_weight", "out_bias")
    return compose_head(*(weights[name] for name in names))


@settings(max_examples=25)
@given(
    height=st.integers(2, 14), width=st.integers(2, 14), batch=st.integers(1, 2), channels=st.sampled_from([1, 2, 3, 4])
)
@example(height=2, width=2, batch=1, channels=3)
def test_stem_equals_the_chain(height: int, width: int, batch: int, channels: int) -> None:
    weights = chain_weights(channels, 3)
    x = torch.randn(batch, channels, 2 * height + 4, 2 * width + 4, dtype=torch.float64)
    first = F.conv2d(x, weights["conv0_weight"], weights["conv0_bias"])
    expected = F.conv2d(first, weights["conv1_weight"], weights["conv1_bias"], stride=2, padding=1)
    assert max_error(ops.stem(x, *stem_of(weights), relu=False), expected) < 1e-12


@settings(max_examples=25)
@given(
    height=st.integers(2, 12),
    width=st.integers(2, 12),
    batch=st.integers(1, 2),
    channels=st.sampled_from([(1, 1), (2, 1), (3, 3), (4, 3)]),
)
@example(height=2, width=2, batch=1, channels=(4, 3))
def test_head_equals_the_chain(height: int, width: int, batch: int, channels: tuple[int, int]) -> None:
    weights = chain_weights(*channels)
    x = torch.randn(batch, channels[0], 2 * height + 4, 2 * width + 4, dtype=torch.float64)
    features = torch.randn(batch, 7, height, width, dtype=torch.float64)
    first = F.conv2d(x, weights["conv0_weight"], weights["conv0_bias"])
    up3 = F.conv_transpose2d(features, weights["up3_weight"], weights["up3_bias"], stride=2, padding=1)
    expected = F.conv2d(torch.cat([first, up3], 1), weights["out_weight"], weights["out_bias"])
    expected = expected + x[:, : channels[1], 3:-3, 3:-3]
    assert max_error(ops.head(features, x, *head_of(weights)), expected) < 1e-12


def test_shapes() -> None:
    weights = chain_weights(4, 3)
    stem, head = stem_of(weights), head_of(weights)
    assert [tuple(value.shape) for value in stem] == [(4, 6, 4, 7, 7), (4, 6)]
    assert stem[1].is_contiguous()
    assert [tuple(value.shape) for value in head] == [(12, 7, 4, 4), (3, 4, 7, 7), (3,)]


def test_each_phase_uses_nine_taps() -> None:
    phases = head_of(chain_weights(3, 3))[0].view(3, 2, 2, 7, 4, 4)
    for row in range(2):
        for column in range(2):
            used = (phases[:, row, column] != 0).all(0).all(0)
            rows, columns = used.any(1), used.any(0)
            assert torch.equal(used, torch.outer(rows, columns))
            assert int(rows.sum()) == int(columns.sum()) == 3


def test_border_kernels_differ_from_the_inner_one() -> None:
    weight, bias = stem_of(chain_weights(3, 3))
    for i in range(4):
        for j in range(i):
            assert max_error(weight[i], weight[j]) > 1e-2
            assert max_error(bias[i], bias[j]) > 1e-2


@pytest.mark.parametrize("bias", [False, True])
def test_folding(bias: bool) -> None:
    conv = nn.Conv2d(4, 6, 3, padding=1, bias=bias).double()
    bn = nn.BatchNorm2d(6, eps=1e-3).double().eval()
    with torch.no_grad():
        for value in (bn.running_mean, bn.weight, bn.bias):
            value.normal_()
        bn.running_var.uniform_(0.01, 2)
        bn.running_var[0] = 0  # a dead channel
    arguments = (bn.weight, bn.bias, bn.running_mean, bn.running_var, bn.eps)
    weight, shift = fold_batch_norm(conv.weight, conv.bias, *arguments)
    x = torch.randn(2, 4, 6, 5, dtype=torch.float64)
    assert max_error(F.conv2d(x, weight, shift, padding=1), bn(conv(x))) < 1e-12


@settings(max_examples=15)
@given(height=st.integers(1, 30), width=st.integers(1, 30), blind=st.booleans(), channels=st.sampled_from([1, 3]))
@example(height=1, width=1, blind=True, channels=3)
@example(height=1, width=29, blind=False, channels=3)
def test_composed_network_equals_the_plain_one(height: int, width: int, blind: bool, channels: int) -> None:
    model = random_network(not blind, channels, seed=height, dtype=torch.float64)
    x = torch.rand(2, channels, height, width, dtype=torch.float64)
    with torch.no_grad():
        plain = model(x, level(model))
        model.composed = True
        assert max_error(model(x, level(model)), plain) < 1e-12


def in_float64_then_cast(model: Denoiser) -> Denoiser:
    """A float32 network whose composed weights are made in float64: what inference uses."""

    class Cast(Denoiser):
        def _forward_composed(self, x: Tensor) -> Tensor:
            conv0 = (self.conv0.weight.double(), self.conv0.bias.double())
            conv1, up3, out = self.conv1.conv, self.up3, self.out
            stem = compose_stem(*conv0, conv1.weight.double(), conv1.bias.double())
            head = compose_head(*conv0, up3.weight.double(), up3.bias.double(), out.weight.double(), out.bias.double())
            first = ops.stem(x, stem.weight.float(), stem.bias.float(), bn=ops.BatchNorm.of(self.conv1.bn))
            return ops.head(self._trunk(first), x, *(value.float() for value in head))

    other = Cast(model.noise_level_input, model.image_channels, composed=True)
    other.load_state_dict(model.state_dict())
    return other.eval()


@pytest.mark.parametrize("noise_level_input", [False, True])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_float32_error_of_the_composed_network(size: tuple[int, int], noise_level_input: bool) -> None:
    """At most twice the plain network's own float32 error, on the whole image and on every border row and column.

    The plain network's error is that of the memory layout in which it errs more: oneDNN sums in another order in each.
    """
    # Small images have few pixels: several images make the root mean square stable.
    x = torch.rand(max(2, 512 // (size[0] * size[1])), 3, *size)
    plain = random_network(noise_level_input, seed=sum(size))
    composed = copy.deepcopy(plain)
    composed.composed = True
    with torch.no_grad():
        exact = copy.deepcopy(plain).double()(x.double(), level(plain))
        plain_errors = []
        for layout in (torch.contiguous_format, torch.channels_last):
            network = copy.deepcopy(plain).to(memory_format=layout)
            plain_errors.append(network(x.contiguous(memory_format=layout), level(plain)).double() - exact)
        own = [border_rms(error) for error in plain_errors]
        # A float32 network cannot do better than the rounding of its result.
        floor = torch.finfo(torch.float32).eps * exact.abs().max().item()
        largest = max(*(error.abs().max().item() for error in plain_errors), floor)
        for model in (composed, in_float64_then_cast(plain)):
            error = model(x, level(model)).double() - exact
            assert error.abs().max() <= TOLERANCE * largest
            for name, rms in border_rms(error).items():
                assert rms <= TOLERANCE * max(own[0][name], own[1][name], floor), name


@pytest.mark.parametrize("pairs", [False, True])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("noise_level_input", [False, True])
def test_gradients_reach_the_factors_alike(
    noise_level_input: bool, training: bool, pairs: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where convolutions of the image read pairs of pixels, as on a GPU."""
    monkeypatch.setattr(pixel_pairs, "suit", lambda x, weight: pairs)
    x = torch.rand(2, 3, 9, 14, dtype=torch.float64)
    gradients = []
    for composed in (False, True):
        model = random_network(noise_level_input, composed=composed, dtype=torch.float64).train(training)
        model(x, level(model)).square().sum().backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    plain, composed_gradients = gradients
    for name, expected in plain.items():
        assert expected is not None, name
        if training and name in {"conv1.conv.bias", "conv2.conv.bias", "conv3.conv.bias"}:
            # Batch statistics remove a bias.
            assert composed_gradients[name].abs().max() < 1e-9 * plain["conv1.conv.weight"].abs().max()
        else:
            assert expected.abs().max() > 0, name
            assert max_error(composed_gradients[name], expected) < 1e-9, name


def test_constants_are_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """They hold for gradients, though the first call is one of inference, and no recorded call leaves its own."""
    monkeypatch.setattr(algebra, "_constants", {})
    ranges: list[int] = []
    arange = torch.arange

    def counted(*args: Any, **kwargs: Any) -> Tensor:
        ranges.append(1)
        return arange(*args, **kwargs)

    monkeypatch.setattr(torch, "arange", counted)
    weights = {name: value.requires_grad_() for name, value in chain_weights(4, 3).items()}
    with FakeTensorMode(allow_non_fake_inputs=True):
        stem_of({name: torch.empty(value.shape, dtype=value.dtype) for name, value in weights.items()})
    torch.func.vmap(lambda bias: stem_of({**weights, "conv0_bias": bias}))(torch.randn(2, 5, dtype=torch.float64))
    assert not algebra._constants
    with torch.inference_mode():
        first = *stem_of(weights), *head_of(weights)
    ranges.clear()
    second = *stem_of(weights), *head_of(weights)
    assert not ranges
    sum(value.sum() for value in second).backward()
    assert all(torch.equal(one, two) for one, two in zip(first, second, strict=True))
    single = {name: value.detach().float() for name, value in weights.items()}
    assert {value.dtype for value in (*stem_of(single), *head_of(single))} == {torch.float32}


def test_gradcheck_of_the_stem() -> None:
    weights = {
        name: value[:2] if name == "conv1_weight" else value for name, value in chain_weights(2, 1, middle=2).items()
    }
    inputs = (weights["conv0_weight"], weights["conv0_bias"], weights["conv1_weight"], weights["conv1_bias"][:2])
    assert torch.autograd.gradcheck(compose_stem, tuple(value.requires_grad_() for value in inputs))


def test_gradcheck_of_the_head() -> None:
    weights = chain_weights(2, 1, middle=2)
    inputs = (
        weights["conv0_weight"],
        weights["conv0_bias"],
        weights["up3_weight"][:2, :1].contiguous(),
        weights["up3_bias"][:1].contiguous(),
        weights["out_weight"][:, :3].contiguous(),
        weights["out_bias"],
    )
    assert torch.autograd.gradcheck(compose_head, tuple(value.detach().requires_grad_() for value in inputs))


def test_gradcheck_of_folding() -> None:
    inputs = [
        torch.randn(2, 3, 2, 2),
        torch.randn(2),
        torch.randn(2),
        torch.randn(2),
        torch.randn(2),
        torch.rand(2) + 0.5,
    ]
    doubled = tuple(value.double().requires_grad_() for value in inputs)
    assert torch.autograd.gradcheck(lambda *values: fold_batch_norm(*values, eps=1e-5), doubled)
