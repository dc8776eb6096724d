"""The worked example of CONTRIBUTING runs: its files, added to the tree, pass the tests that it gives."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

#: The example adds files to these folders: they become folders of links, the others become links.
OPENED = {
    "fastden/ops": "fastden/ops",
    "fastden/kernels": "kernels",
    "tests/ops": "tests/ops",
    "tests/kernels": "tests/kernels",
}


class Block(NamedTuple):
    """A code block of the page: its file, whether it extends an existing file, and its text."""

    file: str
    added: bool
    text: str


def blocks(root: Path) -> list[Block]:
    page = (root / "CONTRIBUTING.md").read_text()
    found = re.findall(r"^```python\n# ([\w/]+\.py)(, added)?\n(.*?)^```", page, re.DOTALL | re.MULTILINE)
    return [Block(file, bool(added), text) for file, added, text in found]


def copy_by_links(root: Path, target: Path) -> None:
    """Make links to the package and its tests; the package has ``kernels`` inside, as when it is installed."""
    for folder in ("fastden", "tests", *OPENED):
        (target / folder).mkdir(parents=True, exist_ok=True)
        for entry in (root / OPENED.get(folder, folder)).iterdir():
            place = target / folder / entry.name
            if entry.name != "__pycache__" and not place.exists() and f"{folder}/{entry.name}" not in OPENED:
                place.symlink_to(entry)


def test_the_example_has_every_part(root: Path) -> None:
    files = [block.file for block in blocks(root)]
    assert files == [
        "fastden/ops/blend.py",
        "fastden/ops/__init__.py",
        "tests/ops/test_blend.py",
        "kernels/blend.py",
        "fastden/ops/blend.py",
        "tests/kernels/test_blend.py",
    ]


def test_the_reference_of_its_first_step_runs(root: Path) -> None:
    names: dict[str, object] = {}
    exec(blocks(root)[0].text, names)
    x, y = torch.rand(1, 3, 2, 2), torch.rand(1, 3, 2, 2)
    torch.testing.assert_close(names["blend"](x, y, 0.25), 0.75 * x + 0.25 * y)  # type: ignore[operator]


@pytest.mark.slow
def test_the_example_passes_its_own_tests(root: Path, tmp_path: Path) -> None:
    pytest.importorskip("triton")
    copy_by_links(root, tmp_path)
    for block in blocks(root):
        path = tmp_path / block.file.replace("kernels/", "fastden/kernels/", int(block.file.startswith("kernels/")))
        text = path.read_text() + block.text if block.added else block.text
        path.unlink(missing_ok=True)  # never through a link
        path.write_text(text)
    tests = [block.file for block in blocks(root) if block.file.startswith("tests/")]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-c", root / "pyproject.toml",
         "--rootdir", tmp_path, *tests],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(tmp_path), "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed is not None
    assert int(passed[1]) == 8
