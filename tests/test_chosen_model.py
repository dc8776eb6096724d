"""Without a model and a sigma the noise chooses in every way in: ``color`` for white noise, ``photo`` for all other."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
import torch
from scipy.ndimage import gaussian_filter

import fastden
from fastden.images.codec import ImageFile, read_image, write_image
from tests.cli.run import works
from tests.helpers import streaming

FLOAT: dict[str, Any] = {"dtype": "float32"}


def picture(white: bool, dtype: Any = np.uint8, seed: int = 0) -> Any:
    """A ramp with noise of sigma 20: white, or shared by neighbours."""
    noise = np.random.default_rng(seed).normal(0, 1, (96, 120, 3))
    if not white:
        noise = gaussian_filter(noise, (1.2, 1.2, 0))
        noise /= noise.std()
    values = np.linspace(0.35, 0.65, 120)[None, :, None] + 20 / 255 * noise
    return values.astype(dtype) if np.dtype(dtype).kind == "f" else np.rint(values * np.iinfo(dtype).max).astype(dtype)


@pytest.mark.parametrize(("white", "name"), [(True, "color"), (False, "photo")])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
def test_arrays_and_tensors(white: bool, name: str, dtype: Any) -> None:
    image = picture(white, dtype)
    estimate = fastden.estimate_noise(image)
    assert estimate.is_white == white
    wanted = fastden.denoise(image, estimate, model=name)
    other = fastden.denoise(image, estimate, model="photo" if white else "color")
    assert not np.array_equal(wanted, other)
    np.testing.assert_array_equal(fastden.denoise(image), wanted)
    np.testing.assert_array_equal(fastden.denoise(image, estimate), wanted)
    tensor = torch.from_numpy(image).permute(2, 0, 1)
    np.testing.assert_array_equal(fastden.denoise(tensor).permute(1, 2, 0).numpy(), wanted)


def test_a_given_model_stays() -> None:
    image = picture(white=True)
    estimate = fastden.estimate_noise(image)
    np.testing.assert_array_equal(
        fastden.denoise(image, model="photo"), fastden.denoise(image, estimate, model="photo")
    )


def test_each_image_of_a_batch_has_its_own() -> None:
    images = [picture(white, np.float32, seed) for seed, white in enumerate((True, False, True))]
    batch = torch.stack([torch.from_numpy(image).permute(2, 0, 1) for image in images])
    for result, image in zip(fastden.denoise(batch), images, strict=True):
        np.testing.assert_array_equal(result.permute(1, 2, 0).numpy(), fastden.denoise(image))


def test_pictures_that_are_clean_or_cannot_be_judged_are_not_white() -> None:
    assert not fastden.estimate_noise(np.full((64, 64, 3), 90, np.uint8)).is_white
    assert not fastden.estimate_noise(
        np.tile(np.linspace(0, 1, 64, dtype=np.float32)[:, None, None], (1, 64, 3))
    ).is_white


def test_files(tmp_path: Path) -> None:
    """Results, records, and what a resumed run takes for done."""
    (tmp_path / "in").mkdir()
    for name, white in (("white", True), ("coarse", False)):
        write_image(tmp_path / "in" / f"{name}.png", ImageFile(picture(white)))
    report = fastden.BatchDenoiser(**FLOAT).run(tmp_path / "in", tmp_path / "out")
    names = {Path(record.input).stem: record.model["name"] for record in report.records}
    assert names == {"white": "color", "coarse": "photo"}
    for name in names:
        wanted = fastden.denoise(tmp_path / "in" / f"{name}.png", **FLOAT)
        np.testing.assert_array_equal(read_image(tmp_path / "out" / f"{name}.png").pixels, wanted)
    assert len(fastden.BatchDenoiser(**FLOAT).run(tmp_path / "in", tmp_path / "out", resume=True).skipped) == 2
    # The same weights, but for all pictures: another run.
    again = fastden.BatchDenoiser("color", overwrite=True, **FLOAT).run(tmp_path / "in", tmp_path / "out", resume=True)
    assert {record.model["name"] for record in again.records} == {"color"}
    assert len(again.records) == 2


def test_pages(tmp_path: Path) -> None:
    pages = [picture(white, np.uint16, seed) for seed, white in enumerate((True, False))]
    tifffile.imwrite(tmp_path / "a.tif", np.stack(pages), photometric="rgb")
    assert fastden.BatchDenoiser().run(tmp_path / "a.tif", tmp_path / "b.tif").failed == []
    for result, page in zip(tifffile.imread(tmp_path / "b.tif"), pages, strict=True):
        np.testing.assert_array_equal(result, fastden.denoise(page))


@pytest.mark.parametrize("white", [True, False])
def test_strips(tmp_path: Path, white: bool) -> None:
    write_image(tmp_path / "a.png", ImageFile(picture(white)))
    batch = streaming(fastden.BatchDenoiser(tile=64, **FLOAT))
    (record,) = batch.run(tmp_path / "a.png", tmp_path / "b.png").records
    assert record.streamed
    assert record.model["name"] == ("color" if white else "photo")
    wanted = fastden.denoise(picture(white), tile=64, **FLOAT)
    difference = read_image(tmp_path / "b.png").pixels.astype(int) - wanted.astype(int)
    assert np.abs(difference).max() <= 1
    assert (difference != 0).mean() < 0.01


def test_dask_arrays() -> None:
    da = pytest.importorskip("dask.array")
    images = np.stack([picture(white, np.float32) for white in (True, False)])
    results = fastden.denoise_array(da.from_array(images, chunks=(1, 96, 120, 3))).compute(scheduler="synchronous")
    for result, image in zip(results, images, strict=True):
        np.testing.assert_allclose(result, fastden.denoise(image), atol=1e-6)


def test_videos(tmp_path: Path) -> None:
    av = pytest.importorskip("av")
    frames = [picture(white=True, seed=seed) for seed in range(3)]
    with av.open(tmp_path / "a.mkv", "w") as file:
        stream = file.add_stream("ffv1", rate=10)
        stream.width, stream.height, stream.pix_fmt = 120, 96, "bgr0"
        for frame in frames:
            file.mux(stream.encode(av.VideoFrame.from_ndarray(frame, "rgb24")))
        file.mux(stream.encode(None))
    for name, options in (("chosen", []), ("color", ["--model", "color"]), ("photo", ["--model", "photo"])):
        works("denoise", tmp_path / "a.mkv", "-o", tmp_path / f"{name}.mkv", *options)
    read = {
        name: [frame.to_ndarray(format="rgb24") for frame in av.open(tmp_path / f"{name}.mkv").decode(video=0)]
        for name in ("chosen", "color", "photo")
    }
    np.testing.assert_array_equal(read["chosen"], read["color"])
    assert not np.array_equal(read["chosen"], read["photo"])


@pytest.mark.parametrize("sigma", [6, 20])
def test_gray_pictures(sigma: float) -> None:
    """The noise of a gray picture has no channels that differ, by which white noise would be known."""
    for seed in range(3):
        noise = np.random.default_rng(seed).normal(0, 1, (160, 160))
        for blurred, white in ((0.0, True), (1.2, False)):
            values = gaussian_filter(noise, blurred) if blurred else noise
            ramp = np.linspace(0.35, 0.65, 160)[None]
            image = np.rint(255 * ramp + sigma * values / values.std()).astype(np.uint8)
            assert fastden.estimate_noise(image).is_white == white


@pytest.mark.parametrize("white", [True, False])
def test_what_the_command_says(tmp_path: Path, white: bool) -> None:
    write_image(tmp_path / "a.png", ImageFile(picture(white)))
    told = works("denoise", tmp_path / "a.png", "-o", tmp_path / "b.png")
    assert ("(estimated, white noise; model color)" if white else "(estimated; model photo)") in told
    told = works("noise", tmp_path / "a.png")
    assert ("white noise" if white else "coarse grain") in told
    assert f'"is_white": {str(white).lower()}' in works("noise", tmp_path / "a.png", "--json")


@pytest.mark.parametrize(("white", "name"), [(True, "color"), (False, "photo")])
def test_eval_measures_what_denoise_chooses(tmp_path: Path, white: bool, name: str) -> None:
    (tmp_path / "pairs").mkdir()
    ramp = np.rint(255 * np.linspace(0.35, 0.65, 120)[None, :, None] * np.ones((96, 1, 3))).astype(np.uint8)
    write_image(tmp_path / "pairs" / "a_real.png", ImageFile(picture(white)))
    write_image(tmp_path / "pairs" / "a_mean.png", ImageFile(ramp))
    scores = {}
    for label, options in (("chosen", []), (name, ["--model", name])):
        works("eval", tmp_path / "pairs", "--real", *options, "--json", tmp_path / f"{label}.json")
        document = json.loads((tmp_path / f"{label}.json").read_text())
        scores[label] = document["sets"]["pairs"][0]["psnr"]
    assert scores["chosen"] == scores[name]
    works("eval", tmp_path / "pairs", "--real", "--sigma", 20, "--json", tmp_path / "given.json")
    assert json.loads((tmp_path / "given.json").read_text())["model"] == "color"
