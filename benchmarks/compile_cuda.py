"""Compile every CUDA C++ kernel for every default architecture, without a GPU and PyTorch, and print what it needs.

Registers a thread, spilled bytes, static shared memory a block, and the matrix instruction, from the binary where a
disassembler is found (cuobjdump or nvdisasm, of the toolkit or of Triton), else from the PTX of the whole source. Exits
with 1 where a kernel spills, where an operator with a kernel for Hopper's matrix instructions has none on sm_90a, or
where the compiler notes a loss of performance: that it waits for each of these instructions, or ignores ``setmaxnreg``.

    python benchmarks/compile_cuda.py                                   # the table
    python benchmarks/compile_cuda.py --json benchmarks/results/compile_cuda.json
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from importlib import util
from itertools import product
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from fastden.cuda import build
from fastden.whole_files import write_bytes

ROOT = Path(__file__).resolve().parent.parent

#: The operators that have a kernel for Hopper's matrix instructions, with their names, and the architecture.
HOPPER = ({"bottleneck": "HGMMA", "concat_conv_bn_relu": "HGMMA", "concat_conv_fp8": "QGMMA"}, "9.0a")
#: Names of matrix instructions in binaries, best first, and in PTX.
BINARY = ("QGMMA", "HGMMA", "HMMA")
PTX = ("wgmma.mma_async", "mma.sync")
#: What ptxas says where it does less than the source asks for: C7504 to C7508, that it ignores ``setmaxnreg``; C7510
#: and later, that it waits for each of Hopper's matrix instructions.
LOSS = re.compile(r"\(C75\d\d\) Potential Performance Loss: .*")


def disassembler(toolkit: Path) -> tuple[str, ...] | None:
    """A command that prints a binary's instructions, to which the binary's path is added."""
    folders = [toolkit / "bin"]
    triton = util.find_spec("triton")
    if triton is not None and triton.origin is not None:
        folders.append(Path(triton.origin).parent / "backends" / "nvidia" / "bin")
    path = os.pathsep.join([*map(str, folders), os.environ.get("PATH", os.defpath)])
    for name, options in (("cuobjdump", ("-sass",)), ("nvdisasm", ("-c",))):
        program = shutil.which(name, path=path)
        if program is not None:
            return (program, *options)
    return None


def resources(text: str) -> dict[str, dict[str, int]]:
    """Registers, spilled and shared bytes by mangled kernel name, from what ``ptxas -v`` prints."""
    by_kernel = {}
    for part in re.split(r"Compiling entry function '", text)[1:]:
        name = part[: part.index("'")]
        # Behind an entry function's properties may come those of functions that it calls.
        spilled = re.findall(r"(\d+) bytes spill (?:stores|loads)", part)
        used = re.search(r"Used (\d+) registers(.*)", part)
        assert used is not None, part
        shared = re.search(r"(\d+) bytes smem", used[2])
        by_kernel[name] = {
            "registers": int(used[1]),
            "spilled_bytes": sum(map(int, spilled)),
            "static_shared_bytes": int(shared[1]) if shared else 0,
        }
    return by_kernel


def matrix_instructions(listing: str) -> dict[str, str | None]:
    """The best matrix instruction of each function of a disassembly, by mangled name."""
    # cuobjdump writes "Function : NAME", nvdisasm ".section .text.NAME".
    parts = re.split(r"(?:Function : |\.section\s+\.text\.)([\w$.]+)", listing)
    return {
        name: next((instruction for instruction in BINARY if f"{instruction}." in body), None)
        for name, body in zip(parts[1::2], parts[2::2], strict=True)
    }


def demangled(names: list[str], toolkit: Path) -> list[str]:
    """Readable names without arguments, or the same where no demangler is found."""
    path = os.pathsep.join([str(toolkit / "bin"), os.environ.get("PATH", os.defpath)])
    program = shutil.which("cu++filt", path=path) or shutil.which("c++filt", path=path)
    if program is None or not names:
        return names
    lines = subprocess.run([program, *names], capture_output=True, text=True, check=True).stdout.splitlines()
    return [re.sub(r"^void |fastden::|\(anonymous namespace\)::|<unnamed>::|\(.*\)$", "", line) for line in lines]


def compile_one(
    source: Path, architecture: str, toolkit: Path, flags: tuple[str, ...], folder: Path
) -> tuple[list[dict[str, Any]], list[str]]:
    """Rows for the kernels of one source on one architecture, and what is wrong with them."""
    number = architecture.replace(".", "")
    target = folder / f"{source.stem}-{number}"
    nvcc = [str(toolkit / "bin" / "nvcc"), *flags, f"-arch=sm_{number}"]
    binary = [*nvcc, "-cubin", "-Xptxas", "-v", "-o", f"{target}.cubin", str(source)]
    done = subprocess.run(binary, capture_output=True, text=True, check=False)
    unit = f"{source.stem}, sm_{number}"
    if done.returncode:
        return [], [f"{unit}: does not compile\n{done.stderr}"]
    failures = [f"{unit}: {note}" for note in dict.fromkeys(LOSS.findall(done.stderr))]
    program = disassembler(toolkit)
    if program is not None:
        listing = subprocess.run([*program, f"{target}.cubin"], capture_output=True, text=True, check=True).stdout
        instructions, wanted = matrix_instructions(listing), HOPPER[0].get(source.stem)
    else:
        subprocess.run([*nvcc, "-ptx", "-o", f"{target}.ptx", str(source)], capture_output=True, check=True)
        text = Path(f"{target}.ptx").read_text(encoding="utf-8")
        best = next((name for name in PTX if name in text), None)
        instructions, wanted = dict.fromkeys(resources(done.stderr), best), PTX[0]
    found = resources(done.stderr)
    rows = []
    for (name, used), label in zip(found.items(), demangled(list(found), toolkit), strict=True):
        rows.append(
            {
                "source": source.name,
                "kernel": label,
                "architecture": f"sm_{number}",
                **used,
                "matrix_instruction": instructions.get(name),
            }
        )
        if used["spilled_bytes"]:
            failures.append(f"{unit}, {label}: spills {used['spilled_bytes']} bytes")
    needs_hopper = source.stem in HOPPER[0] and architecture == HOPPER[1]
    if needs_hopper and wanted not in {row["matrix_instruction"] for row in rows}:
        failures.append(f"{unit}: no {wanted}")
    return rows, failures


def main() -> int:
    operators = sorted(path.stem for path in (ROOT / "csrc").glob("*.cu"))
    parser = argparse.ArgumentParser(description="Compile all CUDA C++ kernels without a GPU.")
    parser.add_argument("--json", type=Path, help="write the table there too")
    parser.add_argument("--only", nargs="+", choices=operators, default=operators)
    parser.add_argument("--architectures", default=None, help="such as 8.6;9.0a; default those of the build")
    arguments = parser.parse_args()
    toolkit = build.find_toolkit()
    if toolkit is None:
        print("error: nvcc is not found (CUDA_HOME, PATH, /usr/local/cuda)", file=sys.stderr)
        return 1
    listed = build.ask_nvcc(toolkit, "--list-gpu-arch")
    wanted = {"TORCH_CUDA_ARCH_LIST": arguments.architectures} if arguments.architectures else {}
    architectures = [one.removesuffix("+PTX") for one in build.choose_architectures(wanted, listed)]
    plan = build.plan(ROOT / "csrc", architectures, toolkit=toolkit)
    flags = tuple(flag for flag in plan.nvcc_flags if not flag.startswith("-gencode"))
    sources = [path for path in plan.sources if path.suffix == ".cu" and path.stem in arguments.only]
    workers = build.jobs(os.environ, len(os.sched_getaffinity(0)), build.free_memory())
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(workers) as pool:
        tasks = product(sources, architectures)
        results = list(pool.map(lambda task: compile_one(*task, toolkit, flags, Path(folder)), tasks))
    rows = [row for these, _ in results for row in these]
    failures = [failure for _, these in results for failure in these]
    table = Table("source", "kernel", "architecture", "registers", "spilled B", "static shared B", "matrix instruction")
    for row in rows:
        table.add_row(*(str(value or ("" if value is None else 0)) for value in row.values()))
    Console(width=150).print(table)
    program = disassembler(toolkit)
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        document = {
            "command": "python benchmarks/compile_cuda.py",
            "nvcc": build.ask_nvcc(toolkit, "--version").strip().splitlines()[-1],
            "flags": " ".join(flags),
            "sources": plan.digest,
            "instructions_from": Path(program[0]).name if program else "PTX",
            "kernels": rows,
        }
        write_bytes(arguments.json, (json.dumps(document, indent=1) + "\n").encode())
    for failure in failures:
        print(f"error: {failure}", file=sys.stderr)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
