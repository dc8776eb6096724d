"""HEIC, JPEG XL and camera raw, read by the packages of the extra ``formats``."""

from __future__ import annotations

import io
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from PIL import Image

import fastden
from fastden.errors import UserError
from fastden.images import formats
from fastden.images.codec import ImageFile, decode_image, encode_image, format_for, read_image, write_image
from fastden.images.finder import find_images, is_left_out, left_out_note
from fastden.images.strips import StripReader, read_header
from tests.cli.run import fails, outputs, works
from tests.image_files import MAKE, ORIENTATION, encoded, exif, icc_profile, pixels


def heic(array: Any, **options: Any) -> bytes:
    """A HEIC file; (H, W) or (H, W, 1 to 4), uint8 or uint16."""
    module = pytest.importorskip("pillow_heif", reason="pillow-heif is not installed")
    mode = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}[1 if array.ndim == 2 else array.shape[2]]
    mode += ";16" if array.dtype == np.uint16 else ""
    file = io.BytesIO()
    module.encode(mode, array.shape[1::-1], array.tobytes(), file, quality=95, chroma=444, **options)
    return file.getvalue()


def jxl(array: Any, **options: Any) -> bytes:
    """A JPEG XL file without loss."""
    pytest.importorskip("pillow_jxl", reason="pillow-jxl-plugin is not installed")
    return encoded(array, "JXL", lossless=True, **options)


def dng(height: int = 48, width: int = 64, orientation: int = 1, balance: Any = (0.5, 1.0, 0.7)) -> bytes:
    """A camera's raw file: a gray ramp as a sensor with a Bayer pattern sees it, with noise."""
    pytest.importorskip("rawpy", reason="rawpy is not installed")
    random = np.random.default_rng(0)
    response = np.ones((height, width))
    response[::2, ::2], response[1::2, 1::2] = balance[0], balance[2]
    ramp = np.linspace(8000, 50000, width)[None] * response
    values = np.clip(ramp + random.normal(0, 1500, ramp.shape), 0, 65535).astype(np.uint16)

    def rationals(*numbers: float) -> list[int]:
        return [part for number in numbers for part in (round(number * 10000), 10000)]

    tags: list[Any] = [
        (50706, 1, 4, (1, 4, 0, 0), True),  # version
        (50708, 2, 0, "Camera Raw 1", True),
        (33421, 3, 2, (2, 2), True),  # the pattern: RGGB
        (33422, 1, 4, (0, 1, 1, 2), True),
        (50717, 4, 1, 65535, True),  # white
        (50721, 10, 9, rationals(3.2406, -1.5372, -0.4986, -0.9689, 1.8758, 0.0415, 0.0557, -0.204, 1.057), True),
        (50728, 5, 3, rationals(*balance), True),  # white balance
        (MAKE, 2, 0, "Camera", True),
        (ORIENTATION, 3, 1, orientation, True),
    ]
    file = io.BytesIO()
    tifffile.imwrite(file, values, photometric=32803, metadata=None, extratags=tags, software=False)
    return file.getvalue()


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("channels", [0, 3, 4])
def test_heic(tmp_path: Path, dtype: Any, channels: int) -> None:
    picture = pixels(64, 80, channels, dtype)
    path = tmp_path / "a.HEIC"
    path.write_bytes(heic(picture))
    image, header = read_image(path), read_header(path)
    top = np.iinfo(dtype).max
    found = image.pixels if image.alpha is None else np.dstack([image.pixels, image.alpha])
    assert found.dtype == dtype
    assert (header.height, header.width, header.has_alpha) == (64, 80, channels == 4)
    assert (image.format, image.bits, header.bits) == ("heic", 8 if dtype == np.uint8 else 10, image.bits)
    assert np.abs(found - picture.reshape(64, 80, -1).astype(float)).mean() < 0.02 * top
    reader = StripReader(path)
    np.testing.assert_array_equal(np.concatenate([reader.read(40), reader.read(24)]), found)


def test_heic_is_written_where_it_is_asked_for(tmp_path: Path) -> None:
    pytest.importorskip("pillow_heif", reason="pillow-heif is not installed")
    data = exif(6).tobytes()
    packet = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"/>'
    metadata = {"exif-data": data, "icc-profile-data": icc_profile(), "xmp-data": packet, "orientation": 6}
    for dtype, bits in ((np.uint8, 8), (np.uint16, 10)):
        picture = ImageFile(pixels(64, 80, dtype=dtype), metadata=metadata)
        notes = write_image(tmp_path / f"{bits}.heic", picture)
        assert [note for note in notes if "rounded" in note] == ([] if bits == 8 else notes[:1])
        back = read_image(tmp_path / f"{bits}.heic")
        assert back.bits == bits
        # It is upright, because readers ignore the orientation of EXIF in HEIC.
        assert back.pixels.shape == (80, 64, 3)
        np.testing.assert_allclose(back.pixels.mean(), picture.pixels.mean(), rtol=0.01)
        assert back.metadata["icc-profile-data"] == icc_profile()
        assert back.metadata["xmp-data"] == packet
        tags = Image.Exif()
        tags.load(back.metadata["exif-data"])
        assert (tags[MAKE], tags[ORIENTATION]) == ("Camera", 1)
    assert format_for("a.heif") == format_for("a.HEIC", "heic") == "heic"


def test_a_heic_that_cannot_be_read_again_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """libde265 decodes none of 17 MB or more; a picture that is denoised in place would be lost."""
    pillow_heif = pytest.importorskip("pillow_heif", reason="pillow-heif is not installed")
    monkeypatch.setattr(formats, "CERTAIN_HEIC", 0)
    picture, path = ImageFile(pixels(64, 80)), tmp_path / "a.heic"
    write_image(path, picture)
    before = path.read_bytes()
    monkeypatch.setattr(pillow_heif, "encode", lambda mode, size, data, target, **_: target.write(before[:-500]))
    with pytest.raises(UserError, match="cannot be written as heic: its 0 MB could not be read again; accepted: "):
        write_image(path, picture, overwrite=True)
    assert path.read_bytes() == before


@pytest.mark.parametrize("channels", [0, 3, 4])
def test_jpeg_xl(tmp_path: Path, channels: int) -> None:
    picture = pixels(40, 56, channels)
    path = tmp_path / "a.jxl"
    path.write_bytes(jxl(picture))
    image = read_image(path)
    found = image.pixels if image.alpha is None else np.dstack([image.pixels, image.alpha])
    np.testing.assert_array_equal(found, picture.reshape(40, 56, -1))
    np.testing.assert_array_equal(StripReader(path).read(40), found)


def jxl_of_jpeg(path: Path, **options: Any) -> bytes:
    """A JPEG XL that holds a JPEG without loss."""
    pytest.importorskip("pillow_jxl", reason="pillow-jxl-plugin is not installed")
    path.write_bytes(encoded(pixels(40, 56), "JPEG", quality=90, **options))
    with Image.open(path) as image, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the plugin says that it does so
        return encoded(image, "JXL", lossless_jpeg=True)


@pytest.mark.parametrize("kind", ["jxl", "jxl of a jpeg", "heic"])
def test_the_limit_of_pixels_is_not_pillows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """Pillow takes more than its limit for a warning, and twice as much for an attack."""
    made = {"jxl": lambda: jxl(pixels(40, 56)), "heic": lambda: heic(pixels(40, 56))}
    data = jxl_of_jpeg(tmp_path / "a.jpg") if kind == "jxl of a jpeg" else made[kind]()
    (tmp_path / "a").write_bytes(data)
    for limit in (40 * 56 // 2 - 1, 40 * 56 - 1):
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert read_image(tmp_path / "a").pixels.shape == (40, 56, 3)
            assert StripReader(tmp_path / "a").read(40).shape == (40, 56, 3)
        assert limit == Image.MAX_IMAGE_PIXELS
    with pytest.raises(UserError, match=r"40 pixels; accepted: at most 0\.001 megapixels"):
        read_image(tmp_path / "a", max_pixels=1000)


def test_a_jpeg_in_a_jpeg_xl_is_as_the_jpeg(tmp_path: Path) -> None:
    """Its turn too: of other JPEG XL the pixels are upright."""
    data = jxl_of_jpeg(tmp_path / "a.jpg", exif=exif(6).tobytes(), icc_profile=icc_profile())
    image, jpeg = decode_image(data), read_image(tmp_path / "a.jpg")
    assert image.metadata["orientation"] == jpeg.metadata["orientation"] == 6
    assert image.metadata["icc-profile-data"] == icc_profile()
    np.testing.assert_array_equal(image.pixels, np.array(Image.open(tmp_path / "a.jpg")))
    plain = decode_image(jxl(pixels(40, 56), exif=exif(6).tobytes()))
    assert plain.metadata["orientation"] == 1
    assert MAKE in Image.open(io.BytesIO(encode_image(plain, "png")[0])).getexif()


def test_camera_raw(tmp_path: Path) -> None:
    """The camera's white balance makes gray gray, the curve is sRGB's, and the orientation is applied."""
    path = tmp_path / "a.dng"
    path.write_bytes(dng())
    image = read_image(path)
    assert (image.format, image.bits, image.pixels.dtype, image.pixels.shape) == ("raw", 16, np.uint16, (48, 64, 3))
    assert any("its camera's white balance" in note for note in image.notes)
    middle = image.pixels[8:-8, 8:-8].astype(np.float64)
    assert np.ptp(middle.mean((0, 1))) < 0.02 * middle.mean()
    # LibRaw takes the brightest channel that is not clipped for white.
    linear = np.linspace(8000, 50000, 64)[8:-8] / 65535
    encoded_ramp = 1.055 * linear ** (1 / 2.4) - 0.055
    ratio = middle[..., 1].mean(0) / 65535 / encoded_ramp
    assert ratio.std() < 0.03 * ratio.mean()
    for orientation in (3, 6, 8):
        path.write_bytes(dng(orientation=orientation))
        turned = read_image(path)
        expected = np.rot90(image.pixels, {3: 2, 6: -1, 8: 1}[orientation])
        np.testing.assert_array_equal(turned.pixels, expected)
        assert turned.metadata["orientation"] == 1
        assert (read_header(path).height, read_header(path).width) == expected.shape[:2]


def test_a_folder_of_a_phone_and_a_camera(tmp_path: Path) -> None:
    """All files are read; formats that cannot be written become TIFF or PNG; EXIF stays."""
    folder = tmp_path / "DCIM"
    folder.mkdir()
    (folder / "1.JPG").write_bytes(encoded(pixels(), "JPEG"))
    (folder / "2.HEIC").write_bytes(heic(pixels(64, 64), exif=exif(1).tobytes()))
    (folder / "3.jxl").write_bytes(jxl(pixels()))
    (folder / "4.dng").write_bytes(dng(orientation=6))
    assert [path.name for path in find_images(folder)] == ["1.JPG", "2.HEIC", "3.jxl", "4.dng"]
    works("denoise", folder, "-o", tmp_path / "out", "--sigma", "10")
    assert outputs(tmp_path / "out") == ["1.JPG", "2.HEIC", "3.png", "4.tif"]
    raw = read_image(tmp_path / "out" / "4.tif")
    assert (raw.pixels.dtype, raw.pixels.shape) == (np.uint16, (64, 48, 3))
    with Image.open(tmp_path / "out" / "4.tif") as opened:
        assert (opened.getexif()[MAKE], opened.getexif().get(ORIENTATION, 1)) == ("Camera", 1)
    works("denoise", folder, "-o", tmp_path / "jpeg", "--sigma", "10", "--format", "jpeg")
    assert outputs(tmp_path / "jpeg") == ["1.JPG", "2.jpg", "3.jpg", "4.jpg"]
    with Image.open(tmp_path / "jpeg" / "4.jpg") as opened:
        assert opened.getexif()[MAKE] == "Camera"
    works("denoise", folder / "1.JPG", "-o", tmp_path / "a.heic", "--sigma", "10")
    assert read_image(tmp_path / "a.heic").format == "heic"
    array = fastden.denoise(folder / "4.dng", 10)
    assert (array.dtype, array.shape) == (np.uint16, (64, 48, 3))


def test_strips(tmp_path: Path) -> None:
    """Strips give the same result; HEIC cannot be written by strips, and the message says so."""
    (tmp_path / "a.dng").write_bytes(dng(96, 80))
    batch = fastden.BatchDenoiser("photo", sigma=10, dtype="float64", tile=48)
    assert not batch.run(tmp_path / "a.dng", tmp_path / "whole.tif").failed
    look = batch.stages.reading.look

    def streamed(job: Any) -> Any:
        picture = look(job)
        picture.streamed = True
        return picture

    batch.stages.reading.look = streamed  # type: ignore[method-assign]
    (record,) = batch.run(tmp_path / "a.dng", tmp_path / "strips.tif").done
    assert record.streamed
    assert any("decoder of raw holds the whole image" in note for note in record.notes)
    whole, strips = (read_image(tmp_path / f"{name}.tif").pixels for name in ("whole", "strips"))
    np.testing.assert_array_equal(whole, strips)
    (failed,) = batch.run(tmp_path / "a.dng", tmp_path / "strips.heic").failed
    assert "heic is not written by strips" in str(failed.error)


@pytest.mark.parametrize("kind", ["heic", "jxl", "dng"])
@pytest.mark.parametrize("cut", [0.3, 0.7, 0.95])
def test_damaged_files_are_one_line_errors(tmp_path: Path, kind: str, cut: float) -> None:
    made = {"heic": lambda: heic(pixels(96, 96)), "jxl": lambda: jxl(pixels(96, 96)), "dng": lambda: dng(96, 96)}
    data = made[kind]()
    path = tmp_path / f"a.{kind}"
    path.write_bytes(data[: int(cut * len(data))])
    fails("denoise", path, "-o", tmp_path / "out.png", saying=rf"a\.{kind}: .*(corrupt|cannot be read|not read|known)")
    assert not (tmp_path / "out.png").exists()


def test_too_large_ones_are_refused_before_they_are_decoded() -> None:
    with pytest.raises(UserError, match="megapixels"):
        decode_image(dng(), max_pixels=1000)


def test_without_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Messages name what to install, for files by name and in folders."""
    (tmp_path / "a.heic").write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0heicmif1" + bytes(200))
    (tmp_path / "a.jxl").write_bytes(b"\xff\x0a" + bytes(200))
    (tmp_path / "a.cr2").write_bytes(b"II*\0\x10\0\0\0CR\x02\0" + bytes(200))
    (tmp_path / "b.png").write_bytes(encoded(pixels(), "PNG"))
    monkeypatch.setattr(formats, "is_installed", lambda kind: False)
    for name in ("a.heic", "a.jxl", "a.cr2"):
        assert is_left_out(tmp_path / name)
        with pytest.raises(UserError, match=rf"{name}: .*pip install 'fastden\[formats\]'"):
            read_image(tmp_path / name)
        with pytest.raises(UserError, match=r"pip install 'fastden\[formats\]'"):
            StripReader(tmp_path / name)
    left: list[Path] = []
    assert [path.name for path in find_images(tmp_path, left_out=left)] == ["b.png"]
    assert "3 image files left out, not read here: " in left_out_note(left)
    assert "pip install 'fastden[formats]'" in left_out_note(left)
    with pytest.raises(UserError, match=r"pip install 'fastden\[formats\]'"):
        write_image(tmp_path / "c.heic", ImageFile(pixels()))
