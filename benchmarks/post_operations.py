"""Folded operators on a CPU with oneDNN's post-operations and with PyTorch's own operations, in turn.

    python benchmarks/post_operations.py --json benchmarks/results/post-operations.json [--sizes 64x64 512x768]

The times are CPU time of one thread, so that other programs on the machine hardly count. All sizes are measured here
with post-operations, also those that fastden leaves to PyTorch (:data:`fastden.ops.post_operations.FEW_VALUES`). The
results file holds, for each processor, an entry for each dtype and size; a run adds its own.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

import torch

from fastden import Denoiser, fuse
from fastden.bench import operators
from fastden.bench.machine import describe, report
from fastden.ops import post_operations

OPERATORS = ("stem", "bottleneck", "conv_bn_relu", "concat_conv_bn_relu", "head")
SIZES = ("64x64", "128x128", "256x256", "512x768")
DTYPES = ("float32", "bfloat16")
#: Pixels that all calls of one operator together have, about; there are at least five calls.
PIXELS = 1 << 18


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--sizes", nargs="+", default=list(SIZES), metavar="HEIGHTxWIDTH")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for text in arguments.sizes:
        height, width = map(int, text.split("x"))
        for dtype in DTYPES:
            operations = measured((height, width), getattr(torch, dtype))
            entry = {"machine": describe(torch.device("cpu")), "operators": operations}
            report(entry, arguments.json, f"{dtype}, {height} x {width}")


@torch.no_grad()
def measured(size: tuple[int, int], dtype: torch.dtype) -> dict[str, dict[str, Any]]:
    """Milliseconds and errors against float64 of each operator, without and with post-operations."""
    model = Denoiser.from_pretrained("color").eval()
    fused, exact = fuse(model, dtype), fuse(model, torch.float64)
    rows: dict[str, dict[str, Any]] = {}
    for case in operators.cases(model, size, 1, OPERATORS):
        inputs = tuple(tensor.to(dtype) for tensor in case.inputs)
        call = operators._own(case.part, fused, inputs, "torch")
        reference = operators._own(case.part, exact, case.inputs, "torch")()
        ways = {"plain": 1 << 62, "post-operations": 0}
        times: dict[str, list[float]] = {name: [] for name in ways}
        row = rows[case.part] = {"values": inputs[0].numel()}
        for turn in range(max(PIXELS // (size[0] * size[1]), 5) + 1):
            for name in ways if turn % 2 else reversed(ways):
                with patch.object(post_operations, "FEW_VALUES", ways[name]):
                    result = call()
                    start = time.process_time()
                    call()
                    if turn:
                        times[name].append(1e3 * (time.process_time() - start))
                    else:
                        error = (result.double() - reference).norm() / reference.norm()
                        row[name] = {"relative_l2": float(error)}
        for name, values in times.items():
            row[name]["median_ms"] = round(median(values), 3)
        row["ratio"] = round(row["plain"]["median_ms"] / row["post-operations"]["median_ms"], 3)
        row["used"] = row["values"] > post_operations.FEW_VALUES
    return rows


if __name__ == "__main__":
    main()
