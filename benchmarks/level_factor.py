"""By what factor the level of coarse noise should be raised, judged on the training's noise and not on real pairs.

    python benchmarks/level_factor.py --data FOLDER... --json benchmarks/results/level-factor.json

Crops of clean photographs get noise of all kinds (``fastden.training.photo_noise``). The model ``photo`` denoises each
at several multiples of the estimated curve. Between them its PSNR is interpolated, so that every rule for the factor
(``fastden.network.level.white_factor``) can be judged on the same results: the largest factor, of noise whose
neighbours are equal (coarseness 1), and the uncertainties
between which it falls to 1.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastden.bench.machine import describe
from fastden.bench.scripts import command
from fastden.bench.tables import write
from fastden.images.samples import MAX_SIGMA
from fastden.inference.estimate import load_estimator
from fastden.network.level import (
    level_map,
    levels_of,
    picture_coarseness,
    picture_uncertainty,
    robust_curve,
    weights_of,
)
from fastden.network.loading import load_network
from fastden.training.data import find_photographs, load_rgb
from fastden.training.photo import PhotoDataset
from fastden.training.photo_noise import PhotoNoise, PhotoRanges

#: Multiples of the estimated level that the network is given.
MULTIPLES = (0.5, 0.7, 1.0, 1.4, 2.0, 2.4, 2.8, 3.4)
#: Side of the crops, pixels.
CROP = 190
#: Mean squared error, 0-255 scale, that is added to each: clean pictures that come back equal count as 52 dB.
FLOOR = 0.4
LARGEST = (1.0, 1.25, 1.5, 1.75, 2.0, 2.25, 2.5)
UNCERTAINTIES = ((0.25, 0.65), (0.35, 0.75), (0.45, 0.75), (0.45, 0.85), (0.55, 0.95), (0.65, 1.05))
#: What the shipped rule takes for the one where the other is varied.
FACTOR, RAMP = 2.0, (0.45, 0.85)


@command
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, nargs="+", required=True, help="folders of clean photographs")
    parser.add_argument("--count", type=int, default=400, help="crops")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    images = [load_rgb(file) for folder in arguments.data for file in find_photographs(folder)]
    ranges = PhotoRanges(
        white=0.15,
        camera=0.5,
        grain=0.15,
        clean=0.2,
        clean_quality=(75, 99),
        twice=0.25,
        reduce=0.3,
        soft=0.6,
        fabric=0.3,
        dark=0.25,
    )
    smallest = CROP / ranges.smallest
    images = [image for image in images if min(image.shape[:2]) >= smallest]
    pairs = PhotoDataset(images, PhotoNoise(ranges), arguments.count, CROP, 0.03, (0, 1))
    decibels, coarseness, uncertainty = _measure(pairs)
    rules = {}
    for largest in LARGEST:
        rules[f"factor {largest:g}, uncertainty {RAMP[0]:g} to {RAMP[1]:g}"] = (largest, RAMP)
    for ramp in UNCERTAINTIES:
        rules[f"factor {FACTOR:g}, uncertainty {ramp[0]:g} to {ramp[1]:g}"] = (FACTOR, ramp)
    document: dict[str, Any] = {"machine": describe(torch.device("cpu")), "crops": arguments.count, "psnr": {}}
    for name, (largest, ramp) in rules.items():
        share = (2 * coarseness - 1).clip(0, 1) * (1 - ((uncertainty - ramp[0]) / (ramp[1] - ramp[0])).clip(0, 1))
        logs = np.log(1 + (largest - 1) * share)
        scores = [float(np.interp(log, np.log(MULTIPLES), row)) for log, row in zip(logs, decibels, strict=True)]
        document["psnr"][name] = round(float(np.mean(scores)), 3)
        print(f"{name}: {document['psnr'][name]:.3f} dB", flush=True)
    if arguments.json:
        write(arguments.json, document)


@torch.inference_mode()
def _measure(pairs: PhotoDataset) -> tuple[Any, Any, Any]:
    """PSNR of each crop at each multiple, its coarseness and its uncertainty."""
    estimator, network = load_estimator(), load_network("photo", "cpu", "bfloat16")
    decibels, coarseness, uncertainty = [], [], []
    for index in range(len(pairs)):
        noisy, clean = pairs[index]["noisy"][None], 255 * pairs[index]["clean"][None]
        cells = estimator(noisy)
        weights = weights_of(cells)
        curve = levels_of(robust_curve(cells))
        errors = []
        for multiple in MULTIPLES:
            output = network(noisy, level_map((multiple * curve).clamp(max=MAX_SIGMA / 255), noisy))
            rounded = (255 * output.float().clamp(0, 1)).round()
            errors.append(float((rounded - clean).square().mean()) + FLOOR)
        decibels.append(10 * np.log10(255**2 / np.array(errors)))
        coarseness.append(float(picture_coarseness(cells, weights)))
        uncertainty.append(float(picture_uncertainty(cells, weights)))
    return np.array(decibels), np.array(coarseness), np.array(uncertainty)


if __name__ == "__main__":
    main()
