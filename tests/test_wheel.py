"""The package as a user gets it: a wheel built from a copy of the tree, installed elsewhere, imported from outside."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from zipfile import ZipFile

import pytest

COPIED = ("fastden", "kernels", "csrc", "tests", "benchmarks", "examples")


def run(*command: str | Path, **options: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False, **options)  # type: ignore[call-overload]


def version(wheel: Path) -> str:
    return wheel.name.split("-")[1]


def copied(root: Path, source: Path) -> Path:
    """A copy of the tree: setuptools leaves files beside sources, and takes stale ones."""
    source.mkdir()
    for path in root.iterdir():
        if path.is_file():
            shutil.copy(path, source)
    ignored = shutil.ignore_patterns("__pycache__", "*.egg-info", "*.so", "_cuda.json")
    for name in filter(lambda name: (root / name).is_dir(), COPIED):
        shutil.copytree(root / name, source / name, ignore=ignored)
    return source


def pip_wheel(source: Path, target: Path, **environ: str) -> subprocess.CompletedProcess[str]:
    return run(
        sys.executable, "-m", "pip", "wheel", "-v", "--no-deps", "--no-build-isolation", "--no-index", "-w", target,
        source, env={**os.environ, **environ},
    )  # fmt: skip


def build_wheel(root: Path, folder: Path, **environ: str) -> tuple[Path, str]:
    """The wheel, and the output."""
    target = folder / "wheel"
    built = pip_wheel(copied(root, folder / "fastden"), target, **environ)
    assert built.returncode == 0, built.stdout + built.stderr
    (found,) = target.glob("fastden-*.whl")
    return found, built.stdout + built.stderr


@pytest.fixture(scope="module")
def wheel(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_wheel(root, tmp_path_factory.mktemp("source"), FASTDEN_BUILD="none")[0]


@pytest.fixture(scope="module")
def names(wheel: Path) -> set[str]:
    with ZipFile(wheel) as archive:
        return set(archive.namelist())


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("installed")
    done = run(sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--target", target, wheel)
    assert done.returncode == 0, done.stderr
    return target


def test_wheel_is_pure_python(wheel: Path) -> None:
    assert wheel.name.endswith("-py3-none-any.whl")


def test_every_module_is_in_the_wheel(root: Path, names: set[str]) -> None:
    modules = {path.relative_to(root).as_posix() for path in (root / "fastden").rglob("*.py")}
    modules |= {f"fastden/{path.relative_to(root).as_posix()}" for path in (root / "kernels").rglob("*.py")}
    assert modules == {name for name in names if name.endswith(".py")}


def test_typing_marker_weights_and_cuda_sources_are_in_the_wheel(root: Path, names: set[str]) -> None:
    """Nothing else is in it: no library, no emulator."""
    weights = {path.relative_to(root).as_posix() for path in (root / "fastden" / "weights").glob("*/*")}
    sources = {f"fastden/_csrc/{path.name}" for path in (root / "csrc").iterdir() if path.suffix != ".md"}
    assert "fastden/_csrc/bindings.cpp" in sources
    assert {"fastden/py.typed", "fastden/integrations/napari.yaml", "fastden/ui/compare.js"} | weights | sources == {
        name for name in names if name.startswith("fastden/") and not name.endswith(".py")
    }


def test_nothing_but_the_package_is_in_the_wheel(wheel: Path, names: set[str]) -> None:
    assert {name.split("/")[0] for name in names} == {"fastden", f"fastden-{version(wheel)}.dist-info"}


def test_wheel_declares_the_command_and_carries_the_licence(wheel: Path) -> None:
    metadata = f"fastden-{version(wheel)}.dist-info"
    with ZipFile(wheel) as archive:
        assert "fastden = fastden.__main__:main" in archive.read(f"{metadata}/entry_points.txt").decode()
        assert "Apache License" in archive.read(f"{metadata}/licenses/LICENSE").decode()


def test_installed_package_works_outside_the_repository(wheel: Path, installed: Path, tmp_path: Path) -> None:
    script = """
import sys
import fastden, fastden.kernels

assert "torch" not in sys.modules, "importing fastden loaded PyTorch"
model = fastden.Denoiser().eval()
import torch

assert not torch.cuda.is_initialized(), "making a network started CUDA"
y = model(torch.rand(1, 3, 9, 7), 0.1)
assert y.shape == (1, 3, 9, 7) and bool(torch.isfinite(y).all())
print(fastden.__file__, fastden.kernels.__file__, fastden.__version__, sep="\\n")
"""
    done = run(sys.executable, "-c", script, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(installed)})
    assert done.returncode == 0, done.stderr
    package = installed / "fastden"
    assert done.stdout.split() == [
        str(package / "__init__.py"),
        str(package / "kernels" / "__init__.py"),
        version(wheel),
    ]


def test_cuda_sources_are_found_in_the_installed_package(installed: Path, tmp_path: Path) -> None:
    """``fastden build`` finds all that the machine has."""
    script = (
        "from fastden.cuda import build, extension; print(build.plan(extension.sources(), toolkit='/x').sources[0])"
    )
    done = run(sys.executable, "-c", script, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(installed)})
    assert done.stdout.strip() == str(installed / "fastden" / "_csrc" / "bindings.cpp"), done.stderr


TORCH = """
__version__ = "2.99.0+cu130"
class version:
    cuda = "13.0"
"""
LOAD = """
import pathlib
def load(name, sources, extra_cflags, extra_cuda_cflags, extra_include_paths, build_directory, with_cuda):
    assert with_cuda and all(pathlib.Path(source).is_file() for source in sources)
    assert "-gencode=arch=compute_90a,code=sm_90a" in extra_cuda_cflags
    (pathlib.Path(build_directory) / f"{name}.so").write_text("a library")
    class Module:
        @staticmethod
        def build_config():
            return {"torch": "2.99.0+cu130", "cuda": "13.0", "python": "any", "architectures": ["9.0a"]}
    return Module
"""


@pytest.fixture(scope="module")
def gpu_machine(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """An environment that has what the extension needs: PyTorch and nvcc are stand-ins."""
    folder = tmp_path_factory.mktemp("machine")
    package = {"__init__.py": TORCH, "utils/__init__.py": "", "utils/cpp_extension.py": LOAD}
    for name, text in package.items():
        path = folder / "site" / "torch" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    nvcc = folder / "cuda" / "bin" / "nvcc"
    (folder / "cuda" / "include").mkdir(parents=True)
    (folder / "cuda" / "include" / "cuda_runtime_api.h").touch()
    nvcc.parent.mkdir()
    listed = "compute_80 compute_90 compute_100"
    nvcc.write_text(f'#!/bin/sh\n[ "$1" = --version ] && echo "release 13.0, V13.0.1" || echo {listed}\n')
    nvcc.chmod(0o755)
    environ = {"PYTHONPATH": str(folder / "site"), "CUDA_HOME": str(folder / "cuda"), "FASTDEN_BUILD": "auto"}
    for variable in ("TORCH_CUDA_ARCH_LIST", "MAX_JOBS"):
        environ[variable] = ""
    return environ


@pytest.fixture(scope="module")
def built(root: Path, gpu_machine: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A wheel with the extension, as setuptools sees it."""
    folder = tmp_path_factory.mktemp("built")
    wheel, _ = build_wheel(root, folder, **gpu_machine)
    target = folder / "installed"
    done = run(sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--target", target, wheel)
    assert done.returncode == 0, done.stderr
    return wheel, target


def test_a_built_wheel_holds_the_extension_and_its_description(built: tuple[Path, Path]) -> None:
    wheel, _ = built
    assert not wheel.name.endswith("-any.whl")
    with ZipFile(wheel) as archive:
        libraries = [name for name in archive.namelist() if name.endswith(".so")]
        assert len(libraries) == 1
        assert libraries[0].startswith("fastden/_cuda.cpython-")
        assert json.loads(archive.read("fastden/_cuda.json"))["torch"] == "2.99.0+cu130"


def test_an_extension_of_another_torch_says_so(built: tuple[Path, Path], tmp_path: Path) -> None:
    # The made-up library knows nothing of the sources that it would be built from.
    description = built[1] / "fastden" / "_cuda.json"
    script = "from fastden.cuda import build, extension; print(build.digest([extension.sources()]))"
    environ = {**os.environ, "PYTHONPATH": str(built[1]), "TORCH_EXTENSIONS_DIR": str(tmp_path)}
    digest = run(sys.executable, "-c", script, cwd=tmp_path, env=environ).stdout.strip()
    description.write_text(json.dumps({**json.loads(description.read_text()), "sources": digest}))
    done = run(sys.executable, "-m", "fastden.info", cwd=tmp_path, env=environ)
    assert "built for torch 2.99.0+cu130 / CUDA 13.0; this is torch" in done.stdout, done.stdout + done.stderr


def test_an_editable_installation_has_the_description(root: Path, gpu_machine: dict[str, str], tmp_path: Path) -> None:
    """Without it the library in the checkout would not be found."""
    source = copied(root, tmp_path / "fastden")
    done = run(sys.executable, "setup.py", "build_ext", "--inplace", cwd=source, env={**os.environ, **gpu_machine})
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(list((source / "fastden").glob("_cuda.*.so"))) == 1
    assert json.loads((source / "fastden" / "_cuda.json").read_text())["torch"] == "2.99.0+cu130"


def test_auto_installs_without_an_extension_that_does_not_compile(
    root: Path, gpu_machine: dict[str, str], tmp_path: Path
) -> None:
    source, environ = copied(root, tmp_path / "fastden"), gpu_machine | {"TORCH_CUDA_ARCH_LIST": "7.5"}
    done = pip_wheel(source, tmp_path / "auto", **environ)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "fastden: pure Python, without the CUDA extension: TORCH_CUDA_ARCH_LIST: '7.5'" in done.stdout + done.stderr
    (wheel,) = (tmp_path / "auto").glob("fastden-*.whl")
    with ZipFile(wheel) as archive:
        names = archive.namelist()
    assert "fastden/__init__.py" in names
    assert not [name for name in names if name.startswith("fastden/_cuda")]
    done = pip_wheel(source, tmp_path / "cuda", **environ | {"FASTDEN_BUILD": "cuda"})
    assert done.returncode != 0
    assert "error: TORCH_CUDA_ARCH_LIST: '7.5'" in done.stdout + done.stderr


def test_auto_says_in_one_line_why_nothing_is_built(root: Path, tmp_path: Path) -> None:
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "torch.py").write_text(TORCH.replace('"13.0"', "None"))
    wheel, shown = build_wheel(root, tmp_path, PYTHONPATH=str(tmp_path / "site"), FASTDEN_BUILD="auto")
    assert wheel.name.endswith("-py3-none-any.whl")
    (line,) = {line.strip() for line in shown.splitlines() if "without the CUDA extension" in line}
    assert line.startswith("fastden: pure Python, without the CUDA extension: ")
    assert "this PyTorch is not a CUDA build" in line


def test_kernels_refuse_to_be_imported_from_the_checkout(root: Path) -> None:
    done = run(sys.executable, "-c", "import kernels", cwd=root)
    assert done.returncode != 0
    assert "pip install -e ." in done.stderr
    assert "fastden.kernels" in done.stderr
