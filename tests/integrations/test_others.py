"""scikit-image's calibration, and the message if a package is missing."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from skimage import data
from skimage.restoration import calibrate_denoiser

import fastden
from fastden.integrations.datasets import DenoiseColumn


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_scikit_image_finds_the_level(dtype: type[np.floating]) -> None:
    picture = data.astronaut()[80:176, 100:228] / 255  # on 32 x 48 pixels, 20 and 30 differ by 0.1 %
    noisy = (picture + np.random.default_rng(0).normal(0, 20 / 255, picture.shape)).astype(dtype)
    calibrated = calibrate_denoiser(noisy, fastden.denoise, {"sigma": np.arange(10, 41, 10)})
    assert calibrated.keywords["denoiser_kwargs"] == {"sigma": 20}
    clean = calibrated(noisy)
    assert clean.dtype == dtype
    assert np.mean((clean - picture) ** 2) < 0.1 * np.mean((noisy - picture) ** 2)


@pytest.mark.parametrize("name", ["deepinv", "napari", "spandrel", "transforms"])
def test_a_missing_package(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    package = {"transforms": "torchvision"}.get(name, name)
    for module in [module for module in sys.modules if module.split(".")[0] == package]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.delitem(sys.modules, f"fastden.integrations.{name}", raising=False)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(
        ModuleNotFoundError, match=rf"needs the package {package}; install: pip install 'fastden\[{package}\]'"
    ):
        importlib.import_module(f"fastden.integrations.{name}")


@pytest.mark.parametrize("name", ["deepinv", "spandrel", "transforms"])
@pytest.mark.parametrize(
    "message",
    [
        "operator torchvision::nms does not exist",
        "Detected that PyTorch and torchvision were compiled with different CUDA major versions.",
    ],
)
def test_a_torchvision_for_another_pytorch(
    name: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = {"transforms": "torchvision"}.get(name, name)
    for module in [module for module in sys.modules if module.split(".")[0] == package]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.delitem(sys.modules, f"fastden.integrations.{name}", raising=False)
    (tmp_path / f"{package}.py").write_text(f"raise RuntimeError({message!r})")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(
        ImportError, match=f"cannot import {package}: torchvision was built for another PyTorch; install"
    ):
        importlib.import_module(f"fastden.integrations.{name}")


FORKED = """
import multiprocessing, sys
import numpy as np, torch
from fastden.integrations.datasets import DenoiseColumn

row, column = {"image": np.full((64, 64, 3), 0.5, np.float32)}, DenoiseColumn(sigma=20)
torch.set_num_threads(2)
column(row)
process = multiprocessing.get_context("fork").Process(target=column, args=(row,), daemon=True)
process.start()
process.join(60)
sys.exit(9 if process.is_alive() else process.exitcode)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no forks here")
def test_a_column_in_a_fork_of_a_process_with_threads() -> None:
    """PyTorch waits for ever for the threads of the parent; here ``datasets`` itself is not needed."""
    assert subprocess.run([sys.executable, "-c", FORKED], check=False, timeout=120).returncode == 0


@pytest.mark.parametrize(
    ("settings", "kind", "message"),
    [
        ({"sigma": 300}, ValueError, "sigma: 300; accepted: 'auto', a number from 0 to 255.*; or the name of a column"),
        ({"sigma": float("nan")}, ValueError, "sigma: nan; accepted"),
        ({"sigma": ""}, ValueError, "sigma: ''; accepted"),
        ({"sigma": None}, TypeError, "sigma: None; accepted"),
        ({"sigma": True}, TypeError, "sigma: True; accepted"),
        ({"sigma": [1, 2]}, TypeError, "sigma: .1, 2.; accepted"),
        ({"column": 3}, TypeError, "column: 3; accepted: the name of a column"),
        ({"column": ""}, ValueError, "column: ''; accepted: the name of a column"),
        ({"into": 3}, TypeError, "into: 3; accepted: the name of a column"),
        ({"batched": 1}, TypeError, "batched: 1; accepted: True, False or None"),
        ({"model": "nope"}, ValueError, "model: 'nope'; accepted: .*color"),
        ({"model": 3}, TypeError, "model: int; accepted"),
        ({"device": "gpu"}, ValueError, "device: 'gpu'; accepted: cpu"),
        ({"strength": 3}, ValueError, "strength: 3; accepted"),
    ],
)
def test_wrong_settings_of_a_column(settings: dict[str, Any], kind: type[Exception], message: str) -> None:
    """They were told at the first row, in another process."""
    with pytest.raises(kind, match=message):
        DenoiseColumn(**settings)
