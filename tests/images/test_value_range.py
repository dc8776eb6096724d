from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from skimage import data

import fastden
from fastden.images.codec import ImageFile, read_image, write_image
from fastden.images.pixels import Array
from fastden.images.value_range import ORDINARY, RangeFinder, find_range
from fastden.inference.run import run_network
from fastden.network.loading import load_network

SIGMA = 10.0


def photograph(height: int = 96, width: int = 112) -> Array:
    """(H, W, 3) float64 in [0, 1]."""
    return np.array(data.astronaut()[:height, 150 : 150 + width] / 255)


def noisy(clean: Array, sigma: float = SIGMA) -> Array:
    return clean + np.random.default_rng(0).normal(0, sigma / 255, clean.shape)


def error(a: Array, b: Array) -> float:
    return float(np.sqrt(np.mean((np.asarray(a, np.float64) - b) ** 2)))


@pytest.mark.parametrize("factor", [2.5, 4.0, 8.0])
def test_values_above_one_are_denoised_as_well_as_divided_first(factor: float) -> None:
    clean, sigma = photograph() * factor, SIGMA * factor
    image = noisy(clean, sigma).astype(np.float32)
    found = fastden.denoise(image, sigma)
    divided = fastden.denoise(image / np.float32(factor), SIGMA) * factor
    assert error(found, clean) < 1.03 * error(divided, clean) < 0.6 * error(image, clean)


def test_neutral_highlights_stay_neutral() -> None:
    image = noisy(np.full((96, 96, 3), 3.0)).astype(np.float32)
    means = fastden.denoise(image, SIGMA).mean((0, 1))
    assert np.abs(means - 3).max() < 0.01


@pytest.mark.parametrize("top", [16383, 4095, 1023, 700])
@pytest.mark.parametrize("sigma", ["auto", "given"])
def test_few_bits_in_sixteen_are_denoised(top: int, sigma: str) -> None:
    clean = photograph()[:, :, 1:2]
    scale = 65535 // top
    counts = np.rint(np.clip(noisy(clean) * top, 0, 65535))
    level = SIGMA * top / 65535 if sigma == "given" else "auto"
    stretched = SIGMA * top * scale / 65535 if sigma == "given" else "auto"
    found = fastden.denoise(counts.astype(np.uint16), level)
    full = fastden.denoise((counts * scale).clip(0, 65535).astype(np.uint16), stretched)
    assert found.dtype == np.uint16
    before = error(counts, clean * top)
    assert error(found, clean * top) < 1.1 * error(full / scale, clean * top) < before / 1.5


def test_ordinary_pictures_are_as_they_were() -> None:
    network = load_network("color", None, "float32", eight_bit=False)
    for dtype, white in ((np.uint8, 255), (np.uint16, 65535), (np.float32, 1)):
        image = (noisy(photograph(), 50) * white).clip(-2, white).astype(dtype) if white == 1 else None
        image = (noisy(photograph(), 50).clip(0, 1) * white).astype(dtype) if image is None else image
        assert find_range(image) == ORDINARY
        batch = torch.from_numpy(image).permute(2, 0, 1)[None]
        plain = run_network(network, batch, 50 / 255)[0].permute(1, 2, 0).numpy()
        assert np.array_equal(fastden.denoise(image, 50, dtype="float32"), plain)


def test_noise_is_no_highlight_and_no_shadow() -> None:
    white = noisy(np.ones((64, 64, 3)), 75).astype(np.float32)
    assert white.max() > 1.8
    assert find_range(white) == ORDINARY
    dark = noisy(np.full((64, 64, 3), 0.05), 75).astype(np.float32)
    assert find_range(dark) == ORDINARY


def test_black_stays() -> None:
    for dtype, white in ((np.uint16, 65535), (np.float32, 1)):
        black = np.zeros((20, 30, 3), dtype)
        assert find_range(black) == ORDINARY
        assert fastden.denoise(black, 1.0).max() < 0.01 * white


def test_values_from_minus_one_to_one() -> None:
    clean = photograph() * 2 - 1
    image = noisy(clean).astype(np.float32)
    assert find_range(image).low == pytest.approx(-0.9, abs=0.1)
    assert error(fastden.denoise(image, SIGMA), clean) < 0.7 * error(image, clean)


def test_a_lamp_is_kept_and_its_surroundings_are_denoised() -> None:
    clean = photograph()
    clean[40:43, 50:53] = 30.0
    image = noisy(clean).astype(np.float32)
    found = fastden.denoise(image, SIGMA)
    away = np.ones(clean.shape[:2], bool)
    away[36:47, 46:57] = False
    assert np.abs(found[40:43, 50:53] - 30).max() < 0.5
    assert error(found[away], clean[away]) < 0.6 * error(image[away], clean[away])


def test_a_level_that_exceeds_what_the_network_knows_widens_the_range() -> None:
    image = (photograph() * 0.01).astype(np.float32)
    assert find_range(image).for_level(10 / 255).high == pytest.approx(10 / 75, rel=0.01)
    assert find_range(image).for_level(90 / 255) == ORDINARY


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_refused(value: float) -> None:
    image = photograph().astype(np.float32)
    image[3, 4, 1] = value
    with pytest.raises(ValueError, match="NaN or infinity"):
        fastden.denoise(image, 10)


def test_other_scales_and_lonely_pixels_are_refused() -> None:
    for factor in (100.0, 255.0, 65535.0):
        with pytest.raises(ValueError, match=r"to \d.*accepted: the scale \[0, 1\]"):
            fastden.denoise((photograph() * factor).astype(np.float32), 10)
    image = photograph().astype(np.float32)
    image[3, 4, 1] = 255
    with pytest.raises(ValueError, match="stand far out"):
        fastden.denoise(image, 10)


def test_strips_find_the_range_of_the_whole() -> None:
    image = (photograph(150, 77) * 3).astype(np.float32)
    finder, other = RangeFinder(image.dtype), RangeFinder(image.dtype)
    finder.add(image[:64])
    other.add(image[64:])
    finder.join(other.state())
    assert finder.result() == find_range(image)


def test_each_image_of_a_batch_has_its_own_range() -> None:
    images = [noisy(photograph()), noisy(photograph() * 4)]
    batch = torch.from_numpy(np.stack(images)).float().permute(0, 3, 1, 2)
    together = fastden.denoise(batch, torch.tensor([10.0, 20.0]))
    for index, sigma in enumerate((10.0, 20.0)):
        alone = fastden.denoise(batch[index], sigma)
        torch.testing.assert_close(together[index], alone, rtol=0, atol=4e-6)


@pytest.mark.parametrize("kind", ["float", "twelve bits"])
def test_a_streamed_file_gives_the_whole_one(tmp_path: Path, kind: str) -> None:
    picture = noisy(np.tile(photograph(), (4, 3, 1)))
    picture = (picture * 3).astype(np.float32) if kind == "float" else (picture.clip(0, 1) * 4095).astype(np.uint16)
    write_image(tmp_path / "a.tif", ImageFile(picture))
    whole = fastden.BatchDenoiser("color", tile=64)
    report = whole.run(tmp_path / "a.tif", tmp_path / "whole.tif")
    assert "divided by this range" in " ".join(report.done[0].notes)
    strips = fastden.BatchDenoiser("color", max_memory="5MiB")
    streamed = strips.run(tmp_path / "a.tif", tmp_path / "strips.tif")
    assert not streamed.failed, streamed.failed[0].error
    assert streamed.done[0].streamed
    assert streamed.done[0].sigma == report.done[0].sigma
    one, other = (read_image(tmp_path / name).pixels.astype(np.float64) for name in ("whole.tif", "strips.tif"))
    assert np.abs(one - other).max() <= (1e-5 if kind == "float" else 1)
    assert error(one, fastden.denoise(picture, report.done[0].sigma)) <= (1e-5 if kind == "float" else 0.5)


def test_a_picture_of_another_scale_fails_alone(tmp_path: Path) -> None:
    write_image(tmp_path / "a.tif", ImageFile((photograph() * 255).astype(np.float32)))
    write_image(tmp_path / "b.tif", ImageFile(photograph().astype(np.float32)))
    report = fastden.BatchDenoiser("color", sigma=5).run(tmp_path, tmp_path / "out")
    assert len(report.done) == 1
    assert "a.tif" in str(report.failed[0].error)
    assert "accepted: the scale [0, 1]" in str(report.failed[0].error)
