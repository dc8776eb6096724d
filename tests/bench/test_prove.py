"""What results have to show before the automatic choice takes a kernel, and before it loses one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests.bench.conftest import Checkout


def row(milliseconds: float, own: bool = False, right: bool = True) -> dict[str, Any]:
    times = {"q1_ms": 0.98 * milliseconds, "q3_ms": 1.02 * milliseconds}
    return {"own": own, "right": right, **(times if right else {"failed": "wrong result"})}


def document(height: int, all_right: bool, name: str, contenders: dict[str, Any]) -> dict[str, Any]:
    return {
        "machine": {"compute_capability": "9.0", "commit": "c0ffee", "gpu": "NVIDIA H100"},
        "settings": {"dtype": "bfloat16", "size": [height, height]},
        "complete": True,
        "all_right": all_right,
        "results": [{"name": name, "contenders": contenders}],
    }


def calls(triton: float = 1.0) -> dict[str, Any]:
    """Results of the network at 256 x 256, the host's part included."""
    contenders = {
        "fastden-torch": row(2.0, own=True),
        "fastden-triton": row(triton, own=True),
        "fastden-cuda": row(1.0, own=True),
        "channels_last": row(0.5),  # no choice of an operator's backend can take it
    }
    return document(256, True, "model", contenders)


def documents(command: ModuleType, **triton: Any) -> dict[str, dict[str, Any]]:
    """Results of upsample at all sizes, where Triton is fastest but as ``triton`` says."""
    contenders = {
        "fastden-torch": row(3.0, own=True),
        "fastden-triton": row(1.0, own=True) | triton,
        "fastden-cuda": row(0.5, own=True, right=False),
        "compile": row(2.0),
        "eager": row(0.1, right=False),
    }
    return {f"ops-{height}.json": document(height, False, "upsample", contenders) for height in command.HEIGHTS}


def results(command: ModuleType, commit: str) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """Results and checks that prove Triton's upsample."""
    found = documents(command) | {"model-256.json": calls()}
    for one in found.values():
        one["machine"]["commit"] = commit
    status = {"commit": commit, "gpu": "NVIDIA H100", "model-256": "passed"}
    status |= {f"ops-{height}": "failed" for height in command.HEIGHTS}
    return found, status | dict.fromkeys(command.CHECKS["triton"], "passed")


def write(folder: Path, found: dict[str, dict[str, Any]], status: dict[str, str]) -> None:
    for name, content in (found | {"status.json": status}).items():
        (folder / name).write_text(json.dumps(content))


def test_right_and_faster_at_every_size(command: ModuleType) -> None:
    """A kernel must be faster than every right rival; other kernels of fastden are no rivals."""
    entries, notes = command.prove(documents(command), calls())
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
    entries, notes = command.prove(found, calls())
    assert entries == {}
    assert f"triton upsample 9.0 bfloat16: upsample at 512: {reason}" in notes


def test_calls_of_the_network_are_faster_too(command: ModuleType) -> None:
    """The operators' times are those of CUDA graphs; at 256 x 256 pixels the host's launches may take longer."""
    proven = {("triton", "upsample", (9, 0), "bfloat16"): "ops-2160.json"}
    found = documents(command)
    assert command.prove(found, calls(triton=1.9), ["triton"]) == (proven, [])
    for measured, reason in (
        (calls(triton=1.99), "not faster than fastden-torch"),
        (None, "no complete results"),
        (calls() | {"complete": False}, "no complete results"),
        (calls() | {"settings": {"dtype": "float16"}}, "of 9.0 float16; accepted: 9.0 bfloat16"),
    ):
        assert command.prove(found, measured, ["triton"]) == ({}, [f"triton 9.0 bfloat16: model-256.json: {reason}"])
    # The mixture of backends that was chosen counts where the file has it.
    for milliseconds, reason in ((1.9, None), (1.99, "not faster than fastden-torch")):
        mixed = calls()
        mixed["results"][0]["contenders"]["fastden-auto"] = row(milliseconds, own=True)
        told = [] if reason is None else [f"triton 9.0 bfloat16: model-256.json: fastden-auto: {reason}"]
        assert command.prove(found, mixed, ["triton"]) == ({} if reason else proven, told)
    # Another backend is judged by its own calls.
    for ops in found.values():
        ops["results"][0]["contenders"]["fastden-cuda"] = row(0.5, own=True)
    assert set(command.prove(found, calls(triton=1.99))[0]) == {("cuda", "upsample", (9, 0), "bfloat16")}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("none", "proven: ('triton', 'upsample', (9, 0), 'bfloat16')\n"),
        ("no calls", "nothing is proven\nleft out: triton 9.0 bfloat16: model-256.json: no complete results\n"),
        ("another commit", "decaf (model-256.json); accepted: one, without changes\n"),
        ("a step that did not end", "model-256.json: its step did not run; accepted: passed, as the file says\n"),
    ],
)
def test_what_the_folder_of_a_gpu_proves(
    command: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    change: str,
    said: str,
) -> None:
    monkeypatch.setattr(command, "ROOT", tmp_path)
    monkeypatch.setattr(command, "measured_sources", lambda commit: nullcontext(tmp_path))
    monkeypatch.setattr(sys, "argv", ["prove.py", str(tmp_path)])
    found, status = results(command, "c0ffee")
    if change == "no calls":
        del found["model-256.json"]
    elif change == "another commit":
        found["model-256.json"]["machine"]["commit"] = "decaf"
    elif change == "a step that did not end":
        del status["model-256"]
    write(tmp_path, found, status)
    assert command.main() == (0 if change in ("none", "no calls") else 1)
    out, err = capsys.readouterr()
    assert said in out + err
    assert ("proven: (" in out) == (change == "none")


@pytest.mark.parametrize("written", ["no folder", "nothing", "checks alone"])
def test_a_folder_without_results_proves_nothing(
    command: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    written: str,
) -> None:
    folder, table = tmp_path / "results", tmp_path / "proven.py"
    if written != "no folder":
        folder.mkdir()
    if written == "checks alone":
        write(folder, {}, results(command, "c0ffee")[1])
    table.write_text("as it was")
    monkeypatch.setattr(command, "ROOT", tmp_path)
    monkeypatch.setattr(command, "TABLE", table)
    monkeypatch.setattr(sys, "argv", ["prove.py", str(folder), "--write"])
    assert command.main() == 1
    lacking = "ops-HEIGHT.json" if written == "checks alone" else "status.json"
    assert f"nothing is proven:\n  {folder}: no {lacking}; accepted: a folder " in capsys.readouterr().err
    assert table.read_text() == "as it was"


def test_what_is_proven_is_what_was_measured(checkout: Checkout, capsys: pytest.CaptureFixture[str]) -> None:
    """Results prove nothing of a kernel that has changed since, whether it is in the table by then or not."""
    key, file = ("triton", "upsample", (9, 0), "bfloat16"), "results/ops-2160.json"
    folder = checkout.folder / "results"
    folder.mkdir()
    write(folder, *results(checkout.command, checkout.commit))
    measured = checkout.digests()["triton upsample"]
    assert checkout.prove(str(folder), "--write") == 0
    assert checkout.proven() == {key: (file, measured)}
    assert checkout.command.changed(checkout.proven()) == []
    assert checkout.prove("--drop") == 0
    assert checkout.proven() == {key: (file, measured)}

    checkout.replace("kernels/_tiles.py", "block_m = 128 if", "block_m = 256 if")
    assert checkout.command.changed(checkout.proven()) == [key]
    assert checkout.prove("--drop") == 0
    assert checkout.proven() == {}
    assert f"dropped: {key}\n" in capsys.readouterr().out
    assert checkout.prove(str(folder), "--write") == 0
    assert checkout.proven() == {}
    reason = f"its sources have changed since {checkout.commit}\n"
    assert f"nothing is proven\nleft out: triton upsample 9.0 bfloat16: {reason}" in capsys.readouterr().out

    checkout.replace("kernels/_tiles.py", "block_m = 256 if", "block_m = 128 if")
    assert checkout.prove(str(folder), "--write") == 0
    assert checkout.proven() == {key: (file, measured)}


def test_a_commit_that_is_not_there(checkout: Checkout, capsys: pytest.CaptureFixture[str]) -> None:
    write(checkout.folder, *results(checkout.command, "c0ffee"))
    assert checkout.prove(str(checkout.folder), "--write") == 1
    told = capsys.readouterr().err
    assert "nothing is proven:\n" in told
    assert "c0ffee" in told
    assert checkout.proven() == {}


def test_all_sizes_are_needed(command: ModuleType) -> None:
    found = documents(command)
    del found["ops-256.json"]
    found["ops-1080.json"]["complete"] = False  # it was stopped, and lacks some places of the operator
    assert command.prove(found, calls()) == ({}, ["9.0 bfloat16: no complete results of height 256, 1080"])


def test_every_place_is_needed(command: ModuleType) -> None:
    """An operator that has no result at a height, or lacks one of its parts at all, is not proven."""
    found = documents(command)
    found["ops-512.json"]["results"] = []
    entries, notes = command.prove(found, calls())
    assert entries == {}
    assert "triton upsample 9.0 bfloat16: upsample at 512: no result" in notes
    found = documents(command)
    for document in found.values():
        contenders = document["results"][0]["contenders"]
        document["results"] = [{"name": f"bottleneck {part}", "contenders": contenders} for part in ("res1", "res3")]
    entries, notes = command.prove(found, calls(), ["triton"])
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
        entries, _ = command.prove(found, calls())
        table = tmp_path / "proven.py"
        table.write_text(command.TABLE.read_text())
        command.write({key: (file, "c0ffee") for key, file in entries.items()}, table)
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
    assert set(command.prove(found, calls())[0]) == {("cuda", "upsample", (9, 0), "bfloat16")}
    assert command.prove(found, calls(), ["triton"])[0] == {}


def test_the_table_keeps_what_other_gpus_proved(
    command: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    proven = command.PROVEN
    old = {
        ("triton", "head", (9, 0), "bfloat16"): ("a.json", "c0ffee"),
        ("triton", "head", (8, 0), "bfloat16"): ("b.json", "decaf"),
    }
    monkeypatch.setattr(command, "PROVEN", old)
    entries, _ = command.prove(documents(command), calls())
    table = tmp_path / "proven.py"
    table.write_text(command.TABLE.read_text())
    new = {key: (file, "facade") for key, file in entries.items()}
    command.write(command.merged(new, command.refuted(old, documents(command), calls())), table)
    read: dict[str, Any] = {}
    exec(table.read_text(), read)
    assert read["PROVEN"] == {**old, ("triton", "upsample", (9, 0), "bfloat16"): ("ops-2160.json", "facade")}
    command.write(proven, table)
    assert table.read_text() == command.TABLE.read_text()


@pytest.mark.parametrize(
    ("case", "left"),
    [
        ("an operator is missing", ["triton", "cuda"]),
        ("a height is missing", ["triton", "cuda"]),
        ("a height is not complete", ["triton", "cuda"]),
        ("calls are missing", ["triton", "cuda"]),
        ("calls are of another dtype", ["triton", "cuda"]),
        ("a check did not run", ["triton", "cuda"]),
        ("a check found no time", ["triton", "cuda"]),
        ("a contender broke", ["triton", "cuda"]),
        ("rivals are wrong", ["triton", "cuda"]),
        ("another gpu", ["triton", "cuda"]),
        ("a check failed", ["triton"]),
        ("wrong at one height", ["triton"]),
        ("slower at the only height", ["triton"]),
        ("slower calls", ["triton"]),
        ("a slower mixture", []),
    ],
)
def test_what_a_run_did_not_measure_stays(
    checkout: Checkout, capsys: pytest.CaptureFixture[str], case: str, left: list[str]
) -> None:
    """Only results that show a kernel wrong or not faster take it out of the table; all of its cases are on CUDA."""
    command, folder = checkout.command, checkout.folder / "results"
    folder.mkdir()
    before = {(name, "upsample", (9, 0), "bfloat16"): ("before.json", "c0ffee") for name in ("triton", "cuda")}
    command.write(before, checkout.table)
    found, status = results(command, checkout.commit)
    status |= dict.fromkeys(command.CHECKS["cuda"], "passed")
    for name in found:
        if name != "model-256.json":
            found[name]["results"][0]["contenders"]["fastden-cuda"] = row(0.5, own=True)
    at_512 = found["ops-512.json"]["results"][0]["contenders"]
    mixture = row(3.0, own=True)
    if case == "an operator is missing":
        for name in found:
            if name != "model-256.json":
                found[name]["results"][0]["name"] = "stem"
    elif case == "a height is missing":
        del found["ops-1080.json"]
    elif case == "a height is not complete":
        found["ops-1080.json"] |= {"complete": False, "results": []}
    elif case == "calls are missing":
        del found["model-256.json"]
    elif case == "calls are of another dtype":
        found["model-256.json"]["settings"]["dtype"] = "float16"
        found["model-256.json"]["results"][0]["contenders"]["fastden-auto"] = mixture
    elif case == "a check did not run":
        del status["first-cuda-graph"]
    elif case == "a check found no time":
        status["sanitizer-cuda-memcheck"] = "no time left"
    elif case == "a contender broke":
        at_512["fastden-cuda"] = {"own": True, "failed": "AcceleratorError: CUDA error"}
    elif case == "rivals are wrong":
        for name in ("fastden-torch", "compile"):
            at_512[name] = row(3.0, own=name == "fastden-torch", right=False)
    elif case == "another gpu":
        for one in found.values():
            one["machine"]["compute_capability"] = "8.0"
            one["results"][0]["contenders"]["fastden-cuda"] = row(9.0, own=True)
    elif case == "a check failed":
        status["first-cuda-graph"] = "failed"
    elif case == "wrong at one height":
        at_512["fastden-cuda"] = row(0.5, own=True, right=False)
    elif case == "slower at the only height":
        found = {name: found[name] for name in ("ops-512.json", "model-256.json")}
        at_512["fastden-cuda"] = row(2.0, own=True)
    elif case == "slower calls":
        found["model-256.json"]["results"][0]["contenders"]["fastden-cuda"] = row(2.0, own=True)
    elif case == "a slower mixture":
        found["model-256.json"]["results"][0]["contenders"]["fastden-auto"] = mixture
    write(folder, found, status)
    assert checkout.prove(str(folder), "--write") == 0
    after = checkout.proven()
    assert {name for name, *other in after if other == ["upsample", (9, 0), "bfloat16"]} == set(left)
    told = capsys.readouterr().out
    for key, entry in before.items():
        assert (f"taken out: {key}\n" in told) == (key not in after)
        if case != "another gpu":
            assert (f"stays, for nothing here refutes it: {key}\n" in told) == (after.get(key) == entry)
    # Backends that were not compared keep their order.
    assert [key for key in after if key in before] == [key for key in before if key in after]


@pytest.mark.parametrize("check", ["one-pixel", "thread"])
def test_first_checks_run_interpreted(root: Path, check: str) -> None:
    pytest.importorskip("triton")
    command = [sys.executable, root / "benchmarks" / "first_checks.py", check, "--device", "cpu"]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(root)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert (done.returncode, done.stdout) == (0, f"{check}: triton is right\n"), done.stderr
