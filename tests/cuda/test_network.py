"""The whole network on the CUDA backend, in each of its forms, against float64."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import fastden
from fastden import ops
from fastden.network.model import Denoiser
from fastden.ops import backends
from fastden.ops.proven import PROVEN
from tests.cuda.compare import DTYPES
from tests.helpers import copies_in_operators, noted_choices, random_network, relative_l2

Network = Callable[..., Tensor]


def forms(model: Denoiser, dtype: torch.dtype) -> dict[str, Network]:
    composed = copy.deepcopy(model)
    composed.composed = True
    return {
        "fused": fastden.fuse(model, dtype),
        "plain": copy.deepcopy(model).to(dtype),
        "composed": composed.to(dtype),
    }


def run(network: Network, x: Tensor, backend: str) -> Tensor:
    with torch.no_grad(), ops.use_backend(backend):
        return network(x, 0.1)


@pytest.mark.parametrize("form", ["fused", "plain", "composed"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_network(device: str, dtype: torch.dtype, form: str) -> None:
    model = random_network().to(device)
    x = torch.rand(2, 3, 13, 18, device=device)
    exact = run(copy.deepcopy(model).double(), x.double(), "torch")
    network = forms(model, dtype)[form]
    source = x if form == "fused" else x.to(dtype)
    y = run(network, source, "cuda")
    assert y.dtype == source.dtype
    assert relative_l2(y, exact) <= 2 * relative_l2(run(network, source, "torch"), exact)


@pytest.mark.parametrize("blind", [False, True])
def test_a_fused_network_packs_nothing(device: str, blind: bool) -> None:
    """Weights are read where they lie, so that a captured graph's replays read what the buffers hold then."""
    fused = fastden.fuse(random_network(noise_level_input=not blind).to(device), torch.bfloat16)
    x = torch.rand(1, 3, 8, 8, device=device, dtype=torch.bfloat16)
    assert copies_in_operators("cuda", lambda: fused(x, None if blind else 0.1)) == []
    fused.up2_weight = fused.up2_weight.contiguous()
    assert copies_in_operators("cuda", lambda: fused(x, None if blind else 0.1)) != []


def test_blind_and_gray(device: str) -> None:
    model = random_network(noise_level_input=False, image_channels=1).to(device)
    x = torch.rand(1, 1, 9, 8, device=device)
    fused = fastden.fuse(model, torch.float16)
    with torch.no_grad(), ops.use_backend("cuda"):
        y = fused(x)
    with torch.no_grad():
        assert relative_l2(y, model.double()(x.double())) < 5e-3


def test_compiles_without_a_break(device: str) -> None:
    fused = fastden.fuse(random_network().to(device), torch.float16)
    x = torch.rand(1, 3, 13, 18, device=device)
    compiled = torch.compile(fused, fullgraph=True, backend="aot_eager")
    assert torch.equal(run(compiled, x, "cuda"), run(fused, x, "cuda"))


def test_environment(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing else runs in its place, such as oneDNN's form."""
    fused = fastden.fuse(random_network().to(device), torch.bfloat16)
    monkeypatch.setattr(fused, "_onednn_network", lambda: pytest.fail("oneDNN was taken"))
    asked: list[str] = []
    original = backends.why_not

    def why_not(operator: str, backend: str, **options: Any) -> list[str]:
        asked.append(operator)
        assert backend == "cuda"
        return original(operator, backend, **options)

    monkeypatch.setattr(backends, "why_not", why_not)
    monkeypatch.setenv(backends.ENVIRONMENT, "cuda")
    with torch.no_grad():
        fused(torch.rand(1, 3, 8, 8, device=device), 0.1)
    assert set(asked) == {"stem", "bottleneck", "conv_bn_relu", "upsample", "concat_conv_bn_relu", "head"}
    monkeypatch.delenv(backends.ENVIRONMENT)
    asked.clear()
    monkeypatch.setattr(fused, "_onednn_network", lambda: None)
    with torch.no_grad():
        fused(torch.rand(1, 3, 8, 8, device=device), 0.1)
    assert not asked, "the CUDA backend was chosen though nobody asked"


def test_the_mixture_that_is_chosen(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the table of compute capability 9.0 chooses, CUDA, Triton and PyTorch in one pass, is right."""
    if device == "cuda":
        if torch.cuda.get_device_capability() != (9, 0):
            pytest.skip("the table is of compute capability 9.0")
    else:
        pytest.importorskip("triton")
        monkeypatch.setenv("FASTDEN_EMULATED_MAJOR", "9")
        monkeypatch.setattr(backends, "proven_backends", on_hopper)
    monkeypatch.delenv(backends.ENVIRONMENT, raising=False)
    monkeypatch.setattr(backends, "PROVEN", PROVEN)
    backends._proven_on_index.cache_clear()
    chosen = noted_choices(monkeypatch)
    model = random_network().to(device)
    fused = fastden.fuse(model, torch.bfloat16)
    monkeypatch.setattr(fused, "_onednn_network", lambda: None)
    x = torch.rand(2, 3, 21, 26, device=device)
    with torch.no_grad():
        y = fused(x, 0.1)
    backends._proven_on_index.cache_clear()
    first = {operator: name for name, operator, *_ in reversed(PROVEN)}
    assert chosen == {
        operator: {first.get(operator, "torch")}
        for operator in ("stem", "bottleneck", "conv_bn_relu", "upsample", "concat_conv_bn_relu", "head")
    }
    assert set().union(*chosen.values()) == {"torch", "triton", "cuda"}
    exact = run(copy.deepcopy(model).double(), x.double(), "torch")
    assert relative_l2(y, exact) <= 2 * relative_l2(run(fused, x, "torch"), exact)


def on_hopper(operator: str, device: torch.device, dtype: torch.dtype) -> list[str]:
    """As :func:`fastden.ops.backends.proven_backends`, as if a CPU had compute capability 9.0."""
    key = (operator, (9, 0), str(dtype).removeprefix("torch."))
    return [name for name, *rest in PROVEN if tuple(rest) == key]


def test_training_through_frozen_normalisation(device: str) -> None:
    """Gradients of the plain network in evaluation mode: PyTorch's own, over the kernels' results.

    Folding rounds weights once more, and other rounding opens or closes some ReLUs.
    """
    model = random_network().to(device, torch.float16)
    x = torch.rand(1, 3, 8, 8, device=device, dtype=torch.float16)
    found = {}
    for backend in ("torch", "cuda"):
        with ops.use_backend(backend):
            y = model(x, 0.1)
        found[backend] = torch.autograd.grad(y.float().square().sum(), list(model.parameters()))
    exact = copy.deepcopy(model).double()
    reference = torch.autograd.grad(exact(x.double(), 0.1).square().sum(), list(exact.parameters()))
    for (name, _), eager, kernel, gradient in zip(
        model.named_parameters(), found["torch"], found["cuda"], reference, strict=True
    ):
        assert relative_l2(kernel, gradient) <= 2 * relative_l2(eager, gradient) + 2e-2, name
