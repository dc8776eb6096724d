"""The code of the page *Use it from ...* runs."""

from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.integrations.installed import torchvision

PAGE = Path(__file__).resolve().parents[2] / "docs" / "use-from.md"
SECTIONS = dict(re.findall(r"^## (.*)\n([\s\S]*?)(?=^## |\Z)", PAGE.read_text(), re.MULTILINE))
#: The lines of Python of each library.
BLOCKS = {
    title: "\n".join(re.findall(r"^```py\n([\s\S]*?)^```", text, re.MULTILINE)) for title, text in SECTIONS.items()
}
BLOCKS = {title: block for title, block in BLOCKS.items() if block}


def test_every_library_has_lines() -> None:
    wanted = {"ONNX Runtime", "OpenVINO", "PyTorch without fastden", "deepinv", "spandrel", "torchvision", "datasets"}
    assert wanted <= set(BLOCKS)


@pytest.mark.parametrize("title", list(BLOCKS))
def test_the_lines_run(title: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if title in ("deepinv", "spandrel", "torchvision"):
        torchvision()
    names = {"ONNX Runtime": "onnxruntime", "scikit-image": "skimage", "PyTorch without fastden": "torch"}
    package = names.get(title, title.lower())
    if find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    monkeypatch.chdir(tmp_path)
    if title == "datasets":
        import datasets

        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    exec(BLOCKS[title], {})
