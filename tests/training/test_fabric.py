"""Textures of cloth: periods, contrast, darkness, seeds; and their place in the recipes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from fastden.training.camera import blur, srgb_to_linear
from fastden.training.fabric import FabricRanges, darken, weave
from fastden.training.photo_noise import PhotoNoise, PhotoRanges


def gray(side: int, value: float = 0.5) -> torch.Tensor:
    return torch.full((3, side, side), value)


@pytest.mark.parametrize("period", [4.0, 9.0])
def test_threads_keep_their_distance(period: float) -> None:
    """Without folds, next to no power is coarser than the threads: it gathers at their waves and the overtones."""
    ranges = FabricRanges(
        period=(period, period),
        stretch=(1.0, 1.0),
        skew=0.0,
        folds=(1e-6, 1e-6),
        contrast=(0.1, 0.1),
        roughness=0.0,
        plain=0.0,
    )
    side = 128
    for seed in range(8):
        cloth = weave(gray(side), np.random.default_rng(seed), ranges)[0]
        window = torch.hann_window(side, periodic=False)
        power = torch.fft.fft2((cloth - cloth.mean()) * window[:, None] * window).abs() ** 2
        wave = torch.fft.fftfreq(side)
        frequency = (wave[:, None] ** 2 + wave**2).sqrt()
        coarse = float(power[frequency < 0.6 / period].sum() / power.sum())
        assert coarse < 0.15, f"seed {seed}: {coarse} of the power is coarser than the threads"
        # One number describes a lattice: most of the power is in few places.
        strongest = power.flatten().sort(descending=True).values
        assert float(strongest[:120].sum() / strongest.sum()) > 0.5


def test_contrast_and_range() -> None:
    for seed in range(12):
        random = np.random.default_rng(seed)
        cloth = weave(gray(96), random, FabricRanges(contrast=(0.05, 0.05), plain=0.0))
        assert cloth.shape == (3, 96, 96)
        assert 0 <= float(cloth.min()) <= float(cloth.max()) <= 1
        # A part of the picture may stay bare; folds change the contrast by up to a third.
        assert 0.002 < float((cloth / 0.5).log().std()) < 0.08
        assert abs(float(cloth.mean()) - 0.5) < 0.02
    bright = weave(gray(96, 0.99), np.random.default_rng(0), FabricRanges(contrast=(0.35, 0.35), plain=0.0))
    assert float(bright.max()) <= 1


def test_share_of_plain_cloths() -> None:
    """They are the smooth ground under the threads, whole or in part."""
    seeds = range(200)
    cloths = [weave(gray(16), np.random.default_rng(seed), FabricRanges(plain=0.25)) for seed in seeds]
    plain = sum(bool((cloth - 0.5).abs().max() < 1e-5) for cloth in cloths)
    assert 30 <= plain <= 70
    picture = torch.rand(3, 32, 32, generator=torch.Generator().manual_seed(1))
    ground = blur(picture[None], 2.0)[0]
    bare = [weave(picture, np.random.default_rng(seed), FabricRanges(plain=1.0, smooth=(2.0, 2.0))) for seed in seeds]
    whole = [torch.allclose(cloth, ground, atol=1e-6) for cloth in bare]
    assert 70 <= sum(whole) <= 130
    for cloth in bare:
        inside = (cloth >= torch.minimum(picture, ground) - 1e-5) & (cloth <= torch.maximum(picture, ground) + 1e-5)
        assert bool(inside.all())


@pytest.mark.parametrize(("plain", "draws"), [(0.0, 1), (0.25, 2)])
def test_no_number_is_drawn_where_no_cloth_is_plain(plain: float, draws: int) -> None:
    """Else a seed's textures would be others than before there were plain cloths."""
    drawn = []

    class Counting(np.random.Generator):
        def random(self, *arguments: Any, **options: Any) -> Any:
            drawn.append(arguments)
            return super().random(*arguments, **options)

    weave(gray(16), Counting(np.random.PCG64(0)), FabricRanges(plain=plain))
    assert len(drawn) == draws


def test_seeds() -> None:
    first, same, other = (weave(gray(64), np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert torch.equal(first, same)
    assert not torch.equal(first, other)


def test_darkened_light() -> None:
    picture = torch.rand(3, 16, 16, generator=torch.Generator().manual_seed(0))
    dark = darken(picture, 0.1)
    torch.testing.assert_close(srgb_to_linear(dark), 0.1 * srgb_to_linear(picture), atol=2e-4, rtol=1e-3)
    torch.testing.assert_close(darken(picture, 1.0), picture, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("kind", ["white", "camera", "grain", "clean"])
def test_recipes_with_fabric_and_darkness(kind: str) -> None:
    """Targets hold the texture and the darkness; gray pictures stay gray."""

    def made(seed: int, is_gray: bool = False, **ranges: float) -> tuple[torch.Tensor, torch.Tensor]:
        shares = {name: float(name == kind) for name in ("white", "camera", "grain", "clean")}
        noise = PhotoNoise(PhotoRanges(**shares, resize=0.0, jpeg=0.0, **ranges))  # type: ignore[arg-type]
        random = np.random.default_rng(seed)
        recipe = noise.plan(random, 46, 120)
        return recipe.make(gray(recipe.taken), random, is_gray)

    def fine(image: torch.Tensor) -> float:
        """Deviation of what is finer than the slow tones that targets take over from noise."""
        return float((image - blur(image[None], 4.0)[0]).std())

    seeds = range(8)
    plain, cloth, dark = ([made(seed, **one)[0] for seed in seeds] for one in ({}, {"fabric": 1.0}, {"dark": 1.0}))
    assert np.mean([fine(image) for image in plain]) < 0.004
    assert np.mean([fine(image) for image in cloth]) > 0.012
    assert np.mean([float(image.mean()) for image in dark]) < 0.8 * np.mean([float(image.mean()) for image in plain])
    for seed in seeds:
        for image in made(seed, True, fabric=1.0):
            torch.testing.assert_close(image[0], image[2], atol=1e-6, rtol=0)
