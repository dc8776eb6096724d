"""A loaded network over images: in tiles, gray images and partial strengths too, with the noise level that it takes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from numbers import Real
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from fastden.images.pixels import Array, check_plain
from fastden.images.value_range import ORDINARY, ValueRange, find_range
from fastden.inference.scaling import scaled, sigma_in_range
from fastden.inference.tiling import denoise_tiled
from fastden.network.fused import FusedDenoiser
from fastden.network.padding import BORDER

Progress = Callable[[int, int], None]


class _Adapted(FusedDenoiser):
    """A fused network for gray images, or of partial strength: tile by tile, before anything is rounded or clipped.

    Args:
        network: whose weights serve.
        channels: of the images, 1 or the network's.
        strength: 0 to 1.
    """

    def __init__(self, network: FusedDenoiser, channels: int, strength: float) -> None:
        # Not the parent's constructor, which would fuse another network.
        nn.Module.__init__(self)
        self.network = network
        self.noise_level_input = network.noise_level_input
        self.image_channels = channels
        self.strength = strength

    @property
    def dtype(self) -> torch.dtype:
        return self.network.dtype

    @property
    def device(self) -> torch.device:
        return self.network.device

    def forward_padded(self, x: Tensor) -> Tensor:
        image, level = x[:, : self.image_channels], x[:, self.image_channels :]
        colours = self.network.image_channels
        equal = image if colours == self.image_channels else image.expand(-1, colours, -1, -1)
        y = self.network.forward_padded(torch.cat([equal, level], 1))
        if colours != self.image_channels:
            y = y.mean(1, keepdim=True)
        return torch.lerp(image[:, :, BORDER:-BORDER, BORDER:-BORDER], y, self.strength)


def run_network(
    network: FusedDenoiser,
    batch: Tensor,
    level: float | Tensor | None,
    *,
    tile: int | Literal["auto"] | None = "auto",
    max_memory: int | None = None,
    strength: float = 1.0,
    progress: Progress | None = None,
    value_range: ValueRange = ORDINARY,
) -> Tensor:
    """Denoise a batch in tiles.

    Args:
        network: any fused network; gray input to a colour network is repeated and averaged back.
        batch: (N, C, H, W) on the CPU, C 1 or 3, float in [0, 1], torch.uint8 or torch.uint16.
        level: on the scale 0-1: a number, (N,) or (N, 1, H, W); None for a blind network.
        tile, max_memory, strength, progress: as in :func:`denoise`.
        value_range: of all images.

    Returns:
        As ``batch``.
    """
    network = scaled(network, value_range, level)
    network = adapted(network, batch.shape[1], strength)
    return denoise_tiled(network, batch, level, tile=tile, max_memory=max_memory, progress=progress)


def adapted(network: FusedDenoiser, channels: int, strength: float) -> FusedDenoiser:
    """``network`` for images of ``channels``, 1 or 3, and of a strength; see :func:`run_network`."""
    if channels == 3 and network.image_channels == 1:
        raise ValueError("image: 3 channels, but the model is for gray images; accepted: 1 channel, or a colour model")
    if channels == network.image_channels and strength == 1:
        return network
    return _Adapted(network, channels, strength)


def noise_level_of(
    sigma: Any,
    network: FusedDenoiser,
    images: list[Array],
    shape: tuple[int, int],
    ranges: Sequence[ValueRange] | None = None,
) -> float | Tensor | None:
    """What to give to the network for the ``sigma`` of :func:`denoise`.

    Args:
        sigma: ``"auto"``, or on the scale 0-255 a number, (H, W), (N,) or (N, 1, H, W).
        network: whether it takes a level at all.
        images: N arrays (H, W, C), for the estimate.
        shape: (H, W).
        ranges: of the images' values; None for ordinary ones.

    Returns:
        On the scale 0-1: a number, or float32 (N,) or (N, 1, H, W) or (1, 1, H, W); None for a blind network.
    """
    if isinstance(sigma, str) and sigma == "auto":
        if not network.noise_level_input:
            return None
        known = ranges or [ORDINARY] * len(images)
        found = [sigma_in_range(image, of_image) for image, of_image in zip(images, known, strict=True)]
        return found[0] / 255 if len(found) == 1 else torch.tensor(found) / 255
    if not network.noise_level_input:
        raise ValueError(f"sigma: {_shown(sigma)}, but this model is blind (it takes no noise level); accepted: 'auto'")
    if isinstance(sigma, Real):
        value = float(sigma)
        if not 0 <= value <= 255:  # refuses NaN too
            raise ValueError(f"sigma: {value:g}; accepted: 'auto', or 0 to 255 (the scale of 8-bit values)")
        return value / 255
    if isinstance(sigma, np.ndarray):
        check_plain(sigma, "sigma")
    if not isinstance(sigma, np.ndarray | Tensor):
        raise TypeError(f"sigma: {_shown(sigma)}; accepted: 'auto', a number from 0 to 255, or a map (H, W)")
    host = sigma.detach().cpu() if isinstance(sigma, Tensor) else torch.from_numpy(np.array(sigma, np.float32))
    level = host.float()
    n = len(images)
    if level.dim() == 0:
        return noise_level_of(float(level), network, images, shape)
    if tuple(level.shape) == shape:
        level = level[None, None]
    elif tuple(level.shape) not in ((n,), (n, 1, *shape), (1, 1, *shape)):
        raise ValueError(f"sigma: shape {tuple(level.shape)}; accepted: a number, {shape}, ({n},) or {(n, 1, *shape)}")
    low, high = float(level.min()), float(level.max())
    if not 0 <= low <= high <= 255:
        raise ValueError(f"sigma: values from {low:g} to {high:g}; accepted: 0 to 255")
    return level / 255


def _shown(value: Any) -> str:
    return repr(value) if isinstance(value, str | Real) else type(value).__name__


def denoise_pixels(
    pixels: Array, sigma: Any, network: FusedDenoiser, *, value_range: ValueRange | None = None, **options: Any
) -> tuple[Array, float | None]:
    """Denoise (H, W, C), C 1 or 3, with a network that is loaded already.

    Args:
        pixels: uint8, uint16 or floating in [0, 1].
        sigma: as in :func:`denoise`.
        network: from :func:`load_network`.
        value_range: of the pixels, or of the picture of which they are a part; None finds it.
        **options: of :func:`run_network`.

    Returns:
        The denoised pixels, and the noise level on the scale 0-255 (of a map its mean; None for a blind network).
    """
    if value_range is None:
        value_range = find_range(pixels)
    level = noise_level_of(sigma, network, [pixels], (pixels.shape[0], pixels.shape[1]), [value_range])
    (result,) = denoise_batch([pixels], level, network, value_range=value_range, **options)
    return result, shown_level(level)


def denoise_batch(
    images: list[Array], level: float | Tensor | None, network: FusedDenoiser, **options: Any
) -> list[Array]:
    """Denoise images (H, W, C) of one shape and dtype together.

    Args:
        images: uint8, uint16 or floating in [0, 1].
        level: as in :func:`run_network`.
        network: from :func:`load_network`.
        **options: of :func:`run_network`.
    """
    return from_batch(run_network(network, to_batch(images, network), level, **options), images[0].dtype)


def shown_level(level: float | Tensor | None) -> float | None:
    """A noise level on the scale 0-255, of a map its mean; None for a blind network."""
    return None if level is None else 255 * (float(level.mean()) if isinstance(level, Tensor) else level)


def to_batch(images: list[Array], network: FusedDenoiser) -> Tensor:
    """Images (H, W, C) of one shape and dtype -> (N, C, H, W) on the CPU, in a dtype that the network's tiles take."""
    dtype = images[0].dtype
    # from_numpy takes neither negative strides nor foreign byte orders, and warns about read-only memory.
    work = dtype.newbyteorder("=")
    if dtype.kind == "f":
        work = np.dtype(np.float64 if network.dtype == torch.float64 else np.float32)
    plain = images[0][None] if len(images) == 1 else np.stack(images)
    return torch.from_numpy(np.require(plain, work, ["C", "W"])).permute(0, 3, 1, 2)


def from_batch(batch: Tensor, dtype: np.dtype[Any]) -> list[Array]:
    """The inverse of :func:`to_batch`."""
    return [item.permute(1, 2, 0).contiguous().numpy().astype(dtype, copy=False) for item in batch]
