"""Kernels run on a GPU, or on the CPU where Triton interprets them (``TRITON_INTERPRET=1``)."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

from fastden.ops import backends

pytest.importorskip("triton")


@pytest.fixture(scope="session")
def device() -> str:
    """Where kernels run here."""
    if torch.cuda.is_available():
        return "cuda"
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("no CUDA device, and TRITON_INTERPRET=1 is not set")
    return "cpu"


@pytest.fixture(autouse=True)
def nothing_proven(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only what a test asks for runs on kernels, whatever is proven of this GPU."""
    monkeypatch.setattr(backends, "PROVEN", {})


@pytest.fixture(autouse=True)
def gradients_on_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """By default PyTorch computes most gradients after Triton's forward pass; tests here are of the kernels.

    Those of the default and of other ways set the variable anew.
    """
    monkeypatch.setenv("FASTDEN_BACKWARD", "kernels")


@pytest.fixture(autouse=True)
def exact_products() -> Iterator[None]:
    """On a GPU kernels and references multiply in float32; TF32 errs by about 3e-4."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = before
