"""The networks inside other people's code: weights written behind their back, transforms, tracing, threads, scales."""

from __future__ import annotations

import copy
import ctypes
import multiprocessing
import pickle
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.export import Dim, export
from torch.func import functional_call, grad, jvp, vmap
from torch.utils.flop_counter import FlopCounterMode

import fastden
from fastden.network import inputs, onednn
from fastden.network.fused import FusedDenoiser, fuse
from fastden.network.model import Denoiser
from tests.helpers import max_error, random_network

ONEDNN = not onednn.why_not(torch.device("cpu"), torch.float32)
X = torch.rand(2, 3, 7, 9, generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def models() -> tuple[Denoiser, Denoiser]:
    return random_network(seed=1), random_network(seed=2)


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
    """As optimisers without gradients and averages of weights write them: the exact network says what is right."""
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


@pytest.mark.skipif(not ONEDNN, reason="no oneDNN")
def test_packed_weights_are_bounded(monkeypatch: pytest.MonkeyPatch, models: tuple[Denoiser, Denoiser]) -> None:
    fused = fuse(models[0])
    for size in range(3, 40, 3):
        fused(torch.rand(1, 3, size, size + 5), 0.1)
    assert fused._onednn is not None
    network = fused._onednn[1]
    weights = sum(buffer.nbytes for buffer in fused.buffers())
    assert 0.5 * weights < network.packed_bytes < onednn.PACKED_COPIES * 1.5 * weights
    convolution = network.res2.conv
    assert len(convolution._packed._of_shape) > 4
    monkeypatch.setattr(onednn, "_same_packed", lambda one, other: False)
    monkeypatch.setattr(onednn, "PACKED_SHAPES", 3)
    x = torch.rand(1, 32, 6, 9).to(memory_format=torch.channels_last)
    for columns in range(1, 9):
        convolution(x[..., :columns].contiguous(memory_format=torch.channels_last))
        assert convolution._packed.nbytes <= onednn.PACKED_COPIES * 2 * convolution.weight.nbytes
        assert len(convolution._packed._of_shape) <= 3


@pytest.mark.skipif(not ONEDNN, reason="no oneDNN")
def test_threads_that_drop_each_others_weights(
    monkeypatch: pytest.MonkeyPatch, models: tuple[Denoiser, Denoiser]
) -> None:
    """Every call packs and evicts, and threads change at every few instructions."""
    monkeypatch.setattr(onednn, "PACKED_SHAPES", 1)
    monkeypatch.setattr(onednn, "PACKED_COPIES", 1)
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
    """The interleaving itself: between a thread's question for its weights and its answer all are dropped."""
    packed = onednn.PackedWeights()

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


def test_results_are_contiguous(models: tuple[Denoiser, Denoiser]) -> None:
    fused = fuse(models[0])
    for size in ((22, 18), (20, 20), (21, 18), (1, 5)):
        for x in (torch.rand(2, 3, *size), torch.rand(2, 3, *size).to(memory_format=torch.channels_last)):
            assert fused(x, 0.1).is_contiguous()
            leaf = x.clone().requires_grad_()
            assert fused(leaf, 0.1).is_contiguous()
            assert fused(x, 0.1).untyped_storage().nbytes() == x.nbytes


def test_autocast_changes_nothing(models: tuple[Denoiser, Denoiser]) -> None:
    fused = fuse(models[0])
    expected = fused(X, 0.1)
    leaf = X.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        assert max_error(fused(X, 0.1), expected) < 1e-5
        result = fused(leaf, 0.1)
        assert result.dtype == torch.float32
        assert max_error(result, expected) < 1e-5


def networks(models: tuple[Denoiser, Denoiser]) -> Iterator[nn.Module]:
    yield models[0]
    composed = copy.deepcopy(models[0])
    composed.composed = True
    yield composed
    yield fuse(models[0])


def test_forward_differentiation(models: tuple[Denoiser, Denoiser]) -> None:
    tangent = torch.rand_like(X)
    sigma = torch.tensor(0.1)
    reference: Tensor | None = None
    for network in networks(models):
        along_x = jvp(lambda x, n=network: n(x, 0.1), (X,), (tangent,))[1]
        along_sigma = jvp(lambda s, n=network: n(X, s), (sigma,), (torch.tensor(1.0),))[1]
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(X, tangent)
            found = forward_ad.unpack_dual(network(dual, 0.1)).tangent
        assert max_error(found, along_x) < 1e-5
        both = torch.stack([along_x, along_sigma])
        reference = both if reference is None else reference
        assert max_error(both, reference) < 1e-3


def test_vmap(models: tuple[Denoiser, Denoiser]) -> None:
    sigmas = torch.tensor([0.05, 0.2])
    for network in networks(models):
        expected = network(X, sigmas)
        assert max_error(vmap(lambda x, s, n=network: n(x[None], s)[0])(X, sigmas), expected) < 1e-5
        assert max_error(vmap(lambda x, n=network: n(x[None], 0.1)[0])(X), network(X, 0.1)) < 1e-5
        levels = vmap(lambda s, n=network: n(X[:1], s)[0])(sigmas)
        assert max_error(levels[1], network(X[:1], 0.2)[0]) < 1e-5


def test_operations_are_counted(models: tuple[Denoiser, Denoiser]) -> None:
    composed = copy.deepcopy(models[0])
    composed.composed = True
    counts = []
    for network in (composed, fuse(models[0])):
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            network(X, 0.1)
        counts.append(counter.get_total_flops())
    # The composed network also multiplies its factors, the same for any image.
    assert 0 < counts[1] < counts[0]
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        counted = fuse(models[0])(X, 0.1)
    assert max_error(counted, fuse(models[0])(X, 0.1)) < 1e-5


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("form", ["plain", "fused"])
def test_export_with_named_dimensions(form: str) -> None:
    """A range of sizes is promised, whole: no size in it may be a case of its own."""
    model = random_network(noise_level_input=False)
    network = model if form == "plain" else fuse(model)
    shapes = {"x": {2: Dim("h", min=4, max=512), 3: Dim("w", min=4, max=512)}}
    with torch.no_grad():
        program = export(network, (torch.rand(2, 3, 40, 44),), dynamic_shapes=shapes).module()
        for size in ((4, 4), (5, 39), (32, 41)):
            x = torch.rand(2, 3, *size)
            assert max_error(program(x), model(x)) < 1e-5


@pytest.mark.filterwarnings("ignore")
def test_tracing(models: tuple[Denoiser, Denoiser]) -> None:
    for network in networks(models):
        traced = torch.jit.trace(network, (X, torch.tensor(0.1)), check_trace=False)
        assert max_error(traced(X, torch.tensor(0.2)), network(X, 0.2)) < 1e-5


@pytest.mark.parametrize("composed", [False, True])
def test_meta_device(composed: bool, models: tuple[Denoiser, Denoiser]) -> None:
    x = torch.empty(2, 3, 9, 10, device="meta")
    assert Denoiser(composed=composed).to("meta")(x, 0.1).shape == x.shape
    assert fuse(models[0]).to("meta")(x, 0.1).shape == x.shape
    with torch.device("meta"):
        loaded = Denoiser.from_pretrained("color")
    assert loaded.conv0.weight.device.type == "cpu"
    assert torch.equal(loaded.out.weight, Denoiser.from_pretrained("color").out.weight)


def test_empty_batch_backwards(models: tuple[Denoiser, Denoiser]) -> None:
    for network in networks(models):
        x = torch.rand(0, 3, 8, 9, requires_grad=True)
        network(x, 0.1).sum().backward()
        assert x.grad is not None
        assert x.grad.shape == x.shape


SIGMAS: dict[str, Any] = {
    "np.float32": np.float32(0.25),
    "np.float64": np.float64(0.25),
    "0-d array": np.array(0.25),
    "array (N,)": np.full(2, 0.25),
    "array map": np.full((2, 1, 7, 9), 0.25, np.float32),
    "list": [0.25, 0.25],
    "tuple": (0.25, 0.25),
    "list of tensors": [torch.tensor(0.25), torch.tensor(0.25)],
    "(1,)": torch.full((1,), 0.25),
    "(1, 1)": torch.full((1, 1), 0.25),
    "(1, 1, 1, 1)": torch.full((1, 1, 1, 1), 0.25),
    "(N, 1)": torch.full((2, 1), 0.25),
    "(N, 1, 1, 1)": torch.full((2, 1, 1, 1), 0.25),
    "parameter": nn.Parameter(torch.tensor(0.25)),
}


@pytest.mark.parametrize("form", SIGMAS)
def test_forms_of_sigma(form: str, models: tuple[Denoiser, Denoiser]) -> None:
    with torch.no_grad():
        assert torch.equal(models[0](X, SIGMAS[form]), models[0](X, 0.25))


def test_each_image_has_its_own_sigma(models: tuple[Denoiser, Denoiser]) -> None:
    sigma = torch.tensor([0.1, 0.3])
    with torch.no_grad():
        expected = models[0](X, sigma)
        for form in (sigma[:, None], sigma[:, None, None, None], sigma.numpy(), sigma.tolist()):
            assert torch.equal(models[0](X, form), expected)


def test_sigma_in_a_list_keeps_its_gradient(models: tuple[Denoiser, Denoiser]) -> None:
    sigma = torch.tensor(0.1, requires_grad=True)
    models[0](X, [sigma, sigma]).sum().backward()
    assert sigma.grad is not None


@pytest.mark.parametrize(
    ("sigma", "kind", "message"),
    [
        (np.full((7, 9), 0.1), ValueError, r"sigma: shape \(7, 9\); accepted"),
        (np.array(["a"]), TypeError, r"sigma: an array of dtype <U1; accepted"),
        (["a"], TypeError, r"sigma: list holds values that are not numbers; accepted"),
        (np.array([0.1, 3.0]), ValueError, r"sigma: values from 0\.1.* to 3\.0; accepted: 0 to 1"),
        (torch.tensor([True, False]), TypeError, r"sigma: dtype torch\.bool; accepted"),
        (torch.tensor(0.1 + 0.1j), TypeError, r"sigma: dtype torch\.complex64; accepted"),
        (np.bool_(True), TypeError, r"sigma: dtype torch\.bool; accepted"),
        ([], ValueError, r"sigma: shape \(0,\); accepted"),
    ],
)
def test_refused_sigma(sigma: Any, kind: type[Exception], message: str, models: tuple[Denoiser, Denoiser]) -> None:
    with pytest.raises(kind, match=message):
        models[0](X, sigma)


@pytest.mark.parametrize("sigma", [np.float32(0.25), np.float64(0.25), np.array(0.25)], ids=["f32", "f64", "array"])
def test_numpy_scalars_under_compile(sigma: Any, models: tuple[Denoiser, Denoiser]) -> None:
    for network in (models[0], fuse(models[0])):
        torch._dynamo.reset()
        compiled = torch.compile(network, fullgraph=True, backend="eager")
        with torch.no_grad():
            assert max_error(compiled(X, sigma), network(X, 0.25)) < 1e-5


@pytest.fixture
def unwarned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inputs._Scale, "warned", False)
    monkeypatch.delenv(inputs.SCALE_ENVIRONMENT, raising=False)


@pytest.mark.usefixtures("unwarned")
@pytest.mark.parametrize("white", [255, 4095, 65535])
def test_a_picture_on_another_scale_is_told_once(white: int, models: tuple[Denoiser, Denoiser]) -> None:
    with pytest.warns(fastden.ScaleWarning, match=rf"divide x by its white point \({white} for \d+ bits\)") as told:
        models[0](X * white, 25 / 255)
    assert told[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        models[0](X * white, 25 / 255)
        fuse(models[0])(X * white, 25 / 255)


@pytest.mark.usefixtures("unwarned")
def test_values_that_are_no_other_scale(models: tuple[Denoiser, Denoiser], monkeypatch: pytest.MonkeyPatch) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fuse(models[0])(8 * X - 4, 0.1)  # an iterate of plug-and-play
        models[0](torch.full((1, 3, 4, 4), float("nan")), 0.1)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", fastden.ScaleWarning)
            models[0](X * 255, 0.1)
        inputs._Scale.warned = False
        monkeypatch.setenv(inputs.SCALE_ENVIRONMENT, "0")
        models[0](X * 255, 0.1)


def test_the_fused_form_says_where_it_is(models: tuple[Denoiser, Denoiser]) -> None:
    fused = fuse(models[0], torch.bfloat16)
    assert (fused.device, fused.dtype) == (torch.device("cpu"), torch.bfloat16)
    assert not list(fused.parameters())
    assert "no parameters" in (FusedDenoiser.__doc__ or "")


SYNC = """
import copy, sys, torch
from torch import nn
import torch.distributed as dist
import fastden
from tests.helpers import random_network

dist.init_process_group("gloo")
rank = dist.get_rank()
torch.manual_seed(0)
whole = torch.rand(3, 3, 8, 10, dtype=torch.float64)
mine = whole[:1] if rank == 0 else whole[1:]
for composed in (False, True):
    one = random_network(composed=composed, dtype=torch.float64).train()
    two = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(one))
    one.conv1.bn.momentum = two.conv1.bn.momentum = None
    expected = one(whole, 0.1)
    expected.square().sum().backward()
    found = two(mine, 0.1)
    found.square().sum().backward()
    part = expected[:1] if rank == 0 else expected[1:]
    assert (found - part).abs().max() < 1e-9, (found - part).abs().max()
    for (name, a), b in zip(one.named_parameters(), two.parameters()):
        dist.all_reduce(b.grad)
        assert (a.grad - b.grad).abs().max() <= 1e-7 * max(1.0, a.grad.abs().max()), name
    for (name, a), b in zip(one.named_buffers(), two.buffers()):
        assert torch.allclose(a.double(), b.double(), atol=1e-10), name
    two.eval()
    one.eval()
    assert (two(whole, 0.1) - one(whole, 0.1)).abs().max() < 1e-9
    assert (fastden.fuse(two)(whole, 0.1) - one(whole, 0.1)).abs().max() < 1e-9
# FSDP2 layer by layer: each layer's weights are gathered when the layer is called.
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
mesh = init_device_mesh("cpu", (2,))
for composed in (False, True):
    one = random_network(composed=composed, dtype=torch.float64).eval()
    two = copy.deepcopy(one)
    for layer in two.modules():
        if isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d)):
            fully_shard(layer, mesh=mesh)
    fully_shard(two, mesh=mesh)
    expected, found = one(whole, 0.1), two(whole, 0.1)
    assert (found - expected).abs().max() < 1e-9, (found - expected).abs().max()
    expected.square().sum().backward()
    found.square().sum().backward()
    for (name, a), b in zip(one.named_parameters(), two.parameters()):
        assert (a.grad - b.grad.full_tensor()).abs().max() <= 1e-7 * max(1.0, a.grad.abs().max()), name
dist.barrier()
print("equal")
dist.destroy_process_group()
"""


def test_two_processes_normalise_as_one_and_share_the_weights() -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--no-python"]
    done = subprocess.run(
        [*command, sys.executable, "-c", SYNC], capture_output=True, text=True, timeout=400, check=False
    )
    assert done.stdout.count("equal") == 2, done.stderr[-3000:]
