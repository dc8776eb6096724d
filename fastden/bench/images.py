"""Noisy photographs of any size."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from fastden.inference.tiling import LUMA

#: Noise level of all benchmarks, on the scale of the image.
SIGMA = 25 / 255


def photograph(height: int, width: int, count: int = 1, seed: int = 0, channels: int = 3) -> Tensor:
    """(count, channels, height, width) float32: scikit-image's cat, tiled by reflection, with noise of level 25.

    With 1 channel it is gray (luma of BT.601).
    """
    from skimage.data import chelsea

    cat = chelsea()
    rows, columns = (-(-size // cat.shape[axis]) for axis, size in enumerate((height, width)))
    tiled = np.pad(cat, ((0, (rows - 1) * cat.shape[0]), (0, (columns - 1) * cat.shape[1]), (0, 0)), mode="symmetric")
    clean = torch.from_numpy(tiled[:height, :width].transpose(2, 0, 1).copy()).float().div(255)
    if channels == 1:
        clean = (clean * clean.new_tensor(LUMA).view(3, 1, 1)).sum(0, keepdim=True)
    noise = torch.randn((count, *clean.shape), generator=torch.Generator().manual_seed(seed))
    return clean + SIGMA * noise
