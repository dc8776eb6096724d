"""Noise models for training."""

from __future__ import annotations

import torch
from torch import Tensor


def gaussian(clean: Tensor, sigma: Tensor, generator: torch.Generator | None = None, *, gray: bool = False) -> Tensor:
    """``clean`` with additive white Gaussian noise, not clipped.

    Args:
        clean: (N, C, H, W), in [0, 1].
        sigma: (N,), standard deviation on the same scale.
        generator: source of randomness, on the device of ``clean``.
        gray: draw one noise plane for all channels.
    """
    shape = (clean.shape[0], 1 if gray else clean.shape[1], *clean.shape[2:])
    noise = torch.randn(shape, generator=generator, device=clean.device, dtype=clean.dtype)
    return clean + sigma.view(-1, 1, 1, 1) * noise
