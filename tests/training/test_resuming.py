"""A run of training that stops goes on as if it had not: its settings, its time, its folder."""

from __future__ import annotations

import errno
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

pytest.importorskip("lightning")
pytest.importorskip("pydantic")

from fastden import whole_files
from fastden.errors import UserError
from fastden.training import callbacks, trainer
from fastden.training.config import TrainConfig
from fastden.training.denoise import DenoiserTraining
from tests.training.conftest import Run, weights

pytestmark = pytest.mark.usefixtures("quiet")


class TestRun:
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
