"""Weights that a kernel reads in its own order: reordered once, again after a change, and gone with the weight."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

import fastden
from fastden import ops
from fastden.kernels import _packed
from fastden.kernels._packed import PACKED, PackedWeights, keepable
from tests.helpers import max_error, random_network


def reversed_rows(weight: Tensor, times: int = 1) -> Tensor:
    return weight.flip(0).repeat(times, 1)


@pytest.fixture
def packed() -> PackedWeights:
    return PackedWeights()


@pytest.fixture
def weight(device: str) -> Tensor:
    return torch.rand(3, 4, device=device)


def cases(device: str) -> Iterator[tuple[Callable[..., Tensor], dict[str, Tensor], tuple[str, ...]]]:
    """Each operator that reorders weights, its arguments, and which of them are reordered."""

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, device=device) / 10

    yield ops.stem, {"x": random(1, 3, 8, 10), "weight": random(4, 5, 3, 7, 7), "bias": random(4, 5)}, ("weight",)
    yield ops.upsample, {"x": random(1, 6, 3, 2), "weight": random(6, 5, 4, 4)}, ("weight",)
    head = {"features": random(1, 5, 3, 4), "x": random(1, 4, 10, 12), "weight": random(12, 5, 4, 4)}
    head |= {"image_weight": random(3, 4, 7, 7), "bias": random(3)}
    yield ops.head, head, ("weight", "image_weight")


@pytest.mark.parametrize("index", [0, 1, 2])
def test_operators(device: str, index: int) -> None:
    operator, arguments, names = list(cases(device))[index]
    before = PACKED.hits
    first = operator(**arguments, backend="triton")
    assert PACKED.hits == before
    assert torch.equal(operator(**arguments, backend="triton"), first)
    assert PACKED.hits == before + len(names)
    for name in names:
        arguments[name].mul_(2)
        found = operator(**arguments, backend="triton")
        assert max_error(found, operator(**arguments, backend="torch")) < 1e-5
        assert not torch.equal(found, first)
    # The weight that did not change was found each time.
    assert PACKED.hits == before + len(names) + len(names) * (len(names) - 1)


def test_fused_network_keeps_its_weights(device: str) -> None:
    fused = fastden.fuse(random_network().to(device))
    x = torch.rand(1, 3, 8, 8, device=device)
    with torch.inference_mode(), ops.use_backend("triton"):
        first, before = fused(x, 0.1), PACKED.hits
        assert torch.equal(fused(x, 0.1), first)
    assert PACKED.hits == before + 4  # of stem and upsample one weight each, of head two


def test_options_are_told_apart(packed: PackedWeights, weight: Tensor) -> None:
    assert packed.get(reversed_rows, weight, 1).shape == (3, 4)
    assert packed.get(reversed_rows, weight, 2).shape == (6, 4)
    assert packed.get(torch.clone, weight).equal(weight)
    assert packed.hits == 0
    assert packed.get(reversed_rows, weight, 2).shape == (6, 4)
    assert packed.hits == 1


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_a_write_is_noticed(packed: PackedWeights, weight: Tensor, mode: type) -> None:
    with mode():
        packed.get(reversed_rows, weight)
        weight[1, 2] = 7
        assert packed.get(reversed_rows, weight)[1, 2] == 7
        weight[:2].copy_(weight[1:].clone())  # through a view
        assert torch.equal(packed.get(reversed_rows, weight), weight.flip(0))
    weight.detach().zero_()
    assert packed.get(reversed_rows, weight).sum() == 0
    assert packed.hits == 0


def test_other_memory_is_noticed(packed: PackedWeights, weight: Tensor) -> None:
    packed.get(reversed_rows, weight)
    for value in range(5):  # an allocator gives the same memory again and again
        weight.data = torch.full((3, 4), float(value), device=weight.device)
        assert packed.get(reversed_rows, weight).eq(value).all()
    packed.get(reversed_rows, weight)
    weight.data = weight.data.view(2, 6)
    assert packed.get(reversed_rows, weight).shape == (2, 6)
    assert packed.hits == 1


def test_nothing_outlives_its_weight(packed: PackedWeights, device: str) -> None:
    weight = torch.rand(3, 4, device=device)
    kept = weakref.ref(packed.get(reversed_rows, weight))
    gc.collect()
    assert kept() is not None
    assert len(packed) == 1
    memory = weakref.ref(weight)
    del weight
    gc.collect()
    assert memory() is None
    assert kept() is None
    assert len(packed) == 0


def test_a_view_is_not_kept(packed: PackedWeights, weight: Tensor) -> None:
    assert packed.get(Tensor.t, weight)._base is weight
    assert len(packed) == 0


def test_what_is_not_kept(packed: PackedWeights, weight: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    parameter = torch.nn.Parameter(weight)
    with torch.no_grad():
        assert torch.equal(packed.get(reversed_rows, parameter), weight.flip(0))
        parameter.data.mul_(2)  # counted nowhere
        assert torch.equal(packed.get(reversed_rows, parameter), parameter.flip(0))
    with torch.inference_mode():
        assert not keepable(torch.rand(3, 4))
        assert keepable(weight)
    assert len(packed) == 0
    assert keepable(parameter.requires_grad_(False))
    for module, name in ((torch.compiler, "is_compiling"), (torch.jit, "is_tracing")):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, lambda: True)
            assert not keepable(weight)

    class Other(Tensor):
        pass

    assert not keepable(weight.as_subclass(Other))


def test_nothing_of_a_graph_that_is_being_captured(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class OnGpu(Tensor):
        is_cuda = True

    monkeypatch.setattr(_packed, "Tensor", OnGpu)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    weight = torch.rand(3, 4, device=device).as_subclass(OnGpu)
    assert not keepable(weight)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert keepable(weight)


@pytest.mark.gpu
def test_a_captured_graph_follows_its_weight() -> None:
    weight = torch.rand(6, 5, 4, 4, device="cuda")
    x = torch.rand(1, 6, 3, 2, device="cuda")
    ops.upsample(x, weight, backend="triton")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = ops.upsample(x, weight, backend="triton")
    for _ in range(2):
        weight.normal_()
        eager = ops.upsample(x, weight, backend="triton")
        graph.replay()
        assert torch.equal(y, eager)


def test_threads(packed: PackedWeights, weight: Tensor) -> None:
    expected = weight.flip(0)
    wrong = []

    def work() -> None:
        for _ in range(200):
            mine = torch.rand(2, 2)
            if not torch.equal(packed.get(reversed_rows, weight), expected):
                wrong.append("shared")
            if not torch.equal(packed.get(reversed_rows, mine), mine.flip(0)):
                wrong.append("own")

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert packed.hits >= 6 * 199
    assert len(packed) == 1
