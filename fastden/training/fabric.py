"""Regular, faint texture as cloth, knitwear, nets and gratings have it, drawn on clean pictures.

Pictures that were reduced for training hold next to none of it, and a network that met none takes it for noise: of a
dark bag at ISO 6400 (``polyu_full``) it kept the seams and lost the weave. Synthetic pictures can teach what a
collection lacks (Achddou, Gousseau and Ladjal, "Synthetic images as a regularity prior for image restoration neural
networks", SSVM 2021, there with dead leaves).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fastden.training.camera import blur, linear_to_srgb, log_uniform, srgb_to_linear

#: Waves of a texture as multiples of its two base waves: threads, their crossings and the first overtones.
WAVES = ((1, 0), (0, 1), (1, 1), (1, -1), (2, 0), (0, 2), (2, 1), (1, 2))


@dataclass(frozen=True)
class FabricRanges:
    """Ranges of a texture's parameters; a pair is log-uniform between its numbers.

    Args:
        period: distance of the threads, pixels, from the finest that pixels hold to a coarse knit.
        stretch: distance of the crossing threads as a multiple of it.
        skew: largest difference of their crossing from a right angle, degrees, uniform.
        contrast: deviation of the logarithm of brightness (sRGB), from barely visible to plain.
        folds: deviation of the threads' places, in periods: creases and perspective bend them.
        roughness: share of the deviation that is irregular, uniform from 0 on.
        plain: share of cloths whose threads cannot be seen. Where all noise lay on textures or on detailed pictures,
            the network drew faint hatching into even areas.
        smooth: deviation of the Gaussian blur of the picture under the texture, pixels: cloth is smooth but for its
            threads.
    """

    period: tuple[float, float] = (2.5, 12.0)
    stretch: tuple[float, float] = (0.6, 1.7)
    skew: float = 35.0
    contrast: tuple[float, float] = (0.06, 0.4)
    folds: tuple[float, float] = (0.05, 3.0)
    roughness: float = 0.5
    plain: float = 0.0
    smooth: tuple[float, float] = (1.0, 8.0)


def weave(clean: Tensor, random: np.random.Generator, ranges: FabricRanges | None = None) -> Tensor:
    """A picture that a regular texture covers, whole or in part.

    Args:
        clean: (3, H, W), sRGB in [0, 1], H and W at least 8.
        random: source of all randomness; numbers are drawn on the CPU, so that all devices get the same.
        ranges: None for the defaults.

    Returns:
        (3, H, W) in [0, 1].
    """
    ranges = ranges or FabricRanges()
    height, width = clean.shape[1:]
    generator = torch.Generator().manual_seed(int(random.integers(2**63)))
    fields = torch.randn((6, height, width), generator=generator).to(clean)
    pattern = _pattern(fields[:2], random, ranges)
    rough = _unit(blur(fields[None, 2:3], random.uniform(0.4, 1.2))[0, 0])
    share = random.uniform(0.0, ranges.roughness)
    pattern = math.sqrt(1 - share**2) * pattern + share * rough
    # Light that grazes the folds shows the threads more or less.
    pattern = pattern * (0.4 * _field(fields[3], random)).exp()
    contrast = log_uniform(random, ranges.contrast) * clean.new_tensor(1 + 0.1 * random.standard_normal((3, 1, 1)))
    # No number is drawn where no cloth is plain: textures of runs without this setting stay as they were.
    if ranges.plain and random.random() < ranges.plain:
        contrast = torch.zeros_like(contrast)
    ground = blur(clean[None], log_uniform(random, ranges.smooth))[0]
    cloth = (ground * (contrast * pattern).exp()).clamp(0, 1)
    if random.random() < 0.5:
        return cloth
    edge = random.uniform(1.0, 20.0)
    return torch.lerp(clean, cloth, torch.sigmoid(edge * (_field(fields[4], random) + random.uniform(-0.5, 0.5))))


def darken(clean: Tensor, factor: float) -> Tensor:
    """A picture (3, H, W), sRGB in [0, 1], with its light multiplied by ``factor``."""
    return linear_to_srgb(factor * srgb_to_linear(clean))


def _pattern(fields: Tensor, random: np.random.Generator, ranges: FabricRanges) -> Tensor:
    """A doubly periodic function with bent axes, (H, W), mean 0 and deviation 1."""
    height, width = fields.shape[1:]
    rows = torch.arange(height, device=fields.device, dtype=fields.dtype)[:, None]
    columns = torch.arange(width, device=fields.device, dtype=fields.dtype)
    period = log_uniform(random, ranges.period)
    angle = random.uniform(0, math.pi)
    cross = angle + math.pi / 2 + math.radians(random.uniform(-ranges.skew, ranges.skew))
    phases = []
    for field, direction, length in (
        (fields[0], angle, period),
        (fields[1], cross, max(period * log_uniform(random, ranges.stretch), ranges.period[0])),
    ):
        place = (math.cos(direction) * columns + math.sin(direction) * rows) / length
        phases.append(2 * math.pi * (place + log_uniform(random, ranges.folds) * _field(field, random)))
    decay = random.uniform(0.5, 2.0)
    pattern = torch.zeros_like(fields[0])
    for first, second in WAVES:
        height_of_wave = random.standard_normal() / (first**2 + second**2) ** decay
        pattern += height_of_wave * torch.cos(first * phases[0] + second * phases[1] + random.uniform(0, 2 * math.pi))
    return _unit(pattern)


def _field(noise: Tensor, random: np.random.Generator) -> Tensor:
    """A smooth random field (H, W) of deviation 1, from white noise (H, W)."""
    return _unit(blur(noise[None, None], log_uniform(random, (8.0, 40.0)))[0, 0])


def _unit(x: Tensor) -> Tensor:
    return (x - x.mean()) / x.std().clamp(min=1e-6)
