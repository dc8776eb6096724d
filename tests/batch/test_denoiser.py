"""``fastden.BatchDenoiser``: the results of one image at a time, whatever overlaps, fails or is interrupted."""

from __future__ import annotations

import copy
import threading
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import fastden
from fastden.batch import reading, threads
from fastden.batch.computing import Computing
from fastden.batch.dry_run import rehearse
from fastden.batch.memory import Gate
from fastden.batch.plan import Job, plan
from fastden.batch.ray import plan_rows
from fastden.batch.reading import Reading
from fastden.batch.report import Interrupted, Listener
from fastden.batch.streaming import denoise_strips
from fastden.batch.transfer import Pending
from fastden.batch.writing import Writing
from fastden.errors import UserError
from fastden.images.codec import ImageFile, read_image, write_image
from tests.batch.conftest import outputs
from tests.helpers import random_network, streaming
from tests.image_files import cannot_be_looked_at, encoded, exif, pixels

#: Of one camera.
ESTIMATE = fastden.NoiseEstimate(tuple(10.0 + knot for knot in range(8)), 13.5, 0.5)


def test_results_are_those_of_one_image_at_a_time(photos: Path, tmp_path: Path, real: Any) -> None:
    report = fastden.BatchDenoiser(real).run(photos, tmp_path / "out")
    assert (report.jobs, len(report.done), report.failed, report.left) == (5, 5, [], 0)
    assert 0 < report.compute_share <= 1
    assert report.megapixels == (4 * 32 * 40 + 24 * 61) / 1e6
    for record in report.done:
        expected = fastden.denoise(record.input, model=real)
        if record.input.endswith(".png"):
            np.testing.assert_array_equal(read_image(tmp_path / "out" / record.output).pixels, expected)
        estimate = fastden.estimate_noise(read_image(record.input).pixels)
        assert record.sigma == pytest.approx(estimate.sigma)
        assert record.noise == estimate.as_record()
        assert record.sigma_source == "estimated"
    alone = fastden.BatchDenoiser(real)
    for path in photos.iterdir():
        (tmp_path / "one").mkdir(exist_ok=True)
        assert alone.one(Job(path, tmp_path / "one" / path.name)).status == "done"
    assert outputs(tmp_path / "one") == outputs(tmp_path / "out")


@pytest.mark.parametrize("estimate", [ESTIMATE, replace(ESTIMATE, white=2.0)], ids=["", "of brighter pictures"])
def test_an_estimate_that_all_images_share(tmp_path: Path, network: Any, estimate: fastden.NoiseEstimate) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    dark = (pixels(32, 40, dtype=np.uint16) // 40).astype(np.uint16)  # its values fill a small part of 16 bits
    pages = np.concatenate([dark, pixels(32, 40, dtype=np.uint16)])
    write_image(folder / "a.png", ImageFile(pixels(32, 40)))
    write_image(folder / "b.tif", ImageFile(pages, pages=2))
    write_image(folder / "c.png", ImageFile(dark))
    batch = fastden.BatchDenoiser(network, sigma=estimate)
    report = batch.run(folder, tmp_path / "out")
    assert [record.error for record in report.records] == [None] * 3
    assert {(record.sigma, record.sigma_source) for record in report.records} == {(estimate.sigma, "given")}
    assert all(record.noise is None for record in report.records)
    for name in ("a.png", "c.png"):
        alone = fastden.denoise(folder / name, estimate, model=network)
        np.testing.assert_array_equal(read_image(tmp_path / "out" / name).pixels, alone)
    done = read_image(tmp_path / "out" / "b.tif", several=True).pixels
    for page, own in zip(np.split(pages, 2), np.split(done, 2), strict=True):
        np.testing.assert_array_equal(own, fastden.denoise(page, estimate, model=network))
    again = fastden.BatchDenoiser(network, sigma=estimate).run(folder, tmp_path / "out", resume=True)
    assert len(again.skipped) == 3
    other = fastden.BatchDenoiser(network, sigma=replace(estimate, coarseness=0.9))
    assert len(other.run(folder, tmp_path / "out", resume=True).done) == 3


def test_an_estimate_of_strips_and_of_a_dry_run(photos: Path, tmp_path: Path, network: Any) -> None:
    batch = fastden.BatchDenoiser(network, sigma=ESTIMATE, workers=np.int64(2))
    assert (batch.workers, type(batch.workers)) == (2, int)
    target = tmp_path / "a.png"
    (step,) = rehearse(batch, plan([str(photos / "0.png")], target), target, manifest=None, resume=False).steps
    assert step.sigma == "sigma 13.5 (the mean of an estimate)"
    batch.run(photos / "0.png", tmp_path / "a.png")
    (record,) = streaming(batch).run(photos / "0.png", tmp_path / "b.png").records
    assert record.streamed
    np.testing.assert_array_equal(read_image(tmp_path / "a.png").pixels, read_image(tmp_path / "b.png").pixels)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
def test_gray_and_deep_images(tmp_path: Path, network: Any, dtype: Any) -> None:
    picture = ImageFile(pixels(channels=1, dtype=dtype), pixels(channels=0, dtype=dtype, seed=9))
    write_image(tmp_path / "a.tif", picture)
    fastden.BatchDenoiser(network, sigma=15).run(tmp_path / "a.tif", tmp_path / "b.tif")
    back = read_image(tmp_path / "b.tif")
    np.testing.assert_array_equal(back.pixels[:, :, 0], fastden.denoise(picture.pixels[:, :, 0], 15, model=network))
    np.testing.assert_array_equal(back.alpha, picture.alpha)


class OnTheSpot:
    """Replaces the copies to a device and back, and does both at once."""

    def __init__(self) -> None:
        self.batches: list[tuple[int, ...]] = []

    def pin(self, batch: torch.Tensor) -> torch.Tensor:
        return batch.clone()

    def fits(self, batch: torch.Tensor, limit: int) -> bool:
        return batch.shape[2] == 32

    def run(self, batch: torch.Tensor, compute: Any) -> Any:
        self.batches.append(tuple(batch.shape))
        result = compute(batch)
        fetched = type("Event", (), {"synchronize": lambda self: None, "elapsed_time": lambda self, other: 2000.0})()
        return Pending(result, batch, fetched, fetched, fetched)


def test_the_way_to_a_device_and_back(photos: Path, tmp_path: Path, network: Any) -> None:
    """Images that fit go to the device whole, the others tile by tile; the files are the same."""
    batch = fastden.BatchDenoiser(network, sigma=20)
    batch.run(photos, tmp_path / "host")
    transfer = OnTheSpot()
    batch.settings.transfer = transfer
    report = batch.run(photos, tmp_path / "device")
    assert report.failed == []
    assert sum(shape[0] for shape in transfer.batches) == 4
    assert {shape[1:] for shape in transfer.batches} == {(3, 32, 40)}
    assert outputs(tmp_path / "device") == outputs(tmp_path / "host")
    assert report.compute_seconds >= 2, "as the device's clock says"


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
def test_on_a_gpu(tmp_path: Path, dtype: Any) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    for index in range(5):
        size = (64, 80) if index < 3 else (700 + index, 900)
        write_image(folder / f"{index}.tif", ImageFile(pixels(*size, dtype=dtype, seed=index)))
    device = fastden.fuse(random_network(), torch.float32, "cuda")
    report = fastden.BatchDenoiser(device, sigma=20).run(folder, tmp_path / "out")
    assert report.failed == []
    for index in range(5):
        expected = fastden.denoise(read_image(folder / f"{index}.tif").pixels, 20, model=device)
        np.testing.assert_array_equal(read_image(tmp_path / "out" / f"{index}.tif").pixels, expected)
    assert 0 < report.compute_share <= 1


def test_a_file_that_changes_while_it_is_read(
    photos: Path, tmp_path: Path, network: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def meddle(path: Path, **options: Any) -> Any:
        image = read_image(path, **options)
        if path.name == "2.png":
            path.write_bytes(path.read_bytes() + b"\0")
        return image

    monkeypatch.setattr(reading, "read_image", meddle)
    report = fastden.BatchDenoiser(network, sigma=5).run(photos, tmp_path / "out")
    assert [record.error for record in report.failed] == [f"{photos / '2.png'}: changed while it was read"]
    assert sorted(outputs(tmp_path / "out")) == ["0.png", "1.png", "3.png", "wide.jpg"]


def test_an_error_of_libvips_that_is_not_text_concerns_its_file_alone(
    photos: Path, tmp_path: Path, network: Any
) -> None:
    """libvips' error quotes the damaged byte, which is no UTF-8."""
    good = encoded(Image.fromarray(pixels()), "AVIF", exif=exif(6))
    assert good.count(b"irot") == 1
    (photos / "2-damaged.avif").write_bytes(good.replace(b"irot", b"iro\x80"))
    report = fastden.BatchDenoiser(network, sigma=5).run(photos, tmp_path / "out")
    (failed,) = report.failed
    assert failed.error is not None
    assert failed.error.startswith(f"{photos / '2-damaged.avif'}: ")
    assert "iro\ufffd" in failed.error
    assert sorted(outputs(tmp_path / "out")) == ["0.png", "1.png", "2.png", "3.png", "wide.jpg"]


def test_progress_never_falls(tmp_path: Path, network: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also while images wait for being written, and where one ends while the next is computed."""
    folder = tmp_path / "in"
    folder.mkdir()
    for index in range(4):
        (folder / f"{index}.png").write_bytes(encoded(pixels(150, 170 + index, seed=index), "PNG"))
    write = Writing.write

    def slow(*arguments: Any) -> Any:
        time.sleep(0.05)
        return write(*arguments)

    monkeypatch.setattr(Writing, "write", slow)
    told: list[float] = []
    listener = Listener(progress=lambda ended, part: told.append(round(ended + part, 6)))
    report = fastden.BatchDenoiser(network, sigma=5, tile=40).run(folder, tmp_path / "out", listener=listener)
    assert len(report.done) == 4
    assert told == sorted(told)
    assert told[-1] == 4
    assert len(set(told)) > 8


def test_a_defect_is_shown_and_ends_the_run(
    photos: Path, tmp_path: Path, network: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for stage, name in ((Reading, "read"), (Computing, "compute"), (Writing, "write")):

        def broken(*arguments: Any, **options: Any) -> None:
            raise AssertionError("a defect")

        with monkeypatch.context() as patch:
            patch.setattr(stage, name, broken)
            with pytest.raises(AssertionError, match="a defect"):
                fastden.BatchDenoiser(network, sigma=5).run(photos, tmp_path / "out")
        assert not (tmp_path / "out").exists()


def test_interruption_finishes_what_is_computed(photos: Path, tmp_path: Path, network: Any) -> None:
    """Ctrl-C while the third image is computed leaves two whole files and nothing else."""
    batch = fastden.BatchDenoiser(network, sigma=5, tile=16)
    parts: list[float] = []

    def press(ended: int, part: float) -> None:
        parts.append(part)
        if len(parts) > 40:
            raise KeyboardInterrupt

    (photos / "00.png").write_bytes(encoded(pixels(300, 300), "PNG"))
    with pytest.raises(Interrupted) as caught:
        batch.run(photos, tmp_path / "out", listener=Listener(progress=press))
    report = caught.value.report
    assert report.left > 0
    assert report.left + len(report.records) == 6
    assert len(outputs(tmp_path / "out") if (tmp_path / "out").exists() else {}) == len(report.done)
    assert list(tmp_path.rglob("*.tmp")) == []


def test_a_second_signal_while_it_stops_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """SIGTERM raises SystemExit in the thread that waits for the files in work."""
    dropped: list[bool] = []

    def signal_again(seconds: float) -> bool:
        raise SystemExit(143)

    run = threads.ThreadedRun.__new__(threads.ThreadedRun)
    run.gate = Gate(1)
    waiting: Any = SimpleNamespace(picture=None, ended=SimpleNamespace(wait=signal_again))
    run.readers, run.writers, run.dropped = [waiting], [], False
    run.caller = threading.current_thread()
    monkeypatch.setattr(threads, "drop_unfinished", lambda of: dropped.append(run.caller in of))
    with pytest.raises(SystemExit):
        run._stop()
    assert run.dropped
    assert dropped == [True]


def test_extreme_shapes(tmp_path: Path, network: Any) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    for height, width in ((1, 1), (1, 100_000), (20_000, 1)):
        (folder / f"{height}x{width}.png").write_bytes(encoded(pixels(height, width), "PNG"))
    report = fastden.BatchDenoiser(network, strength=0).run(folder, tmp_path / "out")
    assert report.failed == []
    for path in folder.iterdir():
        np.testing.assert_array_equal(read_image(tmp_path / "out" / path.name).pixels, read_image(path).pixels)


def test_sigma_map(tmp_path: Path, network: Any) -> None:
    picture = pixels()
    levels = np.linspace(0, 60, 40, dtype=np.uint8)[None].repeat(32, 0)
    write_image(tmp_path / "a.png", ImageFile(picture))
    write_image(tmp_path / "map8.png", ImageFile(levels[:, :, None]))
    write_image(tmp_path / "map16.png", ImageFile(levels[:, :, None].astype(np.uint16) * 257))
    expected = fastden.denoise(picture, levels.astype(np.float32), model=network)
    for name in ("map8", "map16"):
        batch = fastden.BatchDenoiser(network, sigma_map=tmp_path / f"{name}.png")
        (record,) = batch.run(tmp_path / "a.png", tmp_path / f"{name}-out.png").records
        assert (record.sigma_source, record.sigma) == ("map", pytest.approx(levels.mean()))
        np.testing.assert_array_equal(read_image(tmp_path / f"{name}-out.png").pixels, expected)
    write_image(tmp_path / "small.png", ImageFile(levels[:8, :, None]))
    write_image(tmp_path / "colour.png", ImageFile(picture))
    for name, message in (("small", "is 40 x 8 pixels; accepted: 40 x 32"), ("colour", "has 3 channels; accepted: 1")):
        batch = fastden.BatchDenoiser(network, sigma_map=tmp_path / f"{name}.png")
        (record,) = batch.run(tmp_path / "a.png", tmp_path / "no.png").records
        assert record.error is not None
        assert message in record.error
        assert not (tmp_path / "no.png").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sigma": 300}, "sigma: 300; accepted"),
        ({"sigma": None}, "sigma: None; accepted: 'auto', a number from 0 to 255, or a NoiseEstimate"),
        ({"sigma": [25]}, r"sigma: \[25\]; accepted"),
        ({"sigma": np.array([25.0, 30.0])}, "sigma: ndarray; accepted"),
        ({"sigma_map": "missing.png"}, "sigma_map: missing.png: No such file"),
        ({"sigma": "much"}, "sigma: 'much'"),
        ({"sigma": 5, "sigma_map": "map.png"}, "sigma_map: given together with sigma=5"),
        ({"sigma": ESTIMATE, "sigma_map": "map.png"}, "sigma_map: given together with sigma=NoiseEstimate"),
        ({"strength": 3}, "strength: 3"),
        ({"workers": 0}, "workers: 0"),
        ({"workers": 1.5}, "workers: 1.5; accepted: None, or a whole number of at least 1"),
        ({"max_memory": "1k"}, r"max_memory: 1 KiB; accepted: at least \d\.\d+ MiB for"),
        ({"max_pixels": 0}, "max_pixels: 0"),
        ({"tile": 3}, "tile: 3"),
    ],
)
def test_wrong_options(network: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError, UserError), match=message):
        fastden.BatchDenoiser(network, **options)


@pytest.mark.parametrize("name", ["strength", "chroma"])
def test_a_blind_model_takes_no_strength_above_1(name: str) -> None:
    """It concerns all files: there is one error, before the first is read."""
    with pytest.raises(ValueError, match=rf"{name}: 1.5, but this model is blind .*; accepted: 0 to 1"):
        fastden.BatchDenoiser(random_network(noise_level_input=False), **{name: 1.5})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("inputs", "error", "message"),
    [
        ([], UserError, "input: none; accepted: one or several files, folders and glob patterns"),
        (3, TypeError, "inputs: int; accepted: a path or glob pattern, or several"),
        ([None], TypeError, "inputs: NoneType; accepted: a path or"),
        (b"a.png", TypeError, "inputs: int; accepted"),
    ],
)
def test_wrong_inputs(network: Any, tmp_path: Path, inputs: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        fastden.BatchDenoiser(network).run(inputs, tmp_path / "out")


@pytest.mark.parametrize("name", ["jpg", "tif", "PNG", "bmp", ""])
def test_a_format_that_cannot_be_written(photos: Path, tmp_path: Path, network: Any, name: Any) -> None:
    message = f"format: '{name}'; accepted: jpeg, png, tiff, webp, avif, heic"
    with pytest.raises(ValueError, match=message):
        fastden.BatchDenoiser(network).run(photos, tmp_path / "out", format=name)
    for output in (str(tmp_path / "out"), "memory://out"):
        with pytest.raises(ValueError, match=message):
            plan_rows([str(photos)], output, format_name=name)
    assert not (tmp_path / "out").exists()


def test_resume_without_a_manifest(photos: Path, tmp_path: Path, network: Any) -> None:
    with pytest.raises(UserError, match="resume: there is no manifest"):
        fastden.BatchDenoiser(network).run(photos / "0.png", tmp_path / "out.png", resume=True)


@pytest.mark.parametrize("streamed", [False, True])
def test_images_of_more_than_8_bits_go_through_their_own_network(
    tmp_path: Path, network: Any, monkeypatch: pytest.MonkeyPatch, streamed: bool
) -> None:
    """8-bit images may use bfloat16, all others keep float32: single, grouped, streamed and with several pages."""
    folder = tmp_path / "in"
    folder.mkdir()
    for dtype in (np.uint8, np.uint16, np.float32):
        for index in range(2):
            write_image(folder / f"{np.dtype(dtype).name}-{index}.tif", ImageFile(pixels(dtype=dtype, seed=index)))
    write_image(folder / "uint16-2.tif", ImageFile(pixels(dtype=np.uint16), pages=2))
    marked = {True: copy.copy(network), False: network}
    seen: dict[str, set[bool]] = {}
    monkeypatch.setattr("fastden.batch.settings.load_network", lambda *_, eight_bit, **others: marked[eight_bit])

    def watched(images: list[Any], level: Any, chosen: Any, **options: Any) -> list[Any]:
        seen.setdefault(images[0].dtype.name, set()).add(chosen is marked[True])
        return fastden.inference.run.denoise_batch(images, level, chosen, **options)

    def strips(chosen: Any, reader: Any, *rest: Any, **options: Any) -> float:
        seen.setdefault(reader.header.dtype.name, set()).add(chosen is marked[True])
        return denoise_strips(chosen, reader, *rest, **options)

    monkeypatch.setattr("fastden.batch.computing.denoise_batch", watched)
    monkeypatch.setattr("fastden.batch.stages.denoise_strips", strips)
    batch = fastden.BatchDenoiser(network, sigma=20)
    if streamed:
        (folder / "uint16-2.tif").unlink()
        streaming(batch)
    assert batch.run(folder, tmp_path / "out").failed == []
    assert seen == {"uint8": {True}, "uint16": {False}, "float32": {False}}


def test_a_file_that_cannot_be_looked_at_is_reported_and_skipped(
    photos: Path, tmp_path: Path, network: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    cannot_be_looked_at(photos / "1.png", monkeypatch)
    report = fastden.BatchDenoiser(network, sigma=5).run(photos, tmp_path / "out")
    assert (len(report.done), report.failed) == (4, [])
    assert [error.filename for error in report.unreadable] == [str(photos / "1.png")]


def test_numbers_of_numpy_and_torch(photos: Path, tmp_path: Path, network: Any) -> None:
    plain = fastden.BatchDenoiser(network, sigma=15, strength=0.5).run(photos, tmp_path / "plain")
    for name, sigma in (("float32", np.float32(15)), ("int64", np.int64(15)), ("torch", torch.tensor(15.0))):
        report = fastden.BatchDenoiser(network, sigma=sigma, strength=np.float32(0.5)).run(photos, tmp_path / name)
        assert report.failed == []
        assert len(report.done) == len(plain.done)
        assert outputs(tmp_path / name) == outputs(tmp_path / "plain")


def test_a_blind_model_takes_no_estimate() -> None:
    with pytest.raises(ValueError, match="sigma: a NoiseEstimate, but this model is blind"):
        fastden.BatchDenoiser(random_network(noise_level_input=False), sigma=ESTIMATE)
