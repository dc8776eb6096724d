"""The package as a user gets it: a wheel built from a copy of the tree, installed elsewhere, imported from outside."""

from __future__ import annotations

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


@pytest.fixture(scope="module")
def wheel(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy: setuptools leaves files beside the sources, and takes stale ones from there."""
    source = tmp_path_factory.mktemp("source") / "fastden"
    source.mkdir()
    for path in root.iterdir():
        if path.is_file():
            shutil.copy(path, source)
    for name in filter(lambda name: (root / name).is_dir(), COPIED):
        shutil.copytree(root / name, source / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    target = tmp_path_factory.mktemp("wheel")
    built = run(
        sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index", "-w", target, source
    )
    assert built.returncode == 0, built.stderr
    (found,) = target.glob("fastden-*.whl")
    return found


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


def test_typing_marker_and_every_weights_file_are_in_the_wheel(root: Path, names: set[str]) -> None:
    weights = {path.relative_to(root).as_posix() for path in (root / "fastden" / "weights").glob("*/*")}
    assert {"fastden/py.typed"} | weights == {
        name for name in names if name.startswith("fastden/") and not name.endswith(".py")
    }


def test_nothing_but_the_package_is_in_the_wheel(wheel: Path, names: set[str]) -> None:
    assert {name.split("/")[0] for name in names} == {"fastden", f"fastden-{version(wheel)}.dist-info"}


def test_wheel_declares_the_command_and_carries_the_licence(wheel: Path) -> None:
    metadata = f"fastden-{version(wheel)}.dist-info"
    with ZipFile(wheel) as archive:
        assert "fastden = fastden.cli:app" in archive.read(f"{metadata}/entry_points.txt").decode()
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


def test_kernels_refuse_to_be_imported_from_the_checkout(root: Path) -> None:
    done = run(sys.executable, "-c", "import kernels", cwd=root)
    assert done.returncode != 0
    assert "pip install -e ." in done.stderr
    assert "fastden.kernels" in done.stderr


@pytest.mark.parametrize(("value", "message"), [("cuda", "ships no CUDA sources"), ("cudda", "accepted: auto, cuda")])
def test_build_choice_that_cannot_be_met_is_refused(root: Path, tmp_path: Path, value: str, message: str) -> None:
    shutil.copy(root / "setup.py", tmp_path)
    done = run(sys.executable, "setup.py", "--name", cwd=tmp_path, env={**os.environ, "FASTDEN_BUILD": value})
    assert done.returncode != 0
    assert f"FASTDEN_BUILD: {value!r}" in done.stderr
    assert message in done.stderr
