"""The tables of the joint experiments: how well a frozen network sees through noise, behind each denoiser.

Every denoiser gets the same noisy validation images, its result is clipped and rounded to 8 bits, and the frozen
network looks at it. Noise is Gaussian, not clipped, of known sigma; each seed is another draw. Figures are the mean
over the seeds, and the standard deviation over them (of the sample).

    python benchmarks/joint/evaluate.py classify --data ../shared/data/joint/imagenet_val \\
        --models separate=color joint=color-classify cross-task=color-segment
    python benchmarks/joint/evaluate.py segment --data ../shared/data/joint/camvid/val \\
        --models separate=color joint=color-segment cross-task=color-classify

writes ``benchmarks/results/joint/EXPERIMENT.json`` and prints the table. CBM3D takes seconds an image: it can be given
fewer seeds (``--cbm3d-seeds``), or left out (``--no-cbm3d``). Results that the file holds already, of the same weights
and images, are kept: an interrupted run goes on.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import time
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import numpy as np
import torch
from experiment import Denoise, Predictor, add_noise, cbm3d, load, network, none
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

import fastden
from fastden.evaluation import psnr, ssim
from fastden.training.tasks import Task

RESULTS = Path(__file__).parents[1] / "results" / "joint"
SCORES = {"classify": ("top1", "top5"), "segment": ("miou", "pixel_accuracy")}


def evaluate(
    experiment: str,
    images: list[tuple[Any, Any]],
    task: Task,
    denoise: Denoise,
    sigma: float,
    seed: int,
    progress: Any,
) -> dict[str, float]:
    """Scores of one denoiser at one level and seed, in percent; PSNR in dB and SSIM beside them."""
    predict = Predictor(task)
    hits: list[tuple[bool, bool]] = []
    counts = np.zeros((task.classes, task.classes), np.int64)
    quality: list[tuple[float, float]] = []
    start = time.perf_counter()
    for index, (clean, label) in enumerate(images):
        noisy = add_noise(clean, sigma, seed, index)
        pixels = denoise(noisy, sigma / 255)
        prediction = predict(pixels)
        if experiment == "classify":
            best = prediction.topk(5).indices.tolist()
            hits.append((best[0] == int(label), int(label) in best))
        else:
            seen = label != task.ignore_index
            counts += np.bincount(
                label[seen] * task.classes + prediction.numpy()[seen], minlength=task.classes**2
            ).reshape(task.classes, task.classes)
        if sigma > 0:
            quality.append((psnr(clean, pixels), ssim(clean, pixels)))
        progress()
    if experiment == "classify":
        first, second = (100 * fmean(hit[i] for hit in hits) for i in (0, 1))
    else:
        right = counts.diagonal()
        first = 100 * float(np.mean(right / (counts.sum(0) + counts.sum(1) - right)))
        second = 100 * float(right.sum() / counts.sum())
    found = dict(zip(SCORES[experiment], (round(first, 3), round(second, 3)), strict=True))
    if quality:
        found |= {name: round(fmean(pair[i] for pair in quality), 4) for i, name in enumerate(("psnr", "ssim"))}
    return {**found, "seconds": round(time.perf_counter() - start, 1)}


def digest(model: str) -> str:
    """Of a model's weights, so that results of other weights are not mixed in."""
    folder = fastden.models().get(model, Path(model))
    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()[:16]


def summarise(runs: dict[str, dict[str, float]]) -> dict[str, dict[str, float]]:
    """Mean and standard deviation over the seeds of every score."""
    scores = list(runs.values())
    summary: dict[str, dict[str, float]] = {}
    for name in scores[0]:
        values = [run[name] for run in scores]
        summary[name] = {"mean": round(fmean(values), 4), "std": round(stdev(values), 4) if len(values) > 1 else 0.0}
    return summary


def show(document: dict[str, Any], experiment: str) -> None:
    first, second = SCORES[experiment]
    sigmas = document["sigmas"]
    table = Table(title=f"{experiment}: {first} / {second}, %; PSNR, dB / SSIM", show_lines=True)
    table.add_column("")
    for sigma in sigmas:
        table.add_column(f"sigma {sigma:g}")
    for name, levels in document["results"].items():
        cells = []
        for sigma in sigmas:
            if str(sigma) not in levels:
                cells.append("")
                continue
            summary = summarise(levels[str(sigma)])
            spread = f" ± {summary[first]['std']:.1f}" if len(levels[str(sigma)]) > 1 else ""
            quality = f"\n{summary['psnr']['mean']:.2f} / {summary['ssim']['mean']:.3f}"
            cells.append(f"{summary[first]['mean']:.1f}{spread} / {summary[second]['mean']:.1f}{quality}")
        table.add_row(name, *cells)
    Console(width=140).print(table)
    clean = document["clean"]
    print(f"clean images: {first} {clean[first]:.1f}, {second} {clean[second]:.1f}")


def main() -> None:
    parser = argparse.ArgumentParser(description="Tables of the joint experiments.")
    parser.add_argument("experiment", choices=SCORES)
    parser.add_argument("--data", type=Path, required=True, help="folder of labelled validation images")
    parser.add_argument("--models", nargs="+", default=["separate=color"], metavar="NAME=MODEL")
    parser.add_argument("--sigma", nargs="+", type=float, default=[15.0, 30.0, 45.0, 60.0])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--cbm3d-seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--no-cbm3d", action="store_true")
    parser.add_argument("--limit", type=int, help="only so many images, evenly spaced")
    parser.add_argument("--json", type=Path, help="where to write; default: benchmarks/results/joint/EXPERIMENT.json")
    arguments = parser.parse_args()
    experiment = arguments.experiment
    target = arguments.json or RESULTS / f"{experiment}.json"
    images, task = load(experiment, arguments.data, arguments.limit)
    chosen = dict(item.split("=", 1) for item in arguments.models)
    methods: dict[str, tuple[Denoise, str]] = {"noisy": (none, "")}
    if not arguments.no_cbm3d:
        methods["CBM3D"] = (cbm3d, "bm3d")
    methods |= {name: (network(model), digest(model)) for name, model in chosen.items()}
    document = json.loads(target.read_text()) if target.exists() else {}
    if document.get("images") != len(images):
        document = {}
    before, weights = document.get("results", {}), document.get("weights", {})
    results = {name: before.get(name, {}) if weights.get(name) == key else {} for name, (_, key) in methods.items()}
    document |= {
        "command": f"python benchmarks/joint/evaluate.py {experiment}",
        "models": chosen,
        "weights": {name: key for name, (_, key) in methods.items()},
        "images": len(images),
        "sigmas": arguments.sigma,
        "torch": torch.__version__,
        "results": results,
    }
    target.parent.mkdir(parents=True, exist_ok=True)
    with Progress() as progress:
        if "clean" not in document:
            bar = progress.add_task("clean", total=len(images))
            document["clean"] = evaluate(experiment, images, task, none, 0.0, 0, lambda: progress.advance(bar))
        for name, (denoise, _) in methods.items():
            for sigma in arguments.sigma:
                for seed in arguments.cbm3d_seeds if name == "CBM3D" else arguments.seeds:
                    runs = results[name].setdefault(str(sigma), {})
                    if str(seed) in runs:
                        continue
                    bar = progress.add_task(f"{name}, sigma {sigma:g}, seed {seed}", total=len(images))
                    runs[str(seed)] = evaluate(
                        experiment, images, task, denoise, sigma, seed, lambda bar=bar: progress.advance(bar)
                    )
                    progress.remove_task(bar)
                    partial = target.with_suffix(".partial")
                    partial.write_text(json.dumps(document, indent=1) + "\n")
                    partial.replace(target)
    target.write_text(json.dumps(document, indent=1) + "\n")
    show(document, experiment)


if __name__ == "__main__":
    main()
