"""``fastden.denoise``: wrong images and options are told by name, value and what is accepted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import fastden
from fastden import UserError
from tests.api.conftest import SIGMA
from tests.image_files import encoded, pixels


def test_larger_files_are_refused(network: fastden.FusedDenoiser, tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(encoded(pixels(), "PNG"))
    with pytest.raises(UserError, match=r"a\.png: 40 x 32 pixels; accepted: at most .* \(max_pixels; "):
        fastden.denoise(path, SIGMA, model=network, max_pixels=32 * 40 - 1)
    assert fastden.denoise(path, SIGMA, model=network, max_pixels=32 * 40).shape == (32, 40, 3)


@pytest.mark.parametrize(
    ("image", "error", "message"),
    [
        (pixels(channels=2), ValueError, r"image: shape \(32, 40, 2\); accepted"),
        (pixels(channels=5), ValueError, r"image: shape \(32, 40, 5\)"),
        (np.zeros((3, 0, 3), np.uint8), ValueError, "at least 1"),
        (np.zeros((2, 3, 4, 3), np.uint8), ValueError, "image: shape"),
        (np.zeros((8, 8, 3), np.int64), TypeError, "image: dtype int64; accepted"),
        (np.zeros((8, 8, 3), bool), TypeError, "image: dtype bool"),
        (np.zeros((8, 8, 3), np.complex64), TypeError, "image: dtype complex64"),
        (np.full((8, 8, 3), np.nan, np.float32), ValueError, "NaN or infinity"),
        (np.full((8, 8, 3), -np.inf), ValueError, "NaN or infinity"),
        (np.full((8, 8, 3), 128.0), ValueError, r"128 to 128; accepted: the scale \[0, 1\]"),
        (torch.zeros(8, 8, 3), ValueError, "image: shape"),
        (torch.zeros(0, 3, 8, 8), ValueError, "image: shape"),
        (torch.zeros(3, 8, 8, dtype=torch.int32), TypeError, "image: dtype torch.int32"),
        (torch.full((3, 8, 8), torch.nan), ValueError, "NaN or infinity"),
        (Image.new("CMYK", (8, 8)), TypeError, "PIL mode CMYK; accepted"),
        ([[1, 2], [3, 4]], TypeError, "image: list; accepted: a path"),
        (np.full((8, 8), 1e300), ValueError, r"values from 1e\+300 to 1e\+300; accepted: the scale"),
        (torch.zeros(3, 8, 8).to_sparse(), TypeError, "image: a tensor of another kind .*accepted: a dense tensor"),
        (torch.zeros(3, 8, 8, device="meta"), TypeError, "image: a tensor of another kind .meta"),
        ("name\0.png", UserError, "cannot be read: embedded null"),
        (np.ma.array([1.0, 2.0], mask=[0, 1]), ValueError, r"image: shape \(2,\); accepted"),
        (None, TypeError, "image: NoneType"),
    ],
)
def test_wrong_images(network: fastden.FusedDenoiser, image: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        fastden.denoise(image, SIGMA, model=network)


def test_missing_path(network: fastden.FusedDenoiser, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"missing.png: cannot be read: No such file"):
        fastden.denoise(tmp_path / "missing.png", model=network)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"sigma": -1}, ValueError, "sigma: -1; accepted"),
        ({"sigma": 256}, ValueError, "sigma: 256; accepted"),
        ({"sigma": float("nan")}, ValueError, "sigma: nan"),
        ({"sigma": "high"}, TypeError, "sigma: 'high'; accepted"),
        ({"sigma": None}, TypeError, "sigma: NoneType"),
        ({"sigma": True}, TypeError, "sigma: True; accepted"),
        ({"sigma": np.array("a")}, TypeError, "sigma: an array of dtype <U1; accepted"),
        ({"sigma": np.full((32, 40), 3 + 4j)}, TypeError, "sigma: an array of dtype complex128"),
        ({"sigma": np.ones((32, 40), bool)}, TypeError, "sigma: an array of dtype bool"),
        ({"sigma": [1, 2, 3]}, ValueError, r"sigma: shape \(3,\); accepted: a number, \(32, 40\), \(1,\)"),
        ({"sigma": []}, ValueError, r"sigma: shape \(0,\)"),
        ({"sigma": ["a"]}, TypeError, "sigma: list holds values that are not numbers"),
        ({"sigma": [300]}, ValueError, "sigma: values from 300 to 300; accepted: 0 to 255"),
        ({"progress": 3}, TypeError, "progress: int; accepted"),
        ({"sigma": np.zeros((3, 3))}, ValueError, r"sigma: shape \(3, 3\)"),
        ({"sigma": np.full((32, 40), -1.0)}, ValueError, "sigma: values from -1 to -1"),
        ({"sigma": np.full((32, 40), np.nan)}, ValueError, "sigma: values from nan"),
        ({"strength": 2.5}, ValueError, "strength: 2.5; accepted: a number from 0 to 2"),
        ({"chroma": -1}, ValueError, "chroma: -1; accepted: a number from 0 to 2"),
        ({"quality": "high"}, ValueError, "quality: 'high'; accepted: 'fast', 'normal', 'best'"),
        ({"strength": "all"}, ValueError, "strength: 'all'"),
        ({"tile": "big"}, ValueError, "tile: 'big'"),
        ({"max_memory": "much"}, ValueError, "max_memory: 'much'; accepted"),
        ({"max_memory": 0}, ValueError, "max_memory: 0"),
        ({"max_pixels": 0}, ValueError, "max_pixels: 0; accepted"),
        ({"max_pixels": float("nan")}, ValueError, "max_pixels: nan"),
    ],
)
def test_wrong_options(
    network: fastden.FusedDenoiser, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        fastden.denoise(pixels(), **{"sigma": SIGMA, "model": network, **options})
