"""Shared by the tables and the figure of the joint experiments: images, noise, denoisers, predictions."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

import fastden
from fastden.images.pixels import to_dtype
from fastden.joint import FrozenTask, resize_prediction
from fastden.network.onednn import native_bf16
from fastden.training.labelled import LabelledImages, load_classified, load_segmented
from fastden.training.tasks import Task, load_task

Pixels = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]
#: Takes a noisy image (H, W, 3), scale [0, 1], not clipped, and its sigma on the same scale; returns 8 bits.
Denoise = Callable[[Floats, float], Pixels]

#: Frozen network of each experiment.
NETWORKS = {"classify": "efficientnet-lite0", "segment": f"{Path(__file__).with_name('segmenter.py')}:camvid"}
#: Side of the classifier's images, and of the smallest accepted one of the segmentation network.
CROP = 224


def load(experiment: str, data: Path, limit: int | None = None) -> tuple[list[tuple[Pixels, Any]], Task]:
    """Clean validation images (H, W, 3) with their labels, and the frozen network."""
    if experiment == "classify":
        dataset = LabelledImages(load_classified(data, CROP), CROP)
    else:
        dataset = LabelledImages(load_segmented(data, CROP), None)
    count = len(dataset) if limit is None else min(limit, len(dataset))
    indices = [i * len(dataset) // count for i in range(count)]
    items = [dataset[i] for i in indices]
    images = [((item["clean"] * 255).round().byte().permute(1, 2, 0).numpy(), item["label"].numpy()) for item in items]
    return images, load_task(NETWORKS[experiment])


def add_noise(clean: Pixels, sigma: float, seed: int, index: int) -> Floats:
    """``clean`` on [0, 1] with Gaussian noise of ``sigma`` (scale 0-255), not clipped; one draw for all levels."""
    noise = np.random.default_rng((seed, index)).standard_normal(clean.shape, dtype=np.float32)
    return to_dtype(clean, np.float32) + np.float32(sigma / 255) * noise


def none(noisy: Floats, sigma: float) -> Pixels:
    """The noisy image itself, clipped and rounded."""
    return to_dtype(noisy, np.uint8)


def cbm3d(noisy: Floats, sigma: float) -> Pixels:
    """CBM3D (package bm3d), with its default profile."""
    from bm3d import bm3d_rgb

    return to_dtype(np.asarray(bm3d_rgb(noisy, sigma), dtype=np.float32), np.uint8)


def automatic_dtype(name: str) -> torch.dtype:
    """``float32``, or ``auto``: what :func:`fastden.denoise` takes for 8-bit images on this machine."""
    return torch.bfloat16 if name == "auto" and native_bf16() else torch.float32


def network(name: str, dtype: str = "auto") -> Denoise:
    """A shipped model or a folder."""
    model = fastden.fuse(fastden.Denoiser.from_pretrained(name), dtype=automatic_dtype(dtype))

    def denoise(noisy: Floats, sigma: float) -> Pixels:
        x = torch.from_numpy(noisy).permute(2, 0, 1)[None].contiguous()
        # The correction is added to the float32 image: the network's precision is that of the correction alone.
        with torch.inference_mode():
            y = model(x, sigma) if model.noise_level_input else model(x)
        return to_dtype(y[0].permute(1, 2, 0).contiguous().numpy(), np.uint8)

    return denoise


class Predictor:
    """The frozen network on 8-bit images: logits of a class, or classes of pixels."""

    def __init__(self, task: Task) -> None:
        self.task = FrozenTask(task.network, task.preprocess).to(memory_format=torch.channels_last)

    @torch.inference_mode()
    def __call__(self, pixels: Pixels) -> Tensor:
        """(classes,) logits for a classifier; (H, W) classes for a segmentation network."""
        x = torch.from_numpy(to_dtype(pixels, np.float32)).permute(2, 0, 1)[None]
        logits = self.task(x)
        if logits.dim() == 2:
            return logits[0]
        return resize_prediction(logits, pixels.shape[:2])[0].argmax(0)
