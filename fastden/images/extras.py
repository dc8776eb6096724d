"""What a file holds beside its pixels and what libvips carries: read from the source, put into the result.

libvips writes EXIF anew: a camera's own notes then lie at wrong offsets. It does not know EXIF in TIFF, text in PNG,
    XMP
above 64 kB in JPEG, and colours without an ICC profile. So this module copies the source's bytes. One note tells what
the result cannot hold.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, BinaryIO

from fastden.errors import UserError
from fastden.images import tiff_tags, xmp
from fastden.images.containers import (
    SEGMENT,
    behind_jpeg,
    boxes,
    jpeg_segments,
    png_chunks,
    with_jpeg_segments,
    with_png_chunks,
    with_riff_chunk,
)

_APP0, _APP1, _APP2, _APP11, _APP13, _APP14, _COMMENT = 0xE0, 0xE1, 0xE2, 0xEB, 0xED, 0xEE, 0xFE
_EXIF, _PHOTOSHOP = b"Exif\0\0", b"Photoshop 3.0\0"
_TEXT = (b"tEXt", b"zTXt", b"iTXt")
#: PNG's chunks that say what colours its values stand for, beside the ICC profile.
_COLOUR = (b"gAMA", b"cHRM", b"sRGB", b"cICP", b"mDCV", b"mDCv", b"cLLI", b"cLLi")
# Chunks that libvips writes, that belong to the pixels, or that describe the old pixels.
_PNG_OWN = (b"IHDR", b"PLTE", b"IDAT", b"IEND", b"iCCP", b"tRNS", b"eXIf", b"hIST", b"acTL", b"fcTL", b"fdAT", b"pHYs")
#: They hold for the result where it has the source's depth and channels.
_PNG_SAME_KIND = (b"sBIT", b"bKGD", b"sPLT")
_SRGB_GAMMA = 45455
_SRGB_COLOURS = (31270, 32900, 64000, 33000, 30000, 60000, 15000, 6000)
# Transfer functions and primaries (ITU-T H.273) that a screen shows as sRGB without being told.
_USUAL_TRANSFERS, _USUAL_PRIMARIES = (1, 2, 6, 13, 14, 15), (1, 2, 5, 6, 7)
_PRIMARIES = {9: "BT.2020", 11: "DCI-P3", 12: "Display P3"}
_TRANSFERS = {8: "linear", 16: "PQ", 18: "HLG"}


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
    """

    format: str = ""
    tags: Mapping[int, Any] = field(default_factory=dict)
    extra_samples: tuple[int, ...] = ()
    segments: tuple[tuple[int, bytes], ...] = ()
    chunks: tuple[tuple[bytes, bytes], ...] = ()
    kind: bytes = b""
    parts: tuple[str, ...] = ()
    left: tuple[str, ...] = ()

    def colour(self) -> dict[bytes, bytes]:
        """The chunks of PNG that say what colours the values stand for."""
        return {name: data for name, data in self.chunks if name in _COLOUR}


def read_extras(file: BinaryIO, format_name: str, metadata: Mapping[str, Any]) -> tuple[Extras, dict[str, Any]]:
    """What a file holds beside its pixels, and libvips' fields mended by it.

    Args:
        file: of the source; its pixels are passed over.
        format_name: of it.
        metadata: what libvips has found.
    """
    readers = {"jpeg": _of_jpeg, "png": _of_png, "tiff": _of_tiff, "avif": _of_heif, "heic": _of_heif}
    found = dict(metadata)
    if format_name not in readers:
        return Extras(format_name), found
    extras = readers[format_name](file, found)
    return replace(extras, format=format_name), found


def _of_jpeg(file: BinaryIO, metadata: dict[str, Any]) -> Extras:
    segments = jpeg_segments(file)
    size, behind = behind_jpeg(file)
    kept: list[tuple[int, bytes]] = []
    parts, left, packets, extensions, gain_map = [], [], [], [], b"hdrgm" in behind
    for marker, payload in segments:
        if marker == _APP0:
            if payload.startswith(b"JFIF\0") and len(payload) >= 14:
                kept.append((marker, payload[:12] + b"\0\0"))  # without a thumbnail
        elif marker == _APP1 and payload.startswith(_EXIF):
            metadata.setdefault("exif-data", payload)
        elif marker == _APP1 and payload.startswith(xmp.MAIN):
            packets.append(payload[len(xmp.MAIN) :])
        elif marker == _APP1 and payload.startswith(xmp.EXTENSION):
            extensions.append(payload[len(xmp.EXTENSION) :])
        elif marker == _APP2 and payload.startswith(b"urn:iso:std:iso:ts:21496"):
            gain_map = True
        elif marker == _APP11:
            left.append("content credentials and other boxes (JUMBF)")
        elif marker != _APP14 and not (marker == _APP2 and payload.startswith((b"ICC_PROFILE\0", b"MPF\0"))):
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
        elif b"\xff\xd8\xff" in behind[:64]:
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
            continue  # in libvips' fields
        elif name in (b"tEXt", b"zTXt") and data.startswith((b"Raw profile type exif\0", b"Raw profile type xmp\0")):
            continue
        elif name == b"eXIf":
            metadata.setdefault("exif-data", data)
        elif name in _COLOUR or name in _TEXT or name in _PNG_SAME_KIND or name == b"pHYs":
            kept.append((name, data))
        elif name not in _PNG_OWN:
            # The fourth letter says whether a chunk holds for other pixels too.
            if chr(name[3]).islower():
                kept.append((name, data))
            elif name == b"caBX":
                left.append("content credentials (caBX)")
            else:
                left.append(f"the chunk {name.decode('latin-1')}")
    parts = [f"{len(rest)} bytes behind the picture"] if (rest := file.read(1 << 20).strip(b"\0")) else []
    return Extras(chunks=tuple(kept), kind=kind, parts=tuple(parts), left=tuple(dict.fromkeys(left)))


def _of_tiff(file: BinaryIO, _metadata: dict[str, Any]) -> Extras:
    tags = tiff_tags.first_directory(file)
    if tags is None:
        return Extras(left=("tags that cannot be read",))
    kept = tiff_tags.descriptive(tags)
    description = kept.get(tiff_tags.DESCRIPTION, {}).get("data", "")
    planar = tags.get(284, {}).get("data") == [2]
    # tifffile's description of the arrangement of values fits the source alone.
    if planar and isinstance(description, str) and description.startswith('{"shape"'):
        del kept[tiff_tags.DESCRIPTION]
    parts = [text for tag, text in tiff_tags.PARTS.items() if tag in tags]
    samples = tuple(int(value) for value in tags.get(tiff_tags.EXTRA_SAMPLES, {}).get("data", ()))
    return Extras(tags=kept, extra_samples=samples, parts=tuple(parts))


def _of_heif(file: BinaryIO, _metadata: dict[str, Any]) -> Extras:
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
            if max(primaries, transfer) < 256:
                chunks.append((b"cICP", bytes([primaries, transfer, 0, 1])))
        if b"tmap" in content or b"hdrgainmap" in content:
            parts.append("the HDR gain map")
        if b"aux:depth" in content or b"aux:disparity" in content:
            parts.append("the depth map")
    return Extras(chunks=tuple(chunks), parts=tuple(parts))


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
        primaries, transfer = colour[b"cICP"][:2]
        if transfer in _USUAL_TRANSFERS and primaries in _USUAL_PRIMARIES:
            return
        named = (_PRIMARIES.get(primaries, f"primaries {primaries}"), _TRANSFERS.get(transfer, f"transfer {transfer}"))
        what = f"colours are {' and '.join(named)} (cICP, nclx)"
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
    """What is put into a file that libvips has written.

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
    """What a file in ``format_name`` gets beside what libvips writes.

    Args:
        extras, metadata: of the source.
        format_name, strip_metadata: as in :func:`fastden.images.codec.encode_image`.
        kind: depth and colour type of a PNG that is written.
    """
    check_colour(extras, format_name, has_profile="icc-profile-data" in metadata)
    missing = list(extras.parts)
    if strip_metadata:
        chunks = tuple(extras.colour().items()) if format_name == "png" else ()
        tags = _samples(extras) if format_name == "tiff" else {}
        return Attachment(format_name, chunks=chunks, tags=tags, note=_note(missing))
    missing += extras.left
    orientation = int(metadata.get("orientation", 1)) or 1
    block = bytes(metadata.get("exif-data", b"")).removeprefix(_EXIF)
    packet, _ = xmp.freed(bytes(metadata.get("xmp-data", b"")), upright=orientation == 1)
    moved = False
    if format_name == "tiff":
        tags, moved = _tags(extras, metadata, block, packet, orientation, missing)
        return Attachment(format_name, tags=tags, note=_note(missing, moved))
    if not block and extras.tags:
        moved = tiff_tags.has_maker_note(extras.tags)
        block, left = tiff_tags.exif_block({**extras.tags, tiff_tags.ORIENTATION: tiff_tags.short(orientation)})
        missing += tiff_tags.names(left)
    elif not block:
        density = (float(metadata.get("xres", 1.0)), float(metadata.get("yres", 1.0)))
        plain = extras.format == "jpeg" and format_name == "jpeg"  # JFIF says it
        if orientation > 1 or (density != (1.0, 1.0) and format_name in ("jpeg", "webp") and not plain):
            block = tiff_tags.resolution_block(*density, orientation)
    block = tiff_tags.with_orientation(block, orientation)
    if extras.extra_samples[:1] in ((0,), (1,)) and format_name != "jpeg":
        what = "of unknown meaning" if extras.extra_samples[0] == 0 else "premultiplied alpha"
        missing.append(f"what the TIFF says of its further channel ({what}; it becomes alpha)")
    if format_name == "jpeg":
        segments = _segments(extras, metadata, block, packet, missing)
        return Attachment(format_name, segments=segments, note=_note(missing, moved))
    missing += _not_in_png(extras, metadata)
    if format_name == "png":
        chunks, without = _chunks(extras, block, packet, kind)
        return Attachment(format_name, chunks=chunks, without=without, note=_note(missing, moved))
    if any(name in _TEXT for name, _ in extras.chunks):
        missing.append("PNG text")
    if any(marker == _COMMENT for marker, _ in extras.segments):
        missing.append("the JPEG comment")
    if format_name in ("avif", "heic"):
        moved = moved or (bool(block) and tiff_tags.has_maker_note(tiff_tags.exif_directory(block) or {}))
        block = b""
    return Attachment(format_name, exif=block, note=_note(missing, moved))


def for_libvips(metadata: Mapping[str, Any], attachment: Attachment, extras: Extras) -> dict[str, Any]:
    """The fields that libvips writes itself: what is attached is not among them."""
    if attachment.format in ("jpeg", "png", "tiff"):
        return {name: value for name, value in metadata.items() if name in ("icc-profile-data", "xres", "yres")}
    fields = dict(metadata)
    if "xmp-data" in fields:
        upright = int(fields.get("orientation", 1)) in (0, 1)
        fields["xmp-data"], _ = xmp.freed(bytes(fields["xmp-data"]), upright=upright)
    if "exif-data" not in fields and extras.tags:
        block, _ = tiff_tags.exif_block(extras.tags)
        if block:
            fields["exif-data"] = _EXIF + block
    if attachment.format == "heic" and "exif-data" in fields:
        block = bytes(fields["exif-data"]).removeprefix(_EXIF)
        fields["exif-data"] = _EXIF + tiff_tags.with_orientation(block, 1)
    return fields


def _note(missing: list[str], moved: bool = False) -> str:
    texts = [f"not kept: {', '.join(dict.fromkeys(missing))}"] if missing else []
    if moved:
        texts.append("the camera's maker notes (EXIF) are copied, but their offsets may not hold in this format")
    return "; ".join(texts)


def _resources(extras: Extras) -> bytes:
    """Photoshop's image resources, among which IPTC is one."""
    if tiff_tags.PHOTOSHOP in extras.tags:
        return _bytes(extras.tags[tiff_tags.PHOTOSHOP])
    parts = [data[len(_PHOTOSHOP) :] for marker, data in extras.segments if marker == _APP13]
    return b"".join(parts)


def _bytes(tag: Any) -> bytes:
    data = tag["data"]
    if isinstance(data, list):
        # IPTC is bytes; files often declare it as 32-bit numbers.
        size = 4 if tag["datatype"] in (4, 9, 13) else 1
        return b"".join((value % (1 << 8 * size)).to_bytes(size, "little") for value in data)
    return data if isinstance(data, bytes) else data.encode()


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
    first = [pair for pair in extras.segments if pair[0] == _APP0]
    others = [pair for pair in extras.segments if pair[0] not in (_APP0, _COMMENT)]
    comments = [pair for pair in extras.segments if pair[0] == _COMMENT]
    if block and len(block) + len(_EXIF) > SEGMENT:
        missing.append("EXIF, which is larger than a JPEG holds")
    elif block:
        first.append((_APP1, _EXIF + block))
    packets = xmp.split(packet) if packet else []
    if packets is None:
        missing.append("XMP, which is larger than a JPEG holds")
    elif len(packets) > 1 and extras.format != "jpeg":
        missing.append("XMP in one piece (what is beyond 64 kB follows as ExtendedXMP, which few programs read)")
    first += [(_APP1, part) for part in packets or []]
    if not any(marker == _APP13 for marker, _ in others):
        resources, iptc = _resources(extras), _iptc(extras)
        if len(resources) + len(_PHOTOSHOP) > SEGMENT or not resources:
            resources = _resource(iptc) if iptc else b""
        if not resources and "iptc-data" in metadata and not extras.format:
            resources = _resource(bytes(metadata["iptc-data"]))
        if resources:
            others.insert(0, (_APP13, _PHOTOSHOP + resources))
    if any(name in _TEXT for name, _ in extras.chunks):
        missing.append("PNG text")
    return (*first, *others, *comments)


def _resource(iptc: bytes) -> bytes:
    return b"8BIM\x04\x04\0\0" + len(iptc).to_bytes(4, "big") + iptc + b"\0" * (len(iptc) % 2)


def _not_in_png(extras: Extras, metadata: Mapping[str, Any]) -> list[str]:
    """What a JPEG or TIFF holds and PNG, WebP and AVIF cannot."""
    missing = []
    if _iptc(extras) or ("iptc-data" in metadata and not extras.format):
        missing.append("IPTC")
    if any(marker not in (_APP0, _APP1, _APP2, _APP13, _COMMENT) for marker, _ in extras.segments):
        missing.append("the JPEG's application segments")
    return missing


def _chunks(
    extras: Extras, block: bytes, packet: bytes, kind: bytes
) -> tuple[tuple[tuple[bytes, bytes], ...], tuple[bytes, ...]]:
    chunks = [pair for pair in extras.chunks if pair[0] not in _PNG_SAME_KIND or extras.kind == kind]
    if block:
        chunks.append((b"eXIf", block))
    if packet:
        chunks.append((b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + packet))
    chunks += [(b"tEXt", b"Comment\0" + data) for marker, data in extras.segments if marker == _COMMENT]
    # libvips writes 72 dots an inch where the resolution is unknown.
    unknown = extras.tags.get(296, {}).get("data") == [1]
    without = (b"pHYs",) if extras.format == "png" or unknown else ()
    return tuple(chunks), without


def _samples(extras: Extras) -> dict[int, Any]:
    if not extras.extra_samples or extras.extra_samples[0] == 2:
        return {}
    return {tiff_tags.EXTRA_SAMPLES: {"datatype": 3, "data": list(extras.extra_samples[:1])}}


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
    if any(name in _TEXT for name, _ in extras.chunks):
        missing.append("PNG text")
    comments = [data for marker, data in extras.segments if marker == _COMMENT]
    if comments and tiff_tags.DESCRIPTION not in tags:
        tags[tiff_tags.DESCRIPTION] = {"datatype": 2, "data": comments[0].rstrip(b"\0")}
    elif comments:
        missing.append("the JPEG comment")
    if any(marker not in (_APP0, _APP1, _APP2, _APP13, _COMMENT) for marker, _ in extras.segments):
        missing.append("the JPEG's application segments")
    tags |= _samples(extras)
    if set(tags) == {tiff_tags.ORIENTATION} and orientation == 1:
        return {}, False
    return tags, tiff_tags.has_maker_note(tags)


def png_kind(bands: int, itemsize: int) -> bytes:
    """Depth and colour type of a PNG, as its header says them."""
    return bytes([8 * itemsize, {1: 0, 2: 4, 3: 2, 4: 6}[bands]])
