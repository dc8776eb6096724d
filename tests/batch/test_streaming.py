"""Images read, denoised and written strip by strip: the same files as from memory."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pyvips
import torch
from PIL import Image

import fastden
from fastden.batch.plan import Job
from fastden.batch.report import Listener
from fastden.batch.stages import Stages
from fastden.errors import UserError
from fastden.images.codec import ImageFile, read_image, write_image
from fastden.images.strips import StripReader, StripWriter, read_samples
from fastden.inference.estimate import noise_of_samples
from fastden.inference.tiling import least_memory
from tests.batch.conftest import Greedy
from tests.helpers import random_network, streaming
from tests.image_files import MAKE, encoded, exif, icc_profile, pixels, save_model

SIZE = (300, 500)


@pytest.fixture(scope="module")
def exact() -> fastden.FusedDenoiser:
    """In float64, where tiles equal the whole image to the last bit of the written values."""
    return fastden.fuse(random_network(), torch.float64)


def test_equal_to_the_untiled_image(tmp_path: Path, exact: Any) -> None:
    picture = pixels(111, 90)
    write_image(tmp_path / "a.tif", ImageFile(picture))
    batch = streaming(fastden.BatchDenoiser(exact, sigma=20, tile=48))
    assert batch.run(tmp_path / "a.tif", tmp_path / "b.tif").failed == []
    untiled = fastden.denoise(picture, 20, model=exact, tile=None)
    np.testing.assert_array_equal(read_image(tmp_path / "b.tif").pixels, untiled)


def test_max_memory_decides(tmp_path: Path, network: Any) -> None:
    """An image that does not fit is streamed by itself, with the bits of tiles in memory."""
    picture = pixels(*SIZE, dtype=np.float32)
    write_image(tmp_path / "a.tif", ImageFile(picture))
    least = 2 * least_memory(network)
    for memory, expected in ((4 * least, False), (least, True)):
        batch = fastden.BatchDenoiser(network, sigma=20, max_memory=memory)
        assert batch.stages.reading.look(Job(tmp_path / "a.tif", tmp_path / "b.tif")).streamed == expected
    assert batch.run(tmp_path / "a.tif", tmp_path / "b.tif").failed == []
    whole = fastden.denoise(picture, 20, model=network, tile=16)
    np.testing.assert_array_equal(read_image(tmp_path / "b.tif").pixels, whole)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("alpha", [False, True])
def test_equal_to_tiles_in_memory(tmp_path: Path, network: Any, dtype: Any, channels: int, alpha: bool) -> None:
    """With the same tiles the bits agree in float32 too: 16-bit and float values are never reduced to 8 bits."""
    planes = pixels(211, 303, channels, dtype)
    mask = pixels(211, 303, 0, dtype, seed=3) if alpha else None
    write_image(tmp_path / "a.tif", ImageFile(planes, mask, metadata={"icc-profile-data": icc_profile()}))
    batch = streaming(fastden.BatchDenoiser(network, tile=64, strength=0.75))
    (record,) = batch.run(tmp_path / "a.tif", tmp_path / "b.tif").records
    back = read_image(tmp_path / "b.tif")
    estimate = fastden.estimate_noise(planes)
    assert record.sigma == pytest.approx(estimate.sigma)
    image = planes if channels == 3 else planes[:, :, 0]
    expected = fastden.denoise(image, estimate, model=network, tile=64, strength=0.75).reshape(planes.shape)
    np.testing.assert_array_equal(back.pixels, expected)
    assert back.pixels.dtype == dtype
    if alpha:
        np.testing.assert_array_equal(back.alpha, mask)
    if channels == 3:
        assert back.metadata["icc-profile-data"] == icc_profile()


@pytest.mark.parametrize(("suffix", "kind"), [("jpg", "JPEG"), ("png", "PNG"), ("webp", "WEBP")])
def test_formats_and_metadata(tmp_path: Path, network: Any, suffix: str, kind: str) -> None:
    """A streamed file holds the same as the file written from memory."""
    options = {"lossless": True} if kind == "WEBP" else {}
    picture = encoded(pixels(*SIZE), kind, exif=exif(6), icc_profile=icc_profile(), **options)
    source = tmp_path / f"a.{suffix}"
    source.write_bytes(picture)
    fastden.BatchDenoiser(network, sigma=20, tile=96).run(source, tmp_path / f"memory.{suffix}")
    batch = streaming(fastden.BatchDenoiser(network, sigma=20, tile=96))
    record = batch.run(source, tmp_path / f"streamed.{suffix}").records[0]
    assert record.error is None
    memory, stream = (read_image(tmp_path / f"{name}.{suffix}") for name in ("memory", "streamed"))
    np.testing.assert_array_equal(stream.pixels, memory.pixels)
    assert stream.metadata.keys() == memory.metadata.keys()
    assert Image.open(tmp_path / f"streamed.{suffix}").getexif()[MAKE] == "Camera"
    assert ("holds the whole image" in " ".join(record.notes)) == (suffix == "webp")


@pytest.mark.parametrize("several_passes", [False, True])
@pytest.mark.parametrize(("suffix", "what"), [("jpg", "a progressive jpeg"), ("png", "an interlaced png")])
def test_rows_in_several_passes_are_held_whole_and_noted(
    tmp_path: Path, network: Any, suffix: str, what: str, several_passes: bool
) -> None:
    pyvips.Image.new_from_array(pixels(*SIZE)).write_to_file(str(tmp_path / f"a.{suffix}"), interlace=several_passes)
    batch = streaming(fastden.BatchDenoiser(network, sigma=20, tile=96))
    (record,) = batch.run(tmp_path / f"a.{suffix}", tmp_path / "b.tif").done
    note = f"the decoder of {what} holds the whole image in memory"
    assert (note in record.notes) == ("holds the whole" in " ".join(record.notes)) == several_passes


def test_the_result_is_a_tiled_tiff(tmp_path: Path, network: Any) -> None:
    tifffile = pytest.importorskip("tifffile")
    write_image(tmp_path / "a.tif", ImageFile(pixels(*SIZE)))
    batch = streaming(fastden.BatchDenoiser(network, sigma=20, tile=64))
    assert batch.run(tmp_path / "a.tif", tmp_path / "b.tif").failed == []
    with tifffile.TiffFile(tmp_path / "b.tif") as file:
        page = file.pages[0]
        assert (page.is_tiled, page.tilewidth, page.compression.name) == (True, 256, "ADOBE_DEFLATE")


def test_a_map_is_streamed_too(tmp_path: Path, network: Any) -> None:
    picture = pixels(*SIZE)
    levels = np.linspace(0, 60, SIZE[1], dtype=np.uint8)[None].repeat(SIZE[0], 0)
    write_image(tmp_path / "a.tif", ImageFile(picture))
    write_image(tmp_path / "map.png", ImageFile(levels[:, :, None]))
    whole = fastden.BatchDenoiser(network, sigma_map=tmp_path / "map.png", tile=64)
    (in_memory,) = whole.run(tmp_path / "a.tif", tmp_path / "whole.tif").done
    batch = streaming(fastden.BatchDenoiser(network, sigma_map=tmp_path / "map.png", tile=64))
    (record,) = batch.run(tmp_path / "a.tif", tmp_path / "b.tif").done
    assert record.sigma == pytest.approx(levels.mean(), rel=1e-6)
    assert (record.sigma, record.sigma_source) == (pytest.approx(in_memory.sigma, rel=1e-12), "map")
    expected = fastden.denoise(picture, levels.astype(np.float32), model=network, tile=64)
    np.testing.assert_array_equal(read_image(tmp_path / "b.tif").pixels, expected)


@pytest.mark.parametrize("shape", [(1, 1, 3), (1, 5000, 1), (3000, 1, 3), (513, 17, 4), (1300, 700, 1), (1025, 600, 2)])
def test_rows_come_and_go_unchanged(tmp_path: Path, shape: tuple[int, int, int]) -> None:
    values = pixels(*shape)
    alpha = shape[2] in (2, 4)
    picture = ImageFile(values[:, :, :-1], values[:, :, -1]) if alpha else ImageFile(values)
    write_image(tmp_path / "a.tif", picture)
    reader = StripReader(tmp_path / "a.tif")
    assert (reader.header.height, reader.header.width, reader.header.bands) == shape
    options: dict[str, Any] = {"bits": 8, "lossless": True, "metadata": {}, "strip_metadata": False}
    writer = StripWriter(tmp_path / "b.tif", shape, np.dtype(np.uint8), "tiff", **options)
    write_all(writer, reader.read(shape[0]))
    back = StripReader(tmp_path / "b.tif").read(shape[0])
    np.testing.assert_array_equal(back, values)
    assert noise_of_samples(*read_samples(tmp_path / "b.tif")) == fastden.estimate_noise(picture.pixels)


@pytest.mark.skipif(sys.platform != "linux", reason="names are bytes there alone")
@pytest.mark.parametrize("format_name", ["tiff", "png", "jpeg"])
def test_a_folder_whose_name_is_no_utf8(tmp_path: Path, format_name: str) -> None:
    folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9"))
    folder.mkdir()
    values = pixels(64, 64, 3)
    options: dict[str, Any] = {"bits": 8, "lossless": True, "metadata": {}, "strip_metadata": False}
    write_all(StripWriter(folder / "a", values.shape, np.dtype(np.uint8), format_name, **options), values)
    assert StripReader(folder / "a").read(64).shape == values.shape


def write_all(writer: StripWriter, rows: Any) -> None:
    for top in range(0, len(rows), 100):
        writer.write(rows[top : top + 100])
    writer.close()


def test_a_writer_that_is_given_up_ends(tmp_path: Path) -> None:
    options: dict[str, Any] = {"bits": 8, "lossless": True, "metadata": {}, "strip_metadata": False}
    writer = StripWriter(tmp_path / "a.tif", (500, 100, 3), np.dtype(np.uint8), "tiff", **options)
    writer.write(pixels(100, 100))
    writer.abort()
    with pytest.raises(UserError, match="cannot be written as tiff"):
        writer.write(pixels(100, 100))
    missing = StripWriter(tmp_path / "missing" / "a.tif", (500, 100, 3), np.dtype(np.uint8), "tiff", **options)
    with pytest.raises(FileNotFoundError):
        write_all(missing, pixels(500, 100))


def test_what_goes_wrong_leaves_nothing(tmp_path: Path, network: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    data = encoded(pixels(*SIZE), "PNG")
    bad = pixels(*SIZE, dtype=np.float32)
    bad[250, 30] = np.nan
    (tmp_path / "cut.png").write_bytes(data[: len(data) // 2])
    write_image(tmp_path / "nan.tif", ImageFile(bad))
    write_image(tmp_path / "turned.tif", ImageFile(pixels(*SIZE), metadata={"orientation": 6}))
    (tmp_path / "changing.png").write_bytes(data)
    before = set(tmp_path.iterdir())
    stream = Stages.stream

    def meddle(self: Stages, work: Any, *rest: Any) -> Any:
        if work.job.source.name == "changing.png":
            work.job.source.write_bytes(data + b"\0")
        return stream(self, work, *rest)

    monkeypatch.setattr(Stages, "stream", meddle)
    for name, strip, message in (
        ("cut.png", False, "cut.png: corrupt or truncated"),
        ("nan.tif", False, "nan.tif: .*NaN"),
        ("turned.tif", True, "cannot be turned upright"),
        ("changing.png", False, "changed while it was read"),
    ):
        batch = streaming(fastden.BatchDenoiser(network, sigma=20, tile=64, strip_metadata=strip))
        target = tmp_path / f"out-{name}"
        (record,) = batch.run(tmp_path / name, target).records
        assert record.error is not None, name
        with pytest.raises(UserError, match=message):
            raise UserError(record.error)
        assert set(tmp_path.iterdir()) == before


def test_strips_that_do_not_fit(tmp_path: Path, network: Any) -> None:
    (tmp_path / "a.png").write_bytes(encoded(pixels(60, 4000), "PNG"))
    batch = fastden.BatchDenoiser(network, sigma=20)
    batch.settings.budget = type(batch.settings.budget)(1 << 30, 300_000)
    (record,) = batch.run(tmp_path / "a.png", tmp_path / "b.png").records
    assert record.error is not None
    assert "strips of 4000 pixels do not fit" in record.error


def test_out_of_device_memory_halves_the_tile_and_is_said_once(
    tmp_path: Path, network: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Greedy, "largest", 130 * 130)
    write_image(tmp_path / "a.tif", ImageFile(pixels(*SIZE)))
    notes: list[str] = []
    batch = streaming(fastden.BatchDenoiser(Greedy(fastden.Denoiser().eval()).float(), sigma=20, tile=128))
    assert batch.run(tmp_path / "a.tif", tmp_path / "b.tif", listener=Listener(note=notes.append)).failed == []
    assert notes == ["out of memory on cpu: going on in tiles of 64 pixels or less"]
    expected = fastden.denoise(tmp_path / "a.tif", 20, model=network, tile=64).astype(int)
    assert np.abs(read_image(tmp_path / "b.tif").pixels.astype(int) - expected).max() <= 1


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 100_000), (100_000, 1)])
def test_extreme_shapes(tmp_path: Path, network: Any, height: int, width: int) -> None:
    picture = pixels(height, width, 1)
    write_image(tmp_path / "a.tif", ImageFile(picture))
    batch = streaming(fastden.BatchDenoiser(network, sigma=20, tile=2048))
    assert batch.run(tmp_path / "a.tif", tmp_path / "b.tif").failed == []
    expected = fastden.denoise(picture, 20, model=network, tile=2048)
    np.testing.assert_array_equal(read_image(tmp_path / "b.tif").pixels, expected)


LIMITED = """
import resource, sys
from fastden import BatchDenoiser
from tests.helpers import streaming
resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))
batch = streaming(BatchDenoiser(sys.argv[1], sigma=0, strength=0))
for suffix in ("tif", "png", "jpg", "webp", "avif"):
    print(*[record.error for record in batch.run(sys.argv[2], f"{sys.argv[3]}.{suffix}").failed])
"""


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no limits of file sizes")
def test_a_disk_that_fills_up(tmp_path: Path, root: Path) -> None:
    """A limit of file sizes stands for the full disk, in the middle of a file that libvips writes."""
    write_image(tmp_path / "a.tif", ImageFile(pixels(*SIZE)))
    model = save_model(tmp_path / "model")
    before = set(tmp_path.iterdir())
    command = [sys.executable, "-c", LIMITED, str(model), str(tmp_path / "a.tif"), str(tmp_path / "b")]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    assert done.stdout.splitlines() == [
        f"{tmp_path / 'b'}.{suffix}: cannot be written: {os.strerror(errno.EFBIG)}"
        for suffix in ("tif", "png", "jpg", "webp", "avif")
    ]
    assert set(tmp_path.iterdir()) == before


def test_an_encoder_that_fails_is_an_error_of_the_output(
    tmp_path: Path, network: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: Any, **__: Any) -> Any:
        raise pyvips.Error("no such encoder")

    write_image(tmp_path / "a.tif", ImageFile(pixels(*SIZE)))
    monkeypatch.setattr("fastden.images.strips.described", refused)
    batch = streaming(fastden.BatchDenoiser(network, sigma=20, tile=64))
    (record,) = batch.run(tmp_path / "a.tif", tmp_path / "b.png").failed
    assert str(record.error).startswith(f"{tmp_path / 'b.png'}: cannot be written as png (no such encoder")
