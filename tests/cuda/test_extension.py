"""Which library is loaded, and the messages if none can be loaded."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from fastden.bench import forms
from fastden.cuda import build, extension, limits
from fastden.errors import UserError
from fastden.ops import backends
from tests.cli.run import fails, works

ADVICE = "run `fastden build` with TORCH_CUDA_ARCH_LIST"


@pytest.fixture(autouse=True)
def nothing_built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty installation, beside an empty cache, in a process that has loaded nothing."""
    monkeypatch.setattr(extension, "_config", None)
    monkeypatch.setattr(extension, "_reasons", [])
    monkeypatch.setattr(extension, "PACKAGE", tmp_path / "package" / "fastden")
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "cache"))
    sources = tmp_path / "package" / "csrc"
    sources.mkdir(parents=True)
    for name in ("bindings.cpp", "stem.cu"):
        (sources / name).write_text(name)


def library(folder: Path, age: float = 0.0, name: str = "_cuda.so", **changes: Any) -> Path:
    """A file that looks like a fitting library, with ``changes`` in its description."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    path.write_text("no library")
    os.utime(path, (1e9 - age, 1e9 - age))
    source = extension.sources()
    assert source is not None
    description = {**build.environment(), "sources": build.digest([source]), "architectures": ["8.0"], **changes}
    (folder / build.DESCRIPTION).write_text(json.dumps(description))
    return path


def reasons() -> list[str]:
    found, why = extension.find()
    assert found is None
    return why


def test_not_built(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "missing", lambda toolkit: ["nvcc is not found", "this PyTorch is not a CUDA build"])
    assert reasons() == ["not built, and cannot be built here: nvcc is not found; this PyTorch is not a CUDA build"]
    monkeypatch.setattr(build, "missing", lambda toolkit: [])
    assert reasons() == ["not built; run `fastden build`"]
    assert extension.why_not() == ["not built; run `fastden build`"]


def test_the_automatic_choice_looks_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Until something was built; who asks for the backend looks again."""
    looked = []
    original = extension.find
    monkeypatch.setattr(extension, "find", lambda: looked.append(1) or original())
    monkeypatch.setattr(backends, "proven_backends", lambda operator, device, dtype: ["cuda"])
    monkeypatch.setattr(backends, "SHAPES", {"upsample": [()]})
    x = torch.rand(1, 2, 4, 4)
    for _ in range(3):
        assert backends.choose("upsample", None, x=x) == "torch"
    assert len(looked) == 1
    assert backends.why_not("upsample", "cuda", x=x) == extension.why_not() != []
    assert len(looked) == 3
    folder = extension.cache() / "key"
    library(folder, name=f"{build.NAME}.so")

    class Plan:
        def key(self, environment: object) -> str:
            return "key"

    monkeypatch.setattr(build, "find_toolkit", lambda: Path("toolkit"))
    monkeypatch.setattr(build, "missing", lambda toolkit: [])
    monkeypatch.setattr(build, "ask_nvcc", lambda toolkit, option: "")
    monkeypatch.setattr(build, "choose_architectures", lambda *given: ["8.0"])
    monkeypatch.setattr(build, "plan", lambda *given, **options: Plan())
    before = extension.builds()
    extension.build_here()
    assert not extension.missing()
    assert extension.builds() == before + 1


def test_an_empty_cache_variable_counts_as_unset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise libraries would be built into, and loaded from, the current folder."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", "")
    monkeypatch.setenv("LOCALAPPDATA" if os.name == "nt" else "XDG_CACHE_HOME", str(tmp_path))
    assert extension.cache() == tmp_path / "fastden"


def test_what_came_with_the_installation_is_first_and_then_the_newest() -> None:
    library(extension.cache() / "a", age=9)
    newest = library(extension.cache() / "b", age=5)
    found, why = extension.find()
    assert why == []
    assert found is not None
    assert found.path == newest
    suffix = extension.EXTENSION_SUFFIXES[0]
    own = library(extension.PACKAGE, age=99, name=f"_cuda{suffix}")
    found, _ = extension.find()
    assert found is not None
    assert found.path == own


@pytest.mark.parametrize(
    ("capabilities", "loaded"),
    [([], "own"), ([(8, 0)], "a100"), ([(9, 0)], "h100"), ([(7, 5)], "own"), ([(8, 0), (9, 0)], "both")],
)
def test_the_one_that_serves_the_gpus_here(
    capabilities: list[tuple[int, int]], loaded: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A cache that machines with other GPUs share; 8.0+PTX runs on 9.0, but without Hopper's matrix instruction."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(capabilities))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capabilities[index])
    made = {
        "own": library(extension.PACKAGE, 99, f"_cuda{extension.EXTENSION_SUFFIXES[0]}", architectures=["10.0"]),
        "h100": library(extension.cache() / "h100", 5, architectures=["9.0a"]),
        "ptx": library(extension.cache() / "ptx", 6, architectures=["8.6+PTX"]),
        "a100": library(extension.cache() / "a100", 9, architectures=["8.0"]),
        "both": library(extension.cache() / "both", 12, architectures=["8.0", "9.0a"]),
    }
    found, _ = extension.find()
    assert found is not None
    assert found.path == made[loaded]


@pytest.mark.parametrize("change", [{"torch": "2.8.0+cu128"}, {"cuda": "12.8"}])
def test_another_torch(change: dict[str, str]) -> None:
    """The message says neither "not built" nor the loader's undefined symbols."""
    library(extension.PACKAGE, name=f"_cuda{extension.EXTENSION_SUFFIXES[0]}", **change)
    library(extension.cache() / "old", sources="other")
    here = build.environment()
    own = here | change
    assert reasons() == [
        f"built for torch {own['torch']} / CUDA {own['cuda']}; this is torch {here['torch']} / CUDA {here['cuda']};"
        " run `fastden build`"
    ]
    x = torch.rand(1, 8, 4, 4)
    with pytest.raises(RuntimeError, match=r"cuda: built for torch .*; run `fastden build`"):
        backends.choose("upsample", "cuda", x=x, weight=torch.rand(8, 8, 4, 4))


def test_a_fitting_one_in_the_cache_makes_up_for_it() -> None:
    library(extension.PACKAGE, name=f"_cuda{extension.EXTENSION_SUFFIXES[0]}", torch="2.8.0")
    fitting = library(extension.cache() / "new")
    found, _ = extension.find()
    assert found is not None
    assert found.path == fitting


def test_another_python_and_older_sources() -> None:
    library(extension.cache() / "a", python="cpython-39")
    assert "built for Python cpython-39; this is" in reasons()[0]
    library(extension.cache() / "a", sources="0123")
    assert reasons() == ["built from other sources than these; run `fastden build`"]


def test_damaged_descriptions_count_for_nothing() -> None:
    path = library(extension.cache() / "a")
    (path.parent / build.DESCRIPTION).write_text("{")
    assert reasons()[0].startswith("not built")
    (path.parent / build.DESCRIPTION).unlink()
    assert reasons()[0].startswith("not built")


def test_what_cannot_be_loaded_says_so() -> None:
    library(extension.cache() / "a")
    (reason,) = extension.why_not()
    assert "_cuda.so cannot be loaded (" in reason
    assert reason.endswith("; run `fastden build --force`")
    assert not extension.emulated()


class TestCommand:
    def test_what_is_missing(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(build, "missing", lambda toolkit: ["nvcc is not found"])
        fails("build", saying="build: nvcc is not found")

    def test_builds_once(self, monkeypatch: pytest.MonkeyPatch) -> None:
        built = []

        def compile_it(plan: build.Plan, folder: Path) -> Path:
            built.append(plan)
            return library(folder)

        monkeypatch.setattr(build, "missing", lambda toolkit: [])
        monkeypatch.setattr(build, "find_toolkit", lambda: Path("/cuda"))
        monkeypatch.setattr(build, "ask_nvcc", lambda toolkit, option: "compute_80\ncompute_90\n")
        monkeypatch.setattr(build, "build", compile_it)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
        shown = works("build")
        assert "building 2 sources for 8.0+PTX, 9.0a with" in shown
        assert f"built {extension.cache()}" in " ".join(shown.split())
        (only,) = extension.cache().glob("*/_cuda.so")
        before = only.stat().st_mtime
        assert "built already" in works("build")
        assert only.stat().st_mtime > before
        works("build", "--force")
        assert len(built) == 2
        monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.6")
        works("build")
        assert built[-1].architectures == ("8.6",)
        assert len({path.parent for path in extension.cache().glob("*/_cuda.so")}) == 2

    def test_a_compiler_that_fails(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def fail(plan: build.Plan, folder: Path) -> Path:
            raise build.BuildError("building failed", "stem.cu(3): error: what it said")

        monkeypatch.setattr(build, "missing", lambda toolkit: [])
        monkeypatch.setattr(build, "find_toolkit", lambda: Path("/cuda"))
        monkeypatch.setattr(build, "ask_nvcc", lambda toolkit, option: "compute_80\n")
        monkeypatch.setattr(build, "build", fail)
        with pytest.raises(build.BuildError) as caught:
            extension.build_here()
        assert "what it said" in caught.value.output

    def test_an_installation_without_sources(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(extension, "PACKAGE", extension.PACKAGE / "elsewhere" / "fastden")
        monkeypatch.setattr(build, "missing", lambda toolkit: [])
        with pytest.raises(build.BuildError, match="this installation has no CUDA sources"):
            extension.build_here()


class TestGpus:
    @pytest.mark.parametrize(
        ("capability", "built", "reason"),
        [
            ((7, 5), ["8.0"], "compute capability 7.5; accepted: from 8.0 on"),
            ((8, 6), ["8.0", "9.0a"], None),
            ((9, 0), ["8.0"], f"compute capability 9.0; built for 8.0: {ADVICE}=9.0a"),
            ((9, 0), ["8.0+PTX"], f"compute capability 9.0; built without wgmma, for 8.0+PTX: {ADVICE}=9.0a"),
            ((9, 0), ["9.0a"], None),
            ((12, 0), ["10.0+PTX"], None),
        ],
    )
    def test_capability(
        self, capability: tuple[int, int], built: list[str], reason: str | None, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setattr(extension, "load", lambda: {"architectures": built})
        for operator in ("bottleneck", "concat_conv_bn_relu"):
            found = limits._why_not_device(operator, torch.device("cuda"))
            assert found == ([] if reason is None else [reason])
        if reason is not None and "wgmma" in reason:
            assert limits._why_not_device("conv_bn_relu", torch.device("cuda")) == []

    def test_benchmarks_leave_out_what_it_cannot_do(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(backends, "unavailable", lambda backend: [])
        cuda = torch.device("cuda")
        assert forms.choose_backends(None, cuda, torch.bfloat16) == (("torch", "triton", "cuda"), {})
        found, left_out = forms.choose_backends(None, cuda, torch.float32)
        assert found == ("torch", "triton")
        assert left_out == {"fastden-cuda": "dtype float32; accepted: float16, bfloat16"}
        found, left_out = forms.choose_backends(None, cuda, torch.bfloat16, training=True)
        assert found == ("torch", "triton")
        assert "batch statistics" in left_out["fastden-cuda"]
        with pytest.raises(UserError, match="backends: cuda cannot run: dtype float32"):
            forms.choose_backends("torch,cuda", cuda, torch.float32)


def test_shapes_where_the_extension_is_loaded_first() -> None:
    """Shape functions come with the operators' modules, which may be imported behind the extension."""
    code = """
import torch
from fastden.cuda import extension
assert "fastden.ops" not in __import__("sys").modules
library = torch.library.Library("fastden_cuda", "DEF")
library.define(
    "conv_bn_relu(Tensor x, Tensor weight, Tensor? bias, Tensor? residual, bool relu, SymInt stride, SymInt padding)"
    " -> Tensor"
)
extension._config = {"emulated": True}
import fastden.ops
from torch._subclasses.fake_tensor import FakeTensorMode
with FakeTensorMode():
    x, weight = torch.empty(1, 8, 4, 4), torch.empty(8, 8, 3, 3)
    print(tuple(torch.ops.fastden_cuda.conv_bn_relu(x, weight, None, None, True, 1, 1).shape))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "(1, 8, 4, 4)", done.stderr
