"""An estimator of a picture's noise level, and the curve that it makes: noise level over brightness.

The noise level is the local standard deviation of the noise. The noise may be white, or shared by neighbours and
channels. The curve is made once for a whole picture, and gives each pixel a level by the brightness around it. So tiles
are exact, and people can be told the curve: 12 in the shadows, 6 in the lights.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastden.network.padding import reflected_index

#: Brightness, 0 to 1, at which a curve holds a level.
KNOTS = 8
#: Side of the cells that the estimator judges, pixels.
CELL = 8
#: Noise below this level counts as none: it is less than the rounding of 8 bits (1 / sqrt(12) steps).
FLOOR = 0.25 / 255
#: Pixels on each side over which brightness is averaged.
BRIGHTNESS_RADIUS = 2
#: Weights of a curve's second and first differences in the fit: just enough to hold knots that no cell is near.
_BEND, _SLOPE = 0.01, 0.002
#: A cell whose log level differs more than this from the curve counts less: about three times the uncertainty of a cell
#: of 3 x 64 values. Then the number of fits; more do not move the curve.
_FAR, _FITS = 0.3, 6
#: Noise that neighbours share is given to the network as this multiple of its deviation, from the second coarseness on;
#: white noise, below the first, as its own deviation.
COARSE_FACTOR, _WHITE_UNTIL, _COARSE_FROM = 2.0, 0.55, 0.60
#: Up to the first uncertainty of the log level this holds; from the second on nothing is multiplied. Texture that
#: passes for noise has uncertainties of 0.6 to 0.8, noise of phones and of dark rooms 0.1 to 0.2.
_CERTAIN_UNTIL, _UNCERTAIN_FROM = 0.45, 0.85
#: See :func:`picture_coarseness`.
_COARSENESS_SHARE = 0.1
#: Cells whose mean is nearer to black or white than this are clipped and tell nothing.
CLIPPED = 1.5 / 255


def level_map(curves: Tensor, x: Tensor) -> Tensor:
    """The level of each pixel of pictures, from their curves.

    Args:
        curves: (N, :data:`KNOTS`) or (1, :data:`KNOTS`), standard deviations on the scale 0-1 at values of brightness
            evenly spaced from black to white; linear between them.
        x: (N, C, H, W), values in about [0, 1].

    Returns:
        (N, 1, H, W), float32.
    """
    rows = reflected_index(-BRIGHTNESS_RADIUS, x.shape[2] + BRIGHTNESS_RADIUS, x.shape[2], x.device)
    columns = reflected_index(-BRIGHTNESS_RADIUS, x.shape[3] + BRIGHTNESS_RADIUS, x.shape[3], x.device)
    return level_inside(curves, x.mean(1, keepdim=True)[:, :, rows][:, :, :, columns])


def level_inside(curves: Tensor, x: Tensor) -> Tensor:
    """:func:`level_map` of a window with :data:`BRIGHTNESS_RADIUS` more pixels on each side, which are cut off."""
    side = 2 * BRIGHTNESS_RADIUS + 1
    gray = x.float().mean(1, keepdim=True)
    # One axis after the other takes a third of the additions.
    brightness = F.avg_pool2d(F.avg_pool2d(gray, (side, 1), stride=1), (1, side), stride=1)
    return interpolated(curves, brightness)


def interpolated(curves: Tensor, brightness: Tensor) -> Tensor:
    """``curves`` (N or 1, :data:`KNOTS`) at ``brightness`` (N, 1, H, W), which is clipped to [0, 1]."""
    position = brightness.clamp(0, 1) * (KNOTS - 1)
    curves = curves.to(position)
    level = curves[:, :1, None, None].expand_as(position).clone()
    # A sum of ramps: PyTorch does a look-up pixel by pixel, which is slower.
    for knot, slope in enumerate(curves.diff(dim=1).unbind(1)):
        level += slope[:, None, None, None] * (position - knot).clamp(0, 1)
    # Rounding may make a zero slightly negative.
    return level.clamp(min=0)


def basis(brightness: Tensor) -> Tensor:
    """Weight of each knot for values of brightness (N, M): (N, M, KNOTS)."""
    position = brightness.clamp(0, 1) * (KNOTS - 1)
    return (1 - (position[..., None] - torch.arange(KNOTS, device=position.device)).abs()).clamp(min=0)


def fit_curve(log_level: Tensor, brightness: Tensor, weight: Tensor) -> Tensor:
    """The curve through the cells of a picture: weighted least squares in log levels.

    It is nearly straight where there are no cells.

    Args:
        log_level, brightness, weight: (N, M).

    Returns:
        Log levels at the knots, (N, KNOTS).
    """
    weight = weight / weight.sum(1, keepdim=True).clamp(min=1e-12)
    knots = basis(brightness)
    identity = torch.eye(KNOTS, device=weight.device, dtype=weight.dtype)
    slopes, bends = identity.diff(dim=0), identity.diff(n=2, dim=0)
    penalty = _BEND * bends.T @ bends + _SLOPE * slopes.T @ slopes + 1e-6 * identity
    matrix = torch.einsum("nmi,nm,nmj->nij", knots, weight, knots) + penalty
    # The last term of the penalty pulls towards log level 0, so the fit is of differences from the mean.
    mean = (weight * log_level).sum(1, keepdim=True)
    side = torch.einsum("nmi,nm,nm->ni", knots, weight, log_level - mean)
    return mean + torch.linalg.solve(matrix, side[..., None])[..., 0]


class Cells(NamedTuple):
    """What is known of each cell of 8 x 8 pixels, (N, h, w) each.

    ``log_level`` and ``log_variance``: logarithm of the level, and of how uncertain it is. ``coarseness``: logarithm of
    the share of the noise's deviation that outlives averaging 2 x 2 pixels (white: log 0.5). ``brightness``: mean of
    all channels. ``usable``: neither clipped nor exactly flat.
    """

    log_level: Tensor
    log_variance: Tensor
    coarseness: Tensor
    brightness: Tensor
    usable: Tensor


def cell_brightness(x: Tensor) -> tuple[Tensor, Tensor]:
    """Brightness of the cells of ``x`` (N, C, H, W), and which are usable: (N, h, w) each."""
    gray = x.mean(1, keepdim=True)
    mean = F.avg_pool2d(gray, CELL)[:, 0]
    flat = (F.max_pool2d(gray, CELL) == -F.max_pool2d(-gray, CELL))[:, 0]
    return mean, ~flat & (mean > CLIPPED) & (mean < 1 - CLIPPED)


class NoiseEstimator(nn.Module):
    """A small network that judges the noise of each cell of a picture.

    Banks of zero-mean filters at three scales, the logarithm of their energy in each cell (so that it works alike at
    all levels), and convolutions over neighbouring cells that tell noise from texture: 4,200 multiply-accumulates a
    pixel, 3 % of the denoiser's, on at most a million pixels of a picture.

    Args:
        filters: of each bank.
        width: channels behind them.
    """

    def __init__(self, filters: int = 24, width: int = 64) -> None:
        super().__init__()
        self.banks = nn.ModuleList(nn.Conv2d(3, filters, 5, bias=False) for _ in range(3))
        self.trunk = nn.Sequential(
            nn.Conv2d(3 * filters + 3, width, 3, padding=1, padding_mode="replicate"),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1, padding_mode="replicate"),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1, padding_mode="replicate"),
            nn.ReLU(),
            nn.Conv2d(width, 3, 1),
        )

    def forward(self, x: Tensor) -> Cells:
        """Judge pictures.

        Args:
            x: (N, 3, H, W), float32 in [0, 1] (white noise may exceed it), H and W at least 8; pixels beyond the
                last whole cell are not used.
        """
        height, width = (size // CELL * CELL for size in x.shape[2:])
        x = x[:, :, :height, :width]
        features = []
        for step, bank in zip((1, 2, 4), self.banks, strict=True):
            assert isinstance(bank, nn.Conv2d)
            weight = bank.weight - bank.weight.mean((2, 3), keepdim=True)
            scaled = F.avg_pool2d(x, step) if step > 1 else x
            response = F.conv2d(F.pad(scaled, (2, 2, 2, 2), mode="replicate"), weight)
            energy = F.avg_pool2d(response.square(), CELL // step)
            features.append(0.5 * torch.log(energy + FLOOR**2) + 4.0)
        features.append(F.avg_pool2d(x, CELL) - 0.5)
        log_level, log_variance, coarseness = self.trunk(torch.cat(features, 1)).unbind(1)
        return Cells(log_level - 4.0, log_variance.clamp(-6, 4), coarseness - 0.5, *cell_brightness(x))


def weights_of(cells: Cells) -> Tensor:
    """How much each cell counts in its picture's curve, (N, h w)."""
    return (torch.exp(-cells.log_variance) * cells.usable).flatten(1)


def curve_of(cells: Cells) -> Tensor:
    """Log levels of the curve of each picture, (N, KNOTS)."""
    return fit_curve(cells.log_level.flatten(1), cells.brightness.flatten(1), weights_of(cells))


def robust_curve(cells: Cells) -> Tensor:
    """:func:`curve_of`, in which cells far from the curve count less (Huber, "Robust estimation", 1964).

    Where texture in a quarter of a picture is taken for noise, the level changes by a tenth, not by a half.
    """
    log_level, brightness, weight = cells.log_level.flatten(1), cells.brightness.flatten(1), weights_of(cells)
    own = torch.ones_like(weight)
    for _ in range(_FITS):
        curve = fit_curve(log_level, brightness, weight * own)
        distance = (log_level - torch.einsum("nmk,nk->nm", basis(brightness), curve)).abs()
        own = (_FAR / distance.clamp(min=1e-6)).clamp(max=1)
    return curve


def levels_of(log_levels: Tensor) -> Tensor:
    """Levels of curves in log levels: 0 where they are not above :data:`FLOOR`, at most 1."""
    levels = log_levels.exp().clamp(max=1)
    return torch.where(levels > FLOOR, levels, torch.zeros_like(levels))


def white_factor(coarseness: Tensor, uncertainty: Tensor) -> Tensor:
    """By what the level of noise is multiplied before a network takes it.

    A network that learned white noise removes little of noise that neighbours share: it takes it for detail. Given
    twice the level, it removes it. So white and coarse noise are given on one scale, that of white noise. Where the
    estimator is unsure whether it sees noise or texture, the level is not raised.

    Args:
        coarseness: of the noise, see :func:`picture_coarseness`.
        uncertainty: of its level, see :func:`picture_uncertainty`; of the same shape.

    Returns:
        1 to 2, of that shape.
    """
    share = (coarseness - _WHITE_UNTIL) / (_COARSE_FROM - _WHITE_UNTIL)
    doubt = (uncertainty - _CERTAIN_UNTIL) / (_UNCERTAIN_FROM - _CERTAIN_UNTIL)
    return 1 + (COARSE_FACTOR - 1) * share.clamp(0, 1) * (1 - doubt.clamp(0, 1))


def picture_coarseness(cells: Cells, weights: Tensor) -> Tensor:
    """The coarseness of each picture, (N,): what a tenth of its cells, counted by ``weights`` (N, h w), stay below.

    Texture makes cells look coarser, not finer: white noise of sigma 15 on texture has a mean of 0.63, as noise from a
    sensor has that was only demosaiced; a tenth of its cells stay below 0.56, of the other's below 0.60.
    """
    values, order = cells.coarseness.flatten(1).sort(1)
    below = weights.gather(1, order).cumsum(1)
    first = (below < _COARSENESS_SHARE * below[:, -1:]).sum(1, keepdim=True).clamp(max=values.shape[1] - 1)
    return values.gather(1, first)[:, 0].exp().clamp(max=1)


def picture_uncertainty(cells: Cells, weights: Tensor) -> Tensor:
    """How uncertain each picture's log level is, (N,): the standard deviation of a cell, their geometric mean."""
    total = weights.sum(1).clamp(min=1e-12)
    return (0.5 * (weights * cells.log_variance.flatten(1)).sum(1) / total).exp()


def true_cells(clean: Tensor, noisy: Tensor) -> Cells:
    """The right estimate of noisy pictures (N, 3, H, W) whose clean form is known."""
    height, width = (size // CELL * CELL for size in clean.shape[2:])
    noisy, error = noisy[:, :, :height, :width], (noisy - clean)[:, :, :height, :width]
    around = {"kernel_size": 3, "stride": 1, "padding": 1, "count_include_pad": False}

    def deviation(values: Tensor, cell: int) -> Tensor:
        squares = F.avg_pool2d(values.square().mean(1, keepdim=True), cell)
        return F.avg_pool2d(squares, **around)[:, 0].sqrt()  # type: ignore[arg-type]

    level = deviation(error, CELL)
    coarse = deviation(F.avg_pool2d(error, 2), CELL // 2)
    log_level = torch.log(level.clamp(min=FLOOR))
    coarseness = torch.log((coarse + 0.2 * FLOOR) / (level + 0.2 * FLOOR)).clamp(min=math.log(0.25))
    return Cells(log_level, torch.zeros_like(level), coarseness, *cell_brightness(noisy))
