"""What a TIFF's tags say is copied, or a note names it."""

from __future__ import annotations

import io
import struct
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from PIL import Image

from fastden.errors import UserError
from fastden.images import tiff_tags
from fastden.images.codec import decode_image, encode_image, read_image, write_image
from fastden.images.strips import StripReader
from tests.images.files import (
    again,
    pixels,
    tiff_with_tags,
)


def test_the_description_of_another_arrangement_goes() -> None:
    buffer = io.BytesIO()
    colours = np.zeros((3, 256), np.uint16) + np.arange(256, dtype=np.uint16) * 257
    colours[0] = colours[0, ::-1]
    tifffile.imwrite(buffer, pixels()[:, :, 0], photometric="palette", colormap=colours)
    with tifffile.TiffFile(io.BytesIO(again(buffer.getvalue(), "tiff")[0])) as file:
        assert file.pages[0].shape == (24, 20, 3)
        assert 270 not in file.pages[0].tags  # type: ignore[union-attr]


def test_geographic_and_private_tags_of_tiff_stay() -> None:
    scale, keys = (0.05, 0.05, 0.0), (1, 1, 0, 1, 3072, 0, 1, 32633)
    tags = [
        (33550, 12, 3, scale, True),
        (34735, 3, 8, keys, True),
        (42113, 2, 0, "0", True),
        (65000, 7, 3, b"abc", True),
    ]
    file = io.BytesIO()
    tifffile.imwrite(
        file, pixels(), photometric="rgb", extratags=tags, metadata=None, resolution=(3, 4), resolutionunit=1
    )
    data, notes = again(file.getvalue(), "tiff")
    assert notes == []
    with tifffile.TiffFile(io.BytesIO(data)) as written:
        first: Any = written.pages.first
        assert first.tags[33550].value == scale
        assert first.tags[34735].value == keys
        assert first.tags[42113].value == "0"
        assert first.tags[65000].value == b"abc"
        assert first.tags[296].value == 1  # a ratio, no dots an inch
        assert first.tags[282].value == (3, 1)
    assert np.array_equal(decode_image(data).pixels, pixels())
    (note,) = again(file.getvalue(), "png")[1]
    assert "ModelPixelScale" in note
    assert "65000" in note


def test_a_channel_of_unknown_meaning_stays_one() -> None:
    values = np.dstack([pixels(), pixels()[:, :, 0]])
    file = io.BytesIO()
    tifffile.imwrite(file, values, photometric="rgb", extrasamples=["unspecified"], metadata=None)
    data, _ = again(file.getvalue(), "tiff")
    with tifffile.TiffFile(io.BytesIO(data)) as written:
        assert tuple(map(int, written.pages.first.extrasamples)) == (0,)
    kept, named = again(file.getvalue(), "png")[1]
    assert kept == "the fourth channel, of unknown meaning, is kept as it is"
    assert "becomes alpha" in named


@pytest.mark.parametrize(
    ("channels", "options", "place"),
    [
        (4, {"photometric": "minisblack", "planarconfig": "contig"}, "fourth"),
        (4, {"photometric": "rgb", "extrasamples": ["unspecified"]}, "fourth"),
        (2, {"photometric": "minisblack", "planarconfig": "contig", "extrasamples": ["unspecified"]}, "second"),
        (4, {"photometric": "rgb", "extrasamples": ["unassalpha"]}, ""),
    ],
)
def test_a_channel_that_may_be_no_alpha_is_told(
    tmp_path: Path, channels: int, options: dict[str, Any], place: str
) -> None:
    """It is not denoised."""
    values = np.random.default_rng(0).integers(0, 255, (12, 16, channels), dtype=np.uint8)
    tifffile.imwrite(tmp_path / "a.tif", values, metadata=None, **options)
    expected = (f"the {place} channel, of unknown meaning, is kept as it is",) if place else ()
    image = read_image(tmp_path / "a.tif")
    assert image.notes == StripReader(tmp_path / "a.tif").header.notes == expected
    assert image.alpha is not None
    assert np.array_equal(image.alpha, values[:, :, -1])


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("strip_metadata", [False, True])
def test_premultiplied_alpha_is_divided_by_once(dtype: Any, strip_metadata: bool) -> None:
    full = np.iinfo(dtype).max
    values = np.full((8, 8, 4), full // 4, dtype)
    values[:, :, 3] = full // 2
    file = io.BytesIO()
    tifffile.imwrite(file, values, photometric="rgb", extrasamples=["assocalpha"], metadata=None)
    first = decode_image(file.getvalue())
    assert abs(int(first.pixels[0, 0, 0]) - full // 2) <= full // 100
    for format_name in ("tiff", "png", "webp"):
        data, notes = again(file.getvalue(), format_name, strip_metadata=strip_metadata)
        second = decode_image(data)
        if format_name != "webp" or dtype == np.uint8:
            assert np.array_equal(second.pixels, first.pixels)
            assert not any("alpha" in note for note in notes)
        if format_name == "tiff":
            with tifffile.TiffFile(io.BytesIO(data)) as written:
                assert tuple(map(int, written.pages.first.extrasamples)) == (2,)


def test_three_channels_that_are_not_declared_rgb() -> None:
    file = io.BytesIO()
    tifffile.imwrite(file, pixels(), photometric="minisblack", planarconfig="contig", metadata=None)
    for format_name in ("tiff", "png"):
        data, notes = again(file.getvalue(), format_name)
        assert notes == []
        assert np.array_equal(np.array(Image.open(io.BytesIO(data))), pixels())


@pytest.mark.parametrize("byteorder", ["<", ">"])
def test_metadata_of_imagej(byteorder: Any) -> None:
    """Their content is in the order of bytes of the file."""
    file = io.BytesIO()
    about = {"Labels": ["one"], "Info": "my info", "Ranges": (1.0, 2.5)}
    tifffile.imwrite(file, pixels(dtype=np.uint16)[:, :, 0], imagej=True, byteorder=byteorder, metadata=about)
    with tifffile.TiffFile(io.BytesIO(file.getvalue())) as source:
        before = source.imagej_metadata
    data, notes = again(file.getvalue(), "tiff")
    with tifffile.TiffFile(io.BytesIO(data)) as written:
        after = written.imagej_metadata
    assert notes == []
    assert before is not None
    assert after is not None
    assert {name: after[name] for name in about} == {name: before[name] for name in about}


def test_reduced_copies_in_a_tiff_are_named(tmp_path: Path) -> None:
    with tifffile.TiffWriter(tmp_path / "sub.tif") as writer:
        writer.write(pixels(), photometric="rgb", subifds=1)
        writer.write(pixels()[::2, ::2], photometric="rgb", subfiletype=1)
    with tifffile.TiffWriter(tmp_path / "next.tif") as writer:
        writer.write(pixels(), photometric="rgb")
        writer.write(pixels()[::2, ::2], photometric="rgb", subfiletype=1)
    for name in ("sub.tif", "next.tif"):
        image = read_image(tmp_path / name)
        assert image.pages == 1
        assert np.array_equal(image.pixels, pixels())
        notes = [*image.notes, *write_image(tmp_path / f"out_{name}", image)]
        assert len(notes) == 1
        assert "copies" in notes[0]
        assert np.array_equal(read_image(tmp_path / f"out_{name}").pixels, pixels())


#: Types of a TIFF's tags.
ASCII, LONG, FLOAT = 2, 4, 11
INFINITE, NOT_A_NUMBER = struct.pack("<f", float("inf")), struct.pack("<f", float("nan"))


def _tiff_of_tags(order: str, tag: int, kind: int, value: bytes) -> tuple[bytes, bytes]:
    """A TIFF with one tag of a type of its own, ``value`` being four little-endian bytes; and its pixels."""
    width, height = 4, 3
    content = bytes(range(3 * width * height))
    tags = {256: width, 257: height, 258: 8, 259: 1, 262: 2, 273: 8, 277: 3, 278: height, 279: len(content)}
    entries = {number: struct.pack(f"{order}HHII", number, LONG, 1, stated) for number, stated in tags.items()}
    if tag == tiff_tags.IMAGEJ_COUNTS:
        entries[tiff_tags.IMAGEJ] = struct.pack(f"{order}HHI4s", tiff_tags.IMAGEJ, 1, 4, b"IJIJ")
    if order == ">" and kind != ASCII:
        value = value[::-1]
    entries[tag] = struct.pack(f"{order}HHI4s", tag, kind, 4 if kind == ASCII else 1, value)
    directory = struct.pack(f"{order}H", len(entries)) + b"".join(entries[number] for number in sorted(entries))
    magic = b"II*\0" if order == "<" else b"MM\0*"
    return magic + struct.pack(f"{order}I", 8 + len(content)) + content + directory + bytes(4), content


@pytest.mark.parametrize("tag", [296, tiff_tags.IMAGEJ_COUNTS, tiff_tags.IMAGEJ])
@pytest.mark.parametrize(
    ("kind", "value"),
    [(FLOAT, INFINITE), (FLOAT, NOT_A_NUMBER), (ASCII, b"abc\0"), (LONG, b"\xff" * 4)],
    ids=["infinite", "no number", "text", "large"],
)
@pytest.mark.parametrize("order", ["<", ">"])
def test_a_tag_of_another_type_does_no_harm(order: str, kind: int, value: bytes, tag: int) -> None:
    """The pixels are read, and what the tag says is passed over."""
    source, content = _tiff_of_tags(order, tag, kind, value)
    image = decode_image(source)
    assert image.pixels.tobytes() == content
    assert 0 < image.metadata.get("xres", 1.0) < float("inf")
    for format_name in ("tiff", "jpeg", "png", "webp"):
        data, _ = encode_image(image, format_name)
        decode_image(data)


@pytest.mark.parametrize(("tag", "value"), [(262, INFINITE), (282, NOT_A_NUMBER), (283, NOT_A_NUMBER)])
def test_what_libvips_refuses_is_an_error_of_its_file(tag: int, value: bytes) -> None:
    with pytest.raises(UserError):
        decode_image(_tiff_of_tags("<", tag, FLOAT, value)[0])


def test_metadata_that_nobody_foresaw_are_an_error_of_their_file(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_: Any) -> None:
        raise OverflowError("cannot convert float infinity to integer")

    monkeypatch.setattr(tiff_tags, "resolution", broken)
    with pytest.raises(UserError, match=r"metadata that cannot be read .*infinity to integer.*; accepted: a copy"):
        decode_image(tiff_with_tags())


def test_a_stack_of_many_thousand_pages_keeps_its_tags(tmp_path: Path) -> None:
    tifffile.imwrite(tmp_path / "a.tif", np.zeros((8000, 8, 8), np.uint8), imagej=True)
    assert read_image(tmp_path / "a.tif", several=True).extras.tags


def test_directories_below_that_repeat_take_little_time() -> None:
    """2 KB took 8 s: each of ten directories names the next ten times, and tifftools reads it as often."""
    depth, times = 10, 10
    size = 2 + 12 + 4 + 4 * times
    block = struct.pack("<2sHI", b"II", 42, 8)
    for start in range(8, 8 + depth * size, size):
        below = start + size if start < 8 + (depth - 1) * size else 0
        block += struct.pack("<HHHIII", 1, 330, 13, times, start + 18, 0) + struct.pack("<I", below) * times
    begin = time.process_time()
    assert tiff_tags.exif_directory(block) is None
    assert time.process_time() - begin < 1
