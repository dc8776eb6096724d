"""Noise models for training."""

from __future__ import annotations

import io
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

Range = tuple[float, float]


@dataclass(frozen=True)
class NoiseModel:
    """Photon noise, white Gaussian noise, and then JPEG compression, drawn for each image.

    Args:
        sigma: range of the Gaussian noise's standard deviation, on the scale 0-255, uniform.
        gain: range of the photon (Poisson) noise's variance at white, on the scale [0, 1], uniform: a pixel of value
            v is ``gain * Poisson(v / gain)``, whose variance is ``gain * v``. 0 is none.
        jpeg: range of the quality, 1 to 100, uniform over the integers; None is no compression. A compressed image is
            clipped and rounded to 8 bits first; others are neither.
        jpeg_share: probability that an image is compressed.
    """

    sigma: Range
    gain: Range = (0.0, 0.0)
    jpeg: tuple[int, int] | None = None
    jpeg_share: float = 1.0

    def __call__(self, clean: Tensor, random: np.random.Generator, gray: bool = False) -> tuple[Tensor, Tensor]:
        """A noisy image and its noise level.

        Args:
            clean: (C, H, W) float32 in [0, 1].
            random: source of randomness.
            gray: draw one noise plane for all channels.

        Returns:
            The noisy image (C, H, W), and the standard deviation on the same scale: a scalar, or with photon noise a
            map (1, H, W), which is taken from the noisy image as it would have to be where the clean one is not known.
        """
        source = clean[:1] if gray else clean
        sigma = random.uniform(*self.sigma) / 255
        gain = random.uniform(*self.gain)
        noisy = source.numpy()
        if gain > 0:
            noisy = gain * random.poisson(noisy / gain).astype(np.float32)
        noisy = noisy + np.float32(sigma) * random.standard_normal(noisy.shape, dtype=np.float32)
        result = torch.from_numpy(np.ascontiguousarray(noisy, dtype=np.float32)).expand_as(clean)
        if self.jpeg is not None and random.random() < self.jpeg_share:
            result = compress(result, int(random.integers(self.jpeg[0], self.jpeg[1] + 1)))
        if self.gain[1] > 0:
            luminance = result.mean(0, keepdim=True).clamp(0, 1)
            return result.contiguous(), (gain * luminance + sigma**2).sqrt().clamp(max=1)
        return result.contiguous(), torch.tensor(sigma, dtype=torch.float32)


def compress(image: Tensor, quality: int, subsampling: int = 2) -> Tensor:
    """An image (3, H, W), clipped to [0, 1], rounded to 8 bits and sent through JPEG.

    Args:
        image: float.
        quality: 1 to 100.
        subsampling: of chroma: 0 none (4:4:4), 1 columns (4:2:2), 2 rows and columns (4:2:0).
    """
    from PIL import Image

    pixels = (image.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).contiguous().cpu().numpy()
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=quality, subsampling=subsampling)
    with Image.open(buffer) as decoded:
        return torch.from_numpy(np.array(decoded)).to(image.device).permute(2, 0, 1).float().div_(255)


class NoisyDataset(Dataset[dict[str, Tensor]]):
    """Clean items with noise added, each a function of (seed, epoch, index) alone, in every process.

    So a resumed run repeats the uninterrupted one, and several processes together make the batches of one process.

    Args:
        clean: its items hold ``clean`` (3, H, W) in [0, 1] and ``gray``, a boolean; both and all else pass through.
        noise: the noise model.
        seed, epoch: see above.
    """

    def __init__(self, clean: Dataset[dict[str, Tensor]], noise: NoiseModel, seed: int, epoch: int) -> None:
        self.clean = clean
        self.noise = noise
        self.key = (seed, epoch)

    def __len__(self) -> int:
        return len(self.clean)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        item = self.clean[index]
        # The last number keeps this stream apart from that of the crops.
        random = np.random.default_rng((*self.key, index, 1))
        noisy, level = self.noise(item["clean"], random, bool(item["gray"]))
        return {**item, "noisy": noisy, "level": level}
