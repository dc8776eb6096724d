"""Denoise a folder of 24-megapixel JPEGs, and record the share of time in which the network computes.

    python benchmarks/batch/throughput.py                 # benchmarks/results/batch/throughput.json
    python benchmarks/batch/throughput.py --images 2 --size 1500 1000    # smaller; prints, and writes nothing

The compute share is the time in which the network was at work, divided by the time from the first file to the last;
on a CUDA device its own clock counts. Run it on an otherwise idle machine.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

import fastden
from fastden.bench.tables import write
from fastden.images.codec import ImageFile, write_image
from fastden.info import collect
from fastden.network.onednn import keep_freed_memory

RESULTS = Path(__file__).parents[1] / "results" / "batch"
SIGMA = 15


def make_images(folder: Path, count: int, width: int, height: int) -> None:
    """scikit-image's cat, repeated by reflection, with white noise of level 15."""
    import skimage.data

    cat = skimage.data.chelsea()
    padding = [(0, max(size - length, 0)) for size, length in zip((height, width, 3), cat.shape, strict=True)]
    clean = np.pad(cat, padding, mode="symmetric")[:height, :width].astype(np.float32)
    for index in range(count):
        noise = np.random.default_rng(index).standard_normal(clean.shape, np.float32)
        noisy = np.clip(np.rint(clean + SIGMA * noise), 0, 255).astype(np.uint8)
        write_image(folder / f"{index:03d}.jpg", ImageFile(noisy))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=6)
    parser.add_argument("--size", type=int, nargs=2, default=[6000, 4000], metavar=("WIDTH", "HEIGHT"))
    parser.add_argument("--device", default=None)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--json", type=Path, default=None, help="where to write; default by --size")
    arguments = parser.parse_args()
    width, height = arguments.size
    keep_freed_memory()
    with tempfile.TemporaryDirectory() as name:
        source = Path(name) / "in"
        source.mkdir()
        make_images(source, arguments.images, width, height)
        batch = fastden.BatchDenoiser(sigma=SIGMA, device=arguments.device, dtype=arguments.dtype)
        # The first image of a process packs weights and loads libraries.
        batch.run(source / "000.jpg", Path(name) / "first.jpg")
        report = batch.run(source, Path(name) / "out")
    if report.failed:
        raise SystemExit("\n".join(str(record.error) for record in report.failed))
    stages = ("read", "compute", "write")
    figures: dict[str, Any] = {
        "images": arguments.images,
        "width": width,
        "height": height,
        "seconds": round(report.seconds, 2),
        "megapixels_per_second": round(report.megapixels / report.seconds, 3),
        "images_an_hour": round(3600 * arguments.images / report.seconds, 1),
        "compute_share": round(report.compute_share, 4),
        "seconds_by_stage": {stage: round(sum(item.seconds[stage] for item in report.done), 2) for stage in stages},
        "dtype": arguments.dtype,
        "device": str(batch.network(eight_bit=True).device),
        "machine": collect(paths=False),
    }
    print(json.dumps(figures, indent=1))
    target = arguments.json or (RESULTS / "throughput.json" if [width, height] == [6000, 4000] else None)
    if target is not None:
        target.parent.mkdir(parents=True, exist_ok=True)
        write(target, figures)


if __name__ == "__main__":
    main()
