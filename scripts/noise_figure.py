"""Draw ``docs/figures/kinds_of_noise.webp``: one detail of a photograph with five kinds of noise, all synthetic.

The photograph is one that scikit-image ships. The noise of cameras is that of :mod:`fastden.training.camera`.

    python scripts/noise_figure.py
"""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import numpy.typing as npt
import skimage.data
import torch
from PIL import Image, ImageDraw, ImageFont
from skimage.filters import gaussian

from fastden.training.camera import CameraNoise, CameraRanges

Pixels = npt.NDArray[np.uint8]

FIGURE = Path(__file__).resolve().parent.parent / "docs" / "figures" / "kinds_of_noise.webp"
#: Left and top of the detail, its side, how much it is enlarged, and details in a row.
CORNER, SIDE, ZOOM, COLUMNS = (150, 90), 88, 3, 3
HEADER, MARGIN = 30, 8


def camera(clean: Pixels, shot: float, seed: int) -> Pixels:
    """The picture of a camera with shot noise ``shot`` (variance at white, linear), which smooths its colours."""
    picture = torch.from_numpy(clean).permute(2, 0, 1).float() / 255
    ranges = CameraRanges(shot=(shot, shot), bands=0.0, chroma_filter=1.0)
    _, noisy = CameraNoise(ranges)(picture, np.random.default_rng(seed))
    return rounded(noisy.permute(1, 2, 0).numpy() * 255)


def film(clean: Pixels, sigma: float, blur: float, seed: int) -> Pixels:
    """Add grain, equal in all channels and strongest in the mid-tones; its correlation length is ``blur`` pixels."""
    grain = gaussian(np.random.default_rng(seed).normal(size=clean.shape[:2]), blur)
    brightness = clean.mean(2) / 255
    strength = sigma * grain / grain.std() * 4 * brightness * (1 - brightness)
    return rounded(clean + strength[:, :, None])


def compressed(pixels: Pixels, quality: int) -> Pixels:
    """Save as a JPEG, and read it again."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=quality)
    return np.asarray(Image.open(buffer))


def microscope(clean: Pixels, photons: float, sigma: float, seed: int) -> Pixels:
    """Add photon noise (``photons`` counted at white), and the camera's own noise."""
    random = np.random.default_rng(seed)
    gray = clean.mean(2, keepdims=True)
    noisy = random.poisson(gray / 255 * photons) * (255 / photons) + random.normal(0, sigma, gray.shape)
    return rounded(noisy).repeat(3, 2)


def rounded(values: npt.NDArray[np.floating]) -> Pixels:
    """Clip, and round to 8 bits."""
    return np.rint(np.clip(values, 0, 255)).astype(np.uint8)


def main() -> None:
    """Draw the figure."""
    clean: Pixels = skimage.data.chelsea()
    pictures = {
        "clean": clean,
        "phone at night": compressed(camera(clean, 0.02, 7), 80),
        "ISO 6400": camera(clean, 0.004, 2),
        "film": film(clean, 16, 1.2, 3),
        "JPEG, twice": compressed(compressed(film(clean, 5, 0.4, 4), 40)[3:, 3:], 40),
        "microscope": microscope(clean, 60, 3, 5),
    }
    size = SIDE * ZOOM
    rows = len(pictures) // COLUMNS
    sheet = Image.new("RGB", (COLUMNS * (size + MARGIN) - MARGIN, rows * (HEADER + size)), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(16)
    for index, (label, pixels) in enumerate(pictures.items()):
        left, top = index % COLUMNS * (size + MARGIN), index // COLUMNS * (HEADER + size)
        detail = Image.fromarray(pixels).crop((*CORNER, CORNER[0] + SIDE, CORNER[1] + SIDE))
        sheet.paste(detail.resize((size, size), Image.Resampling.NEAREST), (left, top + HEADER))
        draw.text((left + size / 2, top + HEADER / 2), label, "black", font, anchor="mm")
    sheet.save(FIGURE, quality=80)


if __name__ == "__main__":
    main()
