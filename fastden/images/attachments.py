"""Puts what a source holds beside its pixels into the file that libvips has written.

One note tells what the result cannot hold.
"""

from __future__ import annotations

import io
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, BinaryIO

from fastden.errors import UserError
from fastden.images import tiff_tags, xmp
from fastden.images.containers import (
    APP0,
    APP1,
    APP2,
    APP13,
    COMMENT,
    EXIF,
    SEGMENT,
    with_jpeg_segments,
    with_png_chunks,
    with_riff_chunk,
)
from fastden.images.extras import MOST_DENSITY, PNG_SAME_KIND, PNG_TEXT, Extras

_PHOTOSHOP = b"Photoshop 3.0\0"
_SRGB_GAMMA = 45455
_SRGB_COLOURS = (31270, 32900, 64000, 33000, 30000, 60000, 15000, 6000)
# Transfer functions and primaries (ITU-T H.273) that a screen shows as sRGB without being told.
_USUAL_TRANSFERS, _USUAL_PRIMARIES = (1, 2, 6, 13, 14, 15), (1, 2, 5, 6, 7)
_PRIMARIES = {9: "BT.2020", 11: "DCI-P3", 12: "Display P3"}
_TRANSFERS = {8: "linear", 13: "sRGB", 16: "PQ", 18: "HLG"}


def check_colour(extras: Extras, format_name: str, *, has_profile: bool) -> None:
    """Raise UserError where the result would be shown in other colours, because its format cannot describe them.

    Args:
        extras: of the source.
        format_name: of the result.
        has_profile: whether the source has an ICC profile, which the result gets.
    """
    if has_profile or format_name == "png":
        return
    colour = extras.colour()
    if b"cICP" in colour and len(colour[b"cICP"]) == 4:
        primaries, transfer, _, full = colour[b"cICP"]
        if full and transfer in _USUAL_TRANSFERS and primaries in _USUAL_PRIMARIES:
            return
        named = (_PRIMARIES.get(primaries, f"primaries {primaries}"), _TRANSFERS.get(transfer, f"transfer {transfer}"))
        narrow = "" if full else ", in the narrow range of video"
        what = f"colours are {' and '.join(named)}{narrow} (cICP, nclx)"
    elif b"sRGB" in colour or _is_srgb(colour):
        return
    else:
        what = f"values have their own gamma or primaries ({', '.join(name.decode() for name in colour)})"
    raise UserError(f"{what}, which {format_name} would not say: they would be shown wrong; accepted: png")


def _is_srgb(colour: Mapping[bytes, bytes]) -> bool:
    gamma, chromaticities = colour.get(b"gAMA", b""), colour.get(b"cHRM", b"")
    usual = not gamma or abs(int.from_bytes(gamma[:4], "big") - _SRGB_GAMMA) <= 500
    if len(chromaticities) == 32:
        values = [int.from_bytes(chromaticities[i : i + 4], "big") for i in range(0, 32, 4)]
        usual = usual and max(abs(a - b) for a, b in zip(values, _SRGB_COLOURS, strict=True)) <= 100
    return usual


@dataclass(frozen=True)
class Attachment:
    """Parts to put into a file that libvips has written.

    Attributes:
        format: of the file.
        segments, chunks, tags, exif: what is added; ``exif`` takes the place of what a WebP has.
        without: chunks of a PNG that are left out.
        note: what the file does not hold; empty for nothing.
    """

    format: str
    segments: tuple[tuple[int, bytes], ...] = ()
    chunks: tuple[tuple[bytes, bytes], ...] = ()
    tags: Mapping[int, Any] = field(default_factory=dict)
    exif: bytes = b""
    without: tuple[bytes, ...] = ()
    note: str = ""

    def put(self, source: BinaryIO, target: BinaryIO) -> None:
        """Copy the file with what is added."""
        if self.format == "jpeg":
            with_jpeg_segments(source, target, self.segments)
        elif self.format == "png":
            with_png_chunks(source, target, self.chunks, self.without)
        elif self.format == "tiff":
            tiff_tags.with_tags(source, target, self.tags)
        else:
            target.write(with_riff_chunk(source.read(), b"EXIF", self.exif))

    @property
    def empty(self) -> bool:
        """Whether the file stays as it is."""
        return not (self.segments or self.chunks or self.tags or self.exif or self.without)

    def put_into(self, data: bytes) -> bytes:
        """:meth:`put` for a file in memory."""
        if self.empty:
            return data
        target = io.BytesIO()
        self.put(io.BytesIO(data), target)
        return target.getvalue()


def plan_attachment(
    extras: Extras, metadata: Mapping[str, Any], format_name: str, *, kind: bytes, strip_metadata: bool
) -> Attachment:
    """The parts that a file in ``format_name`` gets beside those that libvips writes.

    Args:
        extras, metadata: of the source.
        format_name, strip_metadata: as in :func:`fastden.images.codec.encode_image`.
        kind: depth and colour type of a PNG that is written.

    Raises:
        UserError: the format cannot hold the colours, or the metadata are damaged in a way that nobody foresaw.
    """
    try:
        return _plan(extras, metadata, format_name, kind, strip_metadata)
    except (struct.error, LookupError, ArithmeticError, AttributeError) as error:
        what = f"{type(error).__name__}: {error}"
        raise UserError(f"metadata that cannot be carried over ({what}); accepted: --strip-metadata") from error


def _plan(
    extras: Extras, metadata: Mapping[str, Any], format_name: str, kind: bytes, strip_metadata: bool
) -> Attachment:
    check_colour(extras, format_name, has_profile="icc-profile-data" in metadata)
    missing = list(extras.parts)
    known = "xres" in metadata
    if extras.dense and (strip_metadata or not _keeps_density(extras, metadata, format_name)):
        where = "the resolution in pHYs" if format_name == "png" else "the resolution"
        missing.append(f"{where} (above {MOST_DENSITY:.0f} pixels per millimetre)")
    if strip_metadata:
        chunks = tuple(extras.colour().items()) if format_name == "png" else ()
        tags = _samples(extras) if format_name == "tiff" else {}
        if format_name == "tiff" and not known:
            tags |= tiff_tags.unknown_resolution()
        segments: tuple[tuple[int, bytes], ...] = ()
        if format_name == "jpeg" and known:
            segments = ((APP0, _jfif(metadata)),)
        # libvips writes a resolution in any case.
        without = () if known or format_name != "png" else (b"pHYs",)
        return Attachment(
            format_name, segments=segments, chunks=chunks, tags=tags, without=without, note=_note(missing)
        )
    missing += extras.left
    orientation = int(metadata.get("orientation", 1)) or 1
    block = bytes(metadata.get("exif-data", b"")).removeprefix(EXIF)
    packet = xmp.freed(bytes(metadata.get("xmp-data", b"")), upright=orientation == 1)
    if format_name == "tiff":
        tags, moved = _tags(extras, metadata, block, packet, orientation, missing)
        return Attachment(format_name, tags=tags, note=_note(missing, moved))
    moved = not block and tiff_tags.has_maker_note(extras.tags)
    block = _exif(extras, metadata, block, format_name, orientation, missing)
    if extras.extra_samples[:1] == (0,) and format_name != "jpeg":
        missing.append("what the TIFF says of its further channel (of unknown meaning; it becomes alpha)")
    if format_name == "jpeg":
        segments = _segments(extras, metadata, block, packet, missing)
        return Attachment(format_name, segments=segments, note=_note(missing, moved))
    missing += _not_in_png(extras, metadata)
    if format_name == "png":
        chunks = _chunks(extras, block, packet, kind)
        without = () if known and extras.format != "png" else (b"pHYs",)
        return Attachment(format_name, chunks=chunks, without=without, note=_note(missing, moved))
    if any(name in PNG_TEXT for name, _ in extras.chunks):
        missing.append("PNG text")
    if any(marker == COMMENT for marker, _ in extras.segments):
        missing.append("the JPEG comment")
    if format_name in ("avif", "heic"):
        moved = moved or (bool(block) and tiff_tags.has_maker_note(tiff_tags.exif_directory(block) or {}))
        block = b""
    return Attachment(format_name, exif=block, note=_note(missing, moved))


def _keeps_density(extras: Extras, metadata: Mapping[str, Any], format_name: str) -> bool:
    """Whether a file has a resolution that libvips does not write, in what is attached to it."""
    if format_name in ("jpeg", "webp"):
        return bool(extras.tags) or "exif-data" in metadata
    return format_name == extras.format and format_name in ("tiff", "png")


def _exif(
    extras: Extras,
    metadata: Mapping[str, Any],
    block: bytes,
    format_name: str,
    orientation: int,
    missing: list[str],
) -> bytes:
    """An EXIF block: the source's, or one of a TIFF's tags, or one of resolution and orientation where need be."""
    if not block and extras.tags:
        block, left = tiff_tags.exif_block({**extras.tags, tiff_tags.ORIENTATION: tiff_tags.short(orientation)})
        missing += tiff_tags.names(left)
    elif not block:
        density = (float(metadata["xres"]), float(metadata["yres"])) if "xres" in metadata else None
        plain = extras.format == "jpeg" and format_name == "jpeg"  # JFIF states the resolution
        if orientation > 1 or (density is not None and format_name in ("jpeg", "webp") and not plain):
            block = tiff_tags.resolution_block(density, orientation)
    return tiff_tags.with_orientation(block, orientation)


def for_libvips(metadata: Mapping[str, Any], attachment: Attachment, extras: Extras) -> dict[str, Any]:
    """The fields that libvips writes itself: what is attached is not among them."""
    if attachment.format in ("jpeg", "png", "tiff"):
        return {name: value for name, value in metadata.items() if name in ("icc-profile-data", "xres", "yres")}
    fields = dict(metadata)
    if "xmp-data" in fields:
        upright = int(fields.get("orientation", 1)) in (0, 1)
        fields["xmp-data"] = xmp.freed(bytes(fields["xmp-data"]), upright=upright)
    if "exif-data" not in fields and extras.tags:
        # libvips takes a resolution without a unit for one per millimetre.
        tags = {tag: value for tag, value in extras.tags.items() if "xres" in fields or tag not in tiff_tags.RESOLUTION}
        block, _ = tiff_tags.exif_block(tags)
        if block:
            fields["exif-data"] = EXIF + block
    if attachment.format == "avif" and "xres" not in fields and has_exif(fields, attachment):
        fields["xres"], fields["yres"] = tiff_tags.UNKNOWN  # libvips writes a resolution into EXIF
    if attachment.format == "heic" and "exif-data" in fields:
        block = bytes(fields["exif-data"]).removeprefix(EXIF)
        fields["exif-data"] = EXIF + tiff_tags.with_orientation(block, 1)
    return fields


def has_exif(fields: Mapping[str, Any], attachment: Attachment) -> bool:
    """Whether libvips has to write EXIF into a WebP or AVIF: of the fields, or for the attachment to replace."""
    if attachment.format == "webp":
        return bool(attachment.exif)
    return "exif-data" in fields or "xres" in fields or int(fields.get("orientation", 1)) > 1


def _note(missing: list[str], moved: bool = False) -> str:
    texts = [f"not kept: {', '.join(dict.fromkeys(missing))}"] if missing else []
    if moved:
        texts.append("the camera's maker notes (EXIF) are copied, but their offsets may not hold in this format")
    return "; ".join(texts)


def _resources(extras: Extras) -> bytes:
    """Photoshop's image resources, among which IPTC is one."""
    if tiff_tags.PHOTOSHOP in extras.tags:
        return _bytes(extras.tags[tiff_tags.PHOTOSHOP])
    parts = [data[len(_PHOTOSHOP) :] for marker, data in extras.segments if marker == APP13]
    return b"".join(parts)


def _bytes(tag: Any) -> bytes:
    data = tag["data"]
    if isinstance(data, list):
        if not all(isinstance(value, int) for value in data):
            return b""  # fractions and floating-point numbers hold no bytes
        # IPTC is bytes; files often declare it as 32-bit numbers.
        size = 4 if tag["datatype"] in (4, 9, 13) else 1
        return b"".join((value % (1 << 8 * size)).to_bytes(size, "little") for value in data)
    return data if isinstance(data, bytes) else data.encode() if isinstance(data, str) else b""


def _iptc(extras: Extras) -> bytes:
    if tiff_tags.IPTC in extras.tags:
        return _bytes(extras.tags[tiff_tags.IPTC])
    data, position = _resources(extras), 0
    while data[position : position + 4] == b"8BIM" and position + 12 <= len(data):
        number = int.from_bytes(data[position + 4 : position + 6], "big")
        start = position + 6 + (data[position + 6] + 2) // 2 * 2  # behind its name, of even length
        size = int.from_bytes(data[start : start + 4], "big")
        if number == 0x0404:
            return data[start + 4 : start + 4 + size]
        position = start + 4 + size + size % 2
    return b""


def _segments(
    extras: Extras, metadata: Mapping[str, Any], block: bytes, packet: bytes, missing: list[str]
) -> tuple[tuple[int, bytes], ...]:
    first = [pair for pair in extras.segments if pair[0] == APP0]
    others = [pair for pair in extras.segments if pair[0] not in (APP0, COMMENT)]
    comments = [pair for pair in extras.segments if pair[0] == COMMENT]
    if block and len(block) + len(EXIF) > SEGMENT:
        missing.append("EXIF, which is larger than a JPEG holds")
    elif block:
        first.append((APP1, EXIF + block))
    packets = xmp.split(packet) if packet else []
    if packets is None:
        missing.append("XMP, which is larger than a JPEG holds")
    elif len(packets) > 1 and extras.format != "jpeg":
        missing.append("XMP in one piece (what is beyond 64 kB follows as ExtendedXMP, which few programs read)")
    first += [(APP1, part) for part in packets or []]
    if not any(marker == APP13 for marker, _ in others):
        resources, iptc = _resources(extras), _iptc(extras)
        if len(resources) + len(_PHOTOSHOP) > SEGMENT or not resources:
            resources = _resource(iptc) if iptc else b""
        if not resources and "iptc-data" in metadata and not extras.format:
            resources = _resource(bytes(metadata["iptc-data"]))
        if resources:
            others.insert(0, (APP13, _PHOTOSHOP + resources))
    if any(name in PNG_TEXT for name, _ in extras.chunks):
        missing.append("PNG text")
    return (*first, *others, *comments)


def _resource(iptc: bytes) -> bytes:
    return b"8BIM\x04\x04\0\0" + len(iptc).to_bytes(4, "big") + iptc + b"\0" * (len(iptc) % 2)


def _not_in_png(extras: Extras, metadata: Mapping[str, Any]) -> list[str]:
    """Parts of a JPEG or TIFF that PNG, WebP and AVIF cannot hold."""
    missing = []
    if _iptc(extras) or ("iptc-data" in metadata and not extras.format):
        missing.append("IPTC")
    if any(marker not in (APP0, APP1, APP2, APP13, COMMENT) for marker, _ in extras.segments):
        missing.append("the JPEG's application segments")
    return missing


def _chunks(extras: Extras, block: bytes, packet: bytes, kind: bytes) -> tuple[tuple[bytes, bytes], ...]:
    chunks = [pair for pair in extras.chunks if pair[0] not in PNG_SAME_KIND or extras.kind == kind]
    if block:
        chunks.append((b"eXIf", block))
    if packet:
        chunks.append((b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + packet))
    chunks += [(b"tEXt", b"Comment\0" + data) for marker, data in extras.segments if marker == COMMENT]
    return tuple(chunks)


def _jfif(metadata: Mapping[str, Any]) -> bytes:
    """JFIF's segment with a resolution, in dots an inch."""
    dots = (min(max(round(float(metadata[name]) * 25.4), 1), 65535) for name in ("xres", "yres"))
    return b"JFIF\0\1\1\1" + struct.pack(">HH", *dots) + b"\0\0"


def _samples(extras: Extras) -> dict[int, Any]:
    # libvips has divided by premultiplied alpha, so that it is ordinary alpha now, as libvips writes.
    if extras.extra_samples[:1] != (0,):
        return {}
    return {tiff_tags.EXTRA_SAMPLES: tiff_tags.short(0)}


def _tags(
    extras: Extras,
    metadata: Mapping[str, Any],
    block: bytes,
    packet: bytes,
    orientation: int,
    missing: list[str],
) -> tuple[dict[int, Any], bool]:
    """Tags for a TIFF, and whether a camera's own notes have moved among them."""
    tags = dict(extras.tags)
    if block:
        found = tiff_tags.exif_directory(block)
        if found is None:
            missing.append("EXIF, which cannot be read")
        else:
            if tiff_tags.has_thumbnail(block):
                missing.append("the thumbnail in EXIF")
            # The resolution is libvips' field.
            own = tiff_tags.descriptive(found)
            tags |= {tag: value for tag, value in own.items() if tag not in tiff_tags.RESOLUTION}
    tags.pop(tiff_tags.ICC, None)
    tags[tiff_tags.ORIENTATION] = tiff_tags.short(orientation)
    if packet:
        tags[tiff_tags.XMP] = tiff_tags.raw(packet)
    iptc, resources = _iptc(extras), _resources(extras)
    if not iptc and not extras.format:
        iptc = bytes(metadata.get("iptc-data", b""))
    if iptc and tiff_tags.IPTC not in tags:
        tags[tiff_tags.IPTC] = tiff_tags.raw(iptc, 7)
    if resources and tiff_tags.PHOTOSHOP not in tags:
        tags[tiff_tags.PHOTOSHOP] = tiff_tags.raw(resources)
    if "image-description" in metadata and tiff_tags.DESCRIPTION not in tags and not extras.format:
        tags[tiff_tags.DESCRIPTION] = {"datatype": 2, "data": str(metadata["image-description"])}
    if any(name in PNG_TEXT for name, _ in extras.chunks):
        missing.append("PNG text")
    comments = [data for marker, data in extras.segments if marker == COMMENT]
    if comments and tiff_tags.DESCRIPTION not in tags:
        tags[tiff_tags.DESCRIPTION] = {"datatype": 2, "data": comments[0].rstrip(b"\0")}
    elif comments:
        missing.append("the JPEG comment")
    if any(marker not in (APP0, APP1, APP2, APP13, COMMENT) for marker, _ in extras.segments):
        missing.append("the JPEG's application segments")
    tags |= _samples(extras)
    if "xres" not in metadata and not any(tag in tags for tag in tiff_tags.RESOLUTION):
        tags |= tiff_tags.unknown_resolution()
    if set(tags) == {tiff_tags.ORIENTATION} and orientation == 1:
        return {}, False
    return tags, tiff_tags.has_maker_note(tags)


def png_kind(bands: int, itemsize: int) -> bytes:
    """Depth and colour type of a PNG, as its header says them."""
    return bytes([8 * itemsize, {1: 0, 2: 4, 3: 2, 4: 6}[bands]])
