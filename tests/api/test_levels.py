"""``fastden.denoise``: noise levels in every form, how strongly it denoises, and at which quality."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import fastden
from tests.api.conftest import SIGMA, reference
from tests.image_files import pixels


def test_sigma_forms_agree(network: fastden.FusedDenoiser) -> None:
    image = pixels(dtype=np.float32)
    expected = reference(network, image)
    level_map = np.full(image.shape[:2], SIGMA)
    for sigma in (
        SIGMA,
        int(SIGMA),
        np.float32(SIGMA),
        np.array(SIGMA),
        torch.tensor(SIGMA),
        level_map,
        torch.from_numpy(level_map),
    ):
        np.testing.assert_allclose(fastden.denoise(image, sigma, model=network), expected, atol=1e-6)


def test_sigma_maps_and_batches(network: fastden.FusedDenoiser) -> None:
    batch = torch.rand(2, 3, 16, 20)
    levels = torch.tensor([5.0, 60.0])
    result = fastden.denoise(batch, levels, model=network)
    for index in (0, 1):
        alone = fastden.denoise(batch[index], float(levels[index]), model=network)
        torch.testing.assert_close(result[index], alone, rtol=0, atol=1e-5)
    maps = levels.view(2, 1, 1, 1).expand(2, 1, 16, 20)
    torch.testing.assert_close(fastden.denoise(batch, maps, model=network), result, rtol=0, atol=1e-5)
    for form in ([5, 60], (5.0, 60.0), levels[:, None], levels.view(2, 1, 1, 1).numpy()):
        assert torch.equal(fastden.denoise(batch, form, model=network), result)
    for form in ([60], [[60]], torch.full((1, 1, 1, 1), 60.0)):  # one for all
        assert torch.equal(fastden.denoise(batch, form, model=network)[1], result[1])
    half = np.zeros((16, 20), np.float32)
    half[:, 10:] = 50
    image = batch[0].permute(1, 2, 0).numpy()
    with torch.no_grad():
        expected = network(batch[:1], torch.from_numpy(half / 255)[None, None])[0].permute(1, 2, 0).numpy()
    np.testing.assert_allclose(fastden.denoise(image, half, model=network), expected, atol=1e-6)


def test_auto_sigma_is_the_estimate(network: fastden.FusedDenoiser) -> None:
    image = pixels(64, 64, dtype=np.uint8)
    estimate = fastden.estimate_noise(image)
    assert estimate.decided
    np.testing.assert_array_equal(
        fastden.denoise(image, model=network), fastden.denoise(image, estimate, model=network)
    )
    batch = torch.from_numpy(np.stack([image, image // 2])).permute(0, 3, 1, 2)
    found = fastden.denoise(batch, model=network)
    for index in (0, 1):
        assert (found[index].int() - fastden.denoise(batch[index], model=network).int()).abs().max() <= 1


def test_blind_models_estimate_nothing_and_take_no_number(blind: fastden.FusedDenoiser) -> None:
    image = pixels(dtype=np.float32)
    np.testing.assert_allclose(fastden.denoise(image, model=blind), reference(blind, image, None), atol=1e-6)
    for sigma in (25, np.full(image.shape[:2], 25.0)):
        with pytest.raises(ValueError, match=r"sigma: .*blind"):
            fastden.denoise(image, sigma, model=blind)


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
@pytest.mark.parametrize("channels", [1, 3])
def test_strength_scales_the_level(network: fastden.FusedDenoiser, dtype: Any, channels: int) -> None:
    image = pixels(channels=channels, dtype=dtype)
    np.testing.assert_array_equal(fastden.denoise(image, SIGMA, model=network, strength=0), image)
    for strength in (0.5, 1.5, 2.0):
        scaled = fastden.denoise(image, SIGMA, model=network, strength=strength)
        expected = fastden.denoise(image, SIGMA * strength, model=network)
        np.testing.assert_allclose(scaled, expected, atol=1e-6 if dtype == np.float32 else 1)
    curve = fastden.NoiseEstimate(tuple(10.0 + index for index in range(8)), 13.5, 0.5)
    twice = fastden.NoiseEstimate(tuple(2 * level for level in curve.sigmas), 27.0, 0.5)
    scaled = fastden.denoise(image, curve, model=network, strength=2)
    expected = fastden.denoise(image, twice, model=network)
    np.testing.assert_allclose(scaled, expected, atol=1e-5 if dtype == np.float32 else 1)


@pytest.mark.parametrize("kind", ["array", "path", "PIL", "tensor"])
def test_a_level_of_the_scale_0_to_1_for_8_bits(network: fastden.FusedDenoiser, kind: str, tmp_path: Path) -> None:
    array = pixels(dtype=np.uint8)
    Image.fromarray(array).save(tmp_path / "a.png")
    image = {
        "array": array,
        "path": tmp_path / "a.png",
        "PIL": Image.fromarray(array),
        "tensor": torch.from_numpy(array).permute(2, 0, 1),
    }[kind]
    with pytest.warns(fastden.ScaleWarning, match=r"sigma: 0\.098, .* less than the rounding of 8 bits") as told:
        fastden.denoise(image, 25 / 255, model=network)
    assert [one.filename for one in told] == [__file__]


def test_small_levels_that_are_meant(network: fastden.FusedDenoiser, monkeypatch: pytest.MonkeyPatch) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fastden.denoise(pixels(dtype=np.float32), 0.1, model=network)
        fastden.denoise(pixels(dtype=np.uint16), 0.1, model=network)
        for sigma in (0, 0.5, 25, np.full((20, 30), 0.1)):
            fastden.denoise(np.zeros((20, 30, 3), np.uint8), sigma, model=network)
        monkeypatch.setenv("FASTDEN_SCALE_WARNING", "0")
        fastden.denoise(pixels(dtype=np.uint8), 0.1, model=network)


def test_a_blind_model_blends(blind: fastden.FusedDenoiser) -> None:
    image = pixels(dtype=np.float32)
    full = fastden.denoise(image, model=blind)
    half = fastden.denoise(image, model=blind, strength=0.5)
    np.testing.assert_allclose(half, (image + full) / 2, atol=1e-6)
    with pytest.raises(ValueError, match=r"strength: 1.5, but this model is blind .*; accepted: 0 to 1"):
        fastden.denoise(image, model=blind, strength=1.5)


def test_chroma_has_a_strength_of_its_own(network: fastden.FusedDenoiser) -> None:
    """Luma comes from one result, the colour differences from the other."""
    image = pixels(dtype=np.float32)
    weights = np.array([0.299, 0.587, 0.114], np.float32)
    both = fastden.denoise(image, SIGMA, model=network, strength=0.5, chroma=2.0)
    fine = fastden.denoise(image, SIGMA, model=network, strength=0.5)
    strong = fastden.denoise(image, SIGMA, model=network, strength=2.0)
    np.testing.assert_allclose(both @ weights, fine @ weights, atol=1e-5)
    np.testing.assert_allclose(both - both[..., :1], strong - strong[..., :1], atol=1e-5)
    same = fastden.denoise(image, SIGMA, model=network, strength=0.5, chroma=0.5)
    np.testing.assert_array_equal(same, fine)
    tiled = fastden.denoise(image, SIGMA, model=network, strength=0.5, chroma=2.0, tile=16)
    np.testing.assert_allclose(tiled, both, atol=1e-5)


def test_best_is_the_mean_of_eight(network: fastden.FusedDenoiser) -> None:
    """The sides are 2 above a multiple of 4, so padding is equal on all sides; tiles change nothing."""
    image = pixels(38, 46, dtype=np.float32)
    best = fastden.denoise(image, SIGMA, model=network, quality="best")
    total = np.zeros_like(image)
    for turns in range(4):
        for flip in (False, True):
            moved = np.rot90(image, turns)
            done = fastden.denoise(np.ascontiguousarray(moved[:, ::-1] if flip else moved), SIGMA, model=network)
            total += np.rot90(done[:, ::-1] if flip else done, -turns)
    np.testing.assert_allclose(best, total / 8, atol=1e-5)
    large = pixels(70, 90, dtype=np.float32)
    whole = fastden.denoise(large, SIGMA, model=network, quality="best", tile=None)
    np.testing.assert_allclose(fastden.denoise(large, SIGMA, model=network, quality="best", tile=32), whole, atol=1e-5)


def test_the_default_model_for_a_given_sigma() -> None:
    """Where none is given, the noise chooses: ``test_chosen_model.py``."""
    image = pixels(20, 20, dtype=np.uint8)
    for sigma in (20, [20], np.array([20])):
        np.testing.assert_array_equal(fastden.denoise(image, sigma), fastden.denoise(image, 20, model="color"))


def test_the_warning_reaches_code_without_a_module() -> None:
    with pytest.warns(fastden.ScaleWarning, match=r"sigma: 0\.1,"):
        exec("denoise(image, 0.1, model='color')", {"denoise": fastden.denoise, "image": pixels(dtype=np.uint8)})
