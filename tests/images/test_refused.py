"""Files that a copy could not do justice are refused: animations, volumes, raw files without the extra."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image

from fastden.errors import UserError
from fastden.images import formats
from fastden.images.codec import decode_image, read_image
from fastden.images.strips import StripReader
from tests.images.files import (
    pixels,
)


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


#: 8 x 8 pixels by cjxl -d 0: red, then blue; and red alone.
ANIMATED_JXL = (
    "ff0a41040308282e090802920900005c004b188b15c24902e6052200d8fffed00000000000000000080292050054004b188b15c249415e20"
    "0200fa030000000000000000"
)
RED_JXL = "ff0a4140407121080201005c004b188b15c24902e6052200d8fffed00000000000000000"


def test_an_animated_jpeg_xl_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("pillow_jxl", reason="pillow-jxl-plugin is not installed")
    animated, still = bytes.fromhex(ANIMATED_JXL), bytes.fromhex(RED_JXL)
    first, second = animated[:40], animated[40:]
    signature = b"\0\0\0\x0cJXL \r\n\x87\n" + b"\0\0\0\x14ftypjxl \0\0\0\0jxl "

    def box(name: bytes, content: bytes) -> bytes:
        return (8 + len(content)).to_bytes(4, "big") + name + content

    parts = box(b"jxlp", bytes(4) + first) + box(b"jxlp", b"\x80\0\0\1" + second)
    for data in (animated, signature + box(b"jxlc", animated), signature + parts):
        (tmp_path / "a.jxl").write_bytes(data)
        for read in (read_image, StripReader):
            with pytest.raises(UserError, match=r"an animation \(JPEG XL\); accepted: one picture, or a video"):
                read(tmp_path / "a.jxl")
    for data in (still, signature + box(b"jxlc", still)):
        (tmp_path / "a.jxl").write_bytes(data)
        assert (read_image(tmp_path / "a.jxl").pixels == [255, 0, 0]).all()


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
