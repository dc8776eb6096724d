"""scikit-image's calibration, and the message if a package is missing."""

from __future__ import annotations

import importlib
import sys

import numpy as np
import pytest
from skimage import data
from skimage.restoration import calibrate_denoiser

import fastden


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
