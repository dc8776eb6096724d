"""The script that compares real photographs: its classical denoisers and whose noise level it takes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.scripts import load

RANDOM = np.random.default_rng(0)


@pytest.fixture(scope="module")
def script(root: Path) -> Any:
    return load(root / "benchmarks/real_photos.py")


def test_non_local_means_takes_rgb(script: Any) -> None:
    cv2 = pytest.importorskip("cv2")
    picture = RANDOM.integers(0, 256, (24, 28, 3), np.uint8) // 4 + np.uint8([150, 20, 90])
    lab = cv2.cvtColor(picture, cv2.COLOR_LRGB2Lab)
    lightness = cv2.fastNlMeansDenoising(lab[..., 0].copy(), None, 10, 7, 21)
    colours = cv2.fastNlMeansDenoising(lab[..., 1:].copy(), None, 10, 7, 21)
    expected = cv2.cvtColor(np.dstack([lightness, colours]), cv2.COLOR_Lab2LRGB)
    np.testing.assert_array_equal(script._nlm(picture, 10), expected)
