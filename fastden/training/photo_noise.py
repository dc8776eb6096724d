"""Noise of photographs as files hold it: white noise, camera noise, grain of film and scanners, and none.

Behind the noise come resizing, 8 bits and JPEG. A recipe is drawn before the crop is cut, because resizing decides how
large a piece of the picture it needs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from fastden.images.samples import MAX_SIGMA
from fastden.training.camera import CameraNoise, blur, log_uniform
from fastden.training.fabric import FabricRanges, darken, weave
from fastden.training.synthetic_noise import compress

#: Chroma subsampling of JPEG: none, halved columns, halved rows and columns (Pillow's numbers).
SUBSAMPLINGS = (0, 1, 2)
#: Deviation of the Gaussian, pixels, beyond which brightness and colour stay as they are in the noisy picture. White
#: noise outlives it by 1 / 43.
TONE_RADIUS = 12.0
#: Pixels around a crop that resizing, filters and JPEG blocks may use, cut off at the end.
MARGIN = 8


@dataclass(frozen=True)
class PhotoRanges:
    """How often each kind of noise is drawn, and from where its parameters; a pair is uniform between its numbers.

    Args:
        white, camera, grain, clean: shares of the kinds; they add up to 1.
        sigma: of white noise, 0-255 scale, as the white-noise models here were trained. It grows with a uniform number
            to the power ``sigma_power``: 2 draws more weak noise.
        grain_sigma: of grain, 0-255 scale, log-uniform: from invisible to the noise of a phone at night.
        grain_blur: its correlation length as the deviation of a Gaussian blur, pixels, log-uniform.
        reduce: probability that a clean picture is reduced before it gets noise, by up to ``smallest``, log-uniform. A
            reduced picture has more texture, which an estimator must tell from noise.
        fabric: probability that a regular, faint texture covers the clean picture or parts of it
            (:func:`fastden.training.fabric.weave`). ``plain`` of these textures cannot be seen: their areas are even;
            ``contrast`` is that of the others.
        dark: probability that the clean picture loses light, down to ``darkest``, log-uniform. Collections show
            pictures that are well lit; noise is seen where light was short.
        soft: probability that the picture of a camera or a scanner is blurred before it gets noise, as its lens and
            its anti-aliasing filter do. Photographs that were reduced for training have 16 times as much of the finest
            detail as those that cameras leave whole (``benchmarks/results/fine-detail.json``: ``free`` beside ``cc``
            and ``polyu``); a network that met no soft picture keeps fine noise.
        lens: deviation of that Gaussian blur, pixels, log-uniform. Its contrast falls to a half at 0.187 / deviation
            cycles a pixel: from 0.47, the sharpest that pixels hold, to 0.14, a lens at its widest or a small sensor.
        resize: probability that a picture is resized behind the noise.
        scale: by what factor, log-uniform: enlarged or reduced up to twice.
        jpeg: probability of JPEG compression, ``twice`` that of a second one.
        quality: of JPEG; the square of a uniform number leans towards the upper end, as cameras and phones do.
        clean_quality: the same for pictures without noise, whose only noise are the artefacts of JPEG.
        round: probability that a picture without JPEG is rounded to 8 bits.
    """

    white: float = 0.3
    camera: float = 0.42
    grain: float = 0.22
    clean: float = 0.06
    sigma: tuple[float, float] = (0.0, MAX_SIGMA)
    sigma_power: float = 1.0
    grain_sigma: tuple[float, float] = (1.0, 60.0)
    grain_blur: tuple[float, float] = (0.3, 3.0)
    reduce: float = 0.0
    smallest: float = 0.4
    fabric: float = 0.0
    plain: float = 0.0
    contrast: tuple[float, float] = (0.06, 0.4)
    dark: float = 0.0
    darkest: float = 0.06
    soft: float = 0.0
    lens: tuple[float, float] = (0.4, 1.3)
    resize: float = 0.5
    scale: tuple[float, float] = (0.5, 2.0)
    jpeg: float = 0.75
    twice: float = 0.15
    quality: tuple[int, int] = (50, 98)
    clean_quality: tuple[int, int] = (50, 98)
    round: float = 0.7


class PhotoNoise:
    """Draws recipes: :meth:`plan`, then :meth:`Recipe.make` on a crop of the size that the recipe asks for.

    Args:
        ranges: see :class:`PhotoRanges`.
        camera: the camera model.
    """

    def __init__(self, ranges: PhotoRanges | None = None, camera: CameraNoise | None = None) -> None:
        self.ranges = ranges or PhotoRanges()
        self.camera = camera or CameraNoise()

    def plan(self, random: np.random.Generator, crop: int, largest: int) -> Recipe:
        """A recipe for results of ``crop`` pixels a side from pictures whose shorter side is ``largest`` pixels."""
        ranges = self.ranges
        shares = [ranges.white, ranges.camera, ranges.grain, ranges.clean]
        kind = str(random.choice(["white", "camera", "grain", "clean"], p=shares))
        scale = 1.0
        if kind != "white" and random.random() < ranges.resize:
            scale = log_uniform(random, ranges.scale)
        margin = 0 if kind == "white" else MARGIN
        scale = max(scale, (crop + 2 * margin) / largest)
        side = min(crop if kind == "white" else math.ceil((crop + 2 * margin) / scale), largest)
        taken = side
        # No number is drawn where nothing is reduced: the recipes of earlier runs stay as they were.
        if ranges.reduce and random.random() < ranges.reduce:
            taken = min(round(side / log_uniform(random, (ranges.smallest, 1.0))), largest)
        return Recipe(self, kind, scale, crop, side, taken)


@dataclass(frozen=True)
class Recipe:
    """One way to a noisy picture.

    Args:
        noise: the ranges and the camera.
        kind: white, camera, grain or clean.
        scale: of the resizing behind the noise.
        crop: side of the result, pixels.
        side: side of the crop that gets the noise, pixels.
        taken: side of the crop that :meth:`make` takes, pixels; it is reduced to ``side``.
    """

    noise: PhotoNoise
    kind: str
    scale: float
    crop: int
    side: int
    taken: int

    def make(self, clean: Tensor, random: np.random.Generator, gray: bool = False) -> tuple[Tensor, Tensor]:
        """The target and the noisy picture.

        Args:
            clean: (3, taken, taken), float32 in [0, 1].
            random: source of all randomness.
            gray: the picture has equal channels; its noise has too.

        Returns:
            (3, crop, crop) each: the target in [0, 1], the noisy one in [0, 1] but for white noise, which is not
            clipped.
        """
        if self.taken != self.side:
            sides = (self.side, self.side)
            clean = F.interpolate(clean[None], sides, mode="bicubic", antialias=True)[0].clamp(0, 1)
        ranges = self.noise.ranges
        if ranges.fabric and random.random() < ranges.fabric:
            clean = weave(clean, random, FabricRanges(plain=ranges.plain, contrast=ranges.contrast))
            clean = clean.mean(0, keepdim=True).expand_as(clean) if gray else clean
        if ranges.dark and random.random() < ranges.dark:
            clean = darken(clean, log_uniform(random, (ranges.darkest, 1.0)))
        if self.kind == "white":
            return clean, self._white(clean, random, gray)
        if self.kind != "clean" and ranges.soft and random.random() < ranges.soft:
            clean = blur(clean[None], log_uniform(random, ranges.lens))[0]
        if self.kind == "camera":
            target, noisy = self.noise.camera(clean, random)
        elif self.kind == "grain":
            target, noisy = clean, clean + self._grain(clean, random)
        else:
            target, noisy = clean, clean
        if gray:
            target, noisy = target.mean(0, keepdim=True).expand_as(target), noisy.mean(0, keepdim=True).expand_as(noisy)
        pair = self._resized(torch.stack([target, noisy]), random).clamp(0, 1)
        target, noisy = self._filed(pair[0], pair[1], random)
        # The target keeps the noisy picture's tones. Clipping and the tone curve move the means of dark, noisy areas. A
        # network that was taught to move them back moved tones of real pictures that were right.
        return target + blur((noisy - target)[None], TONE_RADIUS)[0], noisy

    def _white(self, clean: Tensor, random: np.random.Generator, gray: bool) -> Tensor:
        low, high = self.noise.ranges.sigma
        sigma = (low + (high - low) * random.random() ** self.noise.ranges.sigma_power) / 255
        generator = torch.Generator().manual_seed(int(random.integers(2**63)))
        noise = torch.randn((1 if gray else 3, *clean.shape[1:]), generator=generator).to(clean)
        return clean + sigma * noise

    def _grain(self, clean: Tensor, random: np.random.Generator) -> Tensor:
        """Correlated noise: coarse or fine, shared by the channels or not, in the shadows or in the lights."""
        ranges = self.noise.ranges
        generator = torch.Generator().manual_seed(int(random.integers(2**63)))
        fields = torch.randn((2, 3, *clean.shape[1:]), generator=generator).to(clean)
        length = log_uniform(random, ranges.grain_blur)
        luma = _unit(blur(fields[:1, :1], length))[0].expand_as(clean)
        # Colour blotches are coarser than luma grain where a camera or a scanner smoothed them.
        color = _unit(blur(fields[1:], length * random.uniform(1.0, 2.5)))[0]
        shared = random.uniform(0.0, 1.0)
        noise = math.sqrt(shared) * luma + math.sqrt(1 - shared) * color
        # A blur's rounding lifts white above 1, and a power of what is below 0 is no number.
        brightness = blur(clean.mean(0, keepdim=True)[None], 2.0)[0].clamp(0, 1)
        floor, power = random.uniform(0.1, 1.0), random.uniform(0.4, 1.6)
        shapes = (
            torch.ones_like(brightness),
            floor + (1 - floor) * brightness**power,
            floor + (1 - floor) * (1 - brightness) ** power,
            floor + (1 - floor) * 4 * brightness * (1 - brightness),
        )
        return log_uniform(random, ranges.grain_sigma) / 255 * shapes[int(random.integers(4))] * noise

    def _resized(self, pair: Tensor, random: np.random.Generator) -> Tensor:
        side = self.crop + 2 * MARGIN
        mode = ("bilinear", "bicubic")[int(random.integers(2))]
        if pair.shape[-1] != side:
            pair = F.interpolate(pair, (side, side), mode=mode, antialias=True)
        return pair

    def _filed(self, target: Tensor, noisy: Tensor, random: np.random.Generator) -> tuple[Tensor, Tensor]:
        """Rounded, compressed, and cut at a random offset to JPEG's blocks."""
        ranges = self.noise.ranges
        top, left = (int(offset) for offset in random.integers(0, 2 * MARGIN + 1, 2))
        if random.random() < ranges.jpeg:
            rounds = 2 if random.random() < ranges.twice else 1
            for _ in range(rounds):
                low, high = ranges.clean_quality if self.kind == "clean" else ranges.quality
                quality = round(high - (high - low) * random.random() ** 2)
                noisy = compress(noisy, quality, SUBSAMPLINGS[int(random.integers(3))])
                # A second compression seldom meets the blocks of the first: the picture was cut or moved between.
                noisy = torch.roll(noisy, (3, 5), (1, 2)) if rounds == 2 else noisy
            noisy = torch.roll(noisy, (-6, -10), (1, 2)) if rounds == 2 else noisy
            if rounds == 2:
                # Blocks at the seam hold both edges of the picture. Of chroma they are 16 pixels wide: they begin 3
                # rows and 5 columns before the picture.
                top, left = 16 - 3, 16 - 5
        elif random.random() < ranges.round:
            noisy = (noisy * 255).round() / 255
        cut = (slice(None), slice(top, top + self.crop), slice(left, left + self.crop))
        return target[cut].contiguous(), noisy[cut].contiguous()


def _unit(x: Tensor) -> Tensor:
    return x / x.std().clamp(min=1e-6)
