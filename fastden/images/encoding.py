"""Writing an image in each format: what the format holds, what is lost, and libvips' options."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from fastden.errors import UserError
from fastden.images.libvips import load_vips
from fastden.images.pixels import Array

#: The most pixels a side that a format holds; AVIF's limit is libvips' own. The other formats hold larger pictures.
MOST_PIXELS = {"jpeg": 65_500, "webp": 16_383, "avif": 16_384}
#: The most bytes of pixels for which JPEG's codes are fitted to the picture. This second pass makes
#: files smaller, but holds the coefficients of the whole image.
OPTIMIZED = 32 << 20
#: Bytes that encoding takes for each byte of the pixels in the file's depth, the file included: allowances, which
#: another libvips or more cores may exceed.
ENCODER = {"jpeg": 4.5, "png": 2.0, "tiff": 2.0, "webp": 14.0, "avif": 20.0, "heic": 14.0}
INTERPRETATIONS = {"uchar": ("b-w", "srgb"), "ushort": ("grey16", "rgb16"), "float": ("b-w", "scrgb")}


def check_alpha(has_alpha: bool, format_name: str) -> None:
    """Raise UserError where an image has an alpha channel and the format has none."""
    if has_alpha and format_name == "jpeg":
        accepted = "png, tiff, webp, avif or heic (by the suffix, or --format of the command)"
        raise UserError(f"JPEG has no alpha channel; accepted: {accepted}")


def check_pages(pages: int, format_name: str) -> None:
    """Raise UserError where an image has several pages and the format one."""
    if pages > 1 and format_name != "tiff":
        raise UserError(f"{pages} pages, which {format_name} has not; accepted: tiff (by the suffix, or --format)")


def check_sides(width: int, height: int, format_name: str) -> None:
    """Raise UserError where an image has more pixels a side than a file of the format."""
    most = MOST_PIXELS.get(format_name)
    if most is not None and max(width, height) > most:
        accepted = f"at most {most} pixels a side in {format_name}, or png or tiff (by the suffix, or --format)"
        raise UserError(f"{width} x {height} pixels; accepted: {accepted}")


def plan_encoding(
    channels: int,
    dtype: np.dtype[Any],
    bits: int,
    metadata: Mapping[str, Any],
    format_name: str,
) -> tuple[np.dtype[Any], dict[str, Any], list[str]]:
    """What a file in ``format_name`` holds of an image: the dtype of its values, its metadata, and notes on the rest.

    Args:
        channels, dtype, bits, metadata: of the image, as in :class:`Header`.
        format_name: as in :func:`encode_image`.
    """
    kept = dict(metadata)
    notes = []
    most = {"jpeg": 8, "webp": 8, "png": 16, "avif": 12, "heic": 10, "tiff": 32}[format_name]
    if bits > most:
        kind = "floating" if bits == 32 else f"{bits}-bit"
        notes.append(f"{kind} values are rounded to the {most} bits of {format_name} (tiff keeps them)")
    if most == 8:
        dtype = np.dtype(np.uint8)
    elif most < 32 and dtype == np.float32:
        dtype = np.dtype(np.uint16)
    stored_gray = channels == 1 and format_name in ("jpeg", "png", "tiff")
    space = _profile_space(kept)
    if space and space != (b"GRAY" if stored_gray else b"RGB "):
        # libvips leaves out a profile that does not fit, without a word.
        del kept["icc-profile-data"]
        if channels == 1 and not stored_gray:
            notes.append(f"the gray ICC profile is not kept: {format_name} stores gray as RGB")
        else:
            own = space.decode("latin-1").strip()
            notes.append(
                f"the ICC profile is not kept: it is for {own}, the picture is {'gray' if channels == 1 else 'RGB'}"
            )
    return dtype, kept, notes


def stored_bits(format_name: str, dtype: np.dtype[Any], bits: int) -> int:
    """Bits a channel of a file in ``format_name``, from values of ``dtype`` of which ``bits`` are significant."""
    if dtype == np.uint16 and format_name in ("avif", "heic"):
        return 10 if format_name == "heic" else min(bits, 12)
    return 8 * dtype.itemsize


def for_shift(values: Array, bits: int) -> Array:
    """Values plus half a step of a file of ``bits`` bits, saturating; as they are where the file keeps them all.

    The encoders of AVIF and HEIC cut the lower bits of 16 off: results were half a step too dark. Their readers put 10
    or 12 bits into the upper ones of 16, so that a picture of theirs comes out as it went in.
    """
    cut = 8 * values.dtype.itemsize - bits
    if cut <= 0:
        return values
    half = values.dtype.type(1 << (cut - 1))
    # Not in place: the values are the caller's.
    result: Array = np.minimum(values, np.iinfo(values.dtype).max - half)
    result += half
    return result


def _profile_space(metadata: Mapping[str, Any]) -> bytes:
    return bytes(metadata.get("icc-profile-data", b""))[16:20]


def encoding_memory(format_name: str, nbytes: int) -> int:
    """Bytes that encoding takes beside ``nbytes`` of pixels in the file's depth."""
    one_pass = format_name == "jpeg" and nbytes > OPTIMIZED
    return int(nbytes * (1.0 if one_pass else ENCODER[format_name]))


def described(image: Any, metadata: Mapping[str, Any], *, strip_metadata: bool) -> Any:
    """A pyvips image with its colour space and metadata set."""
    vips = load_vips()
    image = image.copy(
        interpretation=INTERPRETATIONS[image.format][int(image.bands > 2)],
        xres=metadata.get("xres", 1.0),
        yres=metadata.get("yres", 1.0),
    )
    types = {bytes: vips.GValue.blob_type, int: vips.GValue.gint_type, str: vips.GValue.refstr_type}
    for name, value in metadata.items():
        if name not in ("xres", "yres") and (not strip_metadata or name == "icc-profile-data"):
            image.set_type(types[type(value)], name, value)
    return image


def plan_saving(
    format_name: str, dtype: np.dtype[Any], nbytes: int, bits: int, lossless: bool, *, exif: bool, strip_metadata: bool
) -> tuple[str, dict[str, Any]]:
    """The operation of libvips that writes a file, and its options.

    Args:
        format_name, strip_metadata: as in :func:`encode_image`.
        dtype, nbytes: of the values to write.
        bits, lossless: as in :class:`Header`.
        exif: whether there is EXIF for it: libvips makes some up in any case.
    """
    # The rest is attached to the file that libvips has written, except where that needs an encoder.
    keep: int | str = "icc"
    if format_name in ("webp", "avif") and not strip_metadata:
        flags = load_vips().ForeignKeep
        keep = flags.ALL if exif else flags.ALL & ~flags.EXIF
    if format_name == "jpeg":
        return "jpegsave", {"Q": 95, "subsample_mode": "off", "optimize_coding": nbytes <= OPTIMIZED, "keep": keep}
    if format_name == "png":
        return "pngsave", {"compression": 6, "keep": keep}
    if format_name == "webp":
        quality = {"lossless": True, "exact": True} if lossless else {"Q": 95, "smart_subsample": True}
        return "webpsave", {**quality, "keep": keep}
    if format_name == "avif":
        depth = stored_bits(format_name, dtype, bits)
        return "heifsave", {"compression": "av1", "Q": 90, "subsample_mode": "off", "bitdepth": depth, "keep": keep}
    # The floating predictor compresses better, but few other readers know it.
    predictor = "none" if dtype == np.float32 else "horizontal"
    large = nbytes > 2**32 - 2**25
    return "tiffsave", {"compression": "deflate", "predictor": predictor, "bigtiff": large, "keep": keep}
