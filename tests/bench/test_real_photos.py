"""The script that compares real photographs: its classical denoisers and whose noise level it takes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import fastden
from fastden.network.level import NoiseEstimator
from fastden.network.own_estimator import OwnEstimator
from tests.helpers import random_network
from tests.scripts import load

RANDOM = np.random.default_rng(0)


@pytest.fixture(scope="module")
def script(root: Path) -> Any:
    return load(root / "benchmarks/real_photos.py")


def test_non_local_means_takes_rgb(script: Any) -> None:
    cv2 = pytest.importorskip("cv2")
    picture = RANDOM.integers(0, 256, (24, 28, 3), np.uint8) // 4 + np.uint8([150, 20, 90])
    lab = cv2.cvtColor(picture, cv2.COLOR_LRGB2Lab)
    lightness = cv2.fastNlMeansDenoising(lab[..., 0].copy(), None, 10, 7, 21)
    colours = cv2.fastNlMeansDenoising(lab[..., 1:].copy(), None, 10, 7, 21)
    expected = cv2.cvtColor(np.dstack([lightness, colours]), cv2.COLOR_Lab2LRGB)
    np.testing.assert_array_equal(script._nlm(picture, 10), expected)


def test_sets_without_pairs_are_refused(script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also beside others, before these are measured."""
    picture, target = Image.new("RGB", (16, 16)), tmp_path / "a.json"
    for folder in ("first", "second"):
        (tmp_path / folder).mkdir()
        picture.save(tmp_path / folder / "a_real.png")
    picture.save(tmp_path / "first" / "a_mean.png")
    for option, saying in (
        ([], f"error: pairs: {tmp_path}/second/a_real.png has no reference a_mean"),
        (["--sets", "first", "third"], f"error: folder: {tmp_path}/third is not a folder"),
    ):
        monkeypatch.setattr("sys.argv", ["real_photos.py", "--data", str(tmp_path), "--json", str(target), *option])
        with pytest.raises(SystemExit, match=saying):
            script.main()
    assert not target.exists()


def test_each_set_says_which_of_its_pictures_were_compared(
    script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    picture = Image.fromarray(RANDOM.integers(0, 256, (16, 16, 3), np.uint8))
    for name in ("polyu", "other"):
        (tmp_path / name).mkdir()
        for index in range(8):
            for kind in ("real", "mean"):
                picture.save(tmp_path / name / f"{index}_{kind}.png")
    monkeypatch.setattr(script.fastden, "denoise", lambda image, estimate, **options: image)
    command = ["real_photos.py", "--data", tmp_path, "--every", 2, "--json", tmp_path / "a.json"]
    monkeypatch.setattr("sys.argv", list(map(str, command)))
    script.main()
    sets = json.loads((tmp_path / "a.json").read_text())["sets"]
    assert {name: (one["every"], one["pictures"]) for name, one in sets.items()} == {"polyu": (6, 2), "other": (2, 4)}
    assert list(sets["polyu"]["by_picture"]) == ["0_real.png", "6_real.png"]


def test_the_noise_is_judged_by_the_models_own_estimator(
    script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, pictures = tmp_path / "model", tmp_path / "data" / "set"
    pictures.mkdir(parents=True)
    random_network().save_pretrained(model)
    torch.manual_seed(0)
    OwnEstimator.of(NoiseEstimator()).save(model)
    picture = RANDOM.normal(120, 10, (64, 72, 3)).round().clip(0, 255).astype(np.uint8)
    for name in ("real", "mean"):
        Image.fromarray(picture).save(pictures / f"a_{name}.png")
    command = ["real_photos.py", "--data", pictures.parent, "--model", model, "--json", tmp_path / "a.json"]
    monkeypatch.setattr("sys.argv", list(map(str, command)))
    script.main()
    level = json.loads((tmp_path / "a.json").read_text())["sets"]["set"]["by_picture"]["a_real.png"]["level"]
    own, bundled = fastden.estimate_noise(picture, model), fastden.estimate_noise(picture)
    assert level["estimated"] == round(own.sigma, 2) != round(bundled.sigma, 2)
