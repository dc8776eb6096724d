"""PSNR that ``fastden export --precision int8`` costs, in ONNX Runtime on photographs with white Gaussian noise.

python benchmarks/export_int8.py ../shared/data/eval/kodak24 --json benchmarks/results/export-int8.json
"""

from __future__ import annotations

import argparse
import json
import tempfile
from importlib.metadata import version
from pathlib import Path

import numpy as np
import onnxruntime as ort

import fastden
from fastden.bench.scripts import command
from fastden.bench.tables import write
from fastden.evaluation import find_pictures, psnr
from fastden.images.codec import read_image

PRECISIONS = ("fp32", "int8")


@command
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--model", default="color")
    parser.add_argument("--sigma", type=float, default=25.0)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    files = find_pictures(arguments.folder)
    level = np.full((1, 1, 1, 1), arguments.sigma / 255, np.float32)
    figures: dict[str, list[float]] = {precision: [] for precision in PRECISIONS}
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    with tempfile.TemporaryDirectory() as folder:
        networks = {
            precision: ort.InferenceSession(
                str(fastden.export(arguments.model, Path(folder, f"{precision}.onnx"), precision=precision)), options
            )
            for precision in PRECISIONS
        }
    for index, file in enumerate(files):
        clean = read_image(file).pixels
        noise = np.random.default_rng(index).normal(0, arguments.sigma / 255, clean.shape)
        noisy = (clean / 255 + noise).astype(np.float32).transpose(2, 0, 1)[None]
        for precision, network in networks.items():
            result = network.run(None, {"input": noisy, "sigma": level})[0][0].transpose(1, 2, 0)
            figures[precision].append(psnr(clean, np.rint(255 * result.clip(0, 1))))
    document = {
        "model": arguments.model,
        "set": arguments.folder.resolve().name,
        "sigma": arguments.sigma,
        "images": len(files),
        "psnr": {precision: round(float(np.mean(values)), 3) for precision, values in figures.items()},
        "versions": {name: version(name) for name in ("fastden", "onnxruntime")},
    }
    print(json.dumps(document, indent=1))
    if arguments.json is not None:
        write(arguments.json, document)


if __name__ == "__main__":
    main()
