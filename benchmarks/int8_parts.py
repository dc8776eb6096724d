"""What each part of the calibration for 8-bit integers is worth, at white and at coarse noise of many levels.

    python benchmarks/int8_parts.py --calibration PHOTOGRAPHS --quality KODAK24 --every 6 --json int8-parts.json

The pictures get noise, are clipped and rounded to 8 bits, and are denoised at the true level (coarse noise, which 2x2
pixels share, at twice its level, at most 75). A figure is the PSNR of float32 less that of 8 bits, in dB, mean over the
pictures. Beside the codes that ship:

- nearest: each weight has the nearest code, see ``fastden/network/weight_rounding.py``;
- whole ranges: codes hold the largest activation that was seen;
- wide image: codes of the image from -0.25 to 1.25 (of a model of photographs they end at 0 and 1);
- up to 40: calibrated anew, with 40 as the strongest noise, for a model of photographs.
"""

from __future__ import annotations

import argparse
import copy
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch

import fastden
from fastden import Denoiser, calibrate, fuse
from fastden.bench.machine import describe
from fastden.bench.scripts import command
from fastden.bench.tables import write
from fastden.evaluation import find_pictures, psnr
from fastden.images.codec import read_image
from fastden.images.samples import MAX_SIGMA
from fastden.network import calibration, int8
from fastden.network.fused import FusedDenoiser
from fastden.training.data import central_crops

LEVELS = (2, 5, 10, 20, 40, 60, 75)


@command
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="photo")
    parser.add_argument("--calibration", type=Path, nargs="+", required=True, help="folders of photographs")
    parser.add_argument("--quality", type=Path, required=True, help="folder of clean photographs")
    parser.add_argument("--every", type=int, default=1, help="of them every n-th")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    files = find_pictures(arguments.quality)[:: arguments.every]
    model = Denoiser.from_pretrained(arguments.model)
    networks = {"float32": fuse(model)} | _variants(model, arguments.calibration)
    pictures = [read_image(file).pixels for file in files]
    document: dict[str, Any] = {
        "command": "benchmarks/int8_parts.py",
        "machine": describe(torch.device("cpu")),
        "model": arguments.model,
        "every": arguments.every,
        "pictures": len(pictures),
        "lost_db": {},
    }
    for kind in ("white", "coarse"):
        for level in LEVELS:
            scores = {name: np.mean(_scores(pictures, kind, level, network)) for name, network in networks.items()}
            best = scores.pop("float32")
            lost = {name: round(float(best - score), 3) for name, score in scores.items()}
            document["lost_db"].setdefault(kind, {})[str(level)] = lost
            print(kind, level, lost, flush=True)
    if arguments.json:
        write(arguments.json, document)


def _variants(model: Denoiser, folders: list[Path]) -> dict[str, FusedDenoiser]:
    assert model.int8_ranges is not None
    ranges, weights = model.int8_ranges
    # Other steps need other codes: theirs are the nearest.
    nearest = int8.without_rounding(ranges)
    made = {"ships": ranges, "nearest": nearest}
    without = {"whole ranges": ("share",), "wide image": ("image",), "whole, wide": ("share", "image")}
    for name, parts in without.items():
        made[f"nearest, {name}"] = {part: value for part, value in nearest.items() if part not in parts}
    networks = {name: _fast(model, found, weights) for name, found in made.items()}
    if model.estimator is not None:
        other = copy.deepcopy(model)
        with patch.object(calibration, "PHOTO_SIGMAS", (2.0, 5.0, 10.0, 20.0, 40.0)):
            calibrate(other, central_crops(folders, 32))
        networks["up to 40"] = fuse(other, quality="fast")
    return networks


def _fast(model: Denoiser, ranges: int8.Ranges, weights: str) -> FusedDenoiser:
    other = copy.deepcopy(model)
    other.int8_ranges = ranges, weights
    return fuse(other, quality="fast")


def _scores(pictures: list[Any], kind: str, level: int, network: FusedDenoiser) -> list[float]:
    random = np.random.default_rng(0)
    scores = []
    for clean in pictures:
        height, width = clean.shape[:2]
        if kind == "white":
            noise = random.normal(0, level, clean.shape)
        else:
            noise = random.normal(0, level, (-(-height // 2), -(-width // 2), 3)).repeat(2, 0).repeat(2, 1)
        noisy = np.clip(np.rint(clean + noise[:height, :width]), 0, 255).astype(np.uint8)
        sigma = level if kind == "white" else min(2 * level, MAX_SIGMA)
        scores.append(psnr(clean, fastden.denoise(noisy, sigma, model=network)))
    return scores


if __name__ == "__main__":
    main()
