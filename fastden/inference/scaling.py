"""A network for pictures whose values do not fill [0, 1], or go beyond it: divided by their range, and back."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastden.images.noise import estimate_sigma, sample_windows, sigma_of_samples
from fastden.images.pixels import Array
from fastden.images.value_range import LARGEST, LOWEST, ValueRange
from fastden.network.fused import FusedDenoiser
from fastden.network.padding import BORDER

#: So many standard deviations of the noise beyond the range are shown to the network too.
_DEVIATIONS = 4.0
#: For a network that is not told the noise level.
_LEVEL = 0.25


class _Scaled(FusedDenoiser):
    """A fused network for pictures of one range: tile by tile, so that tiles and strips stay exact.

    What lies far beyond the range (a lamp in a dark room) is cut before the network sees it, and added to its result.

    Args:
        network: whose weights serve.
        value_range: of the picture.
    """

    def __init__(self, network: FusedDenoiser, value_range: ValueRange) -> None:
        # Not the parent's constructor, which would fuse another network.
        nn.Module.__init__(self)
        self.network = network
        self.noise_level_input = network.noise_level_input
        self.image_channels = network.image_channels
        self.value_range = value_range

    @property
    def dtype(self) -> torch.dtype:
        return self.network.dtype

    @property
    def device(self) -> torch.device:
        return self.network.device

    def forward_padded(self, x: Tensor) -> Tensor:
        low, span = self.value_range.low, self.value_range.span
        image, level = (x[:, : self.image_channels] - low) / span, x[:, self.image_channels :] / span
        beyond = _DEVIATIONS * level if self.noise_level_input else torch.full_like(image[:, :1], _LEVEL)
        shown = torch.maximum(torch.minimum(image, LARGEST + beyond), LOWEST - beyond)
        y = self.network.forward_padded(torch.cat([shown, level], 1))
        rest = (image - shown)[:, :, BORDER:-BORDER, BORDER:-BORDER]
        return (y + rest) * span + low


def scaled(network: FusedDenoiser, value_range: ValueRange, level: float | Tensor | None) -> FusedDenoiser:
    """``network`` for a picture of a range: itself where the range is an ordinary one.

    Args:
        network: any fused network.
        value_range: of the picture.
        level: of the noise, on the scale 0-1.
    """
    # A map may be known strip by strip alone: it decides nothing.
    if isinstance(level, Tensor) and level.dim() < 4:
        level = float(level.max())
    if not isinstance(level, Tensor):
        value_range = value_range.for_level(level)
    return network if value_range.ordinary else _Scaled(network, value_range)


def sigma_in_range(image: Array, value_range: ValueRange) -> float:
    """:func:`fastden.estimate_sigma` of a picture whose values fill a range: at most 75 on the scale of that range."""
    if value_range.ordinary:
        return estimate_sigma(image)
    windows = sample_windows(image.shape[0], image.shape[1])
    return sigma_of_crops([image[rows, columns] for rows, columns in windows], value_range)


def sigma_of_crops(crops: list[Array], value_range: ValueRange) -> float:
    """The estimate from a picture's crops (H, W, C), which :func:`fastden.images.noise.sample_windows` chose."""
    if value_range.ordinary:
        return sigma_of_samples(crops)
    return sigma_of_samples([value_range.normalised(crop) for crop in crops]) * value_range.span
