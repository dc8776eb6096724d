"""Compiling the kernels for a GPU that is not here, and reading what they need."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from fastden.cuda import build
from tests.scripts import load

LISTING = """
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_Z1aPf' for 'sm_90a'
ptxas info    : Function properties for _Z1aPf
    8 bytes stack frame, 12 bytes spill stores, 16 bytes spill loads
ptxas info    : Used 168 registers, used 9 barriers, 8 bytes cumulative stack size, 320 bytes smem
ptxas info    : Compiling entry function '_Z1bPf' for 'sm_90a'
ptxas info    : Function properties for _Z1bPf
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 32 registers, used 1 barriers
"""


@pytest.fixture(scope="module")
def command(root: Path) -> ModuleType:
    return load(root / "benchmarks" / "compile_cuda.py")


def test_resources(command: ModuleType) -> None:
    assert command.resources(LISTING) == {
        "_Z1aPf": {"registers": 168, "spilled_bytes": 28, "static_shared_bytes": 320},
        "_Z1bPf": {"registers": 32, "spilled_bytes": 0, "static_shared_bytes": 0},
    }


@pytest.mark.parametrize("mark", ["\t\tFunction : {}\n", '.section  .text.{},"ax"\n'])
def test_matrix_instructions(command: ModuleType, mark: str) -> None:
    bodies = {"_Z1a": "HMMA.16816 HGMMA.64x256x16", "_Z1b": "HMMA.16816.F32", "_Z1c": "FFMA", "_Z1d": "QGMMA.64x128x32"}
    text = "".join(mark.format(name) + body + "\n" for name, body in bodies.items())
    assert command.matrix_instructions(text) == {"_Z1a": "HGMMA", "_Z1b": "HMMA", "_Z1c": None, "_Z1d": "QGMMA"}


@pytest.mark.skipif(build.find_toolkit() is None, reason="nvcc is not found")
def test_kernels_of_hopper(root: Path, tmp_path: Path) -> None:
    """No spills, and Hopper's matrix instruction; the other architectures are the command's, which CI does not run."""
    target = tmp_path / "a.json"
    script = root / "benchmarks" / "compile_cuda.py"
    options = ("--architectures", "9.0a", "--json", str(target))
    environ = {**os.environ, "PYTHONPATH": str(root)}
    done = subprocess.run([sys.executable, script, *options], capture_output=True, text=True, env=environ, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads(target.read_text())["kernels"]
    assert {row["source"] for row in rows} == {path.name for path in (root / "csrc").glob("*.cu")}
    assert {row["architecture"] for row in rows} == {"sm_90a"}
    assert all(row["spilled_bytes"] == 0 for row in rows)
    for source in ("bottleneck.cu", "concat_conv_bn_relu.cu", "concat_conv_fp8.cu"):
        found = {row["matrix_instruction"] for row in rows if row["source"] == source}
        wanted = "QGMMA" if "fp8" in source else "HGMMA"
        assert found & {wanted, "wgmma.mma_async"}, source


@pytest.mark.skipif(build.find_toolkit() is None, reason="nvcc is not found")
def test_an_ignored_register_count_fails(command: ModuleType, tmp_path: Path) -> None:
    """ptxas compiles ``setmaxnreg`` to nothing, with a note, where it does not know how many threads a block has."""
    source = tmp_path / "stem.cu"
    instruction = 'asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");'
    source.write_text(f"__global__ void kernel(float* p) {{ {instruction} p[threadIdx.x] += 1; }}\n")
    rows, failures = command.compile_one(source, "9.0a", build.find_toolkit(), ("-O3",), tmp_path)
    assert [row["kernel"] for row in rows] == ["kernel"]
    assert len(failures) == 1
    assert "setmaxnreg" in failures[0]
    source.write_text(source.read_text().replace("void kernel", "void __launch_bounds__(128, 1) kernel"))
    assert command.compile_one(source, "9.0a", build.find_toolkit(), ("-O3",), tmp_path)[1] == []


@pytest.mark.skipif(build.find_toolkit() is None, reason="nvcc is not found")
@pytest.mark.parametrize(
    ("source", "kernel", "count"),
    [
        ("concat_conv_bn_relu.cu", "concat_kernel", 4),
        ("concat_conv_fp8.cu", "concat_kernel", 2),
        ("bottleneck.cu", "hopper_bottleneck", 2),
    ],
)
def test_hoppers_kernels_trap_where_they_have_no_code(
    root: Path, tmp_path: Path, source: str, kernel: str, count: int
) -> None:
    """Code for 9.0 may lie beside that for 9.0a. Launched by mistake, it must trap instead of doing nothing."""
    toolkit = build.find_toolkit()
    target = tmp_path / "kernel.ptx"
    options = ("-std=c++17", "--expt-relaxed-constexpr", "-DFASTDEN_HOPPER", "-arch=sm_90", "-ptx")
    subprocess.run([f"{toolkit}/bin/nvcc", *options, "-o", target, root / "csrc" / source], check=True)
    bodies = [part for part in target.read_text().split(".entry ")[1:] if kernel in part.splitlines()[0]]
    assert len(bodies) == count
    assert all("trap;" in body for body in bodies)


@pytest.mark.skipif(build.find_toolkit() is None, reason="nvcc is not found")
def test_spills_and_errors_fail(command: ModuleType, tmp_path: Path) -> None:
    toolkit = build.find_toolkit()
    source = tmp_path / "concat_conv_bn_relu.cu"
    source.write_text(
        "__global__ void __launch_bounds__(1024, 2) spill(float* p) {  // 32 registers a thread\n"
        "    float v[64];\n"
        "    #pragma unroll\n"
        "    for (int i = 0; i < 64; ++i) v[i] = p[i * 1024 + threadIdx.x];\n"
        "    __syncthreads();\n"
        "    #pragma unroll\n"
        "    for (int i = 0; i < 64; ++i) p[i * 1024 + threadIdx.x] = v[i] * v[(7 * i + 3) % 64];\n"
        "}\n"
    )
    rows, failures = command.compile_one(source, "9.0a", toolkit, ("-O3",), tmp_path)
    assert rows[0]["kernel"].startswith("spill")
    assert rows[0]["spilled_bytes"] > 0
    assert any("spills" in failure for failure in failures)
    assert any("no HGMMA" in failure or "no wgmma" in failure for failure in failures)
    source.write_text("broken\n")
    rows, failures = command.compile_one(source, "9.0a", toolkit, (), tmp_path)
    assert rows == []
    assert "does not compile" in failures[0]
