"""Small images on a CPU: the time of one call for single crops and for batches of crops, beside other runtimes.

    python benchmarks/small.py --json benchmarks/results/small.json [--threads 1] [--dtype bfloat16]

Also what it costs a call of 32 x 32 pixels that packed weights are compared with their sources. The results file holds,
for each processor, an entry for each dtype and number of threads; a run adds its own.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

import torch

from fastden import Denoiser, fuse
from fastden.bench.compare import Settings, ready
from fastden.bench.images import SIGMA, photograph
from fastden.bench.machine import describe, report
from fastden.bench.network import inference
from fastden.bench.timing import Call, Stopwatch, interleaved, summary
from fastden.network import packed
from fastden.network.packed import Snapshot

#: Height and width of the crops, and how many of them are in a call.
CASES = ((64, 1), (64, 8), (64, 32), (128, 1), (128, 8), (256, 1))
PEERS = ("eager", "channels_last", "compile", "openvino")
#: Rounds for images of so many pixels and fewer; still larger ones get the fewest.
ROUNDS = {1 << 14: 9, 1 << 16: 5, 1 << 18: 3}
#: Rounds of the call of 32 x 32 pixels: the difference that is looked for is small.
COMPARISON_ROUNDS = 60
CPU = torch.device("cpu")


def main() -> int:
    """The exit code: 1 where a contender failed or was wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--compare", default=",".join(PEERS), help="other runtimes, separated by commas")
    parser.add_argument(
        "--cases", nargs="+", default=[f"{side}x{count}" for side, count in CASES], metavar="SIDExCROPS"
    )
    arguments = parser.parse_args()
    cases = [(int(side), int(count)) for side, count in (case.split("x") for case in arguments.cases)]
    peers = tuple(name for name in arguments.compare.split(",") if name)
    torch.set_num_threads(arguments.threads)
    with TemporaryDirectory() as folder:
        jobs = prepare(cases, getattr(torch, arguments.dtype), peers, Path(folder))
        entry = measure(jobs, getattr(torch, arguments.dtype))
    report(entry, arguments.json, f"{entry['dtype']}, {entry['threads']} threads")
    rows = [row for job in entry["calls"].values() for row in job.values()]
    return int(not all(row.get("right", False) for row in rows))


Jobs = dict[str, tuple[int, dict[str, dict[str, Any]], dict[str, Call]]]


def prepare(cases: list[tuple[int, int]], dtype: torch.dtype, peers: tuple[str, ...], folder: Path) -> Jobs:
    """Every contender of every case built, warmed up and judged: pixels, findings and calls by name."""
    model = Denoiser.from_pretrained("color").eval()
    jobs: Jobs = {}
    for side, count in cases:
        directory = folder / f"{side}x{count}"
        directory.mkdir(exist_ok=True)
        job, contenders = inference(model, (side, side), count, dtype, peers, ("torch",), directory)
        rows: dict[str, dict[str, Any]] = {}
        calls: dict[str, Call] = {}
        for contender in contenders:
            row = rows[contender.name] = {}
            try:
                calls[contender.name] = ready(contender, job, Settings(CPU, dtype, 1, warm_up=2), row)
            # The failure of one contender must not lose the results of the others.
            except Exception as failure:
                row["failed"] = f"{type(failure).__name__}: {' '.join(str(failure).split())[:300]}"
            print(f"{side} x {side}, {count}: {contender.name}: {row}", file=sys.stderr)
            row.pop("timing", None), row.pop("peak_mib", None)
        jobs[f"{side} x {side}, {count}"] = job.pixels, rows, calls
    return jobs


def measure(jobs: Jobs, dtype: torch.dtype) -> dict[str, Any]:
    """The times of all calls, in milliseconds."""
    for pixels, rows, calls in jobs.values():
        rounds = next((count for most, count in ROUNDS.items() if pixels <= most), min(ROUNDS.values()))
        times = interleaved(calls, Stopwatch(CPU), rounds)
        for name, values in times.items():
            rows[name] |= {key: round(value, 3) for key, value in summary(values).items()}
        own = rows["fastden-torch"].get("median_ms")
        for row in rows.values():
            if own and row.get("right") and "median_ms" in row:
                row["slower_by"] = round(row["median_ms"] / own, 3)
    return {
        "machine": describe(CPU),
        "dtype": str(dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "calls": {name: rows for name, (_, rows, _) in jobs.items()},
        "weights_compared": comparison(dtype),
    }


def comparison(dtype: torch.dtype, rounds: int = COMPARISON_ROUNDS) -> dict[str, Any]:
    """A call of 32 x 32 pixels with the check of weights, by hash and by bytes, and without, in turn, milliseconds."""
    fused = fuse(Denoiser.from_pretrained("color"), dtype)
    x = photograph(32, 32)
    with torch.inference_mode():
        fused(x, SIGMA)  # packs the weights and hashes them

    def call(name: str, replacement: Callable[..., Any]) -> None:
        with torch.inference_mode(), patch.object(Snapshot, name, replacement):
            fused(x, SIGMA)

    calls = {
        "compared": partial(call, "holds", Snapshot.holds),
        "bytes compared": partial(call, "_same_bytes", _equals_copies),
        "not compared": partial(call, "holds", lambda snapshot, tensors: True),
    }
    times = interleaved(calls, Stopwatch(CPU), rounds)
    results: dict[str, Any] = {
        name: {key: round(value, 3) for key, value in summary(values).items()} for name, values in times.items()
    }
    results["ratio"] = round(results["compared"]["median_ms"] / results["not compared"]["median_ms"], 3)
    return results


def _equals_copies(snapshot: Snapshot, pointers: list[int]) -> bool:
    copies = [copy.data_ptr() for copy in snapshot.copies]
    return not any(map(packed._memcmp(), copies, pointers, snapshot._sizes))


if __name__ == "__main__":
    sys.exit(main())
