"""A denoiser for deepinv (https://deepinv.github.io): plug-and-play, RED, unfolded networks.

>>> from fastden.integrations.deepinv import FastdenDenoiser
>>> model = deepinv.optim.DPIR(sigma=0.02, denoiser=FastdenDenoiser())
>>> image = model(measurements, physics)
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastden.images.samples import MAX_SIGMA
from fastden.integrations._missing import missing_package
from fastden.network.devices import named_device
from fastden.network.fused import FusedDenoiser, fuse
from fastden.network.loading import Model
from fastden.network.model import Denoiser

try:
    from deepinv.models import Denoiser as _Base
except ModuleNotFoundError as error:
    raise missing_package(error, "deepinv") from error

#: The largest noise level that the bundled models were trained for, on the scale of the image.
TRAINED = MAX_SIGMA / 255
#: Values further outside [0, 1] than so many standard deviations of the noise are not noise.
EXCESS = 4.0


class FastdenDenoiser(_Base):
    """fastden's network as a denoiser of deepinv: ``denoiser(x, sigma) -> y``.

    Iterates of plug-and-play methods leave [0, 1], and their noise levels leave what the network was trained for. An
    image whose values lie further out than its noise explains, or whose noise is above 75 / 255, is scaled into the
    range, denoised at the scaled level, and scaled back.

    Args:
        model: a bundled name, a folder, a Hugging Face Hub id, a :class:`fastden.Denoiser`, or what
            :func:`fastden.fuse` made of one.
        trainable: keep the network's parameters, for unfolded methods that train them. False takes its faster
            inference form; gradients with respect to the image flow through both.
        device: where it computes. None is the device of a network that is passed, and the CPU for one that is loaded.
            A network that is passed stays where it is: on another device a copy computes, and is trained.

    Raises:
        ValueError: the model takes no noise level; ``trainable`` with a fused network, which has no parameters.
        TypeError: ``model`` has another type.
    """

    def __init__(
        self, model: Any = "color", *, trainable: bool = False, device: str | torch.device | None = None
    ) -> None:
        if not isinstance(model, Model):
            accepted = "a name, folder, Hub id, Denoiser or FusedDenoiser"
            raise TypeError(f"model: {type(model).__name__}; accepted: {accepted}")
        if trainable and isinstance(model, FusedDenoiser):
            raise ValueError("trainable: True, with a FusedDenoiser, which has no parameters; accepted: a Denoiser")
        network = Denoiser.from_pretrained(model) if isinstance(model, str | Path) else model
        # An empty tensor knows which device "cuda" is.
        device = network.device if device is None else torch.empty(0, device=named_device(device)).device
        super().__init__(device)
        if not network.noise_level_input:
            raise ValueError(f"model: {model!r} takes no noise level; accepted: one that does, such as 'color'")
        self.network: Denoiser | FusedDenoiser
        if trainable or isinstance(network, FusedDenoiser):
            self.network = network if device == network.device else copy.deepcopy(network).to(device)
        else:
            self.network = fuse(network, device=device)

    def forward(self, x: Tensor, sigma: Any, **kwargs: Any) -> Tensor:
        """Denoise a batch.

        Args:
            x: (N, 3, H, W) or (N, 1, H, W), floating; gray is denoised as colour with equal channels.
            sigma: standard deviation of the noise on the scale of ``x``: a number, a list or tensor (N,),
                (N, 1, 1, 1), or a map (N or 1, 1, H, W).
            **kwargs: what deepinv passes to some denoisers; not used.

        Returns:
            As ``x``, not clipped.

        Raises:
            ValueError: ``sigma`` of another shape; an image of other dimensions or channels.
            TypeError: ``sigma`` is no number.
        """
        if x.dim() != 4:
            raise ValueError(f"x: shape {tuple(x.shape)}; accepted: (N, {self.network.image_channels}, H, W)")
        if sigma is None or isinstance(sigma, str):
            raise TypeError(f"sigma: {sigma!r}; accepted: a number, or numbers, on the scale of x")
        n, channels, height, width = x.shape
        level = torch.as_tensor(sigma, dtype=x.dtype, device=x.device)
        if level.dim() < 2:
            level = level.reshape(-1, 1, 1, 1)
        sizes = ((1, n), (1,), (1, height), (1, width))
        if level.dim() != 4 or any(size not in ones for size, ones in zip(level.shape, sizes, strict=True)):
            accepted = f"a number, ({n},), ({n}, 1, 1, 1) or ({n}, 1, {height}, {width}), and 1 for the first number"
            raise ValueError(f"sigma: shape {tuple(level.shape)}; accepted for x {tuple(x.shape)}: {accepted}")
        level = level.expand(n, 1, height, width)
        low, span = _range(x, level)
        scaled = (x - low) / span
        colours = self.network.image_channels
        if channels == 1 and colours == 3:
            scaled = scaled.expand(-1, 3, -1, -1)
        y = self.network(scaled, level / span)
        if channels == 1 and colours == 3:
            y = y.mean(1, keepdim=True)
        return y * span + low


def _range(x: Tensor, level: Tensor) -> tuple[Tensor, Tensor]:
    """Lower end and length of each image's range, (N, 1, 1, 1); 0 and 1 where [0, 1] will do."""
    dimensions = (1, 2, 3)
    noise = EXCESS * level.mean(dimensions, keepdim=True)
    low = (x.amin(dimensions, keepdim=True) + noise).clamp(max=0)
    high = (x.amax(dimensions, keepdim=True) - noise).clamp(min=1)
    return low, torch.maximum(high - low, level.amax(dimensions, keepdim=True) / TRAINED)
