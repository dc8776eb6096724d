"""Small photographs, labelled ones, and a short training run."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image as PIL

pytest.importorskip("lightning")
pytest.importorskip("pydantic")

from fastden.network.model import Denoiser
from fastden.training.config import JointConfig, TrainConfig
from fastden.training.trainer import train

Run = Callable[..., Path]
#: The file of the networks that tests train in front of.
NETWORKS = str(Path(__file__).with_name("networks.py"))


def configuration(**changes: Any) -> TrainConfig:
    return TrainConfig.model_validate({"data": ["photographs"], "output": "run", **changes})


def weights(model: Path) -> dict[str, torch.Tensor]:
    return Denoiser.from_pretrained(model).state_dict()


def smooth(random: np.random.Generator, size: tuple[int, int] = (44, 40)) -> PIL.Image:
    coarse = PIL.fromarray(random.integers(0, 256, (6, 7, 3), dtype=np.uint8))
    return coarse.resize(size, PIL.Resampling.BICUBIC)


@pytest.fixture(scope="session")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five small smooth images."""
    folder = tmp_path_factory.mktemp("photographs")
    random = np.random.default_rng(0)
    for i in range(5):
        smooth(random).save(folder / f"{i}.png")
    return folder


@pytest.fixture(scope="session")
def classified(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six images of three classes; the last is smaller than the crops."""
    folder = tmp_path_factory.mktemp("classified")
    random = np.random.default_rng(1)
    rows = ["file,index,name"]
    for i in range(6):
        smooth(random, (44, 40) if i < 5 else (26, 20)).save(folder / f"{i}.png")
        rows.append(f"{i}.png,{i % 3},class {i % 3}")
    (folder / "labels.csv").write_text("\n".join(rows) + "\n")
    return folder


@pytest.fixture(scope="session")
def segmented(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four images whose pixels are of three classes, or of class 9, which is ignored."""
    folder = tmp_path_factory.mktemp("segmented")
    random = np.random.default_rng(2)
    for name in ("images", "labels"):
        (folder / name).mkdir()
    for i in range(4):
        image = smooth(random)
        image.save(folder / "images" / f"{i}.png")
        brightness = np.asarray(image).mean(2)
        label = np.digitize(brightness, [100, 150]).astype(np.uint8)
        label[:3] = 9
        palette = PIL.fromarray(label, mode="P")
        palette.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255] + [7] * 21)
        palette.save(folder / "labels" / f"{i}.png")
    return folder


@pytest.fixture
def quiet() -> Iterator[None]:
    """Lightning's advice and other libraries' warnings do not show."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    for logger, old in zip(loggers, before, strict=True):
        logger.setLevel(old)


@pytest.fixture(scope="session")
def run(photographs: Path) -> Run:
    """A training of four steps in two epochs, on the CPU; returns the folder of the model."""

    def start(
        output: Path, resume: bool = False, minutes: float | None = None, fit: bool = False, **changes: Any
    ) -> Path:
        settings: dict[str, Any] = {
            "data": [photographs],
            "output": output,
            "steps": 4,
            "epoch_steps": 2,
            "batch": 2,
            "crop": 30,
            "validation": 2,
            "warmup": 1,
            "ema": 0.5,
            "freeze_bn": 0.5,
            "precision": "32-true",
        }
        kind = TrainConfig if "objective" not in changes else JointConfig
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            own = kind.model_validate({**settings, **changes})
            return train(own, resume=resume, minutes=minutes, fit=fit, accelerator="cpu", devices="1")

    return start


@pytest.fixture(scope="module")
def finished(run: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output folder of an uninterrupted run."""
    output = tmp_path_factory.mktemp("run")
    assert run(output) == output / "model"
    return output


@pytest.fixture
def joint(run: Run, classified: Path, segmented: Path) -> Run:
    """A joint run of four steps from random weights."""

    def start(output: Path, kind: str = "classify", resume: bool = False, **changes: Any) -> Path:
        data = classified if kind == "classify" else segmented
        settings: dict[str, Any] = {
            "objective": f"joint-{kind}",
            "data": [data],
            "validation_data": data,
            "validation": 3,
            "network": f"{NETWORKS}:{'classifier' if kind == 'classify' else 'segmenter'}",
            "init": None,
        }
        return run(output, resume, **{**settings, **changes})

    return start
