"""Which files are images, by their names: one rule for every command and every folder."""

from __future__ import annotations

import errno
import os
import stat
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from fastden.images.codec import SUFFIXES
from fastden.images.formats import read_suffixes
from fastden.images.kinds import PACKAGES, VIDEO, kind_of_suffix


def has_image_name(path: str | Path) -> bool:
    """Whether a file's name is an image's that can be read, and it is not hidden."""
    name = Path(path)
    suffix = name.suffix.lower()
    return (suffix in SUFFIXES or suffix in read_suffixes()) and not name.name.startswith(".")


def find_images(
    folder: Path,
    recursive: bool = False,
    unreadable: list[OSError] | None = None,
    left_out: list[Path] | None = None,
) -> list[Path]:
    """Image files in ``folder``, by their names, sorted. Links to folders are not followed.

    Args:
        folder: to look into.
        recursive: and into the folders in it.
        unreadable: a list that gets the error of each folder below that cannot be read, and of each image file that
            cannot be looked at. None raises the first, and so does a folder in which no image can be looked at.
        left_out: a list that gets the files that are images of a kind that is not read here, or videos, by their names.
    """
    refused: list[OSError] | None = None if unreadable is None else []
    files = _walk(folder, refused) if recursive else list(folder.iterdir())
    if left_out is not None:
        left_out += sorted(path for path in files if is_left_out(path) and is_regular(path, refused))
    images = sorted(path for path in files if has_image_name(path) and is_regular(path, refused))
    if unreadable is not None and refused:
        if not images:
            raise refused[0]
        unreadable += refused
    return images


def is_regular(path: Path, unreadable: list[OSError] | None) -> bool:
    """Whether ``path`` leads to a regular file; the error of one that cannot be looked at goes into ``unreadable``.

    A refused permission and a failing disk or network are such errors; None raises them.
    """
    try:
        return stat.S_ISREG(os.stat(path).st_mode)
    except OSError as error:
        # A link may lead nowhere. On Windows a drive may not be ready, a name be none, or a link lead to itself.
        nowhere = error.errno in (errno.ENOENT, errno.ENOTDIR, errno.EBADF, errno.ELOOP)
        if not nowhere and getattr(error, "winerror", None) not in (21, 123, 1921):
            if unreadable is None:
                raise
            unreadable.append(error)
        return False


def is_left_out(path: str | Path) -> bool:
    """Whether a file's name is that of an image which is not read here, or of a video."""
    name = Path(path)
    other = kind_of_suffix(name.suffix) is not None and name.suffix.lower() not in read_suffixes()
    return other and not name.name.startswith(".")


def left_out_note(files: Iterable[Path]) -> str:
    """The note about files that are images of kinds which are not read here, or videos."""
    kinds = Counter(kind_of_suffix(path.suffix) or "other images" for path in files)
    videos = kinds.pop(VIDEO, 0)
    told = []
    if kinds:
        counts = ", ".join(f"{count} {kind}" for kind, count in kinds.items())
        total = sum(kinds.values())
        told = [f"{total} image file{'s' * (total != 1)} left out, not read here: {counts}"]
    if PACKAGES.keys() & kinds:
        told.append("pip install 'fastden[formats]' reads HEIC, JPEG XL and camera raw")
    if videos:
        told.append(f"{videos} video{'s' * (videos != 1)} left out: give one alone to fastden denoise")
    return "; ".join(told)


def _walk(top: Path, unreadable: list[OSError] | None) -> list[Path]:
    def failed(error: OSError) -> None:
        if unreadable is None or error.filename == str(top):
            raise error
        unreadable.append(error)

    files = []
    for folder, below, names in os.walk(top, onerror=failed):
        below[:] = [name for name in below if not name.startswith(".")]  # .Trash, .thumbnails: hidden, as files are
        files += [Path(folder, name) for name in names]
    return files
