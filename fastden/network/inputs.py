"""What a network takes: the image checked, and the noise level as a map of the image's size."""

from __future__ import annotations

from numbers import Real

import torch
from torch import Tensor

from fastden.network.level import KNOTS, level_map


def check_input(x: Tensor, channels: int) -> tuple[int, int]:
    """Height and width of a valid network input.

    Raises:
        TypeError: ``x`` is not a floating tensor.
        ValueError: ``x`` is not (N, ``channels``, H, W) with H, W >= 1.
    """
    if not isinstance(x, Tensor):
        raise TypeError(f"x: {type(x).__name__}; accepted: a torch.Tensor of shape (N, {channels}, H, W)")
    if not x.is_floating_point():
        raise TypeError(
            f"x: dtype {x.dtype}; accepted: a floating dtype, values in [0, 1] (divide integers by their maximum)"
        )
    if x.dim() != 4 or x.shape[1] != channels:
        raise ValueError(f"x: shape {tuple(x.shape)}; accepted: (N, {channels}, H, W)")
    height, width = x.shape[2], x.shape[3]
    if height < 1 or width < 1:
        raise ValueError(f"x: shape {tuple(x.shape)}; accepted: height and width of at least 1")
    return height, width


def noise_level(x: Tensor, sigma: float | Tensor | None, wanted: bool) -> Tensor | None:
    """``sigma`` as a map (N, 1, H, W) in the dtype and on the device of ``x``; None for a blind network.

    A curve (N, 8) or (1, 8) holds levels at eight values of brightness (:mod:`fastden.network.level`).
    """
    if not wanted:
        if sigma is not None:
            raise ValueError(
                "sigma: given to a blind network; accepted: None (or a network with noise_level_input=True)"
            )
        return None
    n, _, height, width = x.shape
    if sigma is None:
        raise ValueError(
            "sigma: None, but this network takes the noise level; accepted: a number, a tensor (N,) or a map"
            " (N, 1, H, W), the noise's standard deviation on the scale of x (25 of 255 is 25 / 255)"
        )
    if isinstance(sigma, Tensor):
        if sigma.device.type == "cpu" and not torch.compiler.is_compiling() and sigma.numel():
            low, high = (float(bound) for bound in sigma.detach().aminmax())  # a GPU would have to wait for it
            if not 0.0 <= low <= high <= 1.0:
                raise ValueError(f"sigma: values from {low} to {high}; accepted: 0 to 1, on the scale of x")
        level = sigma.to(device=x.device, dtype=x.dtype)
        if level.dim() == 2 and level.shape[1] == KNOTS and level.shape[0] in (1, n):
            return level_map(sigma.to(x.device), x).to(x.dtype)
        if level.dim() == 0 or (level.dim() == 1 and level.shape[0] == n):
            level = level.reshape(-1, 1, 1, 1)
        elif level.dim() != 4 or tuple(level.shape[1:]) != (1, height, width) or level.shape[0] not in (1, n):
            raise ValueError(
                f"sigma: shape {tuple(sigma.shape)}; accepted for x {tuple(x.shape)}: a number, ({n},),"
                f" ({n}, 1, {height}, {width}), or a curve ({n}, {KNOTS})"
            )
        return level.expand(n, 1, height, width)
    if not isinstance(sigma, Real) or isinstance(sigma, bool):
        raise TypeError(f"sigma: {type(sigma).__name__}; accepted: a number, a tensor (N,) or a map (N, 1, H, W)")
    if not 0.0 <= sigma <= 1.0:  # also refuses NaN
        raise ValueError(f"sigma: {sigma}; accepted: 0 to 1, on the scale of x (25 of 255 is 25 / 255)")
    return x.new_full((1, 1, 1, 1), float(sigma)).expand(n, 1, height, width)
