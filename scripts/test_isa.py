"""Run the numerical tests as older CPUs would: with oneDNN's and PyTorch's instruction sets limited.

    python scripts/test_isa.py [--json benchmarks/results/isa.json] [--isa AVX2 ...] [TEST ...]

The results file holds, for each processor and PyTorch, what passed under which instruction set. The exit code is 1 if
anything failed.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from datetime import date
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import torch

from fastden.bench import tables
from fastden.bench.machine import describe

#: Limits of oneDNN and of PyTorch's own kernels; "native" sets no limit.
ISAS = {"AVX2": ("AVX2", "avx2"), "AVX512_CORE": ("AVX512_CORE", "avx512"), "native": ("", "")}
#: Tests that compare numbers which depend on the instruction set.
TESTS = ("tests/network", "tests/ops", "tests/inference", "tests/test_algebra.py", "tests/test_nn.py")


def main() -> int:
    """Run all; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tests", nargs="*", default=TESTS, metavar="TEST")
    parser.add_argument("--isa", nargs="+", choices=list(ISAS), default=list(ISAS))
    parser.add_argument("--json", type=Path, help="add the counts to this file")
    arguments = parser.parse_args()
    counts: dict[str, dict[str, int]] = {}
    for isa in arguments.isa:
        found = counts[isa] = run(isa, arguments.tests)
        print(f"{isa:12} " + ", ".join(f"{number} {what}" for what, number in found.items()), flush=True)
        if arguments.json is not None:  # at once: the next one takes half an hour
            write(arguments.json, {isa: found})
    return int(any(found["failed"] or not found["passed"] for found in counts.values()))


def run(isa: str, tests: list[str]) -> dict[str, int]:
    """Run the tests under an instruction set: how many passed, failed and were skipped."""
    onednn, aten = ISAS[isa]
    limits = {"ONEDNN_MAX_CPU_ISA": onednn, "ATEN_CPU_CAPABILITY": aten} if onednn else {}
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-q", f"--junitxml={report}", *tests]
        # The cache of torch.compile's kernels does not tell a limited instruction set from the processor's own: with
        # kernels of another run a compiled network gave NaN and 1e33 under AVX2.
        cache = {"TORCHINDUCTOR_CACHE_DIR": str(Path(folder) / "compiled")}
        subprocess.run(command, env={**os.environ, **limits, **cache}, check=False)
        suites = list(ElementTree.parse(report).getroot()) if report.exists() else []
    total, failed, skipped = (
        sum(int(suite.get(name, 0)) for suite in suites for name in names)
        for names in (("tests",), ("failures", "errors"), ("skipped",))
    )
    return {"passed": total - failed - skipped, "failed": failed, "skipped": skipped}


def write(path: Path, counts: dict[str, dict[str, int]]) -> None:
    """Add the counts to a results file, under this processor and PyTorch."""
    entries: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    processor = str(describe(torch.device("cpu")).get("cpu"))
    entry = {"date": date.today().isoformat(), **counts}
    entries.setdefault(processor, {}).setdefault(f"torch {torch.__version__}", {}).update(entry)
    tables.write(path, entries)


if __name__ == "__main__":
    sys.exit(main())
