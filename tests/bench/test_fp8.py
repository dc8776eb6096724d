"""conv3 in fp8 as a reference: exact where nothing is rounded, and as near as e4m3 elsewhere."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from tests.helpers import relative_l2
from tests.scripts import load


@pytest.fixture(scope="module")
def fp8(root: Path) -> Any:
    return load(root / "benchmarks" / "fp8.py")


def expected(a: torch.Tensor, b: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    return F.conv2d(torch.cat([a, b], 1), weight, bias, padding=1).relu()


def test_exact_where_nothing_is_rounded(fp8: Any) -> None:
    torch.manual_seed(0)
    a, b = (torch.randint(0, 8, (1, channels, 5, 6)).float() for channels in (4, 2))
    weight = torch.randint(-7, 8, (3, 6, 3, 3)).float()
    weight[:, 0, 0, 0] = 7.0  # so that each output's scale is a power of two
    bias, scales = torch.randint(-3, 4, (3,)).float(), torch.full((6,), 0.5)
    assert torch.equal(fp8.conv3_in_fp8(a, b, weight, bias, scales), expected(a, b, weight, bias))


def test_errs_as_e4m3_does(fp8: Any) -> None:
    torch.manual_seed(0)
    a, b, weight, bias = torch.rand(1, 40, 9, 9), torch.randn(1, 8, 9, 9), torch.randn(16, 48, 3, 3), torch.randn(16)
    scales = torch.cat([a, b], 1).abs().amax((0, 2, 3)) / 448
    error = relative_l2(fp8.conv3_in_fp8(a, b, weight, bias, scales), expected(a, b, weight, bias))
    assert 1e-3 < error < 2**-4  # three bits of mantissa: each factor is off by at most 1/16
    # Each channel needs its own scale: one scale for all is too large for most channels and leaves few bits.
    assert fp8.conv3_in_fp8(a, b, weight, bias, scales * 1e4).isfinite().all()


def test_large_values_are_limited(fp8: Any) -> None:
    x = torch.tensor([1e6, -1e6, 448.0, 1.0, float("nan")])
    assert fp8.rounded(x)[:4].tolist() == [448.0, -448.0, 448.0, 1.0]
    assert fp8.rounded(x)[4].isnan()
