"""XMP, text, further pictures and segments of JPEG and PNG are copied, or a note names them."""

from __future__ import annotations

import io
import time
import zlib
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, PngImagePlugin

from fastden.errors import UserError
from fastden.images import xmp
from fastden.images.codec import decode_image
from fastden.images.containers import SEGMENT, jpeg_segments
from fastden.images.strips import StripReader
from tests.images.files import (
    ARTIST,
    ORIENTATION,
    again,
    chunks_of,
    exif,
    jpeg_with,
    packet,
    pixels,
    png_with,
)


def test_text_of_png_and_comment_of_jpeg_stay() -> None:
    info = PngImagePlugin.PngInfo()
    info.add_text("parameters", "a tree\nSteps: 40")
    info.add_itxt("workflow", "Ünïcode ✓")
    info.add_text("Description", "long " * 500, zip=True)
    file = io.BytesIO()
    Image.fromarray(pixels()).save(file, "PNG", pnginfo=info)
    data, notes = again(file.getvalue(), "png")
    written: Any = Image.open(io.BytesIO(data))
    assert written.text == {"parameters": "a tree\nSteps: 40", "workflow": "Ünïcode ✓", "Description": "long " * 500}
    assert notes == []
    for format_name in ("jpeg", "tiff", "webp", "avif"):
        assert again(file.getvalue(), format_name)[1] == ["not kept: PNG text"]
    comment = jpeg_with(comment=b"box 12")
    assert Image.open(io.BytesIO(again(comment, "jpeg")[0])).info["comment"] == b"box 12"
    as_png: Any = Image.open(io.BytesIO(again(comment, "png")[0]))
    assert as_png.text == {"Comment": "box 12"}
    assert again(comment, "webp")[1] == ["not kept: the JPEG comment"]
    assert not chunks_of(again(file.getvalue(), "png", strip_metadata=True)[0]).keys() & {b"tEXt", b"zTXt", b"iTXt"}


def test_text_of_png_whose_keyword_is_latin_1_stays(tmp_path: Path) -> None:
    """PNG's keywords are Latin-1; libvips makes them names of fields, which pyvips takes for UTF-8."""
    text = (b"tEXt", "Größe\0in Öl".encode("latin-1"))
    source = png_with(text)
    data, notes = again(source, "png")
    assert (chunks_of(data)[b"tEXt"], notes) == (text[1], [])
    (tmp_path / "a.png").write_bytes(source)
    assert text in StripReader(tmp_path / "a.png").extras()[0].chunks


@pytest.mark.parametrize("how", ["behind", "behind compressed", "zTXt exif", "tEXt exif", "zTXt APP1", "zTXt II"])
def test_exif_and_xmp_of_png_wherever_they_are(how: str) -> None:
    """libvips reads them in front of the pixels only, and none that are hexadecimal text."""
    source = packet("<dc:description>Jane</dc:description>")
    block = exif(6).tobytes()
    bare = block.removeprefix(b"Exif\0\0")

    def text(kind: bytes, content: bytes, compressed: bool = True) -> tuple[bytes, bytes]:
        lines = b"\n" + kind + f"\n{len(content):8}\n".encode() + content.hex().encode() + b"\n"
        name = b"zTXt" if compressed else b"tEXt"
        return name, b"Raw profile type " + kind + b"\0" + (b"\0" + zlib.compress(lines) if compressed else lines)

    chunks = {
        "behind": [(b"eXIf", bare), (b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + source)],
        "behind compressed": [
            (b"eXIf", bare),
            (b"iTXt", b"XML:com.adobe.xmp\0\1\0en\0x\0" + zlib.compress(source)),
        ],
        "zTXt exif": [text(b"exif", block), text(b"xmp", source)],
        "tEXt exif": [text(b"exif", block, compressed=False), text(b"xmp", source, compressed=False)],
        "zTXt APP1": [text(b"APP1", block), text(b"APP1", xmp.MAIN + source)],
        "zTXt II": [text(b"exif", bare), text(b"xmp", source)],
    }[how]
    png = png_with(*chunks)
    if "behind" in how:
        plain = png_with()
        start, end = plain.index(b"IDAT") - 4, plain.index(b"IEND") - 4
        added = png[start : len(png) - len(plain) + start]
        png = plain[:end] + added + plain[end:]
    image = decode_image(png)
    assert image.upright().pixels.shape == (20, 24, 3)
    for format_name in ("png", "jpeg", "webp", "tiff"):
        data, _ = again(png, format_name)
        written = Image.open(io.BytesIO(data))
        tags = written.getexif()
        assert (tags[ORIENTATION], tags[ARTIST]) == (6, "Jane Doe")
        assert b"Jane" in bytes(decode_image(data).metadata["xmp-data"]) or format_name == "tiff"


def test_a_raw_profile_that_cannot_be_read_stays_text() -> None:
    chunk = (b"tEXt", b"Raw profile type exif\0\nexif\n  3\nzz")
    assert chunks_of(again(png_with(chunk), "png")[0])[b"tEXt"] == chunk[1]


def test_xmp_beyond_a_segment_is_joined_and_split() -> None:
    large = "edited " * 20000
    source = packet(f"<dc:format>image/png</dc:format><dc:description>{large}</dc:description>")
    png = png_with((b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + source))
    data, notes = again(png, "jpeg")
    assert "ExtendedXMP" in notes[0]
    segments = [payload for _, payload in jpeg_segments(io.BytesIO(data))]
    assert max(map(len, segments)) <= SEGMENT
    main = next(payload for payload in segments if payload.startswith(xmp.MAIN))
    assert b"image/png" in main
    assert b"HasExtendedXMP" in main
    back = decode_image(data).metadata["xmp-data"]
    assert large.encode() in back
    assert b"HasExtendedXMP" not in back
    twice, notes = again(data, "jpeg")
    assert notes == []
    assert large.encode() in decode_image(twice).metadata["xmp-data"]


def test_a_damaged_continuation_is_named_and_not_pointed_at() -> None:
    note = 'xmlns:xmpNote="http://ns.adobe.com/xmp/note/"'
    main = packet(f"<xmpNote:HasExtendedXMP>{'A' * 32}</xmpNote:HasExtendedXMP><dc:format>x</dc:format>", note)
    source = jpeg_with((0xE1, xmp.MAIN + main))
    for format_name in ("jpeg", "png", "tiff", "webp", "avif"):
        data, notes = again(source, format_name)
        assert "XMP" in notes[0]
        assert b"HasExtendedXMP" not in data
        assert b"<dc:format>x</dc:format>" in data


def test_descriptions_of_parts_that_are_gone_go_too() -> None:
    spaces = (
        'xmlns:GCamera="http://ns.google.com/photos/1.0/camera/" xmlns:hdrgm="http://ns.adobe.com/hdr-gain-map/1.0/" '
    )
    spaces += 'GCamera:MotionPhoto="1" GCamera:SpecialTypeID="x" hdrgm:Version="1.0"'
    spaces += ' xmlns:Container="http://ns.google.com/photos/1.0/container/"'
    main = packet("<dc:format>x</dc:format><Container:Directory><rdf:Seq/></Container:Directory>", spaces)
    video = b"\0\0\0\x18ftypmp42" + bytes(100)
    data, notes = again(jpeg_with((0xE1, xmp.MAIN + main), behind=video), "jpeg")
    assert notes == ["not kept: the HDR gain map, the video of a motion photo"]
    for word in (b"MotionPhoto", b"hdrgm", b"Container"):
        assert word not in data
    assert b"SpecialTypeID" in data
    assert b"<dc:format>x</dc:format>" in data


def test_further_pictures_are_named() -> None:
    file = io.BytesIO()
    frames = [Image.fromarray(pixels()), Image.fromarray(pixels())]
    frames[0].save(file, "MPO", save_all=True, append_images=frames[1:])
    data, notes = again(file.getvalue(), "jpeg")
    assert notes == ["not kept: the second picture of the file (MPO)"]
    assert b"MPF\0" not in data
    assert again(jpeg_with(behind=bytes(300) + jpeg_with()), "jpeg")[1] == notes
    assert again(jpeg_with(behind=b"x" * 40), "jpeg")[1] == ["not kept: 40 bytes behind the picture"]
    assert again(jpeg_with(behind=bytes(40)), "jpeg")[1] == []


def test_a_packet_of_elements_in_elements_stays_as_it_is() -> None:
    """minidom calls itself for each, and 4,000 are too many for Python."""
    note = 'xmlns:xmpNote="http://ns.adobe.com/xmp/note/" xmpNote:HasExtendedXMP="0"'
    deep = packet("<dc:a>" * 4000 + "</dc:a>" * 4000, note)
    assert decode_image(jpeg_with((0xE1, xmp.MAIN + deep))).metadata["xmp-data"] == deep
    assert xmp.joined(deep, []) == (deep, True)
    assert xmp.freed(deep, upright=True) == deep
    assert xmp.split(deep + bytes(SEGMENT)) is None


@pytest.mark.parametrize("kind", ["segments", "fill"])
def test_much_in_front_of_a_jpegs_picture_takes_little_time(kind: str) -> None:
    """Two million empty segments took 8 s, and 50 MB of 0xFF, which may stand in front of a marker, 16 s."""
    data = jpeg_with(exif=exif(6))
    many = {"segments": b"\xff\xef\0\2" * 2_000_000, "fill": b"\xff" * 50_000_000}[kind]
    begin = time.process_time()
    if kind == "segments":
        with pytest.raises(UserError, match="a JPEG with more than 10000 segments in front of its picture"):
            decode_image(data[:2] + many + data[2:])
    else:
        assert decode_image(data[:2] + many + data[2:]).metadata["orientation"] == 6
    assert time.process_time() - begin < 4
    for count in (0, 1, 2, 65_535, 65_536, 65_537, 65_538, 65_539):  # around the size of a block
        file = io.BytesIO(data[:2] + b"\xff" * count + data[2:])
        assert jpeg_segments(file) == jpeg_segments(io.BytesIO(data))
    assert jpeg_segments(io.BytesIO(data[:2] + b"\xff" * 70_000)) == []
