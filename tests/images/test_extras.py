"""What a file holds beside its pixels is copied, or a note names it: EXIF, resolution, IPTC, from format to format."""

from __future__ import annotations

import io
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from PIL import Image

import fastden
from fastden.errors import UserError
from fastden.images import xmp
from fastden.images.codec import ImageFile, decode_image, encode_image
from fastden.images.containers import jpeg_segments
from fastden.images.strips import StripReader, StripWriter
from tests.images.files import (
    ARTIST,
    EXIF,
    GPS,
    MAKE,
    MAKER_NOTE,
    ORIENTATION,
    again,
    chunks_of,
    exif,
    jpeg_with,
    packet,
    pixels,
    tiff_with_tags,
)


def stated_density(data: bytes, format_name: str) -> tuple[int, int] | None:
    """Dots an inch, by Pillow and tifffile."""
    if format_name == "tiff":
        with tifffile.TiffFile(io.BytesIO(data)) as file:
            tags = file.pages[0].tags  # type: ignore[union-attr]
            factor = {1: 0.0, 2: 1.0, 3: 2.54}[int(tags[296].value)]
            values = [tags[tag].value[0] / tags[tag].value[1] * factor for tag in (282, 283)]
    else:
        image = Image.open(io.BytesIO(data))
        block = image.getexif()
        found = (block[282], block[283]) if 282 in block else image.info.get("dpi", (0, 0))
        values = [float(value) for value in found]
    return (round(values[0]), round(values[1])) if all(values) else None


@pytest.mark.parametrize("source", ["jpeg", "png", "tiff", "webp", "avif"])
def test_a_resolution_stays_what_it_is_and_none_stays_none(source: str) -> None:
    block = Image.Exif()
    block[282], block[283], block[296] = 300.0, 150.0, 2
    image = Image.fromarray(pixels())
    for stated in (True, False):
        buffer = io.BytesIO()
        how: dict[str, Any] = {"dpi": (300, 150)} if source in ("jpeg", "png", "tiff") else {"exif": block}
        image.save(buffer, source, **(how if stated else {}))
        for format_name in ("jpeg", "png", "tiff", "webp", "avif"):
            for strip_metadata in (False, True):
                if strip_metadata and format_name in ("webp", "avif"):  # they state it in EXIF
                    continue
                data, notes = again(buffer.getvalue(), format_name, strip_metadata=strip_metadata)
                assert stated_density(data, format_name) == ((300, 150) if stated else None), (source, format_name)
                assert notes == []


def test_a_thumbnail_that_tiff_does_not_get_is_named() -> None:
    thumbnail = encode_image(ImageFile(pixels(8, 8)), "jpeg")[0]
    first = struct.pack("<4sIHHHIII", b"II*\0", 8, 1, 271, 2, 4, int.from_bytes(b"Cam\0", "little"), 26)
    second = struct.pack("<HHHIIHHIII", 2, 513, 4, 1, 56, 514, 4, 1, len(thumbnail), 0)
    data = encode_image(ImageFile(pixels()), "jpeg")[0]
    payload = b"Exif\0\0" + first + second + thumbnail
    source = data[:2] + struct.pack(">HH", 0xFFE1, len(payload) + 2) + payload + data[2:]
    assert again(source, "jpeg")[1] == []
    assert again(source, "tiff")[1] == ["not kept: the thumbnail in EXIF"]


@pytest.mark.parametrize("format_name", ["jpeg", "png", "webp"])
def test_exif_is_the_sources_bytes(format_name: str) -> None:
    source = jpeg_with(exif=exif(6))
    block = next(payload for marker, payload in jpeg_segments(io.BytesIO(source)) if payload.startswith(b"Exif"))[6:]
    data, notes = again(source, format_name)
    assert block in data
    assert notes == []
    assert decode_image(data).metadata["orientation"] == 6


def test_orientation_is_changed_in_place() -> None:
    image = decode_image(jpeg_with(exif=exif(6)))
    image = ImageFile(image.pixels, metadata={**image.metadata, "orientation": 3}, extras=image.extras)
    block = bytes(image.metadata["exif-data"])[6:]
    data, _ = encode_image(image, "png")
    changed = chunks_of(data)[b"eXIf"]
    assert len(changed) == len(block)
    assert sum(a != b for a, b in zip(changed, block, strict=True)) == 1
    assert Image.open(io.BytesIO(data)).getexif()[ORIENTATION] == 3


@pytest.mark.parametrize("format_name", ["tiff", "jpeg", "png", "webp", "avif"])
@pytest.mark.parametrize("source", ["tiff", "jpeg"])
def test_exif_goes_from_every_format_to_every_other(source: str, format_name: str) -> None:
    data, notes = again(tiff_with_tags() if source == "tiff" else jpeg_with(exif=exif()), format_name)
    found = Image.open(io.BytesIO(data)).getexif()
    assert found[MAKE] == "Maker"
    assert found[ARTIST] == "Jane Doe"
    assert found.get_ifd(EXIF)[34855] == 640
    assert found.get_ifd(GPS)[1] == "N"
    assert found.get_ifd(EXIF)[MAKER_NOTE] == exif().get_ifd(EXIF)[MAKER_NOTE]
    moved = "tiff" in (source, format_name) or format_name == "avif"
    assert bool([note for note in notes if "maker notes" in note]) == moved


def test_iptc_travels_between_jpeg_and_tiff() -> None:
    iptc = b"\x1c\x02\x78\x00\x04boat"
    resource = b"8BIM\x04\x04\0\0" + len(iptc).to_bytes(4, "big") + iptc + b"\0"
    source = jpeg_with((0xED, b"Photoshop 3.0\0" + resource))
    assert iptc in again(source, "jpeg")[0]
    as_tiff, notes = again(source, "tiff")
    assert notes == []
    with tifffile.TiffFile(io.BytesIO(as_tiff)) as written:
        assert written.pages.first.tags[33723].value == iptc
    back, notes = again(as_tiff, "jpeg")
    assert notes == []
    assert Image.open(io.BytesIO(back)).info["photoshop"][0x0404] == iptc
    assert again(source, "png")[1] == ["not kept: IPTC"]


@pytest.mark.parametrize("format_name", ["jpeg", "png", "tiff", "webp"])
def test_strips_carry_the_same(tmp_path: Path, format_name: str) -> None:
    (tmp_path / "a.jpg").write_bytes(jpeg_with((0xE1, xmp.MAIN + packet("<dc:format>x</dc:format>")), exif=exif(6)))
    reader = StripReader(tmp_path / "a.jpg")
    extras, metadata = reader.extras()
    shape = (reader.header.height, reader.header.width, 3)
    options: Any = {"bits": 8, "lossless": False, "metadata": metadata, "strip_metadata": False, "extras": extras}
    writer = StripWriter(tmp_path / "b.tmp", shape, np.dtype(np.uint8), format_name, **options)
    writer.write(reader.read(shape[0]))
    writer.close()
    data = (tmp_path / "b.tmp").read_bytes()
    found = Image.open(io.BytesIO(data)).getexif()
    assert found[ORIENTATION] == 6
    assert found.get_ifd(EXIF)[34855] == 640
    assert b"<dc:format>x</dc:format>" in data
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jpg", "b.tmp"]


def test_a_batch_tells_what_is_not_kept_once(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(jpeg_with((0xEB, b"JP" + bytes(20)), (0xE5, b"vendor"), comment=b"hello"))
    report = fastden.BatchDenoiser("color", sigma=5).run(tmp_path / "a.jpg", tmp_path / "b.webp")
    (note,) = report.done[0].notes
    assert note.startswith("not kept: content credentials")
    assert "application segments" in note
    assert "the JPEG comment" in note


def test_damaged_descriptions_do_no_harm() -> None:
    rng = np.random.default_rng(0)
    sources = [jpeg_with((0xE1, xmp.MAIN + packet("<dc:a>x</dc:a>")), exif=exif(6)), tiff_with_tags()]
    for source in sources:
        for _ in range(40):
            data = bytearray(source)
            for at in rng.integers(2, min(len(data), 700), 6):
                data[at] = rng.integers(0, 256)
            try:
                again(bytes(data), "tiff")
                again(bytes(data), "jpeg")
            except UserError:
                continue


def test_a_resolution_above_what_libvips_takes(capfd: pytest.CaptureFixture[str]) -> None:
    """Of an electron microscope. It stays where tags are copied; elsewhere none is stated, with a note."""
    file = io.BytesIO()
    tifffile.imwrite(file, pixels(), photometric="rgb", resolution=(1e8, 1e8), resolutionunit="CENTIMETER")
    source = file.getvalue()
    data, notes = again(source, "png")
    assert b"pHYs" not in chunks_of(data)
    assert notes == ["not kept: the resolution in pHYs (above 1000000 pixels per millimetre)"]
    data, notes = again(source, "tiff")
    assert (stated_density(data, "tiff"), notes) == ((254_000_000, 254_000_000), [])
    for format_name in ("tiff", "png", "avif"):
        _, notes = again(source, format_name, strip_metadata=True)
        assert any("the resolution" in note for note in notes)
    assert "CRITICAL" not in capfd.readouterr().err
