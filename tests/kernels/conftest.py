"""Kernels run on a GPU, or on the CPU where Triton interprets them (``TRITON_INTERPRET=1``)."""

from __future__ import annotations

import os

import pytest
import torch

pytest.importorskip("triton")


@pytest.fixture(scope="session")
def device() -> str:
    """Where kernels run here."""
    if torch.cuda.is_available():
        return "cuda"
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("no CUDA device, and TRITON_INTERPRET=1 is not set")
    return "cpu"
