"""The tables of the joint experiments: how often a frozen network is right behind each denoiser.

Every denoiser gets the same noisy validation images, its result is clipped and rounded to 8 bits, and the frozen
network looks at it. Noise is Gaussian, not clipped, of known sigma; each seed is another draw. Figures are the mean
over the seeds, and the standard deviation over them (of the sample).

    python benchmarks/joint/evaluate.py classify --data ../shared/data/joint/imagenet_val \\
        --models separate=color joint=color-classify cross-task=color-segment
    python benchmarks/joint/evaluate.py segment --data ../shared/data/joint/camvid/val \\
        --models separate=color joint=color-segment cross-task=color-classify

writes ``benchmarks/results/joint/EXPERIMENT.json`` and the table, ``EXPERIMENT.md``. CBM3D takes seconds an image: it
can be given fewer images (``--cbm3d-images``; a second table then shows every denoiser on those) and seeds
(``--cbm3d-seeds``), or left out (``--no-cbm3d``). Results that the file holds already, of the same weights and images,
are kept: an interrupted run goes on.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import time
from itertools import product
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import numpy as np
import torch
from experiment import Denoise, Predictor, add_noise, automatic_dtype, cbm3d, load, network, none
from rich.progress import Progress
from torch import nn

import fastden
from fastden.batch.settings import digest_of
from fastden.bench.tables import write
from fastden.evaluation import psnr, ssim
from fastden.training.tasks import Task

RESULTS = Path(__file__).parents[1] / "results" / "joint"
SCORES = {"classify": ("top1", "top5"), "segment": ("miou", "pixel_accuracy")}


class Scores:
    """How often the frozen network is right on the images seen so far, and how near these are to the clean ones."""

    def __init__(self, experiment: str, task: Task) -> None:
        self.experiment, self.task = experiment, task
        self.hits: list[tuple[bool, bool]] = []
        self.counts = np.zeros((task.classes, task.classes), np.int64)
        self.quality: list[tuple[float, float]] = []

    def add(self, prediction: torch.Tensor, label: Any, quality: tuple[float, float] | None) -> None:
        if self.experiment == "classify":
            best = prediction.topk(5).indices.tolist()
            self.hits.append((best[0] == int(label), int(label) in best))
        else:
            seen = label != self.task.ignore_index
            pairs = label[seen] * self.task.classes + prediction.numpy()[seen]
            self.counts += np.bincount(pairs, minlength=self.counts.size).reshape(self.counts.shape)
        if quality is not None:
            self.quality.append(quality)

    def result(self) -> dict[str, float]:
        """Percentages; PSNR in dB and SSIM beside them."""
        if self.experiment == "classify":
            first, second = (100 * fmean(hit[i] for hit in self.hits) for i in (0, 1))
        else:
            right, rows, columns = self.counts.diagonal(), self.counts.sum(1), self.counts.sum(0)
            union = rows + columns - right
            first = 100 * float(np.mean(right[union > 0] / union[union > 0]))
            second = 100 * float(right.sum() / rows.sum())
        scores = dict(zip(SCORES[self.experiment], (round(first, 3), round(second, 3)), strict=True))
        if self.quality:
            scores |= {
                name: round(fmean(pair[i] for pair in self.quality), 4) for i, name in enumerate(("psnr", "ssim"))
            }
        return scores


def evaluate(
    experiment: str,
    images: list[tuple[Any, Any]],
    task: Task,
    denoise: Denoise,
    sigma: float,
    seed: int,
    few: range,
    only_few: bool,
    progress: Any,
) -> dict[str, Any]:
    """Scores of one denoiser at one level and seed for all images; ``few``: for the images with these indices."""
    predict = Predictor(task)
    every, some = Scores(experiment, task), Scores(experiment, task)
    start = time.perf_counter()
    for index in few if only_few else range(len(images)):
        clean, label = images[index]
        noisy = add_noise(clean, sigma, seed, index)
        pixels = denoise(noisy, sigma / 255)
        prediction = predict(pixels)
        quality = (psnr(clean, pixels), ssim(clean, pixels)) if sigma > 0 else None
        for scores in (every, some) if index in few else (every,):
            scores.add(prediction, label, quality)
        progress()
    seconds = round(time.perf_counter() - start, 1)
    return {**({} if only_few else every.result()), "few": some.result() if few else {}, "seconds": seconds}


def pictures_digest(images: list[tuple[Any, Any]]) -> str:
    """A hash of images and labels: results on other pictures are not mixed in."""
    sha = hashlib.sha256()
    for pair in images:
        for values in map(np.ascontiguousarray, pair):
            sha.update(f"{values.dtype} {values.shape}".encode())
            sha.update(values.tobytes())
    return sha.hexdigest()[:16]


def digest(model: str) -> str:
    """A hash of a model's weights: results of other weights are not mixed in."""
    folder = fastden.models().get(model, Path(model))
    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()[:16]


def summarise(runs: list[dict[str, float]]) -> dict[str, dict[str, float]]:
    """Mean and standard deviation over the seeds of every score."""
    summary: dict[str, dict[str, float]] = {}
    for name in runs[0]:
        values = [run[name] for run in runs]
        summary[name] = {"mean": round(fmean(values), 4), "std": round(stdev(values), 4) if len(values) > 1 else 0.0}
    return summary


def table(document: dict[str, Any], experiment: str, few: bool) -> str:
    """Markdown: a row for each denoiser, a column for each level.

    Args:
        document: the results.
        experiment: which of the two.
        few: scores of the images that CBM3D had; else of all, without CBM3D unless it had all.
    """
    first, second = SCORES[experiment]
    sigmas = document["sigmas"]
    heads = [f"sigma {sigma:g}" for sigma in sigmas]
    lines = ["| | " + " | ".join(heads) + " |", "|---" * (1 + len(sigmas)) + "|"]
    for name, by_sigma in document["results"].items():
        cells = []
        for sigma in sigmas:
            runs = list(by_sigma.get(str(sigma), {}).values())
            chosen = [run["few"] for run in runs] if few else [run for run in runs if first in run]
            if not chosen:
                break
            summary = summarise([{k: v for k, v in run.items() if isinstance(v, float)} for run in chosen])
            spread = f" ± {summary[first]['std']:.1f}" if len(chosen) > 1 else ""
            quality = f"{summary['psnr']['mean']:.2f} / {summary['ssim']['mean']:.3f}"
            cells.append(f"**{summary[first]['mean']:.1f}**{spread} / {summary[second]['mean']:.1f}<br>{quality}")
        else:
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def show(document: dict[str, Any], experiment: str) -> str:
    """Both tables, each with a sentence on its content."""
    first, second = SCORES[experiment]
    clean, count = document["clean"], document["images"]
    text = (
        f"{first} / {second} in percent, and PSNR in dB / SSIM, of {count} images; mean over {len(document['seeds'])}"
        f" seeds, ± standard deviation. Clean images: {clean[first]:.1f} / {clean[second]:.1f}.\n\n"
    )
    text += table(document, experiment, few=False)
    if 0 < document["few"] < count:
        few = clean["few"]
        text += (
            f"\n\nThe same of the {document['few']} images that CBM3D had (one seed: CBM3D's). Clean:"
            f" {few[first]:.1f} / {few[second]:.1f}.\n\n"
        )
        seeds = {str(seed) for seed in document["cbm3d_seeds"]}
        one = {
            name: {
                sigma: {seed: run for seed, run in runs.items() if seed in seeds} for sigma, runs in by_sigma.items()
            }
            for name, by_sigma in document["results"].items()
        }
        text += table({**document, "results": one}, experiment, few=True)
    return text + "\n"


def main() -> None:
    arguments = parse_arguments()
    experiment = arguments.experiment
    target = arguments.json or RESULTS / f"{experiment}.json"
    images, task = load(experiment, arguments.data, arguments.limit)
    methods: dict[str, tuple[Denoise, str]] = {"noisy": (none, "")}
    if not arguments.no_cbm3d:
        methods["CBM3D"] = (cbm3d, "bm3d")
    for name, model in (item.split("=", 1) for item in arguments.models):
        methods[name] = network(model, arguments.dtype), digest(model)
    count = len(images) if arguments.cbm3d_images is None else min(arguments.cbm3d_images, len(images))
    few = range(0, 0) if arguments.no_cbm3d else range(0, len(images), max(len(images) // count, 1))[:count]
    weights = {name: key for name, (_, key) in methods.items()}
    document = begin(target, arguments, weights, images, len(few), task.network)
    target.parent.mkdir(parents=True, exist_ok=True)
    with Progress() as progress:
        if "clean" not in document:
            bar = progress.add_task("clean", total=len(images))
            document["clean"] = evaluate(
                experiment, images, task, none, 0.0, 0, few, False, lambda: progress.advance(bar)
            )
        for name, (denoise, _) in sorted(methods.items(), key=lambda item: item[0] == "CBM3D"):  # the slow one last
            slow = name == "CBM3D"
            for sigma, seed in product(arguments.sigma, arguments.cbm3d_seeds if slow else arguments.seeds):
                runs = document["results"][name].setdefault(str(sigma), {})
                if str(seed) in runs:
                    continue
                total = len(few) if slow else len(images)
                bar = progress.add_task(f"{name}, sigma {sigma:g}, seed {seed}", total=total)
                runs[str(seed)] = evaluate(
                    experiment, images, task, denoise, sigma, seed, few, slow and len(few) < len(images),
                    lambda bar=bar: progress.advance(bar),
                )  # fmt: skip
                progress.remove_task(bar)
                write(target, document)
    write(target, document)
    text = show(document, experiment)
    target.with_suffix(".md").write_text(text, encoding="utf-8")
    print(text)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Tables of the joint experiments.")
    parser.add_argument("experiment", choices=SCORES)
    parser.add_argument("--data", type=Path, required=True, help="folder of labelled validation images")
    parser.add_argument("--models", nargs="+", default=["separate=color"], metavar="NAME=MODEL")
    parser.add_argument("--sigma", nargs="+", type=float, default=[15.0, 30.0, 45.0, 60.0])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--cbm3d-seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--cbm3d-images", type=int, help="so many images for CBM3D, evenly spaced; default: all")
    parser.add_argument("--no-cbm3d", action="store_true")
    parser.add_argument(
        "--dtype", choices=["auto", "float32"], default="auto", help="auto: bfloat16 where it is native"
    )
    parser.add_argument("--limit", type=int, help="only so many images, evenly spaced")
    parser.add_argument("--json", type=Path, help="where to write; default: benchmarks/results/joint/EXPERIMENT.json")
    return parser.parse_args()


def begin(
    target: Path,
    arguments: argparse.Namespace,
    weights: dict[str, str],
    images: list[tuple[Any, Any]],
    few: int,
    frozen: nn.Module,
) -> dict[str, Any]:
    """The document to fill. It keeps those results of ``target`` that have the same images, networks and dtype.

    Args:
        target: the file of an earlier run, or none.
        arguments: of the command.
        weights: each method's :func:`digest`, by name.
        images: all methods get them, with their labels.
        few: how many of them CBM3D gets.
        frozen: the network that looks at the results.
    """
    document = json.loads(target.read_text(encoding="utf-8")) if target.exists() else {}
    dtype = str(automatic_dtype(arguments.dtype)).removeprefix("torch.")
    settings = {
        "images": len(images),
        "pictures": pictures_digest(images),
        "network": digest_of(frozen.state_dict())[:16],  # results of another network are not mixed in
        "few": few,
        "dtype": dtype,
    }
    changed = [name for name, value in settings.items() if document.get(name) != value]
    if document and changed:
        print(f"{target}: other {' and '.join(changed)}; its results are dropped", file=sys.stderr)
        document = {}
    results, known = document.get("results", {}), document.get("weights", {})
    return document | {
        "command": f"python benchmarks/joint/evaluate.py {arguments.experiment}",
        "models": dict(item.split("=", 1) for item in arguments.models),
        "weights": weights,
        **settings,
        "sigmas": arguments.sigma,
        "seeds": arguments.seeds,
        "cbm3d_seeds": arguments.cbm3d_seeds,
        "torch": torch.__version__,
        "results": {name: results.get(name, {}) if known.get(name) == key else {} for name, key in weights.items()},
    }


if __name__ == "__main__":
    main()
