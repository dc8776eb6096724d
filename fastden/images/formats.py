"""Formats of the extra ``formats``, each read by a library of its own: HEIC, JPEG XL and camera raw.

libvips' binary package reads none of them: HEVC is patented, LibRaw and libjxl are left out.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any, BinaryIO

import numpy as np

from fastden.errors import UserError, in_one_line
from fastden.images import tiff_tags
from fastden.images.containers import EXIF, boxes
from fastden.images.kinds import OTHER_SUFFIXES, PACKAGES, is_installed, kind_of_bytes, not_supported
from fastden.images.pixels import Array
from fastden.images.tiff_directories import is_raw_tiff

#: The suffix of the result where the kind of the input is read and not written.
RESULT = {"JPEG XL": ".png", "camera raw": ".tif"}
#: Quality of a HEIC that is written, as AVIF's.
HEIC_QUALITY = 90
#: Bytes of a HEIC up to which it is read back for certain. libde265, by which pillow-heif and most programs but Apple's
#: read HEIC, decoded one of 16.6 MB and none of 17.1 MB or more (pillow-heif 1.8): noisy pictures from 7 megapixels on.
CERTAIN_HEIC = 16 << 20
_NAMES = {"HEIC": "heic", "JPEG XL": "jxl", "camera raw": "raw"}


@dataclass(frozen=True)
class Opened:
    """A file that was opened, its pixels not decoded yet.

    Attributes:
        width, height, bands: pixels, and channels with alpha.
        has_alpha: whether the last one is alpha.
        dtype: uint8 or uint16.
        bits: significant ones a channel.
        format: ``heic``, ``jxl`` or ``raw``.
        decode: gives the pixels, (height, width, bands).
        metadata, notes: as of :class:`fastden.images.image_file.ImageFile`.
    """

    width: int
    height: int
    bands: int
    has_alpha: bool
    dtype: np.dtype[Any]
    bits: int
    format: str
    decode: Callable[[], Array]
    metadata: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def read_suffixes() -> dict[str, str]:
    """Suffixes of the kinds that can be read here beside libvips' own, and their kinds."""
    return {suffix: kind for kind in PACKAGES if is_installed(kind) for suffix in OTHER_SUFFIXES[kind]}


def result_suffix(suffix: str) -> str:
    """The suffix of a result for an input of that suffix: the same, where its format can be written."""
    return RESULT.get(read_suffixes().get(suffix.lower(), ""), suffix)


def open_file(file: BinaryIO) -> Opened | None:
    """Open a file of one of these kinds; None for all others, and for what libvips may read itself.

    Raises:
        UserError: the file is damaged, or its kind is read by a package that is not installed.
    """
    file.seek(0)
    head = file.read(512)
    kind = kind_of_bytes(head)
    if kind is None and head[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+") and is_raw_tiff(file):
        kind = "camera raw"
    if kind not in PACKAGES or (kind == "JPEG XL" and _libvips_reads_jxl()):
        return None
    if not is_installed(kind):
        if kind == "HEIC":  # a libvips with HEVC reads it
            return None
        raise not_supported(kind)
    file.seek(0)
    opener = {"HEIC": _open_heic, "JPEG XL": _open_jxl, "camera raw": _open_raw}[kind]
    try:
        # Pixels are decoded when the file may be closed.
        return opener(io.BytesIO(file.read()))
    except (UserError, MemoryError):
        raise
    except Exception as error:  # each library has errors of its own
        raise _damaged(kind, error) from error


def _damaged(kind: str, error: Exception) -> UserError:
    said = error.args[0] if error.args else ""
    text = said.decode("utf-8", "replace") if isinstance(said, bytes) else in_one_line(error)  # LibRaw gives bytes
    return UserError(f"corrupt, truncated or not supported {kind} ({text})")


def _guarded(kind: str, decode: Callable[[], Array]) -> Callable[[], Array]:
    def guarded() -> Array:
        try:
            return decode()
        except (UserError, MemoryError):
            raise
        except Exception as error:  # as above
            raise _damaged(kind, error) from error

    return guarded


def _libvips_reads_jxl() -> bool:
    from fastden.images.libvips import load_vips

    return bool(load_vips().type_find("VipsOperation", "jxlload"))


def _metadata(info: Mapping[Any, Any]) -> dict[str, Any]:
    """Fields of Pillow's plugins, by libvips' names; the picture is upright already."""
    names = {"exif-data": "exif", "xmp-data": "xmp", "icc-profile-data": "icc_profile"}
    found = {name: bytes(info[key]) for name, key in names.items() if info.get(key)}
    return {**found, "orientation": 1} if "exif-data" in found else found


def _open_heic(file: BinaryIO) -> Opened:
    heif = import_module("pillow_heif").open_heif(file, convert_hdr_to_8bit=False)
    width, height = heif.size
    bits = int(heif.info.get("bit_depth", 8))
    bands = len(heif.mode.split(";")[0])
    notes = (f"not kept: {len(heif) - 1} further pictures of the file",) if len(heif) > 1 else ()
    dtype = np.dtype(np.uint8 if bits == 8 else np.uint16)

    def decode() -> Array:
        values: Array = np.asarray(heif)
        return values.reshape(height, width, bands)

    # Numbers of 10 or 12 bits stand in the upper bits of 16.
    return Opened(
        width,
        height,
        bands,
        heif.has_alpha,
        dtype,
        bits,
        _NAMES["HEIC"],
        _guarded("HEIC", decode),
        _metadata(heif.info),
        notes,
    )


class _Bits:
    """Numbers in a JPEG XL's header: lowest bits first (ISO/IEC 18181-1)."""

    def __init__(self, data: bytes) -> None:
        self._left = int.from_bytes(data, "little")

    def take(self, count: int) -> int:
        value = self._left & ((1 << count) - 1)
        self._left >>= count
        return value

    def skip_size(self) -> None:
        """Width and height; the latter may be a share of the former."""
        small = self.take(1)
        for axis in range(2):
            if axis == 0 or self.take(3) == 0:
                self.take(5 if small else (9, 13, 18, 30)[self.take(2)])


def _is_animated_jxl(file: BinaryIO) -> bool:
    """Whether a JPEG XL has several frames: its decoder gives the last one and tells nothing of it."""
    file.seek(0)
    head = file.read(64)
    if not head.startswith(b"\xff\x0a"):
        # A codestream in one box, or in parts, each with a number in front of it.
        head = b""
        for name, _ in boxes(file):
            if name in (b"jxlc", b"jxlp"):
                head = file.read(68)[4 if name == b"jxlp" else 0 :]
                break
    bits = _Bits(head)
    if bits.take(16) != 0x0AFF:
        return False
    bits.skip_size()
    if bits.take(1) or not bits.take(1):  # all of its metadata is the default, or no more than colours
        return False
    bits.take(3)  # orientation
    if bits.take(1):  # the size at which it should be shown
        bits.skip_size()
    return not bits.take(1) and bool(bits.take(1))  # behind a preview, which hardly any file has, it is not looked for


def _open_jxl(file: BinaryIO) -> Opened:
    if _is_animated_jxl(file):
        raise UserError("an animation (JPEG XL); accepted: one picture, or a video")
    file.seek(0)
    # The decoder itself: Image.open measures by Pillow's limit, which holds for the whole process, not by max_pixels.
    is_jpeg, about, content, profile, *parts = import_module(PACKAGES["JPEG XL"]).Decoder()(file.read())
    if is_jpeg:
        return _open_jpeg_in_jxl(content, profile)
    info = {"icc_profile": profile, "exif": _exif_of_jxl(parts[0] if parts else ())}
    (width, height), bands = (about.width, about.height), _bands_of_jxl(about.mode)

    def decode() -> Array:
        return np.frombuffer(content, np.uint8).reshape(height, width, bands)

    return _opened_jxl(width, height, bands, decode, _metadata(info))


def _open_jpeg_in_jxl(content: bytes, profile: bytes) -> Opened:
    """What stands in a JPEG XL that was made of a JPEG, without loss."""
    from PIL import JpegImagePlugin

    image = JpegImagePlugin.JpegImageFile(io.BytesIO(content))  # not Image.open, as above
    (width, height), bands = image.size, _bands_of_jxl(image.mode)

    def decode() -> Array:
        values: Array = np.array(image)
        return values.reshape(height, width, bands)

    metadata = _metadata({"icc_profile": profile, **image.info})
    if "exif-data" in metadata:  # unlike other JPEG XL it is not upright
        metadata["orientation"] = tiff_tags.orientation(metadata["exif-data"].removeprefix(EXIF))
    return _opened_jxl(width, height, bands, decode, metadata)


def _bands_of_jxl(mode: str) -> int:
    if mode not in ("L", "LA", "RGB", "RGBA"):
        raise UserError(f"JPEG XL of mode {mode}; accepted: gray or RGB, with or without alpha")
    return len(mode)


def _exif_of_jxl(parts: Iterable[Any]) -> bytes:
    """The first EXIF among the boxes, without the offset in front of it."""
    found = next((bytes(part.data) for part in parts if bytes(part.box_type) == b"Exif"), b"")
    return found[4:] if found[4:8] in (b"II*\0", b"MM\0*") else found


def _opened_jxl(
    width: int, height: int, bands: int, decode: Callable[[], Array], metadata: Mapping[str, Any]
) -> Opened:
    return Opened(
        width,
        height,
        bands,
        bands in (2, 4),
        np.dtype(np.uint8),
        8,
        _NAMES["JPEG XL"],
        _guarded("JPEG XL", decode),
        metadata,
        ("JPEG XL is read with 8 bits a channel",),
    )


def _open_raw(file: BinaryIO) -> Opened:
    rawpy = import_module("rawpy")
    raw = rawpy.imread(file)
    sizes = raw.sizes
    # LibRaw's sizes are those of the sensor; it turns the picture as the camera was held.
    width, height = (sizes.iheight, sizes.iwidth) if sizes.flip in (5, 6) else (sizes.iwidth, sizes.iheight)
    balance = any(value > 0 for value in raw.camera_whitebalance)
    note = "camera raw is developed as sRGB of 16 bits with "
    note += "its camera's white balance" if balance else "daylight's white balance (the file has none of its own)"
    metadata, notes = _raw_metadata(file), [note]
    if "exif-data" not in metadata:
        notes.append("not kept: what the camera says of the picture (EXIF)")

    def decode() -> Array:
        # LibRaw's curve of sRGB; without its brightening, which depends on what is in the picture.
        values: Array = raw.postprocess(
            use_camera_wb=balance,
            no_auto_bright=True,
            output_bps=16,
            output_color=rawpy.ColorSpace.sRGB,
            gamma=(2.4, 12.92),
        )
        if values.shape[:2] != (height, width):
            raise UserError(
                f"camera raw of {values.shape[1]} x {values.shape[0]} pixels, said to be {width} x {height}"
            )
        return values.reshape(height, width, -1)

    decode = _guarded("camera raw", decode)
    return Opened(
        width, height, 3, False, np.dtype(np.uint16), 16, _NAMES["camera raw"], decode, metadata, tuple(notes)
    )


def _raw_metadata(file: BinaryIO) -> dict[str, Any]:
    """EXIF of a raw file in TIFF's form, without the camera's own notes, which describe the sensor's data."""
    tags = tiff_tags.first_directory(file)
    if not tags:
        return {}
    for chain in tags.get(tiff_tags.EXIF_IFD, {}).get("ifds", []):
        for directory in chain:
            directory["tags"].pop(tiff_tags.MAKER_NOTE, None)
    kept = {tag: value for tag, value in tags.items() if tag not in tiff_tags.RESOLUTION}
    block, _ = tiff_tags.exif_block({**kept, tiff_tags.ORIENTATION: tiff_tags.short(1)})
    return {"exif-data": block, "orientation": 1} if block else {}


def encode_heic(planes: Array, metadata: Mapping[str, Any], *, strip_metadata: bool) -> bytes:
    """A HEIC of (H, W, bands), uint8, or uint16 of which 10 bits are kept; metadata by libvips' names.

    Raises:
        UserError: pillow-heif is not installed, or refuses; or it cannot read what it wrote.
    """
    if not is_installed("HEIC"):
        raise UserError("HEIC is written by the package pillow-heif; install: pip install 'fastden[formats]'")
    module = import_module("pillow_heif")
    height, width, bands = planes.shape
    mode = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}[bands] + (";16" if planes.dtype == np.uint16 else "")
    names = {"icc_profile": "icc-profile-data"} | ({} if strip_metadata else {"exif": "exif-data", "xmp": "xmp-data"})
    options = {name: bytes(metadata[key]) for name, key in names.items() if key in metadata}
    target = io.BytesIO()
    try:
        data = np.ascontiguousarray(planes).tobytes()
        module.encode(mode, (width, height), data, target, quality=HEIC_QUALITY, chroma=444, **options)
    except Exception as error:  # as above
        raise UserError(f"cannot be written as heic ({error})") from error
    if target.tell() > CERTAIN_HEIC:  # of a picture that is denoised in place nothing else is left
        try:
            target.seek(0)
            _open_heic(target).decode()
        except UserError as error:
            size = f"{len(target.getvalue()) / 1e6:.0f} MB"
            raise UserError(
                f"cannot be written as heic: its {size} could not be read again; accepted: another format (--format)"
            ) from error
    return target.getvalue()
