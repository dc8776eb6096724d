"""Recipes: sizes, shares, seeds, and their effect on a clean picture."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fastden.training.photo_noise import PhotoNoise, PhotoRanges
from fastden.training.synthetic_noise import compress

KINDS = ("white", "camera", "grain", "clean")


def only(kind: str, **ranges: object) -> PhotoNoise:
    return PhotoNoise(PhotoRanges(**{name: float(name == kind) for name in KINDS}, **ranges))  # type: ignore[arg-type]


def picture(side: int) -> torch.Tensor:
    small = torch.rand(3, 12, 12, generator=torch.Generator().manual_seed(1))
    return torch.nn.functional.interpolate(small[None], (side, side), mode="bicubic").clamp(0, 1)[0]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("gray", [False, True])
def test_recipes(kind: str, gray: bool) -> None:
    for seed in range(6):
        random = np.random.default_rng(seed)
        recipe = only(kind).plan(random, 46, 120)
        assert recipe.kind == kind
        assert recipe.taken <= 120
        clean = picture(recipe.taken)
        clean = clean.mean(0, keepdim=True).expand(3, -1, -1) if gray else clean
        target, noisy = recipe.make(clean, random, gray)
        assert target.shape == noisy.shape == (3, 46, 46)
        assert torch.isfinite(noisy).all()
        if kind != "white":
            assert 0 <= float(noisy.min()) <= float(noisy.max()) <= 1
        if gray and kind == "white":
            assert torch.equal(noisy[0], noisy[1])


def test_the_target_keeps_the_tones_of_the_noisy_picture() -> None:
    """Noise that is clipped at black brightens dark areas: the target is as bright, and without noise."""
    noise = only("grain", grain_sigma=(40.0, 40.0), grain_blur=(0.3, 0.3), resize=0.0, jpeg=0.0)
    for seed in range(4):
        random = np.random.default_rng(seed)
        recipe = noise.plan(random, 126, 200)
        dark = torch.full((3, recipe.taken, recipe.taken), 0.02)
        target, noisy = recipe.make(dark, random)
        assert float(noisy.mean()) > 0.035, "clipping brightens"
        assert torch.allclose(target.mean((1, 2)), noisy.mean((1, 2)), rtol=0.03)
        assert float(target.std()) < 0.15 * float(noisy.std())


def test_a_small_picture_is_enlarged_no_further_than_it_reaches() -> None:
    for seed in range(40):
        recipe = only("camera", resize=1.0).plan(np.random.default_rng(seed), 64, 80)
        assert recipe.taken <= 80


def test_recipes_are_seeded() -> None:
    results = []
    for _ in range(2):
        random = np.random.default_rng(7)
        recipe = PhotoNoise().plan(random, 46, 200)
        results.append(recipe.make(picture(recipe.taken), random)[1])
    assert torch.equal(*results)


def test_white_noise_is_white_and_of_its_level() -> None:
    noise = only("white", sigma=(20.0, 20.0))
    random = np.random.default_rng(0)
    recipe = noise.plan(random, 200, 400)
    target, noisy = recipe.make(torch.full((3, 200, 200), 0.5), random)
    error = noisy - target
    assert float(error.std()) * 255 == pytest.approx(20, rel=0.02)
    left, right = error[:, :, :-1].flatten(), error[:, :, 1:].flatten()
    assert abs(float(torch.corrcoef(torch.stack([left, right]))[0, 1])) < 0.02


def test_grain_has_its_level_and_is_coarse() -> None:
    noise = only("grain", grain_sigma=(12.0, 12.0), grain_blur=(1.5, 1.5), resize=0.0, jpeg=0.0)
    levels = []
    for seed in range(12):
        random = np.random.default_rng(seed)
        recipe = noise.plan(random, 120, 400)
        target, noisy = recipe.make(torch.full((3, recipe.taken, recipe.taken), 0.5), random)
        error = noisy - target
        levels.append(float(error.std()) * 255)
        left, right = error[:, :, :-1].flatten(), error[:, :, 1:].flatten()
        assert float(torch.corrcoef(torch.stack([left, right]))[0, 1]) > 0.7
    # Where it is strongest it has its level; the shapes over brightness take it down.
    assert 1 < min(levels) <= max(levels) < 14
    assert max(levels) > 9


def test_clean_pictures_keep_what_jpeg_leaves() -> None:
    for seed in range(10):
        random = np.random.default_rng(seed)
        recipe = only("clean", jpeg=1.0, quality=(95, 98), twice=1.0, resize=0.0).plan(random, 64, 200)
        # The picture is gray: a halved chroma changes saturated colours more.
        target, noisy = recipe.make(picture(recipe.taken).mean(0, keepdim=True).expand(3, -1, -1), random)
        # Two compressions on different grids, put back in place: small errors, no shift.
        assert float((noisy - target).abs().mean()) * 255 < 3


def test_jpeg_quality_and_subsampling() -> None:
    image = picture(64)
    errors = [float((compress(image, quality) - image).abs().mean()) for quality in (95, 70, 30)]
    assert errors == sorted(errors)
    colors = torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(0))
    assert (compress(colors, 95, 0) - colors).abs().mean() < (compress(colors, 95, 2) - colors).abs().mean()


def test_reduced_pictures_have_more_texture() -> None:
    plain, reduced = only("clean", resize=0.0, jpeg=0.0), only("clean", resize=0.0, jpeg=0.0, reduce=1.0)
    for seed in range(6):
        recipe = reduced.plan(np.random.default_rng(seed), 64, 400)
        assert recipe.side < recipe.taken <= round(80 / 0.4)
        steps = []
        for one in (plain.plan(np.random.default_rng(seed), 64, 400), recipe):
            target, noisy = one.make(picture(400)[:, : one.taken, : one.taken], np.random.default_rng(9))
            assert noisy.shape == (3, 64, 64)
            steps.append(float(target.diff(dim=2).abs().mean()))
        assert steps[1] > steps[0]


def test_a_lens_blurs_before_the_noise() -> None:
    """A Gaussian blur of 0.6 to 0.7 leaves 0.47 to 0.40 of the deviation of white detail. Noise comes behind it."""
    detail = 0.5 + 0.1 * torch.randn(3, 80, 80, generator=torch.Generator().manual_seed(2))

    def made(kind: str, soft: float) -> tuple[torch.Tensor, torch.Tensor]:
        noise = only(
            kind,
            resize=0.0,
            jpeg=0.0,
            round=0.0,
            soft=soft,
            lens=(0.6, 0.7),
            grain_sigma=(5.0, 5.0),
            grain_blur=(0.3, 0.3),
        )
        random = np.random.default_rng(3)
        return noise.plan(random, 64, 80).make(detail, random)

    target, noisy = made("grain", 1.0)
    assert 0.036 < float(target.std()) < 0.05
    assert float((noisy - target).std()) * 255 == pytest.approx(5, rel=0.5)
    assert float(made("grain", 0.0)[0].std()) == pytest.approx(0.1, rel=0.05)
    for kind in ("clean", "white"):
        torch.testing.assert_close(made(kind, 1.0)[0], made(kind, 0.0)[0])


@pytest.mark.parametrize("value", [0.0, 1.0])
@pytest.mark.parametrize("kind", KINDS)
def test_black_and_white_pictures(kind: str, value: float) -> None:
    """Numbers stay numbers where a blur's rounding leaves [0, 1]: 1.0000001 on sides of 200 pixels and more."""
    noise = only(kind, soft=0.5, jpeg=0.0, scale=(1.0, 1.0))
    for seed in range(24):
        random = np.random.default_rng(seed)
        recipe = noise.plan(random, 254, 300)
        for image in recipe.make(torch.full((3, recipe.taken, recipe.taken), value), random):
            assert torch.isfinite(image).all(), f"seed {seed}"


def test_a_power_draws_more_weak_noise() -> None:
    def sigmas(power: float) -> list[float]:
        noise = only("white", sigma=(0.0, 60.0), sigma_power=power)
        flat = torch.full((3, 40, 40), 0.5)
        return [
            float(noise.plan(r, 40, 40).make(flat, r)[1].std()) * 255 for r in map(np.random.default_rng, range(60))
        ]

    alike, weak = sigmas(1.0), sigmas(2.0)
    # The means of a uniform number and of its square are 1/2 and 1/3.
    assert np.mean(alike) == pytest.approx(30, abs=8)
    assert np.mean(weak) == pytest.approx(20, abs=8)


def test_no_seam_of_a_second_jpeg() -> None:
    """Of a picture that is compressed twice the second is moved. Chroma of its other edge must not come in."""
    noise = only("clean", resize=0.0, twice=1.0, jpeg=1.0, clean_quality=(20, 30))
    for seed in range(12):  # all subsamplings
        for axis in (1, 2):
            picture = torch.zeros(3, 80, 80)
            picture[0], picture[2] = (torch.arange(80)[:, None] < 40).expand(80, 80), (torch.arange(80)[:, None] >= 40)
            picture = picture if axis == 1 else picture.transpose(1, 2)
            target, noisy = noise.plan(np.random.default_rng(seed), 64, 80).make(picture, np.random.default_rng(seed))
            error = (noisy - target).abs().mean(0).mean(1 if axis == 1 else 0)
            # The edge in the middle errs; the borders are flat.
            assert float(error[:6].max()) < 0.06, f"seed {seed}, axis {axis}: {error[:6]}"
