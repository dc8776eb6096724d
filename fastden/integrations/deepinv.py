"""A denoiser for deepinv (https://deepinv.github.io): plug-and-play, RED, unfolded networks.

>>> from fastden.integrations.deepinv import FastdenDenoiser
>>> model = deepinv.optim.DPIR(sigma=0.02, denoiser=FastdenDenoiser())
>>> image = model(measurements, physics)
"""

from __future__ import annotations

import copy
import math
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastden.images.samples import MAX_SIGMA
from fastden.integrations._missing import import_failure
from fastden.network.devices import parse_device
from fastden.network.fused import FusedDenoiser, fuse
from fastden.network.inputs import as_tensor, check_input
from fastden.network.loading import Model
from fastden.network.model import Denoiser
from fastden.ops.modes import runs_as_written

try:
    from deepinv.models import Denoiser as _Base
except (ModuleNotFoundError, RuntimeError) as error:
    raise import_failure(error, "deepinv") from error

#: The largest noise level that the bundled models were trained for, on the scale of the image.
TRAINED = MAX_SIGMA / 255
#: Values further outside [0, 1] than so many standard deviations of the noise are not noise.
EXCESS = 4.0
#: An image is scaled up where its brightest value is below LIGHT; below DARK it fills the range then. Between the two
#: the scale changes smoothly, because the brightest value of an iterate moves.
DARK, LIGHT = 0.3, 0.6
#: The shortest range: that of a black image without noise would be empty.
SHORTEST = 1e-4


class FastdenDenoiser(_Base):
    """fastden's network as a denoiser of deepinv: ``denoiser(x, sigma) -> y``.

    The network was trained on images in [0, 1], with noise of up to 75 / 255. Plug-and-play methods make images and
    noise levels beyond both. So an image is scaled, denoised at the scaled level, and scaled back: where its values lie
    further outside of [0, 1] than its noise explains, where its noise is stronger, and where it is darker than 0.6
    everywhere.

    Args:
        model: a bundled name, a folder, a Hugging Face Hub id, a :class:`fastden.Denoiser`, or what
            :func:`fastden.fuse` made of one.
        trainable: keep the network's parameters, for unfolded methods that train them. False takes its faster
            inference form; gradients with respect to the image flow through both.
        device: where it computes. None is the device of a network that is passed, and the CPU for one that is loaded.
            A network that is passed stays where it is: on another device a copy computes, and is trained.

    Raises:
        ValueError: the model takes no noise level; ``trainable`` with a fused network, which has no parameters; no such
            device.
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
        # An empty tensor has the number of the device that "cuda" is.
        named = None if device is None else parse_device(device, any_kind=True)
        device = network.device if named is None else torch.empty(0, device=named).device
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
            x: (N, 3, H, W) or (N, 1, H, W), of any floating dtype; gray is denoised as colour with equal channels.
            sigma: standard deviation of the noise on the scale of ``x``: a number, a list or tensor (N,),
                (N, 1, 1, 1), or a map (N or 1, 1, H, W).
            **kwargs: what deepinv passes to some denoisers; not used.

        Returns:
            As ``x``, not clipped.

        Raises:
            ValueError: ``sigma`` of another shape, or (not checked on a GPU) negative or not finite; an image of other
                dimensions or channels, or with NaN or infinity (not checked on a GPU).
            TypeError: ``x`` is no floating tensor; ``sigma`` is no number.
        """
        colours = self.network.image_channels
        is_gray = isinstance(x, Tensor) and x.dim() == 4 and x.shape[1] == 1
        check_input(x, 1 if is_gray else colours)
        level = _level(sigma, x)
        low, span = _range(x, level)
        if runs_as_written(x) and x.device.type == "cpu" and not bool((span - low).isfinite().all()):
            raise ValueError("x: NaN or infinity among the values; accepted: finite values")
        scaled, level = (x - low) / span, level / span
        if is_gray and colours == 3:
            scaled = scaled.expand(-1, 3, -1, -1)
        if isinstance(self.network, Denoiser):  # a fused network takes any dtype, and keeps the image's precision
            scaled, level = scaled.to(self.network.dtype), level.to(self.network.dtype)
        y = self.network(scaled, level).to(x.dtype)
        if is_gray and colours == 3:
            y = y.mean(1, keepdim=True)
        return y * span + low


def _level(sigma: Any, x: Tensor) -> Tensor:
    """``sigma`` as (N, 1, H, W), in the dtype and on the device of ``x``.

    Raises:
        TypeError, ValueError: as of :meth:`FastdenDenoiser.forward`.
    """
    if isinstance(sigma, bool) or not isinstance(sigma, Real | Tensor | np.ndarray | np.generic | list | tuple):
        shown = repr(sigma) if sigma is None or isinstance(sigma, bool | str) else type(sigma).__name__
        raise TypeError(f"sigma: {shown}; accepted: a number, or numbers, on the scale of x")
    level = torch.as_tensor(float(sigma), dtype=torch.float64) if isinstance(sigma, Real) else as_tensor(sigma)
    if runs_as_written(level) and level.device.type == "cpu" and level.numel():
        low, high = (float(end) for end in level.detach().double().aminmax())
        if not 0 <= low <= high < math.inf:  # refuses NaN too
            values = f"{low:g}" if low == high or level.numel() == 1 else f"values from {low:g} to {high:g}"
            raise ValueError(f"sigma: {values}; accepted: finite numbers of at least 0, on the scale of x")
    level = level.to(x)
    n, _, height, width = x.shape
    if level.dim() < 2:
        level = level.reshape(-1, 1, 1, 1)
    accepted_sizes = ((1, n), (1,), (1, height), (1, width))
    if level.dim() != 4 or any(size not in sizes for size, sizes in zip(level.shape, accepted_sizes, strict=True)):
        accepted = f"a number, ({n},), ({n}, 1, 1, 1) or ({n}, 1, {height}, {width}), and 1 for the first number"
        raise ValueError(f"sigma: shape {tuple(level.shape)}; accepted for x {tuple(x.shape)}: {accepted}")
    return level.expand(n, 1, height, width)


def _range(x: Tensor, level: Tensor) -> tuple[Tensor, Tensor]:
    """Lower end and length of each image's range, (N, 1, 1, 1); 0 and 1 where [0, 1] will do."""
    dimensions = (1, 2, 3)
    noise = EXCESS * level.mean(dimensions, keepdim=True)
    top = x.amax(dimensions, keepdim=True)
    low = (x.amin(dimensions, keepdim=True) + noise).clamp(max=0)
    # One standard deviation, not EXCESS: the level may be that of a clean image, which must not go far beyond 1.
    brightest = top - noise / EXCESS
    slope = (1 - DARK) / (LIGHT - DARK)
    dark = torch.maximum(brightest, 1 - slope * (LIGHT - brightest)).clamp(min=SHORTEST)
    high = torch.where(brightest < LIGHT, dark, (top - noise).clamp(min=1))
    return low, torch.maximum(high - low, level.amax(dimensions, keepdim=True) / TRAINED)
