"""The small kernel that shows whether Triton starts."""

from __future__ import annotations

import torch

from fastden.kernels._probe import probe


def test_it_runs(device: str) -> None:
    probe(torch.device(device))
