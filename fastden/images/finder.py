"""Which files are images, by their names: one rule for every command and every folder."""

from __future__ import annotations

import os
from pathlib import Path

from fastden.images.codec import SUFFIXES


def has_image_name(path: str | Path) -> bool:
    """Whether a file's name is an image's: its suffix is one of :data:`SUFFIXES`, and it is not hidden."""
    name = Path(path)
    return name.suffix.lower() in SUFFIXES and not name.name.startswith(".")


def find_images(folder: Path, recursive: bool = False, unreadable: list[OSError] | None = None) -> list[Path]:
    """Image files in ``folder``, by their names, sorted. Links to folders are not followed.

    Args:
        folder: to look into.
        recursive: and into the folders in it.
        unreadable: takes the errors of folders below that cannot be looked into; None raises the first.
    """
    files = _walk(folder, unreadable) if recursive else list(folder.iterdir())
    return sorted(path for path in files if has_image_name(path) and path.is_file())


def _walk(top: Path, unreadable: list[OSError] | None) -> list[Path]:
    def failed(error: OSError) -> None:
        if unreadable is None or error.filename == str(top):
            raise error
        unreadable.append(error)

    return [Path(folder, name) for folder, _, names in os.walk(top, onerror=failed) for name in names]
