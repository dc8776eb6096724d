"""Checks of what an adapter is made with: a mistake shows there, and not at the first image, in another process."""

from __future__ import annotations

from typing import Any

from fastden.inference.arguments import check_strength
from fastden.inference.run import check_sigma
from fastden.network.devices import parse_device
from fastden.network.fused import FusedDenoiser
from fastden.network.hub import local_files
from fastden.network.model import Denoiser


def check_settings(*, sigma: Any, model: Any, strength: Any, device: Any) -> None:
    """Check arguments that go to :func:`fastden.denoise` later. A Hub repository is not asked whether it exists.

    Raises:
        TypeError: another type of ``sigma`` or ``model``.
        ValueError: a ``sigma`` or ``strength`` outside of its range; no such model or device.
    """
    check_sigma(sigma)
    check_strength(strength)
    if model is not None and not isinstance(model, Denoiser | FusedDenoiser):
        local_files(model)
    parse_device(device)
