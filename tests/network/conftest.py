"""Networks that several files of tests share."""

from __future__ import annotations

import pytest

from fastden.network.model import Denoiser
from tests.helpers import random_network


@pytest.fixture(scope="module")
def models() -> tuple[Denoiser, Denoiser]:
    """Two networks with different random weights; tests must not change them."""
    return random_network(seed=1), random_network(seed=2)
