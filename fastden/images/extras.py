"""What a file holds beside its pixels and beside what libvips carries, read from the source.

libvips writes EXIF anew: a camera's own notes then lie at wrong offsets. It does not know EXIF in TIFF, text in PNG,
XMP above 64 kB in JPEG, and colours without an ICC profile. So this module keeps the source's bytes;
:mod:`fastden.images.attachments` puts them into the result.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, BinaryIO

from fastden.errors import UserError
from fastden.images import tiff_tags, xmp
from fastden.images.containers import (
    APP0,
    APP1,
    APP2,
    APP11,
    APP14,
    EXIF,
    behind_jpeg,
    boxes,
    jpeg_segments,
    png_chunks,
)

#: The highest resolution that libvips takes, pixels per millimetre.
MOST_DENSITY = 1e6
#: PNG's chunks of text.
PNG_TEXT = (b"tEXt", b"zTXt", b"iTXt")
#: Texts of PNG in which some programs keep EXIF and XMP.
_RAW_PROFILES = tuple(b"Raw profile type " + kind + b"\0" for kind in (b"exif", b"xmp", b"APP1"))
#: Bytes of a text at most.
_MOST_TEXT = 1 << 26
#: PNG's chunks that say what colours its values stand for, beside the ICC profile.
_COLOUR = (b"gAMA", b"cHRM", b"sRGB", b"cICP", b"mDCV", b"mDCv", b"cLLI", b"cLLi")
# Chunks that libvips writes, that belong to the pixels, or that describe the old pixels.
_PNG_OWN = (b"IHDR", b"PLTE", b"IDAT", b"IEND", b"iCCP", b"tRNS", b"eXIf", b"hIST", b"acTL", b"fcTL", b"fdAT", b"pHYs")
#: Chunks that fit the result if it has the source's depth and channels.
PNG_SAME_KIND = (b"sBIT", b"bKGD", b"sPLT")


@dataclass(frozen=True)
class Extras:
    """What a source file holds beside its pixels and the fields of libvips.

    Attributes:
        format: of the source.
        tags: of a TIFF's first directory, without those that say how pixels are stored.
        extra_samples: what a TIFF says of its channels beside the colours: 0 unknown, 1 premultiplied alpha, 2 alpha.
        segments: of a JPEG: marker and payload.
        chunks: of a PNG: name and content; of an AVIF that says so ``cICP``.
        kind: depth and colour type of a PNG.
        parts: other pictures, videos and layers in the file, which no result holds.
        left: metadata that no result holds.
        dense: whether the resolution is above what libvips takes; it is then in the parts above alone.
    """

    format: str = ""
    tags: Mapping[int, Any] = field(default_factory=dict)
    extra_samples: tuple[int, ...] = ()
    segments: tuple[tuple[int, bytes], ...] = ()
    chunks: tuple[tuple[bytes, bytes], ...] = ()
    kind: bytes = b""
    parts: tuple[str, ...] = ()
    left: tuple[str, ...] = ()
    dense: bool = False

    def colour(self) -> dict[bytes, bytes]:
        """The chunks of PNG that say what colours the values stand for."""
        return {name: data for name, data in self.chunks if name in _COLOUR}


def read_extras(
    file: BinaryIO, format_name: str, metadata: Mapping[str, Any], *, has_alpha: bool = True
) -> tuple[Extras, dict[str, Any]]:
    """What a file holds beside its pixels, and libvips' fields mended by it.

    Args:
        file: of the source; its pixels are passed over.
        format_name: of it.
        metadata: what libvips has found.
        has_alpha: whether libvips takes a channel for alpha.

    Raises:
        UserError: metadata that are damaged in a way that nobody foresaw.
    """
    try:
        return _read(file, format_name, metadata, has_alpha)
    except (struct.error, LookupError, ArithmeticError, AttributeError, ValueError, TypeError) as error:
        what = f"{type(error).__name__}: {error}"
        raise UserError(f"metadata that cannot be read ({what}); accepted: a copy without it") from error


def _read(
    file: BinaryIO, format_name: str, metadata: Mapping[str, Any], has_alpha: bool
) -> tuple[Extras, dict[str, Any]]:
    readers = {"jpeg": _of_jpeg, "png": _of_png, "tiff": _of_tiff, "avif": _of_heif, "heic": _of_heif}
    found = dict(metadata)
    extras = readers[format_name](file, found) if format_name in readers else Extras()
    # libvips gives 1 pixel per millimetre, or 72 dots an inch, where a file states none, and reads no WebP's or AVIF's.
    density = _resolution(extras, found)
    found.pop("xres", None), found.pop("yres", None)
    dense = density is not None and max(density) > MOST_DENSITY
    if density is not None and not dense:
        found["xres"], found["yres"] = density
    # A TIFF whose three channels are not said to be RGB calls two of them extra samples.
    samples = extras.extra_samples if has_alpha else ()
    return replace(extras, format=format_name, extra_samples=samples, dense=dense), found


def _resolution(extras: Extras, metadata: Mapping[str, Any]) -> tuple[float, float] | None:
    """Horizontal and vertical pixels per millimetre that a file states; None where it states none."""
    for marker, payload in extras.segments:
        if marker == APP0:  # JFIF
            unit, across, down = payload[7], *struct.unpack(">HH", payload[8:12])
            if unit in (1, 2) and across and down:
                return (across / 25.4, down / 25.4) if unit == 1 else (across / 10, down / 10)
    for name, data in extras.chunks:
        if name == b"pHYs" and len(data) == 9:
            across, down, unit = struct.unpack(">IIB", data)
            if unit == 1 and across and down:
                return across / 1000, down / 1000
    block = bytes(metadata.get("exif-data", b"")).removeprefix(EXIF)
    tags = extras.tags or (tiff_tags.exif_directory(block) if block else None)
    return tiff_tags.resolution(tags) if tags else None


def _of_jpeg(file: BinaryIO, metadata: dict[str, Any]) -> Extras:
    segments = jpeg_segments(file)
    size, behind = behind_jpeg(file) or (0, b"")
    kept: list[tuple[int, bytes]] = []
    parts, left, packets, extensions, gain_map = [], [], [], [], b"hdrgm" in behind
    for marker, payload in segments:
        if marker == APP0:
            if payload.startswith(b"JFIF\0") and len(payload) >= 14:
                kept.append((marker, payload[:12] + b"\0\0"))  # without a thumbnail
        elif marker == APP1 and payload.startswith(EXIF):
            _take_exif(metadata, payload)
        elif marker == APP1 and payload.startswith(xmp.MAIN):
            packets.append(payload[len(xmp.MAIN) :])
        elif marker == APP1 and payload.startswith(xmp.EXTENSION):
            extensions.append(payload[len(xmp.EXTENSION) :])
        elif marker == APP2 and payload.startswith(b"urn:iso:std:iso:ts:21496"):
            gain_map = True
        elif marker == APP11:
            left.append("content credentials and other boxes (JUMBF)")
        elif marker != APP14 and not (marker == APP2 and payload.startswith((b"ICC_PROFILE\0", b"MPF\0"))):
            kept.append((marker, payload))
    if packets:
        metadata["xmp-data"], whole = xmp.joined(packets[0], extensions)
        if not whole:
            left.append("a part of the XMP (its continuation is damaged)")
    gain_map = gain_map or any(b"hdrgm" in packet or b"HDRGainMap" in packet for packet in packets)
    if gain_map:
        parts.append("the HDR gain map")
    if behind.strip(b"\0\xff"):
        if b"ftyp" in behind[:4096]:
            parts.append("the video of a motion photo")
        elif b"\xff\xd8\xff" in behind:  # a Nikon D800 leaves 261 bytes in front of it
            parts += [] if gain_map else ["the second picture of the file (MPO)"]
        else:
            parts.append(f"{size} bytes behind the picture")
    return Extras(segments=tuple(kept), parts=tuple(parts), left=tuple(dict.fromkeys(left)))


def _of_png(file: BinaryIO, metadata: dict[str, Any]) -> Extras:
    kept, left, kind = [], [], b""
    for name, data in png_chunks(file):
        if name == b"IHDR":
            kind = data[8:10]
        elif name == b"iTXt" and data.startswith(b"XML:com.adobe.xmp\0"):
            # libvips reads it, and EXIF too, in front of the pixels only, and only among the first texts.
            metadata.setdefault("xmp-data", _international_text(data))
        elif name in (b"tEXt", b"zTXt") and data.startswith(_RAW_PROFILES):
            if not _take_raw_profile(metadata, name, data):
                kept.append((name, data))
        elif name == b"eXIf":
            _take_exif(metadata, data)
        elif name in _COLOUR or name in PNG_TEXT or name in PNG_SAME_KIND or name == b"pHYs":
            kept.append((name, data))
        elif name not in _PNG_OWN:
            # The fourth letter tells whether a chunk may be copied although pixels changed.
            if chr(name[3]).islower():
                kept.append((name, data))
            elif name == b"caBX":
                left.append("content credentials (caBX)")
            else:
                left.append(f"the chunk {name.decode('latin-1')}")
    parts = [f"{len(rest)} bytes behind the picture"] if (rest := file.read(1 << 20).strip(b"\0")) else []
    return Extras(chunks=tuple(kept), kind=kind, parts=tuple(parts), left=tuple(dict.fromkeys(left)))


def _take_exif(metadata: dict[str, Any], block: bytes) -> None:
    """Take EXIF that libvips has not found, with the orientation in it."""
    if "exif-data" not in metadata:
        metadata["exif-data"] = block
        metadata.setdefault("orientation", tiff_tags.orientation(block.removeprefix(EXIF)))


def _international_text(data: bytes) -> bytes:
    """The text of an iTXt chunk: keyword, two bytes on compression, language, translated keyword, text."""
    _, _, rest = data.partition(b"\0")
    text = rest[2:].split(b"\0", 2)[-1]
    return _inflated(text) if rest[:1] == b"\1" else text


def _take_raw_profile(metadata: dict[str, Any], name: bytes, data: bytes) -> bool:
    """Take EXIF or XMP that is stored as hexadecimal text; False where it cannot be read."""
    _, _, text = data.partition(b"\0")
    lines = (_inflated(text[1:]) if name == b"zTXt" else text).split(b"\n", 3)
    try:
        content = bytes.fromhex(lines[3].decode("ascii"))
    except (IndexError, ValueError):
        return False
    if content.startswith(EXIF) or content[:4] in (b"II*\0", b"MM\0*"):
        _take_exif(metadata, content)
    elif content.removeprefix(xmp.MAIN).lstrip().startswith(b"<"):
        metadata.setdefault("xmp-data", content.removeprefix(xmp.MAIN))
    else:
        return False
    return True


def _inflated(data: bytes) -> bytes:
    """Compressed text up to a limit; nothing where it is damaged."""
    try:
        return zlib.decompressobj().decompress(data, _MOST_TEXT)
    except zlib.error:
        return b""


def _of_tiff(file: BinaryIO, _metadata: dict[str, Any]) -> Extras:
    tags = tiff_tags.first_directory(file)
    if tags is None:
        return Extras(left=("tags that cannot be read",))
    kept = tiff_tags.descriptive(tags)
    description = kept.get(tiff_tags.DESCRIPTION, {}).get("data", "")
    # Planes one after the other, a palette, CMYK.
    rearranged = tags.get(284, {}).get("data") == [2] or tags.get(262, {}).get("data") in ([3], [5])
    # tifffile's description states the source's arrangement of values, which the result does not have.
    if rearranged and isinstance(description, str) and description.startswith('{"shape"'):
        del kept[tiff_tags.DESCRIPTION]
    left: tuple[str, ...] = ()
    file.seek(0)
    if tiff_tags.IMAGEJ in kept and file.read(2) == b"MM":
        content, counts = kept[tiff_tags.IMAGEJ]["data"], kept.get(tiff_tags.IMAGEJ_COUNTS, {}).get("data") or [0]
        turned = None
        if _are_numbers(counts, 2**32 - 1) and (isinstance(content, bytes) or _are_numbers(content, 255)):
            turned = tiff_tags.imagej_in_little_endian(bytes(content), counts)
        if turned is None:
            del kept[tiff_tags.IMAGEJ]
            left = ("ImageJ's own metadata, which cannot be read",)
        else:
            kept[tiff_tags.IMAGEJ] = tiff_tags.raw(turned)
    parts = [text for tag, text in tiff_tags.PARTS.items() if tag in tags]
    stated = tags.get(tiff_tags.EXTRA_SAMPLES, {}).get("data", ())
    samples = tuple(stated) if _are_numbers(stated, 65535) else ()
    return Extras(tags=kept, extra_samples=samples, parts=tuple(parts), left=left)


def _are_numbers(data: Any, most: int) -> bool:
    """Whether the content of a tag is whole numbers from 0 to ``most``; a damaged one may have any type."""
    return isinstance(data, list) and all(isinstance(value, int) and 0 <= value <= most for value in data)


def _of_heif(file: BinaryIO, metadata: dict[str, Any]) -> Extras:
    chunks, parts = [], []
    for name, size in boxes(file):
        if name == b"mpvd":
            parts.append("the video of a motion photo")
        if name != b"meta":
            continue
        content = file.read(min(size, 1 << 22))
        at = content.find(b"colrnclx")
        if at >= 0 and len(content) >= at + 15:
            primaries, transfer = (int.from_bytes(content[at + 8 + i : at + 10 + i], "big") for i in (0, 2))
            # An ICC profile goes before these numbers; in PNG it would come after them. 2 means not specified.
            specified = (primaries, transfer) != (2, 2) and "icc-profile-data" not in metadata
            if specified and max(primaries, transfer) < 256:
                chunks.append((b"cICP", bytes([primaries, transfer, 0, 1])))
        if b"tmap" in content or b"hdrgainmap" in content:
            parts.append("the HDR gain map")
        if b"aux:depth" in content or b"aux:disparity" in content:
            parts.append("the depth map")
    return Extras(chunks=tuple(chunks), parts=tuple(parts))
