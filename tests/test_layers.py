"""import-linter does not see kernels/, which lies outside fastden/. Its contracts are in pyproject.toml."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
from collections import Counter
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
import torch

from fastden.ops import _library

KERNELS = "fastden.kernels"


def imports(path: Path) -> set[str]:
    """The modules of fastden that a file imports anywhere."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.update((f"{node.module}.{alias.name}" for alias in node.names), [node.module])
    return {name for name in names if name.split(".")[0] in ("fastden", "kernels")}


def test_a_kernel_imports_its_siblings_alone(root: Path) -> None:
    files = sorted((root / "kernels").glob("*.py"))
    assert len(files) > 5
    others = {file.name: [name for name in imports(file) if not name.startswith(KERNELS)] for file in files}
    assert not {file: names for file, names in others.items() if names}


def test_kernels_make_no_circle(root: Path) -> None:
    files = {f"{KERNELS}.{file.stem}": file for file in (root / "kernels").glob("*.py")}
    graph = {name: imports(file) & files.keys() for name, file in files.items()}
    assert len(list(TopologicalSorter(graph).static_order())) == len(files)  # a circle raises CycleError


def test_operators_alone_import_kernels(root: Path) -> None:
    importers = {
        file.relative_to(root / "fastden").parts[0]
        for file in (root / "fastden").rglob("*.py")
        if any(name.startswith(KERNELS) for name in imports(file))
    }
    assert importers == {"ops"}


def test_a_file_name_occurs_once(root: Path) -> None:
    """Only operators repeat a file name: the function in fastden/ops/, its Triton kernel in kernels/."""
    counts = Counter(file.name for file in (root / "fastden").rglob("*.py"))
    counts.pop("__init__.py")
    assert {name for name, count in counts.items() if count > 1} == set()
    operators = {file.name for file in (root / "fastden/ops").glob("[!_]*.py")}
    kernels = {file.name for file in (root / "kernels").glob("*.py")} - {"__init__.py"}
    assert kernels & counts.keys() <= operators


@pytest.mark.parametrize(
    ("file", "line", "contract"),
    [
        ("network/padding.py", "from fastden.inference import tiling", "Imports point down"),
        ("video/copy.py", "import fastden.batch.plan", "Imports point down"),
        ("images/pixels.py", "from fastden.ops import stem", "Imports point down"),
        ("batch/plan.py", "from fastden.batch.denoiser import BatchDenoiser", "No circles"),
    ],
)
def test_a_wrong_import_fails(root: Path, tmp_path: Path, file: str, line: str, contract: str) -> None:
    shutil.copytree(root / "fastden", tmp_path / "fastden", ignore=shutil.ignore_patterns("weights", "__pycache__"))
    shutil.copy(root / "pyproject.toml", tmp_path)
    with (tmp_path / "fastden" / file).open("a") as text:
        text.write(f"\n\ndef added() -> None:\n    {line}\n")
    command = [str(Path(sys.executable).with_name("lint-imports")), "--no-cache"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stdout + done.stderr
    assert f"{contract} BROKEN" in done.stdout


def test_an_operator_has_its_name_everywhere(root: Path) -> None:
    """A form of an operator begins with its name: batch_norm_affine is in the files batch_norm."""
    files = [file.stem for file in (root / "fastden/ops").glob("[!_]*.py")]
    # The last is no operator of the dispatcher.
    registered = {*_library.names(), "network_input"}
    homes = {name: max((file for file in files if f"{name}_".startswith(f"{file}_")), key=len) for name in registered}
    assert {"conv_bn_relu", "concat_conv_bn_relu", "weight_gradient", "batch_norm"} <= set(homes.values())
    places = ("fastden/ops/{}.py", "tests/ops/test_{}.py", "benchmarks/bench_{}.py")
    lacking = [place.format(home) for home in set(homes.values()) for place in places]
    lacking += [f"kernels/{home}.py" for name, home in homes.items() if hasattr(torch.ops.fastden, name)]
    # A suite would refuse to compare this, which rounds otherwise than its rivals: first_checks.py times it.
    lacking.remove("benchmarks/bench_concat_conv_fp8.py")
    # The cuda backend has operators for inference alone.
    bound = re.findall(r'library\.impl\("(\w+)"', (root / "csrc/bindings.cpp").read_text())
    assert set(bound) <= registered
    lacking += [f"csrc/{name}.cu" for name in bound]
    assert [path for path in lacking if not (root / path).is_file()] == []
