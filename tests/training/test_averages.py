"""Averages of the weights: PyTorch's own, without its waits."""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.optim.swa_utils import AveragedModel

pytest.importorskip("lightning")
pytest.importorskip("pydantic")

from fastden.training import callbacks, trainer
from fastden.training.denoise import DenoiserTraining
from tests.helpers import random_network
from tests.training.conftest import configuration

pytestmark = pytest.mark.usefixtures("quiet")


def test_averages_are_made_on_the_device_of_the_run() -> None:
    """Lightning moves the module there only afterwards."""
    training = DenoiserTraining(random_network(), configuration())
    averages = callbacks.Averages(0.9)
    stub: Any = SimpleNamespace(strategy=SimpleNamespace(root_device=torch.device("meta")))
    averages.setup(stub, training, "fit")
    assert averages._average_model is not None
    assert {value.device.type for value in averages._average_model.state_dict().values()} == {"meta"}
    assert training.device.type == "cpu"


def test_averages_are_those_of_pytorch() -> None:
    """And go on from a checkpoint."""
    average = torch.optim.swa_utils.get_ema_multi_avg_fn(0.9)

    @torch.no_grad()
    def update(old: Any, new: Any, count: Any) -> None:
        if old[0].is_floating_point():
            average(old, new, count)
        else:
            for one, two in zip(old, new, strict=True):
                one.copy_(two)

    model = torch.nn.Sequential(torch.nn.Conv2d(2, 3, 1), torch.nn.BatchNorm2d(3))
    settings: Any = {"multi_avg_fn": update, "use_buffers": True}
    expected, averages = AveragedModel(model, **settings), callbacks._AveragedModel(model, **settings)
    for step in range(4):
        model(torch.randn(1, 2, 4, 4))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter))
        if step == 2:
            averages = callbacks._AveragedModel(model, **settings)
            averages.load_state_dict(expected.state_dict())
        expected.update_parameters(model)
        averages.update_parameters(model)
        for name, value in expected.state_dict().items():
            torch.testing.assert_close(averages.state_dict()[name], value, rtol=0, atol=0, msg=name)


def test_averages_look_for_the_weights_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are those of PyTorch where tensors are replaced and shared, too."""
    layer = torch.nn.Linear(2, 2)
    batch_norm = torch.nn.BatchNorm1d(2)
    model = torch.nn.Sequential(layer, batch_norm, torch.nn.Linear(2, 2))
    model[2].weight = layer.weight
    settings: Any = {"multi_avg_fn": callbacks.Averages(0.5)._kwargs["multi_avg_fn"], "use_buffers": True}
    expected, averages = AveragedModel(model, **settings), callbacks._AveragedModel(model, **settings)
    walks: list[int] = []
    walk = torch.nn.Module.named_modules

    def walking(*arguments: Any, **options: Any) -> Any:
        walks.append(step)
        return walk(*arguments, **options)

    for step in range(5):
        with torch.no_grad():
            layer.weight.add_(torch.randn(2, 2))
        if step == 3:
            layer.load_state_dict({name: value + 1 for name, value in layer.state_dict().items()}, assign=True)
            model[2].weight = layer.weight
            batch_norm.running_mean = torch.randn(2)
        with monkeypatch.context() as patch:
            patch.setattr(torch.nn.Module, "named_modules", walking)
            averages.update_parameters(torch.nn.ModuleDict({"model": model}))
        expected.update_parameters(model)
        for name, value in expected.state_dict().items():
            torch.testing.assert_close(averages.state_dict()[name], value, rtol=0, atol=0, msg=name)
    assert set(walks) == {0, 1}, "PyTorch's own takes in the first"
    layer.weight.data.fill_(1)
    other = copy.deepcopy(model)
    averages.update_parameters(other)
    expected.update_parameters(other)
    torch.testing.assert_close(averages.module[0].weight, expected.module[0].weight, rtol=0, atol=0)


@pytest.mark.gpu
def test_no_step_waits_for_averages() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    model = random_network().cuda()
    averages = callbacks._AveragedModel(
        model, multi_avg_fn=callbacks.Averages(0.9)._kwargs["multi_avg_fn"], use_buffers=True
    )
    averages.update_parameters(model)
    torch.cuda.set_sync_debug_mode("error")
    try:
        averages.update_parameters(model)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_averages_on_a_gpu(photographs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    seen: set[str] = set()
    update = callbacks._AveragedModel.update_parameters

    def updating(self: callbacks._AveragedModel, model: torch.nn.Module) -> None:
        seen.update(value.device.type for part in (self, model) for value in part.state_dict().values())
        update(self, model)

    monkeypatch.setattr(callbacks._AveragedModel, "update_parameters", updating)
    settings = {"data": [photographs], "output": tmp_path, "steps": 2, "epoch_steps": 1, "batch": 2, "crop": 30}
    trainer.train(configuration(**settings, validation=2), accelerator="gpu", devices="1")
    assert seen == {"cuda"}
