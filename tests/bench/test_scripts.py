"""The suites for pytest-benchmark, and the script for a GPU, as far as both run without a GPU."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastden import ops
from tests.cli.run import fails
from tests.scripts import load

SUITES = ("bottleneck", "concat_conv_bn_relu", "conv_bn_relu", "head", "stem", "upsample", "model", "train", "batch")


def test_every_operator_has_a_suite(root: Path) -> None:
    names = {name for name in ops.__all__ if (root / "fastden" / "ops" / f"{name}.py").is_file()}
    assert names
    assert names < set(SUITES)
    for name in SUITES:
        assert f'SUITE = "{name}"' in (root / "benchmarks" / f"bench_{name}.py").read_text()


@pytest.mark.slow
def test_suites_run(root: Path) -> None:
    files = [f"benchmarks/bench_{name}.py" for name in SUITES if name != "batch"]
    options = ("--image-size", "64x72", "--bench-compare", "eager", "--bench-dtype", "float32")
    command = [sys.executable, "-m", "pytest", *files, "-q", "--benchmark-disable", "-p", "no:cacheprovider", *options]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    done = subprocess.run(
        [*command, "--bench-device", "cpu"], capture_output=True, text=True, env=environment, check=False, cwd=root
    )
    # Eleven places of operators, forward and in training, the network and its training; two contenders each.
    assert f"{2 * (2 * 11 + 2)} passed" in done.stdout, done.stdout + done.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="its commands would run")
def test_gpu_check_asks_for_what_the_command_takes(root: Path, tmp_path: Path) -> None:
    prove = load(root / "benchmarks" / "prove.py")
    python, log = tmp_path / "python", tmp_path / "log"
    # The bench of training fails; all else succeeds.
    python.write_text(f'#!/bin/sh\necho "$@" >>{log}\ncase "$*" in *"bench train"*) echo broken; exit 3 ;; esac\n')
    for name in ("nvidia-smi", "compute-sanitizer", "ncu"):
        (tmp_path / name).write_text(f'#!/bin/sh\necho {name} "$@" >>{log}\n')
    for path in (python, *(tmp_path / name for name in ("nvidia-smi", "compute-sanitizer", "ncu"))):
        path.chmod(0o755)
    out = tmp_path / "results"
    environment = {**os.environ, "PYTHON": str(python), "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    script = root / "benchmarks" / "gpu_check.sh"
    done = subprocess.run(["bash", script, out], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 1
    assert done.stdout.endswith("failed: train\nfailed: train-aten\n"), done.stdout + done.stderr
    status = json.loads((out / "status.json").read_text())
    assert status.pop("train") == status.pop("train-aten") == "failed"
    assert status.pop("tiles") == "default"
    assert set(status.values()) == {"passed"}
    assert set(prove.CHECKS) < set(status)
    assert (out / "train.log").read_text() == "broken\n"
    asked = log.read_text().splitlines()
    assert any(line.startswith("-m pytest tests/kernels tests/ops tests/cuda") for line in asked)
    assert any(line.startswith("ncu --csv --clock-control none --metrics sm__pipe_tensor") for line in asked)
    firsts = [line.split()[1] for line in asked if line.startswith("benchmarks/first_checks.py")]
    assert firsts == ["one-pixel", "one-hot", "tiles", "large", "repeats", "thread", "graph"]
    assert "-m fastden build" in asked
    assert {tool for line in asked for tool in line.split() if tool.endswith("check")} == {
        "memcheck",
        "racecheck",
        "synccheck",
    }
    benches = [line.split()[2:] for line in asked if line.startswith("-m fastden bench")]
    assert [bench[1] for bench in benches] == ["ops"] * 6 + ["model", "model", "train", "train", "model"]
    heights = {bench[bench.index("--size") + 1] for bench in benches if bench[1] == "ops" and "--backward" not in bench}
    assert heights == set(map(str, prove.HEIGHTS))
    own = [bench[bench.index("--backends") + 1] for bench in benches]
    training = ["torch,triton"] * 2
    assert own == ["torch,triton,cuda"] * 4 + training + ["torch,triton,cuda"] * 2 + training + ["torch,triton,cuda"]
    for bench in benches:
        # The command knows every option: it fails only because it finds no GPU.
        fails(*bench, saying="finds no CUDA device")


def test_gpu_check_says_what_found_no_time(root: Path, tmp_path: Path) -> None:
    (tmp_path / "python").write_text("#!/bin/sh\n")
    (tmp_path / "python").chmod(0o755)
    (tmp_path / "nvidia-smi").symlink_to("/bin/true")
    environment = {**os.environ, "PYTHON": str(tmp_path / "python"), "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    script = root / "benchmarks" / "gpu_check.sh"
    done = subprocess.run(
        ["bash", script, tmp_path / "out"],
        capture_output=True, text=True, env={**environment, "BUDGET": "1"}, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert "failed: build (no time left)\nfailed: first-one-pixel (no time left)" in done.stdout
    status = json.loads((tmp_path / "out" / "status.json").read_text())
    assert status.pop("tiles") == "default"
    assert set(status.values()) == {"no time left"}


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_make_bench_writes_into_a_new_folder(root: Path, tmp_path: Path) -> None:
    """Stand-ins for Python and the command: this one fails, as the command does, if the folder is missing."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").write_text("#!/bin/sh\necho float32 bfloat16\n")
    command = f'for last; do :; done\n[ -d "${{last%/*}}" ] && echo "$@" >>{tmp_path}/log'
    (tmp_path / "bin" / "fastden").write_text(f"#!/bin/sh\n{command}\n")
    for name in ("python", "fastden"):
        (tmp_path / "bin" / name).chmod(0o755)
    for name in (".torch", ".bench"):
        (tmp_path / name).touch()
    results = tmp_path / "results" / "new"
    variables = [f"VENV={tmp_path}", f"RESULTS={results}", "LARGE=", "BENCH_ARGS=--rounds 1"]
    subprocess.run(["make", "-C", root, "bench", *variables], check=True, capture_output=True)
    assert (tmp_path / "log").read_text().splitlines() == [
        f"bench model --device cpu --dtype float32 --rounds 1 --json {results}/cpu-float32.json",
        f"bench model --device cpu --dtype bfloat16 --rounds 1 --json {results}/cpu-bfloat16.json",
        f"bench train --device cpu --rounds 1 --json {results}/cpu-train.json",
    ]
