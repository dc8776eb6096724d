"""Compile every Triton kernel as it is launched by default, or on request, without a GPU, and print what it needs.

For sm_80, sm_90 and sm_100: registers a thread, local memory (spilled registers), shared memory a block, and the matrix
instruction. Exits with 1 where a kernel spills, where one with a matrix product has no matrix instruction, or where one
that loads by descriptors has no bulk copy or less than its architecture's best matrix instruction.

    python benchmarks/compile_kernels.py                                   # the table
    python benchmarks/compile_kernels.py --json benchmarks/results/compile.json   # of Triton 3.6
    python benchmarks/compile_kernels.py --json benchmarks/results/compile-triton-3.9.json
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from importlib import import_module
from pathlib import Path
from typing import Any

# An interpreted kernel cannot be compiled.
os.environ.pop("TRITON_INTERPRET", None)

import triton
from rich.console import Console
from rich.table import Table
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fastden.kernels._common import Specimen

OPERATORS = ("batch_norm", "bottleneck", "concat_conv_bn_relu", "conv_bn_relu", "head", "stem", "upsample")
DTYPES = ("bf16", "fp16")
ARCHITECTURES = (80, 90, 100)
#: What each architecture's tensor cores are fed by, best first.
INSTRUCTIONS = {80: ("mma.sync",), 90: ("wgmma.mma_async", "mma.sync"), 100: ("tcgen05.mma", "mma.sync")}

BULK_COPY = "cp.async.bulk.tensor"


def architectures(specimen: Specimen) -> tuple[int, ...]:
    """Where a kernel can run."""
    return tuple(version for version in ARCHITECTURES if version >= 90 or not specimen.bulk_copies)


def inspect(specimen: Specimen, architecture: int) -> dict[str, Any]:
    """Compile one kernel and read its resources from the binary."""
    names = specimen.kernel.arg_names
    constants = {(names.index(name),): value for name, value in specimen.constants.items()}
    # As at a launch: tensors begin at multiples of 16 bytes.
    attributes = {
        (index,): [["tt.divisibility", 16]] for index, name in enumerate(names) if specimen.signature[name][0] == "*"
    }
    source = ASTSource(specimen.kernel, specimen.signature, constants, attributes)
    options = {"num_warps": specimen.warps, "num_stages": specimen.stages}
    compiled = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
    with tempfile.TemporaryDirectory() as folder:
        binary = Path(folder) / "kernel.cubin"
        binary.write_bytes(compiled.asm["cubin"])
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(binary)]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.findall(r"REG:(\d+) STACK:(\d+) .*?LOCAL:(\d+)", usage)
    registers, stack, local = (max(int(value) for value in column) for column in zip(*found, strict=True))
    matrix = next((name for name in INSTRUCTIONS[architecture] if name in compiled.asm["ptx"]), None)
    return {
        "kernel": specimen.label,
        "architecture": f"sm_{architecture}",
        "registers": registers,
        "spilled_bytes": stack + local,
        "shared_bytes": compiled.metadata.shared,
        "warps": specimen.warps,
        "matrix_instruction": matrix,
        "bulk_copies": BULK_COPY in compiled.asm["ptx"],
        "missing": missing(specimen, architecture, compiled.asm["ptx"]),
    }


def missing(specimen: Specimen, architecture: int, ptx: str) -> list[str]:
    """Instructions that a kernel should have, and has not."""
    if specimen.bulk_copies:
        return [name for name in (BULK_COPY, INSTRUCTIONS[architecture][0]) if name not in ptx]
    known = INSTRUCTIONS[architecture]
    return [known[0]] if "PRECISION" in specimen.constants and not any(name in ptx for name in known) else []


def main() -> int:
    parser = argparse.ArgumentParser(description="Compile all Triton kernels without a GPU.")
    parser.add_argument("--json", type=Path, help="write the table there too")
    parser.add_argument("--only", nargs="+", choices=OPERATORS, default=OPERATORS)
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=DTYPES)
    arguments = parser.parse_args()
    rows = [
        inspect(specimen, architecture)
        for operator in arguments.only
        for specimen in import_module(f"fastden.kernels.{operator}").specimens()
        if specimen.label.endswith(tuple(arguments.dtypes))
        for architecture in architectures(specimen)
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
        document = {"command": "python benchmarks/compile_kernels.py", "triton": triton.__version__, "kernels": rows}
        arguments.json.write_text(json.dumps(document, indent=1) + "\n")
    for failure in failures:
        print(f"error: {failure}", file=sys.stderr)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
