"""Joint training: runs of both kinds, what stays frozen, and resumption."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("lightning")

from fastden.errors import UserError
from fastden.joint import FrozenTask
from fastden.network.model import Denoiser
from fastden.training import trainer
from fastden.training.config import JointConfig, load_config
from fastden.training.denoise import white_noise
from fastden.training.joint_training import VALIDATION_SIGMAS, JointTraining
from fastden.training.tasks import Task, load_task
from tests.training.conftest import NETWORKS, Run, weights

pytestmark = pytest.mark.usefixtures("quiet")


class TestRun:
    @pytest.mark.parametrize(("kind", "metric"), [("classify", "top1"), ("segment", "miou")])
    def test_trains_logs_and_saves(self, joint: Run, tmp_path: Path, kind: str, metric: str) -> None:
        model = joint(tmp_path, kind)
        assert bool(Denoiser.from_pretrained(model)(torch.rand(1, 3, 20, 20), 0.1).isfinite().all())
        columns = (tmp_path / "log" / "metrics.csv").read_text().splitlines()[0].split(",")
        assert {f"val_{metric}_30", f"val_{metric}_60", "val_psnr_30", "val_psnr_60"} <= set(columns)
        config = load_config(model / "train.yaml", [])
        assert isinstance(config, JointConfig)
        assert config.objective == f"joint-{kind}"

    @pytest.mark.parametrize(
        ("network", "ema"), [("classifier", 0.5), ("indexed", 0.9), ("indexed", 0.999), ("indexed", 0.9999)]
    )
    def test_network_stays_as_it_is(
        self, joint: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, network: str, ema: float
    ) -> None:
        """Parameters, statistics, indices and masks keep every bit, in validation too, and are in no checkpoint."""
        seen: list[JointTraining] = []
        before: list[dict[str, torch.Tensor]] = []
        validated: list[bool] = []
        start, validate = JointTraining.__init__, JointTraining.validation_step

        def unchanged(module: JointTraining) -> bool:
            return all(torch.equal(value, before[0][name]) for name, value in module.task.state_dict().items())

        def watching(self: JointTraining, *arguments: Any) -> None:
            start(self, *arguments)
            seen.append(self)
            before.append(copy.deepcopy(self.task.state_dict()))

        def validating(self: JointTraining, *arguments: Any) -> None:
            validated.append(unchanged(self))
            validate(self, *arguments)

        monkeypatch.setattr(JointTraining, "__init__", watching)
        monkeypatch.setattr(JointTraining, "validation_step", validating)
        joint(tmp_path, network=f"{NETWORKS}:{network}", ema=ema)
        (module,) = seen
        assert unchanged(module)
        assert validated == [True, True]
        assert all(parameter.grad is None for parameter in module.task.parameters())
        saved = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=False)
        for key in ("state_dict", "current_model_state"):
            assert saved[key].keys() == {f"model.{name}" for name in module.model.state_dict()}
        assert saved["averaging_state"].keys() == {"n_averaged"}

    def test_a_checkpoint_of_an_earlier_version_goes_on(self, joint: Run, tmp_path: Path) -> None:
        """It holds the network twice, once with averaged buffers."""
        network = f"{NETWORKS}:indexed"
        expected = weights(joint(tmp_path / "whole", network=network))
        joint(tmp_path / "parts", network=network, minutes=0)
        file = tmp_path / "parts" / "checkpoints" / "last.ckpt"
        saved = torch.load(file, weights_only=False)
        del saved["fastden_task"]
        for key in ("state_dict", "current_model_state"):
            for name, value in load_task(network).network.state_dict().items():
                saved[key][f"task.network.{name}"] = torch.zeros_like(value)
        torch.save(saved, file)
        resumed = weights(joint(tmp_path / "parts", network=network, resume=True))
        assert all(torch.equal(resumed[name], value) for name, value in expected.items())

    def test_a_run_of_an_earlier_version_keeps_its_crop(self, joint: Run, tmp_path: Path) -> None:
        """It had 224 where its file names none; by the name of efficientnet-lite1 that is 240 now."""
        text = f"objective: joint-classify\ndata: [x]\noutput: {tmp_path}\nnetwork: efficientnet-lite1\n"
        own = tmp_path / "own.yaml"
        own.write_text(text)
        config = load_config(own, [])
        assert config.crop == 240
        (tmp_path / "train.yaml").write_text(f"{text}crop: 224\n")
        trainer._check_settings(config)
        assert config.crop == 224
        with pytest.raises(UserError, match=r"crop: 240, was 224"):
            trainer._check_settings(load_config(own, ["crop=240"]))

    def test_a_run_of_an_earlier_version_tells_of_its_pictures(
        self, joint: Run, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        joint(tmp_path, minutes=0, steps=6)
        file = tmp_path / "checkpoints" / "last.ckpt"
        saved = torch.load(file, weights_only=False)
        del saved["fastden_pictures"]
        torch.save(saved, file)
        for told in (True, False):
            caplog.clear()
            joint(tmp_path, resume=True, minutes=0, steps=6)
            assert ("above 34 pixels are scaled down" in caplog.text) is told

    def test_a_network_with_other_weights_is_no_resumption(self, joint: Run, tmp_path: Path) -> None:
        file = tmp_path / "own.py"
        file.write_text(Path(NETWORKS).read_text())
        joint(tmp_path / "run", network=f"{file}:indexed", minutes=0)
        file.write_text(Path(NETWORKS).read_text().replace("manual_seed(5)", "manual_seed(4)"))
        with pytest.raises(
            UserError, match=r"resume: the weights of network .*own\.py:indexed are others than the run"
        ):
            joint(tmp_path / "run", network=f"{file}:indexed", resume=True)

    @pytest.mark.parametrize("kind", ["classify", "segment"])
    def test_the_metric_is_of_the_predictions(self, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Labels that are the network's own predictions are all right, and others that are none of them all wrong."""
        if kind == "classify":
            task = Task(torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten()), 3, "classification")
        else:
            task = Task(torch.nn.Identity(), 3, "segmentation")
        settings = {"objective": f"joint-{kind}", "data": ["x"], "output": tmp_path, "network": "x:y"}
        module = JointTraining(Denoiser().eval(), JointConfig.model_validate(settings), task)
        for name in ("log", "log_quality", "log_picture"):
            monkeypatch.setattr(module, name, lambda *_, **__: None)
        clean = torch.rand(6, 3, 20, 20, generator=torch.Generator().manual_seed(1))
        clean[:, :, :, :10] *= torch.eye(3).repeat(2, 1)[:, :, None, None]  # red, green and blue ones
        clean[:, :, :, 10:] *= torch.eye(3).repeat(2, 1)[:, :, None, None].flip(1)
        clean[:, :, :, 10:] *= 0.1
        for sigma, metric in zip(VALIDATION_SIGMAS, module.metrics, strict=True):
            level = torch.full((6,), sigma / 255)
            noisy = clean + sigma / 255 * white_noise(clean, torch.arange(6))
            with torch.no_grad():
                own = task.network(module(noisy, level)).argmax(1)
                assert {0, 2} <= set(own.flatten().tolist())
                for labels, share in ((own, 1.0), ((own + 1) % 3, 0.0)):
                    metric.reset()
                    module.validation_step({"clean": clean, "label": labels, "number": torch.arange(6)}, 0)
                    assert float(metric.compute()) == share

    def test_the_weight_of_the_task_counts(self, joint: Run, tmp_path: Path) -> None:
        alone = weights(joint(tmp_path / "0", weight=0.0))
        together = weights(joint(tmp_path / "1", weight=10.0))
        assert not torch.equal(alone["out.weight"], together["out.weight"])

    def test_blend_goes_back_part_of_the_way(self, joint: Run, tmp_path: Path) -> None:
        start = tmp_path / "start"
        Denoiser().save_pretrained(start)
        whole = weights(joint(tmp_path / "1", init=str(start)))
        half = weights(joint(tmp_path / "2", init=str(start), blend=0.5))
        for name, value in weights(start).items():
            if value.is_floating_point():
                torch.testing.assert_close(half[name], (value + whole[name]) / 2, msg=name)
        assert not torch.equal(half["out.weight"], whole["out.weight"])

    @pytest.mark.parametrize("network", ["classifier", "drawing"])
    def test_resumed_run_equals_the_uninterrupted_one(
        self, joint: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, network: str
    ) -> None:
        """With a random preprocess too."""
        settings: dict[str, Any] = {"network": f"{NETWORKS}:{network}", "weight": 1.0, "lr": 1e-2}
        expected = weights(joint(tmp_path / "whole", **settings))
        step = JointTraining.training_step

        def failing(self: JointTraining, batch: dict[str, torch.Tensor], index: int) -> torch.Tensor:
            if self.global_step == 3:
                raise RuntimeError("power cut")
            return step(self, batch, index)

        with monkeypatch.context() as patch:
            patch.setattr(JointTraining, "training_step", failing)
            with pytest.raises(RuntimeError, match="power cut"):
                joint(tmp_path / "parts", **settings)
        resumed = weights(joint(tmp_path / "parts", resume=True, **settings))
        assert all(torch.equal(resumed[name], value) for name, value in expected.items())

    def test_compiled_equals_eager(self, joint: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        settings: dict[str, Any] = {"steps": 1, "epoch_steps": 1, "validation": 0, "lr": 1e-6, "ema": 0.0}
        eager = weights(joint(tmp_path / "eager", **settings))
        compile = torch.compile
        monkeypatch.setattr(torch, "compile", lambda function: compile(function, backend="aot_eager", fullgraph=True))
        compiled = weights(joint(tmp_path / "compiled", compile=True, **settings))
        for name, value in eager.items():
            torch.testing.assert_close(compiled[name], value, rtol=0, atol=3e-6, msg=name)

    def test_diverged_run_keeps_the_batch_and_the_checkpoint(
        self, joint: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from safetensors.torch import load_file

        forward = FrozenTask.forward
        calls = []

        def sick(self: FrozenTask, images: torch.Tensor) -> torch.Tensor:
            if torch.is_grad_enabled():
                calls.append(images)
            return forward(self, images) * (float("nan") if len(calls) == 4 else 1)

        monkeypatch.setattr(FrozenTask, "forward", sick)
        with pytest.raises(UserError, match=r"the loss is nan at step 3; .*nonfinite-step-3-rank-0\.safetensors"):
            joint(tmp_path, validation=0)
        batch = load_file(tmp_path / "nonfinite-step-3-rank-0.safetensors")
        assert set(batch) == {"clean", "gray", "label", "noisy", "level"}
        assert batch["noisy"].shape == (2, 3, 30, 30)
        saved = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=False)
        assert saved["global_step"] == 2
        assert all(bool(value.isfinite().all()) for value in saved["state_dict"].values())
