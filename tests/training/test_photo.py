"""Training for photographs: its losses, its run and continuation, and what it leaves."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("lightning")
pytest.importorskip("pydantic")

from safetensors.torch import load_file, save_file

from fastden.errors import UserError
from fastden.network.level import NoiseEstimator, true_cells
from fastden.network.model import Denoiser
from fastden.training.config import PhotoConfig, load_config
from fastden.training.photo import PhotoData, PhotoTraining, estimator_loss, known_levels
from fastden.training.trainer import train

pytestmark = pytest.mark.usefixtures("quiet")

SMALL = {
    "objective": "photo",
    "crop": 32,
    "batch": 2,
    "epoch_steps": 2,
    "warmup": 0,
    "validation": 1,
    "precision": "32-true",
    "estimate": 0.5,
    "estimate_from": 1,
}


def configuration(photographs: Path, output: Path, **changes: Any) -> PhotoConfig:
    return PhotoConfig.model_validate({**SMALL, "data": [photographs], "output": output, "steps": 4, **changes})


def test_a_run_trains_both_and_resumes_exactly(photographs: Path, tmp_path: Path) -> None:
    whole = train(configuration(photographs, tmp_path / "whole", decay=0), accelerator="cpu")
    # The rate falls by the number of steps: a shorter run has the same first steps only without a decay.
    train(configuration(photographs, tmp_path / "half", steps=2, decay=0), accelerator="cpu")
    state, estimator = load_file(whole / "model.safetensors"), load_file(whole / "noise.safetensors")
    Denoiser().load_state_dict(state)
    NoiseEstimator().load_state_dict(estimator)
    again = train(configuration(photographs, tmp_path / "half", decay=0), accelerator="cpu", resume=True)
    for name, values in load_file(again / "noise.safetensors").items():
        torch.testing.assert_close(values, estimator[name], msg=name)
    for name, values in load_file(again / "model.safetensors").items():
        torch.testing.assert_close(values, state[name], msg=name)


def test_the_rate_of_the_estimator_may_change(photographs: Path, tmp_path: Path) -> None:
    """While both learn: the optimiser's parameters stay the same. A diverged run advises it."""
    train(configuration(photographs, tmp_path, steps=2), accelerator="cpu")
    changed = configuration(photographs, tmp_path, steps=3, estimator_lr=1e-4)
    train(changed, accelerator="cpu", resume=True)
    assert "# from step 2 on: estimator_lr: 0.0001, was 0.001\n" in (tmp_path / "train.yaml").read_text()
    none = configuration(photographs, tmp_path, estimator_lr=0, estimator=tmp_path / "model")
    with pytest.raises(UserError, match=r"estimator_lr: 0\.0, was 0\.0001"):
        train(none, accelerator="cpu", resume=True)
    assert PhotoTraining(Denoiser(), changed)._remedy().startswith("lower lr, estimator_lr or clip")
    assert PhotoTraining(Denoiser(), none)._remedy().startswith("lower lr or clip")


def test_both_networks_are_optimised(photographs: Path, tmp_path: Path) -> None:
    module = PhotoTraining(Denoiser(), configuration(photographs, tmp_path))
    optimizer = module.configure_optimizers()["optimizer"]
    optimised = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    assert optimised == {id(parameter) for parameter in module.parameters()}


def test_the_estimator_can_be_trained_alone(photographs: Path, tmp_path: Path) -> None:
    """Training starts from given weights: they change, and the network does not."""
    start = train(configuration(photographs, tmp_path / "both", steps=2), accelerator="cpu")
    changes = {"init": str(start), "estimator": start / "noise.safetensors", "denoiser": False, "ema": 0.0}
    alone = train(configuration(photographs, tmp_path / "alone", steps=2, **changes), accelerator="cpu")
    before, after = (load_file(folder / "model.safetensors") for folder in (start, alone))
    assert all(torch.equal(values, after[name]) for name, values in before.items() if "running" not in name)
    before, after = (load_file(folder / "noise.safetensors") for folder in (start, alone))
    assert not any(torch.equal(values, after[name]) for name, values in before.items())


def test_data_are_pairs_of_every_kind(photographs: Path, tmp_path: Path) -> None:
    data = PhotoData(configuration(photographs, tmp_path, batch=4, epoch_steps=20))
    data.setup("fit")
    batches = list(data.train_dataloader())
    assert len(batches) == 20
    assert batches[0]["clean"].shape == batches[0]["noisy"].shape == (4, 3, 32, 32)
    white = torch.cat([batch["white"] for batch in batches])
    assert 8 < int(white.sum()) < 40  # 30 % of 80
    again = list(PhotoData.train_dataloader(data))
    assert torch.equal(batches[3]["noisy"], again[3]["noisy"])


def test_the_truth_costs_least() -> None:
    generator = torch.Generator().manual_seed(0)
    clean = torch.rand(2, 3, 8, 8, generator=generator)
    clean = torch.nn.functional.interpolate(clean, (64, 64), mode="bilinear") * 0.6 + 0.2
    true = true_cells(clean, clean + 0.05 * torch.randn(clean.shape, generator=generator))
    exact = true._replace(log_variance=torch.full_like(true.log_level, -2.0))
    costs = {
        shift: float(estimator_loss(exact._replace(log_level=true.log_level + shift), true))
        for shift in (-0.3, 0.0, 0.3)
    }
    assert costs[0.0] < costs[0.3] < costs[-0.3], "too low costs more than too high"
    unsure = exact._replace(log_level=true.log_level + 1.0)
    surer = unsure._replace(log_variance=torch.full_like(true.log_level, 0.0))
    assert float(estimator_loss(surer, true)) < float(estimator_loss(unsure, true))


def test_levels_are_exact_for_white_noise(photographs: Path, tmp_path: Path) -> None:
    module = PhotoTraining(Denoiser(), configuration(photographs, tmp_path, estimate=0.0, misjudged=0.0))
    clean = torch.full((2, 3, 32, 32), 0.5)
    noisy = clean + 0.1 * torch.randn(clean.shape, generator=torch.Generator().manual_seed(0))
    batch = {"clean": clean, "noisy": noisy, "white": torch.tensor([True, False])}
    true = true_cells(clean, noisy)
    whole = (noisy - clean).square().mean((1, 2, 3)).sqrt()
    levels = module._level({**batch, **known_levels(true, true)}, whole)
    deviation = float((noisy - clean)[0].std())
    assert torch.allclose(levels[0], torch.full_like(levels[0], deviation), rtol=1e-3)
    # Jitter of the log level: a tenth.
    assert 0.5 < float(levels[1].mean()) / deviation < 2
    assert levels[1].shape == (1, 32, 32)


def test_noise_that_neighbours_share_is_given_as_twice_its_level(photographs: Path, tmp_path: Path) -> None:
    clean = torch.full((2, 3, 32, 32), 0.5)
    small = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    noisy = clean + 0.05 * torch.nn.functional.interpolate(small, (32, 32), mode="bilinear")
    batch = {"clean": clean, "noisy": noisy, "white": torch.tensor([False, False])}
    true = true_cells(clean, noisy)
    whole = (noisy - clean).square().mean((1, 2, 3)).sqrt()
    for estimate in (0.0, 1.0):  # the true level, and that of an estimator which is right
        settings = configuration(photographs, tmp_path, estimate=estimate, estimate_from=0, misjudged=0.0, jitter=0.0)
        sure = true._replace(log_variance=torch.full_like(true.log_level, -4.0))
        levels = PhotoTraining(Denoiser(), settings)._level({**batch, **known_levels(true, sure)}, whole)
        assert torch.allclose(levels.mean((1, 2, 3)) / whole, torch.full((2,), 2.0), rtol=0.1)


def test_pictures_that_cannot_be_judged_have_level_0(photographs: Path, tmp_path: Path) -> None:
    """As in inference: of black, white and all but clipped crops the curve would be the highest level."""
    clean = torch.stack([torch.zeros(3, 32, 32), torch.ones(3, 32, 32), torch.zeros(3, 32, 32)])
    noisy = clean.clone()
    noisy[2, :, :8, :24] = 0.5 + 0.1 * torch.rand(3, 8, 24, generator=torch.Generator().manual_seed(0))
    estimator = NoiseEstimator()
    with torch.no_grad():
        cells = estimator(noisy)
    assert cells.usable.flatten(1).sum(1).tolist() == [0, 0, 3]
    levels = known_levels(true_cells(clean, noisy), cells)
    assert torch.equal(levels["factor"], torch.ones(3, 1))
    settings = configuration(photographs, tmp_path, estimate=1.0, estimate_from=0, misjudged=1.0, factor=(2.0, 2.0))
    batch = {"clean": clean, "noisy": noisy, "white": torch.zeros(3, dtype=torch.bool), **levels}
    assert not PhotoTraining(Denoiser(), settings)._level(batch, torch.full((3,), 0.1)).any()
    noisy[2, :, 8:16, :8] = noisy[2, :, :8, :8]
    with torch.no_grad():
        cells = estimator(noisy)
    assert known_levels(true_cells(clean, noisy), cells)["logs"][2].isfinite().all()


def test_some_levels_are_wrong_by_a_factor(photographs: Path, tmp_path: Path) -> None:
    clean = torch.full((16, 3, 32, 32), 0.5)
    noisy = clean + 0.1 * torch.randn(clean.shape, generator=torch.Generator().manual_seed(0))
    batch = {"clean": clean, "noisy": noisy, "white": torch.ones(16, dtype=torch.bool)}
    true = true_cells(clean, noisy)
    whole = (noisy - clean).square().mean((1, 2, 3)).sqrt()
    found = {}
    for share in (0.0, 0.5, 1.0):
        settings = configuration(photographs, tmp_path, estimate=0.0, misjudged=share, factor=(2.0, 2.0))
        levels = PhotoTraining(Denoiser(), settings)._level({**batch, **known_levels(true, true)}, whole)
        found[share] = levels.mean((1, 2, 3)) / whole
    assert torch.allclose(found[0.0], torch.ones(16), rtol=1e-3)
    assert torch.allclose(found[1.0], torch.full((16,), 2.0), rtol=1e-3)
    wrong = found[0.5] > 1.5
    assert 0 < wrong.sum() < 16


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("estimate=2", "estimate: 2"),
        ("noise_level_input=false", "noise_level_input: False"),
        ("jitter=-1", "jitter: -1"),
        ("factor=[2, 1]", "factor: .*accepted"),
        ("blend=0.5", "blend: 0.5 without init"),
        ("denoiser=false", "denoiser: false without init; accepted: with init"),
        ("sigma=[0, 200]", r"sigma: \[0, 200\]: .*0 <= low <= high <= 75"),
        ("gain=0.01", r"gain: \(0\.01, 0\.01\); accepted for photo: 0,"),
        ("jpeg=[50, 90]", r"jpeg: \(50, 90\); accepted for photo: null,"),
        ("clean_quality=many", r"clean_quality: 'many': .*accepted: a number or \[low, high\]"),
    ],
)
def test_impossible_settings(setting: str, message: str, photographs: Path, tmp_path: Path) -> None:
    with pytest.raises(Exception, match=message):
        load_config(None, ["objective=photo", f"data=[{photographs}]", f"output={tmp_path}", setting])


def test_numbers_are_ranges() -> None:
    config = load_config(None, ["objective=photo", "data=[x]", "output=y", "clean_quality=80", "factor=2e0"])
    assert isinstance(config, PhotoConfig)
    assert (config.clean_quality, config.factor) == ((80, 80), (2, 2))


def test_shares_are_rounded_as_people_write_them(photographs: Path, tmp_path: Path) -> None:
    """NumPy refuses shares whose sum is off by more than 1.5e-8."""
    third = 0.3333333
    settings = configuration(photographs, tmp_path, kinds=(third, third, third, 0))
    assert settings.kinds == pytest.approx((1 / 3, 1 / 3, 1 / 3, 0), abs=1e-12)
    data = PhotoData(settings)
    data.setup("fit")
    assert next(iter(data.train_dataloader()))["noisy"].shape == (2, 3, 32, 32)
    # Shares that NumPy takes stay as they are, and with them the noise of earlier recipes.
    for kinds in ((0.1, 0.2, 0.3, 0.4), (0.7, 0.1, 0.1, 0.1), (0.25, 0.25, 0.25, 0.250000005)):
        assert configuration(photographs, tmp_path, kinds=kinds).kinds == kinds
    with pytest.raises(ValueError, match="accepted: four shares of at least 0 that add up to 1"):
        configuration(photographs, tmp_path, kinds=(0.333, 0.333, 0.333, 0))


def test_every_recipe_loads() -> None:
    root = Path(__file__).parents[2]
    recipes = [*root.glob("benchmarks/*/*.yaml"), *root.glob("fastden/weights/*/train.yaml")]
    assert len(recipes) > 20
    assert {"classify.yaml", "segment.yaml", "photo-free.yaml"} <= {recipe.name for recipe in recipes}
    for recipe in recipes:
        load_config(recipe, ["data=[x]", "output=y"])


def test_an_estimator_is_a_file_or_a_folder(photographs: Path, tmp_path: Path) -> None:
    state = NoiseEstimator().state_dict()
    save_file(state, tmp_path / "noise.safetensors")
    for path in (tmp_path, tmp_path / "noise.safetensors"):
        loaded = PhotoTraining(Denoiser(), configuration(photographs, tmp_path, estimator=path)).estimator.state_dict()
        assert all(torch.equal(values, state[name]) for name, values in loaded.items())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"noise\.safetensors does not exist; accepted: noise\.safetensors of a model"),
        (b"no weights", r"noise\.safetensors: .*; accepted: noise\.safetensors of a model"),
        ({"other": torch.zeros(1)}, r"noise\.safetensors: .*Missing key.*; accepted: noise\.safetensors of a model"),
    ],
)
def test_a_wrong_estimator(photographs: Path, tmp_path: Path, content: Any, message: str) -> None:
    if isinstance(content, bytes):
        (tmp_path / "noise.safetensors").write_bytes(content)
    elif content is not None:
        save_file(content, tmp_path / "noise.safetensors")
    with pytest.raises(UserError, match=f"estimator: .*{message}") as caught:
        PhotoTraining(Denoiser(), configuration(photographs, tmp_path, estimator=tmp_path))
    assert "\n" not in str(caught.value)


def test_crops_come_from_anywhere(photographs: Path, tmp_path: Path) -> None:
    data = PhotoData(configuration(photographs, tmp_path, validation=0))
    data.setup("fit")
    assert data.val_dataloader() == []
    (first, *_) = data.train_dataloader()
    assert np.isfinite(first["noisy"].numpy()).all()


def test_processes_draw_what_one_would(photographs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    training = PhotoTraining(Denoiser(), configuration(photographs, tmp_path, misjudged=0.5))
    noisy = torch.rand(6, 3, 16, 16)
    batch = {"noisy": noisy, "white": torch.zeros(6, dtype=torch.bool)}
    # Levels of about 0.14 and 0.05. Above the highest, 0.29, all would be alike.
    batch |= {"true_logs": torch.full((6, 8), -2.0), "true_factor": torch.ones(6, 1)}
    batch |= {"logs": torch.full((6, 8), -3.0), "factor": torch.ones(6, 1)}
    whole = training._level(batch, torch.full((6,), 0.1))
    assert len(whole.amax((1, 2, 3)).unique()) == 6
    for rank in range(2):
        shared = {name: value[rank::2] for name, value in batch.items()}
        monkeypatch.setattr(training, "_trainer", SimpleNamespace(global_rank=rank, world_size=2, global_step=0))
        part = training._level(shared, torch.full((3,), 0.1))
        assert torch.equal(part, whole[rank::2])
