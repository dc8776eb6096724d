"""Building the extension: architectures, flags, memory, missing tools; a failed build leaves no files."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch

from fastden import ops
from fastden.cuda import build
from fastden.cuda.build import (
    ARCHITECTURES,
    BuildError,
    choose_architectures,
    covers,
    gencode,
    jobs,
    known_architectures,
    parse_architectures,
)

CUDA_13 = "compute_75\ncompute_80\ncompute_86\ncompute_89\ncompute_90\ncompute_100\ncompute_120\n"
CUDA_12_0 = "compute_50\ncompute_80\ncompute_86\ncompute_89\ncompute_90\n"
GIB = 2**30


def program(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


def toolkit(folder: Path, release: str = "13.0") -> Path:
    """A folder that looks like a CUDA toolkit."""
    (folder / "include").mkdir(parents=True)
    (folder / "include" / "cuda_runtime_api.h").touch()
    listed = "\\n".join(CUDA_13.split())
    program(
        folder / "bin" / "nvcc",
        f'case "$1" in --version) echo "Cuda compilation tools, release {release}, V{release}.1";;'
        f' *) printf "{listed}\\n";; esac',
    )
    return folder


class TestArchitectures:
    def test_flags(self) -> None:
        assert gencode(["8.6", "9.0a", "10.0+PTX"]) == (
            "-gencode=arch=compute_86,code=sm_86",
            "-gencode=arch=compute_90a,code=sm_90a",
            "-gencode=arch=compute_100,code=sm_100",
            "-gencode=arch=compute_100,code=compute_100",
        )

    def test_list(self) -> None:
        assert parse_architectures("8.0;8.6 9.0a,10.0+PTX 8.0") == ("8.0", "8.6", "9.0a", "10.0+PTX")

    def test_lists_that_containers_set(self) -> None:
        """Such lists are meant for other packages: older GPUs are left out with a note, and 9.0 becomes 9.0a."""
        said: list[str] = []
        assert parse_architectures("5.2 7.5 8.0 8.6 9.0+PTX", said.append) == ("8.0", "8.6", "9.0a", "9.0+PTX")
        assert said == ["TORCH_CUDA_ARCH_LIST: 5.2, 7.5 left out; there are kernels from 8.0 on"]
        assert parse_architectures("9.0") == ("9.0a",)
        assert gencode(("9.0a", "9.0+PTX")) == (
            "-gencode=arch=compute_90a,code=sm_90a",
            "-gencode=arch=compute_90,code=compute_90",
        )
        chosen = choose_architectures({"TORCH_CUDA_ARCH_LIST": "7.5;9.0"}, CUDA_13, say=said.append)
        assert chosen == ("9.0a",)
        assert len(said) == 2

    @pytest.mark.parametrize("text", ["Hopper", "90", "8.0;sm_90", "9.0b", "7.5", "8.0+ptx"])
    def test_malformed_list(self, text: str) -> None:
        with pytest.raises(BuildError, match=r"TORCH_CUDA_ARCH_LIST: '.*'; accepted: compute capabilities from 8.0"):
            parse_architectures(text)

    def test_empty_list(self) -> None:
        with pytest.raises(BuildError, match="TORCH_CUDA_ARCH_LIST: empty"):
            parse_architectures(" ; ")

    def test_as_far_as_the_compiler_has_them(self) -> None:
        assert known_architectures(ARCHITECTURES, CUDA_13) == ARCHITECTURES
        # PTX of 9.0a would run on no other GPU.
        assert known_architectures(ARCHITECTURES, CUDA_12_0) == ("8.0", "8.6", "8.9+PTX", "9.0a")
        assert known_architectures(["8.0", "9.0a"], CUDA_13) == ("8.0", "9.0a")
        assert known_architectures(ARCHITECTURES, "") == ()

    def test_choice(self) -> None:
        assert choose_architectures({}, CUDA_13) == ARCHITECTURES
        assert choose_architectures({}, CUDA_13, [(9, 0), (8, 6), (8, 6), (7, 5)]) == ("8.6", "9.0a")
        assert choose_architectures({}, CUDA_13, [(7, 5)]) == ARCHITECTURES
        assert choose_architectures({"TORCH_CUDA_ARCH_LIST": "8.9"}, CUDA_13, [(9, 0)]) == ("8.9",)
        with pytest.raises(BuildError, match="set TORCH_CUDA_ARCH_LIST"):
            choose_architectures({}, "compute_70")

    def test_a_gpu_that_is_newer_than_the_compiler(self) -> None:
        chosen = choose_architectures({}, CUDA_12_0, [(12, 0)])
        assert chosen == known_architectures(ARCHITECTURES, CUDA_12_0)
        assert covers(chosen, (12, 0))
        both = choose_architectures({}, CUDA_12_0, [(9, 0), (12, 0)])
        assert all(covers(both, capability) for capability in ((9, 0), (12, 0)))

    @pytest.mark.parametrize(
        ("built", "capability", "runs"),
        [
            (("8.0",), (8, 0), True),
            (("8.0",), (8, 9), True),
            (("8.6",), (8, 0), False),
            (("8.0",), (9, 0), False),
            (("8.0+PTX",), (9, 0), True),
            (("9.0a",), (9, 0), True),
            (("9.0a",), (10, 0), False),
            (("9.0a+PTX",), (10, 0), False),
            (("10.0a",), (10, 3), False),
            (("10.0",), (10, 3), True),
            (ARCHITECTURES, (12, 0), True),
            (ARCHITECTURES, (8, 7), True),
            ((), (8, 0), False),
        ],
    )
    def test_what_runs_where(self, built: tuple[str, ...], capability: tuple[int, int], runs: bool) -> None:
        assert covers(built, capability) is runs


class TestJobs:
    @pytest.mark.parametrize(
        ("environ", "cores", "gib", "expected"),
        [
            ({}, 16, 64, 16),
            ({}, 16, 10, 4),
            ({}, 2, 10, 2),
            ({}, 8, 1, 1),
            ({}, 8, None, 8),
            ({"MAX_JOBS": "3"}, 16, 64, 3),
            ({"MAX_JOBS": "3"}, 1, 1, 3),
            ({"MAX_JOBS": "0"}, 4, 64, 4),
            ({"MAX_JOBS": "many"}, 4, 64, 4),
        ],
    )
    def test_bounded_by_cores_and_memory(
        self, environ: dict[str, str], cores: int, gib: float | None, expected: int
    ) -> None:
        assert jobs(environ, cores, None if gib is None else gib * GIB) == expected

    def test_free_memory(self, tmp_path: Path) -> None:
        meminfo = tmp_path / "meminfo"
        assert build.free_memory(meminfo, tmp_path) is None
        meminfo.write_text("MemTotal: 1 kB\nMemAvailable:   8388608 kB\n")
        assert build.free_memory(meminfo, tmp_path) == 8 * GIB
        (tmp_path / "memory.max").write_text("max\n")
        assert build.free_memory(meminfo, tmp_path) == 8 * GIB
        (tmp_path / "memory.max").write_text(f"{6 * GIB}\n")
        (tmp_path / "memory.current").write_text(f"{GIB}\n")
        assert build.free_memory(meminfo, tmp_path) == 5 * GIB


class TestPlan:
    def test_for_gpus(self, root: Path) -> None:
        plan = build.plan(root / "csrc", ("8.0", "9.0a"), toolkit=Path("/nowhere"))
        assert {path.stem for path in plan.sources} == {"bindings"} | {
            name for name in ops.__all__ if (root / "fastden" / "ops" / f"{name}.py").is_file()
        }
        assert "-DFASTDEN_HOPPER" in plan.nvcc_flags
        assert set(gencode(("8.0", "9.0a"))) < set(plan.nvcc_flags)
        assert not plan.emulated
        assert "-DFASTDEN_HOPPER" not in build.plan(root / "csrc", ("8.0", "9.0")).nvcc_flags
        listed = build.plan(root / "csrc", parse_architectures("7.5 9.0")).nvcc_flags
        assert {"-DFASTDEN_HOPPER", "-gencode=arch=compute_90a,code=sm_90a"} < set(listed)

    def test_emulated(self, root: Path) -> None:
        plan = build.plan(root / "csrc", emulator=root / "tests" / "emulator", toolkit=Path("/nowhere"))
        assert plan.emulated
        assert plan.nvcc_flags == plan.architectures == ()
        assert "-DFASTDEN_EMULATED" in plan.cxx_flags
        assert set((root / "tests" / "emulator").glob("*.cpp")) < set(plan.sources)
        assert Path("/nowhere/include") in plan.include

    def test_key(self, root: Path, tmp_path: Path) -> None:
        """All that changes the library changes the key; the commit changes neither."""
        here = {"torch": "2.13.0", "cuda": "13.0", "python": "cpython-311"}
        shutil.copytree(root / "csrc", tmp_path / "csrc")
        keys = {build.plan(tmp_path / "csrc", ("8.0",)).key(here)}
        assert keys == {build.plan(root / "csrc", ("8.0",)).key(here)}
        keys |= {build.plan(tmp_path / "csrc", ("8.6",)).key(here)}
        keys |= {build.plan(tmp_path / "csrc", ("8.0",)).key(here | {name: "x"}) for name in here}
        with (tmp_path / "csrc" / "fastden.h").open("a") as header:
            header.write("\n")
        keys |= {build.plan(tmp_path / "csrc", ("8.0",)).key(here)}
        assert len(keys) == 6

    def test_no_sources(self, tmp_path: Path) -> None:
        with pytest.raises(BuildError, match="holds no CUDA sources"):
            build.plan(tmp_path)


class TestMissing:
    @pytest.fixture
    def cuda_torch(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(build, "environment", lambda: {"torch": "2.13.0", "cuda": "13.0", "python": "x"})

    def test_toolkit(self, tmp_path: Path) -> None:
        first, second = toolkit(tmp_path / "a"), toolkit(tmp_path / "b")
        path = {"PATH": str(second / "bin")}
        assert build.find_toolkit({"CUDA_HOME": str(first), **path}) == first
        assert build.find_toolkit({"CUDA_PATH": str(first), **path}) == first
        assert build.find_toolkit(path) == second
        # The headers do not lie beside a script that calls nvcc.
        program(tmp_path / "bin" / "nvcc", "exit 0")
        assert build.find_toolkit({"PATH": str(tmp_path / "bin")}) in (None, Path("/usr/local/cuda"))

    @pytest.mark.usefixtures("cuda_torch")
    def test_nothing(self, tmp_path: Path) -> None:
        pytest.importorskip("ninja")
        assert build.missing(toolkit(tmp_path / "cuda")) == []

    @pytest.mark.usefixtures("cuda_torch")
    def test_everything(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(build, "_path", lambda: str(tmp_path))
        assert build.missing(None) == [
            "nvcc is not found (CUDA_HOME, PATH, /usr/local/cuda)",
            "ninja is not found (pip install ninja)",
        ]

    @pytest.mark.usefixtures("cuda_torch")
    def test_another_cuda(self, tmp_path: Path) -> None:
        reasons = build.missing(toolkit(tmp_path / "cuda", "12.8"))
        assert reasons[0] == "nvcc is of CUDA 12.8, PyTorch of CUDA 13.0; accepted: the same major version"

    def test_torch(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(build, "environment", lambda: {"torch": "2.13.0+cpu", "cuda": "none", "python": "x"})
        assert build.missing(toolkit(tmp_path / "cuda"))[0] == "this PyTorch is not a CUDA build"
        monkeypatch.setitem(sys.modules, "torch", None)
        monkeypatch.undo()
        monkeypatch.setitem(sys.modules, "torch", None)
        assert build.missing(None)[1].startswith("PyTorch cannot be imported (ModuleNotFoundError")


@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")
def test_a_failed_build_leaves_nothing(tmp_path: Path) -> None:
    pytest.importorskip("ninja")
    (tmp_path / "csrc").mkdir()
    (tmp_path / "emulator").mkdir()
    (tmp_path / "csrc" / "bindings.cpp").write_text("#error this cannot be compiled\n")
    (tmp_path / "csrc" / "a.cu").touch()
    plan = build.plan(tmp_path / "csrc", emulator=tmp_path / "emulator")
    with pytest.raises(BuildError, match=r"building the CUDA extension failed \(exit code 1\)") as caught:
        build.build(plan, tmp_path / "out")
    assert "this cannot be compiled" in caught.value.output
    assert list((tmp_path / "out").iterdir()) == []


def test_bindings_compile_for_a_gpu(root: Path, tmp_path: Path) -> None:
    """Check syntax and types of the branch that the emulated build leaves out; PyTorch's CPU build allows no more."""
    include = Path(torch.__file__).parent / "include"
    cuda = build.find_toolkit()
    if cuda is None or shutil.which("g++") is None or not (include / "c10" / "cuda" / "CUDAGuard.h").is_file():
        pytest.skip("needs g++, the CUDA toolkit's headers, and PyTorch's headers for CUDA")
    # PyTorch generates this header in its CUDA builds; it holds the macros that its libraries are built with.
    generated = tmp_path / "c10" / "cuda" / "impl" / "cuda_cmake_macros.h"
    generated.parent.mkdir(parents=True)
    generated.touch()
    folders = (include, include / "torch" / "csrc" / "api" / "include", cuda / "include", tmp_path)
    done = subprocess.run(
        [
            "g++", "-fsyntax-only", "-std=c++20", "-Wall", "-Wextra", "-Werror", '-DFASTDEN_BUILD="{}"',
            "-DTORCH_EXTENSION_NAME=_cuda", f"-I{root / 'csrc'}", "-isystem", sysconfig.get_path("include"),
            *(part for folder in folders for part in ("-isystem", str(folder))), str(root / "csrc" / "bindings.cpp"),
        ],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def setup(root: Path, choice: str, **environ: str) -> subprocess.CompletedProcess[str]:
    variables = {**os.environ, "FASTDEN_BUILD": choice, **environ}
    command = [sys.executable, "setup.py", "--name"]
    return subprocess.run(command, capture_output=True, text=True, env=variables, check=False, cwd=root)


class TestSetup:
    def test_unknown_choice(self, root: Path) -> None:
        assert setup(root, "fast").stderr.endswith("FASTDEN_BUILD: 'fast'; accepted: auto, cuda, none\n")

    def test_an_empty_choice_counts_as_auto(self, root: Path, tmp_path: Path) -> None:
        (tmp_path / "torch.py").write_text("raise ImportError('No module named torch')\n")
        done = setup(root, "", PYTHONPATH=str(tmp_path))
        assert (done.returncode, done.stdout) == (0, "fastden\n"), done.stderr

    def test_none_imports_no_torch(self, root: Path, tmp_path: Path) -> None:
        (tmp_path / "torch.py").write_text("raise SystemExit('torch was imported')\n")
        done = setup(root, "none", PYTHONPATH=str(tmp_path))
        assert (done.returncode, done.stdout) == (0, "fastden\n"), done.stderr

    def test_cuda_says_what_is_missing(self, root: Path, tmp_path: Path) -> None:
        (tmp_path / "torch.py").write_text("__version__ = '2.13.0+cpu'\nclass version:\n    cuda = None\n")
        done = setup(root, "cuda", PYTHONPATH=str(tmp_path))
        assert done.returncode != 0
        assert "'cuda', but the CUDA extension cannot be built:" in done.stderr
        assert "this PyTorch is not a CUDA build" in done.stderr

    def test_isolated_builds_work(self, root: Path, tmp_path: Path) -> None:
        """Where there is no PyTorch, auto makes a pure package."""
        (tmp_path / "torch.py").write_text("raise ImportError('No module named torch')\n")
        assert setup(root, "auto", PYTHONPATH=str(tmp_path)).stdout == "fastden\n"
