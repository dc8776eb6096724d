"""Text files are read and written in an encoding that is named: the system's own is another one on Windows."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest


def without_encoding(path: Path) -> list[str]:
    """Where a file opens text and names no encoding."""
    lines = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.Call) or any(keyword.arg == "encoding" for keyword in node.keywords):
            continue
        name = getattr(node.func, "attr", getattr(node.func, "id", ""))
        modes = [argument.value for argument in node.args[1:2] if isinstance(argument, ast.Constant)]
        binary = any("b" in str(mode) for mode in modes)
        if name in ("read_text", "write_text") or (isinstance(node.func, ast.Name) and name == "open" and not binary):
            lines.append(f"{path}:{node.lineno}")
    return lines


def test_encodings_are_named(root: Path) -> None:
    files = [
        path
        for folder in ("fastden", "kernels", "scripts", "benchmarks", "examples")
        for path in (root / folder).rglob("*.py")
    ]
    assert len(files) > 100
    assert not [line for path in files for line in without_encoding(path)]


@pytest.mark.skipif(sys.platform == "win32", reason="its encoding is no locale's")
def test_a_configuration_where_the_locale_is_ascii(root: Path, tmp_path: Path) -> None:
    for package in ("pydantic", "yaml"):
        pytest.importorskip(package)
    file = tmp_path / "train.yaml"
    file.write_text("data: [Fotos für später]\noutput: läuft\n", encoding="utf-8-sig")
    code = (
        "import sys; from pathlib import Path; from fastden.training.config import load_config;"
        "print(ascii(load_config(Path(sys.argv[1]), []).output.name))"
    )
    environment = {**os.environ, "PYTHONPATH": str(root), "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = subprocess.run(
        [sys.executable, "-c", code, file], capture_output=True, text=True, env=environment, check=False, cwd=tmp_path
    )
    assert done.stdout == "'l\\xe4uft'\n", done.stderr
