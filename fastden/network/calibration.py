"""Measure the ranges of a network's activations, for the network in 8-bit integers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from fastden.network import int8, onednn
from fastden.network.fused import FusedDenoiser
from fastden.network.inputs import check_input
from fastden.network.model import Denoiser
from fastden.network.padding import pad_image

#: Noise levels on the 0-255 scale. The pictures get them in turn.
SIGMAS = (5.0, 15.0, 25.0, 50.0, 75.0)


@torch.inference_mode(mode=False)
@torch.no_grad()
def calibrate(model: Denoiser, images: Iterable[Tensor]) -> None:
    """Measure the ranges of a network's activations, for ``fuse(model, quality="fast")``.

    ``save_pretrained`` writes them beside the weights. They belong to these weights: measure again after training.

    Args:
        model: a network of any device and dtype. The measurement runs on the CPU in float32.
        images: clean pictures (N, C, H, W), floating, in [0, 1]; 30 varied pictures of 256 pixels a side are enough.
            Each picture gets noise of level 5, 15, 25, 50 or 75 (0-255 scale) with a fixed seed. White noise and noise
            that 2x2 pixels share take turns.

    Raises:
        TypeError: an image is not a floating tensor.
        ValueError: there are no images, or an image has another shape.
    """
    fused = FusedDenoiser(model)
    weights = {name: buffer.detach().float().cpu() for name, buffer in fused.named_buffers()}
    ranges = int8.observed_ranges(onednn.FoldedWeights.of(weights), _inputs(model, images))
    if not set(int8.ACTIVATIONS) <= set(ranges):
        raise ValueError("images: none; accepted: at least one batch (N, C, H, W)")
    model.int8_ranges = ranges, int8.fingerprint(model)


def _inputs(model: Denoiser, images: Iterable[Tensor]) -> Iterator[Tensor]:
    """Yield each picture with noise, its level as a channel where the network takes one, and padding."""
    generator = torch.Generator().manual_seed(0)
    for index, image in enumerate(images):
        check_input(image, model.image_channels)
        clean = image.detach().float().cpu()
        level = SIGMAS[index // 2 % len(SIGMAS)] / 255
        noise = torch.randn(clean.shape, generator=generator, device="cpu")
        if index % 2:
            noise = F.interpolate(noise, scale_factor=2.0)[:, :, : clean.shape[2], : clean.shape[3]]
        noisy = clean + level * noise
        yield pad_image(
            torch.cat([noisy, torch.full_like(noisy[:, :1], level)], 1) if model.noise_level_input else noisy
        )
