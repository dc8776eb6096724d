"""Is bfloat16 faster on this CPU? The fused network in float32 and in bfloat16, in turn, on one image.

    python benchmarks/bf16.py --json benchmarks/results/bf16.json

The results file holds an entry for each processor; running it on another machine adds that one's.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch

from fastden import Denoiser, fuse
from fastden.bench.machine import describe, report
from fastden.network import onednn


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--repeats", type=int, default=9)
    arguments = parser.parse_args()
    model = Denoiser.from_pretrained("color")
    networks = {name: fuse(model, getattr(torch, name)) for name in ("float32", "bfloat16")}
    image = torch.rand(1, 3, 512, 768, generator=torch.Generator().manual_seed(0))
    seconds: dict[str, list[float]] = {name: [] for name in networks}
    results: dict[str, torch.Tensor] = {}
    with torch.inference_mode():
        for repeat in range(arguments.repeats + 1):  # the first call packs weights
            for name, network in networks.items():
                start = time.perf_counter()
                results[name] = network(image, 25 / 255)
                if repeat:
                    seconds[name].append(time.perf_counter() - start)
    medians = {name: round(median(values), 4) for name, values in seconds.items()}
    entry: dict[str, Any] = {
        "machine": describe(torch.device("cpu")),
        "threads": torch.get_num_threads(),
        "amx": torch.cpu._is_amx_tile_supported(),
        "avx512_bf16": torch.cpu._is_avx512_bf16_supported(),
        "automatic": onednn.native_bf16(),
        "seconds": medians,
        "speed_up": round(medians["float32"] / medians["bfloat16"], 3),
        "largest_difference": round(float((results["float32"] - results["bfloat16"]).abs().max()), 5),
    }
    report(entry, arguments.json)


if __name__ == "__main__":
    main()
