"""The fused network with conv3 in 8-bit floating point (e4m3), on a GPU of compute capability 9.0.

conv3 is two thirds of the network's products. The ranges of its inputs are those that :func:`fastden.calibrate`
measured for 8-bit integers. On Kodak24 at sigma 25 this costs 0.003 dB (``benchmarks/results/fp8.json``).
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from fastden.cuda import extension
from fastden.network.int8 import Ranges
from fastden.ops import backends
from fastden.ops.tracing import constant_result


def conv3_ranges(ranges: Ranges) -> Tensor:
    """The largest magnitudes of conv3's input channels, (160,), float32."""
    return torch.cat([ranges["res1"], ranges["up2"]]).float()


def why_not(dtype: torch.dtype, device: torch.device) -> list[str]:
    """Reasons why conv3 cannot run in fp8 on a CUDA device that exists; empty where it can."""
    shapes = (1, 128, 1, 1), (1, 32, 1, 1), (256, 160, 3, 3)
    a, b, weight = (torch.empty(shape, dtype=dtype, device=device) for shape in shapes)
    return backends.why_not("concat_conv_fp8", "cuda", a=a, b=b, weight=weight)


@constant_result
def runs(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether conv3 can run in fp8 on a CUDA device. :func:`why_not` is asked once, and again behind a build."""
    return _runs(dtype, device, extension.loaded(), extension.builds())


@cache
def _runs(dtype: torch.dtype, device: torch.device, loaded: bool, builds: int) -> bool:
    return not why_not(dtype, device)
