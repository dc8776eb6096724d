"""The camera model: its noise against the formula, its curves against their inverses, its arrays against the sensor."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from fastden.training import camera, demosaic
from fastden.training.camera import CameraNoise, CameraRanges


def constant(value: float, side: int = 96) -> torch.Tensor:
    return torch.full((3, side, side), value)


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_curves_undo_each_other(share: float) -> None:
    x = torch.linspace(0, 1, 999)
    # Smoothstep is flat at its ends: a small change of its value is a large one of its argument.
    torch.testing.assert_close(camera.tone(camera.inverse_tone(x, share), share), x, atol=2e-4, rtol=0)
    torch.testing.assert_close(camera.linear_to_srgb(camera.srgb_to_linear(x)), x, atol=1e-5, rtol=0)


def test_white_stays_white() -> None:
    for seed in range(5):
        matrix = camera.camera_to_srgb(np.random.default_rng(seed))
        np.testing.assert_allclose(matrix.sum(1), 1, atol=1e-5)
        assert np.linalg.eigvals(matrix).real.min() > 0


@pytest.mark.parametrize("shot", [1e-3, 1e-2])
@pytest.mark.parametrize("value", [0.05, 0.3, 0.8])
def test_variance_is_that_of_the_formula(shot: float, value: float) -> None:
    read, process = 1e-4, camera._Process(None, "none")
    sensor = torch.full((1, 3, 200, 200), value)
    raw = camera._expose(sensor, process, shot, read, 0.0, 2**14 - 1, np.random.default_rng(0))
    clipped = 0.8 + 4 * math.sqrt(shot * 0.8 + read) > 1 and value == 0.8
    if not clipped:
        # 120,000 values: the variance of normal numbers is known to 0.4 % (one deviation).
        assert float(raw.var()) == pytest.approx(shot * value + read, rel=0.02)
        assert float(raw.mean()) == pytest.approx(value, abs=5 * math.sqrt((shot * value + read) / raw.numel()))
    assert float(raw.max()) <= 1


def test_read_noise_follows_the_shot_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its log variance is a line over that of the shot noise."""
    seen = []

    def exposed(sensor: torch.Tensor, process: Any, shot: float, read: float, *_: Any) -> torch.Tensor:
        seen.append((shot, read))
        return torch.as_tensor(process.sample(sensor))

    monkeypatch.setattr(camera, "_expose", exposed)
    model = CameraNoise(CameraRanges(read=(2.18, 1.20, 0.0)))
    for seed in range(3):
        model(constant(0.5, 16), np.random.default_rng(seed))
    for shot, read in seen:
        assert math.log(read) == pytest.approx(2.18 * math.log(shot) + 1.20)
    assert len({shot for shot, _ in seen}) == 3


def test_matrices_are_those_of_the_profiles() -> None:
    """Their sums over rows and columns, in the profiles' unit, 1/10000: one wrong number changes two of them."""
    profiles = np.rint(camera.XYZ_TO_CAMERA * 10_000).astype(int)
    np.testing.assert_allclose(profiles / 10_000, camera.XYZ_TO_CAMERA, rtol=0, atol=1e-12)
    rows = [[4999, 10234, 7891], [4170, 10289, 7770], [5111, 10334, 6238], [3955, 10167, 5792]]
    columns = [[3906, 15547, 3671], [-2781, 15123, 9887], [4866, 9522, 7295], [844, 12518, 6552]]
    assert profiles.sum(2).tolist() == rows
    assert profiles.sum(1).tolist() == columns
    # White is D65, and the sum over a column of a primary's XYZ what its chromaticity asks for.
    np.testing.assert_allclose(camera.RGB_TO_XYZ.sum(1), (0.95047, 1.0, 1.08883), atol=2e-6)
    chromaticity = camera.RGB_TO_XYZ[:2] / camera.RGB_TO_XYZ.sum(0)
    np.testing.assert_allclose(chromaticity.T, [(0.64, 0.33), (0.30, 0.60), (0.15, 0.06)], atol=2e-6)


def test_rows_share_an_offset() -> None:
    sensor = torch.full((1, 3, 200, 200), 0.3)
    process = camera._Process(None, "none")
    raw = camera._expose(sensor, process, 1e-6, 1e-6, 0.02, 2**14 - 1, np.random.default_rng(0))
    assert float(raw.mean(3).std()) == pytest.approx(0.02, rel=0.1)


def test_quantisation() -> None:
    sensor = torch.full((1, 3, 64, 64), 0.3)
    process = camera._Process(None, "none")
    raw = camera._expose(sensor, process, 1e-3, 1e-4, 0.0, 1023, np.random.default_rng(0))
    torch.testing.assert_close(raw * 1023, (raw * 1023).round(), atol=1e-3, rtol=0)


@pytest.mark.parametrize("method", ["bilinear", "malvar", "edge_directed", "x_trans"])
def test_demosaicing_is_exact_on_flat_and_keeps_samples(method: str) -> None:
    pattern = demosaic.X_TRANS if method == "x_trans" else demosaic.BAYER
    masks = demosaic.color_masks(pattern, 24, 30, (1, 0))
    assert torch.equal(masks.sum(1), torch.ones(1, 24, 30))
    flat = torch.tensor([0.2, 0.5, 0.7]).view(1, 3, 1, 1).expand(1, 3, 24, 30)
    raw = (flat * masks).sum(1, keepdim=True)
    result = getattr(demosaic, method)(raw, masks)
    if method in ("bilinear", "x_trans"):
        torch.testing.assert_close(result, flat, atol=1e-5, rtol=0)
    gray = torch.full((1, 1, 24, 30), 0.4)
    torch.testing.assert_close(getattr(demosaic, method)(gray, masks), gray.expand(1, 3, 24, 30), atol=1e-5, rtol=0)
    noise = torch.rand(1, 1, 24, 30, generator=torch.Generator().manual_seed(0))
    kept = (getattr(demosaic, method)(noise, masks) * masks).sum(1, keepdim=True)
    torch.testing.assert_close(kept, noise, atol=1e-5, rtol=0)


def test_malvar_is_exact_on_ramps() -> None:
    """Linear interpolation with its corrections reproduces gray pictures that are linear in row and column."""
    rows, columns = torch.meshgrid(torch.arange(20.0), torch.arange(20.0), indexing="ij")
    gray = (0.01 * rows + 0.02 * columns)[None, None]
    masks = demosaic.color_masks(demosaic.BAYER, 20, 20, (0, 1))
    inner = (slice(None), slice(None), slice(2, -2), slice(2, -2))
    expected = gray.expand(1, 3, 20, 20)[inner]
    torch.testing.assert_close(demosaic.malvar(gray, masks)[inner], expected, atol=1e-5, rtol=0)


def test_neighbours_share_noise_behind_demosaicing() -> None:
    """White noise has no correlation between neighbours; a camera's noise has."""
    correlations = {}
    masks = demosaic.color_masks(demosaic.BAYER, 128, 128, (0, 0))
    noise = torch.randn(1, 1, 128, 128, generator=torch.Generator().manual_seed(0))
    for name, image in (("none", noise), ("bilinear", demosaic.bilinear(noise, masks)[:, :1])):
        left, right = image[..., :-1].flatten(), image[..., 1:].flatten()
        correlations[name] = float(torch.corrcoef(torch.stack([left, right]))[0, 1])
    assert abs(correlations["none"]) < 0.03
    assert correlations["bilinear"] > 0.4


def test_a_shot_is_seeded_and_its_target_is_near_the_picture() -> None:
    clean = torch.rand(3, 16, 16, generator=torch.Generator().manual_seed(0))
    clean = 0.3 + 0.4 * torch.nn.functional.interpolate(clean[None], (96, 96), mode="bilinear")[0]
    model = CameraNoise(CameraRanges(luma_filter=0, chroma_filter=0, bands=0, sharpen=0))
    for seed in range(8):
        target, noisy = model(clean, np.random.default_rng(seed))
        again = model(clean, np.random.default_rng(seed))
        assert torch.equal(target, again[0])
        assert torch.equal(noisy, again[1])
        assert target.shape == noisy.shape == clean.shape
        assert torch.isfinite(noisy).all()
        # Smooth, unsaturated colours survive sensor and demosaicing.
        assert float((target - clean).abs().mean()) < 0.02
        assert float((noisy - target).std()) > 1e-3


def test_noise_grows_with_brightness_in_the_sensor() -> None:
    model = CameraNoise(
        CameraRanges(shot=(0.02, 0.02), tone=(0, 0), luma_filter=0, chroma_filter=0, bands=0, sharpen=0)
    )
    deviations = []
    for value in (0.1, 0.5):
        target, noisy = model(constant(value), np.random.default_rng(3))
        slope = 1.055 / 2.4 * (camera.srgb_to_linear(torch.tensor(value)).item()) ** (1 / 2.4 - 1)
        deviations.append(float((noisy - target)[:, 8:-8, 8:-8].std()) / slope)
    # Compared in linear light: sRGB's curve is steeper in the shadows and hides it.
    assert deviations[1] > 1.5 * deviations[0]


def test_shrunk_bands_leave_coarse_noise() -> None:
    """Of white noise an average over 8 x 8 pixels leaves 1/8; where fine bands are shrunk it leaves more of less."""
    noise = 0.05 * torch.randn(1, 1, 160, 160, generator=torch.Generator().manual_seed(0))
    flat = torch.full_like(noise, 0.5)
    left = camera.shrink_bands(flat + noise, noise, (3.0, 2.0, 0.0)) - flat

    def coarse(values: torch.Tensor) -> float:
        return float(torch.nn.functional.avg_pool2d(values, 8).std() / values.std())

    assert float(left.std()) < 0.4 * float(noise.std())
    assert coarse(noise) == pytest.approx(0.125, rel=0.15)
    assert coarse(left) > 0.3


def test_shrunk_bands_keep_edges_and_means() -> None:
    step = torch.zeros(1, 1, 64, 64)
    step[..., 32:] = 1.0
    noise = 0.01 * torch.randn(1, 1, 64, 64, generator=torch.Generator().manual_seed(0))
    kept = camera.shrink_bands(step, noise, (3.0, 2.0, 1.0))
    # No band of the step loses more than its threshold, the deviation of less than 0.01 times 3, 2 and 1.
    assert float((kept - step).abs().max()) < 0.06
    torch.testing.assert_close(camera.shrink_bands(step, noise, (0.0, 0.0, 0.0)), step, atol=1e-6, rtol=0)
    assert float(kept.mean()) == pytest.approx(0.5, abs=1e-3)
