"""Reading and writing image files: depth and channel count stay, and no file is half-written."""

from __future__ import annotations

import io
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pyvips
import tifffile
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from fastden.errors import UserError
from fastden.images.codec import ImageFile, decode_image, encode_image, read_image, write_image
from fastden.images.pixels import _converted, to_dtype
from fastden.images.strips import StripReader
from tests.image_files import (
    DATE,
    EXIF_IFD,
    GPS_IFD,
    MAKE,
    ORIENTATION,
    bad_files,
    encoded,
    exif,
    icc_profile,
    pixels,
    png_claiming,
)


def tiff(array: Any, **options: Any) -> bytes:
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, array, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("alpha", [False, True])
@pytest.mark.parametrize(
    ("format_name", "dtype"),
    [("png", np.uint8), ("png", np.uint16), ("tiff", np.uint8), ("tiff", np.uint16), ("tiff", np.float32)],
)
def test_lossless_formats_return_every_value(
    tmp_path: Path, format_name: str, dtype: Any, channels: int, alpha: bool
) -> None:
    bits = 8 * np.dtype(dtype).itemsize
    picture = ImageFile(
        pixels(channels=channels, dtype=dtype), pixels(channels=0, dtype=dtype, seed=1) if alpha else None, bits=bits
    )
    path = tmp_path / f"a.{format_name}"
    assert write_image(path, picture) == []
    back = read_image(path)
    assert back.pixels.dtype == dtype
    assert (back.format, back.bits, back.lossless) == (format_name, bits, True)
    np.testing.assert_array_equal(back.pixels, picture.pixels)
    if alpha:
        assert back.alpha is not None
        assert back.alpha.dtype == dtype
        np.testing.assert_array_equal(back.alpha, picture.alpha)
    else:
        assert back.alpha is None
    assert [path.name] == os.listdir(tmp_path)


def test_other_readers_see_the_same_values() -> None:
    for dtype in (np.uint8, np.uint16, np.float32):
        values = pixels(dtype=dtype)
        data, _ = encode_image(ImageFile(values, bits=8 * values.itemsize), "tiff")
        np.testing.assert_array_equal(tifffile.imread(io.BytesIO(data)), values)
    data, _ = encode_image(ImageFile(pixels()), "png")
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(data))), pixels())
    gray = pixels(channels=1, dtype=np.uint16)
    data, _ = encode_image(ImageFile(gray, bits=16), "png")
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(data))), gray[:, :, 0])


@pytest.mark.parametrize("format_name", ["jpeg", "webp", "avif"])
def test_lossy_formats_are_close(format_name: str) -> None:
    smooth = np.broadcast_to(np.linspace(40, 200, 48)[None, :, None], (32, 48, 3)).astype(np.uint8)
    data, notes = encode_image(ImageFile(smooth, format="jpeg", lossless=False), format_name)
    back = decode_image(data)
    assert (back.format, back.lossless, notes) == (format_name, False, [])
    assert np.abs(back.pixels.astype(int) - smooth).max() <= 6


def test_jpeg_keeps_full_colour_resolution() -> None:
    data, _ = encode_image(ImageFile(pixels()), "jpeg")
    image = Image.open(io.BytesIO(data))
    assert [layer[1:3] for layer in image.layer] == [(1, 1)] * 3  # type: ignore[attr-defined]


def test_gray_jpeg_stays_gray() -> None:
    back = decode_image(encode_image(ImageFile(pixels(channels=1)), "jpeg")[0])
    assert back.pixels.shape == (32, 40, 1)


@pytest.mark.parametrize(("options", "lossless"), [({"lossless": True}, True), ({"quality": 90}, False)])
def test_webp_is_written_as_it_was(options: dict[str, Any], lossless: bool) -> None:
    for extra in ({}, {"exif": exif(1)}):  # the second has the extended header
        source = decode_image(encoded(pixels(), "WEBP", **options, **extra))
        assert source.lossless is lossless
        back = decode_image(encode_image(source, "webp")[0])
        assert back.lossless is lossless
        assert np.array_equal(back.pixels, source.pixels) is lossless


@pytest.mark.parametrize("format_name", ["jpeg", "png", "webp"])
def test_metadata_survives(tmp_path: Path, format_name: str) -> None:
    profile = icc_profile()
    source = tmp_path / "source.jpg"
    source.write_bytes(
        encoded(pixels(), "JPEG", exif=exif(6), icc_profile=profile, xmp=b"<x:xmpmeta/>", dpi=(300, 300))
    )
    target = tmp_path / f"target.{format_name}"
    read = read_image(source)
    assert read.pixels.shape == (32, 40, 3), "the orientation is a tag, not applied"
    assert write_image(target, read) == []
    image = Image.open(target)
    tags = image.getexif()
    assert (tags[ORIENTATION], tags[MAKE]) == (6, "Camera")
    assert tags.get_ifd(EXIF_IFD)[DATE] == "2020:01:02 03:04:05"
    assert tags.get_ifd(GPS_IFD)[1] == "N"
    assert image.info["icc_profile"] == profile
    assert image.size == (40, 32)
    again = read_image(target)
    assert again.metadata["xmp-data"] == b"<x:xmpmeta/>"
    assert again.metadata["orientation"] == 6
    if format_name != "webp":
        assert again.metadata["xres"] == pytest.approx(300 / 25.4, rel=1e-3)


def test_tiff_keeps_metadata() -> None:
    source = decode_image(encoded(pixels(), "JPEG", exif=exif(6), icc_profile=icc_profile(), xmp=b"<x:xmpmeta/>"))
    data, notes = encode_image(source, "tiff")
    back = decode_image(data)
    assert notes == []
    assert back.metadata["icc-profile-data"] == icc_profile()
    assert back.metadata["xmp-data"] == b"<x:xmpmeta/>"
    assert back.metadata["orientation"] == 6


def test_profile_of_16_bit_and_float_tiff() -> None:
    for dtype in (np.uint16, np.float32):
        values = pixels(dtype=dtype)
        picture = ImageFile(values, bits=8 * values.itemsize, metadata={"icc-profile-data": icc_profile()})
        back = decode_image(encode_image(picture, "tiff")[0])
        assert back.metadata["icc-profile-data"] == icc_profile()
        np.testing.assert_array_equal(back.pixels, values)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_strip_applies_the_orientation_and_keeps_colours(orientation: int) -> None:
    picture = Image.fromarray(pixels())
    data = encoded(picture, "PNG", exif=exif(orientation), icc_profile=icc_profile())
    from PIL import ImageOps

    expected = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))))
    stripped, _ = encode_image(decode_image(data), "png", strip_metadata=True)
    image = Image.open(io.BytesIO(stripped))
    np.testing.assert_array_equal(np.asarray(image), expected)
    assert not image.getexif()
    assert image.info["icc_profile"] == icc_profile()
    np.testing.assert_array_equal(decode_image(data).upright().pixels, expected)


def test_avif_rotation_is_not_applied_twice() -> None:
    source = decode_image(encoded(pixels(), "JPEG", exif=exif(6)))
    turned = decode_image(encode_image(source, "avif")[0])
    assert turned.pixels.shape == (40, 32, 3)
    image = Image.open(io.BytesIO(encode_image(turned, "jpeg")[0]))
    assert image.size == (32, 40)
    assert image.getexif()[ORIENTATION] == 1


def test_avif_keeps_more_than_8_bits() -> None:
    values = np.broadcast_to(np.linspace(0, 65535, 64)[None, :, None], (32, 64, 3)).astype(np.uint16)
    data, notes = encode_image(ImageFile(values, bits=16), "avif")
    assert len(notes) == 1
    assert "12 bits" in notes[0]
    back = decode_image(data)
    assert (back.bits, back.pixels.dtype) == (12, np.uint16)
    assert np.abs(back.pixels.astype(int) - values).max() < 700
    assert encode_image(back, "avif")[1] == []


@pytest.mark.parametrize(("dtype", "bits"), [(np.uint8, 8), (np.uint16, 16), (np.float32, 32)])
def test_depth_is_the_dtypes_unless_said(dtype: Any, bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    picture = ImageFile(pixels(dtype=dtype))
    assert picture.bits == bits
    data, notes = encode_image(picture, "avif")
    assert len(notes) == (bits > 12)
    assert decode_image(data).bits == min(bits, 12)
    data, _ = encode_image(picture, "tiff")
    original = pyvips.Image.get_fields
    monkeypatch.setattr(
        pyvips.Image, "get_fields", lambda image: [name for name in original(image) if name != "bits-per-sample"]
    )
    assert decode_image(data).bits == bits


def test_deep_images_are_rounded_only_where_asked_and_said() -> None:
    deep = ImageFile(pixels(dtype=np.uint16), bits=16)
    data, notes = encode_image(deep, "webp")
    assert "16-bit" in notes[0]
    np.testing.assert_array_equal(decode_image(data).pixels, np.rint(deep.pixels / 257).astype(np.uint8))
    floating = ImageFile(pixels(dtype=np.float32), bits=32)
    data, notes = encode_image(floating, "png")
    assert "floating" in notes[0]
    np.testing.assert_array_equal(
        decode_image(data).pixels, np.rint(floating.pixels * np.float32(65535)).astype(np.uint16)
    )


def test_jpeg_refuses_alpha() -> None:
    with pytest.raises(UserError, match=r"no alpha.*accepted: png.*--format"):
        encode_image(ImageFile(pixels(), pixels(channels=0)), "jpeg")


def test_gray_profile_does_not_go_to_a_format_without_gray() -> None:
    profile = bytearray(icc_profile())
    profile[16:20] = b"GRAY"
    picture = ImageFile(pixels(channels=1), metadata={"icc-profile-data": bytes(profile)})
    data, notes = encode_image(picture, "webp")
    assert "gray ICC" in notes[0]
    assert "icc-profile-data" not in decode_image(data).metadata


def test_palette_becomes_rgb() -> None:
    image = Image.fromarray(pixels()).quantize(16)
    read = decode_image(encoded(image, "PNG"))
    np.testing.assert_array_equal(read.pixels, np.asarray(image.convert("RGB")))
    assert read.bits == 8
    assert len(Image.open(io.BytesIO(encode_image(read, "png")[0])).getbands()) == 3
    transparent = decode_image(encoded(image, "PNG", transparency=3))
    assert transparent.alpha is not None
    assert set(np.unique(transparent.alpha)) == {0, 255}


@pytest.mark.parametrize("format_name", ["PNG", "TIFF"])
def test_one_bit_becomes_8_bit_gray(format_name: str) -> None:
    image = Image.fromarray(pixels(channels=0)).convert("1")
    read = decode_image(encoded(image, format_name))
    assert (read.bits, read.pixels.dtype) == (8, np.uint8)
    np.testing.assert_array_equal(read.pixels[:, :, 0], np.asarray(image.convert("L")))


def test_cmyk_becomes_srgb_with_a_note() -> None:
    read = decode_image(encoded(Image.new("CMYK", (40, 32), (0, 0, 0, 0)), "JPEG"))
    assert read.pixels.shape == (32, 40, 3)
    assert read.pixels.min() > 240
    assert read.notes == (
        "CMYK is converted to sRGB; it states no profile, so colours are those of a common press and may shift",
    )
    assert read.metadata["icc-profile-data"][16:20] == b"RGB "


def test_the_profile_of_cmyk_is_used() -> None:
    import pyvips

    gray = pyvips.Image.black(40, 32, bands=3).copy(interpretation="srgb") + 100
    printed = gray.cast("uchar").copy(interpretation="srgb").icc_transform("cmyk", input_profile="srgb")
    read = decode_image(printed.write_to_buffer(".jpg"))
    assert read.notes == ("CMYK is converted to sRGB",)
    assert np.abs(read.pixels.astype(int) - 100).max() <= 4


def test_floating_tiff_of_a_nonfinite_or_other_scale_is_refused(tmp_path: Path) -> None:
    for value, message in (
        (np.nan, "NaN or infinity"),
        (np.inf, "NaN or infinity"),
        (-np.inf, "NaN or infinity"),
        (255.0, "to 255; accepted"),
    ):
        values = pixels(dtype=np.float32)
        if value == 255:
            values *= 255 / values.max()
        else:
            values[3, 4, 1] = value
        path = tmp_path / "a.tif"
        path.write_bytes(tiff(values, photometric="rgb"))
        with pytest.raises(UserError, match=message) as caught:
            read_image(path)
        assert str(caught.value).startswith(str(path))


def test_floats_may_leave_the_range_by_noise() -> None:
    values = pixels(dtype=np.float32) * 3 - 1
    np.testing.assert_array_equal(decode_image(tiff(values, photometric="rgb")).pixels, values)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (pixels(channels=5), "5 channels"),
        (
            pixels(channels=0).astype(np.int16),
            "integers of 16 bits with sign; accepted: integers of 8 or 16 bits without sign",
        ),
        (pixels(channels=0).astype(np.uint32), "integers of 32 bits without sign"),
        (pixels(channels=0).astype(np.complex64), "not supported here"),
    ],
)
def test_unusable_pixels_are_refused(array: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        decode_image(tiff(array, photometric="rgb" if array.ndim == 3 else "minisblack"))


@pytest.mark.parametrize("name", bad_files())
def test_bad_files_are_one_line_errors(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(bad_files()[name])
    expected = {"empty.png": "is empty", "text.png": "known format", "animated.gif": "animation of 2 frames"}
    with pytest.raises(UserError, match=expected.get(name, "corrupt or truncated")) as caught:
        read_image(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


@given(cut=st.floats(0, 0.95), format_name=st.sampled_from(["PNG", "JPEG", "TIFF", "WEBP"]))
def test_a_file_cut_anywhere_is_an_error(cut: float, format_name: str) -> None:
    data = encoded(pixels(), format_name)
    with pytest.raises(UserError):
        decode_image(data[: int(cut * len(data))])


@pytest.mark.parametrize("kind", ["cut", "flipped"])
def test_a_tile_that_cannot_be_decoded_is_an_error(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "tiles.tif"
    tags = [(65000, 7, 4, b"abcd", True)]  # libtiff warns of it
    tifffile.imwrite(path, pixels(64, 64), photometric="rgb", tile=(16, 16), compression="zlib", extratags=tags)
    assert np.array_equal(read_image(path).pixels, pixels(64, 64))
    data = bytearray(path.read_bytes())
    data[4000:] = data[4000:6000] if kind == "cut" else b"\xff" * 10 + data[4010:]
    path.write_bytes(data)
    with pytest.raises(UserError, match="corrupt or truncated"):
        read_image(path)
    with pytest.raises(UserError, match="corrupt or truncated"):
        StripReader(path).read(64)


def test_a_jpeg_with_zeros_for_its_end_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "zeros.jpg"
    data = encoded(pixels(96, 96), "JPEG")
    path.write_bytes(data[: len(data) // 2] + bytes(len(data) - len(data) // 2))
    for read in (read_image, StripReader):
        with pytest.raises(UserError, match="without an end marker"):
            read(path)
    path.write_bytes(data + bytes(1 << 17))  # behind the end they do no harm
    assert np.array_equal(read_image(path).pixels, decode_image(data).pixels)


def test_a_stray_byte_between_a_jpegs_segments_does_no_harm(tmp_path: Path) -> None:
    """Decoders pass over it."""
    data = encoded(pixels(96, 96), "JPEG")
    first = 4 + int.from_bytes(data[4:6], "big")
    (tmp_path / "a.jpg").write_bytes(data[:first] + b"\0" + data[first:])
    assert np.array_equal(read_image(tmp_path / "a.jpg").pixels, decode_image(data).pixels)


def test_the_end_of_a_jpegs_thumbnail_is_not_its_own(tmp_path: Path) -> None:
    thumbnail = encoded(pixels(16, 16), "JPEG")
    # A segment of its own holds it, as those of EXIF and of cameras' notes do.
    block = b"THUMB\0" + thumbnail
    data = encoded(pixels(96, 96), "JPEG")
    data = data[:2] + b"\xff\xe2" + (len(block) + 2).to_bytes(2, "big") + block + data[2:]
    path = tmp_path / "a.jpg"
    path.write_bytes(data)
    assert read_image(path).pixels.shape == (96, 96, 3)
    half = len(block) + (len(data) - len(block)) // 2
    path.write_bytes(data[:half] + bytes(len(data) - half))
    for read in (read_image, StripReader):
        with pytest.raises(UserError, match="without an end marker"):
            read(path)


def test_missing_file_and_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="No such file"):
        read_image(tmp_path / "missing.png")
    with pytest.raises(UserError, match="cannot be read"):
        read_image(tmp_path)


def test_a_small_file_cannot_claim_all_memory() -> None:
    with pytest.raises(UserError, match=r"100000 x 100000 pixels; accepted: at most 500 megapixels"):
        decode_image(png_claiming(100_000, 100_000))
    with pytest.raises(UserError, match=r"at most 0\.001 megapixels \(max_pixels; --max-megapixels"):
        decode_image(encoded(pixels(), "PNG"), max_pixels=1000)
    assert decode_image(encoded(pixels(), "PNG"), max_pixels=32 * 40).pixels.shape == (32, 40, 3)


def test_without_libvips_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "pyvips", None)
    with pytest.raises(UserError, match=r"pip install 'pyvips\[binary\]'"):
        decode_image(b"x")


def test_depth_conversions() -> None:
    every = np.arange(65536, dtype=np.uint16)
    np.testing.assert_array_equal(to_dtype(every, np.uint8), np.rint(every / 257).astype(np.uint8))
    np.testing.assert_array_equal(to_dtype(to_dtype(every, np.float32), np.uint16), every)
    np.testing.assert_array_equal(to_dtype(np.float32([-1, 0, 0.5, 1, 2]), np.uint8), [0, 0, 128, 255, 255])
    assert to_dtype(every, np.uint16) is every
    assert to_dtype(np.uint16(65535)[()], np.uint8) == to_dtype(np.array(65535, np.uint16), np.uint8) == 255


@pytest.mark.parametrize(("source", "target"), [("u2", "u1"), ("u1", "u2"), ("u2", "f4"), ("f8", "f4"), ("f4", "u2")])
def test_depths_are_converted_in_pieces(source: str, target: str) -> None:
    """To the bit as in one piece, and in the same order in memory."""
    whole = pixels(200, 7, 3, source)
    for values in (whole, whole[:64], whole[::-2], whole.transpose(1, 0, 2), whole[:0]):
        result = to_dtype(values, target)
        assert result.tobytes() == _converted(values, np.dtype(target)).tobytes()
        assert result.strides == values.astype(target).strides


@given(
    height=st.integers(1, 9),
    width=st.integers(1, 9),
    channels=st.sampled_from([1, 3]),
    alpha=st.booleans(),
    dtype=st.sampled_from([np.uint8, np.uint16, np.float32]),
    orientation=st.integers(1, 8),
)
def test_any_size_comes_back(height: int, width: int, channels: int, alpha: bool, dtype: Any, orientation: int) -> None:
    picture = ImageFile(
        pixels(height, width, channels, dtype),
        pixels(height, width, 0, dtype) if alpha else None,
        bits=8 * np.dtype(dtype).itemsize,
        metadata={"orientation": orientation},
    )
    back = decode_image(encode_image(picture, "tiff")[0])
    np.testing.assert_array_equal(back.pixels, picture.pixels)
    assert back.metadata["orientation"] == orientation
    upright = back.upright()
    assert upright.metadata["orientation"] == 1
    assert replace(upright, metadata={}).upright().pixels.shape == upright.pixels.shape
    if alpha:
        assert upright.alpha is not None
        assert upright.alpha.shape == upright.pixels.shape[:2]
