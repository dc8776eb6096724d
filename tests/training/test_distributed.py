"""Two processes under torchrun train as one process with the same batch does."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from fastden.network.model import Denoiser
from tests.helpers import relative_l2
from tests.training.conftest import Run

pytestmark = pytest.mark.usefixtures("quiet")
NETWORKS = str(Path(__file__).with_name("networks.py"))


def torchrun(folder: Path, settings: dict[str, Any], *options: str) -> subprocess.CompletedProcess[str]:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    return launch("-m", "fastden", "train", str(folder / "config.yaml"), "--accelerator", "cpu", *options)


def launch(*what: str) -> subprocess.CompletedProcess[str]:
    """Run a script or module in two processes."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *what]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment, check=False)


def moved(model: Path, start: Denoiser) -> torch.Tensor:
    """What training changed in the parameters, as one vector."""
    trained = dict(Denoiser.from_pretrained(model).named_parameters())
    return torch.cat([(trained[name] - value).detach().flatten() for name, value in start.named_parameters()])


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["denoise", "joint-classify"])
def test_two_processes_equal_one(objective: str, run: Run, photographs: Path, classified: Path, tmp_path: Path) -> None:
    torch.manual_seed(7)
    start = Denoiser().eval()
    start.save_pretrained(tmp_path / "start")
    settings: dict[str, Any] = {
        "data": [str(photographs)],
        "init": str(tmp_path / "start"),
        "steps": 3,
        "epoch_steps": 2,
        "batch": 4,
        "crop": 30,
        "validation": 2,
        "warmup": 1,
        "ema": 0.5,
        "freeze_bn": 1.0,  # batch statistics would be of each process's own part
        "precision": "32-true",
    }
    if objective != "denoise":
        task = {"network": f"{NETWORKS}:classifier", "weight": 0.1, "validation_data": str(classified)}
        settings |= {"objective": objective, "data": [str(classified)], **task}
    done = torchrun(tmp_path / "two", {**settings, "output": str(tmp_path / "two" / "run")})
    assert done.returncode == 0, done.stderr[-3000:]
    assert (done.stdout + done.stderr).count("model written to") == 1
    both = moved(tmp_path / "two" / "run" / "model", start)
    one = moved(run(tmp_path / "one", **settings), start)
    # Adam makes a whole step of a gradient that is rounding noise: single parameters may differ.
    assert relative_l2(both, one) < 0.01
    half = moved(run(tmp_path / "half", **{**settings, "batch": 2}), start)
    assert relative_l2(half, one) > 0.1
    columns, *rows = (tmp_path / "two" / "run" / "log" / "metrics.csv").read_text().splitlines()
    assert "val_psnr_30" in columns if objective != "denoise" else "val_psnr_25" in columns
    assert len(rows) == 1  # the second epoch was not finished


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["denoise", "joint-classify"])
def test_validation_is_that_of_one_process(
    objective: str, run: Run, photographs: Path, classified: Path, tmp_path: Path
) -> None:
    """Figures of an odd number of pictures, which two processes cannot share evenly; the noise of each is its own."""
    settings: dict[str, Any] = {
        "data": [str(photographs)],
        "init": "color",
        "steps": 1,
        "epoch_steps": 1,
        "batch": 2,
        "crop": 30,
        "validation": 3 if objective == "denoise" else 5,
        "lr": 1e-12,
        "freeze_bn": 1.0,
        "precision": "32-true",
    }
    if objective != "denoise":
        task = {"network": f"{NETWORKS}:classifier", "validation_data": str(classified)}
        settings |= {"objective": objective, "data": [str(classified)], **task}
    done = torchrun(tmp_path / "two", {**settings, "output": str(tmp_path / "two" / "run")})
    assert done.returncode == 0, done.stderr[-3000:]
    run(tmp_path / "one", **settings)
    figures = []
    for folder in (tmp_path / "two" / "run", tmp_path / "one"):
        names, values = ((folder / "log" / "metrics.csv").read_text().splitlines()[i].split(",") for i in (0, 1))
        figures.append({name: float(value) for name, value in zip(names, values, strict=True) if name[:4] == "val_"})
    assert len(figures[0]) == (3 if objective == "denoise" else 4)
    assert figures[0] == pytest.approx(figures[1], rel=1e-5)


@pytest.mark.slow
def test_every_process_finds_the_model(photographs: Path, tmp_path: Path) -> None:
    """It is there when train() returns, also where writing it takes a while."""
    script = tmp_path / "script.py"
    script.write_text(f"""
import time
from pathlib import Path
from fastden.training import trainer
from fastden.training.config import TrainConfig

save = trainer._save
trainer._save = lambda *arguments: (time.sleep(3), save(*arguments))
settings = dict(data=[{str(photographs)!r}], output={str(tmp_path / "run")!r}, steps=1, batch=2, crop=30, validation=0)
model = trainer.train(TrainConfig(precision="32-true", **settings), accelerator="cpu")
assert (model / "config.json").exists()
""")
    done = launch(str(script))
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.slow
def test_batch_that_cannot_be_shared(photographs: Path, tmp_path: Path) -> None:
    settings = {"data": [str(photographs)], "output": str(tmp_path / "two" / "run"), "batch": 3, "crop": 30}
    done = torchrun(tmp_path / "two", settings)
    assert done.returncode != 0
    assert "batch: 3; accepted for 2 processes: a multiple of them" in done.stderr
    assert not (tmp_path / "two" / "run").exists()
