"""Small models and photographs for the tests of the command line."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.image_files import encoded, exif, icc_profile, pixels, save_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_model(tmp_path_factory.mktemp("model")))


@pytest.fixture(scope="module")
def blind(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_model(tmp_path_factory.mktemp("blind"), noise_level_input=False))


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """A folder of two photographs, and one more in a folder inside."""
    folder = tmp_path / "photos"
    (folder / "inner").mkdir(parents=True)
    (folder / "a.png").write_bytes(encoded(pixels(seed=1), "PNG"))
    (folder / "b.jpg").write_bytes(encoded(pixels(seed=2), "JPEG", exif=exif(6), icc_profile=icc_profile()))
    (folder / "inner" / "c.png").write_bytes(encoded(pixels(seed=3), "PNG"))
    (folder / "notes.txt").write_text("no image")
    return folder
