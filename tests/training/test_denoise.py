"""Training: its losses and rates, the run and its continuation."""

from __future__ import annotations

import copy
import errno
import gc
import itertools
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import save_file
from torch.optim.swa_utils import AveragedModel
from torch.profiler import ProfilerActivity, profile

pytest.importorskip("lightning")
pytest.importorskip("pydantic")

from fastden import whole_files
from fastden.errors import UserError
from fastden.network.model import Denoiser
from fastden.ops.backends import interpreted
from fastden.training import callbacks, denoise, trainer
from fastden.training.config import TrainConfig, load_config
from fastden.training.denoise import DenoiserTraining
from tests.helpers import max_error, random_network
from tests.training.conftest import Run, configuration

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


@pytest.fixture(scope="module")
def finished(run: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output folder of an uninterrupted run."""
    output = tmp_path_factory.mktemp("run")
    assert run(output) == output / "model"
    return output


def weights(model: Path) -> dict[str, torch.Tensor]:
    return Denoiser.from_pretrained(model).state_dict()


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

    @pytest.mark.parametrize("stopped_at", [2, 3])
    def test_resumed_run_equals_the_uninterrupted_one(
        self, finished: Path, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stopped_at: int
    ) -> None:
        """After a stop behind the first epoch or in the second, weights, averages, schedule and noise continue."""
        step = DenoiserTraining.training_step

        def failing(self: DenoiserTraining, batch: dict[str, torch.Tensor], index: int) -> torch.Tensor:
            if self.global_step == stopped_at:
                raise RuntimeError("power cut")
            return step(self, batch, index)

        with monkeypatch.context() as patch:
            patch.setattr(DenoiserTraining, "training_step", failing)
            with pytest.raises(RuntimeError, match="power cut"):
                run(tmp_path)
        assert torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=False)["global_step"] == 2
        assert not (tmp_path / "model").exists()
        torch.manual_seed(99)
        resumed = weights(run(tmp_path, resume=True))
        for name, value in weights(finished / "model").items():
            assert torch.equal(resumed[name], value), name
        # The log of both parts is kept.
        parts = [path.read_text().splitlines()[1:] for path in sorted((tmp_path / "log").glob("*.csv"))]
        assert sorted(line.split(",")[0] for part in parts for line in part) == ["0", "1"]

    def test_a_run_may_stop_in_time(self, finished: Path, run: Run, tmp_path: Path) -> None:
        """It stops behind an epoch, leaves a model, and what is resumed equals the uninterrupted run."""
        run(tmp_path, minutes=0)
        assert torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=False)["global_step"] == 2
        expected = weights(finished / "model")
        stopped = weights(tmp_path / "model")
        assert not all(torch.equal(stopped[name], value) for name, value in expected.items())
        resumed = weights(run(tmp_path, resume=True, minutes=9))
        assert all(torch.equal(resumed[name], value) for name, value in expected.items())

    def test_steps_fit_the_time(self, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """The run is the one that had that number of steps from the start."""
        monkeypatch.setattr(callbacks, "FIT_EVERY", 2)
        clock = itertools.count(0, 6)  # seconds; it is read at the start, and behind every second step
        monkeypatch.setattr(callbacks, "monotonic", lambda: float(next(clock)))
        run(tmp_path / "fitted", steps=1000, minutes=1, fit=True, decay=0.5, validation=0)
        monkeypatch.undo()
        record = yaml.safe_load((tmp_path / "fitted" / "train.yaml").read_text())
        assert record["steps"] == 20  # two steps in six seconds, sixty seconds
        expected = weights(run(tmp_path / "whole", steps=20, decay=0.5, validation=0))
        fitted = weights(tmp_path / "fitted" / "model")
        assert all(torch.equal(fitted[name], value) for name, value in expected.items())

    def test_a_fitted_run_resumes(self, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """With the number of steps that was fitted, also where that number matters already, with and without --fit."""
        monkeypatch.setattr(callbacks, "FIT_EVERY", 2)
        clock = itertools.count(0, 6)
        monkeypatch.setattr(callbacks, "monotonic", lambda: float(next(clock)))
        step = DenoiserTraining.training_step
        settings: dict[str, Any] = {"steps": 1000, "decay": 0.5, "validation": 0}
        for number, (stop, timed) in enumerate(((13, {"minutes": 1, "fit": True}), (17, {}))):

            def failing(self: DenoiserTraining, batch: Any, index: int, stop: int = stop) -> torch.Tensor:
                if self.global_step == stop:
                    raise RuntimeError("power cut")
                return step(self, batch, index)

            monkeypatch.setattr(DenoiserTraining, "training_step", failing)
            with pytest.raises(RuntimeError, match="power cut"):
                run(tmp_path / "fitted", resume=number > 0, **timed, **settings)
        monkeypatch.setattr(DenoiserTraining, "training_step", step)
        run(tmp_path / "fitted", resume=True, minutes=0, fit=True, **settings)  # the time is a limit still
        assert torch.load(tmp_path / "fitted/checkpoints/last.ckpt", weights_only=False)["global_step"] == 16
        resumed = weights(run(tmp_path / "fitted", resume=True, minutes=1, fit=True, **settings))
        assert yaml.safe_load((tmp_path / "fitted" / "train.yaml").read_text())["steps"] == 20
        monkeypatch.undo()
        expected = weights(run(tmp_path / "whole", **{**settings, "steps": 20}))
        assert all(torch.equal(resumed[name], value) for name, value in expected.items())

    def test_what_does_not_fit_is_refused(self, run: Run, tmp_path: Path) -> None:
        with pytest.raises(UserError, match="fit: without minutes"):
            run(tmp_path, fit=True)
        left = "decay 1.0, freeze_bn 0.5 and steps 1000 leave 0 steps to measure the speed in"
        with pytest.raises(UserError, match=f"fit: {left}; accepted: more than 50, by smaller shares or more steps"):
            run(tmp_path, minutes=1, fit=True, steps=1000, decay=1.0)
        with pytest.raises(UserError, match="steps 1000 leave 50 steps"):
            run(tmp_path, minutes=1, fit=True, steps=1000, decay=0.95)
        run(tmp_path, minutes=0)
        with pytest.raises(UserError, match="steps 4 leave 0 steps"):
            run(tmp_path, resume=True, minutes=1, fit=True)

    def test_resuming_a_finished_run_changes_nothing(self, finished: Path, run: Run) -> None:
        expected = weights(finished / "model")
        again = weights(run(finished, resume=True))
        assert all(torch.equal(value, expected[name]) for name, value in again.items())

    def test_a_longer_run_goes_on(self, run: Run, tmp_path: Path) -> None:
        run(tmp_path, steps=2)
        run(tmp_path, steps=3, resume=True)
        assert torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=False)["global_step"] == 3

    @pytest.mark.parametrize("stopped", [1, 3])
    def test_a_run_that_ended_within_an_epoch_goes_on(self, run: Run, tmp_path: Path, stopped: int) -> None:
        """It repeats no crops: what is resumed equals the uninterrupted run."""
        settings: dict[str, Any] = {"decay": 0, "freeze_bn": 0, "epoch_steps": 3, "validation": 0}
        expected = weights(run(tmp_path / "whole", steps=5, **settings))
        run(tmp_path / "parts", steps=stopped, **settings)
        run(tmp_path / "parts", steps=4, resume=True, **settings)
        resumed = weights(run(tmp_path / "parts", steps=5, resume=True, **settings))
        assert all(torch.equal(resumed[name], value) for name, value in expected.items())

    def test_a_full_disk_leaves_the_last_checkpoint(
        self, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        written: list[Path] = []
        write = whole_files.write_synced

        def full(path: Path, data: bytes) -> None:
            write(path, data if not written else data[:100])
            written.append(path)
            if len(written) == 2:
                raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(whole_files, "write_synced", full)
        with pytest.raises(UserError, match=r"last\.ckpt: cannot be written: No space left on device"):
            run(tmp_path)
        assert [path.parent for path in written] == [tmp_path / "checkpoints"] * 2
        assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["last.ckpt"]
        saved = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=False)
        assert saved["global_step"] == 2

    def test_existing_run_is_not_overwritten(self, finished: Path, run: Run) -> None:
        before = {path: path.stat().st_mtime_ns for path in finished.rglob("*")}
        with pytest.raises(UserError, match=r"output: .* holds a run already; accepted: a new folder, or --resume"):
            run(finished)
        assert {path: path.stat().st_mtime_ns for path in finished.rglob("*")} == before

    def test_other_settings_are_no_resumption(self, run: Run, tmp_path: Path) -> None:
        run(tmp_path, steps=2)
        accepted = "accepted: the same, except for steps, lr, clip, warmup, workers and output"
        with pytest.raises(UserError, match=rf"resume: other settings .*\(ema: 0\.25, was .*{accepted}"):
            run(tmp_path, resume=True, ema=0.25)

    def test_rates_and_limits_may_change(self, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """As the message says that a diverged run ends with."""
        run(tmp_path, minutes=0, decay=0.0)
        seen = []
        step = DenoiserTraining.training_step

        def watching(self: DenoiserTraining, batch: Any, index: int) -> torch.Tensor:
            (optimizer,) = self.trainer.optimizers
            seen.append((self.global_step, optimizer.param_groups[0]["lr"], self.trainer.gradient_clip_val))
            return step(self, batch, index)

        monkeypatch.setattr(DenoiserTraining, "training_step", watching)
        changes = {"lr": 1e-4, "clip": 0.01, "warmup": 3}
        run(tmp_path, resume=True, decay=0.0, **changes)
        assert seen == [(2, pytest.approx(0.75e-4), 0.01), (3, pytest.approx(1e-4), 0.01)]
        settings = yaml.safe_load((tmp_path / "train.yaml").read_text())
        assert {name: settings[name] for name in changes} == changes
        record = (tmp_path / "model" / "train.yaml").read_text()
        told = ["lr: 0.0001, was 0.001", "clip: 0.01, was 0.02", "warmup: 3, was 1"]
        assert record.splitlines()[-3:] == [f"# from step 2 on: {change}" for change in told]
        run(tmp_path, resume=True, decay=0.0, lr=1e-6)  # no step is left that could have it
        for folder in (tmp_path, tmp_path / "model"):
            assert (folder / "train.yaml").read_text() == record

    def test_a_run_whose_folder_was_moved_goes_on(
        self, finished: Path, run: Run, photographs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """On another machine, and with its pictures by another path."""
        run(tmp_path / "first", minutes=0)
        (tmp_path / "first").rename(tmp_path / "second")
        monkeypatch.chdir(photographs.parent)
        with pytest.raises(UserError, match=r"other settings than the run had \(data: \['other'\], was \['/"):
            run(tmp_path / "second", resume=True, data=["other"])
        resumed = weights(run(tmp_path / "second", resume=True, data=[photographs.name]))
        assert all(torch.equal(resumed[name], value) for name, value in weights(finished / "model").items())
        assert [path.name for path in (tmp_path / "second" / "checkpoints").iterdir()] == ["last.ckpt"]
        assert not (tmp_path / "first").exists()
        assert yaml.safe_load((tmp_path / "second" / "train.yaml").read_text())["output"] == str(tmp_path / "second")

    def test_another_number_of_workers_is_no_other_setting(self, finished: Path, run: Run, tmp_path: Path) -> None:
        """Looked at alone: a process that holds all tests and their libraries ended once where a run forked workers."""
        record = yaml.safe_load((finished / "train.yaml").read_text())
        config = TrainConfig.model_validate({**record, "output": finished, "workers": record["workers"] + 3})
        trainer._check_settings(config)
        config.batch += 1
        with pytest.raises(UserError, match=r"\(batch: 3, was 2\)"):
            trainer._check_settings(config)

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

    def test_a_run_of_an_earlier_version_goes_on(self, run: Run, tmp_path: Path) -> None:
        """Its record lacks settings that came later; they have their defaults."""
        run(tmp_path, steps=2)
        record = tmp_path / "train.yaml"
        settings = yaml.safe_load(record.read_text())
        del settings["cuda_graphs"], settings["backend"]
        record.write_text(yaml.safe_dump(settings))
        with pytest.raises(UserError, match=r"\(cuda_graphs: True, was False\)"):
            run(tmp_path, resume=True, cuda_graphs=True)
        run(tmp_path, steps=3, resume=True)
        assert torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=False)["global_step"] == 3

    def test_nothing_to_resume(self, run: Run, tmp_path: Path) -> None:
        with pytest.raises(UserError, match=r"resume: .*last\.ckpt does not exist"):
            run(tmp_path / "new", resume=True)
        assert not (tmp_path / "new").exists()

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


def test_no_collection_while_graphs_are_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    """It may destroy the graphs of the steps before BN froze, and CUDA then ends the capture."""
    seen = []
    monkeypatch.setattr(torch.cuda, "make_graphed_callables", lambda *_: seen.append(gc.isenabled()))
    denoise.capture(random_network(composed=True), torch.rand(1, 4, 20, 16))
    assert seen == [False]
    assert gc.isenabled()


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
