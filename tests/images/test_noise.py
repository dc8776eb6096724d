"""The noise estimate: right on white noise, bounded, and as cheap on a large image as on a small one."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastden import estimate_sigma
from fastden.images import noise as noise_module
from fastden.images.codec import read_image


def noisy(sigma: float, shape: tuple[int, ...] = (128, 128, 3), dtype: Any = np.float32) -> Any:
    """A smooth picture in mid-gray with noise of ``sigma`` on the scale 0-255."""
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
    # At 50 the clipping of integers bites: 0.5 is 2.5 sigma from the ends.
    assert estimate_sigma(noisy(sigma, shape, dtype)) == pytest.approx(sigma, rel=0.06, abs=0.3)


@pytest.mark.parametrize("shape", [(128, 128), (128, 128, 1)])
def test_gray(shape: tuple[int, ...]) -> None:
    assert estimate_sigma(noisy(20, shape)) == pytest.approx(20, rel=0.08)


def test_bounds() -> None:
    assert estimate_sigma(noisy(120)) == 75
    for value in (0, 77, 128, 255):
        assert estimate_sigma(np.full((64, 64, 3), value, np.uint8)) == 0


def test_alpha_has_no_part_in_the_estimate() -> None:
    image = noisy(20, (64, 64, 3), np.uint8)
    alpha = np.random.default_rng(1).integers(0, 256, (64, 64, 1), np.uint8)
    assert estimate_sigma(np.concatenate([image, alpha], 2)) == estimate_sigma(image)


@pytest.mark.parametrize(
    ("image", "error", "message"),
    [
        ([[1, 2], [3, 4]], TypeError, "image: list; accepted: a NumPy array"),
        (np.zeros((8, 8), np.int64), TypeError, "image: dtype int64; accepted: uint8"),
        (np.zeros((8, 8), bool), TypeError, "image: dtype bool"),
        (np.zeros(8, np.uint8), ValueError, r"image: shape \(8,\); accepted"),
        (np.zeros((8, 8, 2), np.uint8), ValueError, r"image: shape \(8, 8, 2\)"),
        (np.zeros((0, 8, 3), np.uint8), ValueError, "at least 1"),
        (np.full((8, 8), 128.0), ValueError, "image: values from 128 to 128"),
        (np.full((8, 8), np.nan), ValueError, "image: NaN"),
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


def test_a_large_image_costs_four_crops(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    original = noise_module._estimate_crop
    monkeypatch.setattr(
        noise_module, "_estimate_crop", lambda crop: seen.append(crop.shape) or original(crop[:64, :64])
    )
    image = np.broadcast_to(noisy(10, (64, 64, 1)), (64, 64, 1))
    large = np.tile(image, (40, 30, 1))
    assert estimate_sigma(large) == pytest.approx(10, rel=0.15)
    assert seen == [(512, 512, 1)] * 4


def test_a_textured_quarter_does_not_decide() -> None:
    image = noisy(10, (1030, 1030, 1))
    image[515:, 515:] += np.random.default_rng(1).normal(0, 0.2, (515, 515, 1)).astype(np.float32)
    assert estimate_sigma(image) == pytest.approx(10, rel=0.05)


@given(size=st.integers(1, 5000))
def test_crops_lie_within_the_image(size: int) -> None:
    windows = noise_module.crop_windows(size)
    assert len(windows) == (1 if size <= 512 else 2)
    for window in windows:
        assert 0 <= window.start < window.stop <= size
        assert window.stop - window.start == min(size, 512)


@pytest.mark.shared
def test_photographs_with_noise(shared_data: Path) -> None:
    found = []
    for index in (3, 15, 23):
        clean = read_image(shared_data / "eval" / "kodak24" / f"kodim{index:02}.webp").pixels[:256, :256] / 255
        values = clean + np.random.default_rng(index).normal(0, 25 / 255, clean.shape)
        found.append(estimate_sigma(values))
    assert np.abs(np.array(found) - 25).max() < 4
