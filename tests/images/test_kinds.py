"""Files that fastden does not read: the message names their kind, and a folder's are counted."""

from __future__ import annotations

import io
import logging
import os
import socket
import struct
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from PIL import Image

import fastden
from fastden.batch.plan import plan
from fastden.errors import UserError
from fastden.images import formats, tiff_directories, tiff_tags
from fastden.images.codec import ImageFile, decode_image, read_image, write_image
from fastden.images.finder import left_out_note
from fastden.images.strips import StripReader, read_header
from tests.cli.run import fails
from tests.image_files import encoded, pixels, save_model

HEIC = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(64)


@pytest.mark.parametrize(
    ("head", "kind"),
    [
        (HEIC, "HEIC"),
        (b"\xff\x0a" + bytes(64), "JPEG XL"),
        (b"\0\0\0\x0cJXL \r\n\x87\n" + bytes(64), "JPEG XL"),
        (b"v/1\x01" + bytes(64), "OpenEXR"),
        (bytes(128) + b"DICM" + bytes(64), "DICOM"),
        (b"FUJIFILMCCD-RAW" + bytes(64), "camera raw"),
        (b"II*\0\x10\0\0\0CR\x02\0" + bytes(64), "camera raw"),
        (b"\0\0\0\x18ftypcrx \0\0\0\0" + bytes(64), "camera raw"),
        (b"\0\0\0\x18ftypmp42\0\0\0\0" + bytes(64), "video"),
        (b"BM" + bytes(64), "BMP"),
        (b"8BPS" + bytes(64), "Photoshop"),
        (b"P6\n4 4\n255\n" + bytes(64), "PNM"),
        (b"Pf\n4 4\n-1\n" + bytes(64), "PFM"),
        (b"\0\0\1\0\1\0" + bytes(64), "icon"),
    ],
)
def test_a_sound_file_of_another_kind_is_not_called_damaged(
    head: bytes, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(formats, "is_installed", lambda kind: False)
    with pytest.raises(UserError, match=f"{kind} is not read here.*; accepted: ") as caught:
        decode_image(head)
    assert "corrupt" not in str(caught.value)
    (tmp_path / "a.bin").write_bytes(head)
    with pytest.raises(UserError, match=f"a.bin: {kind} is not read here"):
        StripReader(tmp_path / "a.bin")


def test_what_libvips_does_not_support_is_not_called_damaged(tmp_path: Path) -> None:
    values = np.zeros((8, 8, 3), np.uint8)
    tifffile.imwrite(tmp_path / "a.tif", values, photometric="rgb")
    data = bytearray((tmp_path / "a.tif").read_bytes())
    with tifffile.TiffFile(tmp_path / "a.tif") as file:
        at = file.pages.first.tags[259].valueoffset
    data[at : at + 2] = (50002).to_bytes(2, "little")  # JPEG XL in TIFF
    (tmp_path / "a.tif").write_bytes(data)
    with pytest.raises(UserError, match="not supported here"):
        read_image(tmp_path / "a.tif")


def test_what_tifffile_and_tifftools_log_of_files_read_here_is_dropped_and_nothing_else(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    """Both libraries' loggers stay as they were, and other threads may use tifffile meanwhile."""
    tifffile.imwrite(tmp_path / "a.tif", np.zeros((8, 8, 3), np.uint8), photometric="rgb")
    data = bytearray((tmp_path / "a.tif").read_bytes())
    with tifffile.TiffFile(tmp_path / "a.tif") as file:
        at = file.pages.first.tags[305].offset
    data[at + 2] = 99  # no type of values
    (tmp_path / "odd.tif").write_bytes(data)
    read_image(tmp_path / "a.tif")  # from now on both libraries are imported

    def own() -> int:
        """The lines that tifffile logs of the file for a program that reads it itself."""
        caplog.clear()
        with tifffile.TiffFile(tmp_path / "odd.tif") as file:
            assert len(file.pages) == 1
        return sum(record.name == "tifffile" for record in caplog.records)

    loggers = [logging.getLogger(name) for name in ("tifffile", "tifftools")]
    before = [(list(logger.handlers), list(logger.filters), logger.level) for logger in loggers]
    lines = own()
    assert lines > 0
    caplog.clear()
    with ThreadPoolExecutor(4) as pool:
        for image in pool.map(read_image, [tmp_path / "odd.tif"] * 40):
            assert image.pixels.shape == (8, 8, 3)
    assert [record.getMessage() for record in caplog.records if record.name == "tifffile"] == []
    with tiff_directories._TIFFFILE.reading(), ThreadPoolExecutor(1) as pool:
        assert pool.submit(own).result() == lines
        assert own() == 0
    assert own() == lines
    assert [(list(logger.handlers), list(logger.filters), logger.level) for logger in loggers] == before
    assert capsys.readouterr().err == ""


def test_a_stack_behind_one_directory_is_refused_and_not_cut(tmp_path: Path) -> None:
    """ImageJ writes stacks above 4 GB so. One image of them, and ordinary stacks, are read."""
    stack = np.random.default_rng(0).integers(0, 255, (10, 24, 32)).astype(np.uint8)
    for name, options in {"imagej": {"imagej": True}, "shaped": {}}.items():
        tifffile.imwrite(tmp_path / "cut.tif", stack, truncate=True, **options)
        for read in (read_image, StripReader):
            with pytest.raises(UserError, match="a stack of 10 images behind one TIFF directory"):
                read(tmp_path / "cut.tif")
        tifffile.imwrite(tmp_path / f"{name}.tif", stack, **options)
        assert read_image(tmp_path / f"{name}.tif", several=True).pages == 10
    described = '{"truncated": true, "shape": [10, 24, 32]}'  # as earlier versions of tifffile write it
    tifffile.imwrite(tmp_path / "earlier.tif", stack[0], description=described, metadata=None)
    with (tmp_path / "earlier.tif").open("ab") as file:
        file.write(stack[1:].tobytes())
    with pytest.raises(UserError, match="a stack of 10 images behind one TIFF directory"):
        read_image(tmp_path / "earlier.tif")
    description = "ImageJ=1.54\nimages=10\n"  # of a program that took one image out
    tifffile.imwrite(tmp_path / "one.tif", stack[0], description=description, metadata=None)
    assert np.array_equal(read_image(tmp_path / "one.tif").pixels.squeeze(), stack[0])


def test_another_colour_space_is_named(tmp_path: Path) -> None:
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).convert("LAB").save(tmp_path / "lab.tif")
    for read in (read_image, StripReader):
        with pytest.raises(UserError, match=r"lab.tif: colour space CIELab; accepted: gray, RGB, CMYK"):
            read(tmp_path / "lab.tif")


def test_a_missing_input_is_not_told_as_a_wrong_output(tmp_path: Path) -> None:
    (tmp_path / "nowhere.jpg").symlink_to(tmp_path / "gone.jpg")
    (tmp_path / "circle.jpg").symlink_to(tmp_path / "circle.jpg")
    for name, message in (("missing.jpg", "does not exist"), ("nowhere.jpg", "leads nowhere"), ("circle.jpg", "link")):
        with pytest.raises(UserError, match=rf"input: .*{name}.* {message}"):
            plan([str(tmp_path / name)], tmp_path / "out.jpg")


def test_truncated_files_still_are_called_so(tmp_path: Path) -> None:
    write_image(tmp_path / "a.png", ImageFile(np.zeros((30, 30, 3), np.uint8)))
    data = (tmp_path / "a.png").read_bytes()
    with pytest.raises(UserError, match="corrupt or truncated"):
        decode_image(data[: len(data) // 2])


def test_a_pattern_that_names_no_suffix_takes_images_as_a_folder_does(tmp_path: Path) -> None:
    """It took every file, and blamed the outputs' names."""
    for name in ("a.png", "b.JPG", "notes.txt", "c.mp4", ".hidden.png"):
        (tmp_path / name).write_bytes(b"x")
    for pattern in ("*", "*.*", "**", "?.*"):
        left_out: list[Path] = []
        jobs = plan([str(tmp_path / pattern)], tmp_path / "out", left_out=left_out)
        assert [job.source.name for job in jobs] == ["a.png", "b.JPG"]
        assert left_out == [tmp_path / "c.mp4"]
    assert [job.source.name for job in plan([str(tmp_path / "*.txt")], tmp_path / "out")] == ["notes.txt"]
    with pytest.raises(
        UserError, match=r"input: no images match .*c\* \(1 video left out: .*\); accepted suffixes: \.jpg"
    ):
        plan([str(tmp_path / "c*")], tmp_path / "out")


def test_images_of_a_folder_that_are_left_out_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(formats, "is_installed", lambda kind: False)
    source = tmp_path / "DCIM"
    (source / "deep").mkdir(parents=True)
    write_image(source / "a.png", ImageFile(np.zeros((16, 16, 3), np.uint8)))
    for name in ("b.HEIC", "c.heic", "d.dng", "deep/e.jxl", ".hidden.heic", "text.txt"):
        (source / name).write_bytes(HEIC)
    left_out: list[Path] = []
    assert len(plan([str(source)], tmp_path / "out", left_out=left_out)) == 1
    assert [path.name for path in left_out] == ["b.HEIC", "c.heic", "d.dng"]
    told = left_out_note(left_out)
    assert told.startswith("3 image files left out, not read here: 2 HEIC, 1 camera raw; pip install")
    assert left_out_note([Path("a.exr")]) == "1 image file left out, not read here: 1 OpenEXR"
    assert left_out_note([Path("a.mp4")]) == "1 video left out: give one alone to fastden denoise"
    assert left_out_note([Path("a.MOV"), Path("a.exr"), Path("a.ts")]).endswith(
        "1 OpenEXR; 2 videos left out: give one alone to fastden denoise"
    )
    (source / "a.png").rename(source / "a.mp4")
    with pytest.raises(
        UserError, match=r"no images in .*DCIM \(3 image .*; 1 video left out: give one alone to fastden denoise\)"
    ):
        plan([str(source)], tmp_path / "out")
    (source / "a.mp4").rename(source / "a.png")
    report = fastden.BatchDenoiser("color", sigma=5).run(source, tmp_path / "out", recursive=True)
    assert len(report.done) == 1
    assert not report.failed
    assert len(report.left_out) == 4
    (source / "a.png").unlink()
    with pytest.raises(UserError, match=r"no images in .* left out, not read here: 2 HEIC"):
        plan([str(source)], tmp_path / "out")


def masked(channels: int | None = 3) -> Any:
    from skimage import data

    picture = data.astronaut()[:64, 150:230] / 255
    picture = picture if channels == 3 else picture[:, :, 0]
    noisy = picture + np.random.default_rng(0).normal(0, 10 / 255, picture.shape)
    mask = np.zeros(picture.shape, bool)
    mask[20:30, 20:40] = True
    values = np.where(mask, np.nan, noisy).astype(np.float32)
    return picture, np.ma.MaskedArray(values, mask=mask, fill_value=-1)


@pytest.mark.parametrize("channels", [3, None])
def test_of_a_masked_array_the_valid_pixels_are_denoised(channels: int | None) -> None:
    clean, array = masked(channels)
    before = array.copy()
    result = fastden.denoise(array, 10)
    assert type(result) is np.ma.MaskedArray
    assert np.array_equal(result.mask, array.mask)
    assert result.fill_value == array.fill_value
    assert np.isnan(result.data[array.mask]).all()
    valid = ~array.mask
    assert np.sqrt(np.mean((result.data[valid] - clean[valid]) ** 2)) < 0.65 * 10 / 255
    assert np.array_equal(array.data[valid], before.data[valid])


@pytest.mark.parametrize("channels", [3, None])
def test_the_noise_of_a_masked_array_is_that_of_its_valid_pixels(channels: int | None) -> None:
    _, array = masked(channels)
    estimate = fastden.estimate_noise(array)
    assert fastden.estimate_sigma(array) == estimate.sigma == pytest.approx(10, abs=3)
    given, automatic = fastden.denoise(array, estimate), fastden.denoise(array)
    assert np.array_equal(given.mask, array.mask)
    assert np.array_equal(given.filled(), automatic.filled())
    array[:] = np.ma.masked
    assert not fastden.estimate_noise(array).decided


def test_a_value_beside_a_masked_one_of_its_pixel_stays_valid() -> None:
    values = np.full((16, 16, 3), 0.5, np.float32)
    values[8, 8] = (0.5, 9e9, 0.5)
    mask = values > 1e9
    result = fastden.denoise(np.ma.MaskedArray(values, mask=mask), 5)
    assert result.data[8, 8, 1] == np.float32(9e9)
    assert np.abs(result.data[~mask] - 0.5).max() < 0.05
    everything = np.ma.MaskedArray(values, mask=np.ones_like(mask))
    assert np.array_equal(fastden.denoise(everything, 5).data, values)


class Quantity(np.ndarray):
    """A quantity as packages for units make it."""


def test_arrays_that_carry_more_than_values_are_refused(tmp_path: Path) -> None:
    picture = np.full((16, 16, 3), 0.5, np.float32)
    _, array = masked()
    with pytest.raises(TypeError, match=r"Quantity.*accepted: numpy.asarray"):
        fastden.denoise(picture.view(Quantity), 5)
    with pytest.raises(TypeError, match="a masked array"):
        fastden.denoise_array(array)
    for function in (fastden.estimate_sigma, fastden.denoise_array):
        with pytest.raises(TypeError, match="Quantity"):
            function(picture.view(Quantity))
    for sigma in (np.ma.masked_less(picture[:, :, 0], 0), picture[:, :, 0].view(Quantity)):
        with pytest.raises(TypeError, match="sigma"):
            fastden.denoise(picture, sigma)


def test_memory_maps_are_read(tmp_path: Path) -> None:
    picture = np.full((16, 16, 3), 0.5, np.float32)
    np.save(tmp_path / "a.npy", picture)
    result = fastden.denoise(np.load(tmp_path / "a.npy", mmap_mode="r"), 5)
    assert np.array_equal(result, fastden.denoise(picture, 5))


def chained(*following: int) -> bytes:
    """A TIFF of directories that are alike; each names the one of that number as its next, -1 for none."""
    size = 2 + 12 * 9 + 4
    entries = [(256, 4, 8), (257, 4, 8), (258, 3, 8), (259, 3, 1), (262, 3, 1), (273, 4, 0), (277, 3, 1), (278, 4, 8)]
    entries.append((279, 4, 64))
    behind = 8 + size * len(following)
    data = bytearray(struct.pack("<2sHI", b"II", 42, 8))
    for following_one in following:
        tags = [(tag, kind, 1, behind if tag == 273 else value) for tag, kind, value in entries]
        data += struct.pack("<H", len(tags)) + b"".join(struct.pack("<HHII", *tag) for tag in tags)
        data += struct.pack("<I", 0 if following_one < 0 else 8 + size * following_one)
    return bytes(data) + bytes(64)


def test_directories_of_a_tiff_that_lead_in_a_circle(tmp_path: Path) -> None:
    """tifffile walks around without an end."""
    (tmp_path / "a.tif").write_bytes(chained(1, 2, 1))
    for read in (read_image, StripReader):
        with pytest.raises(UserError, match=r"a\.tif: a TIFF whose directories lead in a circle"):
            read(tmp_path / "a.tif", several=True)
    assert decode_image(chained(1, 2, -1), several=True).pages == 3


@pytest.mark.parametrize("damage", ["a place of 64 bits", "a kind of 8 bytes in 4"])
def test_damaged_directories_cost_one_file(tmp_path: Path, damage: str) -> None:
    """They ended the batch: no file has the place, and 4 bytes no number of 8."""
    data = bytearray(chained(-1))
    if damage == "a kind of 8 bytes in 4":
        struct.pack_into("<HHII", data, 8 + 2, 254, 16, 1, 0)
        assert tiff_directories.full_pages(io.BytesIO(data)) == 1
    else:
        entries = b"".join(struct.pack("<HHQQ", tag, 4, 1, 8) for tag in (256, 257))
        data = bytearray(b"II" + struct.pack("<HHHQ", 43, 8, 0, 16) + struct.pack("<Q", 2) + entries)
        data += struct.pack("<Q", 1 << 63) + bytes(64)
        assert tiff_directories.full_pages(io.BytesIO(data)) is None
        assert tiff_tags.first_directory(io.BytesIO(data)) is not None
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.tif").write_bytes(data)
    (tmp_path / "in" / "b.png").write_bytes(encoded(pixels(), "PNG"))
    report = fastden.BatchDenoiser("color", sigma=10).run(tmp_path / "in", tmp_path / "out")
    assert {Path(record.output).name for record in (*report.done, *report.failed)} == {"a.tif", "b.png"}
    assert "b.png" in {Path(record.output).name for record in report.done}
    assert all(str(record.error).startswith(f"{tmp_path / 'in' / 'a.tif'}: ") for record in report.failed)


def test_exif_without_the_name_of_a_next_directory() -> None:
    """Its first long value lies there; and a name that leads nowhere is no thumbnail."""
    entry = struct.pack("<HHII", 271, 2, 6, 8 + 2 + 12)
    head = struct.pack("<2sHI", b"II", 42, 8) + struct.pack("<H", 1)
    found = tiff_tags.exif_directory(head + entry + b"Maker\0")
    assert found is not None
    assert found[271]["data"] == "Maker"
    for name in (b"", struct.pack("<I", 99_999)):
        block = head + struct.pack("<HHII", 271, 2, 6, 8 + 2 + 12 + len(name)) + name + b"Maker\0"
        assert not tiff_tags.has_thumbnail(block)


def test_pages_are_counted_in_little_time() -> None:
    """10 microseconds each; tifffile takes 200."""
    count = 60_000
    file = io.BytesIO(chained(*range(1, count), -1))
    start = time.process_time()
    assert tiff_directories.full_pages(file) == count
    assert time.process_time() - start < 3


@pytest.mark.parametrize(
    "data",
    [
        b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"><rect width="5" height="5"/></svg>',
        b"1 2 3\n4 5 6\n7 8 9\n",
        b"3 3\n1 2 3\n4 5 6\n7 8 9\n",
        bytes.fromhex("b6a6f208") + struct.pack("<6I", 2, 2, 1, 8, 0, 0) + bytes(64),
    ],
    ids=["SVG", "CSV", "matrix", "libvips"],
)
def test_what_libvips_would_make_a_picture_of_is_refused(tmp_path: Path, data: bytes) -> None:
    """libvips goes by the content: SVG draws what it likes, and a table of numbers is a picture."""
    path = tmp_path / "a.png"
    path.write_bytes(data)
    for read in (read_image, StripReader):
        with pytest.raises(UserError, match=r"a\.png: not an image in a known format; accepted: JPEG, PNG"):
            read(path)


@pytest.mark.skipif(not Path("/dev/zero").is_char_device(), reason="this system has no /dev/zero")
def test_a_device_has_no_end(tmp_path: Path) -> None:
    (tmp_path / "a.png").symlink_to("/dev/zero")
    for read in (read_image, StripReader):
        with pytest.raises(UserError, match=r"a\.png: is a device; accepted: a file"):
            read(tmp_path / "a.png")
    with pytest.raises(UserError, match="sigma_map: /dev/zero is a device; accepted: a file"):
        fastden.BatchDenoiser("color", sigma_map="/dev/zero")
    report = fastden.BatchDenoiser("color", sigma=5).run("/dev/zero", tmp_path / "b.png")
    assert [record.error for record in report.failed] == ["/dev/zero: is a device; accepted: a file"]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes with names here")
@pytest.mark.parametrize("kind", ["named pipe", "socket"])
def test_what_is_no_file_is_refused(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody may ever write to the pipe. A link to it is refused, too."""
    monkeypatch.chdir(tmp_path)  # the name of a socket is short
    model = save_model(tmp_path / "model")
    if kind == "socket":
        socket.socket(socket.AF_UNIX).bind("there.png")
    else:
        os.mkfifo("there.png")
    os.symlink("there.png", "link.png")
    message = f"is a {kind}; accepted: a file"
    for name in ("there.png", "link.png"):
        for read in (read_image, read_header, fastden.denoise, fastden.estimate_noise):
            with pytest.raises(UserError, match=rf"^{name}: {message}$"):
                read(name)
        report = fastden.BatchDenoiser(model, sigma=5).run(name, "out.png")
        assert [record.error for record in report.failed] == [f"{name}: {message}"]
        rest = ["-o", "out.png", "--model", model]
        fails("denoise", name, *rest, "--dry-run", saying=f"^error: {name}: {message}\n$")
        fails("noise", name, saying=f"^error: {name}: {message}\n$")


@pytest.mark.skipif(not os.path.exists("/dev/fd"), reason="no names for open files here")
def test_a_pipe_without_a_name_is_read_once(tmp_path: Path) -> None:
    """As a shell's <(...), and standard input."""
    data = encoded(pixels(), "PNG")
    reading, writing = os.pipe()
    os.write(writing, data)
    os.close(writing)
    name = f"/dev/fd/{reading}"
    with pytest.raises(UserError, match="is a pipe, which can be read once only; accepted: a file"):
        read_header(name)
    report = fastden.BatchDenoiser(save_model(tmp_path / "model"), sigma=5).run(name, tmp_path / "out.png")
    assert len(report.done) == 1
    os.close(reading)
