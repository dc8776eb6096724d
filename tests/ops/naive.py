"""Formulas of the operators, written with sums over windows and nothing of ``torch.nn.functional``."""

from __future__ import annotations

import torch
from torch import Tensor


def pad(x: Tensor, size: int) -> Tensor:
    """(N, C, H, W) in a frame of zeros."""
    n, c, h, w = x.shape
    result = x.new_zeros(n, c, h + 2 * size, w + 2 * size)
    result[:, :, size : size + h, size : size + w] = x
    return result


def conv(x: Tensor, weight: Tensor, bias: Tensor | None = None, stride: int = 1, padding: int = 0) -> Tensor:
    """(N, C, H, W), (O, C, k, k) -> (N, O, H', W')."""
    k = weight.shape[-1]
    windows = pad(x, padding).unfold(2, k, stride).unfold(3, k, stride)
    y = torch.einsum("nchwij,ocij->nohw", windows, weight)
    return y if bias is None else y + bias[:, None, None]


def transposed_conv(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Kernel 4, stride 2, padding 1: input pixel (i, j) adds its taps to the outputs from (2 i - 1, 2 j - 1) on."""
    n, _, h, w = x.shape
    frame = x.new_zeros(n, weight.shape[1], 2 * h + 2, 2 * w + 2)
    for i in range(h):
        for j in range(w):
            frame[:, :, 2 * i : 2 * i + 4, 2 * j : 2 * j + 4] += torch.einsum("nc,coij->noij", x[:, :, i, j], weight)
    y = frame[:, :, 1:-1, 1:-1]
    return y if bias is None else y + bias[:, None, None]


def batch_norm(y: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, var: Tensor, eps: float) -> Tensor:
    """Normalisation with given statistics, (O,) each."""
    column = [value[:, None, None] for value in (weight, bias, mean, var)]
    return column[0] * (y - column[2]) / (column[3] + eps).sqrt() + column[1]


def statistics(y: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and (biased) variance of each channel over batch and pixels."""
    mean = y.mean((0, 2, 3))
    return mean, ((y - mean[:, None, None]) ** 2).mean((0, 2, 3))
