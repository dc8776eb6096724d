"""The network with or without the input for the noise level, made from the other."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

from fastden.network.model import Denoiser
from tests.helpers import max_error, random_network, randomise


def test_adapt_keeps_the_estimator_and_draws_nothing() -> None:
    photo, before = Denoiser.from_pretrained("photo"), torch.get_rng_state()
    with torch.device("meta"):
        adapted = photo.adapt(noise_level_input=False).adapt(noise_level_input=True)
    assert photo.estimator is not None
    assert adapted.estimator is photo.estimator
    assert adapted.int8_ranges is None  # its weights are others
    assert adapted.out.weight.device.type == "cpu"
    assert torch.equal(torch.get_rng_state(), before)


def test_adapt_keeps_what_is_frozen() -> None:
    model = random_network()
    model.res1.requires_grad_(False)
    model.conv0.requires_grad_(False)
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    adapted = model.adapt(noise_level_input=False)
    assert {name for name, parameter in adapted.named_parameters() if not parameter.requires_grad} == frozen


class Own(Denoiser):
    """A user's network, with a setting of its own."""

    gain = 1.0

    def forward(self, x: Tensor, sigma: Any = None) -> Tensor:
        return self.gain * super().forward(x, sigma)


@pytest.mark.parametrize("composed", [False, True])
def test_adapt_keeps_what_no_state_dict_holds(composed: bool) -> None:
    model = Own(noise_level_input=False, composed=composed)
    randomise(model, 0).eval().to(memory_format=torch.channels_last)
    model.gain = 0.5
    model.conv1.bn.eps, model.conv1.bn.momentum = 0.01, 0.02
    model.conv2.train()
    model.conv3.relu = nn.LeakyReLU(0.2)
    model.res1 = nn.SyncBatchNorm.convert_sync_batchnorm(model.res1)
    model.res2.conv.padding_mode, model.res2.conv._reversed_padding_repeated_twice = "circular", [1] * 4
    called: list[str] = []
    model.res3.register_forward_hook(lambda *_: called.append("res3"))
    adapted, x = model.adapt(noise_level_input=True), torch.rand(1, 3, 9, 11)
    assert (type(adapted), adapted.composed, adapted.conv0.in_channels) == (Own, composed, 4)
    assert [part.training for part in adapted.modules()] == [part.training for part in model.modules()]
    assert adapted.conv1.bn.momentum == 0.02
    assert adapted.conv0.weight.is_contiguous(memory_format=torch.channels_last)
    model.conv2.eval()
    adapted.conv2.eval()
    assert max_error(adapted(x, 0.3), model(x)) < 1e-6
    assert called == ["res3", "res3"]
    assert model.noise_level_input is False
    back = adapted.adapt(noise_level_input=False)
    assert torch.equal(back(x), model(x))


@pytest.mark.parametrize("training", [False, True])
def test_adapt_ends_parametrisations_of_the_first_weight(training: bool) -> None:
    model = random_network(noise_level_input=False).requires_grad_(False).train(training)
    for part in (model.conv0, model.out):
        parametrizations.spectral_norm(part)
    model.conv0.parametrizations.weight.original.requires_grad_()
    state = copy.deepcopy(model.state_dict())
    adapted = model.adapt(noise_level_input=True)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert isinstance(adapted.conv0.weight, nn.Parameter)
    assert adapted.conv0.weight.requires_grad
    assert parametrize.is_parametrized(adapted.out, "weight")
    assert not adapted.out.parametrizations.weight.original.requires_grad
    assert adapted.conv0.training == training
    x = torch.rand(1, 3, 9, 11)
    assert max_error(adapted.eval()(x, 0.3), model.eval()(x)) < 1e-5


def test_adapt_refuses_a_first_layer_that_it_cannot_change() -> None:
    pruned, wrapped = random_network(), random_network()
    prune.l1_unstructured(pruned.conv0, "weight", amount=0.3)
    wrapped.conv0 = nn.Sequential(wrapped.conv0)
    for model, kind in ((pruned, "Conv2d"), (wrapped, "Sequential")):
        with pytest.raises(TypeError, match=rf"conv0: {kind}; accepted: a torch\.nn\.Conv2d that holds its weight"):
            model.adapt(noise_level_input=False)


@pytest.mark.parametrize("noise_level_input", [False, True])
def test_adapt(noise_level_input: bool) -> None:
    model = random_network(noise_level_input)
    other = model.adapt(not noise_level_input)
    x = torch.rand(1, 3, 9, 11)
    assert other.noise_level_input != noise_level_input
    assert not other.training
    assert model.adapt(noise_level_input) is model
    assert torch.equal(other.out.weight, model.out.weight)
    if not noise_level_input:
        # The added channel has zero weights: the function stays the same at every level.
        assert max_error(other(x, 0.3), model(x)) < 1e-5
    else:
        assert torch.equal(other.conv0.weight, model.conv0.weight[:, :3])
    with torch.no_grad():
        other.out.weight.zero_()
    assert model.out.weight.abs().max() > 0
    double = random_network(noise_level_input).double()
    double.conv3.conv.weight.data += 1e-12
    assert torch.equal(double.adapt(not noise_level_input).conv3.conv.weight, double.conv3.conv.weight)
