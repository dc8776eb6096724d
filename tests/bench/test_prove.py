"""What results have to show before the automatic choice takes a kernel."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests.scripts import load


@pytest.fixture(scope="module")
def command(root: Path) -> ModuleType:
    return load(root / "benchmarks" / "prove.py")


def row(milliseconds: float, own: bool = False, right: bool = True) -> dict[str, Any]:
    times = {"q1_ms": 0.98 * milliseconds, "q3_ms": 1.02 * milliseconds}
    return {"own": own, "right": right, **(times if right else {"failed": "wrong result"})}


def documents(command: ModuleType, **triton: Any) -> dict[str, dict[str, Any]]:
    """Results of upsample at all sizes, where Triton is fastest but as ``triton`` says."""
    contenders = {
        "fastden-torch": row(3.0, own=True),
        "fastden-triton": row(1.0, own=True) | triton,
        "fastden-cuda": row(0.5, own=True, right=False),
        "compile": row(2.0),
        "eager": row(0.1, right=False),
    }
    return {
        f"ops-{height}.json": {
            "machine": {"compute_capability": "9.0", "commit": "c0ffee", "gpu": "NVIDIA H100"},
            "settings": {"dtype": "bfloat16", "size": [height, height]},
            "complete": True,
            "all_right": False,
            "results": [{"name": "upsample", "contenders": contenders}],
        }
        for height in command.HEIGHTS
    }


def test_right_and_faster_at_every_size(command: ModuleType) -> None:
    """A kernel must be faster than every right rival; other kernels of fastden are no rivals."""
    entries, notes = command.prove(documents(command))
    assert entries == {("triton", "upsample", (9, 0), "bfloat16"): "ops-2160.json"}
    assert notes == [
        "cuda upsample 9.0 bfloat16: " + "; ".join(f"upsample at {height}: wrong result" for height in command.HEIGHTS)
    ]


@pytest.mark.parametrize(
    ("triton", "reason"),
    [
        ({"q3_ms": 1.97}, "not faster than compile"),
        ({"q3_ms": 9.0}, "not faster than fastden-torch, compile"),
        ({"right": False, "failed": "CUDA error"}, "CUDA error"),
    ],
)
def test_slower_or_wrong_once_is_not_proven(command: ModuleType, triton: dict[str, Any], reason: str) -> None:
    found = documents(command) | {"ops-512.json": documents(command, **triton)["ops-512.json"]}
    entries, notes = command.prove(found)
    assert entries == {}
    assert f"triton upsample 9.0 bfloat16: upsample at 512: {reason}" in notes


def test_all_sizes_are_needed(command: ModuleType) -> None:
    found = documents(command)
    del found["ops-256.json"]
    found["ops-1080.json"]["complete"] = False  # it was stopped, and lacks some places of the operator
    assert command.prove(found) == ({}, ["9.0 bfloat16: no complete results of height 256, 1080"])


def test_every_place_is_needed(command: ModuleType) -> None:
    """An operator that has no result at a height, or lacks one of its parts at all, is not proven."""
    found = documents(command)
    found["ops-512.json"]["results"] = []
    entries, notes = command.prove(found)
    assert entries == {}
    assert "triton upsample 9.0 bfloat16: upsample at 512: no result" in notes
    found = documents(command)
    for document in found.values():
        contenders = document["results"][0]["contenders"]
        document["results"] = [{"name": f"bottleneck {part}", "contenders": contenders} for part in ("res1", "res3")]
    entries, notes = command.prove(found, ["triton"])
    assert entries == {}
    places = "; ".join(f"bottleneck res2 at {height}: no result" for height in command.HEIGHTS)
    assert notes == [f"triton bottleneck 9.0 bfloat16: {places}"]


def test_results_of_one_commit_and_one_gpu(command: ModuleType) -> None:
    found = documents(command)
    status = {"commit": "c0ffee", "gpu": "NVIDIA H100", **{f"ops-{height}": "failed" for height in command.HEIGHTS}}
    assert command.why_not_together(status, found) == []
    machine = found["ops-512.json"]["machine"]
    for key, value in (("commit", "decaf"), ("commit", None), ("gpu", "NVIDIA H200")):
        before = machine[key]
        machine[key] = value
        (reason,) = command.why_not_together(status, found)
        assert f"{value} (ops-512.json)" in reason
        assert reason.startswith(f"{key}: ")
        machine[key] = before
    (reason,) = command.why_not_together({**status, "gpu": "NVIDIA H200"}, found)
    assert "NVIDIA H200 (status.json)" in reason
    for document in found.values():
        document["machine"]["commit"] = "c0ffee-dirty"
    (reason,) = command.why_not_together({**status, "commit": "c0ffee-dirty"}, found)
    assert reason.endswith("accepted: one, without changes")


def test_results_of_a_step_that_ended(command: ModuleType) -> None:
    """A file that an earlier call left is not that of this one; a step may fail by a wrong contender."""
    found = documents(command)
    status = {"commit": "c0ffee", "gpu": "NVIDIA H100", **{f"ops-{height}": "failed" for height in command.HEIGHTS}}
    found["ops-256.json"]["all_right"] = True
    assert command.why_not_together({**status, "ops-256": "passed"}, found) == []
    del status["ops-1080"]
    assert command.why_not_together({**status, "ops-256": "no time left"}, found) == [
        "ops-256.json: its step no time left; accepted: passed, as the file says",
        "ops-1080.json: its step did not run; accepted: failed, as the file says",
    ]


def test_the_faster_of_two_is_first(command: ModuleType, tmp_path: Path) -> None:
    for milliseconds, order in ((0.5, ["cuda", "triton"]), (1.5, ["triton", "cuda"])):
        found = documents(command)
        for document in found.values():
            document["results"][0]["contenders"]["fastden-cuda"] = row(milliseconds, own=True)
        entries, _ = command.prove(found)
        table = tmp_path / "proven.py"
        table.write_text(command.TABLE.read_text())
        command.write(entries, table)
        read: dict[str, Any] = {}
        exec(table.read_text(), read)
        assert [key[0] for key in read["PROVEN"]] == order


def test_every_check_is_needed(command: ModuleType) -> None:
    """Those of one backend say nothing about the other; searched tiles are Triton's."""
    status = {name: "passed" for checks in command.CHECKS.values() for name in checks}
    assert command.unproven(status | {"tiles": "default"}, "triton") == []
    assert "users do not have" in command.unproven(status | {"tiles": "searched"}, "triton")[0]
    assert command.unproven(status | {"tiles": "searched"}, "cuda") == []
    del status["first-cuda-graph"]
    status["tests-cuda"] = "timed out"
    assert command.unproven(status, "cuda") == ["first-cuda-graph: did not run", "tests-cuda: timed out"]
    assert command.unproven(status, "triton") == []
    found = documents(command, right=False)
    for document in found.values():
        document["results"][0]["contenders"]["fastden-cuda"] = row(0.5, own=True)
    assert set(command.prove(found)[0]) == {("cuda", "upsample", (9, 0), "bfloat16")}
    assert command.prove(found, ["triton"])[0] == {}


def test_the_table_keeps_what_other_gpus_proved(
    command: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = {("triton", "head", (9, 0), "bfloat16"): "a.json", ("triton", "head", (8, 0), "bfloat16"): "b.json"}
    monkeypatch.setattr(command, "PROVEN", old)
    entries, _ = command.prove(documents(command))
    table = tmp_path / "proven.py"
    table.write_text(command.TABLE.read_text())
    command.write(command.merged(entries, [((9, 0), "bfloat16")]), table)
    read: dict[str, Any] = {}
    exec(table.read_text(), read)
    assert read["PROVEN"] == {
        ("triton", "head", (8, 0), "bfloat16"): "b.json",
        ("triton", "upsample", (9, 0), "bfloat16"): "ops-2160.json",
    }
    command.write({}, table)
    assert table.read_text() == command.TABLE.read_text()


@pytest.mark.parametrize("check", ["one-pixel", "thread"])
def test_first_checks_run_interpreted(root: Path, check: str) -> None:
    pytest.importorskip("triton")
    command = [sys.executable, root / "benchmarks" / "first_checks.py", check, "--device", "cpu"]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(root)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert (done.returncode, done.stdout) == (0, f"{check}: triton is right\n"), done.stderr
