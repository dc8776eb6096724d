"""Image files through libvips: pixels at their own depth, alpha, colour profile and metadata in; the same out.

Writing is all or nothing: a file appears under its name when it is complete.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from fastden.errors import UserError
from fastden.values import Array, check_floats, to_dtype

#: File name suffixes and the formats that they stand for: what can be written, and what is looked for in a folder.
SUFFIXES = {
    ".jpg": "jpeg",
    ".jpeg": "jpeg",
    ".jpe": "jpeg",
    ".jfif": "jpeg",
    ".png": "png",
    ".tif": "tiff",
    ".tiff": "tiff",
    ".webp": "webp",
    ".avif": "avif",
}
FORMATS = ("jpeg", "png", "tiff", "webp", "avif")
#: Images with more pixels are refused, so that a small file cannot claim all memory.
MAX_PIXELS = 500_000_000

#: libvips' names of the header fields that go from a file to its denoised copy.
METADATA = (
    "orientation",
    "exif-data",
    "icc-profile-data",
    "xmp-data",
    "iptc-data",
    "photoshop-data",
    "image-description",
    "resolution-unit",
    "xres",
    "yres",
)
_LOADERS = {"uhdr": "jpeg"}
_VIPS_DTYPES = {"uchar": np.uint8, "ushort": np.uint16, "float": np.float32, "double": np.float64}
_VIPS_FORMATS = {np.dtype(np.uint8): "uchar", np.dtype(np.uint16): "ushort", np.dtype(np.float32): "float"}
_OTHER_SPACES = ("lab", "labs", "xyz", "lch", "cmc", "hsv", "yxy", "fourier", "matrix")
_INTERPRETATIONS = {"uchar": ("b-w", "srgb"), "ushort": ("grey16", "rgb16"), "float": ("b-w", "scrgb")}


@dataclass(frozen=True)
class ImageFile:
    """A decoded image file.

    Attributes:
        pixels: (H, W, C), C 1 (gray) or 3 (RGB); uint8, uint16, or float32 on the scale [0, 1]. As stored: where
            ``metadata["orientation"]`` is not 1, the picture is shown turned (:meth:`upright`).
        alpha: (H, W) in the dtype of ``pixels``, or None.
        format: ``jpeg``, ``png``, ``tiff``, ``webp``, ``avif``, or what libvips calls it.
        bits: significant bits a channel: 8, 10, 12, 16 or 32; 0 stands for all that the dtype has.
        lossless: whether the file stores its pixels without loss.
        metadata: header fields by libvips' names (:data:`METADATA`): EXIF, ICC profile, XMP, IPTC, resolution,
            orientation.
        notes: what a user should know of the reading, such as a conversion.
    """

    pixels: Array
    alpha: Array | None = None
    format: str = "png"
    bits: int = 0
    lossless: bool = True
    metadata: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.bits:
            object.__setattr__(self, "bits", 8 * self.pixels.dtype.itemsize)

    def upright(self) -> ImageFile:
        """The same picture with its orientation applied to the pixels, and the tag set to say so."""
        orientation = int(self.metadata.get("orientation", 1))
        if orientation in (0, 1):
            return self
        alpha = None if self.alpha is None else _turned(self.alpha, orientation)
        metadata = {**self.metadata, "orientation": 1}
        if orientation >= 5 and {"xres", "yres"} <= metadata.keys():
            metadata["xres"], metadata["yres"] = metadata["yres"], metadata["xres"]
        return replace(self, pixels=_turned(self.pixels, orientation), alpha=alpha, metadata=metadata)


def _turned(array: Array, orientation: int) -> Array:
    """(H, W, ...) with EXIF orientation 2 to 8 undone."""
    mirrored = {2: array[:, ::-1], 4: array[::-1], 5: array.swapaxes(0, 1), 7: array[::-1, ::-1].swapaxes(0, 1)}
    turns = {3: 2, 6: -1, 8: 1}
    turned = np.rot90(array, turns[orientation]) if orientation in turns else mirrored.get(orientation, array)
    return np.ascontiguousarray(turned)


def _vips() -> Any:
    try:
        import pyvips
    except (ImportError, OSError) as error:  # OSError: pyvips is there, the libvips library is not
        message = f"pyvips cannot be loaded ({error}); install it with its library: pip install 'pyvips[binary]'"
        raise UserError(message) from error
    return pyvips


def _detail(error: Exception) -> str:
    """The most telling line of a libvips error, which lists the causes below the failed call."""
    lines = [line.strip() for line in str(error).splitlines()]
    return next((line for line in reversed(lines) if len(line) > 12), "no further reason given")


def _reason(error: OSError) -> str:
    return error.strerror or str(error)


def read_image(path: str | Path, *, max_pixels: int = MAX_PIXELS) -> ImageFile:
    """Decode an image file.

    Gray stays gray, a palette becomes RGB, 1-bit becomes 8-bit gray, CMYK becomes sRGB (with a note), float16 becomes
    float32. The EXIF orientation is not applied to the pixels (but AVIF's own rotation is: libvips does it).

    Raises:
        UserError: missing, empty, truncated, corrupt or no image; several pages; more than ``max_pixels``; not 1 or 3
            channels plus alpha; integers of other than 8 or 16 bits unsigned; NaN, infinity or a scale other than
            [0, 1] in a floating image. The message begins with the path.
    """
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {_reason(error)}") from error
    try:
        return decode_image(data, max_pixels=max_pixels)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def decode_image(data: bytes, *, max_pixels: int = MAX_PIXELS) -> ImageFile:
    """Decode the bytes of an image file; see :func:`read_image`."""
    vips = _vips()
    if not data:
        raise UserError("the file is empty")
    try:
        image = vips.Image.new_from_buffer(data, "", access="sequential", fail_on="error")
        fields = set(image.get_fields())
        _check_header(image, fields, max_pixels)
        format_name = image.get("vips-loader").replace("_buffer", "").replace("load", "")
        bits = int(image.get("bits-per-sample")) if "bits-per-sample" in fields else 0
        metadata = {name: image.get(name) for name in METADATA if name in fields}
        notes = []
        if image.interpretation == "cmyk":
            depth = 8 if image.format == "uchar" else 16
            image = image.icc_transform("srgb", embedded=True, input_profile="cmyk", depth=depth)
            metadata["icc-profile-data"] = image.get("icc-profile-data")
            notes.append("CMYK is converted to sRGB")
        if "gainmap-data" in fields:
            notes.append("the HDR gain map is not kept")
        has_alpha = bool(image.hasalpha())
        shape = (image.height, image.width, image.bands)
        # Not image.numpy(): it drops the dimensions of one-pixel images.
        values: Array = np.ndarray(shape, _VIPS_DTYPES[image.format], image.write_to_memory())
    except vips.Error as error:
        detail = _detail(error)
        if "known format" in detail:
            raise UserError("not an image in a known format") from error
        raise UserError(f"corrupt or truncated ({detail})") from error
    if format_name == "heif":
        format_name = "avif"
    if "exif-data" in metadata:
        # Where the loader has turned the picture already, EXIF must not turn it again.
        metadata.setdefault("orientation", 1)
    if values.dtype.kind == "f":
        values = values.astype(np.float32, copy=False)
        check_floats(values, UserError)
        bits = 32
    elif values.dtype == np.uint8:
        bits = 8
    pixels, alpha = _split_alpha(values, has_alpha)
    return ImageFile(
        pixels=pixels,
        alpha=alpha,
        format=_LOADERS.get(format_name, format_name),
        bits=bits,
        lossless=_is_lossless(format_name, data),
        metadata=metadata,
        notes=tuple(notes),
    )


def _check_header(image: Any, fields: set[str], max_pixels: int) -> None:
    pages = image.get("n-pages") if "n-pages" in fields else 1
    if pages > 1:
        raise UserError(f"{pages} pages: multi-page and animated images are not supported yet; accepted: one page")
    if image.width * image.height > max_pixels:
        limit = f"at most {max_pixels / 1e6:g} megapixels (max_pixels; --max-megapixels of the command)"
        raise UserError(f"{image.width} x {image.height} pixels; accepted: {limit}")
    if image.coding != "none" or image.interpretation in _OTHER_SPACES:
        raise UserError(f"colour space {image.interpretation}; accepted: gray, RGB, CMYK")
    if image.format not in _VIPS_DTYPES:
        raise UserError(f"pixels of type {image.format}; accepted: 8 or 16 bits unsigned, or floating")


def _split_alpha(values: Array, has_alpha: bool) -> tuple[Array, Array | None]:
    channels = values.shape[2]
    # What libvips calls alpha in three channels is the third of a TIFF that does not say RGB.
    accepted = channels in (1, 3, 4) or (channels == 2 and has_alpha)
    if not accepted:
        raise UserError(f"{channels} channels; accepted: 1 or 3, with or without alpha")
    if channels in (1, 3):
        return values, None
    return np.ascontiguousarray(values[:, :, :-1]), np.ascontiguousarray(values[:, :, -1])


def _is_lossless(format_name: str, data: bytes) -> bool:
    if format_name != "webp":
        return format_name in ("png", "tiff", "gif")
    position = 12
    while position + 8 <= len(data):
        name, size = data[position : position + 4], int.from_bytes(data[position + 4 : position + 8], "little")
        if name in (b"VP8 ", b"VP8L"):
            return name == b"VP8L"
        position += 8 + size + size % 2
    return False


def format_for(path: str | Path, format_name: str | None = None) -> str:
    """The format to write ``path`` in: the one asked for, else by the suffix.

    Raises:
        UserError: an unknown format or suffix, or a suffix that says another format.
    """
    suffix = Path(path).suffix.lower()
    by_suffix = SUFFIXES.get(suffix)
    if format_name is not None and format_name not in FORMATS:
        raise UserError(f"format: {format_name!r}; accepted: {', '.join(FORMATS)}")
    if by_suffix is None:
        raise UserError(f"{path}: cannot write {suffix or 'a file without suffix'}; accepted: {', '.join(SUFFIXES)}")
    if format_name is not None and format_name != by_suffix:
        raise UserError(f"{path}: the suffix says {by_suffix}, format says {format_name}; accepted: the same")
    return by_suffix


def write_image(
    path: str | Path, image: ImageFile, *, overwrite: bool = False, strip: bool = False, format_name: str | None = None
) -> list[str]:
    """Encode and write an image file; nothing half-written is left behind, whatever happens.

    Formats: JPEG quality 95 without chroma subsampling; PNG; TIFF, deflate; WebP lossless where the source was, else
    quality 95; AVIF quality 90 without chroma subsampling. JPEG and WebP hold 8 bits, PNG 16, AVIF 12, TIFF all: deeper
    pixels are rounded, with a note. EXIF is not written to TIFF, a limit of libvips, with a note.

    Args:
        path: its suffix chooses the format; the folder must exist.
        image: what to write; ``image.format`` and ``image.notes`` play no part.
        overwrite: replace an existing file.
        strip: leave out EXIF, XMP, IPTC and comments. The orientation is then applied to the pixels; the ICC profile
            is kept, because colours would change without it.
        format_name: must agree with the suffix.

    Returns:
        Notes for the user on what was lost; empty if nothing.

    Raises:
        UserError: the path or the encoding is impossible, or the disk is full or read-only.
    """
    check_target(path, overwrite)
    try:
        data, notes = encode_image(image, format_for(path, format_name), strip=strip)
    except UserError as error:
        text = str(error)
        raise UserError(text if text.startswith(str(path)) else f"{path}: {text}") from error
    write_bytes(Path(path), data)
    return notes


def check_target(path: str | Path, overwrite: bool) -> None:
    """Raise UserError where ``path`` cannot be written: it exists (and ``overwrite`` is off) or its folder does not."""
    target = Path(os.path.realpath(path))
    try:
        if target.exists():
            if not target.is_file():
                raise UserError(f"{path}: exists and is not a regular file")
            if not overwrite:
                raise UserError(f"{path}: exists already; accepted: another name, or overwrite (--overwrite)")
        elif not target.parent.is_dir():
            raise UserError(f"{path}: the folder {target.parent} does not exist")
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {_reason(error)}") from error


def write_bytes(path: Path, data: bytes) -> None:
    """Write a whole file or none: beside ``path`` first, then renamed.

    Raises:
        UserError: the system refuses, with its reason.
    """
    # A link stays a link: what it points to is replaced.
    target = Path(os.path.realpath(path))
    temporary = target.with_name(f".fastden-{secrets.token_hex(8)}.tmp")
    try:
        with temporary.open("xb") as file:
            file.write(data)
            file.flush()
            # Some file systems report a full disk only here.
            os.fsync(file.fileno())
        if target.exists():
            shutil.copymode(target, temporary)
        os.replace(temporary, target)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise UserError(f"{path}: cannot be written: {_reason(error)}") from error
        raise


def check_alpha(image: ImageFile, format_name: str) -> None:
    """Raise UserError where ``image`` has an alpha channel and the format has none."""
    if image.alpha is not None and format_name == "jpeg":
        accepted = "png, tiff, webp or avif (by the suffix, or --format of the command)"
        raise UserError(f"JPEG has no alpha channel; accepted: {accepted}")


def encode_image(image: ImageFile, format_name: str, *, strip: bool = False) -> tuple[bytes, list[str]]:
    """The bytes of a file in ``format_name``, and notes on what was lost; see :func:`write_image`."""
    vips = _vips()
    if strip:
        image = image.upright()
    metadata = dict(image.metadata)
    notes = []
    check_alpha(image, format_name)
    bits = {"jpeg": 8, "webp": 8, "png": 16, "avif": 12, "tiff": 32}[format_name]
    if image.bits > bits:
        kind = "floating" if image.bits == 32 else f"{image.bits}-bit"
        notes.append(f"{kind} values are rounded to the {bits} bits of {format_name} (tiff keeps them)")
    planes = image.pixels if image.alpha is None else np.concatenate([image.pixels, image.alpha[:, :, None]], 2)
    if bits == 8:
        planes = to_dtype(planes, np.uint8)
    elif bits < 32 and planes.dtype == np.float32:
        planes = to_dtype(planes, np.uint16)
    if format_name in ("webp", "avif") and image.pixels.shape[2] == 1 and _profile_space(metadata) == b"GRAY":
        del metadata["icc-profile-data"]
        notes.append(f"the gray ICC profile is not kept: {format_name} stores gray as RGB")
    if format_name == "tiff" and not strip and "exif-data" in metadata:
        notes.append("EXIF is not written to TIFF (ICC, XMP and IPTC are)")
    try:
        encoded = _to_vips(vips, planes, metadata, strip)
        return _save(encoded, format_name, image, planes, "icc" if strip else "all"), notes
    except vips.Error as error:
        raise UserError(f"cannot be written as {format_name} ({_detail(error)})") from error


def _profile_space(metadata: Mapping[str, Any]) -> bytes:
    return bytes(metadata.get("icc-profile-data", b""))[16:20]


def _to_vips(vips: Any, planes: Array, metadata: Mapping[str, Any], strip: bool) -> Any:
    height, width, bands = planes.shape
    vips_format = _VIPS_FORMATS[planes.dtype]
    image = vips.Image.new_from_memory(np.ascontiguousarray(planes).data, width, height, bands, vips_format)
    image = image.copy(
        interpretation=_INTERPRETATIONS[vips_format][int(bands > 2)],
        xres=metadata.get("xres", 1.0),
        yres=metadata.get("yres", 1.0),
    )
    types = {bytes: vips.GValue.blob_type, int: vips.GValue.gint_type, str: vips.GValue.refstr_type}
    for name, value in metadata.items():
        if name not in ("xres", "yres") and (not strip or name == "icc-profile-data"):
            image.set_type(types[type(value)], name, value)
    return image


def _save(encoded: Any, format_name: str, image: ImageFile, planes: Array, keep: str) -> bytes:
    if format_name == "jpeg":
        return encoded.jpegsave_buffer(Q=95, subsample_mode="off", optimize_coding=True, keep=keep)
    if format_name == "png":
        return encoded.pngsave_buffer(compression=6, keep=keep)
    if format_name == "webp":
        if image.lossless:
            return encoded.webpsave_buffer(lossless=True, exact=True, keep=keep)
        return encoded.webpsave_buffer(Q=95, smart_subsample=True, keep=keep)
    if format_name == "avif":
        depth = 8 if planes.dtype == np.uint8 else min(image.bits, 12)
        return encoded.heifsave_buffer(compression="av1", Q=90, subsample_mode="off", bitdepth=depth, keep=keep)
    # The floating predictor compresses better, but few other readers know it.
    predictor = "none" if planes.dtype == np.float32 else "horizontal"
    large = planes.nbytes > 2**32 - 2**25
    return encoded.tiffsave_buffer(compression="deflate", predictor=predictor, bigtiff=large, keep=keep)
