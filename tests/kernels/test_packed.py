"""Weights that a kernel reads in another order than theirs: the order is found once, values are always current.

Those of a fused network that takes the noise level are read where they lie: nothing is reordered.
"""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import fastden
from fastden import ops
from fastden.kernels import _packed
from fastden.kernels._packed import PACKED, PackedWeights
from tests.helpers import copies_in_operators, max_error, random_network


def reversed_rows(weight: Tensor, times: int = 1) -> Tensor:
    return weight.flip(0).repeat(times, 1)


@pytest.fixture
def packed() -> PackedWeights:
    return PackedWeights()


@pytest.fixture
def weight(device: str) -> Tensor:
    return torch.rand(3, 4, device=device)


def cases(device: str) -> Iterator[tuple[Callable[..., Tensor], dict[str, Tensor], int]]:
    """Each operator whose weights lie otherwise than its kernel reads them, its arguments, and how many it reorders."""

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, device=device) / 10

    # Three channels leave one of four positions of a pixel empty; four are read as they lie.
    for channels in (3, 4):
        stem = {"x": random(1, channels, 8, 10), "weight": random(4, 5, channels, 7, 7), "bias": random(4, 5)}
        yield ops.stem, stem, int(channels == 3)
        head = {"features": random(1, 5, 3, 4), "x": random(1, channels, 10, 12), "weight": random(12, 5, 4, 4)}
        yield ops.head, head | {"image_weight": random(3, channels, 7, 7), "bias": random(3)}, int(channels == 3)
    yield ops.upsample, {"x": random(1, 6, 3, 2), "weight": random(6, 5, 4, 4)}, 0


@pytest.fixture
def no_orders(monkeypatch: pytest.MonkeyPatch) -> None:
    """Orders that other tests' kernels left do not count as hits here."""
    monkeypatch.setattr(PACKED, "_kept", {})


@pytest.mark.usefixtures("no_orders")
@pytest.mark.parametrize("index", range(5))
def test_operators(device: str, index: int) -> None:
    operator, arguments, reordered = list(cases(device))[index]
    before = PACKED.hits
    first = operator(**arguments, backend="triton")
    assert PACKED.hits == before
    assert torch.equal(operator(**arguments, backend="triton"), first)
    assert PACKED.hits == before + reordered
    for name in (name for name in arguments if name.endswith("weight")):
        arguments[name].data.mul_(2)  # counted nowhere
        found = operator(**arguments, backend="triton")
        assert max_error(found, operator(**arguments, backend="torch")) < 1e-5
        assert not torch.equal(found, first)


@pytest.mark.usefixtures("no_orders")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_fused_network_packs_nothing(device: str, dtype: torch.dtype) -> None:
    """No weights are packed before or in a forward pass, so a captured graph's replays read the current buffers."""
    fused = fastden.fuse(random_network().to(device), dtype)
    x = torch.rand(1, 3, 8, 8, device=device)
    assert copies_in_operators("triton", lambda: fused(x, 0.1)) == []
    assert len(PACKED) == 0
    # Another layout than that of fastden.fuse is copied: so the count above could have shown copies.
    fused.up2_weight = fused.up2_weight.contiguous()
    assert copies_in_operators("triton", lambda: fused(x, 0.1)) != []


def test_options_are_told_apart(packed: PackedWeights, weight: Tensor) -> None:
    assert torch.equal(packed.get(reversed_rows, weight, 1), weight.flip(0))
    assert packed.get(reversed_rows, weight, 2).shape == (6, 4)
    assert packed.get(torch.clone, weight).equal(weight)
    assert packed.hits == 0
    assert torch.equal(packed.get(reversed_rows, weight, 2), weight.flip(0).repeat(2, 1))
    assert packed.hits == 1


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_every_write_is_seen(packed: PackedWeights, weight: Tensor, mode: type) -> None:
    expected = weight.flip(0)
    with mode():
        for write in (
            lambda: weight.mul_(2),
            lambda: weight.data.mul_(2),
            lambda: weight[:2].copy_(weight[1:].clone()),
            lambda: setattr(weight, "data", torch.rand_like(weight)),
            lambda: weight.detach().zero_(),
        ):
            packed.get(reversed_rows, weight)
            write()
            expected = weight.flip(0)
            assert torch.equal(packed.get(reversed_rows, weight), expected)


def test_zeros_dtypes_and_layouts(packed: PackedWeights, device: str) -> None:
    """What is put between the values, and memory that is laid out otherwise than the result's shape says."""

    def pack(weight: Tensor) -> Tensor:
        return torch.nn.functional.pad(weight.flip(2, 3), (0, 3, 1, 0)).permute(2, 0, 3, 1).contiguous().movedim(0, 2)

    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        weight = torch.rand(3, 4, 2, 2, device=device).to(dtype)
        for layout in (weight, weight.to(memory_format=torch.channels_last), weight[:, ::2]):
            for _ in range(2):
                found, expected = packed.get(pack, layout), pack(layout)
                assert torch.equal(found, expected)
                assert found.stride() == expected.stride()
                assert found.dtype == dtype
    assert torch.equal(packed.get(Tensor.t, weight[0, 0]), weight[0, 0].t())


def test_orders_are_few(packed: PackedWeights, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_packed, "LARGEST", 3)
    for rows in range(1, 9):
        packed.get(reversed_rows, torch.rand(rows, 2, device=device))
        assert len(packed) <= 3


def test_what_has_no_order(packed: PackedWeights, weight: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    class Other(Tensor):
        pass

    assert isinstance(packed.get(reversed_rows, weight.as_subclass(Other)), Other)
    for module, name in ((torch.compiler, "is_compiling"), (torch.jit, "is_tracing")):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, lambda: True)
            assert torch.equal(packed.get(reversed_rows, weight), weight.flip(0))
    assert len(packed) == 0


def test_no_order_is_made_while_a_graph_is_captured(
    packed: PackedWeights, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class OnGpu(Tensor):
        is_cuda = True

    monkeypatch.setattr(_packed, "Tensor", OnGpu)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    weight = torch.rand(3, 4, device=device).as_subclass(OnGpu)
    assert torch.equal(packed.get(reversed_rows, weight), weight.flip(0))
    assert len(packed) == 0


def test_orders_that_captured_graphs_read_stay(
    packed: PackedWeights, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class OnGpu(Tensor):
        is_cuda = True

    capturing = False
    monkeypatch.setattr(_packed, "Tensor", OnGpu)
    monkeypatch.setattr(_packed, "LARGEST", 3)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    weights = [torch.rand(rows, 2, device=device).as_subclass(OnGpu) for rows in range(1, 9)]
    for weight in weights[:2]:
        packed.get(reversed_rows, weight)
    read, other = (weakref.ref(order.index) for order in packed._kept.values())
    capturing = True
    packed.get(reversed_rows, weights[0])
    capturing = False
    for weight in weights[2:]:
        packed.get(reversed_rows, weight)
        assert len(packed) <= 3
    gc.collect()
    assert read() is not None
    assert other() is None
    before = packed.hits
    packed.get(reversed_rows, weights[0])
    assert packed.hits == before + 1


def test_an_order_belongs_to_no_caller(packed: PackedWeights, weight: Tensor) -> None:
    """It is made in another thread: no mode, default device or memory pool of this one reaches it."""
    threads = []

    def pack(weight: Tensor) -> Tensor:
        threads.append(threading.get_ident())
        assert not torch.is_inference_mode_enabled()
        return weight.flip(0)

    with torch.inference_mode(), torch.device("meta"):
        assert torch.equal(packed.get(pack, weight), weight.flip(0))
    assert len(packed) == len(threads) == 1
    assert threads[0] != threading.get_ident()


def test_streams_that_read_an_order_are_noted(
    packed: PackedWeights, weight: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that its memory is not used again before they have read it."""
    streams = []

    class OnGpu(Tensor):
        is_cuda = True

        def record_stream(self, stream: object) -> None:
            streams.append(stream)

    original = _packed._order

    def order(*given: Any) -> _packed._Order:
        made = original(*given)
        return made._replace(index=made.index.as_subclass(OnGpu))

    monkeypatch.setattr(_packed, "_order", order)
    for stream in ("one", "two"):
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device, stream=stream: stream)
        assert torch.equal(packed.get(reversed_rows, weight).as_subclass(Tensor), weight.flip(0))
    assert streams == ["one", "two"]


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


@pytest.mark.gpu
def test_a_blind_network_in_graphs_of_the_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its weights are reordered; the order is made in the first call, while the compiler's graphs own the memory."""
    network = fastden.fuse(random_network(noise_level_input=False), torch.bfloat16, "cuda")
    x = torch.rand(1, 3, 64, 96, device="cuda")
    with ops.use_backend("triton"), torch.no_grad():
        expected = network(x)
        monkeypatch.setattr(PACKED, "_kept", {})
        compiled = torch.compile(network, mode="reduce-overhead")
        for _ in range(4):
            torch.compiler.cudagraph_mark_step_begin()
            assert max_error(compiled(x), expected) < 0.02 * float(expected.abs().max())


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
    assert len(packed) == 2
