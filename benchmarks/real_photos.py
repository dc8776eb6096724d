"""Real noisy photographs and their references: fastden's default beside classical denoisers, in one run.

    python benchmarks/real_photos.py --data ../shared/data/eval/real --json benchmarks/results/real-photos.json

``--data`` holds a folder for each set, in it pairs ``name_real.*`` and ``name_mean.*``. fastden gets no parameter. The
classical denoisers get what nobody has: the strength that is best for the whole set, found by trying (``--nlm``,
``--bm3d``).
PSNR of RGB and SSIM, results of 8 bits, means over a set's pictures. Beside them the noise levels, estimated and true
(the deviation of the noisy picture from its reference), and what other strengths do. Of PolyU every third picture is
compared, of all sets every n-th of those with ``--every``: ``every`` and ``pictures`` of a set say which and how many.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch

import fastden
from fastden.bench.machine import describe
from fastden.bench.scripts import command
from fastden.bench.tables import write
from fastden.errors import UserError
from fastden.evaluation import dists, find_pairs, psnr, ssim
from fastden.images.codec import read_image
from fastden.network.fused import FusedDenoiser
from fastden.network.loading import load_network

#: Every n-th picture of a set, and the crop (rows, columns) that is compared: whole camera pictures take long.
EVERY = {"polyu": 3}
CROPS = {"polyu_full": (slice(400, 1424), slice(600, 1624))}
STRENGTHS = (0.5, 0.75, 1.25, 1.5, 2.0)
#: Strengths of OpenCV's non-local means and sigmas of CBM3D to try.
NLM_STRENGTHS = (3, 5, 7, 10, 15, 20, 30)
BM3D_SIGMAS = (5, 10, 15, 20, 30, 40)


@command
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--sets", nargs="*", help="default: all folders")
    parser.add_argument("--model", help="default: the noise chooses, as in fastden.denoise")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--strengths", action="store_true", help="also other strengths")
    parser.add_argument("--best", action="store_true", help="also quality='best'")
    parser.add_argument("--fast", action="store_true", help="also quality='fast', in 8 bits")
    parser.add_argument("--nlm", action="store_true", help="also OpenCV's non-local means")
    parser.add_argument("--bm3d", action="store_true", help="also CBM3D, which is slow: choose --sigmas and --crop")
    parser.add_argument("--sigmas", nargs="*", type=float, default=BM3D_SIGMAS, help="of CBM3D and --color")
    parser.add_argument("--crop", type=int, help="compare only the middle of the pictures, this many pixels square")
    parser.add_argument("--color", action="store_true", help="also the white-noise model at its best sigma a set")
    parser.add_argument("--dists", action="store_true", help="also DISTS, whose weights piq downloads")
    parser.add_argument("--every", type=int, default=1, help="only every n-th of the pictures")
    arguments = parser.parse_args()
    measures = {"psnr": psnr, "ssim": ssim} | ({"dists": dists()} if arguments.dists else {})
    folders = [arguments.data / name for name in arguments.sets] if arguments.sets else _sets(arguments.data)
    pairs = {folder: find_pairs(folder) for folder in folders}
    options: dict[str, Any] = {"device": "cpu", "dtype": arguments.dtype}
    if arguments.model:
        options = {"model": load_network(arguments.model, **options)}
    methods: dict[str, Callable[[Any, Any], Any]] = {
        "fastden": lambda image, estimate: fastden.denoise(image, estimate, **options)
    }
    if arguments.strengths:
        for strength in STRENGTHS:
            methods[f"fastden, strength {strength:g}"] = lambda image, estimate, strength=strength: fastden.denoise(
                image, estimate, strength=strength, **options
            )
    if arguments.best:
        methods["fastden, quality best"] = lambda image, estimate: fastden.denoise(
            image, estimate, quality="best", **options
        )
    if arguments.fast:
        methods["fastden, quality fast"] = lambda image, estimate: fastden.denoise(
            image, estimate, model=arguments.model, device="cpu", quality="fast"
        )
    if arguments.color:
        white = load_network("color", "cpu", arguments.dtype)
        for sigma in arguments.sigmas:
            methods[f"color {sigma:g}"] = lambda image, _, sigma=sigma: fastden.denoise(image, sigma, model=white)
    if arguments.nlm:
        methods |= {f"nlm {strength}": lambda image, _, h=strength: _nlm(image, h) for strength in NLM_STRENGTHS}
    if arguments.bm3d:
        methods |= {f"bm3d {sigma:g}": lambda image, _, sigma=sigma: _bm3d(image, sigma) for sigma in arguments.sigmas}
    document: dict[str, Any] = {
        "command": "benchmarks/real_photos.py",
        "model": arguments.model or "by noise",
        "sets": {},
    }
    document |= {"dtype": arguments.dtype, "crop": arguments.crop, "machine": describe(torch.device("cpu"))}
    for folder, found in pairs.items():
        every = arguments.every * EVERY.get(folder.name, 1)
        result = _run_set(folder.name, found[::every], methods, measures, arguments.crop, options.get("model"))
        document["sets"][folder.name] = {"every": every} | result
        print(_line(folder.name, result), flush=True)
        if arguments.json:
            write(arguments.json, document)


def _sets(data: Path) -> list[Path]:
    folders = sorted(path for path in data.iterdir() if path.is_dir()) if data.is_dir() else []
    if not folders:
        raise UserError(f"data: no folder in {data}; accepted: a folder with one for each set")
    return folders


def _run_set(
    set_name: str,
    pairs: list[tuple[Path, Path]],
    methods: dict[str, Callable[[Any, Any], Any]],
    measures: dict[str, Callable[[Any, Any], float]],
    crop: int | None,
    model: FusedDenoiser | None,
) -> dict[str, Any]:
    rows, columns = CROPS.get(set_name, (slice(None), slice(None)))
    pictures: dict[str, Any] = {}
    for file, reference in pairs:
        whole, clean = read_image(file).pixels, read_image(reference).pixels[rows, columns]
        noisy = whole[rows, columns]
        if crop:
            noisy, clean = _middle(noisy, crop), _middle(clean, crop)
        # The noise is judged on the whole picture, by the model's own estimator if it has one, as the command does.
        estimate = fastden.estimate_noise(whole, model)
        row: dict[str, Any] = {
            "noisy": _scores(measures, clean, noisy),
            "level": {
                "estimated": round(estimate.sigma, 2),
                "true": round(float((noisy.astype(float) - clean).std()), 2),
                "coarseness": round(estimate.coarseness, 3),
                "uncertainty": round(estimate.uncertainty, 3),
            },
        }
        for name, method in methods.items():
            start = time.perf_counter()
            row[name] = _scores(measures, clean, method(noisy, estimate))
            row[name]["seconds"] = round(time.perf_counter() - start, 3)
        pictures[file.name] = row
    names = ["noisy", *methods]
    means = {name: {key: _mean(pictures, name, key) for key in measures} for name in names}
    worst = {
        name: round(min(picture[name]["psnr"] - picture["noisy"]["psnr"] for picture in pictures.values()), 3)
        for name in methods
    }
    levels = {key: _mean(pictures, "level", key) for key in ("estimated", "true", "coarseness")}
    return {
        "pictures": len(pictures),
        "mean": means,
        "smallest_gain": worst,
        "level": levels,
        "by_picture": pictures,
    }


def _mean(pictures: dict[str, Any], name: str, key: str) -> float:
    return round(fmean(picture[name][key] for picture in pictures.values()), 4)


def _scores(measures: dict[str, Callable[[Any, Any], float]], clean: Any, image: Any) -> dict[str, float]:
    return {name: round(measure(clean, image), 5) for name, measure in measures.items()}


def _middle(image: Any, side: int) -> Any:
    top, left = (max(size - side, 0) // 2 for size in image.shape[:2])
    return image[top : top + side, left : left + side]


def _nlm(image: Any, strength: float) -> Any:
    import cv2

    # OpenCV's pictures are BGR; it denoises lightness and colours apart.
    bgr = cv2.fastNlMeansDenoisingColored(np.ascontiguousarray(image[..., ::-1]), None, strength, strength, 7, 21)
    return np.ascontiguousarray(bgr[..., ::-1])


def _bm3d(image: Any, sigma: float) -> Any:
    import bm3d

    values = bm3d.bm3d_rgb(image.astype(np.float64) / 255, sigma / 255)
    return np.rint(np.clip(values, 0, 1) * 255).astype(np.uint8)


def _line(name: str, result: dict[str, Any]) -> str:
    best: dict[str, tuple[float, str]] = {}
    for method, scores in result["mean"].items():
        family = method.split(" ")[0] if method.split(" ")[0] in ("nlm", "bm3d", "color") else method
        best[family] = max(best.get(family, (-1.0, "")), (scores["psnr"], method))
    parts = ", ".join(f"{method} {value:.2f}" for value, method in best.values())
    level = result["level"]
    return f"{name} ({result['pictures']}): {parts}; level {level['estimated']:.1f}, true {level['true']:.1f}"


if __name__ == "__main__":
    main()
