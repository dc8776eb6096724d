"""The noise estimate: fine and coarse noise, cut-outs and letterboxes, and its cost on large images."""

from __future__ import annotations

import math
import re
import warnings
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import fastden
from fastden import NoiseEstimate, estimate_noise, estimate_sigma
from fastden.images.codec import read_image
from fastden.images.samples import CROP, CROPS, WHOLE, crop_windows
from fastden.inference import estimate as estimate_module
from fastden.network.level import KNOTS


def noisy(sigma: float, shape: tuple[int, ...] = (128, 128, 3), dtype: Any = np.float32) -> Any:
    """A smooth picture in mid-gray with white noise of ``sigma`` on the scale 0-255."""
    ramp = np.linspace(0.4, 0.6, shape[1]).reshape(1, -1, *[1] * (len(shape) - 2))
    values = ramp + np.random.default_rng(0).normal(0, sigma / 255, shape)
    dtype = np.dtype(dtype)
    if dtype.kind == "f":
        return values.astype(dtype)
    return np.rint(np.clip(values, 0, 1) * np.iinfo(dtype).max).astype(dtype)


@pytest.mark.parametrize("sigma", [3, 10, 25, 50])
@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.uint8, np.uint16])
def test_white_noise_is_measured(sigma: float, dtype: Any) -> None:
    shape = (128, 128, 3)
    # At 50 the clipping of integers matters: 0.5 is 2.5 sigma from the ends.
    assert estimate_sigma(noisy(sigma, shape, dtype)) == pytest.approx(sigma, rel=0.12, abs=0.5)


@pytest.mark.parametrize("shape", [(128, 128), (128, 128, 1)])
def test_gray(shape: tuple[int, ...]) -> None:
    assert estimate_sigma(noisy(20, shape)) == pytest.approx(20, rel=0.15)


def test_bounds() -> None:
    assert max(estimate_noise(noisy(150)).sigmas) == 75
    for value in (0, 77, 128, 255):
        estimate = estimate_noise(np.full((64, 64, 3), value, np.uint8))
        assert estimate.sigma == 0
        assert estimate.kind == "unknown"
        assert "too little to judge by" in estimate.describe()


def test_alpha_has_no_part_in_the_estimate() -> None:
    image = noisy(20, (64, 64, 3), np.uint8)
    alpha = np.random.default_rng(1).integers(0, 256, (64, 64, 1), np.uint8)
    assert estimate_sigma(np.concatenate([image, alpha], 2)) == estimate_sigma(image)


@pytest.mark.parametrize(
    ("image", "error", "message"),
    [
        ([[1, 2], [3, 4]], TypeError, "image: list; accepted: a path, a PIL image, a NumPy array or a tensor"),
        (np.zeros((8, 8), np.int64), TypeError, "image: dtype int64; accepted: uint8"),
        (np.zeros((8, 8), bool), TypeError, "image: dtype bool"),
        (np.zeros(8, np.uint8), ValueError, r"image: shape \(8,\); accepted"),
        (np.zeros((8, 8, 2), np.uint8), ValueError, r"image: shape \(8, 8, 2\)"),
        (np.zeros((0, 8, 3), np.uint8), ValueError, "at least 1"),
        (np.full((8, 8), 128.0), ValueError, "image: values from 128 to 128"),
        (np.full((8, 8), np.nan), ValueError, "image: NaN"),
        (torch.zeros(3, 8, 8, device="meta"), TypeError, r"image: a tensor of another kind \(meta"),
        (torch.zeros(3, 8, 8).to_sparse(), TypeError, "image: a tensor of another kind .*accepted: a dense tensor"),
    ],
)
def test_wrong_images(image: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        estimate_sigma(image)


@given(height=st.integers(1, 12), width=st.integers(1, 12), channels=st.sampled_from([1, 3]), seed=st.integers(0, 99))
def test_any_size_gives_a_finite_number_without_warnings(height: int, width: int, channels: int, seed: int) -> None:
    image = np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert 0 <= estimate_sigma(image) <= 75


def test_a_large_image_costs_a_megapixel(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, ...]] = []
    original = estimate_module.noise_of_samples

    def spy(crops: list[Any], *_: Any) -> NoiseEstimate:
        seen.extend(crop.shape for crop in crops)
        return original([crops[0]])

    monkeypatch.setattr(estimate_module, "noise_of_samples", spy)
    large = np.broadcast_to(noisy(10, (1, 1, 1)), (5000, 3000, 1))
    estimate_sigma(large)
    assert seen == [(CROP, CROP, 1)] * CROPS**2


@given(size=st.integers(1, 5000))
def test_crops_lie_within_the_image(size: int) -> None:
    windows = crop_windows(size)
    assert len(windows) == (1 if size <= WHOLE else CROPS)
    for window in windows:
        assert 0 <= window.start < window.stop <= size
        assert window.stop - window.start == (size if size <= WHOLE else CROP)
    assert all(one.stop <= other.start for one, other in pairwise(windows))


@pytest.mark.parametrize("value", [0, 128, 255])
@pytest.mark.parametrize("share", [0.4, 0.6, 0.75])
def test_cut_outs_and_letterboxes(value: int, share: float) -> None:
    """An area of one colour says nothing about the noise of the rest."""
    image = noisy(20, (256, 256, 3), np.uint8)
    level = estimate_noise(image).at(0.5)
    image[: int(256 * share)] = value
    assert estimate_noise(image).at(0.5) == pytest.approx(level, rel=0.1)


def test_coarse_noise_is_seen() -> None:
    """The estimate finds the whole level of noise that neighbours share; one for white noise finds a part of it."""
    small = np.random.default_rng(0).normal(0, 1, (3, 66, 66))
    coarse = np.kron(small, np.ones((4, 4)))
    kernel = np.ones(4) / 4
    for axis in (1, 2):
        coarse = np.apply_along_axis(np.convolve, axis, coarse, kernel, "same")
    coarse = coarse[:, 4:260, 4:260]
    values = 0.5 + (12 / 255) * (coarse / coarse.std()).transpose(1, 2, 0)
    estimate = estimate_noise(values)
    assert estimate.sigma == pytest.approx(12, rel=0.35)
    assert estimate.kind == "coarse"
    assert estimate_noise(noisy(12, (256, 256, 3))).kind == "fine"


def test_levels_follow_brightness() -> None:
    ramp = np.linspace(0.1, 0.9, 512).reshape(1, -1, 1)
    deviation = (4 + 16 * ramp) / 255
    image = ramp + deviation * np.random.default_rng(0).normal(0, 1, (256, 512, 3))
    estimate = estimate_noise(image)
    for brightness in (0.2, 0.5, 0.8):
        assert estimate.at(brightness) == pytest.approx(4 + 16 * brightness, rel=0.2)
    assert "shadows" in estimate.describe()


def test_an_estimate_is_a_noise_level() -> None:
    image = noisy(20, (40, 52, 3), np.uint8)
    estimate = estimate_noise(image)
    assert len(estimate.sigmas) == KNOTS
    np.testing.assert_allclose(estimate.curve[0].numpy() * 255, estimate.factor * np.array(estimate.sigmas), rtol=1e-5)
    np.testing.assert_array_equal(fastden.denoise(image, estimate), fastden.denoise(image))


@pytest.mark.parametrize(("coarseness", "factor"), [(0.4, 1), (0.5, 1), (0.55, 1.1), (0.6, 1.2), (0.9, 1.8), (1.0, 2)])
def test_a_network_takes_coarse_noise_as_up_to_twice_its_level(coarseness: float, factor: float) -> None:
    sigmas = tuple(np.linspace(5.0, 60.0, KNOTS).tolist())
    estimate = NoiseEstimate(sigmas, 30.0, coarseness)
    assert estimate.factor == pytest.approx(factor, abs=1e-5)
    wanted = np.minimum(factor * np.array(sigmas), 75)
    np.testing.assert_allclose(255 * estimate.curve[0].numpy(), wanted, rtol=1e-5)
    np.testing.assert_allclose(255 * estimate.deviations_on(0, 1)[0].numpy(), sigmas, rtol=1e-5)
    for uncertainty, share in ((0.45, 1.0), (0.65, 0.5), (0.85, 0.0), (2.0, 0.0)):
        unsure = NoiseEstimate(sigmas, 30.0, coarseness, uncertainty=uncertainty)
        assert unsure.factor == pytest.approx(1 + share * (factor - 1), abs=1e-5)
    assert len({estimate, NoiseEstimate(np.array(sigmas), 30.0, coarseness)}) == 1  # type: ignore[arg-type]
    dark = NoiseEstimate(tuple(sigma / 10 for sigma in sigmas), 3.0, coarseness, black=0.1, white=0.2)
    np.testing.assert_allclose(2550 * dark.curve_on(0.1, 0.2)[0].numpy(), wanted, rtol=1e-5)


@pytest.mark.parametrize(
    "sigmas", [(), (1.0,) * 7, (*(1.0,) * 7, -0.1), (*(1.0,) * 7, math.nan), (*(1.0,) * 7, math.inf)], ids=str
)
def test_sigmas_that_are_no_curve(sigmas: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match=rf"sigmas: {re.escape(str(sigmas))}; accepted: 8 finite numbers of at least"):
        NoiseEstimate(sigmas, 1.0, 0.5)


@pytest.mark.parametrize(
    ("fields", "kind", "message"),
    [
        ({"sigmas": 5}, TypeError, "sigmas: 5; accepted: 8 finite numbers"),
        ({"sigmas": ("a",) * 8}, TypeError, r"sigmas: \('a', .*; accepted: 8 finite numbers"),
        ({"sigma": None}, TypeError, "sigma: None; accepted: a finite number"),
        ({"coarseness": math.nan}, ValueError, "coarseness: nan; accepted: a finite number of at least 0"),
        ({"uncertainty": -1}, ValueError, "uncertainty: -1; accepted: a finite number of at least 0"),
        ({"black": 1}, ValueError, "black, white: 1, 1.0; accepted: black below white"),
        ({"white": math.inf}, ValueError, "white: inf; accepted: a finite number"),
    ],
)
def test_fields_that_are_no_estimate(fields: dict[str, Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        NoiseEstimate(**{"sigmas": (5.0,) * 8, "sigma": 5.0, "coarseness": 0.5, **fields})


def test_an_estimate_of_a_brighter_picture() -> None:
    """Its levels may exceed the scale of another picture."""
    estimate = NoiseEstimate((700.0,) * KNOTS, 700.0, 0.5, white=10.0)
    assert np.isfinite(fastden.denoise(noisy(20, (20, 24, 3), np.uint8), estimate)).all()


def test_median_of_frames() -> None:
    estimates = [estimate_noise(noisy(sigma)) for sigma in (10, 12, 60)]
    estimates.append(estimate_module.UNDECIDED)
    middle = estimate_module.median_estimate(estimates)
    assert middle.sigma == estimates[1].sigma
    assert middle.sigmas == pytest.approx(estimates[1].sigmas)
    assert estimate_module.median_estimate([estimate_module.UNDECIDED]) == estimate_module.UNDECIDED


@pytest.mark.shared
def test_photographs_with_noise(shared_data: Path) -> None:
    for index in (3, 15, 23):
        clean = read_image(shared_data / "eval" / "kodak24" / f"kodim{index:02}.webp").pixels[:256, :256] / 255
        values = clean + np.random.default_rng(index).normal(0, 25 / 255, clean.shape)
        assert estimate_sigma(values) == pytest.approx(25, rel=0.15)


def test_clean_and_smooth_is_clean() -> None:
    rows, columns = np.meshgrid(np.linspace(0.2, 0.6, 256), np.linspace(0, 0.2, 256), indexing="ij")
    smooth = np.rint((rows + columns)[:, :, None] * 255 * np.ones(3)).astype(np.uint8)
    estimate = estimate_noise(smooth)
    assert estimate.kind in ("clean", "unknown")
    assert np.abs(fastden.denoise(smooth).astype(int) - smooth).max() <= 2


@pytest.mark.shared
def test_clean_photographs(shared_data: Path) -> None:
    """A part of fine texture still counts as noise: the sharpest of these pictures reach a level of 8."""
    for index in (3, 8, 13, 15):
        clean = read_image(shared_data / "eval" / "kodak24" / f"kodim{index:02}.webp").pixels
        assert estimate_sigma(clean) < 10


def test_it_takes_what_denoise_takes(tmp_path: Path) -> None:
    image = noisy(10, dtype=np.uint8)
    estimate = estimate_noise(image)
    Image.fromarray(image).save(tmp_path / "a.png")
    tensor = torch.from_numpy(image).permute(2, 0, 1)
    for same in (tmp_path / "a.png", str(tmp_path / "a.png"), Image.fromarray(image), tensor):
        assert estimate_noise(same) == estimate
    gray = Image.fromarray(image).convert("LA")
    assert estimate_noise(gray) == estimate_noise(np.asarray(gray)[:, :, 0])
    assert estimate_sigma(tensor / 255) == pytest.approx(estimate.sigma, rel=0.01)
    with pytest.raises(ValueError, match=r"image: shape \(1, 3, 128, 128\); accepted: \(C, H, W\) with C 1 or 3"):
        estimate_noise(tensor[None])
    with pytest.raises(TypeError, match="image: PIL mode CMYK; accepted: 1, L"):
        estimate_noise(Image.fromarray(image).convert("CMYK"))
    with pytest.raises(fastden.UserError, match=r"missing\.png: cannot be read"):
        estimate_noise(tmp_path / "missing.png")


def test_other_default_device_and_dtype_and_autocast() -> None:
    """The first call may come under any of them, and loads the estimator."""
    image = noisy(12)
    expected = estimate_noise(image)
    estimate_module.load_estimator.cache_clear()
    with torch.device("meta"):
        assert estimate_noise(image) == expected
    estimate_module.load_estimator.cache_clear()
    torch.set_default_dtype(torch.float64)
    try:
        assert estimate_noise(image).sigma == pytest.approx(expected.sigma, rel=1e-5)
    finally:
        torch.set_default_dtype(torch.float32)
    assert estimate_noise(image) == expected
    with torch.autocast("cpu", torch.bfloat16):
        assert estimate_noise(image) == expected


def test_the_level_is_told_in_one_way() -> None:
    """Of a clean picture as of any other."""
    for sigma, kind in ((0.5, "clean"), (5.0, "fine grain")):
        estimate = NoiseEstimate((sigma,) * 8, sigma, 0.5, uncertainty=0.6)
        assert re.fullmatch(rf"level {sigma}( \(.*\))?, {kind}", estimate.describe())
