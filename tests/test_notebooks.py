"""The notebooks of ``examples/`` run from beginning to end, and are committed without outputs."""

from __future__ import annotations

import io
from base64 import b64decode
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.image_files import pixels

nbclient = pytest.importorskip("nbclient")
nbformat = pytest.importorskip("nbformat")

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
NOTEBOOKS = sorted(EXAMPLES.glob("*.ipynb"))


def test_the_notebooks_are_there() -> None:
    assert {path.stem for path in NOTEBOOKS} == {"denoiser_for_your_classifier", "your_photograph"}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_no_output_is_committed(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    assert all(not cell.get("outputs") and not cell.get("execution_count") for cell in notebook.cells)


def run(notebook: Any, folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The outputs of a notebook that is run in a folder; a cell that raises ends it with its error."""
    # The kernel is a process of its own, and inherits these.
    monkeypatch.setenv("IPYTHONDIR", str(folder / "ipython"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # the notebook promises two minutes on one core
    nbclient.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(folder)}}).execute()
    return [output for cell in notebook.cells for output in cell.get("outputs", [])]


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run(nbformat.read(path, as_version=4), tmp_path, monkeypatch)


@pytest.mark.slow
def test_a_gray_photograph_of_sixteen_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """PIL cuts off values above 255 where it makes RGB of them: white squares without noise."""
    gray = pixels(400, 440, 0, np.uint16) // 16  # 12 bits
    Image.fromarray(gray).save(tmp_path / "gray.png")
    notebook = nbformat.read(EXAMPLES / "your_photograph.ipynb", as_version=4)
    code = next(cell for cell in notebook.cells if "PHOTOGRAPH = None" in cell.source)
    code.source = code.source.replace("PHOTOGRAPH = None", "PHOTOGRAPH = 'gray.png'")
    outputs = run(notebook, tmp_path, monkeypatch)
    assert "in the mid-tones" in str(outputs)
    images = [output["data"]["image/png"] for output in outputs if "image/png" in output.get("data", {})]
    noisy, denoised, before_and_after, strengths = (Image.open(io.BytesIO(b64decode(image))) for image in images)
    assert noisy.mode == denoised.mode == "I;16"
    for sheet in (before_and_after, strengths):
        detail = np.asarray(sheet.convert("L"))[:, :300]
        assert detail.std() > 10
        assert 60 < detail.mean() < 200
