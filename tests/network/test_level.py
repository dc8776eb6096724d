"""Curves of noise level: their fit, their maps, and equal maps of a tile and of the picture."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from fastden.network import level
from fastden.network.level import KNOTS, NoiseEstimator, basis, fit_curve, interpolated, level_inside, level_map
from tests.helpers import max_error, random_network


def test_basis_sums_to_one_and_interpolates() -> None:
    brightness = torch.rand(2, 50, generator=torch.Generator().manual_seed(0))
    weights = basis(brightness)
    torch.testing.assert_close(weights.sum(2), torch.ones(2, 50))
    curves = torch.rand(2, KNOTS, generator=torch.Generator().manual_seed(1))
    expected = torch.einsum("nmk,nk->nm", weights, curves)
    found = interpolated(curves, brightness.view(2, 1, 5, 10)).view(2, 50)
    torch.testing.assert_close(found, expected)


def test_fit_finds_a_curve_and_extends_it() -> None:
    brightness = torch.rand(1, 4000, generator=torch.Generator().manual_seed(0)) * 0.6
    truth = torch.log(0.02 + 0.03 * brightness)
    noise = 0.3 * torch.randn(1, 4000, generator=torch.Generator().manual_seed(1))
    curve = fit_curve(truth + noise, brightness, torch.ones_like(truth))[0]
    knots = torch.linspace(0, 1, KNOTS)
    inside = knots <= 0.6
    expected = torch.log(0.02 + 0.03 * knots)
    assert float((curve - expected)[inside].abs().max()) < 0.1
    # No cell lies above: the curve continues, and neither falls to 0 nor grows without bound.
    assert float((curve - expected)[~inside].abs().max()) < 0.4


def test_cells_without_weight_do_not_count() -> None:
    brightness = torch.rand(1, 400, generator=torch.Generator().manual_seed(0))
    logs = torch.full((1, 400), math.log(0.05))
    weight = torch.ones(1, 400)
    logs[0, :300], weight[0, :300] = -8.0, 0.0
    torch.testing.assert_close(fit_curve(logs, brightness, weight), torch.full((1, KNOTS), math.log(0.05)))


def test_weights_may_be_of_any_size() -> None:
    brightness = torch.rand(1, 100, generator=torch.Generator().manual_seed(0))
    logs = torch.log(0.01 + brightness)
    weight = torch.rand(1, 100, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(
        fit_curve(logs, brightness, weight), fit_curve(logs, brightness, 1000 * weight), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("shape", [(1, 1), (2, 7), (9, 4), (30, 41)])
def test_map_is_of_mirrored_surroundings(shape: tuple[int, int]) -> None:
    x = torch.rand(2, 3, *shape, generator=torch.Generator().manual_seed(0))
    curves = torch.rand(2, KNOTS, generator=torch.Generator().manual_seed(1))
    found = level_map(curves, x)
    assert found.shape == (2, 1, *shape)
    if min(shape) > 2:
        expected = level_inside(curves, F.pad(x, (2, 2, 2, 2), mode="reflect"))
        torch.testing.assert_close(found, expected)
    if shape == (1, 1):
        torch.testing.assert_close(found, interpolated(curves, x.mean(1, keepdim=True)))


def test_flat_and_clipped_cells_are_not_usable() -> None:
    x = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 0.2 + 0.4
    x[:, :, :8] = 1.0
    x[:, :, 8:16, :16] = 0.5
    x[:, :, 24:] = 0.0
    _, usable = level.cell_brightness(x)
    assert not usable[0, 0].any()
    assert not usable[0, 1, :2].any()
    assert usable[0, 1, 2:].all()
    assert usable[0, 2].all()
    assert not usable[0, 3].any()


def test_truth_of_white_and_of_coarse_noise() -> None:
    generator = torch.Generator().manual_seed(0)
    clean = torch.full((1, 3, 96, 96), 0.5)
    white = 0.05 * torch.randn(clean.shape, generator=generator)
    cells = level.true_cells(clean, clean + white)
    assert float(cells.log_level.exp().mean()) == pytest.approx(0.05, rel=0.03)
    assert float(cells.coarseness.exp().mean()) == pytest.approx(0.5, abs=0.03)
    coarse = F.interpolate(0.05 * torch.randn((1, 3, 24, 24), generator=generator), scale_factor=4)
    assert float(level.true_cells(clean, clean + coarse).coarseness.exp().mean()) > 0.95
    nothing = level.true_cells(clean, clean)
    assert float(nothing.log_level.exp().max()) == pytest.approx(level.FLOOR)
    assert level.levels_of(nothing.log_level.flatten(1)[:, :KNOTS]).max() == 0


def test_estimator_is_blind_to_brightness_alone_and_small() -> None:
    estimator = NoiseEstimator().eval()
    x = torch.rand(1, 3, 40, 48, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        cells = estimator(x)
        longer = estimator(F.pad(x, (0, 5, 0, 3)))
    assert cells.log_level.shape == (1, 5, 6)
    # Pixels beyond the last whole cell do not count.
    for one, other in zip(cells, longer, strict=True):
        torch.testing.assert_close(one, other)
    per_pixel = sum(
        module.weight.numel() / step**2
        for step, module in (
            *zip((1, 2, 4), estimator.banks, strict=True),
            *((8, layer) for layer in estimator.trunk if isinstance(layer, torch.nn.Conv2d)),
        )
    )
    assert per_pixel < 0.1 * 140_000  # a tenth of the composed network's arithmetic


def test_rounding_makes_no_negative_level() -> None:
    """The sum of the ramps of a curve that falls to zero may end slightly below zero."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        curves = torch.rand(1, KNOTS, generator=generator) * 0.3
        curves[:, -3:] = 0.0
        brightness = torch.rand(1, 1, 32, 32, generator=generator)
        assert float(interpolated(curves, brightness).min()) >= 0


def test_a_quarter_of_texture_moves_the_level_by_a_tenth() -> None:
    brightness = torch.rand(1, 20, 20, generator=torch.Generator().manual_seed(0))
    log_level = torch.full((1, 20, 20), math.log(0.04))
    log_level[:, :5] += 1.6  # five times as strong
    nothing = torch.zeros_like(log_level)
    cells = level.Cells(log_level, nothing, nothing, brightness, torch.ones_like(log_level, dtype=torch.bool))
    robust, plain = level.robust_curve(cells).exp() / 0.04, level.curve_of(cells).exp() / 0.04
    assert float(robust.mean()) < 1.15
    assert float(plain.mean()) > 1.4


def test_coarseness_is_that_of_the_least_coarse_cells() -> None:
    """Texture in four fifths of a picture, cells that count for nothing, and coarse noise everywhere."""
    coarseness = torch.full((2, 10, 10), math.log(0.8))
    coarseness[0, :2] = math.log(0.5)
    coarseness[:, 9] = math.log(0.3)
    nothing = torch.zeros_like(coarseness)
    usable = torch.ones_like(coarseness, dtype=torch.bool)
    usable[:, 9] = False
    log_variance = torch.full_like(coarseness, 2 * math.log(0.7))
    log_variance[:, 9] = 0.0
    cells = level.Cells(nothing, log_variance, coarseness, nothing, usable)
    weights = level.weights_of(cells)
    torch.testing.assert_close(level.picture_coarseness(cells, weights), torch.tensor([0.5, 0.8]))
    torch.testing.assert_close(level.picture_uncertainty(cells, weights), torch.tensor([0.7, 0.7]))
    none = level.picture_coarseness(cells, torch.zeros_like(weights))
    assert torch.isfinite(none).all()


@pytest.mark.parametrize(
    ("coarseness", "uncertainty", "factor"),
    [(0.4, 0.1, 1.0), (0.5, 0.1, 1.0), (0.6, 0.1, 1.2), (0.9, 0.1, 1.8), (0.9, 0.65, 1.4), (0.9, 0.9, 1.0), (1, 0, 2)],
)
def test_what_levels_are_multiplied_by(coarseness: float, uncertainty: float, factor: float) -> None:
    found = level.white_factor(torch.tensor([coarseness]), torch.tensor([uncertainty]))
    assert float(found) == pytest.approx(factor, abs=1e-5)


def test_a_float64_network_has_float64_levels() -> None:
    model = random_network(dtype=torch.float64)
    x = torch.rand(1, 3, 3, 4, dtype=torch.float64)
    even = torch.full((1, KNOTS), 0.1, dtype=torch.float64)
    assert max_error(model(x, even), model(x, 0.1)) < 1e-12
    curve = (torch.rand(1, KNOTS, dtype=torch.float64) * 0.2).requires_grad_()
    assert torch.autograd.gradcheck(model, (x.requires_grad_(), curve), fast_mode=True)
