"""What the default command's way makes of cloth, of even areas, and of pictures as they are, under a camera's noise.

    python benchmarks/textures.py --data FOLDER... --models photo runs/mine/model --json textures.json

Crops of clean photographs become cloth (``fastden.training.fabric.weave``, threads of a contrast that one sees), or
even areas (blurred until nothing but shading is left), or stay. All get noise as cameras make it
(``fastden.training.photo_noise``) and are denoised at the level that each model's estimator finds, times a strength. A
network that learned to keep threads may draw them where there are none: even areas show it. Noise and textures are of
the kinds that the models were trained on; these draws of them are new.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import fastden
from fastden.bench.machine import describe
from fastden.bench.scripts import command
from fastden.bench.tables import write
from fastden.evaluation import psnr
from fastden.network.loading import load_network
from fastden.training.camera import blur
from fastden.training.data import find_photographs, load_rgb
from fastden.training.fabric import FabricRanges, darken, weave
from fastden.training.photo_noise import PhotoNoise, PhotoRanges

#: Side of the crops, pixels, and the seed of all that is drawn.
CROP, SEED = 254, 11
STRENGTHS = (0.5, 0.75, 1.0, 1.25)
THREADS = FabricRanges(contrast=(0.1, 0.3), period=(4.0, 8.0), folds=(0.05, 1.0), plain=0.0)
#: Deviation of the blur that leaves shading alone, pixels.
EVEN = 24.0
KINDS = ("cloth", "dark cloth", "even", "as they are")


@command
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, nargs="+", required=True, help="folders of clean photographs")
    parser.add_argument("--models", nargs="+", default=["photo"])
    parser.add_argument("--count", type=int, default=24, help="crops of each kind")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    files = [file for folder in arguments.data for file in find_photographs(folder)]
    results: dict[str, Any] = {name: {} for name in arguments.models}
    for kind in KINDS:
        pairs = [_pair(files, kind, index) for index in range(arguments.count)]
        noisy = float(np.mean([psnr(clean, shot) for clean, shot in pairs]))
        for name in arguments.models:
            network = load_network(name, "cpu", "float32")
            estimates = [fastden.estimate_noise(shot, name) for _, shot in pairs]
            row = {"noisy": round(noisy, 3)}
            for strength in STRENGTHS:
                made = [
                    fastden.denoise(shot, estimate, strength=strength, model=network)
                    for (_, shot), estimate in zip(pairs, estimates, strict=True)
                ]
                row[f"strength {strength:g}"] = round(
                    float(np.mean([psnr(clean, one) for (clean, _), one in zip(pairs, made, strict=True)])), 3
                )
            results[name][kind] = row
            print(name, kind, row, flush=True)
    if arguments.json:
        document = {
            "machine": describe(torch.device("cpu")),
            "data": [folder.name for folder in arguments.data],
            "crops": arguments.count,
            "psnr": results,
        }
        write(arguments.json, document)


def _pair(files: list[Path], kind: str, index: int) -> tuple[Any, Any]:
    """A clean crop of a kind and its noisy shot, (H, W, 3) uint8; the same for all models."""
    camera = PhotoRanges(white=0.0, camera=1.0, grain=0.0, clean=0.0, soft=0.5, jpeg=1.0, quality=(80, 98))
    noise = PhotoNoise(camera)
    random = np.random.default_rng((SEED, KINDS.index(kind), index))
    while True:
        image = load_rgb(files[int(random.integers(len(files)))])
        recipe = noise.plan(random, CROP, min(image.shape[:2]))
        if recipe.taken <= min(image.shape[:2]):
            break
    top, left = (int(random.integers(size - recipe.taken + 1)) for size in image.shape[:2])
    piece = image[top : top + recipe.taken, left : left + recipe.taken]
    clean = torch.from_numpy(piece.transpose(2, 0, 1).copy()).float().div(255)
    if kind.endswith("cloth"):
        clean = weave(clean, random, THREADS)
    if kind == "dark cloth":
        clean = darken(clean, 0.1)
    if kind == "even":
        clean = blur(clean[None], EVEN)[0]
    target, shot = recipe.make(clean, random)
    return _bytes(target), _bytes(shot)


def _bytes(image: Tensor) -> Any:
    return (image.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()


if __name__ == "__main__":
    main()
