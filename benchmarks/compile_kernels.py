"""Compile every Triton kernel as the network launches it, without a GPU, and print what it needs.

For sm_80, sm_90 and sm_100: registers a thread, local memory (spilled registers), shared memory a block, and the matrix
instruction. Exits with 1 where a kernel spills, where one with a matrix product in half precision or TF32 has no matrix
instruction, or where one that loads by descriptors has no bulk copy or less than its architecture's best matrix
instruction. What is compiled is what launches ask for, see ``launches.py``.

    python benchmarks/compile_kernels.py                                   # the table
    python benchmarks/compile_kernels.py --json benchmarks/results/compile.json   # of Triton 3.6
    python benchmarks/compile_kernels.py --json benchmarks/results/compile-triton-3.9.json
    python benchmarks/compile_kernels.py --only head --json benchmarks/results/compile.json   # other rows stay
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    os.environ.pop("TRITON_INTERPRET", None)  # an interpreted kernel cannot be compiled

import triton
from launches import CALLS, DTYPES, Launch, launches
from rich.console import Console
from rich.table import Table
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fastden.bench.tables import write

ARCHITECTURES = (80, 90, 100)
#: What each architecture's tensor cores are fed by, best first.
INSTRUCTIONS = {80: ("mma.sync",), 90: ("wgmma.mma_async", "mma.sync"), 100: ("tcgen05.mma", "mma.sync")}

BULK_COPY = "cp.async.bulk.tensor"


def inspect(launch: Launch, architecture: int) -> dict[str, Any]:
    """Compile one kernel and read its resources from the binary."""
    source = ASTSource(launch.kernel, launch.signature, launch.constants, launch.attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=launch.options)
    with tempfile.TemporaryDirectory() as folder:
        binary = Path(folder) / "kernel.cubin"
        binary.write_bytes(compiled.asm["cubin"])
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(binary)]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.findall(r"REG:(\d+) STACK:(\d+) .*?LOCAL:(\d+)", usage)
    registers, stack, local = (max(int(value) for value in column) for column in zip(*found, strict=True))
    matrix = next((name for name in INSTRUCTIONS[architecture] if name in compiled.asm["ptx"]), None)
    return {
        "kernel": launch.label,
        "architecture": f"sm_{architecture}",
        "registers": registers,
        "spilled_bytes": stack + local,
        "shared_bytes": compiled.metadata.shared,
        "warps": launch.options["num_warps"],
        "matrix_instruction": matrix,
        "bulk_copies": BULK_COPY in compiled.asm["ptx"],
        "missing": missing(launch, architecture, compiled.asm["ptx"]),
    }


def missing(launch: Launch, architecture: int, ptx: str) -> list[str]:
    """Instructions that a kernel should have, and has not."""
    if launch.described:
        return [name for name in (BULK_COPY, INSTRUCTIONS[architecture][0]) if name not in ptx]
    known = INSTRUCTIONS[architecture]
    exact = launch.label.endswith(" fp32")  # for which there is none
    return [known[0]] if launch.products and not exact and not any(name in ptx for name in known) else []


def kept(file: Path, operators: list[str], dtypes: list[str]) -> list[dict[str, Any]]:
    """Rows of a table of the same Triton that are not of both ``operators`` and ``dtypes``.

    Raises:
        SystemExit: the table is of another Triton, and ``operators`` and ``dtypes`` would not replace all of it.
    """
    if not file.exists():
        return []
    document = json.loads(file.read_text(encoding="utf-8"))
    if document["triton"] != triton.__version__:
        if set(CALLS) <= set(operators) and set(DTYPES) <= set(dtypes):
            return []
        raise SystemExit(
            f"{file} is of Triton {document['triton']}, this is Triton {triton.__version__}; "
            "accepted: another file, or all operators and dtypes"
        )
    names = [(row["kernel"].split()[0], row["kernel"].rpartition(" ")[2], row) for row in document["kernels"]]
    return [row for operator, dtype, row in names if not (operator in operators and dtype in dtypes)]


def main() -> int:
    parser = argparse.ArgumentParser(description="Compile all Triton kernels without a GPU.")
    parser.add_argument("--json", type=Path, help="write the table there too")
    parser.add_argument("--only", nargs="+", choices=CALLS, default=list(CALLS))
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    arguments = parser.parse_args()
    # First, for compiling takes minutes.
    others = kept(arguments.json, arguments.only, arguments.dtypes) if arguments.json else []
    rows = [
        inspect(launch, architecture)
        for operator in arguments.only
        for dtype in arguments.dtypes
        for architecture in ARCHITECTURES
        for launch in launches(operator, dtype, architecture)
    ]
    table = Table("kernel", "architecture", "registers", "spilled B", "shared KiB", "warps", "matrix instruction")
    failures = []
    for row in rows:
        wrong = []
        if row["spilled_bytes"]:
            wrong.append("spills")
        lacks = row.pop("missing")
        if lacks:
            wrong.append(f"no {', '.join(lacks)}")
        if wrong:
            failures.append(f"{row['kernel']}, {row['architecture']}: {', '.join(wrong)}")
        values = (row["registers"], row["spilled_bytes"], f"{row['shared_bytes'] / 1024:.0f}", row["warps"])
        table.add_row(row["kernel"], row["architecture"], *map(str, values), row["matrix_instruction"] or "")
    Console(width=130).print(table)
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        command = "python benchmarks/compile_kernels.py"
        if set(arguments.dtypes) != set(DTYPES):
            command += f" --dtypes {' '.join(arguments.dtypes)}"
        document = {"command": command, "triton": triton.__version__, "kernels": others + rows}
        write(arguments.json, document)
    for failure in failures:
        print(f"error: {failure}", file=sys.stderr)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
