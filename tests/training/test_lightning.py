"""Training: what Lightning says, logs and does with Ctrl-C."""

from __future__ import annotations

import logging
import os
import random
import signal
import sys
import warnings
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

pytest.importorskip("lightning")
pytest.importorskip("pydantic")

from lightning.pytorch.callbacks import RichProgressBar
from lightning.pytorch.trainer.connectors.logger_connector import result

from fastden.cli.main import app
from fastden.errors import UserError
from fastden.training import callbacks, trainer
from fastden.training.config import TrainConfig
from fastden.training.denoise import DenoiserTraining
from tests.cli.run import fails
from tests.training.conftest import Run

pytestmark = pytest.mark.usefixtures("quiet")


def test_lightning_praises_nothing_here() -> None:
    """Its tips name services of its maker; all else that it says is shown."""
    logger = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    tip, other = (logging.makeLogRecord({"msg": text}) for text in ("💡 Tip: try our service", "GPU available: False"))
    with trainer._without_praise():
        assert not logger.filter(tip)
        assert logger.filter(other)
    assert logger.filter(tip)


def test_a_training_gives_no_hints_of_lightning(recwarn: pytest.WarningsRecorder) -> None:
    hint = "The 'val_dataloader' does not have many workers which may be a bottleneck."
    with trainer._without_praise():
        warnings.warn(hint, stacklevel=1)
        warnings.warn("another", stacklevel=1)
    warnings.warn(hint, stacklevel=1)
    assert [str(warning.message) for warning in recwarn.list] == ["another", hint]


def test_a_training_leaves_lightnings_logger_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    logger = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    before = list(logger.filters)
    during: list[int] = []

    def stop(*_: Any) -> None:
        during.append(len(logger.filters))
        raise UserError("enough")

    monkeypatch.setattr(trainer, "_trainer", stop)
    with pytest.raises(UserError, match="enough"):
        trainer.train(TrainConfig(data=[tmp_path], output=tmp_path / "run"))
    assert during == [len(before) + 1]
    assert list(logger.filters) == before


@pytest.mark.parametrize("before", [False, True])
def test_a_training_leaves_cudnns_choice_as_it_was(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: bool
) -> None:
    during: list[bool] = []

    def stop(*_: Any) -> None:
        during.append(torch.backends.cudnn.benchmark)
        raise UserError("enough")

    monkeypatch.setattr(torch.backends.cudnn, "benchmark", before)
    monkeypatch.setattr(DenoiserTraining, "training_step", stop)
    with pytest.raises(UserError, match="enough"):
        run(tmp_path / "out")
    assert during == [True]
    assert torch.backends.cudnn.benchmark is before


@pytest.mark.parametrize("ends", ["well", "in an error", "by Ctrl-C"])
@pytest.mark.parametrize("before", [None, "5"])
def test_a_training_leaves_the_process_as_it_was(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: str | None, ends: str
) -> None:
    """Its random numbers, environment and all else that a program may have set."""

    def state() -> dict[str, Any]:
        return {
            "environment": {name: os.environ.get(name) for name in trainer.VARIABLES},
            "random": random.getstate(),
            "numpy": [str(part) for part in np.random.get_state()],  # noqa: NPY002
            "torch": torch.get_rng_state().tolist(),
            "signals": [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)],
            "warnings": [*warnings.filters],
            "levels": [logging.getLogger(name).level for name in ("", "lightning.pytorch", "lightning.fabric")],
            "deterministic": torch.are_deterministic_algorithms_enabled(),
            "dtype": torch.get_default_dtype(),
            "threads": torch.get_num_threads(),
            "precision": torch.get_float32_matmul_precision(),
            "cudnn": [getattr(torch.backends.cudnn, name) for name in ("benchmark", "deterministic", "allow_tf32")],
            "gradients": torch.is_grad_enabled(),
        }

    def stop(*_: Any) -> None:
        raise UserError("enough") if ends == "in an error" else KeyboardInterrupt

    for name in trainer.VARIABLES:
        if before is None:
            monkeypatch.delenv(name, raising=False)
        else:
            monkeypatch.setenv(name, before)
    random.seed(7)
    torch.manual_seed(7)
    if ends != "well":
        monkeypatch.setattr(DenoiserTraining, "training_step", stop)
    expected = state()
    with nullcontext() if ends == "well" else pytest.raises((UserError, KeyboardInterrupt)):
        run(tmp_path / "out", steps=1, validation=0)
    found = state()
    assert [name for name, value in expected.items() if found[name] != value] == []


def test_the_progress_bar_shows_four_digits() -> None:
    """Of a loss of 0.00042, and of a PSNR."""
    text = callbacks.LossBar().theme.metrics_format
    assert [format(value, text) for value in (0.00042, 0.051239, -0.0021, 31.4159)] == [
        "0.0004200",
        "0.05124",
        "-0.002100",
        "31.42",
    ]


def test_no_log_replaces_an_earlier_one(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.mkdir()
    for name, text in (("metrics-1.csv", "one"), ("metrics-3.csv", "three"), ("metrics.csv", "four")):
        (log / name).write_text(text)
    trainer._prepare_output(TrainConfig(data=[tmp_path], output=tmp_path))
    assert {path.name: path.read_text() for path in log.iterdir()} == {
        "metrics-1.csv": "one",
        "metrics-3.csv": "three",
        "metrics-4.csv": "four",
    }


def test_ctrl_c_ends_the_command_with_130(photographs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lightning ends the process with code 1, and ignores Ctrl-C from then on."""

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(DenoiserTraining, "training_step", interrupted)
    config = tmp_path / "run.yaml"
    config.write_text("steps: 1\nepoch_steps: 1\nbatch: 1\ncrop: 16\nvalidation: 0\nprecision: 32-true\n")
    changes = [f"data=[{photographs}]", f"output={tmp_path / 'out'}"]
    handler = signal.getsignal(signal.SIGINT)
    try:
        done = CliRunner().invoke(app, ["train", str(config), "--set", *changes, "--accelerator", "cpu"])
    finally:
        signal.signal(signal.SIGINT, handler)
    assert done.exit_code == 130, (done.output, done.exception)
    fails("train", config, "--set", *changes, "--minutes", "inf", "--fit", saying="minutes: inf; accepted: a number")


def _in_the_progress_bar() -> bool:
    """Whether what calls is called by the progress bar."""
    frame = sys._getframe(1)
    while frame.f_back is not None:
        if isinstance(frame.f_locals.get("self"), RichProgressBar):
            return True
        frame = frame.f_back
    return False


def test_no_step_waits_for_the_progress_bar(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It reads the losses of the first step, of one in LOOK_EVERY, and of an epoch's last."""
    monkeypatch.setattr(callbacks, "LOOK_EVERY", 5)
    step, reads, converted = 0, [], []
    begin, show = DenoiserTraining.training_step, callbacks.LossBar._update_metrics
    shown: list[dict[str, Any]] = []

    def counting(self: Any, *arguments: Any) -> Any:
        nonlocal step
        step += 1
        return begin(self, *arguments)

    def number(self: torch.Tensor) -> float:
        if _in_the_progress_bar():
            reads.append(step)
        return self.tolist()

    def convert(values: Any) -> Any:
        converted.append(step)
        return values

    def showing(self: Any, *arguments: Any) -> None:
        show(self, *arguments)
        shown.append(self._metric_component._metrics)

    monkeypatch.setattr(DenoiserTraining, "training_step", counting)
    monkeypatch.setattr(callbacks.LossBar, "_update_metrics", showing)
    monkeypatch.setattr(result, "convert_tensors_to_scalars", convert)
    monkeypatch.setattr(torch.Tensor, "item", number)
    monkeypatch.setattr(torch.Tensor, "__float__", number)
    run(tmp_path / "out", steps=8, epoch_steps=8, validation=0)
    assert not converted
    assert sorted(set(reads)) == [1, 6, 8]
    assert len(shown) >= 8
    assert all("train_loss" in metrics for metrics in shown)
