"""``fastden noise``: words, JSON, maps, and mistakes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import fastden
from fastden.images.codec import ImageFile, read_image, write_image
from tests.cli.run import fails, works
from tests.image_files import encoded


def noisy(sigma: float, side: int = 64) -> np.ndarray:
    values = 128 + np.random.default_rng(0).normal(0, sigma, (side, side, 3))
    return np.rint(values.clip(0, 255)).astype(np.uint8)


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "a b.png"
    path.write_bytes(encoded(noisy(20), "PNG"))
    return path


def test_words(picture: Path, tmp_path: Path) -> None:
    flat = tmp_path / "flat.png"
    flat.write_bytes(encoded(np.full((64, 64, 3), 90, np.uint8), "PNG"))
    text = works("noise", picture, flat)
    estimate = fastden.estimate_noise(noisy(20))
    assert f"{picture}: {estimate.describe()}" in text
    assert f"fastden denoise '{picture}' -o '{tmp_path / 'a b-clean.png'}'" in text
    assert f"{flat}: too little to judge by" in text


def test_json_is_the_estimate(picture: Path) -> None:
    row = json.loads(works("noise", picture, "--json"))
    estimate = fastden.estimate_noise(noisy(20))
    assert row["sigmas"] == pytest.approx(estimate.sigmas)
    assert (row["sigma"], row["kind"]) == (pytest.approx(estimate.sigma), estimate.kind)


def test_the_map_serves_as_sigma_map(picture: Path, tmp_path: Path) -> None:
    target = tmp_path / "map.png"
    works("noise", picture, "--map", target)
    levels = read_image(target).pixels
    assert levels.shape == (64, 64, 1)
    estimate = fastden.estimate_noise(noisy(20))
    assert abs(float(levels.mean()) - 255 * float(estimate.curve.mean())) < 2.5
    works("denoise", picture, "-o", tmp_path / "out.png", "--sigma-map", target)
    fails("noise", picture, "--map", target, saying="exists")
    works("noise", picture, "--map", target, "--overwrite")
    fails("noise", picture, picture, "--map", tmp_path / "two.png", saying="with 2 pictures; accepted: with one")


def test_a_bad_file_does_not_stop_the_others(picture: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad.png"
    bad.write_bytes(b"no picture")
    error = fails("noise", bad, picture, saying="bad.png")
    assert len(error.splitlines()) == 1


@pytest.mark.parametrize("value", [0, 255])
@pytest.mark.parametrize("shape", [(1, 1, 3), (64, 64, 3)])
def test_pictures_that_say_nothing_come_out_as_they_went_in(
    value: int, shape: tuple[int, int, int], tmp_path: Path
) -> None:
    """The default takes black, white and one-pixel pictures for clean, says so, and changes next to nothing."""
    source, target = tmp_path / "a.png", tmp_path / "b.png"
    write_image(source, ImageFile(np.full(shape, value, np.uint8)))
    works("denoise", source, "-o", target)
    assert np.abs(read_image(target).pixels.astype(int) - value).max() <= 3
