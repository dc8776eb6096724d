"""Untrained networks, and what one of them makes of values without ``fastden.denoise``."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import fastden

SIGMA = 20.0


@pytest.fixture(scope="module")
def network() -> fastden.FusedDenoiser:
    return fastden.fuse(fastden.Denoiser().eval())


@pytest.fixture(scope="module")
def blind() -> fastden.FusedDenoiser:
    return fastden.fuse(fastden.Denoiser(noise_level_input=False).eval())


def reference(network: fastden.FusedDenoiser, values: Any, sigma: Any = SIGMA / 255) -> Any:
    """The network on float values (H, W, 3), all at once."""
    x = torch.from_numpy(np.ascontiguousarray(values, np.float32)).permute(2, 0, 1)[None]
    with torch.no_grad():
        return network(x, sigma)[0].permute(1, 2, 0).numpy()
