"""What the noise estimator says of clean and noisy pictures: level, coarseness, uncertainty, factor of the level.

    python benchmarks/noise_estimates.py --data FOLDER --json benchmarks/results/noise-estimates.json

Each picture of a folder as it is and with white Gaussian noise, and textures that scikit-image ships. The thresholds of
``fastden.network.level.white_factor`` are explained by these numbers; those of real noise are in ``real-photos.json``.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import skimage.data
import torch

import fastden
from fastden.bench.machine import describe
from fastden.bench.scripts import command
from fastden.bench.tables import write
from fastden.evaluation import find_pictures
from fastden.images.codec import read_image

#: Standard deviations of the noise, 0-255 scale; 0 is the picture as it is.
SIGMAS = (0, 5, 15, 25, 50)
#: Pictures of scikit-image that are nothing but texture.
TEXTURES = ("grass", "gravel", "brick")
FIELDS = ("sigma", "coarseness", "uncertainty", "factor")


@command
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of clean photographs")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    photographs = {file.name: read_image(file).pixels for file in find_pictures(arguments.data)}
    textures = {name: np.atleast_3d(getattr(skimage.data, name)()) for name in TEXTURES}
    document: dict[str, Any] = {"machine": describe(torch.device("cpu"))}
    document["textures"] = {name: judged(pixels, 0, 0) for name, pixels in textures.items()}
    document["photographs"] = {}
    for sigma in SIGMAS:
        rows = {name: judged(pixels, sigma, seed) for seed, (name, pixels) in enumerate(photographs.items())}
        spread = {field: spread_of([row[field] for row in rows.values()]) for field in FIELDS}
        document["photographs"][str(sigma)] = {"spread": spread, "by_picture": rows}
        print(f"sigma {sigma}: {spread}", flush=True)
    print(f"textures: {document['textures']}")
    if arguments.json:
        write(arguments.json, document)


def judged(pixels: Any, sigma: float, seed: int) -> dict[str, float]:
    """The estimate of a picture (H, W, C), uint8, with white noise of ``sigma`` that is not clipped."""
    noise = np.random.default_rng(seed).normal(0, sigma / 255, pixels.shape)
    estimate = fastden.estimate_noise((pixels / 255 + noise).astype(np.float32) if sigma else pixels)
    return {field: round(getattr(estimate, field), 3) for field in FIELDS}


def spread_of(values: list[float]) -> dict[str, float]:
    return {"least": min(values), "median": round(median(values), 3), "most": max(values)}


if __name__ == "__main__":
    main()
