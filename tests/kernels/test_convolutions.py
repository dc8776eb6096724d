"""conv_bn_relu, concat_conv_bn_relu and upsample on Triton: results, gradients, statistics, and what PyTorch asks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from fastden import ops
from fastden.ops import backends
from tests.helpers import relative_l2
from tests.kernels.images import DTYPES
from tests.rounding import assert_as_exact, slack

sizes = st.tuples(st.integers(1, 13), st.integers(1, 13))


def cosine(a: Tensor, b: Tensor) -> float:
    return torch.nn.functional.cosine_similarity(a.double().flatten(), b.double().flatten(), 0).item()


def random(device: str, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    # Drawn on the CPU: a GPU gets the numbers that the interpreter gets.
    return torch.randn(shape).to(device, dtype)


def run_eagerly(function: Callable[..., Tensor], tensors: dict[str, Any], **settings: Any) -> Tensor:
    """PyTorch's own result in the tensors' dtype.

    On a CPU, half precision is float32 rounded at the end: oneDNN 3.12's own bfloat16 convolution leaves NaN in outputs
    that are one column wide.
    """
    dtype = next(iter(tensors.values())).dtype
    if dtype != torch.float32 and not next(iter(tensors.values())).is_cuda:
        wide = {name: None if tensor is None else tensor.float() for name, tensor in tensors.items()}
        return function(**wide, **settings, backend="torch").to(dtype)
    return function(**tensors, **settings, backend="torch")


def assert_as_exact_as_eager(function: Callable[..., Tensor], tensors: dict[str, Any], **settings: Any) -> None:
    """The kernel errs, against float64, at most twice as much as eager PyTorch in its dtype, apart from rounding."""
    exact = function(**{k: v.double() for k, v in tensors.items() if v is not None}, **settings, backend="torch")
    eager = run_eagerly(function, tensors, **settings)
    kernel = function(**tensors, **settings, backend="triton")
    assert kernel.is_contiguous(memory_format=torch.channels_last)
    given = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    empty = not kernel.numel()
    unit = 0 if empty else slack(function, **given, **settings, backend="torch", exact=exact, dtype=eager.dtype)
    assert_as_exact(kernel, eager, exact, unit, borders=False)


@settings(max_examples=25)
@given(
    size=sizes, batch=st.integers(0, 3), channels=st.integers(1, 20), outputs=st.integers(1, 20),
    kernel=st.sampled_from([1, 3, 5]), stride=st.sampled_from([1, 2]), bias=st.booleans(), residual=st.booleans(),
    relu=st.booleans(), dtype=st.sampled_from(DTYPES),
)  # fmt: skip
@example((1, 1), 1, 1, 1, 3, 2, True, True, True, torch.bfloat16)
@example((11, 13), 2, 17, 19, 3, 1, True, True, True, torch.float32)
def test_conv_bn_relu(
    device: str, size: tuple[int, int], batch: int, channels: int, outputs: int, kernel: int, stride: int, bias: bool,
    residual: bool, relu: bool, dtype: torch.dtype,
) -> None:  # fmt: skip
    padding = kernel // 2
    out = [(s + 2 * padding - kernel) // stride + 1 for s in size]
    tensors = {
        "x": random(device, batch, channels, *size, dtype=dtype),
        "weight": random(device, outputs, channels, kernel, kernel, dtype=dtype) / (channels * kernel**2) ** 0.5,
        "bias": random(device, outputs, dtype=dtype) if bias else None,
        "residual": random(device, batch, outputs, *out, dtype=dtype) if residual else None,
    }
    assert_as_exact_as_eager(ops.conv_bn_relu, tensors, relu=relu, stride=stride, padding=padding)


@settings(max_examples=12)
@given(
    size=sizes, batch=st.integers(0, 2), a=st.integers(1, 18), b=st.integers(1, 18), outputs=st.integers(1, 20),
    dtype=st.sampled_from(DTYPES),
)  # fmt: skip
@example((7, 19), 2, 17, 5, 19, torch.bfloat16)
def test_concat_conv_bn_relu(
    device: str, size: tuple[int, int], batch: int, a: int, b: int, outputs: int, dtype: torch.dtype
) -> None:
    tensors = {
        "a": random(device, batch, a, *size, dtype=dtype),
        "b": random(device, batch, b, *size, dtype=dtype),
        "weight": random(device, outputs, a + b, 3, 3, dtype=dtype) / (9 * (a + b)) ** 0.5,
        "bias": random(device, outputs, dtype=dtype),
    }
    assert_as_exact_as_eager(ops.concat_conv_bn_relu, tensors)


@settings(max_examples=12)
@given(
    size=sizes, batch=st.integers(0, 2), channels=st.integers(1, 20), outputs=st.integers(1, 20), bias=st.booleans(),
    dtype=st.sampled_from(DTYPES),
)  # fmt: skip
@example((1, 1), 1, 1, 1, True, torch.float16)
def test_upsample(
    device: str, size: tuple[int, int], batch: int, channels: int, outputs: int, bias: bool, dtype: torch.dtype
) -> None:
    tensors = {
        "x": random(device, batch, channels, *size, dtype=dtype),
        "weight": random(device, channels, outputs, 4, 4, dtype=dtype) / (4 * channels) ** 0.5,
        "bias": random(device, outputs, dtype=dtype) if bias else None,
    }
    assert_as_exact_as_eager(ops.upsample, tensors)


def test_nan_is_not_hidden(device: str) -> None:
    x = random(device, 1, 4, 6, 6)
    x[0, 1, 3, 3] = float("nan")
    y = ops.conv_bn_relu(x, random(device, 5, 4, 3, 3), padding=1, backend="triton")
    assert y[0, :, 2:5, 2:5].isnan().all()
    assert y.isnan().sum() == 5 * 9


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced", "expanded"])
def test_any_layout(device: str, layout: str) -> None:
    x = random(device, 2, 6, 8, 10)
    if layout == "channels_last":
        x = x.contiguous(memory_format=torch.channels_last)
    elif layout == "sliced":
        x = random(device, 2, 12, 8, 20)[:, ::2, :, ::2]
    elif layout == "expanded":
        x = random(device, 1, 6, 1, 10).expand(2, 6, 8, 10)
    weight = random(device, 5, 6, 3, 3)
    expected = ops.conv_bn_relu(x, weight, padding=1, backend="torch")
    torch.testing.assert_close(ops.conv_bn_relu(x, weight, padding=1, backend="triton"), expected, rtol=1e-4, atol=1e-4)


def normalisation(channels: int, device: str, training: bool) -> nn.BatchNorm2d:
    bn = nn.BatchNorm2d(channels, momentum=0.3).to(device).train(training)
    with torch.no_grad():
        bn.weight.uniform_(-1.5, 1.5)
        bn.bias.normal_()
        bn.running_mean.normal_()  # type: ignore[union-attr]
        bn.running_var.uniform_(0.5, 2)  # type: ignore[union-attr]
    return bn


Case = tuple[Callable[..., Tensor], dict[str, Tensor], dict[str, Any]]


def case(name: str, device: str, dtype: torch.dtype = torch.float32) -> Case:
    """An operator with its tensors and settings."""
    if name == "conv_bn_relu":
        tensors = {
            "x": random(device, 2, 6, 9, 7),
            "weight": random(device, 8, 6, 3, 3) / 7,
            "bias": random(device, 8),
            "residual": random(device, 2, 8, 5, 4),
        }
        return ops.conv_bn_relu, {k: v.to(dtype) for k, v in tensors.items()}, {"stride": 2, "padding": 1}
    if name == "concat_conv_bn_relu":
        tensors = {
            "a": random(device, 2, 6, 5, 7),
            "b": random(device, 2, 3, 5, 7),
            "weight": random(device, 8, 9, 3, 3) / 9,
            "bias": random(device, 8),
        }
        return ops.concat_conv_bn_relu, {k: v.to(dtype) for k, v in tensors.items()}, {}
    tensors = {"x": random(device, 2, 6, 5, 7), "weight": random(device, 6, 4, 4, 4) / 5, "bias": random(device, 4)}
    return ops.upsample, {k: v.to(dtype) for k, v in tensors.items()}, {}


def run_with_gradients(
    function: Callable[..., Tensor], tensors: dict[str, Tensor], bn: nn.BatchNorm2d | None, backend: str, layout: str,
    options: dict[str, Any],
) -> tuple[Tensor, dict[str, Tensor]]:  # fmt: skip
    leaves = {name: tensor.detach().clone().requires_grad_() for name, tensor in tensors.items()}
    extra = {} if bn is None else {"bn": ops.BatchNorm.of(bn)}
    y = function(**leaves, **options, **extra, backend=backend)
    generator = torch.Generator().manual_seed(3)
    grad = torch.randn(y.shape, generator=generator).to(y)
    if layout == "expanded":
        grad = grad[:, :, :1, :1].expand_as(y)
    elif layout == "sliced":
        grad = torch.stack([grad, grad], -1)[..., 0]
    elif layout == "channels_last":
        grad = grad.contiguous(memory_format=torch.channels_last)
    parameters = [] if bn is None else [bn.weight, bn.bias]
    names = [*leaves, *("bn.weight", "bn.bias")[: len(parameters)]]
    found = torch.autograd.grad(y, [*leaves.values(), *parameters], grad)
    return y, dict(zip(names, found, strict=True))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced", "expanded"])
@pytest.mark.parametrize("normalise", ["none", "running", "batch"])
@pytest.mark.parametrize("name", ["conv_bn_relu", "concat_conv_bn_relu", "upsample"])
def test_gradients(device: str, name: str, normalise: str, layout: str) -> None:
    if name == "upsample" and normalise != "none":
        pytest.skip("upsample has no normalisation")
    function, tensors, options = case(name, device)
    found = {}
    statistics = {}
    for backend in ("torch", "triton"):
        torch.manual_seed(5)
        bn = None if normalise == "none" else normalisation(8, device, normalise == "batch")
        y, gradients = run_with_gradients(function, tensors, bn, backend, layout, options)
        found[backend] = {"result": y, **gradients}
        statistics[backend] = [] if bn is None else [bn.running_mean, bn.running_var, bn.num_batches_tracked]
    for key, expected in found["torch"].items():
        if key == "bias" and normalise == "batch":
            assert found["triton"][key].abs().max() < 1e-4  # it is rounding noise in the reference
            continue
        assert relative_l2(found["triton"][key], expected) < 1e-5, key
        assert cosine(found["triton"][key], expected) > 1 - 1e-6, key
        assert torch.equal(found["triton"][key] == 0, expected == 0) or key != "result"
    for one, other in zip(statistics["torch"], statistics["triton"], strict=True):
        torch.testing.assert_close(other, one, rtol=1e-5, atol=1e-5)


def test_no_gradient_where_none_is_wanted(device: str) -> None:
    function, tensors, options = case("concat_conv_bn_relu", device)
    tensors["b"].requires_grad_()
    bn = normalisation(8, device, True).requires_grad_(False)
    function(**tensors, **options, bn=ops.BatchNorm.of(bn), backend="triton").sum().backward()
    assert tensors["b"].grad is not None
    assert tensors["a"].grad is None
    assert tensors["weight"].grad is None
    assert bn.weight.grad is None


@pytest.mark.parametrize("name", ["conv_bn_relu", "concat_conv_bn_relu", "upsample"])
def test_half_precision_gradients(device: str, name: str) -> None:
    function, tensors, options = case(name, device, torch.bfloat16)
    exact = run_with_gradients(
        function, {k: v.double() for k, v in tensors.items()}, None, "torch", "contiguous", options
    )[1]
    eager = run_with_gradients(function, tensors, None, "torch", "contiguous", options)[1]
    kernel = run_with_gradients(function, tensors, None, "triton", "contiguous", options)[1]
    for key, gradient in exact.items():
        assert kernel[key].dtype == torch.bfloat16
        assert relative_l2(kernel[key], gradient) <= 2 * relative_l2(eager[key], gradient) + 1e-3, key


def test_statistics_where_the_mean_dwarfs_the_deviation(device: str) -> None:
    x = random(device, 2, 3, 16, 12) * 1e-2 + 100
    bn = nn.BatchNorm2d(4, momentum=1.0).to(device)
    weight = random(device, 4, 3, 1, 1)
    ops.conv_bn_relu(x, weight, bn=ops.BatchNorm.of(bn), backend="triton")
    # The reference uses the stored convolution, so that its own rounding does not count.
    stored = ops.conv_bn_relu(x, weight, relu=False, backend="triton").double()
    torch.testing.assert_close(bn.running_mean.double(), stored.mean((0, 2, 3)), rtol=1e-6, atol=0)
    torch.testing.assert_close(bn.running_var.double(), stored.var((0, 2, 3)), rtol=1e-3, atol=0)


def test_too_few_values_for_batch_statistics(device: str) -> None:
    bn = normalisation(4, device, True)
    with pytest.raises(ValueError, match=r"bn: 1 values a channel in the batch; accepted .*: 2 or more"):
        ops.conv_bn_relu(
            random(device, 1, 3, 1, 1), random(device, 4, 3, 1, 1), bn=ops.BatchNorm.of(bn), backend="triton"
        )


def test_autocast(device: str) -> None:
    function, tensors, options = case("conv_bn_relu", device)
    with torch.autocast(device, torch.bfloat16):
        y = function(**tensors, **options, backend="triton")
        expected = function(**tensors, **options, backend="torch")
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), expected.float(), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("name", ["conv_bn_relu", "concat_conv_bn_relu", "upsample"])
def test_compiles_without_a_break(device: str, name: str) -> None:
    function, tensors, options = case(name, device)
    leaves = [tensor.requires_grad_() for tensor in tensors.values()]

    def step(**tensors: Tensor) -> Tensor:
        return function(**tensors, **options, backend="triton").square().sum()

    expected = torch.autograd.grad(step(**tensors), leaves)
    found = torch.autograd.grad(torch.compile(step, fullgraph=True, backend="aot_eager")(**tensors), leaves)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("name", ["conv_bn_relu", "conv_bn_relu_statistics", "concat_conv_bn_relu", "upsample"])
def test_dispatcher_operator(device: str, name: str) -> None:
    x, weight = random(device, 2, 6, 5, 7), random(device, 8, 6, 3, 3)
    x = x.contiguous(memory_format=torch.channels_last)
    arguments: dict[str, tuple[Any, ...]] = {
        "conv_bn_relu": (x, weight, random(device, 8), random(device, 2, 8, 5, 7), True, 1, 1),
        "conv_bn_relu_statistics": (x, None, weight, None, 2, 1, 1e-5),
        "concat_conv_bn_relu": (x, x, random(device, 8, 12, 3, 3), random(device, 8), True, 1),
        "upsample": (x, random(device, 6, 3, 4, 4), None),
    }
    checks = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(getattr(torch.ops.fastden, name).default, arguments[name], test_utils=checks)


class TestRefusals:
    def test_dtype(self, device: str) -> None:
        x, weight = random(device, 1, 2, 4, 4).double(), random(device, 3, 2, 1, 1).double()
        with pytest.raises(RuntimeError, match=r"'triton' was asked for.*x: \(1, 2, 4, 4\) torch.float64") as caught:
            ops.conv_bn_relu(x, weight, backend="triton")
        assert "triton: dtype float64; accepted: bfloat16, float16, float32" in str(caught.value)
        assert "torch: can run" in str(caught.value)

    def test_mixed_dtypes(self, device: str) -> None:
        x, weight = random(device, 1, 2, 4, 4), random(device, 3, 2, 1, 1).bfloat16()
        assert backends.why_not("conv_bn_relu", "triton", x=x, weight=weight) == [
            "dtypes bfloat16, float32; accepted: one for all inputs"
        ]

    def test_shape(self, device: str) -> None:
        with pytest.raises(RuntimeError, match=r"triton: weight: kernel \(9, 9\); accepted: square, up to 7"):
            ops.conv_bn_relu(random(device, 1, 2, 4, 4), random(device, 3, 2, 9, 9), padding=4, backend="triton")

    @pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
    def test_compiled(self, device: str, compiler: str) -> None:
        @torch.compile(fullgraph=True, backend=compiler)
        def run(x: Tensor, weight: Tensor) -> Tensor:
            return ops.conv_bn_relu(x, weight, padding=weight.shape[2] // 2, backend="triton")

        x, weight = random(device, 1, 2, 4, 4), random(device, 3, 2, 9, 9)
        with pytest.raises(RuntimeError, match=r"'triton' was asked for.*x: \(1, 2, 4, 4\) torch.float32") as caught:
            run(x, weight)
        assert "triton: weight: kernel (9, 9); accepted: square, up to 7" in str(caught.value)
        assert "torch: can run" in str(caught.value)
        with pytest.raises(RuntimeError, match=r"triton: dtype float64; accepted: bfloat16, float16, float32"):
            run(x.double(), weight[:, :, :3, :3].double())
        assert run(x, weight[:, :, :3, :3]).shape == (1, 3, 4, 4)

    def test_compiled_for_any_size(self, device: str) -> None:
        """The check of a size does not bind the compiled function to that size."""
        counter = CompileCounterWithBackend("aot_eager")

        @torch.compile(fullgraph=True, backend=counter, dynamic=True)
        def run(x: Tensor) -> Tensor:
            return ops.stem(x, weight, bias, backend="triton")

        weight, bias = random(device, 4, 5, 3, 7, 7), random(device, 4, 5)
        for size in ((10, 12), (8, 14)):
            x = random(device, 2, 3, *size)
            torch.testing.assert_close(run(x), ops.stem(x, weight, bias, backend="torch"), rtol=1e-4, atol=1e-4)
        assert counter.frame_count == 1
        torch.compiler.reset()
        with pytest.raises(RuntimeError, match=r"triton: x: \(2, 3, 11, 9\); accepted: .* H and W even"):
            run(random(device, 2, 3, 11, 9))

    def test_unknown_backend(self, device: str) -> None:
        with pytest.raises(ValueError, match=r"backend: 'cudnn'; accepted: torch, triton"):
            ops.upsample(random(device, 1, 2, 4, 4), random(device, 2, 2, 4, 4), backend="cudnn")

    def test_device(self, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(backends, "interpreted", lambda: False)
        with pytest.raises(RuntimeError, match=r"triton: device cpu; accepted: cuda"):
            ops.upsample(random("cpu", 1, 2, 4, 4), random("cpu", 2, 2, 4, 4), backend="triton")
