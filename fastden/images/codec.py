"""Image files through libvips: pixels at their own depth, alpha, colour profile and metadata in; the same out.

Writing is all or nothing: a file appears under its name when it is complete.
"""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO, get_args

import numpy as np

from fastden.choices import Format
from fastden.errors import UserError
from fastden.images.attachments import for_libvips, has_exif, plan_attachment, png_kind
from fastden.images.containers import riff_chunks
from fastden.images.encoding import (
    check_alpha,
    check_pages,
    described,
    for_shift,
    plan_encoding,
    plan_saving,
    stored_bits,
)
from fastden.images.extras import Extras, read_extras
from fastden.images.formats import Opened, encode_heic, open_file
from fastden.images.image_file import Header, ImageFile
from fastden.images.kinds import OTHER_SUFFIXES, check_supported
from fastden.images.libvips import VIPS_DTYPES, VIPS_FORMATS, detail, load_vips, vips_errors
from fastden.images.pixels import Array, check_finite, to_dtype
from fastden.images.tiff_directories import fail_on, full_pages, is_extra_unknown, stated_white, white_is_zero
from fastden.whole_files import check_readable, check_target, reason, write_bytes

__all__ = [
    "FORMATS",
    "MAX_PIXELS",
    "METADATA",
    "SUFFIXES",
    "Header",
    "ImageFile",
    "check_format",
    "decode_image",
    "encode_image",
    "format_for",
    "read_image",
    "write_image",
]

#: File name suffixes and their formats: those that can be written, and that a folder is searched for.
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
#: Formats that can be written.
FORMATS: tuple[str, ...] = get_args(Format)
#: Images with more pixels are refused, so that a small file cannot claim all memory.
MAX_PIXELS = 500_000_000

#: libvips' names of the header fields that are copied to the denoised file.
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
_OTHER_TYPES = {
    "char": "integers of 8 bits with sign",
    "short": "integers of 16 bits with sign",
    "int": "integers of 32 bits with sign",
    "uint": "integers of 32 bits without sign",
    "complex": "complex numbers",
    "dpcomplex": "complex numbers",
}
_OTHER_SPACES = ("lab", "labs", "xyz", "lch", "cmc", "hsv", "yxy", "fourier", "matrix")


def read_image(path: str | Path, *, max_pixels: int = MAX_PIXELS, several: bool = False) -> ImageFile:
    """Decode an image file.

    Gray stays gray, a palette becomes RGB, 1-bit becomes 8-bit gray, CMYK becomes sRGB (with a note), float16 becomes
    float32. The EXIF orientation is not applied to the pixels (libvips applies AVIF's own rotation).

    Args:
        path: of the file.
        max_pixels: a file with more pixels is refused; all pages count together.
        several: take TIFFs of several pages, which have to be of one size, depth and colour space.

    Raises:
        UserError: missing, empty, truncated, corrupt or no image; several pages; more than ``max_pixels``; not 1 or 3
            channels plus alpha; integers of other than 8 or 16 bits unsigned; NaN, infinity or a scale other than
            [0, 1] in a floating image. The message begins with the path.
    """
    try:
        check_readable(path)
        data = Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {reason(error)}") from error
    except ValueError as error:  # a null character in the name
        raise UserError(f"{str(path)!r}: cannot be read: {error}") from error
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    try:
        return decode_image(data, max_pixels=max_pixels, several=several)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def decode_image(data: bytes, *, max_pixels: int = MAX_PIXELS, several: bool = False) -> ImageFile:
    """Decode the bytes of an image file; arguments and errors as of :func:`read_image`."""
    vips = load_vips()
    if not data:
        raise UserError("the file is empty")
    file = io.BytesIO(data)
    opened = open_file(file)
    if opened is not None:
        header = header_of(opened, max_pixels)
        extras, metadata = read_extras(file, header.format, header.metadata, has_alpha=header.has_alpha)
        return _assembled(opened.decode(), replace(header, metadata=metadata), extras)
    with vips_errors(file):
        check_supported(file)
        options = {"access": "sequential", "fail_on": fail_on(file)}
        image, header = open_image(vips.Image.new_from_buffer(data, "", **options), file, max_pixels, several)
        if header.pages > 1:
            try:
                image = vips.Image.new_from_buffer(data, "", n=header.pages, **options)
            except vips.Error as error:
                raise UserError(f"{header.pages} pages ({detail(error)}); accepted: pages that are alike") from error
            image, _ = open_image(image, file, max_pixels, several)
        extras, metadata = read_extras(file, header.format, header.metadata, has_alpha=header.has_alpha)
        # image.numpy() would drop the dimensions of one-pixel images.
        shape = (image.height, image.width, image.bands)
        values: Array = np.ndarray(shape, VIPS_DTYPES[image.format], image.write_to_memory())
    return _assembled(values, replace(header, metadata=metadata), extras)


def _assembled(values: Array, header: Header, extras: Extras) -> ImageFile:
    if values.dtype.kind == "f":
        values = values.astype(np.float32, copy=False)
    pixels, alpha = values, None
    if header.has_alpha:
        pixels, alpha = np.ascontiguousarray(values[:, :, :-1]), np.ascontiguousarray(values[:, :, -1])
    known = (header.format, header.bits, header.lossless, header.metadata, header.notes, header.pages)
    image = ImageFile(pixels, alpha, *known, extras, header.stated)
    if pixels.dtype.kind == "f":
        _ = image.ranges  # values on another scale are an error
        if alpha is not None:
            check_finite(alpha, UserError)
    return image


def header_of(opened: Opened, max_pixels: int) -> Header:
    """What is known of a file of the extra formats; more than ``max_pixels`` are refused."""
    check_size(opened.width, opened.height, max_pixels)
    return Header(
        width=opened.width,
        height=opened.height,
        channels=opened.bands - opened.has_alpha,
        has_alpha=opened.has_alpha,
        dtype=opened.dtype,
        format=opened.format,
        bits=opened.bits,
        lossless=opened.format == "raw",
        metadata=opened.metadata,
        notes=opened.notes,
    )


def open_image(image: Any, file: BinaryIO, max_pixels: int, several: bool = False) -> tuple[Any, Header]:
    """An image that libvips has opened: checked, CMYK converted, and its header.

    Args:
        image: of pyvips; its pixels are not decoded here.
        file: its bytes; the pixels are skipped.
        max_pixels, several: as in :func:`read_image`.

    Raises:
        UserError: an image that :func:`read_image` refuses.
    """
    loader = image.get("vips-loader").replace("_buffer", "").replace("_source", "").replace("load", "")
    format_name = "avif" if loader == "heif" else _LOADERS.get(loader, loader)
    pages = int(image.get("n-pages")) if _has(image, "n-pages") else 1
    notes = []
    if format_name == "tiff" and pages > 1:
        full = full_pages(file)
        if full is not None and full < pages:
            notes.append(f"not kept: {pages - full} reduced copies or masks of the picture in the TIFF")
            pages = full
    if pages > 1:
        _check_pages(pages, format_name, several)
    height = image.get_page_height()
    _check_header(image, pages * height, max_pixels)
    bits = int(image.get("bits-per-sample")) if _has(image, "bits-per-sample") else 0
    metadata = {name: image.get(name) for name in METADATA if _has(image, name)}
    if image.interpretation == "cmyk":
        depth = 8 if image.format == "uchar" else 16
        image = image.icc_transform("srgb", embedded=True, input_profile="cmyk", depth=depth)
        stated = "icc-profile-data" in metadata
        metadata["icc-profile-data"] = image.get("icc-profile-data")
        assumed = "" if stated else "; it states no profile, so colours are those of a common press and may shift"
        notes.append(f"CMYK is converted to sRGB{assumed}")
    if pages > 1:
        notes.append(f"{pages} pages: all get the metadata of the first")
    if "exif-data" in metadata:
        # Where the loader has turned the picture already, EXIF must not turn it again.
        metadata.setdefault("orientation", 1)
    dtype = np.dtype(VIPS_DTYPES[image.format])
    if dtype.kind == "f":
        # libvips turns integers over, and leaves these as they are.
        if format_name == "tiff" and white_is_zero(file):
            raise UserError("a floating-point TIFF whose 0 is white (PhotometricInterpretation); accepted: 0 for black")
        dtype, bits = np.dtype(np.float32), 32
    elif dtype == np.uint8:
        bits = 8
    channels, has_alpha = _channels(image.bands, bool(image.hasalpha()))
    if has_alpha and format_name == "tiff" and is_extra_unknown(file):
        place = "fourth" if channels == 3 else "second"
        notes.append(f"the {place} channel, of unknown meaning, is kept as it is")
    header = Header(
        width=image.width,
        height=height,
        channels=channels,
        has_alpha=has_alpha,
        dtype=dtype,
        format=format_name,
        bits=bits or 8 * dtype.itemsize,
        lossless=_is_lossless(format_name, file),
        metadata=metadata,
        notes=tuple(notes),
        pages=pages,
        stated=stated_white(file, metadata) if format_name == "tiff" and dtype == np.uint16 else 0,
        interlaced=_has(image, "interlaced") and bool(image.get("interlaced")),
    )
    return image, header


def _has(image: Any, name: str) -> bool:
    """Whether libvips has a field; the list of all fields is an error where one's name is no UTF-8."""
    return bool(image.get_typeof(name))


def _check_pages(pages: int, format_name: str, several: bool) -> None:
    if format_name != "tiff":
        raise UserError(f"an animation of {pages} frames ({format_name}); accepted: one picture, or a video")
    if not several:
        raise UserError(f"{pages} pages; accepted: one page (the command denoise and BatchDenoiser take several)")


def _check_header(image: Any, rows: int, max_pixels: int) -> None:
    check_size(image.width, rows, max_pixels)
    if image.coding != "none" or image.interpretation in _OTHER_SPACES:
        raise UserError(f"colour space {image.interpretation}; accepted: gray, RGB, CMYK")
    if image.format not in VIPS_DTYPES:
        kind = _OTHER_TYPES.get(image.format, f"pixels of type {image.format}")
        raise UserError(f"{kind}; accepted: integers of 8 or 16 bits without sign, or floating values")


def check_size(width: int, height: int, max_pixels: int) -> None:
    """Raise UserError where an image has more than ``max_pixels`` pixels."""
    if width * height > max_pixels:
        limit = f"at most {max_pixels / 1e6:g} megapixels (max_pixels; --max-megapixels of the command)"
        raise UserError(f"{width} x {height} pixels; accepted: {limit}")


def _channels(bands: int, has_alpha: bool) -> tuple[int, bool]:
    """Channels of the image itself, and whether alpha follows them."""
    # In a TIFF that does not declare RGB libvips takes the third of three channels for alpha.
    if bands not in (1, 3, 4) and not (bands == 2 and has_alpha):
        raise UserError(f"{bands} channels; accepted: 1 or 3, with or without alpha")
    return (bands, False) if bands in (1, 3) else (bands - 1, True)


def _is_lossless(format_name: str, file: BinaryIO) -> bool:
    if format_name != "webp":
        return format_name in ("png", "tiff", "gif")
    file.seek(0)
    names = (name for name, _, _ in riff_chunks(file.read()))
    return next((name == b"VP8L" for name in names if name in (b"VP8 ", b"VP8L")), False)


def check_format(format_name: str | None) -> None:
    """Raise ValueError unless a format can be written; None is that of each input."""
    if format_name is not None and format_name not in FORMATS:
        raise ValueError(f"format: {format_name!r}; accepted: {', '.join(FORMATS)}")


def format_of_suffix(suffix: str) -> str | None:
    """The format that is written under a suffix, such as ``".JPG"``; None where none is."""
    suffix = suffix.lower()
    return "heic" if suffix in OTHER_SUFFIXES["HEIC"] else SUFFIXES.get(suffix)


def format_for(path: str | Path, format_name: str | None = None) -> str:
    """The format for ``path``: the one that is asked for, else the suffix's.

    Raises:
        UserError: an unknown format or suffix, or a suffix that says another format.
    """
    suffix = Path(path).suffix.lower()
    by_suffix = format_of_suffix(suffix)
    try:
        check_format(format_name)
    except ValueError as error:
        raise UserError(str(error)) from error
    if by_suffix is None:
        raise UserError(
            f"{path}: cannot write {suffix or 'a file without suffix'}; accepted: {', '.join(SUFFIXES)}, .heic"
        )
    if format_name is not None and format_name != by_suffix:
        raise UserError(f"{path}: the suffix says {by_suffix}, format says {format_name}; accepted: the same")
    return by_suffix


def write_image(
    path: str | Path,
    image: ImageFile,
    *,
    overwrite: bool = False,
    strip_metadata: bool = False,
    format_name: str | None = None,
) -> list[str]:
    """Encode and write an image file; after any error no half-written file remains.

    Formats: JPEG quality 95 without chroma subsampling; PNG; TIFF, deflate; WebP lossless where the source was, else
    quality 95; AVIF quality 90 without chroma subsampling. JPEG and WebP hold 8 bits, PNG 16, AVIF 12, TIFF all: deeper
    pixels are rounded, with a note. Metadata is copied byte for byte where the format holds it; one note names what it
    does not hold.

    Args:
        path: its suffix chooses the format; the folder must exist.
        image: the image; ``image.format`` and ``image.notes`` are ignored.
        overwrite: replace an existing file.
        strip_metadata: leave out EXIF, XMP, IPTC and comments. The orientation is then applied to the pixels;
            the ICC profile is kept, because colours would change without it.
        format_name: must agree with the suffix.

    Returns:
        Notes for the user on what was lost; empty if nothing.

    Raises:
        UserError: the path or the encoding is impossible, or the disk is full or read-only.
    """
    check_target(path, overwrite)
    try:
        data, notes = encode_image(image, format_for(path, format_name), strip_metadata=strip_metadata)
    except UserError as error:
        text = str(error)
        raise UserError(text if text.startswith(str(path)) else f"{path}: {text}") from error
    write_bytes(Path(path), data, overwrite=overwrite)
    return notes


def encode_image(image: ImageFile, format_name: str, *, strip_metadata: bool = False) -> tuple[bytes, list[str]]:
    """The bytes of a file in ``format_name``, and notes on what was lost; errors as of :func:`write_image`."""
    vips = load_vips()
    if strip_metadata or format_name == "heic":  # HEIC's readers ignore the orientation of EXIF
        image = image.upright()
    check_alpha(image.alpha is not None, format_name)
    check_pages(image.pages, format_name)
    shape = image.pixels.shape[2], image.pixels.dtype, image.bits
    dtype, metadata, notes = plan_encoding(*shape, image.metadata, format_name)
    planes = image.pixels if image.alpha is None else np.concatenate([image.pixels, image.alpha[:, :, None]], 2)
    planes = for_shift(np.ascontiguousarray(to_dtype(planes, dtype)), stored_bits(format_name, dtype, image.bits))
    height, width, bands = planes.shape
    kind = png_kind(bands, planes.itemsize)
    attachment = plan_attachment(image.extras, metadata, format_name, kind=kind, strip_metadata=strip_metadata)
    if attachment.note:
        notes.append(attachment.note)
    metadata = for_libvips(metadata, attachment, image.extras)
    if format_name == "heic":
        return encode_heic(planes, metadata, strip_metadata=strip_metadata), notes
    saver, options = plan_saving(
        format_name,
        dtype,
        planes.nbytes,
        image.bits,
        image.lossless,
        exif=has_exif(metadata, attachment),
        strip_metadata=strip_metadata,
    )
    if image.pages > 1:
        options["page_height"] = height // image.pages
    try:
        encoded = vips.Image.new_from_memory(planes.data, width, height, bands, VIPS_FORMATS[dtype])
        data = getattr(described(encoded, metadata, strip_metadata=strip_metadata), f"{saver}_buffer")(**options)
        return attachment.put_into(data), notes
    except vips.Error as error:
        raise UserError(f"cannot be written as {format_name} ({detail(error)})") from error
