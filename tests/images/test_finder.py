"""Which files of a folder are images."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest

from fastden.images.codec import SUFFIXES
from fastden.images.finder import find_images, has_image_name, is_regular

NAMES = ("a.AVIF", "b.jfif", "c.Jpg", "d.png", "inner/e.tif", "inner/deep/f.webp")
OTHERS = (".hidden.png", "._a.jpg", "notes.txt", "png", "inner/.g.png")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in (*NAMES, *OTHERS):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "folder.png").mkdir()
    return tmp_path


def test_a_folder(folder: Path) -> None:
    assert find_images(folder) == [folder / name for name in NAMES[:4]]


def test_folders_in_it(folder: Path) -> None:
    assert find_images(folder, recursive=True) == sorted(folder / name for name in NAMES)


def test_hidden_folders_are_left_out_but_may_be_asked_for(folder: Path) -> None:
    (folder / ".Trash-1000" / "files").mkdir(parents=True)
    (folder / ".Trash-1000" / "files" / "x.jpg").touch()
    assert find_images(folder, recursive=True) == sorted(folder / name for name in NAMES)
    assert find_images(folder / ".Trash-1000", recursive=True) == [folder / ".Trash-1000" / "files" / "x.jpg"]


def test_training_sees_what_a_batch_sees(folder: Path) -> None:
    pytest.importorskip("lightning")
    from fastden.training.data import find_photographs

    assert find_photographs(folder) == find_images(folder, recursive=True)


def test_names() -> None:
    assert all(has_image_name(f"x{suffix}") and has_image_name(Path(f"a/b/x{suffix.upper()}")) for suffix in SUFFIXES)
    assert not any(map(has_image_name, OTHERS))


@pytest.mark.parametrize(("number", "told"), [(21, 0), (123, 0), (1921, 0), (5, 1)])
def test_errors_of_windows_for_names_that_lead_nowhere(
    number: int, told: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: Any, **__: Any) -> Any:
        error = OSError(errno.EINVAL, "refused")
        error.winerror = number
        raise error

    unreadable: list[OSError] = []
    with monkeypatch.context() as patch:
        patch.setattr(os, "stat", refused)
        assert not is_regular(tmp_path, unreadable)
    assert len(unreadable) == told
