"""Whether Winograd's F(2x2, 3x3) makes conv3 faster on a CPU than oneDNN's direct convolution: one trial in float32.

    python benchmarks/winograd.py --json benchmarks/results/winograd.json

Sixteen products of the transformed input and weights replace the nine taps: 2.25 times fewer multiplications, as
batched matrix products over groups of rows that stay in cache. PyTorch does the transforms. The results file holds an
entry for each processor.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fastden.bench.machine import describe, report
from fastden.bench.timing import Stopwatch, interleaved, summary
from fastden.network.onednn import Convolution

#: Input channels, output channels, height and width of the result: the network's conv3 at 512 x 768 pixels, a whole
#: strip and one tile of it, and a plain case with more channels.
CASES = ((160, 256, 128, 192), (160, 256, 64, 192), (256, 256, 64, 128))
#: Rows of 2 x 2 outputs in one group of matrix products: what they read and write stays in a cache of 1 MiB or 2.
GROUPS = (1, 2, 4)
#: F(2, 3) with the points 0, 1, -1 and infinity: (4, 4), (4, 3) and (2, 4).
INPUT = ((1.0, 0, -1, 0), (0, 1, 1, 0), (0, -1, 1, 0), (0, 1, 0, -1))
WEIGHT = ((1.0, 0, 0), (0.5, 0.5, 0.5), (0.5, -0.5, 0.5), (0, 0, 1))
OUTPUT = ((1.0, 1, 1, 0), (0, 1, -1, -1))


class Winograd:
    """F(2x2, 3x3) of a padded input.

    Args:
        weight: (O, C, 3, 3).
        rows: rows of 2 x 2 outputs that are computed together.
    """

    def __init__(self, weight: Tensor, rows: int) -> None:
        g = torch.tensor(WEIGHT, dtype=torch.float64)
        transformed = torch.einsum("xi,ocij,yj->xyco", g, weight.double(), g)
        self.weight = transformed.to(weight.dtype).flatten(0, 1).contiguous()  # (16, C, O)
        self.rows = rows

    def __call__(self, x: Tensor) -> Tensor:
        """(1, C, H + 2, W + 2) channels-last, H and W even -> (1, O, H, W) channels-last, without bias."""
        pixels = x.permute(0, 2, 3, 1)[0]  # (H + 2, W + 2, C)
        height, width, c = pixels.shape
        h, w, o = (height - 2) // 2, (width - 2) // 2, self.weight.shape[2]
        out = torch.empty(h, 2, w, 2, o, dtype=x.dtype)
        for top in range(0, h, self.rows):
            rows = min(self.rows, h - top)
            part = pixels[2 * top : 2 * (top + rows) + 2]
            products = torch.bmm(self._input(part, rows, w, c), self.weight).view(4, 4, rows, w, o)
            self._output(products, out[top : top + rows])
        return out.view(1, 2 * h, 2 * w, o).permute(0, 3, 1, 2)

    @staticmethod
    def _input(pixels: Tensor, rows: int, w: int, c: int) -> Tensor:
        """The transformed 4 x 4 windows, (16, rows w, C)."""
        sy, sx, _ = pixels.stride()
        windows = pixels.as_strided((4, 4, rows, w, c), (sy, sx, 2 * sy, 2 * sx, 1), pixels.storage_offset())
        half = _transformed_input(windows)
        return _transformed_input(half.transpose(0, 1)).transpose(0, 1).reshape(16, rows * w, c)

    @staticmethod
    def _output(products: Tensor, out: Tensor) -> None:
        """Sums of the products into (rows, 2, w, 2, O)."""
        sums = products[1] + products[2], products[1] - products[2]
        for p, half in enumerate((products[0] + sums[0], sums[1] - products[3])):
            inner = half[1] + half[2], half[1] - half[2]
            torch.add(half[0], inner[0], out=out[:, p, :, 0])
            torch.sub(inner[1], half[3], out=out[:, p, :, 1])


def _transformed_input(x: Tensor) -> Tensor:
    """``INPUT`` along the first axis, of length 4."""
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    torch.sub(x[0], x[2], out=out[0])
    torch.add(x[1], x[2], out=out[1])
    torch.sub(x[2], x[1], out=out[2])
    torch.sub(x[1], x[3], out=out[3])
    return out


def products_only(weight: Tensor, rows: int, height: int, width: int) -> Callable[[], None]:
    """The matrix products alone, without any transform: what no form of F(2, 3) on them can beat."""
    transformed = Winograd(weight, rows).weight
    windows = torch.randn(16, rows * width // 2, weight.shape[1])
    out = torch.empty(16, windows.shape[1], weight.shape[0])

    def call() -> None:
        for _ in range(height // 2 // rows):
            torch.bmm(windows, transformed, out=out)

    return call


def relative_error(result: Tensor, exact: Tensor) -> float:
    return float((result.double() - exact).norm() / exact.norm())


def measure(case: tuple[int, int, int, int], rounds: int) -> dict[str, Any]:
    """All forms of one convolution in turn: milliseconds, and errors against float64."""
    c, o, height, width = case
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(1, c, height + 2, width + 2, generator=generator).contiguous(memory_format=torch.channels_last)
    weight = torch.randn(o, c, 3, 3, generator=generator) / (9 * c) ** 0.5
    exact = F.conv2d(x.double(), weight.double())
    direct = Convolution(weight.contiguous(memory_format=torch.channels_last), torch.zeros(o), relu=False)
    forms: dict[str, Callable[[], Tensor]] = {"direct": lambda: direct(x), "eager": lambda: F.conv2d(x, weight)}
    for rows in GROUPS:
        forms[f"winograd, {rows} rows"] = partial(Winograd(weight, rows), x)
    results: dict[str, dict[str, float]] = {
        name: {"error": relative_error(call(), exact)} for name, call in forms.items()
    }
    bound = {f"products alone, {rows} rows": products_only(weight, rows, height, width) for rows in GROUPS}
    times = interleaved({**forms, **bound}, Stopwatch(torch.device("cpu")), rounds)
    least = statistics.median(times["direct"])
    for name, values in times.items():
        row = results.setdefault(name, {})
        row |= {key: round(value, 3) for key, value in summary(values).items()}
        row["times_as_fast_as_direct"] = round(least / row["median_ms"], 3)
    return results


def onednn_has_winograd() -> bool | None:
    """Whether oneDNN runs a Winograd convolution for conv3, as its log says; None where it tells nothing."""
    code = (
        "import torch; x = torch.rand(1, 160, 66, 194).contiguous(memory_format=torch.channels_last);"
        "torch.nn.functional.conv2d(x, torch.rand(256, 160, 3, 3))"
    )
    environment = {**os.environ, "ONEDNN_VERBOSE": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    lines = [line for line in done.stdout.splitlines() if ",convolution," in line]
    return any("wino" in line for line in lines) if lines else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    with torch.inference_mode():
        cases = {"{} -> {}, {} x {}".format(*case): measure(case, arguments.rounds) for case in CASES}
    entry: dict[str, Any] = {
        "machine": describe(torch.device("cpu")),
        "threads": torch.get_num_threads(),
        "onednn_chooses_winograd": onednn_has_winograd(),
        "cases": cases,
    }
    report(entry, arguments.json)


if __name__ == "__main__":
    main()
