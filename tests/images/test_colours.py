"""Colours that a file states outside of a profile are written back, or refused where a format has no word for them."""

from __future__ import annotations

import io
import struct

import numpy as np
import pytest
from PIL import Image

from fastden.errors import UserError
from fastden.images.attachments import check_colour
from fastden.images.codec import ImageFile, decode_image, encode_image
from fastden.images.extras import read_extras
from tests.image_files import icc_profile
from tests.images.files import again, chunks_of, pixels, png_with


@pytest.mark.parametrize(
    "chunk",
    [
        (b"gAMA", struct.pack(">I", 100000)),
        (b"cHRM", struct.pack(">8I", 31270, 32900, 68000, 32000, 26500, 69000, 15000, 6000)),
        (b"cICP", bytes([9, 16, 0, 1])),
    ],
    ids=lambda chunk: chunk[0].decode(),
)
def test_colours_outside_of_profiles_are_written_back_or_refused(chunk: tuple[bytes, bytes]) -> None:
    source = png_with(chunk)
    for strip_metadata in (False, True):
        data, notes = again(source, "png", strip_metadata=strip_metadata)
        assert chunks_of(data)[chunk[0]] == chunk[1]
        assert notes == []
    for format_name in ("jpeg", "webp", "tiff", "avif"):
        with pytest.raises(UserError, match="shown wrong; accepted: png"):
            again(source, format_name)


def test_hdr_metadata_of_png_is_written_back() -> None:
    source = png_with((b"cICP", bytes([9, 18, 0, 1])), (b"mDCV", bytes(24)), (b"cLLI", bytes(8)), dtype=np.uint16)
    found = chunks_of(again(source, "png")[0])
    assert {b"cICP", b"mDCV", b"cLLI"} <= found.keys()


def test_usual_colours_go_into_every_format() -> None:
    colours = struct.pack(">8I", 31270, 32900, 64000, 33000, 30000, 60000, 15000, 6000)
    source = png_with((b"gAMA", struct.pack(">I", 45455)), (b"cHRM", colours))
    for format_name in ("jpeg", "webp", "tiff", "avif"):
        assert again(source, format_name)[1] == []


def test_nclx_of_avif_becomes_cicp_or_is_refused() -> None:
    data, _ = encode_image(ImageFile(pixels()), "avif")
    at = data.index(b"ipco") - 4
    box = struct.pack(">I4s4sHHHB", 19, b"colr", b"nclx", 9, 16, 9, 128)
    # The reader finds a box in the list of properties even if no item names it; offsets behind the box move.
    source = bytearray(data[: at + 8] + box + data[at + 8 :])
    for name in (b"ipco", b"iprp", b"meta"):
        start = source.index(name) - 4
        source[start : start + 4] = struct.pack(">I", struct.unpack(">I", source[start : start + 4])[0] + len(box))
    extras, _ = read_extras(io.BytesIO(bytes(source)), "avif", {})
    assert extras.colour() == {b"cICP": bytes([9, 16, 0, 1])}
    for format_name in ("avif", "jpeg", "tiff", "webp"):
        with pytest.raises(UserError, match=r"BT.2020 and PQ .*accepted: png"):
            check_colour(extras, format_name, has_profile=False)
    check_colour(extras, "png", has_profile=False)
    check_colour(extras, "avif", has_profile=True)


def test_a_profile_goes_before_nclx_and_unspecified_colours_say_nothing() -> None:
    box = b"\0\0\0\x13colrnclx" + struct.pack(">HHHB", 9, 16, 9, 128)
    plain = b"\0\0\0\x13colrnclx" + struct.pack(">HHHB", 2, 2, 6, 128)
    for content, metadata, expected in (
        (box, {}, {b"cICP": bytes([9, 16, 0, 1])}),
        (box, {"icc-profile-data": icc_profile()}, {}),
        (plain, {}, {}),
    ):
        file = io.BytesIO(struct.pack(">I4s", 8 + len(content), b"meta") + content)
        assert read_extras(file, "avif", metadata)[0].colour() == expected


def test_the_narrow_range_of_video_goes_to_png_alone() -> None:
    source = png_with((b"cICP", bytes([1, 13, 0, 0])))
    assert chunks_of(again(source, "png")[0])[b"cICP"] == bytes([1, 13, 0, 0])
    with pytest.raises(UserError, match=r"narrow range of video .*accepted: png"):
        again(source, "tiff")


@pytest.mark.parametrize("format_name", ["jpeg", "png", "tiff"])
def test_a_profile_for_other_channels_is_named(format_name: str) -> None:
    file = io.BytesIO()
    Image.fromarray(pixels()[:, :, 0]).save(file, "JPEG", icc_profile=icc_profile())
    data, notes = again(file.getvalue(), format_name)
    assert "icc-profile-data" not in decode_image(data).metadata
    assert notes == ["the ICC profile is not kept: it is for RGB, the picture is gray"]
