"""What fp8 costs: the command measures the network with conv3 on its own reference, and nothing else changed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fastden
from fastden import ops
from fastden.network.calibrated import calibrated_ranges
from fastden.network.fp8 import conv3_ranges
from tests.helpers import relative_l2
from tests.scripts import load


@pytest.fixture(scope="module")
def fp8(root: Path) -> Any:
    return load(root / "benchmarks" / "fp8.py")


def test_only_conv3_changes(fp8: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = fastden.Denoiser.from_pretrained("color")
    network, ranges = fastden.fuse(model), conv3_ranges(calibrated_ranges(model))
    x = torch.rand(1, 3, 24, 20, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        plain = network(x, 0.1)
        y = fp8.in_fp8(network, ranges, x, 0.1)
        assert 1e-4 < relative_l2(y - x, plain - x) < 0.03
        conv3 = ops.concat_conv_bn_relu

        def unrounded(*tensors: Tensor, ranges: Tensor, **options: Any) -> Tensor:
            return conv3(*tensors, **options)

        monkeypatch.setattr(ops, "concat_conv_fp8", unrounded)
        assert relative_l2(fp8.in_fp8(network, ranges, x, 0.1) - x, plain - x) < 1e-5
        assert torch.equal(network(x, 0.1), plain)


def test_psnr(fp8: Any) -> None:
    clean = torch.full((1, 3, 4, 4), 0.5)
    assert abs(fp8.psnr(clean + 25.5 / 255, clean) - 20) < 0.05
