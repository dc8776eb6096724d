"""Noise levels above those that networks were trained with: the picture is divided until its noise is known."""

import numpy as np
import pytest
import torch
from skimage.data import astronaut
from skimage.metrics import peak_signal_noise_ratio as psnr

import fastden
from fastden.images.ranges import ORDINARY, STRONGEST
from fastden.inference.run import PLAIN, Wishes, own_scale
from fastden.network.level import KNOTS


def clean_and_noisy(sigma: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    clean = astronaut()[100:196, 100:196].astype(np.float32) / 255
    noise = np.random.default_rng(seed).normal(0, sigma / 255, clean.shape)
    return clean, (clean + noise).astype(np.float32)


@pytest.mark.parametrize(
    "options", [{"sigma": 150}, {"sigma": 75, "strength": 2}, {"sigma": 125, "strength": 1.2, "chroma": 1.3}]
)
def test_the_level_of_strong_noise_removes_it(options: dict[str, float]) -> None:
    clean, noisy = clean_and_noisy(150)
    result = fastden.denoise(noisy, model="color", **options)
    # Where the network is told such a level, its result has 10 to 15 dB.
    assert psnr(clean, result.clip(0, 1), data_range=1) > 20


@pytest.mark.parametrize("sigma", [150, 255])
def test_a_level_that_is_too_high_blurs_and_leaves_the_range_alone(sigma: float) -> None:
    clean, noisy = clean_and_noisy(60)
    result = fastden.denoise(noisy, sigma, model="color")
    assert psnr(clean, result, data_range=1) > 18
    assert result.min() > -0.2
    assert result.max() < 1.2


def test_it_is_the_result_of_the_divided_picture() -> None:
    _, noisy = clean_and_noisy(100)
    divided = 2 * fastden.denoise(noisy / 2, 75, model="color")
    np.testing.assert_allclose(fastden.denoise(noisy, 150, model="color"), divided, atol=2e-5)


def test_nothing_changes_up_to_the_highest_trained_level() -> None:
    assert own_scale(STRONGEST, ORDINARY, PLAIN) == (STRONGEST, None)
    assert own_scale(STRONGEST / 2, ORDINARY, Wishes(strength=2))[1] is None
    curves = torch.full((1, KNOTS), STRONGEST)  # in single precision, perhaps rounded up
    assert own_scale(curves, ORDINARY, PLAIN)[1] is None


def test_a_curve_is_divided_with_its_picture() -> None:
    curves = torch.linspace(0.1, 2 * STRONGEST, KNOTS)[None]
    level, scale = own_scale(curves, ORDINARY, PLAIN)
    assert scale is not None
    assert scale.span == pytest.approx(2)
    assert isinstance(level, torch.Tensor)
    # A knot of the divided picture has twice its brightness in the picture, at most white.
    torch.testing.assert_close(level[0], curves[0, [0, 2, 4, 6, 7, 7, 7, 7]] / 2)


def test_pictures_of_a_batch_get_what_they_get_alone() -> None:
    pictures = [clean_and_noisy(sigma, seed)[1] for seed, sigma in enumerate((30, 100))]
    batch = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2)
    together = fastden.denoise(batch, [30, 100], model="color")
    for one, picture, sigma in zip(together, pictures, (30, 100), strict=True):
        alone = fastden.denoise(picture, sigma, model="color")
        np.testing.assert_allclose(one.permute(1, 2, 0).numpy(), alone, atol=2e-6)


def test_tiles_are_exact() -> None:
    _, noisy = clean_and_noisy(100)
    whole = fastden.denoise(noisy, 150, model="color", tile=None)
    np.testing.assert_array_equal(fastden.denoise(noisy, 150, model="color", tile=32), whole)


def test_the_levels_of_a_map_are_at_most_100() -> None:
    clean, noisy = clean_and_noisy(60)
    levels = np.full(noisy.shape[:2], 100.0, np.float32)
    result = fastden.denoise(noisy, 2 * levels, model="color")
    np.testing.assert_array_equal(result, fastden.denoise(noisy, levels, model="color"))
    assert psnr(clean, result, data_range=1) > 20
