"""Kinds of files that are not read here, found by first bytes and headers; why, and what reads them."""

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
from functools import cache
from importlib.util import find_spec
from typing import Any, BinaryIO

import numpy as np

from fastden.errors import UserError
from fastden.images.containers import PNG_SIGNATURE, behind_jpeg, boxes, jpeg_segments, png_chunks

#: File name suffixes of images that are not read here, by kind; those of a folder are counted.
OTHER_SUFFIXES = {
    "HEIC": (".heic", ".heif", ".hif"),
    "JPEG XL": (".jxl",),
    "camera raw": (
        *(".dng", ".cr2", ".cr3", ".crw", ".nef", ".nrw", ".arw", ".srf", ".sr2", ".raf", ".orf", ".rw2", ".pef"),
        *(".srw", ".x3f", ".3fr", ".fff", ".iiq", ".mos", ".mrw", ".erf", ".kdc", ".dcr", ".rwl", ".gpr"),
    ),
    "OpenEXR": (".exr",),
    "DICOM": (".dcm",),
    "JPEG 2000": (".jp2", ".j2k", ".jpx"),
    "Photoshop": (".psd", ".psb"),
    "GIF": (".gif",),
    "BMP": (".bmp",),
    "other images": (".hdr", ".pfm", ".pgm", ".ppm", ".pnm", ".fits", ".fit", ".tga", ".dds", ".xcf", ".svg", ".ico"),
}
_BY_SUFFIX = {suffix: kind for kind, suffixes in OTHER_SUFFIXES.items() for suffix in suffixes}

_SPACES = (b"\n", b"\r", b" ", b"\t")
# Offset, bytes at it, and the kind that they stand for.
_SIGNATURES: tuple[tuple[int, bytes, str], ...] = (
    (0, b"\xff\x0a", "JPEG XL"),
    (0, b"\0\0\0\x0cJXL \r\n\x87\n", "JPEG XL"),
    (0, b"v/1\x01", "OpenEXR"),
    (128, b"DICM", "DICOM"),
    (0, b"\0\0\0\x0cjP  \r\n\x87\n", "JPEG 2000"),
    (0, b"\xff\x4f\xff\x51", "JPEG 2000"),
    (0, b"8BPS", "Photoshop"),
    (0, b"BM", "BMP"),
    (0, b"FUJIFILMCCD-RAW", "camera raw"),
    (8, b"CR\x02\0", "camera raw"),
    (0, b"IIU\0", "camera raw"),
    (0, b"IIRO", "camera raw"),
    (0, b"IIRS", "camera raw"),
    (0, b"FOVb", "camera raw"),
    (0, b"#?R", "Radiance HDR"),
    (0, b"SIMPLE  =", "FITS"),
    (0, b"%PDF", "PDF"),
    (0, b"gimp xcf", "GIMP"),
    (0, b"DDS ", "DirectDraw"),
    (0, b"\0\0\1\0", "icon"),
    *((0, b"P" + letter + space, "PNM") for letter in (b"1", b"2", b"3", b"4", b"5", b"6", b"7") for space in _SPACES),
    *((0, b"P" + letter + space, "PFM") for letter in (b"F", b"f") for space in _SPACES),
    (0, b"\x1aE\xdf\xa3", "video"),
)
_HEIF_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")
_INSTEAD = {
    "HEIC": "a copy as JPEG, PNG, TIFF, WebP or AVIF",
    "JPEG XL": "a copy as PNG or TIFF (djxl makes one)",
    "camera raw": "a 16-bit TIFF from a raw developer",
    "OpenEXR": "a copy as TIFF of 32 bits floating",
    "DICOM": "a copy as TIFF or PNG of 16 bits",
    "video": "fastden denoise VIDEO -o VIDEO, with the suffix of a video",
}
#: The module of the extra ``formats`` that reads each kind.
PACKAGES = {"HEIC": "pillow_heif", "JPEG XL": "pillow_jxl", "camera raw": "rawpy"}
_CFA, _LINEAR_RAW = 32803, 34892
_REDUCED, _MASK = 1, 4
_TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_PHOTOMETRIC, _TILE_WIDTH, _DEPTH = 262, 322, 32997
#: Bytes at the end of a JPEG in which its end marker is looked for first.
_TAIL = 1 << 16


@cache
def is_installed(kind: str) -> bool:
    """Whether the package that reads a kind is there; nothing is imported."""
    return find_spec(PACKAGES[kind]) is not None


def known_formats() -> list[str]:
    """Names of the formats that are read here: libvips' own, and those whose packages are installed."""
    return ["JPEG", "PNG", "TIFF", "WebP", "AVIF", *(kind for kind in PACKAGES if is_installed(kind))]


def kind_of_suffix(suffix: str) -> str | None:
    """The kind of images that a suffix stands for, of those that are not read here."""
    return _BY_SUFFIX.get(suffix.lower())


def kind_of_bytes(head: bytes) -> str | None:
    """The kind of a file that begins with these bytes, of those that are not read here."""
    if head[4:8] == b"ftyp":
        brand = head[8:12]
        compatible = {head[at : at + 4] for at in range(16, min(int.from_bytes(head[:4], "big"), len(head)), 4)}
        if brand == b"crx ":
            return "camera raw"
        if brand in (b"avif", b"avis") or b"avif" in compatible:
            return None
        return "HEIC" if brand in _HEIF_BRANDS else "video"
    return next((kind for at, what, kind in _SIGNATURES if head[at : at + len(what)] == what), None)


def not_supported(kind: str, detail: str = "") -> UserError:
    """The error for a kind of files."""
    why = f" ({detail})" if detail else ""
    instead = _INSTEAD.get(kind, "a copy as PNG, TIFF or JPEG")
    install = "pip install 'fastden[formats]' reads it; or " if kind in PACKAGES else ""
    return UserError(f"{kind} is not read here{why}; accepted: {install}{instead}")


def check_supported(file: BinaryIO) -> None:
    """Raise UserError for a file of which a reader would show something else than its picture.

    These are animations of PNG and AVIF, of which it would be the first frame; raw files of cameras that look like
    TIFFs, of which it would be a thumbnail; volumes in a TIFF, of which it would be the first slice; and JPEGs without
    an end, of which libjpeg makes up the missing part where zeros stand in its place.
    """
    file.seek(0)
    head = file.read(512)
    if head.startswith(PNG_SIGNATURE):
        for name, data in png_chunks(file):
            if name == b"acTL" and int.from_bytes(data[:4], "big") > 1:
                frames = int.from_bytes(data[:4], "big")
                raise UserError(f"an animation (APNG) of {frames} frames; accepted: one picture, or a video")
            if name == b"IDAT":
                break
    elif head.startswith(b"\xff\xd8\xff"):
        _check_end(file)
    elif head[4:8] == b"ftyp" and kind_of_bytes(head) is None:
        if any(name == b"moov" for name, _ in boxes(file)):
            raise UserError("an animation (AVIF); accepted: one picture, or a video")
    elif head[:4] in _TIFF:
        kind = kind_of_bytes(head)
        if kind is not None or is_raw_tiff(file):
            raise not_supported("camera raw", "this TIFF holds what a sensor saw, and a thumbnail")
        slices = _number(_first_directory(file), _DEPTH, 1)
        if slices > 1:
            raise UserError(f"a volume of {slices} slices in one TIFF page; accepted: a page for each slice")
        images = _images_of_one_directory(file)
        if images > 1:
            raise UserError(
                f"a stack of {images} images behind one TIFF directory (ImageJ, tifffile); accepted: a directory for"
                " each image"
            )


def _check_end(file: BinaryIO) -> None:
    """Raise UserError for a JPEG without an end marker."""
    jpeg_segments(file)
    pixels = file.tell()  # a thumbnail in front of them has an end marker of its own
    size = file.seek(0, os.SEEK_END)
    # Stray bytes between segments, which decoders pass over, may have led beyond the end.
    file.seek(max(size - _TAIL, min(pixels, size - 2), 0))
    if b"\xff\xd9" in file.read():
        return
    file.seek(pixels)
    if behind_jpeg(file) is None:
        raise UserError("corrupt or truncated (a JPEG without an end marker)")


def fail_on(file: BinaryIO) -> str:
    """At what libvips has to fail, as its option of that name: at warnings in TIFFs of tiles, else at errors.

    libvips 8.18 counts a tile that cannot be decoded as a warning, and makes it black.
    """
    return "warning" if _number(_first_directory(file), _TILE_WIDTH, 0) else "error"


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
def _first_directory(file: BinaryIO) -> Any:
    """The first directory of a TIFF in tifffile's form; None for other files, and where it cannot be read."""
    file.seek(0)
    if file.read(4) not in _TIFF:
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
    except (TypeError, ValueError):
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
def _images_of_one_directory(file: BinaryIO) -> int:
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
            count = math.prod(json.loads(text)["shape"]) // first.size if text.startswith('{"shape"') else 1
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


@_TIFFFILE.reading()
def full_pages(file: BinaryIO) -> int | None:
    """How many of a TIFF's pages are pictures of their own, behind which reduced copies and masks follow.

    Returns:
        None where it cannot be told.

    Raises:
        UserError: a reduced copy comes before a picture.
    """
    try:
        kinds = [int(page.subfiletype) for page in map(_loaded, _directories(file))]
    except Exception:  # as above
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
    return _photometric(_first_directory(file)) == 0


def _loaded(page: Any) -> Any:
    return page.aspage() if hasattr(page, "aspage") else page


def _other_space(file: BinaryIO) -> str:
    """The name of a TIFF's colour space that is not read here; empty for others and other files."""
    names = {8: "CIELab", 9: "ICCLab", 10: "ITULab", 32844: "LogL", 32845: "LogLuv"}
    return names.get(_photometric(_first_directory(file)), "")


def why_not_read(file: BinaryIO, detail: str) -> UserError | None:
    """The error for what libvips cannot read though it is sound; None where it seems damaged.

    Args:
        file: what was to be read.
        detail: what libvips said.
    """
    file.seek(0, os.SEEK_SET)
    kind = kind_of_bytes(file.read(512))
    if kind is not None:
        return not_supported(kind)
    space = _other_space(file)
    if space:
        return UserError(f"colour space {space}; accepted: gray, RGB, CMYK")
    lower = detail.lower()
    if any(
        word in lower
        for word in (
            "unsupported",
            "not supported",
            "not been built",
            "not configured",
            "not implemented",
            "samples out of range",
        )
    ):
        return UserError(f"not supported here ({detail}); accepted: a copy as PNG, or TIFF of 8, 16 or 32 bits")
    return None
