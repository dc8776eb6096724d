"""Training: its losses and rates, its metrics and its captured passes."""

from __future__ import annotations

import copy
import gc
import math

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

pytest.importorskip("lightning")
pytest.importorskip("pydantic")

from fastden.errors import UserError
from fastden.network.model import Denoiser
from fastden.ops.backends import interpreted
from fastden.training import denoise
from fastden.training.config import load_config
from fastden.training.denoise import DenoiserTraining
from tests.helpers import max_error, random_network
from tests.training.conftest import configuration

pytestmark = pytest.mark.usefixtures("quiet")


class TestModule:
    @pytest.mark.parametrize(
        ("step", "share"), [(0, 0.1), (4, 0.5), (9, 1.0), (30, 1.0), (60, 1.0), (80, 0.5), (90, 0.1464), (100, 0.0)]
    )
    def test_learning_rate(self, step: int, share: float) -> None:
        module = DenoiserTraining(Denoiser(), configuration(steps=100, warmup=9, decay=0.4))
        assert module.rate(step) == pytest.approx(share, abs=1e-4)

    def test_learning_rate_without_warm_up_or_decay(self) -> None:
        module = DenoiserTraining(Denoiser(), configuration(steps=10, warmup=0, decay=0))
        assert [module.rate(step) for step in range(10)] == pytest.approx([1] * 10)

    def test_losses(self) -> None:
        clean, output = torch.rand(2, 3, 4, 4), torch.rand(2, 3, 4, 4)
        sigma = torch.tensor([0.0, 50 / 255])
        squared = ((output - clean) ** 2).mean((1, 2, 3))
        expected = {
            "mse": squared.mean(),
            "l1": (output - clean).abs().mean(),
            "psnr": 3e-4 * (squared + (0.7 / 255) ** 2).log().mean(),
            "relative-mse": (squared[0] / (30 / 255) + squared[1] / (530 / 255)) / 2,
        }
        for name, value in expected.items():
            loss = DenoiserTraining(Denoiser(), configuration(loss=name)).loss(output, clean, sigma)
            assert loss.item() == pytest.approx(value.item(), rel=1e-5), name

    def test_quality_is_of_8_bits(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """As of files: what rounding removes costs nothing, what it enlarges costs a level."""
        module, seen = DenoiserTraining(Denoiser(), configuration()), {}
        monkeypatch.setattr(module, "log", lambda name, value, **_: seen.update({name: float(value.compute())}))
        clean = torch.randint(0, 255, (2, 3, 8, 8), generator=torch.Generator().manual_seed(0)) / 255
        error = torch.full_like(clean, 0.4 / 255)
        error[:, :, :4] = 0.6 / 255
        module.log_quality("val_psnr_25", clean + error, clean, torch.arange(2))
        assert seen["val_psnr_25"] == pytest.approx(10 * math.log10(255**2 / 0.5), abs=1e-3)

    def test_quality_of_a_picture_without_an_error(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """It is 60 dB, and pictures that do not count change nothing."""
        module, seen = DenoiserTraining(Denoiser(), configuration()), {}
        monkeypatch.setattr(module, "log", lambda name, value, **_: seen.update({name: float(value.compute())}))
        clean = torch.zeros(3, 3, 8, 8)
        output = clean.clone()
        output[1:] = 1.0
        module.log_quality("val_psnr_25", output, clean, torch.tensor([0, 1, -1]))
        assert seen["val_psnr_25"] == pytest.approx(30, abs=1e-4)

    @pytest.mark.parametrize("noise_level_input", [False, True])
    def test_forward_is_the_network(self, noise_level_input: bool) -> None:
        model = random_network(noise_level_input, composed=True)
        module = DenoiserTraining(model, configuration(noise_level_input=noise_level_input))
        x, sigma = torch.rand(2, 3, 21, 17), torch.tensor([0.1, 0.2])
        assert max_error(module(x, sigma), model(x, sigma if noise_level_input else None)) < 1e-5

    def test_backend(self) -> None:
        """The kernels of the configuration run the forward pass and the gradients."""
        pytest.importorskip("fastden.kernels.stem")
        model = random_network(composed=True).train()
        x, sigma = torch.rand(1, 3, 10, 14), torch.tensor([0.1])
        for backend, own in (("auto", False), ("torch", False), ("triton", interpreted())):
            module = DenoiserTraining(model, configuration(backend=backend))
            if backend == "triton" and not own:
                continue  # there is a GPU, but the tensors are on the CPU
            with profile(activities=[ProfilerActivity.CPU]) as found:
                module(x, sigma).square().mean().backward()
            names = {event.name for event in found.events()}
            assert ("fastden::conv_bn_relu_statistics" in names) == own, backend
            assert ("fastden::weight_gradient_stem" in names) == own, backend

    def test_a_backend_that_cannot_run(self) -> None:
        module = DenoiserTraining(random_network().train(), configuration(backend="cuda"))
        with pytest.raises(UserError, match=r"backend: backend 'cuda' was asked for and cannot run \w+ on"):
            module(torch.rand(1, 3, 10, 14), torch.tensor([0.1]))
        with pytest.raises(UserError, match=r"backend: 'cublas': .*'auto', 'torch', 'triton' or 'cuda'"):
            load_config(None, ["data=[photographs]", "output=run", "backend=cublas"])

    @pytest.mark.parametrize("composed", [False, True])
    def test_gradient_reaches_every_parameter(self, composed: bool) -> None:
        # With batch statistics the biases in front of BN have no gradient, as they should.
        for training, without in ((False, set()), (True, {"conv1.conv.bias", "conv2.conv.bias", "conv3.conv.bias"})):
            model = random_network(composed=composed, dtype=torch.float64).train(training)
            module = DenoiserTraining(model, configuration())
            clean, sigma = torch.rand(2, 3, 18, 18, dtype=torch.float64), torch.tensor([0.1, 0.2], dtype=torch.float64)
            module.loss(module(clean, sigma).double(), clean, sigma).backward()
            largest = {name: parameter.grad.abs().max().item() for name, parameter in model.named_parameters()}
            silent = {name for name, value in largest.items() if value < 1e-9 * max(largest.values())}
            assert silent == without

    def test_momentum_of_statistics(self) -> None:
        model = DenoiserTraining(Denoiser(), configuration(bn_momentum=0.07)).model
        assert model.conv1.bn.momentum == model.res3.bn3.momentum == 0.07


def test_no_collection_while_graphs_are_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    """It may destroy the graphs of the steps before BN froze, and CUDA then ends the capture."""
    seen = []
    monkeypatch.setattr(torch.cuda, "make_graphed_callables", lambda *_: seen.append(gc.isenabled()))
    denoise.capture(random_network(composed=True), torch.rand(1, 4, 20, 16))
    assert seen == [False]
    assert gc.isenabled()


@pytest.mark.gpu
@pytest.mark.parametrize("frozen", [False, True])
def test_captured_passes_are_those_of_the_network(frozen: bool) -> None:
    """Results, gradients and, behind the capture, running statistics."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    model = random_network(composed=True).cuda().train()
    for module in model.modules():
        if frozen and isinstance(module, torch.nn.BatchNorm2d):
            module.eval()
    other = copy.deepcopy(model)
    x = torch.rand(2, 4, 20, 16).cuda()
    graphs = denoise.capture(model, torch.rand_like(x))
    assert all(torch.equal(one, two) for one, two in zip(model.buffers(), other.buffers(), strict=True))
    one, two = graphs(x), other.forward_padded(x)
    assert max_error(one, two) < 1e-5
    for y in (one, two):
        y.square().mean().backward()
    for (name, left), right in zip(model.named_parameters(), other.parameters(), strict=True):
        assert left.grad is not None
        assert right.grad is not None
        torch.testing.assert_close(left.grad, right.grad, rtol=1e-3, atol=1e-5, msg=name)
    for left, right in zip(model.buffers(), other.buffers(), strict=True):
        torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-5)
