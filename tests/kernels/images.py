"""Helpers for tests of kernels on images: layouts in memory, and errors border by border."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from tests.rounding import assert_as_exact, slack

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def image_in(layout: str, channels: int, device: str) -> Tensor:
    """(2, channels, 12, 10), laid out in memory in one of the ways that a user's tensor may be."""
    return {
        "channels last": torch.rand(2, channels, 12, 10).contiguous(memory_format=torch.channels_last),
        "sliced": torch.rand(3, 2 * channels, 24, 13)[1:, ::2, ::2, 2:12],
        "expanded": torch.rand(1, channels, 1, 10).expand(2, channels, 12, 10),
        "transposed": torch.rand(2, channels, 10, 12).transpose(2, 3),
    }[layout].to(device)


def amid_nan(x: Tensor) -> Tensor:
    """A copy of ``x`` (N, C, H, W) that lies within a larger tensor, all NaN beside it."""
    around = torch.nn.functional.pad(x, (3, 3, 3, 3), value=float("nan"))
    return around[:, :, 3:-3, 3:-3]


def assert_as_exact_as_eager(
    y: Tensor, operator: Callable[..., Tensor], inputs: Sequence[Tensor], **options: Any
) -> None:
    """On each border, and inside, ``y`` errs at most twice as much as eager PyTorch, apart from rounding."""
    exact = operator(*(value.double() for value in inputs), **options, backend="torch")
    eager = operator(*inputs, **options, backend="torch")
    assert_as_exact(y, eager, exact, slack(operator, *inputs, **options, backend="torch", exact=exact, dtype=y.dtype))
