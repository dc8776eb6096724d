"""``fastden info``: complete if all works, and no crash if something is missing or broken."""

from __future__ import annotations

import builtins
import json
import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

from fastden import info


def tools(monkeypatch: pytest.MonkeyPatch, folder: Path, scripts: dict[str, str]) -> None:
    """A CUDA toolkit on the PATH whose programs are scripts."""
    (folder / "bin").mkdir()
    (folder / "include").mkdir()
    (folder / "include/cuda_runtime_api.h").touch()
    for name, script in scripts.items():
        (folder / "bin" / name).write_text(f"#!/bin/sh\n{script}\n")
        (folder / "bin" / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(folder / "bin"), prepend=os.pathsep)
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.delenv("CUDA_PATH", raising=False)


def test_report_is_complete_and_plain() -> None:
    report = json.loads(json.dumps(info.collect()))
    sections = {"versions", "system", "cpu", "torch", "gpu", "extension", "images", "models", "backends"}
    assert set(report) == {*sections, "automatic choice here"}
    assert "error" not in {key for section in report.values() if isinstance(section, dict) for key in section}
    assert report["versions"]["torch"].startswith(report["torch"]["version"].split("+")[0])
    assert {"jpeg", "png", "tiff", "webp"} <= set(report["images"]["formats"])
    assert report["torch"]["devices"][0] == "cpu"
    assert isinstance(report["cpu"]["native_bf16"], bool)


def test_formats_of_the_extra_are_listed_where_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(info, "find_spec", lambda name: object() if name == "pillow_heif" else None)
    formats = info.collect()["images"]["formats"]
    assert "HEIC" in formats
    assert "camera raw" not in formats


def test_backends_say_why_not() -> None:
    backends = info.collect()["backends"]
    assert backends["torch"] == {"available": True, "why_not": []}
    assert backends["cuda"]["available"] == (not backends["cuda"]["why_not"])
    assert backends["triton"]["available"] == (not backends["triton"]["why_not"])


def test_triton_needs_a_gpu_and_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    report: dict[str, Any] = {"torch": {"devices": ["cpu"]}, "gpu": {"nvidia": [], "nvcc": None}}
    missing = "triton is not installed (pip install 'fastden[gpu]')"
    monkeypatch.setattr("fastden.ops.backends._installed", lambda name: False)
    assert info._backends(report)["triton"]["why_not"] == ["no GPU is found", missing]
    report["torch"]["devices"].append("cuda:0 Some GPU")
    monkeypatch.setattr("fastden.ops.backends._installed", lambda name: True)
    assert info._backends(report)["triton"] == {"available": True, "why_not": []}


def test_the_automatic_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is chosen on a GPU, and why not something faster."""
    from fastden.cuda import extension
    from fastden.ops import backends

    for module in ("torch.cuda.is_available", "fastden.ops.backends._has_compiler"):
        monkeypatch.setattr(module, lambda: True)
    monkeypatch.delenv("FASTDEN_BACKEND", raising=False)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(backends, "_proven_on_index", backends._proven_on)  # remembered for no other test
    monkeypatch.setattr("fastden.ops.backends.interpreted", lambda: False)
    entries = [("cuda", "stem"), ("triton", "stem"), ("triton", "upsample")]
    proven = {(backend, operator, (9, 0), "bfloat16"): ("a.json", "") for backend, operator in entries}
    for module in ("backends", "proven"):
        monkeypatch.setattr(f"fastden.ops.{module}.PROVEN", proven)
    monkeypatch.setattr("fastden.ops.backends._installed", lambda name: True)
    monkeypatch.setattr(extension, "why_not", list)
    monkeypatch.setattr(extension, "missing", lambda: False)
    reason = ""
    monkeypatch.setattr("fastden.ops.backends.why_not_started", lambda device: reason)
    all_else = "torch: all else, and training"
    assert info._automatic() == {
        "cpu": "torch",
        "cuda:0 bfloat16": f"cuda: stem; triton: upsample; {all_else}",
    }
    reason = "OSError: read-only"
    assert info._automatic() == {
        "cpu": "torch",
        "cuda:0 bfloat16": f"cuda: stem; {all_else}",
        "cuda:0 not triton": "Triton cannot start (OSError: read-only)",
    }
    monkeypatch.setattr(extension, "why_not", lambda: ["not built"])
    assert info._automatic() == {
        "cpu": "torch",
        "cuda:0 not cuda": "not built",
        "cuda:0 not triton": "Triton cannot start (OSError: read-only)",
    }
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: (8, 0))
    assert info._automatic()["cuda:0"] == "torch: no kernel is proven faster on compute capability 8.0"
    monkeypatch.setenv("FASTDEN_BACKEND", "triton")
    assert info._automatic() == {"all": "FASTDEN_BACKEND=triton leaves no choice"}
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1 / 0)
    monkeypatch.delenv("FASTDEN_BACKEND")
    assert info.collect()["automatic choice here"] == {"error": "ZeroDivisionError: division by zero"}


def test_the_onednn_form_says_why_not(monkeypatch: pytest.MonkeyPatch) -> None:
    reasons = {"float32": [], "bfloat16": ["no bfloat16 on this CPU"]}
    monkeypatch.setattr(
        "fastden.ops.post_operations.why_not", lambda device, dtype: reasons[str(dtype).removeprefix("torch.")]
    )
    report = info.collect()
    assert report["backends"]["onednn float32"] == {"available": True, "why_not": []}
    assert report["backends"]["onednn bfloat16"] == {"available": False, "why_not": reasons["bfloat16"]}
    assert "onednn bfloat16  no: no bfloat16 on this CPU\n" in info.as_text(report)
    monkeypatch.setitem(sys.modules, "fastden.ops.post_operations", None)
    (reason,) = info.collect()["backends"]["onednn float32"]["why_not"]
    assert "fastden.ops.post_operations" in reason


def test_backends_of_other_machines() -> None:
    def reasons(devices: list[str], nvidia: list[str], extension: dict[str, Any]) -> dict[str, list[str]]:
        report = {"torch": {"devices": devices}, "gpu": {"nvidia": nvidia}, "extension": extension}
        return {name: entry["why_not"] for name, entry in info._backends(report).items()}

    found = reasons(["cpu"], ["Some GPU, 1.0"], {"why_not": ["not built"]})
    assert found["cuda"] == ["not built", "a GPU is here (Some GPU, 1.0), but this PyTorch cannot use it"]
    assert reasons(["cpu", "cuda:0 Some GPU"], ["Some GPU"], {"torch": "2.13.0"})["cuda"] == []
    assert reasons(["cpu", "cuda:0 Some GPU"], ["Some GPU"], {"error": "OSError: x"})["cuda"] == ["OSError: x"]
    broken = info._backends({"torch": {"error": "ImportError: libtorch"}, "gpu": {"error": "x"}})
    assert "libtorch" in broken["torch"]["why_not"][0]
    assert broken["cuda"]["why_not"] == broken["torch"]["why_not"]


@pytest.mark.parametrize("broken", ["torch", "pyvips", "fastden.network.hub", "fastden.network.onednn"])
@pytest.mark.parametrize("error", [ImportError("cannot be found"), OSError("libx.so: undefined symbol"), SystemExit(3)])
def test_broken_packages_become_lines(monkeypatch: pytest.MonkeyPatch, broken: str, error: BaseException) -> None:
    original = builtins.__import__

    def failing(name: str, *arguments: Any, **options: Any) -> Any:
        if name == broken:
            raise error
        return original(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", failing)
    report = info.collect()
    text = info.as_text(report)
    section = {"torch": "torch", "pyvips": "images", "fastden.network.hub": "models"}.get(broken)
    found = report[section] if section else report["cpu"]["native_bf16"]
    assert found == {"error": f"{type(error).__name__}: {error}"}
    assert str(error) in text
    if broken == "torch":
        assert not report["backends"]["torch"]["available"]


def test_broken_metadata_and_programs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def failing(name: str) -> str:
        raise UnicodeDecodeError("utf-8", b"", 0, 1, "damaged")

    monkeypatch.setattr(metadata, "version", failing)
    tools(monkeypatch, tmp_path, dict.fromkeys(("nvidia-smi", "nvcc"), "echo broken >&2; exit 9"))
    report = info.collect()
    assert report["versions"]["torch"] == "unknown (UnicodeDecodeError)"
    assert report["gpu"]["nvidia"] == []
    assert report["gpu"]["nvcc"] == str(tmp_path / "bin/nvcc")


def test_gpu_and_compiler_are_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    outputs = {"nvidia-smi": "NVIDIA X, 600.1, 80000 MiB", "nvcc": "Cuda compilation tools, release 13.0, V13.0.1"}
    tools(monkeypatch, tmp_path, {name: f"echo '{text}'" for name, text in outputs.items()})
    report = info.collect()
    assert report["gpu"]["nvidia"] == ["NVIDIA X, 600.1, 80000 MiB"]
    assert "release 13.0" in report["gpu"]["nvcc"]


def test_runs_without_any_other_package(root: Path) -> None:
    """It runs in isolated mode without site-packages, on the standard library alone."""
    code = (
        f"import sys, runpy; sys.path.insert(0, {str(root)!r}); runpy.run_module('fastden.info', run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-I", "-S", "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "ModuleNotFoundError" in done.stdout
    assert "PyTorch cannot be imported" in done.stdout


def test_published_results_name_no_path() -> None:
    assert info.collect()["system"]["python"] == sys.executable
    assert sys.executable not in json.dumps(info.collect(paths=False))
