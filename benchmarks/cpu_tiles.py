"""Shapes of the tiles in which the network runs on a CPU: times of other shapes beside those in use, in turn.

    python benchmarks/cpu_tiles.py --json benchmarks/results/cpu-tiles.json [--size 2048 2048] [--dtype bfloat16 int8]

A time is the CPU time of one thread, so that other programs on the machine hardly count; a ratio is the median of the
ratios of each round. The results file holds, for each processor, an entry for each dtype and size; a run adds its own.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from statistics import median
from unittest.mock import patch

import torch
from torch import Tensor

from fastden import Denoiser, fuse
from fastden.bench.images import SIGMA, photograph
from fastden.bench.machine import describe, report
from fastden.network import onednn
from fastden.network.fused import FusedDenoiser

NAMES = ("TILE_ROWS", "TILE_COLUMNS", "FRONT_ROWS")
#: In use, and others around it: rows and columns of the last stages' tiles, rows of the first stages'.
IN_USE = tuple(getattr(onednn, name) for name in NAMES)
SHAPES = (
    IN_USE,
    (32, 192, 64), (64, 192, 64), (128, 192, 64), (512, 192, 64),
    (256, 64, 64), (256, 96, 64), (256, 128, 64), (256, 384, 64), (64, 96, 64), (64, 384, 64),
    (256, 192, 16), (256, 192, 32), (256, 192, 128), (256, 192, 256),
)  # fmt: skip
DTYPES = ("float32", "bfloat16", "int8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", nargs=2, type=int, default=(512, 768), metavar=("HEIGHT", "WIDTH"))
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=DTYPES)
    parser.add_argument(
        "--shapes", nargs="+", default=[as_text(shape) for shape in SHAPES], metavar="ROWSxCOLUMNSxROWS"
    )
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    wanted = [IN_USE, *(tuple(map(int, text.split("x"))) for text in arguments.shapes)]
    torch.set_num_threads(1)
    onednn.keep_freed_memory()
    x = photograph(*arguments.size)
    for dtype in arguments.dtype:
        entry = {"machine": describe(torch.device("cpu")), "caches": caches(), "rounds": arguments.rounds}
        entry["shapes"] = measured(network(dtype), x, list(dict.fromkeys(wanted)), arguments.rounds)
        report(entry, arguments.json, f"{dtype}, {arguments.size[0]} x {arguments.size[1]}")


def as_text(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))


def caches() -> dict[str, str]:
    """Sizes of the first core's caches, where Linux tells."""

    def said(file: Path) -> str:
        return file.read_text(encoding="ascii").strip()

    levels = sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*"))
    return {
        f"L{said(level / 'level')} {said(level / 'type')}": said(level / "size")
        for level in levels
        if (level / "size").exists()
    }


def network(dtype: str) -> FusedDenoiser:
    """The network in an image's dtype, or in 8-bit integers."""
    model = Denoiser.from_pretrained("color").eval()
    return fuse(model, quality="fast") if dtype == "int8" else fuse(model, getattr(torch, dtype))


@torch.no_grad()
def measured(
    fused: FusedDenoiser, x: Tensor, shapes: list[tuple[int, ...]], rounds: int
) -> dict[str, dict[str, float]]:
    """Median milliseconds, and time in units of that of the shape in use, by shape; the first round is not counted."""
    times: dict[tuple[int, ...], list[float]] = {shape: [] for shape in shapes}
    expected = fused(x, SIGMA).double()
    error = 0.0
    for turn in range(rounds + 1):
        for shape in shapes if turn % 2 else reversed(shapes):
            with patch.multiple(onednn, **dict(zip(NAMES, shape, strict=True))):
                start = time.process_time()
                result = fused(x, SIGMA)
                times[shape].append(1e3 * (time.process_time() - start))
            if not turn:
                times[shape].clear()
                error = max(error, float((result.double() - expected).abs().max()))
    assert error < 0.05, f"a tile's shape changes the result by {error}"
    return {
        as_text(shape): {
            "median_ms": round(median(values), 1),
            "ratio": round(median(a / b for a, b in zip(values, times[IN_USE], strict=True)), 3),
        }
        for shape, values in times.items()
    }


if __name__ == "__main__":
    main()
