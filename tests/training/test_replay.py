"""Crops that are drawn again from the past."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

pytest.importorskip("lightning")
pytest.importorskip("pydantic")

from safetensors.torch import load_file, save_file

from fastden.errors import UserError
from fastden.network.level import NoiseEstimator
from fastden.training.config import load_config
from fastden.training.replay import Past, Replay
from fastden.training.trainer import train

CPU = torch.device("cpu")


def numbered(first: int, count: int) -> dict[str, torch.Tensor]:
    """Images whose pixels are all their number / 1024, which half precision holds, and the number."""
    numbers = torch.arange(first, first + count)
    return {"clean": (numbers / 1024).view(-1, 1, 1, 1).expand(-1, 3, 4, 4), "number": numbers}


def test_the_oldest_crops_make_room() -> None:
    past = Past(6, CPU)
    for first in (0, 4, 8):
        past.put(numbered(first, 4))
    assert past.count == 6
    drawn = past.draw(200, np.random.default_rng(0))
    assert set(drawn["number"].tolist()) == {6, 7, 8, 9, 10, 11}
    assert drawn["clean"].dtype == torch.float32
    torch.testing.assert_close(drawn["clean"][:, 0, 0, 0], drawn["number"] / 1024, rtol=0, atol=0)


def test_pairs_stay_together_and_are_turned_and_mirrored() -> None:
    image = torch.rand(1, 3, 5, 5).half().float()
    past = Past(2, CPU)
    past.put({"clean": image, "noisy": image + 1})
    random = np.random.default_rng(1)
    seen = set()
    for _ in range(100):
        drawn = past.draw(1, random)
        torch.testing.assert_close(drawn["noisy"], (drawn["clean"] + 1).half().float(), rtol=0, atol=2e-3)
        same = [(k, m) for k in range(4) for m in (0, 1) if torch.equal(drawn["clean"], turned(image, k, m))]
        assert len(same) == 1
        seen.add(same[0])
    assert len(seen) == 8


def turned(image: torch.Tensor, quarters: int, mirror: int) -> torch.Tensor:
    return torch.rot90(image.flip(3) if mirror else image, quarters, (2, 3))


def test_an_epoch_draws_several_times_for_each_new_batch() -> None:
    numbers = [numbered(4 * index, 4) for index in range(3)]
    items: Any = [{name: values[i] for name, values in batch.items()} for batch in numbers for i in range(4)]

    def epoch(past: Past) -> list[list[int]]:
        replay = Replay(DataLoader(items, 4), 5, past, (0, 1))
        batches = [batch["number"].tolist() for batch in replay]
        assert len(batches) == len(replay) == 15
        return batches

    first = epoch(Past(8, CPU))
    assert first == epoch(Past(8, CPU))
    assert {number for batch in first[:5] for number in batch} <= set(range(4))
    assert {number for batch in first[10:] for number in batch} <= set(range(4, 12))


@pytest.mark.parametrize("done", [1, 7])
def test_an_epoch_goes_on_where_it_ended(done: int) -> None:
    items: Any = [{name: values[i] for name, values in numbered(4 * j, 4).items()} for j in range(3) for i in range(4)]
    whole = list(Replay(DataLoader(items, 4), 5, Past(8, CPU), (0, 1)))
    rest = list(Replay(DataLoader(items, 4), 5, Past(8, CPU), (0, 1), done))
    assert len(rest) == len(whole) - done
    for one, other in zip(rest, whole[done:], strict=True):
        assert all(torch.equal(values, other[name]) for name, values in one.items())


@pytest.mark.usefixtures("quiet")
@pytest.mark.parametrize("estimator_lr", [0, 0.001])
@pytest.mark.parametrize("stopped", [4, 5])
def test_a_resumed_run_draws_what_the_uninterrupted_one_draws(
    photographs: Path, tmp_path: Path, estimator_lr: float, stopped: int
) -> None:
    """Behind an epoch and within one; the past no longer holds the first epoch's crops."""
    save_file(NoiseEstimator().state_dict(), tmp_path / "noise.safetensors")

    def run(output: str, steps: int, resume: bool = False) -> dict[str, torch.Tensor]:
        settings = {
            "objective": "photo", "data": f"[{photographs}]", "output": tmp_path / output, "crop": 32, "batch": 2,
            "steps": steps, "epoch_steps": 2, "replay": 2, "replay_batches": 2, "validation": 0, "warmup": 0,
            "precision": "32-true", "estimator": tmp_path / "noise.safetensors", "estimator_lr": estimator_lr,
            "decay": 0, "freeze_bn": 0, "estimate_from": 0,
        }  # fmt: skip
        config = load_config(None, [f"{name}={value}" for name, value in settings.items()])
        return load_file(train(config, accelerator="cpu", resume=resume) / "model.safetensors")

    whole = run("whole", 8)
    run("parts", stopped)
    for name, values in run("parts", 8, resume=True).items():
        assert torch.equal(values, whole[name]), name


def test_a_batch_beyond_the_capacity_is_refused() -> None:
    with pytest.raises(ValueError, match="4 crops; accepted: up to 3"):
        Past(3, CPU).put(numbered(0, 4))


@pytest.mark.usefixtures("quiet")
def test_a_run_replays_and_leaves_the_estimator_as_it_is(photographs: Path, tmp_path: Path) -> None:
    estimator = {name: value.clone() for name, value in NoiseEstimator().state_dict().items()}
    save_file(estimator, tmp_path / "noise.safetensors")
    settings = {
        "objective": "photo", "data": f"[{photographs}]", "output": tmp_path / "run", "crop": 32, "batch": 2,
        "steps": 4, "epoch_steps": 2, "replay": 2, "replay_batches": 3, "validation": 1, "precision": "32-true",
        "estimator": tmp_path / "noise.safetensors", "estimator_lr": 0,
    }  # fmt: skip
    config = load_config(None, [f"{name}={value}" for name, value in settings.items()])
    model = train(config, accelerator="cpu")
    for name, values in load_file(model / "noise.safetensors").items():
        # Averaging over the steps rounds.
        torch.testing.assert_close(values, estimator[name], rtol=1e-6, atol=1e-7, msg=name)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["replay=3", "epoch_steps=4"], "replay: 3; accepted: a divisor of epoch_steps, 4"),
        (["estimator_lr=0"], "estimator_lr: 0"),
        (["cuda_graphs=true", "compile=true"], "cuda_graphs: true with compile: true"),
    ],
)
def test_settings_that_exclude_each_other(changes: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_config(None, ["objective=photo", "data=[x]", "output=y", *changes])
