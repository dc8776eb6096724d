"""The networks inside other people's code: autocast, transforms, tracing, export, several processes."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.export import Dim, export
from torch.func import functional_call, jvp, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from torch.utils.flop_counter import FlopCounterMode

from fastden import ops
from fastden.network import int8
from fastden.network.fused import fuse
from fastden.network.level import KNOTS
from fastden.network.model import Denoiser
from tests.helpers import max_error, random_network, relative_l2

X = torch.rand(2, 3, 7, 9, generator=torch.Generator().manual_seed(3))


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
        curve = torch.linspace(0.05, 0.2, KNOTS)[None]
        assert max_error(vmap(lambda x, n=network, c=curve: n(x[None], c)[0])(X), network(X, curve)) < 1e-5


def test_vmap_over_one_argument_of_an_operator() -> None:
    """Operators do not write into an intermediate result that has no batch or tangent yet."""
    generator = torch.Generator().manual_seed(0)
    x, weight, residual = (
        torch.rand(*size, generator=generator) for size in ((1, 3, 5, 5), (4, 3, 1, 1), (1, 4, 5, 5))
    )

    def added(residual: Tensor) -> Tensor:
        return ops.conv_bn_relu(x, weight, residual=residual)

    both = vmap(added)(torch.stack([residual, 2 * residual]))
    assert max_error(both[1], added(2 * residual)) < 1e-6
    image, inside = torch.rand(1, 3, 12, 14, generator=generator), torch.rand(1, 8, 3, 7, 7, generator=generator)
    bias, edges = torch.rand(4, 8, generator=generator), torch.rand(2, 3, 8, 3, 7, 7, generator=generator)

    def first(edges: Tensor) -> Tensor:
        return ops.stem(image, torch.cat([inside, edges]), bias)

    assert max_error(vmap(first)(edges)[1], first(edges[1])) < 1e-6
    tangent = jvp(first, (edges[0],), (edges[1],))[1]
    assert max_error(tangent, first(edges[0] + edges[1]) - first(edges[0])) < 1e-4


def test_other_default_device_and_dtype(models: tuple[Denoiser, Denoiser]) -> None:
    """Nothing that a call or the packing of weights makes goes to the default device, or takes the default dtype."""
    bundled = Denoiser.from_pretrained("color")
    made: list[nn.Module] = [*networks(models), fuse(models[0], torch.bfloat16)]
    if not int8.why_not():
        made.append(fuse(bundled, quality="fast"))
    for network in made:
        expected = copy.deepcopy(network)(X, 0.1)
        for sigma in (0.1, [0.1, 0.1], np.array([0.1, 0.1]), np.float32(0.1)):
            fresh = copy.deepcopy(network)
            with torch.device("meta"):
                assert max_error(fresh(X, sigma), expected) < 1e-5
            torch.set_default_dtype(torch.float64)
            try:
                assert max_error(copy.deepcopy(network)(X, sigma), expected) < 1e-5
            finally:
                torch.set_default_dtype(torch.float32)


def test_memory_format_of_modules(models: tuple[Denoiser, Denoiser]) -> None:
    expected = models[0](X, 0.1)
    for network in networks(models):
        moved = network.to(memory_format=torch.channels_last)
        assert moved is network
        assert max_error(moved(X.to(memory_format=torch.channels_last), 0.1), expected) < 1e-5
    fused = fuse(models[0]).to(torch.float64, memory_format=torch.channels_last)
    assert fused.dtype == torch.float64
    strides = {name: buffer.stride() for name, buffer in fused.named_buffers()}
    around = nn.Sequential(fused).to(memory_format=torch.channels_last).float()
    assert {name: buffer.stride() for name, buffer in fused.named_buffers()} == strides
    assert max_error(around[0](X, 0.1), expected) < 1e-5


def test_weights_of_mixed_dtypes_are_named(models: tuple[Denoiser, Denoiser]) -> None:
    fused = fuse(models[0])
    fused(X, 0.1)
    fused.conv3_weight = fused.conv3_weight.double()
    with pytest.raises(TypeError, match=r"weight: dtype torch\.float64; accepted: torch\.float32"):
        fused(X, 0.1)


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
    """All sizes of the range work: none is specialised."""
    model = random_network(noise_level_input=False)
    network = model if form == "plain" else fuse(model)
    shapes = {"x": {2: Dim("h", min=4, max=512), 3: Dim("w", min=4, max=512)}}
    with torch.no_grad():
        program = export(network, (torch.rand(2, 3, 40, 44),), dynamic_shapes=shapes).module()
        for size in ((4, 4), (5, 39), (32, 41)):
            x = torch.rand(2, 3, *size)
            assert max_error(program(x), model(x)) < 1e-5


def test_symbolic_shapes(models: tuple[Denoiser, Denoiser]) -> None:
    sigmas = torch.tensor([0.1, 0.2])
    for network in networks(models):
        state = {**dict(network.named_parameters()), **dict(network.named_buffers())}

        run = partial(functional_call, network)
        traced = make_fx(lambda *a, run=run: run(a[0], a[1:]), tracing_mode="symbolic")(state, X, sigmas)
        assert max_error(traced(state, X, sigmas), network(X, sigmas)) < 1e-5


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("normalised", [False, True])
@pytest.mark.parametrize("composed", [False, True])
def test_selective_activation_checkpointing(composed: bool, normalised: bool, training: bool) -> None:
    """What the policy keeps is not overwritten later, so that the gradients are those without checkpoints."""
    kept = {torch.ops.aten.convolution.default, *([torch.ops.aten.native_batch_norm.default] if normalised else [])}

    def policy(_context: Any, operation: Any, *_: Any, **__: Any) -> CheckpointPolicy:
        return CheckpointPolicy.MUST_SAVE if operation in kept else CheckpointPolicy.PREFER_RECOMPUTE

    contexts = partial(create_selective_checkpoint_contexts, policy)
    selective = partial(checkpoint, use_reentrant=False, context_fn=contexts)
    gradients = []
    for call in (partial.__call__, selective):
        model = random_network(composed=composed).train(training)
        call(partial(model, X, 0.1)).square().mean().backward()
        gradients.append(torch.cat([one.grad.flatten() for one in model.parameters() if one.grad is not None]))
    assert relative_l2(gradients[1], gradients[0]) < 1e-5


@pytest.mark.filterwarnings("ignore")
def test_tracing(models: tuple[Denoiser, Denoiser]) -> None:
    for network in networks(models):
        traced = torch.jit.trace(network, (X, torch.tensor(0.1)), check_trace=False)
        assert max_error(traced(X, torch.tensor(0.2)), network(X, 0.2)) < 1e-5


@pytest.mark.parametrize("composed", [False, True])
def test_meta_device(composed: bool, models: tuple[Denoiser, Denoiser]) -> None:
    x = torch.empty(2, 3, 9, 10, device="meta")
    with pytest.raises(TypeError, match=r"x: dtype torch\.float64; accepted: torch\.float32, the network's"):
        Denoiser(composed=composed).to("meta")(x.double(), 0.1)
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


def test_the_fused_form_says_where_it_is(models: tuple[Denoiser, Denoiser]) -> None:
    fused = fuse(models[0], torch.bfloat16)
    assert (fused.device, fused.dtype) == (torch.device("cpu"), torch.bfloat16)
    with pytest.raises(ValueError, match="empty parameter list"):  # an optimiser has nothing to train
        torch.optim.Adam(fused.parameters())


SYNC = """
import copy, os, sys, torch
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
# Second derivatives pass through the sums of processes, too.
from fastden.nn import normalise
leaf = mine[:, :, :3, :3].clone().requires_grad_()
alone = whole[:, :, :3, :3].clone().requires_grad_()
norm = nn.SyncBatchNorm(3).double().train()
plain = nn.BatchNorm2d(3).double().train()
twice = []
for bn, x in ((norm, leaf), (plain, alone)):
    y = normalise(bn, x).pow(3).sum()
    (first,) = torch.autograd.grad(y, x, create_graph=True)
    twice.append(torch.autograd.grad(first.square().sum(), x)[0])
part = twice[1][:1] if rank == 0 else twice[1][1:]
assert (twice[0] - part).abs().max() < 1e-7 * part.abs().max(), (twice[0] - part).abs().max()
# One value a channel in all processes together.
try:
    normalise(norm, torch.ones(1 - rank, 3, 1, 1, dtype=torch.float64))
except ValueError as error:
    assert "Expected more than 1 value per channel when training" in str(error), error
else:
    raise AssertionError("no error for one value a channel")
# Nothing in all processes together: no NaN.
normalise(norm, torch.ones(0, 3, 1, 1, dtype=torch.float64))
assert norm.running_mean.isfinite().all(), norm.running_mean
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
# Blocks are shared among the processes, and the rest is whole: fuse() names the first of them, and its advice works.
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
one = random_network(dtype=torch.float64).eval()
two = copy.deepcopy(one)
for block in (two.res1, two.conv3):
    fully_shard(block, mesh=mesh)
fully_shard(two, mesh=mesh)
two(whole, 0.1)
try:
    fastden.fuse(two)
except ValueError as error:
    assert str(error).startswith("res1.reduce: its weight is a DTensor"), error
else:
    raise AssertionError("shared tensors were folded")
three = fastden.Denoiser().double()
three.load_state_dict(get_model_state_dict(two, options=StateDictOptions(full_state_dict=True)))
assert (fastden.fuse(three)(whole, 0.1) - one(whole, 0.1)).abs().max() < 1e-9
dist.barrier()
print("equal", flush=True)
dist.destroy_process_group()
os._exit(0)  # see tests/kernels/test_distributed.py
"""


def test_two_processes_normalise_as_one_and_share_the_weights() -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--no-python"]
    done = subprocess.run(
        [*command, sys.executable, "-c", SYNC], capture_output=True, text=True, timeout=400, check=False
    )
    assert done.stdout.count("equal") == 2, done.stderr[-3000:]
