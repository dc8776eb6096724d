"""Time of a whole process, from its start to the finished file, beside importing PyTorch alone.

    python benchmarks/start.py --json benchmarks/results/start.json

Files are in the system's cache and Python's modules compiled, as pip leaves them: the first round is not counted. The
results file holds an entry for each processor; running it on another machine adds that one's.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from subprocess import DEVNULL
from typing import Any

import torch

from fastden.bench.images import photograph
from fastden.bench.machine import describe, report

#: Height and width of the picture.
SIZE = (300, 451)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    with tempfile.TemporaryDirectory() as folder:
        commands = _commands(Path(folder))
        seconds: dict[str, list[float]] = {name: [] for name in commands}
        for turn in range(arguments.rounds + 1):
            for name, command in commands.items():
                start = time.perf_counter()
                subprocess.run(command, check=True, env=environment, stdout=DEVNULL, stderr=DEVNULL)
                if turn:
                    seconds[name].append(time.perf_counter() - start)
    entry: dict[str, Any] = {
        "machine": describe(torch.device("cpu")),
        "threads": torch.get_num_threads(),
        "size": list(SIZE),
        "seconds": {name: round(median(values), 3) for name, values in seconds.items()},
        "least": {name: round(min(values), 3) for name, values in seconds.items()},
    }
    entry["beyond import torch"] = {
        name: round(value - entry["seconds"]["import torch"], 3) for name, value in entry["seconds"].items()
    }
    report(entry, arguments.json)


def _commands(folder: Path) -> dict[str, list[str]]:
    """What is timed, by name."""
    from PIL import Image

    source = folder / "photo.png"
    pixels = (photograph(*SIZE)[0].clamp(0, 1) * 255).byte().permute(1, 2, 0).numpy()
    Image.fromarray(pixels).save(source)
    fastden = [sys.executable, "-m", "fastden"]
    denoise = [*fastden, "denoise", str(source), "-o", str(folder / "clean.png"), "--overwrite"]
    return {
        "python": [sys.executable, "-c", "pass"],
        "import torch": [sys.executable, "-c", "import torch"],
        "fastden --help": [*fastden, "--help"],
        "fastden denoise": denoise,
        "fastden denoise --sigma 25": [*denoise, "--sigma", "25"],
        "fastden denoise --quality fast": [*denoise, "--quality", "fast"],
    }


if __name__ == "__main__":
    main()
