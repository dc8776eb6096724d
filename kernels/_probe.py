"""A kernel that does almost nothing: where it runs, Triton starts. No other kernel imports this file."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fastden.kernels._common import device_guard


@triton.jit
def probe_kernel(out_ptr):
    tl.store(out_ptr, 1)


def probe(device: torch.device) -> None:
    """Compile the kernel, launch it on a CUDA device and wait for it.

    Raises:
        Exception: what Triton raises, whatever its kind.
    """
    out = torch.zeros(1, dtype=torch.int32, device=device)
    with device_guard(out):
        probe_kernel[(1,)](out)
    if out.item() != 1:
        raise RuntimeError("a kernel ran without effect")
