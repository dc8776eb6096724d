"""The figure of the joint experiments: each denoiser's pictures, and the frozen network's predictions.

    python benchmarks/joint/figure.py classify --data ../shared/data/joint/imagenet_val \\
        --names ../shared/data/joint/imagenet_{train,val}/labels.csv --models separate=color joint=color-classify
    python benchmarks/joint/figure.py segment --data ../shared/data/joint/camvid/val \\
        --models separate=color joint=color-segment

Columns: noisy, CBM3D, each model, ground truth. Rows: for the classifier, images where the last model's result is
classified rightly and all others wrongly, those first where it is surest; for segmentation the square of each image
where the last model's result has most right pixels over the one before it, of pictures that lie apart. A choice of
successes, then: how often the opposite happens is printed. Writes ``benchmarks/results/joint/EXPERIMENT.webp``.
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path
from typing import Any

import numpy as np
import torch
from evaluate import RESULTS, SCORES
from experiment import Denoise, Pixels, Predictor, add_noise, cbm3d, load, network, none
from PIL import Image, ImageDraw, ImageFont
from rich.progress import track
from segmenter import VOID

#: Colours of CamVid's classes, and of void.
COLOURS = np.array(
    [
        *([128, 180, 230], [150, 90, 60], [220, 220, 120], [120, 70, 140], [230, 130, 200], [60, 140, 60]),
        *([230, 60, 60], [190, 160, 120], [40, 60, 200], [240, 160, 20], [20, 200, 200], [0, 0, 0]),
    ],
    np.uint8,
)
GOOD, BAD, INK = (20, 130, 40), (190, 30, 30), (0, 0, 0)
SIDE, LINE = 224, 22


def classified(
    images: list[tuple[Pixels, Any]], predict: Predictor, methods: dict[str, Denoise], sigma: float, rows: int
) -> list[tuple[int, list[tuple[int, float]]]]:
    """Images to show: index, and each method's class with its probability."""
    *others, last = (name for name in methods if name != "CBM3D")
    turned: list[tuple[float, int, dict[str, Any]]] = []
    lost = 0
    for index, (clean, label) in enumerate(track(images, "choosing")):
        noisy = add_noise(clean, sigma, 0, index)
        best_of = {name: predict(methods[name](noisy, sigma / 255)).softmax(0).max(0) for name in (*others, last)}
        right = {name: int(best.indices) == int(label) for name, best in best_of.items()}
        if right[last] and not any(right[name] for name in others):
            turned.append((float(best_of[last].values), index, best_of))
        lost += right[others[-1]] and not right[last]
    print(f"right behind {last} alone: {len(turned)}; right behind {others[-1]} but wrong behind {last}: {lost}")
    chosen = []
    for _, index, best_of in sorted(turned, key=lambda item: -item[0]):
        best = {name: (int(value.indices), float(value.values)) for name, value in best_of.items()}
        if "CBM3D" in methods:
            clean, label = images[index]
            value = predict(methods["CBM3D"](add_noise(clean, sigma, 0, index), sigma / 255)).softmax(0).max(0)
            if int(value.indices) == int(label):
                continue
            best["CBM3D"] = (int(value.indices), float(value.values))
        chosen.append((index, [best[name] for name in methods]))
        if len(chosen) == rows:
            break
    return chosen


def figure_classify(
    images: list[tuple[Pixels, Any]],
    names: list[str],
    predict: Predictor,
    methods: dict[str, Denoise],
    sigma: float,
    rows: int,
) -> Image.Image:
    chosen = classified(images, predict, methods, sigma, rows)
    sheet, draw = canvas([*methods, "ground truth"], len(chosen), SIDE + LINE)
    for row, (index, predictions) in enumerate(chosen):
        clean, label = images[index]
        noisy = add_noise(clean, sigma, 0, index)
        top = LINE + row * (SIDE + LINE)
        for column, (denoise, (best, sure)) in enumerate(zip(methods.values(), predictions, strict=True)):
            sheet.paste(Image.fromarray(denoise(noisy, sigma / 255)), (column * SIDE, top))
            caption = f"{names[best][:24]} {100 * sure:.0f} %"
            draw.text((column * SIDE + 3, top + SIDE + 2), caption, GOOD if best == int(label) else BAD, font())
        sheet.paste(Image.fromarray(clean), (len(methods) * SIDE, top))
        draw.text((len(methods) * SIDE + 3, top + SIDE + 2), names[int(label)][:30], INK, font())
    return sheet


def figure_segment(
    images: list[tuple[Pixels, Any]], predict: Predictor, methods: dict[str, Denoise], sigma: float, rows: int
) -> Image.Image:
    before, last = list(methods)[-2:]
    gains = []
    for index, (clean, label) in enumerate(track(images, "choosing")):
        noisy = add_noise(clean, sigma, 0, index)
        right = [(predict(methods[name](noisy, sigma / 255)).numpy() == label) for name in (before, last)]
        gain = np.where(label == VOID, 0, right[1].astype(np.int32) - right[0])
        total = np.pad(gain.cumsum(0).cumsum(1), ((1, 0), (1, 0)))
        boxes = total[SIDE:, SIDE:] - total[:-SIDE, SIDE:] - total[SIDE:, :-SIDE] + total[:-SIDE, :-SIDE]
        top, left = np.unravel_index(boxes.argmax(), boxes.shape)
        gains.append((int(boxes.max()), index, int(top), int(left), int(gain.sum())))
    # Pictures follow one another in a film: the figure shows pictures that lie apart.
    apart = len(images) // (2 * rows)
    chosen: list[tuple[int, int, int, int, int]] = []
    for gain in sorted(gains, reverse=True):
        if len(chosen) < rows and all(abs(gain[1] - other[1]) > apart for other in chosen):
            chosen.append(gain)
    better = sum(gain[4] > 0 for gain in gains)
    print(f"{last} has more right pixels than {before} in {better} of {len(gains)} images")
    sheet, draw = canvas([*methods, "ground truth"], 2 * len(chosen), SIDE)
    for row, (_, index, top, left, _) in enumerate(chosen):
        clean, label = images[index]
        noisy = add_noise(clean, sigma, 0, index)
        window = (slice(top, top + SIDE), slice(left, left + SIDE))
        y = LINE + row * 2 * SIDE
        for column, denoise in enumerate(methods.values()):
            pixels = denoise(noisy, sigma / 255)
            classes = predict(pixels).numpy()
            share = (classes[window] == label[window])[label[window] != VOID].mean()
            sheet.paste(Image.fromarray(pixels[window]), (column * SIDE, y))
            sheet.paste(Image.fromarray(COLOURS[classes[window]]), (column * SIDE, y + SIDE))
            draw.text((column * SIDE + 3, y + SIDE + 2), f"{100 * share:.0f} % right", (255, 255, 255), font())
        sheet.paste(Image.fromarray(clean[window]), (len(methods) * SIDE, y))
        sheet.paste(Image.fromarray(COLOURS[label[window]]), (len(methods) * SIDE, y + SIDE))
    return sheet


def canvas(columns: list[str], rows: int, height: int) -> tuple[Image.Image, ImageDraw.ImageDraw]:
    sheet = Image.new("RGB", (len(columns) * SIDE, LINE + rows * height), "white")
    draw = ImageDraw.Draw(sheet)
    for column, name in enumerate(columns):
        draw.text((column * SIDE + 3, 3), name, INK, font())
    return sheet, draw


def font() -> Any:
    return ImageFont.load_default(14)


def main() -> None:
    parser = argparse.ArgumentParser(description="Figure of the joint experiments.")
    parser.add_argument("experiment", choices=SCORES)
    parser.add_argument("--data", type=Path, required=True, help="folder of labelled validation images")
    parser.add_argument("--models", nargs="+", required=True, metavar="NAME=MODEL", help="the jointly trained one last")
    parser.add_argument("--names", type=Path, nargs="+", help="tables with index and name; default: data's labels.csv")
    parser.add_argument("--sigma", type=float, default=60.0)
    parser.add_argument("--rows", type=int, default=5)
    parser.add_argument("--no-cbm3d", action="store_true")
    parser.add_argument("--limit", type=int, help="choose among so many images, evenly spaced")
    parser.add_argument("--output", type=Path, help="default: benchmarks/results/joint/EXPERIMENT.webp")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    images, task = load(arguments.experiment, arguments.data, arguments.limit)
    methods: dict[str, Denoise] = {"noisy": none}
    if not arguments.no_cbm3d:
        methods["CBM3D"] = cbm3d
    for item in arguments.models:
        name, model = item.split("=", 1)
        methods[name] = network(model)
    predict = Predictor(task)
    if arguments.experiment == "classify":
        known = {}
        for table in arguments.names or [arguments.data / "labels.csv"]:
            with table.open(newline="", encoding="utf-8") as file:
                known |= {int(row["index"]): row["name"] for row in csv.DictReader(file)}
        names = [known.get(i, f"class {i}") for i in range(task.classes)]
        sheet = figure_classify(images, names, predict, methods, arguments.sigma, arguments.rows)
    else:
        sheet = figure_segment(images, predict, methods, arguments.sigma, arguments.rows)
    target = arguments.output or RESULTS / f"{arguments.experiment}.webp"
    target.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(target, quality=90, method=6)
    print(target)


if __name__ == "__main__":
    main()
