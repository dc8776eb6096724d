"""The layout of tensors in memory, for kernels and operators. It needs no Triton."""

from __future__ import annotations

import torch
from torch import Tensor


def channels_last(x: Tensor) -> Tensor:
    """``x`` (4-D) with channels innermost in memory; no copy if it has this layout already."""
    return x.contiguous(memory_format=torch.channels_last)
