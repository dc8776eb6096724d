"""One noise level for frames that go together: levels of their own, and models with them, would make them flicker."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastden.inference.estimate import estimate_noise, median_estimate
from fastden.network.loading import load_network


def level_of_frames(frames: Tensor, model: str | None, device: Any) -> Any:
    """The ``sigma`` of :func:`fastden.denoise` for frames whose level is to be estimated: their median.

    ``"auto"`` where that cannot be: for a blind model, and for frames that are denoised on a range of their own.

    Args:
        frames: (N, C, H, W).
        model: as of :func:`fastden.denoise`, but no network.
        device: where the model computes.
    """
    network = None if model is None else load_network(model, device, eight_bit=frames.dtype == torch.uint8)
    if network is not None and not network.noise_level_input:
        return "auto"
    estimates = [estimate_noise(frame, network) for frame in frames]
    ordinary = all((estimate.black, estimate.white) == (0, 1) for estimate in estimates)
    return median_estimate(estimates) if ordinary else "auto"
