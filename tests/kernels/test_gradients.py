"""Gradients on kernels: every operator, at odd sizes and settings that the network does not have, in every dtype."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import forward_ad

from fastden import algebra, ops
from fastden.kernels.weight_gradient import WeightGradientConfig, stem_weight_gradient, weight_gradient
from tests.helpers import relative_l2
from tests.kernels.images import DTYPES


def gradients(
    function: Callable[..., Tensor], tensors: dict[str, Tensor], backend: str, dtype: torch.dtype, /, *,
    absolute: bool = False, **options: Any,
) -> dict[str, Tensor]:  # fmt: skip
    """Gradients for a fixed random gradient of the result; ``absolute``: of absolute values all through."""
    of = torch.abs if absolute else torch.clone
    leaves = {name: of(tensor.detach()).to(dtype).requires_grad_() for name, tensor in tensors.items()}
    y = function(**leaves, **options, backend=backend)
    grad = of(torch.randn(y.shape, generator=torch.Generator().manual_seed(1))).to(y)
    return dict(zip(leaves, torch.autograd.grad(y, list(leaves.values()), grad), strict=True))


def assert_as_exact_as_eager(
    function: Callable[..., Tensor], tensors: dict[str, Tensor], dtype: torch.dtype, **options: Any
) -> None:
    """L2 error against float64 at most twice eager's, apart from rounding.

    The result is rounded once to its dtype. The products are summed in float32, whose error goes with the sum of their
    absolute values: where they cancel, with more than the result.
    """
    rounded = {name: tensor.to(dtype) for name, tensor in tensors.items()}
    exact = gradients(function, rounded, "torch", torch.float64, **options)
    eager = gradients(function, rounded, "torch", torch.float32 if rounded_on_a_cpu(rounded) else dtype, **options)
    kernel = gradients(function, rounded, "triton", dtype, **options)
    sizes = gradients(function, rounded, "torch", torch.float64, absolute=True, **options)
    for name, value in exact.items():
        assert kernel[name].dtype == dtype
        assert kernel[name].shape == value.shape
        if not value.any():  # every output reads the padding alone
            assert not kernel[name].any(), name
            continue
        rounding = torch.finfo(dtype).eps * value.norm() + torch.finfo(torch.float32).eps * sizes[name].norm()
        error, of_eager = ((found[name].to(dtype).double() - value).norm() for found in (kernel, eager))
        assert error <= 2 * of_eager + rounding, name


def rounded_on_a_cpu(tensors: dict[str, Tensor]) -> bool:
    """oneDNN 3.12's own bfloat16 convolution leaves NaN in outputs that are one column wide."""
    return not next(iter(tensors.values())).is_cuda


def random(device: str, *shape: int) -> Tensor:
    return torch.randn(shape).to(device)


@settings(max_examples=10)
@given(
    size=st.tuples(st.integers(1, 10), st.integers(1, 10)), batch=st.integers(1, 2), channels=st.integers(1, 18),
    outputs=st.integers(1, 18), kernel=st.sampled_from([1, 2, 3, 4, 5]), stride=st.integers(1, 3),
    padding=st.integers(0, 2), dtype=st.sampled_from(DTYPES),
)  # fmt: skip
@example((9, 7), 2, 3, 4, 3, 2, 1, torch.bfloat16)
@example((8, 7), 1, 17, 5, 5, 2, 2, torch.float32)
@example((9, 8), 1, 3, 4, 3, 2, 0, torch.float16)
@example((5, 5), 1, 3, 4, 1, 1, 1, torch.float32)
@example((9, 7), 1, 3, 4, 3, 3, 1, torch.float32)
@example((1, 1), 1, 1, 1, 1, 2, 1, torch.float32)
def test_convolution(
    device: str, size: tuple[int, int], batch: int, channels: int, outputs: int, kernel: int, stride: int, padding: int,
    dtype: torch.dtype,
) -> None:  # fmt: skip
    if min(size) + 2 * padding < kernel:
        return
    tensors = {"x": random(device, batch, channels, *size), "weight": random(device, outputs, channels, kernel, kernel)}
    assert_as_exact_as_eager(ops.conv_bn_relu, tensors, dtype, stride=stride, padding=padding, relu=False)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [(1, 1), (7, 5)])
def test_two_sources_and_upsampling(device: str, size: tuple[int, int], dtype: torch.dtype) -> None:
    sources = {"a": random(device, 2, 6, *size), "b": random(device, 2, 3, *size), "weight": random(device, 5, 9, 3, 3)}
    assert_as_exact_as_eager(ops.concat_conv_bn_relu, sources, dtype, relu=False)
    tensors = {"x": random(device, 2, 6, *size), "weight": random(device, 6, 4, 4, 4), "bias": random(device, 4)}
    assert_as_exact_as_eager(ops.upsample, tensors, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [(8, 8), (10, 14)])
def test_stem(device: str, size: tuple[int, int], dtype: torch.dtype) -> None:
    tensors = {"x": random(device, 2, 4, *size), "weight": random(device, 4, 5, 4, 7, 7), "bias": random(device, 4, 5)}
    assert_as_exact_as_eager(ops.stem, tensors, dtype, relu=False)


@pytest.mark.parametrize("composed", [False, True])
@pytest.mark.parametrize("size", [(8, 8), (10, 14)])
def test_head(device: str, size: tuple[int, int], composed: bool) -> None:
    """The taps of composed weights that are always zero get no gradient: composing would drop it anyway."""
    shapes = (6, 4, 5, 5), (6,), (5, 7, 4, 4), (7,), (3, 13, 3, 3), (3,)
    weights = algebra.compose_head(*(torch.randn(shape) for shape in shapes))
    tensors = {
        "features": random(device, 2, 5, *((length - 4) // 2 for length in size)),
        "x": random(device, 2, 4, *size),
        **{name: getattr(weights, name).to(device) for name in ("weight", "image_weight", "bias")},
    }
    expected = gradients(ops.head, tensors, "torch", torch.float32, composed=composed)
    found = gradients(ops.head, tensors, "triton", torch.float32, composed=composed)
    if composed:
        used = tensors["weight"] != 0
        assert used.sum() == 9 * used.numel() // 16
        assert not found["weight"][~used].any()
        expected["weight"] *= used
    for name, value in expected.items():
        assert relative_l2(found[name], value) < 1e-5, name


#: None is the default, by kinds of convolutions.
CHOICES = (None, "aten", "input=aten", "weight=aten")


def choose(monkeypatch: pytest.MonkeyPatch, backward: str | None) -> None:
    if backward is None:
        monkeypatch.delenv("FASTDEN_BACKWARD")
    else:
        monkeypatch.setenv("FASTDEN_BACKWARD", backward)


def cases(device: str, batch: int) -> dict[str, tuple[Callable[..., Tensor], dict[str, Tensor], dict[str, Any]]]:
    """Each kind of convolution; the images are contiguous, as the network's input is."""
    conv = {"x": random(device, batch, 6, 9, 7), "weight": random(device, 8, 6, 3, 3)}
    two = {
        "a": random(device, batch, 6, 5, 7),
        "b": random(device, batch, 3, 5, 7),
        "weight": random(device, 8, 9, 3, 3),
    }
    upsample = {"x": random(device, batch, 6, 5, 7), "weight": random(device, 6, 4, 4, 4)}
    image = random(device, batch, 4, 10, 14)
    stem = {"x": image, "weight": random(device, 4, 5, 4, 7, 7), "bias": random(device, 4, 5)}
    shapes = (6, 4, 5, 5), (6,), (5, 7, 4, 4), (7,), (3, 13, 3, 3), (3,)
    composed = algebra.compose_head(*(torch.randn(shape) for shape in shapes))
    head = {
        "features": random(device, batch, 5, 3, 5),
        "x": image,
        **{name: getattr(composed, name).to(device) for name in ("weight", "image_weight", "bias")},
    }
    return {
        "convolution": (ops.conv_bn_relu, conv, {"padding": 1}),
        "strided convolution": (ops.conv_bn_relu, conv, {"padding": 1, "stride": 2}),
        "two sources": (ops.concat_conv_bn_relu, two, {}),
        "upsample": (ops.upsample, upsample, {}),
        "stem": (ops.stem, stem, {}),
        "head": (ops.head, head, {"composed": True}),
        "head that is not composed": (ops.head, head, {}),
    }


@pytest.mark.parametrize("backward", CHOICES)
@pytest.mark.parametrize("name", cases("cpu", 0))
def test_every_choice(device: str, monkeypatch: pytest.MonkeyPatch, name: str, backward: str | None) -> None:
    function, tensors, options = cases(device, 2)[name]
    expected = gradients(function, tensors, "torch", torch.float32, **options)
    choose(monkeypatch, backward)
    found = gradients(function, tensors, "triton", torch.float32, **options)
    if name == "head":  # the others get no gradient, or one that composing drops
        used = tensors["weight"] != 0
        expected["weight"], found["weight"] = expected["weight"] * used, found["weight"] * used
    for key, value in expected.items():
        assert relative_l2(found[key], value) < 1e-5, key


@pytest.mark.parametrize("backward", [*CHOICES, "kernels"])
@pytest.mark.parametrize("name", cases("cpu", 0))
def test_every_choice_of_an_empty_batch(
    device: str, monkeypatch: pytest.MonkeyPatch, name: str, backward: str | None
) -> None:
    function, tensors, options = cases(device, 0)[name]
    choose(monkeypatch, backward)
    for key, value in gradients(function, tensors, "triton", torch.float32, **options).items():
        assert value.shape == tensors[key].shape
        assert not value.any(), key


# One pixel a step and one step a loop give the largest number of runs, each of several loops.
NARROW = WeightGradientConfig(block_m=16, block_n=16, block_k=16, loop=2, warps=4, stages=2)


def test_runs_add_up_to_the_same_bits(device: str) -> None:
    a, b, grad = random(device, 2, 32, 11, 13), random(device, 2, 3, 11, 13), random(device, 2, 20, 11, 13)
    first = weight_gradient(grad, a, b, 3, 1, 1, NARROW)
    weight = random(device, 20, 35, 3, 3).requires_grad_()
    y = torch.nn.functional.conv2d(torch.cat([a, b], 1), weight, padding=1)
    (expected,) = torch.autograd.grad(y, weight, grad)
    assert relative_l2(first, expected) < 1e-5
    assert torch.equal(weight_gradient(grad, a, b, 3, 1, 1, NARROW), first)


def test_an_empty_batch_has_a_gradient_of_zeros(device: str) -> None:
    empty = random(device, 0, 3, 5, 4)
    assert not weight_gradient(random(device, 0, 2, 5, 4), empty, None, 3, 1, 1).any()
    assert not stem_weight_gradient(random(device, 0, 2, 3, 4), random(device, 0, 3, 10, 12)).any()


@pytest.mark.parametrize("name", ["weight_gradient", "weight_gradient_stem", "upsample"])
def test_dispatcher_operator(device: str, name: str) -> None:
    arguments: dict[str, tuple[Any, ...]] = {
        "weight_gradient": (random(device, 2, 4, 3, 3), random(device, 2, 5, 5, 6), None, 3, 2, 1),
        "weight_gradient_stem": (random(device, 1, 4, 3, 4), random(device, 1, 3, 10, 12)),
        "upsample": (random(device, 1, 3, 2, 4), random(device, 3, 2, 8, 8), None),
    }
    checks = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(getattr(torch.ops.fastden, name).default, arguments[name], test_utils=checks)


@pytest.mark.parametrize("name", ["conv_bn_relu", "concat_conv_bn_relu", "bottleneck", "upsample", "stem", "head"])
@pytest.mark.parametrize("mode", ["transform", "dual"])
def test_no_derivative_in_forward_mode_is_lost(name: str, mode: str, device: str) -> None:
    """Kernels have none: an error, not a zero."""

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device)

    x, weight = random(1, 8, 6, 6), random(8, 8, 3, 3)
    calls: dict[str, Callable[[Tensor], Tensor]] = {
        "conv_bn_relu": lambda x: ops.conv_bn_relu(x, weight, padding=1, backend="triton"),
        "concat_conv_bn_relu": lambda x: ops.concat_conv_bn_relu(x, x, random(8, 16, 3, 3), backend="triton"),
        "bottleneck": lambda x: ops.bottleneck(
            x, random(4, 8, 1, 1), random(4, 4, 3, 3), random(8, 4, 1, 1), backend="triton"
        ),
        "upsample": lambda x: ops.upsample(x, random(8, 4, 4, 4), backend="triton"),
        "stem": lambda x: ops.stem(x, random(4, 4, 8, 7, 7), random(4, 4), backend="triton"),
        "head": lambda x: ops.head(
            x, random(1, 4, 16, 16), random(12, 8, 4, 4), random(3, 4, 7, 7), random(3), backend="triton"
        ),
    }
    if name == "stem":
        x = random(1, 8, 16, 16)
    assert torch.isfinite(calls[name](x)).all()

    def derived() -> None:
        if mode == "transform":
            torch.func.jvp(calls[name], (x,), (torch.ones_like(x),))
        else:
            with forward_ad.dual_level():
                calls[name](forward_ad.make_dual(x, torch.ones_like(x)))

    reason = "a transform of torch.func or forward-mode differentiation is active; accepted: backend torch"
    with pytest.raises(ops.BackendError, match=rf"triton: {reason}\n"):
        derived()


@pytest.mark.parametrize("compiled", [False, True])
def test_batching(device: str, compiled: bool) -> None:
    """Refused by name; the compiler batches operators itself."""
    x, weight = torch.randn(2, 3, 6, 6, device=device), torch.randn(4, 3, 3, 3, device=device)
    batched = torch.func.vmap(lambda x: ops.conv_bn_relu(x[None], weight, backend="triton")[0])
    if compiled:
        found = torch.compile(batched, fullgraph=True, backend="eager")(x)
        torch.testing.assert_close(found, ops.conv_bn_relu(x, weight, backend="torch"), rtol=1e-4, atol=1e-4)
        return
    with pytest.raises(ops.BackendError, match=r"triton: a transform of torch\.func .* accepted: backend torch"):
        batched(x)


def test_tensors_without_a_tangent_run_as_ever(device: str) -> None:
    x, weight = torch.randn(1, 3, 6, 6, device=device), torch.randn(4, 3, 3, 3, device=device)
    expected = ops.conv_bn_relu(x, weight, backend="triton")
    with forward_ad.dual_level():
        assert torch.equal(ops.conv_bn_relu(x, weight, backend="triton"), expected)
