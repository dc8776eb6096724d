"""Every Triton kernel, in its default configurations and those on request, compiled without a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fastden.kernels.concat_conv_bn_relu import DESCRIBED

BEST = {"sm_80": "mma.sync", "sm_90": "wgmma.mma_async", "sm_100": "tcgen05.mma"}


@pytest.mark.slow
def test_compiled_without_a_gpu(root: Path, tmp_path: Path) -> None:
    """Nothing spills, and bulk copies feed the best matrix instruction; where there are none, nothing is compiled.

    float16 compiles to the same except for the products' type, and would take as long again.
    """
    script, table = root / "benchmarks" / "compile_kernels.py", tmp_path / "table.json"
    command = [sys.executable, str(script), "--dtypes", "bf16", "--json", str(table)]
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads(table.read_text())["kernels"]
    operators = ("bottleneck", "concat_conv_bn_relu", "conv_bn_relu", "head", "stem", "upsample", "weight_gradient")
    for operator in ("batch_norm", "network_input", *operators):
        compiled = {row["architecture"] for row in rows if row["kernel"].startswith(f"{operator} ")}
        assert compiled == set(BEST), operator
    assert not any(row["spilled_bytes"] for row in rows)
    described = [row for row in rows if "concat" in row["kernel"] and row["bulk_copies"]]
    assert [row["architecture"] for row in described].count("sm_100") == len(DESCRIBED)
    # There one of them is the default: its name in the table is conv3's.
    assert "concat_conv_bn_relu conv3 bf16" in {row["kernel"] for row in described if row["architecture"] == "sm_90"}
    assert len(described) == 2 * len(DESCRIBED)
    assert all(row["bulk_copies"] for row in rows if "descriptors" in row["kernel"])
    # Statistics and the second sum of weights' gradients have no products. Tiles of few outputs or pixels are too small
    # for the best instruction.
    products = [row for row in rows if row["kernel"].startswith(operators) and " sum " not in row["kernel"]]
    assert all(row["matrix_instruction"] for row in products)
    large = [row for row in products if "few pixels" not in row["kernel"] and " head" not in row["kernel"]]
    large = [row for row in large if "gradient bf16" not in row["kernel"]]
    assert all(row["matrix_instruction"] == BEST[row["architecture"]] for row in large)


def test_a_part_does_not_replace_a_table_of_another_triton(root: Path, tmp_path: Path) -> None:
    """In processes of their own: the script turns the interpreter off."""
    pytest.importorskip("triton")
    script, table = root / "benchmarks" / "compile_kernels.py", tmp_path / "table.json"
    table.write_text(json.dumps({"triton": "0.0", "kernels": [{"kernel": "stem bf16"}]}))
    command = [sys.executable, str(script), "--only", "head", "--dtypes", "bf16", "--json", str(table)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert f"{table} is of Triton 0.0, this is Triton " in done.stderr
    assert json.loads(table.read_text())["triton"] == "0.0"
    code = (
        "import pathlib, sys; import compile_kernels as script; table = pathlib.Path(sys.argv[1])\n"
        "for operators, dtypes in ((script.CALLS, ['bf16']), (['head'], script.DTYPES)):\n"
        "    try: script.kept(table, list(operators), list(dtypes))\n"
        "    except SystemExit: print('refused')\n"
        "print(script.kept(table, list(script.CALLS), list(script.DTYPES)))"
    )
    command = [sys.executable, "-c", code, str(table)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=script.parent)
    assert done.stdout.splitlines() == ["refused", "refused", "[]"], done.stderr


def test_committed_tables_have_no_spills(root: Path) -> None:
    """In any dtype; each table is of one version of Triton."""
    tables = [json.loads(path.read_text()) for path in sorted((root / "benchmarks" / "results").glob("compile*.json"))]
    triton = [table for table in tables if "triton" in table]
    assert {table["triton"].rpartition(".")[0] for table in triton} >= {"3.6", "3.9"}
    spilled = [
        f"{row['kernel']}, {row['architecture']}: {row['spilled_bytes']} bytes"
        for table in tables
        for row in table["kernels"]
        if row["spilled_bytes"]
    ]
    assert not spilled
    assert {row["kernel"].rpartition(" ")[2] for table in triton for row in table["kernels"]} >= {
        "bf16",
        "fp32",
        "tf32",
    }
