"""A run of training: what it writes, its averages and statistics, its start, and how it diverges."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

pytest.importorskip("lightning")
pytest.importorskip("pydantic")

from fastden.errors import UserError
from fastden.network.model import Denoiser
from fastden.training.config import load_config
from fastden.training.denoise import DenoiserTraining
from tests.helpers import max_error, random_network
from tests.training.conftest import Run, weights

pytestmark = pytest.mark.usefixtures("quiet")


class TestRun:
    def test_saves_averages_of_the_decay_that_is_asked_for(self, run: Run, tmp_path: Path) -> None:
        """After two steps the average is ``ema`` times the first weights and the rest the last."""
        saved = {}
        for ema in (0.0, 0.25, 0.5):
            model = Denoiser.from_pretrained(run(tmp_path / str(ema), steps=2, ema=ema, freeze_bn=0.0))
            saved[ema] = dict(model.named_parameters())
        last = torch.load(tmp_path / "0.0" / "checkpoints" / "last.ckpt", weights_only=False)["current_model_state"]
        for name, value in saved[0.0].items():
            torch.testing.assert_close(value, last[f"model.{name}"], rtol=0, atol=0)
            torch.testing.assert_close(saved[0.25][name], (value + saved[0.5][name]) / 2, rtol=0, atol=1e-6)
        assert max(max_error(saved[0.5][name], value) for name, value in saved[0.0].items()) > 1e-4

    def test_writes_a_model_that_loads(self, finished: Path) -> None:
        model = Denoiser.from_pretrained(finished / "model")
        assert not model.composed
        y = model(torch.rand(1, 3, 20, 20), 0.1)
        assert bool(y.isfinite().all())
        assert {path.name for path in (finished / "model").iterdir()} >= {"README.md", "train.yaml"}

    def test_writes_its_log(self, finished: Path) -> None:
        lines = (finished / "log" / "metrics.csv").read_text().splitlines()
        assert {"epoch", "step", "val_psnr_15", "val_psnr_25", "val_psnr_50"} <= set(lines[0].split(","))
        assert len(lines) == 3
        assert list((finished / "tensorboard").glob("events.*"))

    def test_writes_its_configuration(self, finished: Path, run: Run) -> None:
        for path in (finished / "train.yaml", finished / "model" / "train.yaml"):
            config = load_config(path, [])
            assert (config.steps, config.crop, config.output) == (4, 30, finished)

    def test_weights_have_moved(self, finished: Path) -> None:
        torch.manual_seed(0)
        first = Denoiser().state_dict()
        for name, value in weights(finished / "model").items():
            assert not torch.equal(value, first[name]), name

    def test_is_repeatable(self, finished: Path, run: Run, tmp_path: Path) -> None:
        expected = weights(finished / "model")
        torch.manual_seed(99)
        assert all(torch.equal(value, expected[name]) for name, value in weights(run(tmp_path)).items())

    def test_the_saved_weights_are_the_averaged_ones(self, finished: Path) -> None:
        checkpoint = torch.load(finished / "checkpoints" / "last.ckpt", weights_only=False)
        assert checkpoint["global_step"] == 4
        saved = weights(finished / "model")
        name = "conv3.conv.weight"
        assert torch.equal(checkpoint["state_dict"][f"model.{name}"], saved[name])
        assert not torch.equal(checkpoint["current_model_state"][f"model.{name}"], saved[name])

    @pytest.mark.parametrize("value", [math.nan, -math.inf, 1e30])
    def test_diverged_weights_replace_no_checkpoint(
        self, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: float
    ) -> None:
        """The loss of the epoch's last step is finite still."""

        def diverging(self: DenoiserTraining, *_: Any) -> None:
            if self.global_step == 4:
                for parameter in self.model.parameters():
                    parameter.data.fill_(value)

        monkeypatch.setattr(DenoiserTraining, "on_train_batch_end", diverging)
        with pytest.raises(UserError, match="the weights have diverged at step 4; lower lr or clip and go on from the"):
            run(tmp_path, ema=0.0)
        assert torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=False)["global_step"] == 2
        assert not (tmp_path / "model").exists()
        monkeypatch.undo()
        run(tmp_path, resume=True, ema=0.0, lr=1e-4)

    def test_frozen_statistics(self, run: Run, tmp_path: Path) -> None:
        state = weights(run(tmp_path, freeze_bn=1.0, steps=2))
        assert torch.equal(state["conv1.bn.running_mean"], torch.zeros(128))
        assert torch.equal(state["conv1.bn.running_var"], torch.ones(128))

    def test_statistics_freeze_on_time(self, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        seen: list[tuple[int, bool]] = []
        forward = DenoiserTraining.forward

        def watching(self: DenoiserTraining, noisy: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
            if self.training and not self.trainer.validating and torch.is_grad_enabled():
                seen.append((self.global_step, self.model.conv1.bn.training))
            return forward(self, noisy, sigma)

        monkeypatch.setattr(DenoiserTraining, "forward", watching)
        run(tmp_path, freeze_bn=0.25)
        assert seen == [(0, True), (1, True), (2, True), (3, False)]

    def test_every_step_has_its_own_noise(self, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        seen: dict[int, tuple[float, float]] = {}
        forward = DenoiserTraining.forward

        def watching(self: DenoiserTraining, noisy: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
            if torch.is_grad_enabled():
                seen[self.global_step] = (float(sigma[0]), float(sigma[1]))
                assert sigma.min() >= 10 / 255
                assert sigma.max() <= 20 / 255
            return forward(self, noisy, sigma)

        monkeypatch.setattr(DenoiserTraining, "forward", watching)
        run(tmp_path, sigma=[10, 20])
        assert len({level for levels in seen.values() for level in levels}) == 8

    def test_diverged_run_stops(self, run: Run, tmp_path: Path) -> None:
        with pytest.raises(UserError, match=r"training: the loss is (nan|inf) at step \d; lower lr or clip"):
            run(tmp_path, lr=1e30, warmup=0)
        assert not (tmp_path / "model").exists()

    @pytest.mark.parametrize("steps", [4, 6])
    def test_diverged_run_on_a_gpu_leaves_no_model(
        self, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, steps: int
    ) -> None:
        """There, losses are looked at every 50 steps, before a checkpoint is written, and at the end."""

        class OnGpu(torch.Tensor):
            is_cuda = True  # type: ignore[assignment]

        found = DenoiserTraining.batch_loss
        monkeypatch.setattr(DenoiserTraining, "batch_loss", lambda self, batch: found(self, batch).as_subclass(OnGpu))
        with pytest.raises(UserError, match=r"a loss of the epoch that ends with step \d is not finite"):
            run(tmp_path, lr=1e30, warmup=0, steps=steps, epoch_steps=4)
        assert not (tmp_path / "model").exists()
        assert not (tmp_path / "checkpoints" / "last.ckpt").exists()

    def test_nothing_left_to_train_on(self, run: Run, tmp_path: Path) -> None:
        with pytest.raises(UserError, match=r"validation: 5 leaves no photograph to train on; accepted: up to 4"):
            run(tmp_path, validation=5)

    def test_from_a_gray_model(self, run: Run, tmp_path: Path) -> None:
        random_network(image_channels=1).save_pretrained(tmp_path / "gray")
        with pytest.raises(
            UserError, match=r"init: .*gray is a model for gray images; accepted: one for colour images"
        ):
            run(tmp_path / "run", init=str(tmp_path / "gray"))

    def test_from_weights_that_do_not_fit(self, run: Run, tmp_path: Path) -> None:
        random_network().save_pretrained(tmp_path / "other")
        save_file({"conv0.weight": torch.zeros(1)}, tmp_path / "other" / "model.safetensors")
        with pytest.raises(UserError, match=r"init: .*other/model\.safetensors: .*conv0\.weight") as caught:
            run(tmp_path / "run", init=str(tmp_path / "other"))
        assert "\n" not in str(caught.value)
        with pytest.raises(UserError, match=r"^init: 'nothere'; accepted: .*color"):
            run(tmp_path / "run", init="nothere")

    def test_blind_network_from_another(self, finished: Path, run: Run, tmp_path: Path) -> None:
        model = run(tmp_path, noise_level_input=False, init=str(finished / "model"), steps=1, lr=1e-8, composed=False)
        loaded = Denoiser.from_pretrained(model)
        assert not loaded.noise_level_input
        expected = weights(finished / "model")
        assert max_error(loaded.conv3.conv.weight, expected["conv3.conv.weight"]) < 1e-5
        assert max_error(loaded.conv0.weight, expected["conv0.weight"][:, :3]) < 1e-5

    def test_composed_training_equals_plain_training(self, finished: Path, run: Run, tmp_path: Path) -> None:
        plain = weights(run(tmp_path, composed=False, steps=1, epoch_steps=1))
        composed = weights(run(tmp_path / "composed", steps=1, epoch_steps=1))
        # Adam's first step has the size of the rate where the gradient is not rounding noise.
        for name, value in composed.items():
            if name.endswith("weight"):
                close = (value - plain[name]).abs() < 1e-4
                assert close.float().mean() > 0.95, name

    @pytest.mark.parametrize("precision", ["bf16-mixed"])
    def test_mixed_precision(self, run: Run, tmp_path: Path, precision: str) -> None:
        state = weights(run(tmp_path, precision=precision, steps=2))
        assert all(bool(value.isfinite().all()) for value in state.values())
        assert state["conv0.weight"].dtype == torch.float32

    def test_without_validation(self, run: Run, tmp_path: Path) -> None:
        assert Denoiser.from_pretrained(run(tmp_path, validation=0, steps=1)).noise_level_input
