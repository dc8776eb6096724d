"""An estimator of a picture's noise level, and the curve that it makes: noise level over brightness.

The noise level is the local standard deviation of the noise. The noise may be white, or shared by neighbours and
channels. The curve is made once for a whole picture. It gives each pixel a level from the brightness around the pixel.
So tiles are exact, and people can read the curve: 12 in the shadows, 6 in the lights.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastden.network.padding import reflected_index
from fastden.ops.tensors import may_overwrite

#: Brightness, 0 to 1, at which a curve holds a level.
KNOTS = 8
#: Side of the cells that the estimator judges, in pixels.
CELL = 8
#: Noise below this level counts as none: it is less than the rounding of 8 bits (1 / sqrt(12) steps).
FLOOR = 0.25 / 255
#: Pixels on each side over which brightness is averaged.
BRIGHTNESS_RADIUS = 2
#: Weights of a curve's second and first differences in the fit. They are just large enough to fix a knot that has no
#: cell near it.
_BEND, _SLOPE = 0.01, 0.002
#: A cell whose log level differs from the curve by more than ``_FAR`` counts less; this is about three times the
#: uncertainty of a cell of 3 x 64 values. ``_FITS`` is the number of fits; more fits do not move the curve.
_FAR, _FITS = 0.3, 6
#: White noise has a coarseness below this one. Of Kodak's pictures with white noise, all have from sigma 5 on.
WHITE_UNTIL = 0.55
#: Up to the first uncertainty of the log level, the whole factor applies; from the second on, no factor applies.
#: Texture that looks like noise has uncertainties of 0.7 to 1.1 (``benchmarks/results/noise-estimates.json``), real
#: noise of phones and dark rooms 0.05 to 0.12 (``real-photos.json``).
CERTAIN_UNTIL, _UNCERTAIN_FROM = 0.45, 0.85
#: Share of the cells that stay below a picture's coarseness, see :func:`picture_coarseness`.
_COARSENESS_SHARE = 0.1
#: Cells whose mean is nearer to black or white than this are clipped; they are not used.
CLIPPED = 1.5 / 255


def level_map(curves: Tensor, x: Tensor) -> Tensor:
    """The level of each pixel of pictures, from their curves.

    Args:
        curves: (N, :data:`KNOTS`) or (1, :data:`KNOTS`), standard deviations on the scale 0-1 at values of brightness
            evenly spaced from black to white; linear between them.
        x: (N, C, H, W), values in about [0, 1].

    Returns:
        (N, 1, H, W), float32; float64 where ``x`` is.
    """
    rows = reflected_index(-BRIGHTNESS_RADIUS, x.shape[2] + BRIGHTNESS_RADIUS, x.shape[2], x.device)
    columns = reflected_index(-BRIGHTNESS_RADIUS, x.shape[3] + BRIGHTNESS_RADIUS, x.shape[3], x.device)
    return level_inside(curves, x.mean(1, keepdim=True)[:, :, rows][:, :, :, columns])


def level_inside(curves: Tensor, x: Tensor) -> Tensor:
    """:func:`level_map` of a window without its outer :data:`BRIGHTNESS_RADIUS` pixels on each side."""
    side = 2 * BRIGHTNESS_RADIUS + 1
    gray = (x if x.dtype == torch.float64 else x.float()).mean(1, keepdim=True)
    # An average over one axis after the other takes a third of the additions.
    brightness = F.avg_pool2d(F.avg_pool2d(gray, (side, 1), stride=1), (1, side), stride=1)
    return interpolated(curves, brightness)


def interpolated(curves: Tensor, brightness: Tensor) -> Tensor:
    """``curves`` (N or 1, :data:`KNOTS`) at ``brightness`` (N, 1, H, W), which is clipped to [0, 1]."""
    position = brightness.clamp(0, 1) * (KNOTS - 1)
    curves = curves.to(position)
    level = curves[:, :1, None, None].expand_as(position).clone()
    # This is a sum of ramps. A look-up is slower, because PyTorch does it pixel by pixel.
    for knot, slope in enumerate(curves.diff(dim=1).unbind(1)):
        ramp = slope[:, None, None, None] * (position - knot).clamp(0, 1)
        level = level.add_(ramp) if may_overwrite() else level + ramp
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
    # The last term of the penalty pulls towards log level 0, so the fit uses differences from the mean.
    mean = (weight * log_level).sum(1, keepdim=True)
    side = torch.einsum("nmi,nm,nm->ni", knots, weight, log_level - mean)
    return mean + torch.linalg.solve(matrix, side[..., None])[..., 0]


class Cells(NamedTuple):
    """What the estimator knows about each cell of 8 x 8 pixels; each tensor is (N, h, w).

    Attributes:
        log_level: logarithm of the level, which is on the scale 0-1.
        log_variance: logarithm of the variance of ``log_level``.
        coarseness: logarithm of the share of the noise's deviation that remains after averaging 2 x 2 pixels (white
            noise: log 0.5).
        brightness: mean of all channels.
        usable: whether the cell is neither clipped nor exactly flat.
    """

    log_level: Tensor
    log_variance: Tensor
    coarseness: Tensor
    brightness: Tensor
    usable: Tensor


def cell_brightness(x: Tensor) -> tuple[Tensor, Tensor]:
    """Brightness of the cells of ``x`` (N, C, H, W), and whether each cell is usable: (N, h, w) each."""
    gray = x.mean(1, keepdim=True)
    mean = F.avg_pool2d(gray, CELL)[:, 0]
    flat = (F.max_pool2d(gray, CELL) == -F.max_pool2d(-gray, CELL))[:, 0]
    return mean, ~flat & (mean > CLIPPED) & (mean < 1 - CLIPPED)


class NoiseEstimator(nn.Module):
    """A small network that judges the noise of each cell of a picture.

    It has banks of zero-mean filters at three scales. It takes the logarithm of their energy in each cell, so that it
    works equally well at all levels. Convolutions over neighbouring cells then tell noise from texture. It needs 4,200
    multiply-accumulates a pixel, 3 % of the denoiser's, on at most a million pixels of a picture. A wider one (32
    filters, 96 channels) erred less on crops of training, but real pictures gained nothing, in a trial whose figures
    were not kept.

    Args:
        filters: number of filters in each bank.
        width: number of channels of the convolutions over cells.
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
            x: (N, 3, H, W), float32 in [0, 1] (white noise may exceed it), H and W at least 8. Pixels beyond the
                last whole cell are not used.

        Returns:
            :class:`Cells`, tensors of (N, H // 8, W // 8).
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

    If texture in a quarter of a picture looks like noise, the level changes by a tenth, not by a half.
    """
    log_level, brightness, weight = cells.log_level.flatten(1), cells.brightness.flatten(1), weights_of(cells)
    own = torch.ones_like(weight)
    for _ in range(_FITS):
        curve = fit_curve(log_level, brightness, weight * own)
        distance = (log_level - torch.einsum("nmk,nk->nm", basis(brightness), curve)).abs()
        own = (_FAR / distance.clamp(min=1e-6)).clamp(max=1)
    return curve


def levels_of(log_levels: Tensor) -> Tensor:
    """Convert log levels to levels: 0 where a level is not above :data:`FLOOR`, and at most 1."""
    levels = log_levels.exp().clamp(max=1)
    return torch.where(levels > FLOOR, levels, torch.zeros_like(levels))


def white_factor(coarseness: Tensor, uncertainty: Tensor) -> Tensor:
    """The factor that multiplies a level of noise before a network takes it: twice the coarseness, from 1 to 2.

    A network that learned white noise removes little of the noise that neighbours share, because such noise looks like
    detail. So the network gets the deviation of white noise that leaves as much behind where 2 x 2 pixels are averaged:
    white and coarse noise are on one scale. Twice the deviation for all that is coarse, as it once was, does not tell
    the network how coarse it is: it took the weave of a dark cloth for noise. Where the estimator is not sure whether
    it sees noise or texture, the level is not raised.

    Args:
        coarseness: coarseness of the noise, see :func:`picture_coarseness`; any shape.
        uncertainty: uncertainty of its level, see :func:`picture_uncertainty`; the same shape.

    Returns:
        Factors from 1 to 2, of the same shape.
    """
    doubt = (uncertainty - CERTAIN_UNTIL) / (_UNCERTAIN_FROM - CERTAIN_UNTIL)
    return 1 + (2 * coarseness - 1).clamp(0, 1) * (1 - doubt.clamp(0, 1))


def picture_coarseness(cells: Cells, weights: Tensor) -> Tensor:
    """The coarseness of each picture, (N,): the value that a tenth of its cells stay below.

    Texture makes cells look coarser, not finer. So this value tells white noise on texture from sensor noise better
    than a mean does: it is at most 0.51 for white noise of sigma 15 on Kodak's pictures, at most 0.52 for sigma 5, and
    0.70 to 0.72 on average for pictures of phones and dark rooms
    (``benchmarks/results/noise-estimates.json`` and ``real-photos.json``).

    Args:
        cells: cells of N pictures.
        weights: (N, h w), how much each cell counts.
    """
    values, order = cells.coarseness.flatten(1).sort(1)
    below = weights.gather(1, order).cumsum(1)
    first = (below < _COARSENESS_SHARE * below[:, -1:]).sum(1, keepdim=True).clamp(max=values.shape[1] - 1)
    return values.gather(1, first)[:, 0].exp().clamp(max=1)


def picture_uncertainty(cells: Cells, weights: Tensor) -> Tensor:
    """The uncertainty of each picture's log level, (N,): the geometric mean of its cells' standard deviations."""
    total = weights.sum(1).clamp(min=1e-12)
    return (0.5 * (weights * cells.log_variance.flatten(1)).sum(1) / total).exp()


def true_cells(clean: Tensor, noisy: Tensor) -> Cells:
    """The exact cells of noisy pictures (N, 3, H, W), computed from their clean form."""
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
