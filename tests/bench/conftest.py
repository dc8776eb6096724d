"""``benchmarks/prove.py``, and a repository that it works in."""

from __future__ import annotations

import shutil
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


class Checkout:
    """A repository with the kernels' sources at a commit, and an empty table."""

    def __init__(self, root: Path, folder: Path, command: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self.command, self.monkeypatch = folder, command, monkeypatch
        for path in command.PATHS:
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (shutil.copytree if (root / path).is_dir() else shutil.copy)(root / path, folder / path)
        self.git("init", "--quiet")
        self.git("add", ".")
        self.git("commit", "--quiet", "--message", "kernels")
        self.commit = self.git("rev-parse", "--short", "HEAD").strip()
        self.table = folder / "proven.py"
        shutil.copy(command.TABLE, self.table)
        command.write({}, self.table)
        monkeypatch.setattr(command, "ROOT", folder)
        monkeypatch.setattr(command, "TABLE", self.table)

    def git(self, *words: str) -> str:
        command = ["git", "-C", str(self.folder), "-c", "user.name=a", "-c", "user.email=a@example.org", *words]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout

    def replace(self, file: str, old: str, new: str) -> None:
        text = (self.folder / file).read_text()
        assert old in text
        (self.folder / file).write_text(text.replace(old, new))

    def prove(self, *arguments: str) -> int:
        """Call ``prove.py``."""
        self.monkeypatch.setattr(self.command, "PROVEN", self.proven())
        self.monkeypatch.setattr(sys, "argv", ["prove.py", *arguments])
        return int(self.command.main())

    def proven(self) -> dict[Any, Any]:
        read: dict[str, Any] = {}
        exec(self.table.read_text(), read)
        return dict(read["PROVEN"])

    def digests(self) -> dict[str, str]:
        kernels = {"cuda": "csrc/*.cu", "triton": "kernels/[!_]*.py"}
        return {
            f"{backend} {path.stem}": self.command.digest(self.folder, backend, path.stem, (9, 0))
            for backend, pattern in kernels.items()
            for path in self.folder.glob(pattern)
        }


@pytest.fixture
def checkout(root: Path, tmp_path: Path, command: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Checkout:
    return Checkout(root, tmp_path, command, monkeypatch)
