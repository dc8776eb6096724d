"""Kill ``fastden denoise --resume`` again and again at random moments, and compare its files with those of a whole run.

    python tests/soak/kill_and_resume.py            # benchmarks/results/batch/kill_and_resume.json

Each start is a process of its own, killed by SIGKILL a random moment after a random number of images; what it left is
looked at: no output may be incomplete, whatever the moment. A last run goes to the end.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from fastden.images.codec import ImageFile, write_image
from fastden.whole_files import write_bytes

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results" / "batch"
SUFFIXES = (".png", ".jpg", ".tif", ".webp")


def make_images(folder: Path, count: int, side: int) -> None:
    import skimage.data

    cat = skimage.data.chelsea()
    for index in range(count):
        generator = np.random.default_rng(index)
        rows, columns = (generator.integers(0, max(size - side, 0) + 1) for size in cat.shape[:2])
        part = cat[rows : rows + side, columns : columns + side]
        noisy = np.clip(part + generator.normal(0, 15, part.shape), 0, 255).astype(np.uint8)
        suffix = SUFFIXES[index % len(SUFFIXES)]
        write_image(folder / f"{index:03d}{suffix}", ImageFile(noisy, lossless=suffix != ".jpg"))


def start(source: Path, target: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "fastden", "denoise", str(source), "-o", str(target), "--sigma", "15", "--resume"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def digests(folder: Path) -> dict[str, str]:
    if not folder.exists():
        return {}
    files = (path for path in folder.iterdir() if not path.name.startswith("."))
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def lines_on_record(folder: Path) -> int:
    """Outputs that were made; an output that was made twice counts twice."""
    path = folder / ".fastden-manifest.jsonl"
    lines = path.read_bytes().splitlines() if path.exists() else []
    return sum(b'"status": "done"' in line for line in lines)


def finish(process: subprocess.Popen[str]) -> None:
    output, _ = process.communicate()
    if process.returncode:
        raise SystemExit(f"fastden denoise ended with code {process.returncode}:\n{output}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=60)
    parser.add_argument("--side", type=int, default=256, help="pixels")
    parser.add_argument("--kills", type=int, default=25, help="at most")
    parser.add_argument("--between", type=int, default=5, help="images from one kill to the next, at most")
    parser.add_argument("--json", type=Path, default=RESULTS / "kill_and_resume.json")
    arguments = parser.parse_args()
    random.seed(0)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source, whole, killed = folder / "in", folder / "whole", folder / "killed"
        source.mkdir()
        make_images(source, arguments.images, arguments.side)
        finish(start(source, whole))
        expected = digests(whole)
        kills, incomplete, leftovers = 0, 0, 0
        while kills < arguments.kills:
            process = start(source, killed)
            # The moment is counted in finished images: loading PyTorch takes most of the time before the first.
            enough = lines_on_record(killed) + random.randrange(arguments.between + 1)
            while process.poll() is None and lines_on_record(killed) < enough:
                time.sleep(0.002)
            try:
                process.wait(random.uniform(0, 0.1))
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGKILL)
                kills += 1
            else:
                finish(process)
                break
            process.communicate()
            found = digests(killed)
            incomplete += sum(expected[file] != digest for file, digest in found.items())
            leftovers += len(list(killed.glob(".fastden-*.tmp")))
        finish(start(source, killed))
        found = digests(killed)
        figures: dict[str, Any] = {
            "images": arguments.images,
            "side": arguments.side,
            "kills": kills,
            "files_made_again": lines_on_record(killed) - len(found),
            "incomplete_files_seen": incomplete,
            "temporary_files_left_by_kills": leftovers,
            "temporary_files_at_the_end": len(list(killed.glob(".fastden-*.tmp"))),
            "equal_bytes": found == expected,
            "files_at_the_end": len(found),
        }
    text = json.dumps(figures, indent=1) + "\n"
    print(text)
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(arguments.json, text.encode())
    if not figures["equal_bytes"] or incomplete:
        raise SystemExit("the files differ")


if __name__ == "__main__":
    main()
