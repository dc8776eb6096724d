"""The network of the videos' tests."""

from __future__ import annotations

import pytest
import torch

from fastden.network.fused import FusedDenoiser, fuse
from tests.helpers import random_network


@pytest.fixture(scope="module")
def network() -> FusedDenoiser:
    return fuse(random_network(), torch.float32)
