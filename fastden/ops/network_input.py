"""The network's input in one pass over an image, on Triton. Elsewhere PyTorch's operations make it in several steps."""

from __future__ import annotations

import torch
from torch import Tensor

from fastden.ops.backends import left_out, proven_backends, requested, why_not
from fastden.ops.tensors import wants_gradient

Padding = tuple[int, int]


def can_prepare(x: Tensor, level: Tensor | None, dtype: torch.dtype) -> bool:
    """Whether :func:`network_input` can run: the triton backend is requested or proven, and no gradient is needed.

    It is proven for curves alone.

    :func:`network_input` is not an operator. On a CPU its result has the same bits as that of PyTorch's operations, so
    callers can use those instead if it cannot run. Compiled code does not need it, because PyTorch's compiler fuses
    these steps itself.

    Args:
        x: (N, C, H, W), the image.
        level: None, a map (N, 1, H, W), or curves (N or 1, knots).
        dtype: dtype of the network.
    """
    asked = requested()
    wanted = asked == "triton" if asked else _chosen(x, level, dtype)
    if not wanted or wants_gradient(x, level) or dtype == torch.float64:
        return False
    return (level is None or level.device == x.device) and not why_not("network_input", "triton", x=x)


def _chosen(x: Tensor, level: Tensor | None, dtype: torch.dtype) -> bool:
    # A benchmark's job measures curves (fastden/bench/preparation.py). Without one, PyTorch has less to do.
    curves = level is not None and level.dim() == 2
    if not curves or "triton" not in proven_backends("network_input", x.device, dtype):
        return False
    return not left_out("triton", x.device)


def network_input(
    x: Tensor, level: Tensor | None, dtype: torch.dtype, rows: Padding, columns: Padding, radius: int
) -> tuple[Tensor, Tensor]:
    """The padded image with its level in ``dtype``, and the padded image in its own.

    Args:
        x, level, dtype: as in :func:`can_prepare`.
        rows, columns: pixels of padding before and after; negative numbers remove pixels.
        radius: for curves: brightness is averaged over this number of pixels on each side.

    Returns:
        (N, C + 1 or C, H', W') in ``dtype``, channels-last, and (N, at least C, H', W') in the dtype of ``x``.
    """
    from fastden.kernels.network_input import network_input

    return network_input(x, level, dtype, rows, columns, radius)
