"""The inference form: as exact as the plain network, on all its paths."""

from __future__ import annotations

import contextlib
import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.export import Dim

from fastden.network import onednn
from fastden.network.devices import parse_device
from fastden.network.fused import FusedDenoiser, fuse
from fastden.network.model import Denoiser
from fastden.ops.backends import use_backend
from fastden.ops.post_operations import why_not
from tests.helpers import (
    border_rms,
    image_without_kinks,
    level,
    max_error,
    poison_freed_memory,
    random_network,
    relative_l2,
)

ONEDNN = not why_not(torch.device("cpu"), torch.float32)
ONEDNN_BF16 = not why_not(torch.device("cpu"), torch.bfloat16)


@contextlib.contextmanager
def path(name: str):
    """``onednn``, or ``operators``: the path of devices and settings without oneDNN."""
    if name == "onednn" and not ONEDNN:
        pytest.skip("this PyTorch has no oneDNN")
    with torch.backends.mkldnn.flags(enabled=name == "onednn"):
        yield


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16] if ONEDNN_BF16 else [torch.float32], ids=str)
@pytest.mark.parametrize("name", ["stem_weight", "stem_bias", "res1_reduce_weight", "up2_weight", "res3_expand_bias"])
def test_nan_in_a_weight_is_not_hidden(name: str, dtype: torch.dtype) -> None:
    """A ReLU that is a maximum with 0 would make zeros of it, and the result would look like a picture."""
    network = fuse(random_network().eval(), dtype)
    x = torch.rand(1, 3, 20, 24)
    with path("onednn"), torch.no_grad():
        assert not network(x, 0.1).isnan().any()
        weight = getattr(network, name)
        weight[(0,) * weight.dim()] = torch.nan
        assert network(x, 0.1).isnan()[:, :, 4:-4, 4:-4].all()


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small tiles, so that small images have seams."""
    monkeypatch.setattr(onednn, "TILE_ROWS", 7)
    monkeypatch.setattr(onednn, "TILE_COLUMNS", 10)
    monkeypatch.setattr(onednn, "FRONT_ROWS", 5)
    monkeypatch.setattr(onednn, "BATCH_PIXELS", 3000)


@pytest.mark.parametrize("way", ["onednn", "operators"])
@pytest.mark.parametrize("noise_level_input", [False, True])
@pytest.mark.parametrize("size", [(1, 1), (1, 6), (2, 3), (7, 5), (13, 30), (33, 46), (48, 64)], ids=str)
def test_float32_error(size: tuple[int, int], noise_level_input: bool, way: str) -> None:
    """At most twice the plain network's own error against float64, overall and on every border row and column.

    The plain network's error is that of the memory layout in which it errs more: oneDNN sums in another order in each.
    With AVX-512 the channels-last plain network errs 1.8 times as much as the contiguous one (13 x 30 pixels), with
    AVX2 both err alike; the fused form, which is channels-last inside, errs 0.8 times as much as the former on both.
    """
    model = random_network(noise_level_input, seed=sum(size))
    x = torch.rand(max(2, 512 // (size[0] * size[1])), 3, *size)
    plain_errors = []
    with torch.no_grad(), path(way):
        exact = copy.deepcopy(model).double()(x.double(), level(model))
        for layout in (torch.contiguous_format, torch.channels_last):
            plain = copy.deepcopy(model).to(memory_format=layout)
            plain_errors.append(plain(x.contiguous(memory_format=layout), level(model)).double() - exact)
        error = fuse(model)(x, level(model)).double() - exact
    own = [border_rms(plain_error) for plain_error in plain_errors]
    floor = torch.finfo(torch.float32).eps * exact.abs().max().item()
    assert error.abs().max() <= 2 * max(*(plain_error.abs().max().item() for plain_error in plain_errors), floor)
    for name, rms in border_rms(error).items():
        assert rms <= 2 * max(own[0][name], own[1][name], floor), name


@pytest.mark.parametrize("noise_level_input", [False, True])
@pytest.mark.parametrize("size", [(1, 1), (5, 9), (31, 34)], ids=str)
def test_float64_is_the_same_function(size: tuple[int, int], noise_level_input: bool) -> None:
    model = random_network(noise_level_input, dtype=torch.float64)
    x = torch.rand(2, 3, *size, dtype=torch.float64)
    with torch.no_grad():
        assert max_error(fuse(model)(x, level(model)), model(x, level(model))) < 1e-12


@pytest.mark.parametrize("way", ["onednn", "operators"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("size", [(1, 1), (14, 9), (30, 43)], ids=str)
def test_half_precision_error(size: tuple[int, int], dtype: torch.dtype, way: str) -> None:
    """The error is at most twice the plain network's in the same dtype."""
    model = random_network()
    x = torch.rand(max(2, 64 // (size[0] * size[1])), 3, *size)
    with torch.no_grad(), path(way):
        exact = copy.deepcopy(model).double()(x.double(), 0.1)
        plain = copy.deepcopy(model).to(dtype)(x.to(dtype), 0.1)
        fused = fuse(model, dtype=dtype)(x, 0.1)
    assert fused.dtype == torch.float32
    assert relative_l2(fused, exact) <= 2 * relative_l2(plain, exact)
    assert max_error(fused, exact) <= 2 * max_error(plain, exact)


@settings(max_examples=20)
@given(
    size=st.tuples(st.integers(1, 60), st.integers(1, 60)),
    batch=st.integers(1, 3),
    blind=st.booleans(),
    channels=st.sampled_from([1, 3]),
)
@example(size=(1, 1), batch=1, blind=True, channels=3)
@example(size=(53, 59), batch=2, blind=False, channels=3)
@example(size=(58, 2), batch=1, blind=False, channels=1)
def test_any_size_with_seams(size: tuple[int, int], batch: int, blind: bool, channels: int) -> None:
    """Sizes, batches and channel counts on the oneDNN path, cut into several tiles and strips."""
    model = random_network(not blind, channels)
    x = torch.rand(batch, channels, *size)
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        for name, value in (("TILE_ROWS", 7), ("TILE_COLUMNS", 10), ("FRONT_ROWS", 5), ("BATCH_PIXELS", 3000)):
            patch.setattr(onednn, name, value)
        y = fuse(model)(x, level(model))
    assert y.shape == x.shape
    assert max_error(y, copy.deepcopy(model).double()(x.double(), level(model))) < 5e-6


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("size", [(30, 1), (30, 2), (2, 30), (41, 62)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("noise_level_input", [False, True])
def test_reads_only_what_was_written(size: tuple[int, int], dtype: torch.dtype, noise_level_input: bool) -> None:
    """oneDNN 3.12's bf16 convolution picks up freed memory where an output is one column wide; none may be."""
    model = random_network(noise_level_input)
    fused = fuse(model, dtype=dtype)
    x = torch.rand(1, 3, *size)
    with torch.no_grad():
        exact = model(x, level(model))
        for _ in range(4):
            poison_freed_memory()
            assert max_error(fused(x, level(model)), exact) < (0.1 if dtype == torch.bfloat16 else 1e-5)


def test_a_larger_image_in_tiles_of_the_usual_size() -> None:
    model = random_network()
    x = torch.rand(1, 3, 2 * onednn.TILE_ROWS + 9, 2 * onednn.TILE_COLUMNS + 14)
    with torch.no_grad():
        assert max_error(fuse(model)(x, 0.1), model(x, 0.1)) < 5e-6


def test_noise_level_in_every_form() -> None:
    fused = fuse(random_network())
    x = torch.rand(2, 3, 9, 12)
    y = fused(x, 0.25)
    for sigma in (torch.tensor(0.25), torch.tensor([0.25, 0.25]), torch.full((2, 1, 9, 12), 0.25)):
        assert torch.equal(fused(x, sigma), y)
    assert max_error(fused(x, 0.1), y) > 1e-4


@pytest.mark.parametrize("x_dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_input_of_another_dtype(x_dtype: torch.dtype) -> None:
    model = random_network()
    x = torch.rand(1, 3, 12, 17).to(x_dtype)
    with torch.no_grad():
        y = fuse(model)(x, 0.1)
        assert y.dtype == x_dtype
        assert max_error(y, model(x.float(), 0.1)) < 4 * torch.finfo(x_dtype).eps + 1e-5


def test_memory_layouts_of_the_input() -> None:
    fused = fuse(random_network())
    x = torch.rand(2, 3, 14, 10)
    plane = torch.rand(2, 1, 14, 10)
    wide = torch.rand(2, 5, 28, 10)
    for value in (
        x.contiguous(memory_format=torch.channels_last),
        x.transpose(2, 3).contiguous().transpose(2, 3),
        plane.expand(2, 3, 14, 10),
        wide[:, 1:4, ::2],
    ):
        before = value.clone()
        assert max_error(fused(value, 0.1), fused(value.clone(memory_format=torch.contiguous_format), 0.1)) < 1e-6
        assert torch.equal(value, before)


def test_empty_batch() -> None:
    assert fuse(random_network())(torch.rand(0, 3, 8, 8), 0.1).shape == (0, 3, 8, 8)


def test_shares_nothing_with_the_network() -> None:
    model = random_network().train()
    state = copy.deepcopy(model.state_dict())
    fused = fuse(model)
    x = torch.rand(1, 3, 8, 11)
    before = fused(x, 0.1)
    assert model.training
    assert not FusedDenoiser(model).training
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    with torch.no_grad():
        for value in model.state_dict().values():
            value.zero_()
    assert torch.equal(fused(x, 0.1), before)
    assert not list(fused.parameters())


def reloaded(fused: FusedDenoiser, other: FusedDenoiser) -> FusedDenoiser:
    fused.load_state_dict(other.state_dict())
    return fused


def overwritten(fused: FusedDenoiser, other: FusedDenoiser) -> FusedDenoiser:
    for one, value in zip(fused.buffers(), other.buffers(), strict=True):
        one.copy_(value)
    return fused


@pytest.mark.parametrize("change", [reloaded, overwritten])
def test_packed_weights_follow_the_buffers(change: Callable[[FusedDenoiser, FusedDenoiser], FusedDenoiser]) -> None:
    fused, other = fuse(random_network(seed=1)), fuse(random_network(seed=2))
    x = torch.rand(1, 3, 9, 9)
    expected = other(x, 0.1)
    assert max_error(fused(x, 0.1), expected) > 1e-2
    assert torch.equal(change(fused, other)(x, 0.1), expected)


def test_dtype_by_name() -> None:
    assert fuse(random_network(), "bfloat16").dtype == fuse(random_network(), torch.bfloat16).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("device", "message"),
    [
        ("gpu", r"device: 'gpu'; accepted: cpu, cuda, .*or one of several such as cuda:1"),
        ("cuda:99", r"device: 'cuda:99', but PyTorch finds no CUDA device|device: 'cuda:99'; accepted: cuda:0 to"),
    ],
)
def test_devices_that_do_not_exist(device: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fuse(random_network(), device=device)


def test_without_values() -> None:
    """A network on PyTorch's meta device has shapes alone."""
    model = random_network()
    assert fuse(model, device="meta").device.type == "meta"
    with pytest.raises(ValueError, match="model: on meta, without weights; accepted: one with weights"):
        fuse(Denoiser().to("meta"))


def test_casting_afterwards() -> None:
    model = random_network()
    x = torch.rand(1, 3, 16, 16)
    fused = fuse(model, dtype=torch.float64)
    exact = fused(x.double(), 0.1)
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 0.1), (torch.float64, 0.1)):
        fused = fused.to(dtype)
        assert fused.dtype == dtype
        assert max_error(fused(x, 0.1), exact) < tolerance


def test_copies() -> None:
    fused = fuse(random_network())
    x = torch.rand(1, 3, 9, 10)
    expected = fused(x, 0.1)
    for other in (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))):
        assert (other.dtype, other.noise_level_input, other.image_channels) == (torch.float32, True, 3)
        assert torch.equal(other(x, 0.1), expected)


def test_inference_mode() -> None:
    x = torch.rand(1, 3, 9, 10)
    expected = fuse(random_network())(x, 0.1)
    with torch.inference_mode():
        fused = fuse(random_network())
        assert torch.equal(fused(x, 0.1), expected)
    assert torch.equal(fused(x, 0.1), expected)


def test_gradient_of_the_input() -> None:
    """A fused network may be part of a loss: its gradient is the plain network's."""
    model = random_network(dtype=torch.float64)
    x = image_without_kinks(model, 1, 3, 9, 14).double()
    gradients = []
    for network in (model, fuse(model), fuse(model, dtype=torch.float32)):
        leaf = x.clone().requires_grad_()
        network(leaf, 0.1).square().sum().backward()
        assert leaf.grad is not None
        gradients.append(leaf.grad)
    assert max_error(gradients[1], gradients[0]) < 1e-10
    assert max_error(gradients[2], gradients[0]) < 1e-4


def test_gradient_of_the_noise_level() -> None:
    model = random_network(dtype=torch.float32)
    x = image_without_kinks(model, 1, 3, 9, 9)
    gradients = []
    for network in (model, fuse(model)):
        sigma = torch.tensor([0.1], requires_grad=True)
        network(x, sigma).square().sum().backward()
        gradients.append(sigma.grad)
    assert max_error(gradients[1], gradients[0]) < 1e-3


def test_compile_without_graph_breaks() -> None:
    torch._dynamo.reset()
    fused = fuse(random_network())
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(fused, fullgraph=True, backend=counter)
    with torch.no_grad():
        for size in ((17, 21), (40, 35), (33, 46)):
            x = torch.rand(2, 3, *size)
            assert max_error(compiled(x, 0.1), fused(x, 0.1)) < 1e-5
    assert counter.frame_count <= 3


def test_export_for_any_size() -> None:
    fused = fuse(random_network())
    shapes = {"x": {0: Dim.AUTO, 2: Dim.AUTO, 3: Dim.AUTO}, "sigma": None}
    program = torch.export.export(fused, (torch.rand(2, 3, 17, 21), torch.tensor(0.1)), dynamic_shapes=shapes)
    exported = program.module()
    with torch.no_grad():
        for size in ((17, 21), (18, 22), (18, 21), (33, 40), (7, 9)):
            x = torch.rand(3, 3, *size)
            assert max_error(exported(x, torch.tensor(0.2)), fused(x, 0.2)) < 1e-5


@pytest.mark.parametrize(
    ("model", "dtype", "kind", "message"),
    [
        (nn.Conv2d(3, 3, 1), None, TypeError, r"model: Conv2d; accepted: fastden\.Denoiser"),
        (Denoiser(), torch.int8, ValueError, r"dtype: torch\.int8; accepted: float32, bfloat16"),
        (Denoiser(), "int4", ValueError, "dtype: 'int4'; accepted: float32, bfloat16, float16, float64"),
    ],
)
def test_wrong_arguments(model: nn.Module, dtype: object, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        fuse(model, dtype=dtype)


def test_wrong_input() -> None:
    fused, blind = fuse(Denoiser()), fuse(Denoiser(noise_level_input=False))
    x = torch.zeros(1, 3, 4, 4)
    for call, kind, message in (
        (lambda: fused(x), ValueError, r"sigma: None.*accepted"),
        (lambda: blind(x, 0.1), ValueError, r"sigma: given to a blind network"),
        (lambda: fused(x, 25), ValueError, r"sigma: 25; accepted: 0 to 1"),
        (lambda: fused(x[:, :2], 0.1), ValueError, r"x: shape \(1, 2, 4, 4\); accepted"),
        (lambda: fused(x.byte(), 0.1), TypeError, r"x: dtype torch\.uint8; accepted"),
        (lambda: fused(x.to_sparse(), 0.1), TypeError, r"x: layout torch\.sparse_coo; accepted: torch\.strided"),
        (lambda: fused(x.to("meta"), 0.1), ValueError, r"x: on meta; accepted: cpu, where the network is"),
    ):
        with pytest.raises(kind, match=message):
            call()


def test_reasons_against_onednn() -> None:
    assert why_not(torch.device("cuda"), torch.float32)[0].startswith("device: cuda; accepted: cpu")
    assert why_not(torch.device("cpu"), torch.float64)[0].startswith("dtype: torch.float64; accepted: torch.float32")
    with torch.backends.mkldnn.flags(enabled=False):
        assert "torch.backends.mkldnn.enabled is False" in why_not(torch.device("cpu"), torch.float32)


@pytest.mark.parametrize("amx", [False, True])
@pytest.mark.parametrize("avx512", [False, True])
def test_either_kind_of_bf16_units_will_do(amx: bool, avx512: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512)
    assert onednn._has_bf16_units() == (amx or avx512)


def test_native_bf16_implies_that_onednn_can() -> None:
    assert not onednn.native_bf16() or ONEDNN_BF16


def test_derivatives_of_every_order() -> None:
    """Score matching and the trace of the Jacobian need them; the environment's backend does not matter."""
    fused = fuse(random_network(), torch.float64, differentiable=True)
    x = torch.rand(1, 3, 3, 2, dtype=torch.float64, requires_grad=True)
    with use_backend("triton"):  # this backend has no float64, and first derivatives alone
        assert torch.autograd.gradcheck(fused, (x, 0.1), fast_mode=True)
        assert torch.autograd.gradgradcheck(fused, (x, 0.1), fast_mode=True)
    single, plain = fuse(random_network(), differentiable=True), fuse(random_network())
    x = torch.rand(1, 3, 5, 5)
    with torch.no_grad():
        assert max_error(single(x, 0.1), plain(x, 0.1)) < 1e-5
    assert "differentiable=True" in repr(single)
    assert copy.deepcopy(single).differentiable


def test_a_cuda_device_beyond_the_last(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ValueError, match=r"^device: 'cuda:1'; accepted: cuda:0 to cuda:0$"):
        parse_device("cuda:1")
    with pytest.raises(ValueError, match=r"^device: 'cuda:1'; accepted: cuda:0 to cuda:0$"):
        fuse(Denoiser.from_pretrained("color"), "float16", "cuda:1", quality="fast")


def test_differentiable_is_true_or_false() -> None:
    with pytest.raises(ValueError, match="differentiable: 'no'; accepted: True or False"):
        fuse(random_network(), differentiable="no")  # type: ignore[arg-type]


def test_buffers_cast_in_inference_mode_have_gradients() -> None:
    fused, x = fuse(random_network()), torch.rand(1, 3, 8, 8, requires_grad=True)
    with torch.inference_mode():
        fused.to(torch.bfloat16).float()
    assert not any(buffer.is_inference() for buffer in fused.buffers())
    fused(x, 0.1).sum().backward()
    assert x.grad is not None
