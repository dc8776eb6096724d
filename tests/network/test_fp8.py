"""``quality="fast"`` on a GPU, without one: its dtype, and what refuses it. With one: tests/cuda/test_fp8.py."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

import fastden
from fastden import ops
from fastden.cuda import extension
from fastden.network import fp8, int8, loading
from fastden.network.model import Denoiser
from fastden.ops import backends
from tests.helpers import random_network

CUDA, CPU = torch.device("cuda"), torch.device("cpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_cuda_device() -> None:
    model = Denoiser.from_pretrained("color")
    with pytest.raises(ValueError, match=r"^device: 'cuda', but PyTorch finds no CUDA device .*; accepted: cpu$"):
        fastden.fuse(model, torch.bfloat16, CUDA, quality="fast")


def test_reasons_of_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are those of the operator, for tensors of conv3's channels in the network's dtype."""
    asked: list[Any] = []

    def why_not(operator: str, backend: str, **tensors: torch.Tensor) -> list[str]:
        asked.append((operator, backend, {x.dtype for x in tensors.values()}, [x.shape[1] for x in tensors.values()]))
        return ["compute capability 8.6; accepted: 9.0"]

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(backends, "why_not", why_not)
    assert fp8.why_not(torch.float16, torch.device("meta")) == ["compute capability 8.6; accepted: 9.0"]
    assert asked == [("concat_conv_fp8", "cuda", {torch.float16}, [128, 32, 160])]


def test_needs_ranges(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(fp8, "why_not", lambda dtype, device: [])
    with pytest.raises(ValueError, match=r"does not know the ranges .*; accepted: a bundled model, or one behind"):
        fastden.fuse(random_network(), torch.bfloat16, CUDA, quality="fast")


def test_ranges_are_conv3s() -> None:
    """In the order of its channels, and no smaller than what its inputs are."""
    model = random_network()
    x = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    fastden.calibrate(model, [x])
    assert model.int8_ranges is not None
    ranges, _ = model.int8_ranges
    found = fp8.conv3_ranges(ranges)
    assert torch.equal(found, torch.cat([ranges["res1"], ranges["up2"]]))
    assert found.shape == (160,)


def test_auto_is_bfloat16_on_a_gpu() -> None:
    assert loading._may_reduce(CUDA, eight_bit=False, fast=True)
    assert not loading._may_reduce(CPU, eight_bit=True, fast=True)
    for device in (CUDA, CPU):
        assert [loading._may_reduce(device, eight_bit, fast=False) for eight_bit in (True, False)] == [True, False]


def test_operators_on_a_cpu_are_not_in_fp8(monkeypatch: pytest.MonkeyPatch) -> None:
    """There, quality="fast" is oneDNN's form in integers; what it cannot run has more bits."""
    monkeypatch.setattr(int8, "why_not", list)
    model = Denoiser.from_pretrained("color")
    x = torch.rand(1, 3, 12, 16, requires_grad=True)
    fast, normal = (fastden.fuse(model, quality=quality) for quality in ("fast", "normal"))
    assert torch.equal(fast(x, 0.1), normal(x, 0.1))
    assert "conv3_ranges" not in fast.state_dict()
    fast.load_state_dict(normal.state_dict())


@pytest.fixture
def fast(monkeypatch: pytest.MonkeyPatch) -> fastden.FusedDenoiser:
    """A network whose conv3 is called for the cuda backend, and computes the reference of fp8."""
    monkeypatch.setattr(int8, "why_not", list)
    concat_conv_fp8 = ops.concat_conv_fp8

    def on_torch(*tensors: Tensor, backend: str, **options: Any) -> Tensor:
        assert backend == "cuda"
        return concat_conv_fp8(*tensors, backend="torch", **options)

    monkeypatch.setattr(ops, "concat_conv_fp8", on_torch)
    return fastden.fuse(Denoiser.from_pretrained("color"), torch.bfloat16, quality="fast")


def conv3(network: fastden.FusedDenoiser) -> Tensor:
    skip, up = (torch.ones(1, channels, 2, 3, dtype=torch.bfloat16) for channels in (128, 32))
    with torch.no_grad():
        return network._conv3(skip, up, "cuda")


def test_weights_that_changed_are_refused(fast: fastden.FusedDenoiser, monkeypatch: pytest.MonkeyPatch) -> None:
    """However they were changed; the weights are read only behind a change."""
    read: list[int] = []
    assert fast._calibrated is not None
    original = fast._calibrated.check
    monkeypatch.setattr(fast._calibrated, "check", lambda weights: read.append(1) or original(weights))
    for _ in range(3):
        conv3(fast)
    assert len(read) == 1
    fast.res1_conv_weight = fast.res1_conv_weight.clone()
    conv3(fast)
    assert len(read) == 2
    fast.res1_conv_weight.mul_(2)
    for _ in range(2):
        with pytest.raises(ValueError, match="'fast', but res1_conv_weight has changed since the ranges of act"):
            conv3(fast)
    fast.res1_conv_weight.div_(2)
    conv3(fast)
    changed = fast.res1_conv_weight * 2
    address, version = fast.res1_conv_weight.data_ptr(), fast.res1_conv_weight._version
    monkeypatch.setattr(type(changed), "data_ptr", lambda tensor: address)  # as an allocator gives memory again
    while changed._version < version:
        changed.add_(0)
    original_weight, fast.res1_conv_weight = fast.res1_conv_weight, changed
    with pytest.raises(ValueError, match="res1_conv_weight has changed"):
        conv3(fast)
    fast.res1_conv_weight = original_weight
    monkeypatch.undo()
    other = copy.deepcopy(fast)
    other.stem_bias = other.stem_bias + 1
    with pytest.raises(ValueError, match="'fast', but stem_bias has changed since the ranges"):
        conv3(other)
    with torch.inference_mode():
        fast.up2_weight = fast.up2_weight * 2  # such a tensor has no version
        with pytest.raises(ValueError, match="'fast', but up2_weight has changed"):
            conv3(fast)


@pytest.mark.parametrize("runs", [True, False])
def test_a_gpu_without_fp8_computes_in_more_bits(
    fast: fastden.FusedDenoiser, runs: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A network that was made for a CPU may be moved there."""

    class OnGpu(Tensor):
        is_cuda = True

    asked: list[str] = []
    monkeypatch.setattr(fp8, "runs", lambda dtype, device: runs)
    for name in ("concat_conv_fp8", "concat_conv_bn_relu"):
        monkeypatch.setattr(ops, name, lambda *given, name=name, **options: asked.append(name))
    skip, up = (torch.ones(1, channels, 2, 3, dtype=torch.bfloat16).as_subclass(OnGpu) for channels in (128, 32))
    with torch.no_grad():
        fast._conv3(skip, up, None)
    assert asked == ["concat_conv_fp8" if runs else "concat_conv_bn_relu"]
    with torch.no_grad():
        fast._conv3(skip, up, "cuda")  # whoever asks for it is told why it cannot run
    assert asked[1:] == ["concat_conv_fp8"]


def test_a_device_is_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """And again behind a build, and once the extension is loaded."""
    asked: list[str] = []
    monkeypatch.setattr(fp8, "why_not", lambda dtype, device: asked.append(device) or ["no"])
    fp8._runs.cache_clear()
    for name, value in (("_config", None), ("_builds", extension.builds() + 1), ("_config", {})):
        monkeypatch.setattr(extension, name, value)
        for _ in range(3):
            assert not fp8.runs(torch.bfloat16, CUDA)
    assert asked == [CUDA, CUDA, CUDA]
    fp8._runs.cache_clear()
