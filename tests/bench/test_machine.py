"""The machine's description, its ceilings, and a GPU's sensors through a stand-in for NVML."""

from __future__ import annotations

import itertools
import json
import platform
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fastden import info, whole_files
from fastden.bench import machine
from fastden.errors import UserError

CPU = torch.device("cpu")


def test_description() -> None:
    found = machine.describe(CPU)
    assert found["device"] == "cpu"
    assert found["threads"] == torch.get_num_threads()
    # A CUDA build's package version ends before the plus.
    assert torch.__version__.startswith(found["versions"]["torch"])
    assert set(found) >= {"cpu", "cores", "native_bf16", "platform", "python", "commit", "date"}


@pytest.mark.parametrize(
    ("name", "folder"),
    [("Intel(R) Xeon(R) Processor", "intel-r-xeon-r-processor"), ("AMD EPYC", "amd-epyc"), (None, platform.machine())],
)
def test_the_processor_names_a_folder(name: str | None, folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(info, "collect", lambda: {"cpu": {"name": name}})
    assert machine.processor() == re.sub("[^a-z0-9]+", "-", folder.lower())


def test_a_report_keeps_the_entries_of_other_processors(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "results.json"
    first, second = ({"machine": {"cpu": cpu}, "seconds": seconds} for cpu, seconds in (("A", 1.0), ("B", 2.0)))
    machine.report(first, file)
    machine.report(second, file)
    machine.report(first | {"seconds": 3.0}, file)
    assert {cpu: entry["seconds"] for cpu, entry in json.loads(file.read_text()).items()} == {"A": 3.0, "B": 2.0}
    assert "machine" not in capsys.readouterr().out


def test_a_report_keeps_other_entries_of_the_processor(tmp_path: Path) -> None:
    file = tmp_path / "results.json"
    for name, seconds in (("float32", 1.0), ("bfloat16", 2.0), ("float32", 3.0)):
        machine.report({"machine": {"cpu": "A"}, "seconds": seconds}, file, name)
    entries = json.loads(file.read_text())["A"]
    assert {name: entry["seconds"] for name, entry in entries.items()} == {"float32": 3.0, "bfloat16": 2.0}


def test_a_report_that_cannot_be_written_leaves_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "results.json"
    machine.report({"machine": {"cpu": "A"}, "seconds": 1.0}, file)

    def write_half(path: Path, data: str | bytes, *_: Any) -> None:
        whole = data.encode() if isinstance(data, str) else data
        path.write_bytes(whole[: len(whole) // 2])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", write_half)
    monkeypatch.setattr(whole_files, "write_synced", write_half)
    with pytest.raises((OSError, UserError), match="No space left on device"):
        machine.report({"machine": {"cpu": "B"}, "seconds": 2.0}, file)
    assert list(json.loads(file.read_text())) == ["A"]


def test_a_report_without_a_file_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    machine.report({"machine": {"cpu": "A"}, "seconds": 1.0}, None)
    assert json.loads(capsys.readouterr().out) == {"seconds": 1.0}


def test_commit_is_none_where_git_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise FileNotFoundError("git")

    monkeypatch.setattr(subprocess, "run", fail)
    assert machine.commit() is None
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: SimpleNamespace(returncode=128, stdout=""))
    assert machine.commit() is None


def test_results_do_not_mark_the_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def git(*words: str) -> str:
        command = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@example.org", *words]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    code, results = tmp_path / "fastden/bench/machine.py", tmp_path / "benchmarks/results/a.json"
    for file in (code, results):
        file.parent.mkdir(parents=True)
        file.write_text("1")
    git("init", "-q")
    git("add", ".")
    git("commit", "-qm", "first")
    clean = git("describe", "--always")
    monkeypatch.setattr(machine, "__file__", str(code))
    assert machine.commit() == clean
    results.write_text("2")
    (results.parent / "b.json").write_text("3")
    assert machine.commit() == clean
    code.chmod(0o755)  # what a copy of the checkout may do
    assert machine.commit() == clean
    code.write_text("2")
    assert machine.commit() == f"{clean}-dirty"


def test_ceilings_are_rates() -> None:
    # A core makes between 1 MFLOP/s and 100 TFLOP/s, and copies between 1 MB/s and 10 TB/s.
    assert 1e6 < machine.matrix_rate(CPU, torch.float32, sides=(32, 64)) < 1e14
    assert 1e6 < machine.copy_rate(CPU, size=1 << 20) < 1e13


def test_nothing_is_set_on_a_cpu() -> None:
    before = torch.backends.cudnn.benchmark, torch.backends.cudnn.allow_tf32, torch.get_num_threads()
    with machine.steady_settings(CPU):
        assert (torch.backends.cudnn.benchmark, torch.backends.cudnn.allow_tf32, torch.get_num_threads()) == before
    assert machine.Sensors.of(CPU) == "device cpu has no NVML"


def test_sensors_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert "pip install 'fastden[bench]'" in str(machine.Sensors.of(torch.device("cuda")))


class NVMLError(Exception):
    pass


def refuse(*_: Any) -> None:
    raise NVMLError("not supported")


@pytest.fixture
def nvml() -> SimpleNamespace:
    return SimpleNamespace(
        NVMLError=NVMLError,
        NVML_CLOCK_SM=1,
        NVML_CLOCK_MEM=2,
        NVML_TEMPERATURE_GPU=0,
        nvmlDeviceGetPowerUsage=lambda handle: 350_500,
        nvmlDeviceGetEnforcedPowerLimit=refuse,
        nvmlDeviceGetClockInfo=lambda handle, kind: 1500 * kind,
        nvmlDeviceGetTemperature=lambda handle, kind: 55,
        nvmlDeviceGetCurrentClocksThrottleReasons=lambda handle: 0x4 | 0x40,
        nvmlDeviceGetTotalEnergyConsumption=lambda handle: 1_000_000,
    )


def test_state_of_the_sensors(nvml: SimpleNamespace) -> None:
    assert machine.Sensors(nvml, None).state() == {
        "sm_clock_mhz": 1500,
        "memory_clock_mhz": 3000,
        "power_w": 350.5,
        "power_limit_w": None,
        "temperature_c": 55,
        "throttle_reasons": ["software power cap", "hardware thermal slowdown"],
    }


def test_energy_of_a_call(nvml: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    # Each answer stands for two joules, and the counter is renewed at every third: it is read between two renewals.
    answers = itertools.count()
    nvml.nvmlDeviceGetTotalEnergyConsumption = lambda handle: 1_000_000 + 6_000 * (next(answers) // 3)
    calls: list[int] = []
    load = machine.Sensors(nvml, None).under_load(lambda: calls.append(1), milliseconds=5.0, duration=0.01)
    assert load["joules_a_call"] == pytest.approx(2.0 / 10)
    assert len(calls) % 10 == 0
    assert load["seconds"] >= 0.01
    assert load["throttle_reasons"] == ["hardware thermal slowdown", "software power cap"]
    nvml.nvmlDeviceGetTotalEnergyConsumption = refuse
    assert machine.Sensors(nvml, None).under_load(lambda: None, 5.0, 0.001)["joules_a_call"] is None
