"""What a file holds beside its pixels is copied, or a note names it."""

from __future__ import annotations

import io
import struct
import time
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from PIL import Image, PngImagePlugin

import fastden
from fastden.errors import UserError
from fastden.images import formats, tiff_tags, xmp
from fastden.images.codec import ImageFile, decode_image, encode_image, read_image, write_image
from fastden.images.containers import SEGMENT, jpeg_segments
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
    png_with,
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


def test_the_description_of_another_arrangement_goes() -> None:
    buffer = io.BytesIO()
    colours = np.zeros((3, 256), np.uint16) + np.arange(256, dtype=np.uint16) * 257
    colours[0] = colours[0, ::-1]
    tifffile.imwrite(buffer, pixels()[:, :, 0], photometric="palette", colormap=colours)
    with tifffile.TiffFile(io.BytesIO(again(buffer.getvalue(), "tiff")[0])) as file:
        assert file.pages[0].shape == (24, 20, 3)
        assert 270 not in file.pages[0].tags  # type: ignore[union-attr]


def test_a_thumbnail_that_tiff_does_not_get_is_named() -> None:
    thumbnail = encode_image(ImageFile(pixels(8, 8)), "jpeg")[0]
    first = struct.pack("<4sIHHHIII", b"II*\0", 8, 1, 271, 2, 4, int.from_bytes(b"Cam\0", "little"), 26)
    second = struct.pack("<HHHIIHHIII", 2, 513, 4, 1, 56, 514, 4, 1, len(thumbnail), 0)
    data = encode_image(ImageFile(pixels()), "jpeg")[0]
    payload = b"Exif\0\0" + first + second + thumbnail
    source = data[:2] + struct.pack(">HH", 0xFFE1, len(payload) + 2) + payload + data[2:]
    assert again(source, "jpeg")[1] == []
    assert again(source, "tiff")[1] == ["not kept: the thumbnail in EXIF"]


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


def test_a_volume_in_one_tiff_page_is_refused() -> None:
    buffer = io.BytesIO()
    volume = np.zeros((4, 32, 48), np.uint8)
    tifffile.imwrite(buffer, volume, volumetric=True, tile=(2, 16, 16), photometric="minisblack")
    with pytest.raises(UserError, match="a volume of 4 slices in one TIFF page; accepted: a page for each slice"):
        decode_image(buffer.getvalue())


def test_an_animated_avif_is_refused() -> None:
    buffer = io.BytesIO()
    frames = [Image.fromarray(pixels()), Image.fromarray(pixels()[::-1])]
    frames[0].save(buffer, "AVIF", save_all=True, append_images=frames[1:])
    for brand in (b"avis", b"avif"):
        data = bytearray(buffer.getvalue())
        data[8:12] = brand
        with pytest.raises(UserError, match=r"an animation \(AVIF\); accepted: one picture, or a video"):
            decode_image(bytes(data))


def test_an_animated_png_is_refused(tmp_path: Path) -> None:
    frames = [Image.fromarray(pixels()), Image.fromarray(255 - pixels())]
    frames[0].save(tmp_path / "a.png", save_all=True, append_images=frames[1:])
    with pytest.raises(UserError, match=r"APNG\) of 2 frames"):
        read_image(tmp_path / "a.png")
    with pytest.raises(UserError, match=r"APNG\) of 2 frames"):
        StripReader(tmp_path / "a.png")


def test_raw_files_of_cameras_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(formats, "is_installed", lambda kind: False)
    version = [(50706, 1, 4, (1, 4, 0, 0), True)]
    tifffile.imwrite(tmp_path / "a.tif", pixels(), photometric="rgb", extratags=version, subfiletype=1)
    with tifffile.TiffWriter(tmp_path / "b.tif") as writer:
        writer.write(pixels(), photometric="rgb", subfiletype=1, subifds=1)
        writer.write(pixels()[:, :, 0], photometric=32803, subfiletype=0)
    for name in ("a.tif", "b.tif"):
        with pytest.raises(UserError, match="camera raw is not read here"):
            read_image(tmp_path / name)


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
