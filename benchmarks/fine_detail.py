"""How much of the finest detail pictures have: whole pictures of cameras beside pictures that were reduced.

    python benchmarks/fine_detail.py --data FOLDER... --json benchmarks/results/fine-detail.json

Each folder's pictures (of pairs the references ``name_mean.*`` alone) are cut into squares of 126 pixels. In each the
variance of luma is taken in bands of frequency, differences of Gaussian blurs whose deviations double from 0.7 pixels;
the median over the squares counts. It explains ``soft`` of ``fastden.training.photo_noise``.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch

from fastden.bench.machine import describe
from fastden.bench.scripts import command
from fastden.bench.tables import write
from fastden.errors import UserError
from fastden.evaluation import find_pictures
from fastden.images.codec import read_image
from fastden.inference.tiling import LUMA
from fastden.training.camera import FINEST_BAND, blur

#: Side of the squares, pixels; number of bands.
SIDE, BANDS = 126, 4


@command
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, nargs="+", required=True, help="folders of 8-bit pictures")
    parser.add_argument("--every", type=int, default=1, help="only every n-th picture")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    pictures = {folder: _clean(folder)[:: arguments.every] for folder in arguments.data}
    document: dict[str, object] = {"every": arguments.every, "machine": describe(torch.device("cpu")), "folders": {}}
    folders: dict[str, object] = {}
    for folder, files in pictures.items():
        energies = np.concatenate([_energies(read_image(file).pixels) for file in files])
        median = np.median(energies, 0).astype(float).round(2).tolist()
        folders[folder.name] = {"pictures": len(files), "squares": len(energies), "median": median}
        print(f"{folder.name}: {len(files)} pictures, variance by band, the finest first: {median}", flush=True)
    document["folders"] = folders
    if arguments.json:
        write(arguments.json, document)


def _clean(folder: Path) -> list[Path]:
    files = [file for file in find_pictures(folder) if not file.stem.endswith("_real")]
    if not files:
        raise UserError(f"data: {folder} has only noisy pictures, name_real.*; accepted: folders with others")
    return files


def _energies(pixels: np.ndarray) -> np.ndarray:  # type: ignore[type-arg]
    """Variance in each band (squares, BANDS), on the scale 0-255."""
    values = pixels.astype(np.float32)
    luma = values @ np.array(LUMA, np.float32) if values.shape[2] == 3 else values[:, :, 0]
    rows, columns = (size // SIDE * SIDE for size in luma.shape)
    squares = torch.from_numpy(np.ascontiguousarray(luma[:rows, :columns]))
    x = squares.unfold(0, SIDE, SIDE).unfold(1, SIDE, SIDE).reshape(-1, 1, SIDE, SIDE)
    bands = []
    for band in range(BANDS):
        smooth = blur(x, FINEST_BAND * 2**band)
        bands.append((x - smooth).square().mean((1, 2, 3)))
        x = smooth
    result: np.ndarray = torch.stack(bands, 1).numpy()  # type: ignore[type-arg]
    return result


if __name__ == "__main__":
    main()
