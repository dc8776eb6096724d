"""Denoise a tiled TIFF of a gigapixel in little memory, and record time, speed and peak memory.

    python benchmarks/batch/gigapixel.py                 # 32768 x 32768; benchmarks/results/batch/gigapixel.json
    python benchmarks/batch/gigapixel.py --side 4096     # smaller; prints, and writes nothing

The image is scikit-image's cat, repeated, with white noise of level 15 on the scale 0-255, made by libvips strip by
strip. ``fastden denoise`` runs as a process of its own, whose peak resident memory the system reports: with Python,
PyTorch and libvips. Then crops of the result are compared with the same crops denoised from memory: the crops start at
multiples of 4, as tiles do, and carry the margin that a pixel depends on, so their inner pixels are the untiled result.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

import fastden
from fastden.bench.tables import write
from fastden.images.libvips import load_vips
from fastden.inference.arguments import parse_memory
from fastden.info import collect

RESULTS = Path(__file__).parents[1] / "results" / "batch"
SIGMA = 15
#: Pixels around a crop that its inner pixels depend on, rounded up.
MARGIN = 24
CROP = 256

CHILD = """
import json, resource, sys, time
start = time.perf_counter()
from fastden.cli.main import app
try:
    app(sys.argv[2:], prog_name="fastden")
except SystemExit as error:
    code = error.code
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
status = open("/proc/self/status", encoding="utf-8").read()
high = next((int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM")), peak)
with open(sys.argv[1], "w", encoding="utf-8") as report:
    json.dump({"code": code, "seconds": time.perf_counter() - start, "peak": 1024 * high}, report)
"""


def make_image(path: Path, side: int) -> None:
    """A noisy RGB image of 8 bits as a tiled BigTIFF."""
    import skimage.data

    vips = load_vips()
    cat = skimage.data.chelsea()
    tile = vips.Image.new_from_memory(cat.tobytes(), cat.shape[1], cat.shape[0], 3, "uchar")
    across, down = (-(-side // size) for size in (cat.shape[1], cat.shape[0]))
    clean = tile.replicate(across, down).crop(0, 0, side, side)
    bands = [vips.Image.gaussnoise(side, side, sigma=SIGMA, mean=0, seed=seed) for seed in (1, 2, 3)]
    noisy = (clean + bands[0].bandjoin(bands[1:])).rint().cast("uchar").copy(interpretation="srgb")
    noisy.tiffsave(str(path), tile=True, tile_width=512, tile_height=512, compression="deflate", level=1, bigtiff=True)


def crop(path: Path, left: int, top: int, width: int, height: int) -> np.ndarray[Any, Any]:
    image = load_vips().Image.new_from_file(str(path), access="random").crop(left, top, width, height)
    return image.numpy()


def compare(source: Path, result: Path, side: int, dtype: str) -> dict[str, Any]:
    """Largest and mean difference between crops of the result and of the untiled image, in 8-bit steps."""
    generator = np.random.default_rng(0)
    largest, total, count = 0, 0, 0
    for _ in range(16):
        left, top = (4 * int(generator.integers(0, (side - CROP) // 4)) for _ in range(2))
        first = [max(start - MARGIN, 0) for start in (left, top)]
        last = [min(start + CROP + MARGIN, side) for start in (left, top)]
        noisy = crop(source, first[0], first[1], last[0] - first[0], last[1] - first[1])
        whole = fastden.denoise(noisy, SIGMA, tile=None, dtype=dtype)
        inner = whole[top - first[1] :, left - first[0] :][:CROP, :CROP].astype(int)
        difference = np.abs(inner - crop(result, left, top, CROP, CROP).astype(int))
        largest, total, count = max(largest, int(difference.max())), total + int(difference.sum()), count + inner.size
    return {"crops": 16, "crop_side": CROP, "largest_difference": largest, "mean_difference": total / count}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", type=int, default=32768, help="pixels")
    parser.add_argument("--max-memory", default="1GiB", help="of fastden denoise; PyTorch and Python come on top")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--folder", type=Path, default=None, help="for the files, about 6 bytes a pixel")
    parser.add_argument("--json", type=Path, default=None, help="where to write; default by --side")
    arguments = parser.parse_args()
    side = arguments.side
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        folder = Path(name)
        source, result, report = folder / "noisy.tif", folder / "clean.tif", folder / "report.json"
        start = time.perf_counter()
        make_image(source, side)
        print(f"{side} x {side} pixels made in {time.perf_counter() - start:.0f} s", flush=True)
        command = ["denoise", str(source), "-o", str(result), "--sigma", str(SIGMA), "--dtype", arguments.dtype]
        command += ["--max-memory", arguments.max_memory, "--max-megapixels", str(side * side / 1e6 + 1)]
        command += ["--manifest", str(folder / "manifest.jsonl")]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        subprocess.run([sys.executable, "-c", CHILD, str(report), *command], env=environment, check=True)
        outcome = json.loads(report.read_text(encoding="utf-8"))
        if outcome["code"]:
            raise SystemExit(f"fastden denoise ended with code {outcome['code']}")
        record = json.loads((folder / "manifest.jsonl").read_text(encoding="utf-8").splitlines()[-1])
        memory = parse_memory(arguments.max_memory)
        assert memory is not None
        figures = {
            "width": side,
            "height": side,
            "max_memory_bytes": memory,
            "streamed": record["streamed"],
            "seconds": round(outcome["seconds"], 1),
            "compute_seconds": round(record["seconds"]["compute"], 1),
            "megapixels_per_second": round(side * side / 1e6 / outcome["seconds"], 3),
            "peak_rss_bytes": outcome["peak"],
            "peak_rss_gib": round(outcome["peak"] / 2**30, 3),
            "input_bytes": source.stat().st_size,
            "output_bytes": result.stat().st_size,
            "equality": compare(source, result, side, arguments.dtype),
            "dtype": arguments.dtype,
            "machine": collect(paths=False),
        }
    print(json.dumps(figures, indent=1))
    target = arguments.json or (RESULTS / "gigapixel.json" if side == 32768 else None)
    if target is not None:
        target.parent.mkdir(parents=True, exist_ok=True)
        write(target, figures)


if __name__ == "__main__":
    main()
