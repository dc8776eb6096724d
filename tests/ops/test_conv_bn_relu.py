"""conv_bn_relu: the formula, its gradients, batch statistics, and inputs that it must not change."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fastden import ops
from fastden.ops import batch_norm
from tests.helpers import max_error
from tests.ops import naive


def random(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def random_bn(channels: int, training: bool = False) -> nn.BatchNorm2d:
    """A float64 module with random statistics and weights."""
    bn = nn.BatchNorm2d(channels, eps=1e-4, momentum=0.3).double().train(training)
    with torch.no_grad():
        bn.running_mean.normal_()
        bn.running_var.uniform_(0.3, 2)
        bn.weight.normal_()
        bn.bias.normal_()
    return bn


@settings(max_examples=40)
@given(
    size=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    batch=st.integers(1, 3),
    kernel=st.sampled_from([1, 3]),
    stride=st.sampled_from([1, 2]),
    bias=st.booleans(),
    normalise=st.booleans(),
    residual=st.booleans(),
    relu=st.booleans(),
)
@example(size=(1, 1), batch=1, kernel=3, stride=2, bias=True, normalise=True, residual=True, relu=True)
@example(size=(7, 5), batch=2, kernel=3, stride=2, bias=False, normalise=True, residual=False, relu=False)
def test_formula(
    size: tuple[int, int], batch: int, kernel: int, stride: int, bias: bool, normalise: bool, residual: bool, relu: bool
) -> None:
    x, weight = random(batch, 3, *size), random(5, 3, kernel, kernel)
    b = random(5) if bias else None
    padding = kernel // 2
    expected = naive.conv(x, weight, b, stride, padding)
    module = random_bn(5) if normalise else None
    if module is not None:
        assert module.running_mean is not None
        assert module.running_var is not None
        expected = naive.batch_norm(
            expected, module.weight, module.bias, module.running_mean, module.running_var, module.eps
        )
    other = random(*expected.shape) if residual else None
    expected = expected if other is None else expected + other
    expected = expected.clamp(min=0) if relu else expected
    bn = None if module is None else ops.BatchNorm.of(module)
    y = ops.conv_bn_relu(x, weight, b, bn=bn, residual=other, relu=relu, stride=stride, padding=padding)
    assert y.shape == expected.shape
    assert (y - expected).abs().max() < 1e-11


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("residual", [False, True])
def test_batch_statistics(residual: bool, apart: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """In training it normalises by the batch, and updates running statistics as the module does.

    Also where no convolution adds the bias, as on a GPU.
    """
    monkeypatch.setattr(batch_norm, "adds_bias_apart", lambda bias: apart)
    module = random_bn(4, training=True)
    before = copy.deepcopy(module)
    twin = copy.deepcopy(module)
    x, weight, bias = random(3, 2, 5, 4), random(4, 2, 3, 3), random(4)
    other = random(3, 4, 5, 4) if residual else torch.zeros((), dtype=torch.float64)
    y = ops.conv_bn_relu(x, weight, bias, bn=ops.BatchNorm.of(module), residual=other if residual else None, padding=1)
    convolved = naive.conv(x, weight, bias, padding=1)
    mean, var = naive.statistics(convolved)
    expected = naive.batch_norm(convolved, module.weight, module.bias, mean, var, module.eps) + other
    assert max_error(y, expected.clamp(min=0)) < 1e-12
    count = convolved.numel() // 4
    assert max_error(module.running_mean, 0.7 * before.running_mean + 0.3 * mean) < 1e-12
    assert max_error(module.running_var, 0.7 * before.running_var + 0.3 * var * count / (count - 1)) < 1e-12
    twin(torch.nn.functional.conv2d(x, weight, bias, padding=1))
    for (name, value), expected_value in zip(module.named_buffers(), twin.buffers(), strict=True):
        assert torch.allclose(value, expected_value, rtol=1e-12) if apart else torch.equal(value, expected_value), name
    assert module.num_batches_tracked == 1


class Convolutions(TorchDispatchMode):
    """Notes for each convolution whether it adds a bias, and for each gradient whether it is the bias's too."""

    def __init__(self) -> None:
        super().__init__()
        self.biases: list[bool] = []
        self.gradients: list[bool] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.convolution.default:
            self.biases.append(args[2] is not None)
        elif func is torch.ops.aten.convolution_backward.default:
            self.gradients.append(args[-1][2])
        return func(*args, **(kwargs or {}))


class Operations(TorchDispatchMode):
    """Names the operations that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.__name__.partition(".")[0])
        return func(*args, **(kwargs or {}))


def test_bias_before_batch_statistics_costs_no_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU, neither pass of a convolution has its bias; the bias still has a gradient, and a NaN in it shows."""
    monkeypatch.setattr(batch_norm, "adds_bias_apart", lambda bias: True)
    x, weight, bias = random(2, 3, 4, 4), random(4, 3, 3, 3).requires_grad_(), random(4).requires_grad_()
    for training in (True, False):
        bn = ops.BatchNorm.of(random_bn(4, training))
        with Convolutions() as ran:
            y = ops.conv_bn_relu(x, weight, bias, bn=bn, padding=1)
            _of_weight, gradient = torch.autograd.grad(y.square().sum(), (weight, bias))
        assert (ran.biases, ran.gradients) == ([not training], [not training])
        assert bool((gradient == 0).all()) == training
    assert ops.conv_bn_relu(x, weight, bias.detach() * torch.nan, bn=ops.BatchNorm.of(random_bn(4, True))).isnan().all()


@pytest.mark.parametrize("momentum", [0.0, 0.1, 0.9, 1.0])
def test_a_bias_left_out_moves_the_running_mean(momentum: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """By three operations on a GPU, with its gradient; a momentum of one keeps nothing of a mean moved before."""
    monkeypatch.setattr(batch_norm, "adds_bias_apart", lambda bias: True)
    x, weight, bias = random(2, 3, 4, 4), random(4, 3, 3, 3), random(4)
    module = random_bn(4, training=True)
    module.momentum = momentum
    twin = copy.deepcopy(module)
    with Operations() as ran:
        ops.conv_bn_relu(x, weight, bias, bn=ops.BatchNorm.of(module), padding=1)
    twin(torch.nn.functional.conv2d(x, weight, bias, padding=1))
    assert torch.allclose(module.running_mean, twin.running_mean, rtol=1e-12)
    assert torch.allclose(module.running_var, twin.running_var, rtol=1e-12)
    made, kept = ([], []) if momentum == 1 else (["add", "add"], ["copy_"])
    free = {"empty", "detach"}
    # The first one counts the batch.
    assert [name for name in ran.names if name not in free] == [
        "add_", "convolution", *made, "native_batch_norm", *kept, "relu_",
    ]  # fmt: skip


def test_a_bias_left_out_has_the_dtype_of_the_mean(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under autocast a normalisation may be in 16 bits and its convolution not."""
    monkeypatch.setattr(batch_norm, "adds_bias_apart", lambda bias: True)
    module = random_bn(4, training=True).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        ops.conv_bn_relu(torch.rand(2, 3, 4, 4), torch.rand(4, 3, 3, 3), torch.rand(4), bn=ops.BatchNorm.of(module))
    assert module.running_mean.dtype == torch.bfloat16


def test_two_forward_passes_before_the_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second moves the running mean, which the first one's gradient must not notice."""
    monkeypatch.setattr(batch_norm, "adds_bias_apart", lambda bias: True)
    weight, bias, module = random(4, 3, 3, 3).requires_grad_(), random(4).requires_grad_(), random_bn(4, True)
    passes = [ops.conv_bn_relu(random(2, 3, 4, 4), weight, bias, bn=ops.BatchNorm.of(module)) for _ in range(2)]
    sum(y.square().sum() for y in passes).backward()
    assert weight.grad is not None
    assert weight.grad.abs().max() > 0


def test_evaluation_leaves_statistics_alone() -> None:
    module = random_bn(4)
    before = copy.deepcopy(module.state_dict())
    ops.conv_bn_relu(random(1, 2, 3, 3), random(4, 2, 1, 1), bn=ops.BatchNorm.of(module))
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


@pytest.mark.parametrize("case", ["plain", "residual", "evaluation", "training"])
@pytest.mark.parametrize("stride", [1, 2])
def test_gradcheck(case: str, stride: int) -> None:
    module = random_bn(2, training=case == "training")
    side = 3 if stride == 1 else 2

    def run(x: Tensor, weight: Tensor, bias: Tensor, gamma: Tensor, beta: Tensor, residual: Tensor) -> Tensor:
        bn = ops.BatchNorm.of(module)._replace(weight=gamma, bias=beta)
        return ops.conv_bn_relu(
            x,
            weight,
            bias,
            bn=bn if case in {"evaluation", "training"} else None,
            residual=residual if case != "plain" else None,
            stride=stride,
            padding=1,
        )

    inputs = (random(2, 2, 3, 3), random(2, 2, 3, 3), random(2), random(2), random(2), random(2, 2, side, side))
    unused = {"plain": (3, 4, 5), "residual": (3, 4)}.get(case, ())
    for i, value in enumerate(inputs):
        value.requires_grad_(i not in unused)
    assert torch.autograd.gradcheck(run, inputs)


@pytest.mark.parametrize("layout", ["expanded", "sliced", "channels last"])
def test_gradient_from_any_layout(layout: str) -> None:
    x, weight = random(2, 3, 6, 4).requires_grad_(), random(5, 3, 3, 3).requires_grad_()
    gradient = {
        "expanded": random(1, 5, 1, 1).expand(2, 5, 6, 4),
        "sliced": random(2, 10, 6, 8)[:, ::2, :, ::2],
        "channels last": random(2, 5, 6, 4).contiguous(memory_format=torch.channels_last),
    }[layout]
    given_layout = torch.autograd.grad(ops.conv_bn_relu(x, weight, padding=1), (x, weight), gradient)
    dense = torch.autograd.grad(ops.conv_bn_relu(x, weight, padding=1), (x, weight), gradient.contiguous())
    for one, other in zip(given_layout, dense, strict=True):
        assert max_error(one, other) < 1e-12


@pytest.mark.parametrize("normalise", [False, True])
def test_inputs_are_left_alone(normalise: bool) -> None:
    """The ReLU works in place, on memory of its own."""
    x, weight, bias, residual = random(1, 3, 4, 4), random(3, 3, 1, 1), random(3), random(1, 3, 4, 4)
    bn = ops.BatchNorm.of(random_bn(3)) if normalise else None
    inputs = [x, weight, bias, residual, *([] if bn is None else bn[:4])]
    before = [value.clone() for value in inputs]
    y = ops.conv_bn_relu(x, weight, bias, bn=bn, residual=residual)
    y.zero_()
    for value, old in zip(inputs, before, strict=True):
        assert torch.equal(value, old)
