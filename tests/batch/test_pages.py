"""TIFFs of several pages: each page is denoised as a file with this page alone is."""

from __future__ import annotations

import io
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image

import fastden
from fastden.batch.plan import Job
from fastden.batch.transfer import Pending
from fastden.errors import UserError
from fastden.images.codec import ImageFile, decode_image, encode_image, read_image, write_image
from tests.cli.run import fails, works
from tests.image_files import encoded, icc_profile, pixels, save_model
from tests.soak import fuzz_reader


def pages_of(count: int = 3, channels: int = 3, dtype: Any = np.uint8, size: tuple[int, int] = (32, 40)) -> list[Any]:
    return [pixels(*size, channels, dtype, seed=index) for index in range(count)]


def file_of(pages: list[Any], alpha: Any = None, **metadata: Any) -> ImageFile:
    return ImageFile(np.concatenate(pages), alpha, metadata=metadata, pages=len(pages))


def read_pages(path: Path) -> list[Any]:
    """What another reader sees."""
    with tifffile.TiffFile(path) as file:
        return [np.atleast_3d(page.asarray()) for page in file.pages]


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
def test_each_page_as_a_file_of_its_own(tmp_path: Path, network: Any, channels: int, dtype: Any) -> None:
    """No row of a page reaches into the next, and each has a noise level of its own."""
    pages = pages_of(3, channels, dtype)
    pages[1] = np.full_like(pages[1], pages[1].max())
    tifffile.imwrite(
        tmp_path / "a.tif", np.stack(pages).squeeze(), photometric="rgb" if channels == 3 else "minisblack"
    )
    assert len(read_pages(tmp_path / "a.tif")) == 3
    (record,) = fastden.BatchDenoiser(network).run(tmp_path / "a.tif", tmp_path / "b.tif").records
    assert (record.status, record.pages, record.width, record.height) == ("done", 3, 40, 32)
    assert record.notes == ("3 pages: all get the metadata of the first",)
    results = read_pages(tmp_path / "b.tif")
    levels = []
    for index, page in enumerate(pages):
        write_image(tmp_path / f"{index}.tif", ImageFile(page))
        (alone,) = fastden.BatchDenoiser(network).run(tmp_path / f"{index}.tif", tmp_path / f"{index}-out.tif").records
        levels.append(alone.sigma)
        np.testing.assert_array_equal(results[index], read_image(tmp_path / f"{index}-out.tif").pixels)
        assert results[index].dtype == dtype
        assert results[index].shape == (32, 40, channels)
    assert levels[1] == 0 < min(levels[0] or 0, levels[2] or 0)
    assert record.sigma == pytest.approx(np.mean([level or 0 for level in levels]))


@pytest.mark.parametrize("options", [{"sigma": 20}, {"sigma": 20, "tile": 16}, {"map": True}, {"strength": 0.5}])
def test_every_way_to_give_a_noise_level(tmp_path: Path, network: Any, options: dict[str, Any]) -> None:
    pages = pages_of()
    write_image(tmp_path / "a.tif", file_of(pages))
    levels = np.linspace(0, 60, 40, dtype=np.uint8)[None].repeat(32, 0)
    write_image(tmp_path / "map.png", ImageFile(levels[:, :, None]))
    given = {key: value for key, value in options.items() if key != "map"}
    batch = fastden.BatchDenoiser(network, sigma_map=tmp_path / "map.png" if "map" in options else None, **given)
    assert batch.run(tmp_path / "a.tif", tmp_path / "b.tif").failed == []
    sigma = levels.astype(np.float32) if "map" in options else options.get("sigma", "auto")
    rest = {key: value for key, value in given.items() if key != "sigma"}
    for result, page in zip(read_pages(tmp_path / "b.tif"), pages, strict=True):
        np.testing.assert_array_equal(result, fastden.denoise(page, sigma, model=network, **rest))


def test_metadata_alpha_and_orientation(tmp_path: Path, network: Any) -> None:
    pages, alpha = pages_of(2), np.concatenate([pixels(channels=0, seed=7), pixels(channels=0, seed=8)])
    metadata = {"icc-profile-data": icc_profile(), "xmp-data": b"<x:xmpmeta/>", "orientation": 6, "xres": 10.0}
    write_image(tmp_path / "a.tif", file_of(pages, alpha, yres=5.0, **metadata))
    fastden.BatchDenoiser(network, sigma=20).run(tmp_path / "a.tif", tmp_path / "b.tif")
    back = read_image(tmp_path / "b.tif", several=True)
    assert back.pages == 2
    np.testing.assert_array_equal(back.alpha, alpha)
    assert {name: back.metadata[name] for name in metadata} == metadata
    with tifffile.TiffFile(tmp_path / "b.tif") as file:
        for page in file.pages:
            assert page.tags["Orientation"].value == 6  # type: ignore[union-attr]
            assert page.tags["InterColorProfile"].value == icc_profile()  # type: ignore[union-attr]
    batch = fastden.BatchDenoiser(network, sigma=20, strip_metadata=True)
    assert batch.run(tmp_path / "a.tif", tmp_path / "c.tif").failed == []
    turned = read_image(tmp_path / "c.tif", several=True)
    assert turned.metadata.get("orientation", 1) == 1
    for upright, page in zip(turned.split(), back.split(), strict=True):
        np.testing.assert_array_equal(upright, np.rot90(page, -1))


def test_they_do_not_go_together_with_others(tmp_path: Path, network: Any) -> None:
    """Two pages of 16 rows have the shape of one of 32."""
    folder = tmp_path / "in"
    folder.mkdir()
    write_image(folder / "a.tif", ImageFile(pixels()))
    write_image(folder / "b.tif", file_of(pages_of(2, size=(16, 40))))
    write_image(folder / "c.tif", ImageFile(pixels(seed=2)))
    stages = fastden.BatchDenoiser(network, sigma=20).stages
    works = [stages.reading.look(Job(path, tmp_path / path.name)) for path in sorted(folder.iterdir())]
    for work in works:
        stages.reading.read(work)
    one, several, another = works
    assert (stages.computing.alike(one, another), stages.computing.alike(one, several)) == (True, False)
    assert stages.computing.group_limit(one) > stages.computing.group_limit(several) == 1
    report = fastden.BatchDenoiser(network, sigma=20).run(folder, tmp_path / "out")
    assert report.failed == []
    assert report.megapixels == 3 * 32 * 40 / 1e6
    for result, page in zip(read_pages(tmp_path / "out" / "b.tif"), pages_of(2, size=(16, 40)), strict=True):
        np.testing.assert_array_equal(result, fastden.denoise(page, 20, model=network))
    assert len(read_pages(tmp_path / "out" / "a.tif")) == 1


def test_past_the_way_to_a_device(tmp_path: Path, network: Any) -> None:
    class Unused:
        """Replaces the copies to a device and back, for images of one page."""

        def run(self, *arguments: Any) -> Pending:
            raise AssertionError("several pages went there together")

        pin = fits = run

    write_image(tmp_path / "a.tif", file_of(pages_of()))
    batch = fastden.BatchDenoiser(network, sigma=20)
    batch.settings.transfer = Unused()  # type: ignore[assignment]
    assert batch.run(tmp_path / "a.tif", tmp_path / "b.tif").failed == []


def test_progress_goes_through_all_pages(tmp_path: Path, network: Any) -> None:
    from fastden.batch.report import Listener

    write_image(tmp_path / "a.tif", file_of(pages_of(4)))
    parts: list[float] = []
    listener = Listener(progress=lambda ended, part: parts.append(ended + part))
    fastden.BatchDenoiser(network, sigma=20).run(tmp_path / "a.tif", tmp_path / "b.tif", listener=listener)
    assert parts == [0.25, 0.5, 0.75, 1, 1]


def test_what_is_refused(tmp_path: Path, network: Any) -> None:
    write_image(tmp_path / "a.tif", file_of(pages_of()))
    with tifffile.TiffWriter(tmp_path / "sizes.tif") as writer:
        for height in (32, 16):
            writer.write(pixels(height), photometric="rgb")
    with tifffile.TiffWriter(tmp_path / "depths.tif") as writer:
        for dtype in (np.uint8, np.uint16):
            writer.write(pixels(dtype=dtype), photometric="rgb")
    frames = [Image.fromarray(page) for page in pages_of(2)]
    (tmp_path / "moving.webp").write_bytes(encoded(frames[0], "WEBP", save_all=True, append_images=frames[1:]))
    (tmp_path / "cut.tif").write_bytes((tmp_path / "a.tif").read_bytes()[:-3000])
    large = fastden.BatchDenoiser(network, sigma=20)
    large.settings.budget = type(large.settings.budget)(1 << 30, 3 * 32 * 40 * 3)
    few = fastden.BatchDenoiser(network, sigma=20, max_pixels=2 * 32 * 40)
    usual = fastden.BatchDenoiser(network, sigma=20)
    before = set(tmp_path.iterdir())
    for name, target, batch, message in (
        ("sizes.tif", "b.tif", usual, r"2 pages \(.*differs.*\); accepted: pages that are alike"),
        ("depths.tif", "b.tif", usual, r"2 pages \(.*differs.*\); accepted: pages that are alike"),
        ("a.tif", "b.png", usual, "3 pages, which png has not; accepted: tiff"),
        ("a.tif", "b.tif", large, r"3 pages take [\d.]+ KiB; accepted: less than half of --max-memory"),
        ("a.tif", "b.tif", few, "40 x 96 pixels; accepted: at most"),
        ("moving.webp", "b.webp", usual, r"animation of 2 frames \(webp\); accepted: one picture"),
        ("cut.tif", "b.tif", usual, "corrupt or truncated"),
    ):
        (record,) = batch.run(tmp_path / name, tmp_path / target).records
        with pytest.raises(UserError, match=message):
            raise UserError(record.error)
        assert set(tmp_path.iterdir()) == before
    for read in (read_image, fastden.denoise):
        with pytest.raises(UserError, match=r"a\.tif: 3 pages; accepted: one page \(the command denoise and Batch"):
            read(tmp_path / "a.tif")
    write_image(tmp_path / "map.tif", file_of(pages_of(2, 1)))
    with_map = fastden.BatchDenoiser(network, sigma_map=tmp_path / "map.tif")
    (record,) = with_map.run(tmp_path / "a.tif", tmp_path / "b.tif").records
    assert (
        record.error
        == f"{tmp_path / 'map.tif'}: 2 pages; accepted: one page (the command denoise and BatchDenoiser take several)"
    )


def test_mutated_files() -> None:
    """A mutated file gives several pages or a UserError, and nothing else."""
    data = encode_image(file_of(pages_of(3, size=(23, 29))), "tiff")[0]
    outcomes = set()
    for seed in range(150):
        try:
            image = decode_image(fuzz_reader.mutate(data, [data], random.Random(seed)), max_pixels=10**6, several=True)
        except UserError:
            outcomes.add("refused")
            continue
        assert image.pixels.shape[0] % image.pages == 0
        outcomes.add("read")
    assert outcomes == {"read", "refused"}


def test_command(tmp_path: Path) -> None:
    model = str(save_model(tmp_path / "model"))
    write_image(tmp_path / "a.tif", file_of(pages_of(2)))
    rest = ["--model", model, "--sigma", 5]
    text = works("denoise", tmp_path / "a.tif", "-o", tmp_path / "b.tif", *rest, "--dry-run")
    assert f"{tmp_path / 'b.tif'}, 40 x 32, 2 pages, sigma 5\n" in text
    text = works("denoise", tmp_path / "a.tif", "-o", tmp_path / "b.tif", *rest)
    assert f"{tmp_path / 'b.tif'}, 40 x 32, 2 pages, sigma 5.0\n" in text
    fails("denoise", tmp_path / "a.tif", "-o", tmp_path / "c.png", *rest, "--dry-run", saying="2 pages, which png has")
    buffer = io.BytesIO((tmp_path / "b.tif").read_bytes())
    assert torch.tensor(tifffile.imread(buffer)).shape == (2, 32, 40, 3)
