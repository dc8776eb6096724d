"""Layers that other code watched, wrapped, replaced or changed: blocks call them, and fuse() folds or refuses them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from types import MethodType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.ao.quantization import disable_observer, get_default_qat_qconfig, prepare_qat
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize, prune, spectral_norm, weight_norm
from torch.utils.checkpoint import checkpoint

from fastden.network.fused import fuse
from fastden.network.model import Denoiser
from fastden.network.padding import pad_image
from fastden.nn import Bottleneck, ConcatConvBNReLU, ConvBNReLU, Upsample
from tests.helpers import max_error, random_network

X = torch.rand(2, 3, 10, 13, generator=torch.Generator().manual_seed(5))
HOOKS = [f"register_{kind}" for kind in ("forward_hook", "forward_pre_hook", "full_backward_hook")]
HOOKS.append("register_full_backward_pre_hook")


def by_layers(model: Denoiser, x: Tensor, sigma: float = 0.1) -> Tensor:
    """The network by calls of its layers alone."""

    def block(part: ConvBNReLU | ConcatConvBNReLU, y: Tensor) -> Tensor:
        return part.bn(part.conv(y)).relu()

    def bottleneck(part: Bottleneck, y: Tensor) -> Tensor:
        z = part.bn1(part.reduce(y)).relu()
        z = part.bn2(part.conv(z)).relu()
        return (y + part.bn3(part.expand(z))).relu()

    padded = pad_image(torch.cat([x, torch.full_like(x[:, :1], sigma)], 1))
    first = model.conv0(padded)
    skip = bottleneck(model.res1, block(model.conv1, first))
    low = bottleneck(model.res2, block(model.conv2, skip))
    features = bottleneck(model.res3, block(model.conv3, torch.cat([skip, model.up2(low)], 1)))
    y = padded[:, :3, 3:-3, 3:-3] + model.out(torch.cat([first, model.up3(features)], 1))
    return y[:, :, : x.shape[2], : x.shape[3]]


class Lora(nn.Module):
    """A low-rank adapter around a layer, as a module of its own."""

    def __init__(self, layer: nn.Conv2d) -> None:
        super().__init__()
        self.layer = layer
        self.down = nn.Conv2d(layer.in_channels, 2, layer.kernel_size, layer.stride, layer.padding, bias=False)
        self.up = nn.Conv2d(2, layer.out_channels, 1, bias=False)

    @property
    def weight(self) -> Tensor:
        return self.layer.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + 0.1 * self.up(self.down(x))


class LoraConv(nn.Conv2d):
    """An adapter as a subclass, whose ``weight`` is the frozen one."""

    def forward(self, x: Tensor) -> Tensor:
        return 0.9 * super().forward(x)


def subclass(layer: nn.Conv2d) -> nn.Conv2d:
    other = copy.deepcopy(layer)
    other.__class__ = LoraConv
    return other


def circular(layer: nn.Conv2d) -> nn.Conv2d:
    layer.padding_mode = "circular"
    layer._reversed_padding_repeated_twice = [size for size in reversed(layer.padding) for _ in (0, 1)]
    return layer


def dilated(layer: nn.Conv2d) -> nn.Conv2d:
    layer.dilation = (2, 2)
    layer.padding = (2, 2)
    return layer


def bound_forward(layer: nn.Conv2d) -> nn.Conv2d:
    plain = layer.forward
    layer.forward = lambda x: 0.9 * plain(x)
    return layer


def bound_conv_forward(layer: nn.Conv2d) -> nn.Conv2d:
    def forward(self: nn.Conv2d, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.conv2d(x, 0.9 * weight, bias, self.stride, self.padding)

    layer._conv_forward = MethodType(forward, layer)
    return layer


def hooked(layer: nn.Conv2d) -> nn.Conv2d:
    layer.register_forward_hook(lambda module, inputs, result: 0.9 * result)
    return layer


def own_call(layer: nn.Conv2d) -> nn.Conv2d:
    class Called(nn.Conv2d):
        def __call__(self, *inputs: Tensor) -> Tensor:
            return 0.9 * super().__call__(*inputs)

    layer.__class__ = Called
    return layer


CHANGES: dict[str, Callable[[nn.Conv2d], nn.Module]] = {
    "wrapper": Lora,
    "subclass": subclass,
    "sequence": lambda layer: nn.Sequential(layer, nn.Dropout(0.0), nn.Hardtanh(-0.5, 0.5)),
    "own forward": bound_forward,
    "own _conv_forward": bound_conv_forward,
    "own __call__": own_call,
    "hook": hooked,
    "circular": circular,
}
PLACES = ("conv0", "conv1.conv", "res1.reduce", "res2.conv", "res3.expand", "conv2.conv", "conv3.conv", "out")


def changed(change: str, places: tuple[str, ...] = PLACES, *, composed: bool = False) -> Denoiser:
    model = random_network(composed=composed)
    for place in places:
        parent, _, name = place.rpartition(".")
        setattr(model.get_submodule(parent), name, CHANGES[change](model.get_submodule(place)))
    return model


@pytest.mark.parametrize("composed", [False, True])
@pytest.mark.parametrize("change", CHANGES)
def test_changed_layers_take_effect(change: str, composed: bool) -> None:
    model = changed(change, composed=composed)
    with torch.no_grad():
        found = model(X, 0.1)
        assert max_error(found, by_layers(model, X)) < 1e-5
        assert max_error(found, random_network()(X, 0.1)) > 1e-4


@pytest.mark.parametrize("change", sorted(set(CHANGES) - {"circular"}))
@pytest.mark.parametrize("place", ["conv0", "res2.conv"])
def test_fuse_refuses_what_it_cannot_fold(change: str, place: str) -> None:
    with pytest.raises(ValueError, match=rf"{place}: \w+ .*; accepted by fuse\(\): the layers"):
        fuse(changed(change, (place,)))


def test_circular_padding_is_refused_where_there_is_padding() -> None:
    with pytest.raises(ValueError, match=r"conv2\.conv: Conv2d is not the convolution"):
        fuse(changed("circular", ("conv2.conv",)))


@pytest.mark.parametrize("composed", [False, True])
@pytest.mark.parametrize("kind", HOOKS)
def test_hooks_of_every_layer_fire(kind: str, composed: bool) -> None:
    model = random_network(composed=composed)
    leaves = {name: part for name, part in model.named_modules() if not list(part.children())}
    called: set[str] = set()
    for name, part in leaves.items():
        getattr(part, kind)(lambda *_, name=name: called.add(name))
    x = X.clone().requires_grad_()
    model(x, 0.1).sum().backward()
    assert called == set(leaves)


@pytest.mark.parametrize("name", ["conv1", "res1", "up3", "conv3"])
def test_hooks_of_blocks_fire_where_the_network_is_composed(name: str) -> None:
    model = random_network(composed=True)
    model.get_submodule(name).register_forward_hook(lambda module, inputs, result: 0 * result)
    plain = random_network()
    plain.get_submodule(name).register_forward_hook(lambda module, inputs, result: 0 * result)
    with torch.no_grad():
        assert max_error(model(X, 0.1), plain(X, 0.1)) < 1e-5
    with pytest.raises(ValueError, match=rf"{name}: \w+ has hooks that change its result"):
        fuse(model)


def test_hooks_on_all_modules_fire() -> None:
    model, called = random_network(), set()
    handle = nn.modules.module.register_module_forward_hook(lambda module, inputs, result: called.add(module))
    try:
        with torch.no_grad():
            model(X, 0.1)
    finally:
        handle.remove()
    assert {part for part in model.modules() if not list(part.children())} <= called


def test_watching_hooks_do_not_keep_fuse_from_folding() -> None:
    model = random_network().train()
    seen = []
    for part in model.modules():
        part.register_forward_hook(lambda module, inputs, result: seen.append(type(module)))
    state = copy.deepcopy(model.state_dict())
    fused = fuse(model)
    assert seen
    assert all(part.training for part in model.modules())
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    with torch.no_grad():
        assert torch.equal(fused(X, 0.1), fuse(random_network())(X, 0.1))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("composed", [False, True])
@pytest.mark.parametrize("norm", ["spectral_norm", "weight_norm", "prune", "parametrized spectral_norm"])
def test_reparametrised_weights(norm: str, composed: bool) -> None:
    """Their weights get gradients, and a loaded state takes effect at once, in the fused form too."""

    def made(seed: int) -> Denoiser:
        model = random_network(composed=composed, seed=seed).train()
        for part in list(model.modules()):
            if type(part) is not nn.Conv2d:
                continue
            if norm == "spectral_norm":
                spectral_norm(part)
            elif norm == "weight_norm":
                weight_norm(part)
            elif norm == "prune":
                prune.l1_unstructured(part, "weight", amount=0.3)
            else:
                parametrizations.spectral_norm(part)
        return model

    model, other = made(1), made(2)
    model(X, 0.1).square().mean().backward()
    silent = {"conv1.conv.bias", "conv2.conv.bias", "conv3.conv.bias"}
    missing = [name for name, p in model.named_parameters() if name not in silent and p.grad is None]
    assert not missing
    model.load_state_dict(other.state_dict())
    model.eval()
    # This is before anything calls the layers again.
    fused = fuse(model)
    with torch.no_grad():
        expected = by_layers(other.eval(), X)
        assert max_error(model(X, 0.1), expected) < 1e-5
        assert max_error(fused(X, 0.1), expected) < 1e-5


def test_adapters_by_parametrisation() -> None:
    class Add(nn.Module):
        def __init__(self, weight: Tensor) -> None:
            super().__init__()
            self.delta = nn.Parameter(torch.randn_like(weight) * 0.05)

        def forward(self, weight: Tensor) -> Tensor:
            return weight + self.delta

    for composed in (False, True):
        model = random_network(composed=composed).requires_grad_(False)
        for part in (model.conv0, model.conv1.conv, model.res3.conv, model.up2):
            parametrize.register_parametrization(part, "weight", Add(part.weight))
        y = model(X, 0.1)
        y.sum().backward()
        assert model.conv0.parametrizations.weight[0].delta.grad is not None
        with torch.no_grad():
            assert max_error(y, by_layers(model, X)) < 1e-5
            assert max_error(fuse(model)(X, 0.1), y) < 1e-5


class Counted(nn.Module):
    """A parametrisation that counts its calls, and gives another tensor in each."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, tensor: Tensor) -> Tensor:
        self.calls += 1
        return tensor * (1 + 0.1 * (self.calls - 1))


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("composed", [False, True])
def test_a_call_reads_each_tensor_once(composed: bool, training: bool) -> None:
    model = random_network(composed=composed).train(training)
    expected = copy.deepcopy(model)(X, 0.1)
    counts = {}
    for name, part in list(model.named_modules()):
        for tensor in ("weight", "bias"):
            if isinstance(getattr(part, tensor, None), nn.Parameter):
                counts[f"{name}.{tensor}"] = counted = Counted()
                parametrize.register_parametrization(part, tensor, counted, unsafe=True)
                counted.calls = 0
    assert torch.equal(model(X, 0.1), expected)
    assert {name: counted.calls for name, counted in counts.items()} == dict.fromkeys(counts, 1)
    checkpoint(model, X.clone().requires_grad_(), 0.1, use_reentrant=False)
    assert {counted.calls for counted in counts.values()} == {2}


@pytest.mark.parametrize("composed", [False, True])
def test_parametrised_layers_compile(composed: bool) -> None:
    model = random_network(composed=composed)
    parametrizations.spectral_norm(model.conv0)
    for part in (model.conv1.bn, model.out):
        parametrize.register_parametrization(part, "weight", Drop())
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert max_error(compiled(X, 0.1), model(X, 0.1)) < 1e-6


class Drop(nn.Module):
    """A parametrisation that draws in training."""

    def forward(self, weight: Tensor) -> Tensor:
        return F.dropout(weight, 0.5, self.training)


def test_fusing_reads_weights_as_evaluation_does() -> None:
    model = random_network().train()
    parametrize.register_parametrization(model.conv3.conv, "weight", Drop(), unsafe=True)
    parametrize.register_parametrization(model.conv1.bn, "weight", Drop(), unsafe=True)
    parametrizations.spectral_norm(model.conv2.conv)
    state, random_state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    fused = fuse(model)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert all(part.training for part in model.modules())
    with torch.no_grad():
        assert max_error(fused(X, 0.1), model.eval()(X, 0.1)) < 1e-5


@pytest.mark.filterwarnings("ignore")
def test_quantisation_aware_training_observes() -> None:
    model = random_network().train()
    for part in model.modules():
        if type(part) is nn.Conv2d:
            part.qconfig = get_default_qat_qconfig("x86")
    prepare_qat(model, inplace=True)
    with torch.no_grad():
        model(X, 0.1)
        model.eval().apply(disable_observer)
        assert max_error(model(X, 0.1), by_layers(model, X)) < 1e-4
    observer = model.res1.conv.weight_fake_quant.activation_post_process
    assert bool(observer.max_val.isfinite().all())
    with pytest.raises(ValueError, match=r"accepted by fuse\(\)"):
        fuse(model)


def unused_statistics(channels: int) -> nn.Module:
    """Running statistics exist, but training does not move them."""
    norm = nn.BatchNorm2d(channels)
    norm.track_running_stats = False
    return norm


NORMS: dict[str, Callable[[int], nn.Module]] = {
    "group": lambda channels: nn.GroupNorm(4, channels),
    "instance": lambda channels: nn.InstanceNorm2d(channels, affine=True),
    "identity": lambda channels: nn.Identity(),
    "without statistics": lambda channels: nn.BatchNorm2d(channels, track_running_stats=False),
    "without weights": lambda channels: nn.BatchNorm2d(channels, affine=False),
    "unused statistics": unused_statistics,
    "cumulative": lambda channels: nn.BatchNorm2d(channels, momentum=None),
}


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("training", [False, True])
def test_other_normalisations(norm: str, training: bool) -> None:
    model = random_network(composed=True)
    model.conv1.bn = NORMS[norm](128)
    model.res3.bn1 = NORMS[norm](64)
    model.train(training)
    plain = copy.deepcopy(model)
    assert max_error(model(X, 0.1), by_layers(plain, X)) < 1e-4
    for (name, one), other in zip(model.named_buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4, msg=name)
    if norm in ("cumulative", "without weights", "unused statistics"):
        model.eval()
        with torch.no_grad():
            assert max_error(fuse(model)(X, 0.1), model(X, 0.1)) < 1e-4
    else:
        with pytest.raises(ValueError, match=r"conv1\.bn: \w+ (is no BatchNorm2d|has no running statistics)"):
            fuse(model)


def test_synchronised_normalisation_fuses_in_evaluation() -> None:
    model = random_network(composed=True)
    expected = model(X, 0.1)
    synchronised = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    for training in (False, True):
        synchronised.train(training)
        fuses = (synchronised._composes(), synchronised.conv2._fuses(X), synchronised.res1._fuses(X))
        assert fuses == (not training,) * 3
    assert torch.equal(synchronised.eval()(X, 0.1), expected)


@pytest.mark.parametrize("composed", [False, True])
def test_another_activation(composed: bool) -> None:
    model, activation = random_network(composed=composed), nn.PReLU(init=0.9)
    plain = model(X, 0.1)
    model.conv1.relu = model.conv3.relu = activation
    assert max_error(model(X, 0.1), plain) > 1e-3
    block, (a, b) = model.conv3, (torch.rand(1, 128, 4, 5), torch.rand(1, 32, 4, 5))
    assert max_error(block(a, b), activation(block.bn(block.conv(torch.cat([a, b], 1))))) < 1e-6
    with pytest.raises(ValueError, match=r"conv1: ConvBNReLU has no ReLU"):
        fuse(model)


@pytest.mark.parametrize("composed", [False, True])
def test_update_bn(composed: bool) -> None:
    model = Denoiser(noise_level_input=False, composed=composed)
    averaged = torch.optim.swa_utils.AveragedModel(model)
    loader = [X, X.flip(3) * 0.5, X.square()]
    torch.optim.swa_utils.update_bn(loader, averaged)
    first = averaged.module.conv0
    outputs = [averaged.module.conv1.conv(first(pad_image(x))) for x in loader]
    means = torch.stack([y.mean((0, 2, 3)) for y in outputs]).mean(0)
    assert max_error(averaged.module.conv1.bn.running_mean, means) < 1e-5


@pytest.mark.parametrize("training", [False, True])
def test_blocks_are_traced_to_their_layers(training: bool) -> None:
    for block, inputs in (
        (ConvBNReLU(3, 5), (X,)),
        (ConcatConvBNReLU(3, 3, 5), (X, X)),
        (Bottleneck(3, 2), (X,)),
        (Upsample(3, 2), (X,)),
    ):
        block.train(training)
        graph = torch.fx.symbolic_trace(block)
        assert max_error(graph(*inputs), copy.deepcopy(block)(*inputs)) < 1e-5
        net = torch.fx.symbolic_trace(nn.Sequential(block)) if len(inputs) == 1 else graph
        assert len(list(net.graph.nodes)) > 2


@pytest.mark.parametrize(
    "change",
    [
        lambda block: dilated(block.conv),
        lambda block: setattr(block.conv, "stride", (2, 1)),
        lambda block: setattr(block.conv, "padding", (0, 1)),
        lambda block: setattr(block.conv, "padding", "same"),
        lambda block: setattr(block, "conv", nn.Conv2d(3, 5, (1, 3), padding=(0, 1))),
        lambda block: setattr(block, "conv", nn.Conv2d(3, 6, 3, padding=1, groups=3)),
        lambda block: setattr(block, "conv", nn.LazyConv2d(5, 3)),
    ],
)
def test_geometry_that_the_operator_has_not(change: Callable[[Any], Any]) -> None:
    block = ConvBNReLU(3, 5).eval()
    change(block)
    if getattr(block.conv, "groups", 1) == 3:
        block.bn = nn.BatchNorm2d(6).eval()
    with torch.no_grad():
        assert max_error(block(X), block.bn(block.conv(X)).relu()) < 1e-6


def test_upsampling_that_the_operator_has_not() -> None:
    block = Upsample(3, 2)
    block.output_padding = (1, 1)
    with torch.no_grad():
        expected = F.conv_transpose2d(X, block.weight, block.bias, 2, 1, 1)
        assert torch.equal(block(X), expected)


def test_a_changed_block_is_refused() -> None:
    model = random_network()
    model.res1 = nn.Sequential(model.res1, nn.Identity())
    with pytest.raises(ValueError, match=r"res1: Sequential is not fastden's Bottleneck; accepted by fuse\(\)"):
        fuse(model)

    class Clamped(Denoiser):
        def forward(self, x: Tensor, sigma: Any = None) -> Tensor:
            return super().forward(x, sigma).clamp(0, 1)

    with pytest.raises(ValueError, match=r"model: Clamped is not fastden's Denoiser"):
        fuse(Clamped())

    class ClampedInside(Denoiser):
        def forward_padded(self, x: Tensor) -> Tensor:
            return super().forward_padded(x).clamp(0, 1)

    with pytest.raises(ValueError, match=r"model: ClampedInside has a forward_padded of its own"):
        fuse(ClampedInside())
