"""Packed weights follow the weights that they were made from, however these are written, and stay few."""

from __future__ import annotations

import copy
import ctypes
import multiprocessing
import pickle
import sys
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import functional_call, grad, vmap

from fastden.network import packed
from fastden.network.fused import fuse
from fastden.network.model import Denoiser
from fastden.network.onednn import Convolution
from fastden.network.packed import PackedWeights, Snapshot
from fastden.ops.post_operations import why_not
from tests.helpers import max_error, random_network

ONEDNN = not why_not(torch.device("cpu"), torch.float32)
X = torch.rand(2, 3, 7, 9, generator=torch.Generator().manual_seed(3))


def from_other_process(one: Tensor, other: Tensor) -> None:
    one.share_memory_()
    process = multiprocessing.get_context("fork").Process(target=lambda: one.copy_(other))
    process.start()
    process.join()


def by_numpy(one: Tensor, other: Tensor) -> None:
    one.numpy()[...] = other.numpy()


def by_pointer(one: Tensor, other: Tensor) -> None:
    ctypes.memmove(one.data_ptr(), other.data_ptr(), one.nbytes)


def in_inference_mode(one: Tensor, other: Tensor) -> None:
    with torch.inference_mode():
        one.copy_(other)


WRITES: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "copy_": lambda one, other: one.copy_(other),
    "data": lambda one, other: one.data.copy_(other),
    "data set": lambda one, other: setattr(one, "data", other.clone()),
    "set_": lambda one, other: one.set_(other.clone()),
    "numpy": by_numpy,
    "pointer": by_pointer,
    "inference mode": in_inference_mode,
    "other process": from_other_process,
    "foreach": lambda one, other: torch._foreach_copy_([one], [other]),
    "storage": lambda one, other: one.untyped_storage().copy_(other.untyped_storage()),
}


@pytest.mark.parametrize("write", WRITES)
def test_packed_weights_follow_every_write(models: tuple[Denoiser, Denoiser], write: str) -> None:
    fused, other = map(fuse, models)
    expected = other(X, 0.1)
    assert max_error(fused(X, 0.1), expected) > 1e-2
    for one, value in zip(fused.buffers(), other.buffers(), strict=True):
        WRITES[write](one, value)
    assert torch.equal(fused(X, 0.1), expected)


@pytest.mark.parametrize("assign", [False, True])
def test_packed_weights_follow_a_loaded_state(models: tuple[Denoiser, Denoiser], assign: bool) -> None:
    fused, other = map(fuse, models)
    fused(X, 0.1)
    fused.load_state_dict(copy.deepcopy(other.state_dict()), assign=assign)
    assert torch.equal(fused(X, 0.1), other(X, 0.1))


def test_networks_follow_vectors_and_averages_of_parameters(models: tuple[Denoiser, Denoiser]) -> None:
    """Optimisers without gradients and averages of weights write so; the exact network is the reference."""
    for composed in (False, True):
        model = random_network(seed=1, composed=composed)
        averaged = torch.optim.swa_utils.AveragedModel(model, use_buffers=True).eval()
        with torch.no_grad():
            model(X, 0.1), averaged(X, 0.1)
            vector = torch.nn.utils.parameters_to_vector(models[1].parameters())
            torch.nn.utils.vector_to_parameters(vector, model.parameters())
            averaged.update_parameters(model)
            averaged.update_parameters(models[1])
            for network in (model, averaged.module):
                exact = copy.deepcopy(network).double()(X.double(), 0.1)
                assert max_error(network(X, 0.1), exact) < 1e-5


def test_one_written_weight_is_enough(models: tuple[Denoiser, Denoiser]) -> None:
    fused = fuse(models[0])
    fused(X, 0.1)
    for name, buffer in fused.named_buffers():
        buffer.data.flatten()[-1:].add_(1.0) if buffer.dim() < 2 else buffer.data[-1, -1].add_(1.0)
        fresh = copy.deepcopy(fused)
        assert torch.equal(fused(X, 0.1), fresh(X, 0.1)), name


@pytest.mark.parametrize("change", ["signs", "swap", "moved bits", "one bit"])
def test_changes_that_cancel_are_found(change: str) -> None:
    """In every tensor; the memory may also move, or lie elsewhere than at first."""
    tensors = [torch.rand(size, generator=torch.Generator().manual_seed(size)) + 1 for size in (2, 64, 1000)]
    snapshot = Snapshot(tensors)
    assert snapshot.holds(tensors)
    assert snapshot.holds([tensor.clone() for tensor in tensors])
    for tensor in tensors:
        before = tensor.clone()
        bits = tensor.view(torch.int32)
        if change == "signs":
            tensor[[0, -1]] *= -1
        elif change == "swap":
            tensor[[0, -1]] = tensor[[-1, 0]]
        elif change == "moved bits":
            bits[0], bits[-1] = bits[0] + 4, bits[-1] - 4
        else:
            bits[-1] ^= 1
        assert not snapshot.holds(tensors)
        assert not snapshot.holds([tensor.clone() for tensor in tensors])
        tensor.copy_(before)
        assert snapshot.holds(tensors)


def test_weights_of_inference_mode(models: tuple[Denoiser, Denoiser]) -> None:
    fused, other = map(fuse, models)
    expected = other(X, 0.1)
    for copied in (copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))):
        with torch.inference_mode():
            mine = copied(fused)
            mine(X, 0.1)
            mine.load_state_dict(other.state_dict())
            assert torch.equal(mine(X, 0.1), expected)
            mine.stem_bias.zero_()
            assert not torch.equal(mine(X, 0.1), expected)


def test_other_layout_is_no_other_weight(models: tuple[Denoiser, Denoiser]) -> None:
    fused = fuse(models[0])
    expected = fused(X, 0.1)
    packed = fused._onednn
    fused.load_state_dict({name: value.contiguous() for name, value in fused.state_dict().items()}, assign=True)
    assert torch.equal(fused(X, 0.1), expected)
    assert fused._onednn is packed
    wide = torch.stack([fused.conv3_weight, fused.conv3_weight], -1)
    fused.conv3_weight = wide[..., 0]  # not dense
    assert torch.equal(fused(X, 0.1), expected)
    wide.zero_()
    assert not torch.equal(fused(X, 0.1), expected)


def test_weights_from_elsewhere(models: tuple[Denoiser, Denoiser]) -> None:
    fused, other = map(fuse, models)
    first, second = fused(X, 0.1), other(X, 0.1)
    found = functional_call(fused, dict(other.named_buffers()), (X, 0.1))
    assert torch.equal(found, second)
    assert torch.equal(fused(X, 0.1), first)
    stacked = {name: torch.stack([value, other.get_buffer(name)]) for name, value in fused.named_buffers()}
    both = vmap(lambda buffers: functional_call(fused, buffers, (X, 0.1)))(stacked)
    assert max_error(both[0], first) < 1e-5
    assert max_error(both[1], second) < 1e-5
    buffers = dict(fused.named_buffers())
    gradients = grad(lambda buffers: functional_call(fused, buffers, (X, 0.1)).square().sum())(buffers)
    assert all(bool(value.any()) for value in gradients.values())
    fused.head_bias.requires_grad_()
    assert fused(X, 0.1).requires_grad


def packed_bytes(convolution: Convolution) -> int:
    return sum(map(packed._packed_bytes, convolution._packed._copies))


@pytest.mark.skipif(not ONEDNN, reason="no oneDNN")
def test_packed_weights_are_bounded(monkeypatch: pytest.MonkeyPatch, models: tuple[Denoiser, Denoiser]) -> None:
    fused = fuse(models[0])
    for size in range(3, 40, 3):
        fused(torch.rand(1, 3, size, size + 5), 0.1)
    assert fused._onednn is not None
    network = fused._onednn[1]
    weights = sum(buffer.nbytes for buffer in fused.buffers())
    assert 0.5 * weights < sum(map(packed_bytes, network._convolutions())) < packed.PACKED_COPIES * 1.5 * weights
    convolution = network.res2.conv
    assert len(convolution._packed._of_shape) > 4
    monkeypatch.setattr(packed, "_same_packed", lambda one, other: False)
    monkeypatch.setattr(packed, "PACKED_SHAPES", 3)
    x = torch.rand(1, 32, 6, 9).to(memory_format=torch.channels_last)
    for columns in range(1, 9):
        convolution(x[..., :columns].contiguous(memory_format=torch.channels_last))
        assert packed_bytes(convolution) <= packed.PACKED_COPIES * 2 * convolution.weight.nbytes
        assert len(convolution._packed._of_shape) <= 3


@pytest.mark.skipif(not ONEDNN, reason="no oneDNN")
def test_threads_that_drop_each_others_weights(
    monkeypatch: pytest.MonkeyPatch, models: tuple[Denoiser, Denoiser]
) -> None:
    """Every call packs and evicts, and threads switch after a few instructions."""
    monkeypatch.setattr(packed, "PACKED_SHAPES", 1)
    monkeypatch.setattr(packed, "PACKED_COPIES", 1)
    fused = fuse(models[0])
    images = [torch.rand(1, 3, 4, 4 + 3 * index) for index in range(4)]
    expected = [fused(image, 0.1) for image in images]
    wrong: list[object] = []
    start = threading.Barrier(4)

    def work(first: int) -> None:
        start.wait()
        for step in range(6):
            index = (first + step) % len(images)
            try:
                if not torch.equal(fused(images[index], 0.1), expected[index]):
                    wrong.append(index)
            except Exception as error:
                wrong.append(error)

    threads = [threading.Thread(target=work, args=(first,)) for first in range(4)]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert not wrong


def test_what_another_thread_drops_between_two_looks_is_packed_again() -> None:
    """The interleaving itself: all weights are dropped while a thread looks for its own."""
    packed = PackedWeights()

    class Dropping(dict[tuple[int, ...], Tensor]):
        def get(self, shape: Any, default: Any = None) -> Any:
            found = super().get(shape, default)
            packed._of_shape = {}
            packed._copies.clear()
            return found

    weight = torch.rand(4, 4, 3, 3).to_mkldnn()
    packed.add((1, 4, 5, 5), weight)
    packed._of_shape = Dropping(packed._of_shape)
    assert packed.get((1, 4, 5, 5)) is weight
    assert packed.get((1, 4, 5, 5)) is None
    assert packed.add((1, 4, 5, 5), weight) is weight
    assert packed.get((1, 4, 5, 5)) is weight
