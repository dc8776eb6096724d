"""Directories of a TIFF, through tifffile: which are pictures, and what they say that libvips does not tell."""

from __future__ import annotations

import json
import logging
import math
import os
import re
import threading
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, BinaryIO

import numpy as np

from fastden.errors import UserError
from fastden.images.tiff_chain import directories

_CFA, _LINEAR_RAW = 32803, 34892
_REDUCED, _MASK = 1, 4
#: First bytes of a TIFF.
SIGNATURES = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_PHOTOMETRIC, _TILE_WIDTH, _EXTRA_SAMPLES, _DEPTH = 262, 322, 338, 32997


class _QuietTifffile(logging.Filter):
    """Drops what tifffile logs in the threads that read a file here: a line for each oddity of it.

    The program that uses fastden may read files with tifffile itself, at the same time: what those calls log passes.
    The filter is there only while a file is read here.
    """

    def __init__(self) -> None:
        super().__init__()
        self._logger, self._lock = logging.getLogger("tifffile"), threading.Lock()
        self._threads: Counter[int] = Counter()

    def filter(self, record: logging.LogRecord) -> bool:
        return threading.get_ident() not in self._threads

    @contextmanager
    def reading(self) -> Iterator[None]:
        """A context in which this thread's records are dropped; contexts may lie inside each other."""
        thread = threading.get_ident()
        with self._lock:
            self._threads[thread] += 1
            self._logger.addFilter(self)  # does nothing where it is there
        try:
            yield
        finally:
            with self._lock:
                self._threads[thread] -= 1
                if not self._threads[thread]:
                    del self._threads[thread]
                if not self._threads:
                    self._logger.removeFilter(self)


_TIFFFILE = _QuietTifffile()


def _directories(file: BinaryIO) -> Any:
    """The directories of a TIFF in tifffile's form."""
    import tifffile

    file.seek(0)
    return tifffile.TiffFile(file, name="image").pages


@_TIFFFILE.reading()
def _first(file: BinaryIO) -> Any:
    """The first directory of a TIFF in tifffile's form; None for other files, and where it cannot be read."""
    file.seek(0)
    if file.read(4) not in SIGNATURES:
        return None
    try:
        return _directories(file).first
    except Exception:  # tifffile raises many kinds of errors for damaged files, which libvips reports
        return None


@_TIFFFILE.reading()
def _number(page: Any, tag: int, default: int) -> int:
    """The whole number in a tag of a directory; ``default`` where there is none."""
    found = None if page is None else page.tags.get(tag)
    try:
        return default if found is None else int(found.value)
    except (TypeError, ValueError, OverflowError):
        return default


@_TIFFFILE.reading()
def is_raw_tiff(file: BinaryIO) -> bool:
    """Whether a file in TIFF's form holds what a sensor saw."""
    try:
        first = _directories(file).first
        if 50706 in first.tags:  # the version of DNG
            return True
        below = [first, *(first.pages or ())]
        return any(_photometric(page) in (_CFA, _LINEAR_RAW) for page in below)
    except Exception:  # as above
        return False


@_TIFFFILE.reading()
def images_of_one_directory(file: BinaryIO) -> int:
    """How many images follow each other behind a TIFF's only directory; ImageJ writes stacks above 4 GB so.

    The description alone does not tell: programs that take one image out of a stack leave it as it was.
    """
    try:
        pages = _directories(file)
        first = pages.first
        if not first.is_contiguous or _has_second(pages):
            return 1
        text = str(first.description)
        stated = re.search(r"^images=(\d+)", text, re.MULTILINE) if text.startswith("ImageJ=") else None
        if stated is not None:
            count = int(stated[1])
        else:
            # tifffile's own description. Before 2026 it put "truncated" in front of the shape.
            count = math.prod(json.loads(text)["shape"]) // first.size if text.startswith("{") else 1
        size = file.seek(0, os.SEEK_END)
        return count if first.dataoffsets[0] + count * first.nbytes <= size else 1
    except Exception:  # as above
        return 1


def _has_second(pages: Any) -> bool:
    try:
        pages[1]  # its length would read all directories
    except IndexError:
        return False
    return True


def _photometric(page: Any) -> int:
    return _number(page, _PHOTOMETRIC, -1)


def full_pages(file: BinaryIO) -> int | None:
    """How many of a TIFF's pages are pictures of their own, behind which reduced copies and masks follow.

    Returns:
        None where it cannot be told.

    Raises:
        UserError: a reduced copy comes before a picture, or directories lead in a circle.
    """
    try:
        kinds = [directory.kind for directory in directories(file)]
    except ValueError:
        return None
    full = [not kind & (_REDUCED | _MASK) for kind in kinds]
    count = sum(full)
    if count == 0 or all(full[:count]):
        return count or None
    raise UserError("a TIFF whose reduced copies come before its pictures; accepted: pictures first")


@_TIFFFILE.reading()
def stated_white(file: BinaryIO, metadata: Mapping[str, Any]) -> int:
    """The highest value that a TIFF says its 16 bits hold, 0 where it says nothing.

    It stands in the tag MaxSampleValue, and as SignificantBits in a microscope's description (OME).

    Args:
        file: of the TIFF.
        metadata: what libvips has found.
    """
    bits = re.search(r'SignificantBits="(\d+)"', str(metadata.get("image-description", "")))
    if bits is not None:
        return int(2 ** min(int(bits[1]), 16) - 1)
    try:
        tag = _directories(file).first.tags.get(281)
        return 0 if tag is None else int(np.max(tag.value))
    except Exception:  # as above
        return 0


def white_is_zero(file: BinaryIO) -> bool:
    """Whether a TIFF says that 0 is white."""
    return _photometric(_first(file)) == 0


@_TIFFFILE.reading()
def is_extra_unknown(file: BinaryIO) -> bool:
    """Whether a TIFF leaves open what the first of its channels beside the colours is (ExtraSamples)."""
    page = _first(file)
    found = None if page is None else page.tags.get(_EXTRA_SAMPLES)
    try:
        return found is not None and int(np.ravel(found.value)[0]) == 0
    except (TypeError, ValueError, OverflowError, IndexError):
        return False


def slices_of(file: BinaryIO) -> int:
    """How many slices the first page of a TIFF holds."""
    return _number(_first(file), _DEPTH, 1)


def fail_on(file: BinaryIO) -> str:
    """At what libvips has to fail, as its option of that name: at warnings in TIFFs of tiles, else at errors.

    libvips 8.18 counts a tile that cannot be decoded as a warning, and makes it black.
    """
    return "warning" if _number(_first(file), _TILE_WIDTH, 0) else "error"


def other_space(file: BinaryIO) -> str:
    """The name of a TIFF's colour space that is not read here; empty for others and other files."""
    names = {8: "CIELab", 9: "ICCLab", 10: "ITULab", 32844: "LogL", 32845: "LogLuv"}
    return names.get(_photometric(_first(file)), "")
