"""Kinds of files by suffix, first bytes and headers: what is read here, with which package, and why the rest is not."""

from __future__ import annotations

import os
from functools import cache
from importlib.util import find_spec
from typing import BinaryIO

from fastden.errors import UserError
from fastden.images import tiff_directories
from fastden.images.containers import PNG_SIGNATURE, behind_jpeg, boxes, jpeg_segments, png_chunks

#: The kind of files that are videos.
VIDEO = "video"
#: File name suffixes of what is not read here as an image, by kind; those of a folder are counted.
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
    VIDEO: (
        *(".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".ts", ".mts", ".m2ts", ".mpg", ".mpeg", ".m2v", ".vob"),
        *(".3gp", ".3g2", ".wmv", ".asf", ".flv", ".ogv"),
    ),
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
#: What the formats begin with that libvips may open. By the bytes alone it would take text of numbers for a table, and
#: draw SVG, whose filters ask for any amount of memory and time.
_OPENED = (
    *((0, b"\xff\xd8"), (0, b"\x89PNG\r\n\x1a\n"), (8, b"WEBP"), (4, b"ftyp"), (0, b"GIF8")),
    *((0, head) for head in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")),
    *((0, b"\xff\x0a"), (0, b"\0\0\0\x0cJXL \r\n\x87\n")),
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
    """The kind of files that a suffix stands for, of those that are not read here as images."""
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


def unknown_format() -> UserError:
    """The error for a file of no format that is read here."""
    return UserError(f"not an image in a known format; accepted: {', '.join(known_formats())}")


def check_supported(file: BinaryIO) -> None:
    """Raise UserError for a file that libvips must not open, or of which it would show something else than its picture.

    The former are all formats that are not read here, such as SVG and tables under a picture's name. The latter are
    animations of PNG and AVIF, of which it would be the first frame; raw files of cameras that look like TIFFs, of
    which it would be a thumbnail; volumes in a TIFF, of which it would be the first slice; and JPEGs without an end, of
    which libjpeg makes up the missing part where zeros stand in its place.
    """
    file.seek(0)
    head = file.read(512)
    if not any(head[at : at + len(what)] == what for at, what in _OPENED):
        kind = kind_of_bytes(head)
        raise unknown_format() if kind is None else not_supported(kind)
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
    elif head[:4] in tiff_directories.SIGNATURES:
        kind = kind_of_bytes(head)
        if kind is not None or tiff_directories.is_raw_tiff(file):
            raise not_supported("camera raw", "this TIFF holds what a sensor saw, and a thumbnail")
        slices = tiff_directories.slices_of(file)
        if slices > 1:
            raise UserError(f"a volume of {slices} slices in one TIFF page; accepted: a page for each slice")
        images = tiff_directories.images_of_one_directory(file)
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
    space = tiff_directories.other_space(file)
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
