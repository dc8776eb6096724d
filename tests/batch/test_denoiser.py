"""``fastden.BatchDenoiser``: the results of one image at a time, whatever overlaps, fails or is interrupted."""

from __future__ import annotations

import copy
import gc
import os
import pickle
import resource
import subprocess
import sys
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import fastden
from fastden.batch import reading, threads
from fastden.batch.computing import Computing
from fastden.batch.dry_run import rehearse
from fastden.batch.grouping import Equality, together
from fastden.batch.memory import Gate, Stopped, split_memory
from fastden.batch.plan import Job, plan
from fastden.batch.ray import plan_rows
from fastden.batch.reading import Reading
from fastden.batch.report import Interrupted, Listener
from fastden.batch.streaming import denoise_strips
from fastden.batch.threads import ThreadedRun
from fastden.batch.transfer import Pending
from fastden.batch.writing import Writing
from fastden.errors import UserError, shown_bytes
from fastden.images.codec import ImageFile, read_image, write_image
from fastden.inference.tiling import least_memory
from tests.batch.conftest import Greedy
from tests.helpers import random_network, streaming
from tests.image_files import cannot_be_looked_at, encoded, pixels


def outputs(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if not path.name.startswith(".")}


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


def test_small_images_go_together(photos: Path, tmp_path: Path, network: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """If the reader is far ahead, all images of one size make one pass, and their files keep their bytes."""
    sizes: list[int] = []
    compute = Computing.compute
    ready = threading.Event()
    monkeypatch.setattr(
        Computing, "compute", lambda self, works, progress: sizes.append(len(works)) or compute(self, works)
    )
    limit = Computing.group_limit
    monkeypatch.setattr(Computing, "group_limit", lambda self, work: ready.wait(30) and limit(self, work))
    read = Reading.read

    def count(self: Any, work: Any) -> None:
        read(self, work)
        if work.job.source.name == "wide.jpg":
            threading.Timer(0.3, ready.set).start()

    monkeypatch.setattr(Reading, "read", count)
    fastden.BatchDenoiser(network, sigma=20).run(photos, tmp_path / "out")
    assert sizes == [4, 1]
    for index in range(4):
        expected = fastden.denoise(photos / f"{index}.png", 20, model=network)
        np.testing.assert_array_equal(read_image(tmp_path / "out" / f"{index}.png").pixels, expected)


def test_bright_values_are_judged_alike_alone_and_in_groups(tmp_path: Path, network: Any) -> None:
    """A value of 2 is noise of an unknown level, but none of sigma 5."""
    folder, generator = tmp_path / "in", np.random.default_rng(0)
    folder.mkdir()
    for name in ("a", "b"):
        bright = (0.5 + 5 / 255 * generator.standard_normal((40, 40, 3))).astype(np.float32)
        bright[20, 20], bright[5:7, 30:32] = 2.0, 1.6
        write_image(folder / f"{name}.tif", ImageFile(bright))
    stages = fastden.BatchDenoiser(network, sigma=5).stages
    works = [stages.reading.look(Job(path, tmp_path / path.name)) for path in sorted(folder.iterdir())]
    for work in works:
        stages.reading.read(work)
    assert not stages.computing.alike(*works)
    assert stages.computing.group_limit(works[0]) == 1
    assert fastden.BatchDenoiser(network, sigma=5).run(folder, tmp_path / "out").failed == []
    for path in sorted(folder.iterdir()):
        expected = fastden.denoise(read_image(path).pixels, 5, model=network)
        np.testing.assert_array_equal(read_image(tmp_path / "out" / path.name).pixels, expected)
        tensor = torch.from_numpy(read_image(path).pixels).permute(2, 0, 1)
        for batch in (tensor, torch.stack([tensor, tensor / 2])):
            other = fastden.denoise(batch, 5, model=network).reshape(-1, 3, 40, 40)[0].permute(1, 2, 0).numpy()
            np.testing.assert_allclose(other, expected, atol=3e-6, rtol=0)


def test_batches_that_change_bits_are_not_used(real: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    images = [pixels(seed=index) for index in range(3)]
    levels = torch.tensor([0.1, 0.2, 0.3])
    assert Equality().holds(real, images, levels, 1 << 28)
    exact = fastden.batch.grouping.denoise_batch

    def other_order(images: list[Any], level: Any, network: Any, **options: Any) -> list[Any]:
        results = exact(images, level, network, **options)
        return [result + np.float32(1e-6) * (len(images) > 1) for result in results]

    monkeypatch.setattr("fastden.batch.grouping.denoise_batch", other_order)
    assert not Equality().holds(real, images, levels, 1 << 28)


def test_how_many_go_together(network: Any) -> None:
    assert together(network, 32, 40, 1 << 30) == 16
    assert together(network, 200, 200, 1 << 30) == 2
    assert together(network, 400, 400, 1 << 30) == 1
    assert together(network, 32, 40, 2 * least_memory(network)) == 1


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
def test_gray_and_deep_images(tmp_path: Path, network: Any, dtype: Any) -> None:
    picture = ImageFile(pixels(channels=1, dtype=dtype), pixels(channels=0, dtype=dtype, seed=9))
    write_image(tmp_path / "a.tif", picture)
    fastden.BatchDenoiser(network, sigma=15).run(tmp_path / "a.tif", tmp_path / "b.tif")
    back = read_image(tmp_path / "b.tif")
    np.testing.assert_array_equal(back.pixels[:, :, 0], fastden.denoise(picture.pixels[:, :, 0], 15, model=network))
    np.testing.assert_array_equal(back.alpha, picture.alpha)


def test_memory_bounds_the_images_in_hand(
    photos: Path, tmp_path: Path, network: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half of the limit holds two images, so at most two are between reading and writing."""
    for path in photos.iterdir():
        path.unlink()
    for index in range(8):
        (photos / f"{index}.png").write_bytes(encoded(pixels(400, 600, seed=index), "PNG"))
    batch = fastden.BatchDenoiser(network, sigma=5, strength=0.5, max_memory="12MiB")
    work = batch.stages.reading.open(Job(photos / "0.png", tmp_path / "0.png"))
    assert not work.streamed
    assert 2 * work.size <= batch.settings.budget.images < 3 * work.size
    highest = 0
    take = Gate.take

    def watched(self: Gate, size: int) -> None:
        nonlocal highest
        take(self, size)
        highest = max(highest, self.taken)

    monkeypatch.setattr(Gate, "take", watched)
    monkeypatch.setattr("fastden.inference.run.denoise_tiled", lambda network, batch, *_, **__: batch)
    assert len(batch.run(photos, tmp_path / "out").done) == 8
    assert highest <= batch.settings.budget.images


@pytest.mark.parametrize(("suffix", "claimed"), [("jpg", 0.5 + 0.5 * 4.5), ("webp", 0.5 + 0.5 * 14), ("avif", 20)])
def test_what_an_encoder_takes_is_claimed(tmp_path: Path, network: Any, suffix: str, claimed: float) -> None:
    """Beside the image: a copy in the file's depth, and the encoder's memory. What does not fit goes through alone."""
    image = np.full((300, 400, 3), 30_000, np.uint16)
    for name in "ab":
        write_image(tmp_path / f"{name}.png", ImageFile(image))
    batch = fastden.BatchDenoiser(network, sigma=5, max_memory="12MiB")
    picture = batch.stages.reading.look(Job(tmp_path / "a.png", tmp_path / f"out.{suffix}"))
    assert (picture.size, picture.streamed) == (int((1 + claimed) * image.nbytes), False)
    if suffix == "webp":
        assert picture.size > batch.settings.budget.images / 2
        report = batch.run(tmp_path, tmp_path / "out", format="webp")
        assert [record.streamed for record in report.done] == [False, False]


def test_gate() -> None:
    gate = Gate(10)
    gate.take(8)
    admitted: list[str] = []

    def wait() -> None:
        try:
            gate.take(100)  # an image that is alone always fits
            admitted.append("in")
            gate.take(1)
        except Stopped:
            admitted.append("stopped")

    thread = threading.Thread(target=wait)
    thread.start()
    assert admitted == []
    gate.give_back(8)
    gate_closer = threading.Timer(0.2, gate.close)
    gate_closer.start()
    thread.join(10)
    assert admitted == ["in", "stopped"]


def test_memory_is_split(network: Any) -> None:
    assert split_memory(1 << 30, network).images == split_memory(1 << 30, network).network == 1 << 29
    with pytest.raises(ValueError, match=f"accepted: at least {shown_bytes(2 * least_memory(network))} for"):
        split_memory(2 * least_memory(network) - 1, network)
    split_memory(2 * least_memory(network), network)


def test_out_of_device_memory_halves_the_tile_and_is_said_once(tmp_path: Path, network: Any) -> None:
    greedy = Greedy(fastden.Denoiser().eval()).float()
    folder = tmp_path / "in"
    folder.mkdir()
    for index in range(2):
        (folder / f"{index}.png").write_bytes(encoded(pixels(150, 170, seed=index), "PNG"))
    notes: list[str] = []
    batch = fastden.BatchDenoiser(greedy, sigma=20)
    assert batch.run(folder, tmp_path / "out", listener=Listener(note=notes.append)).failed == []
    assert notes == ["out of memory on cpu: going on in tiles of 84 pixels or less"]
    for index in range(2):
        expected = fastden.denoise(folder / f"{index}.png", 20, model=network, tile=40).astype(int)
        result = read_image(tmp_path / "out" / f"{index}.png").pixels.astype(int)
        assert np.abs(result - expected).max() <= 1
    greedy.largest = 50
    report = batch.run(folder, tmp_path / "none")
    assert [record.error for record in report.failed] == [
        "out of memory; a smaller --max-memory or --tile needs less"
    ] * 2
    assert not (tmp_path / "none").exists()


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
        ({"sigma": None}, "sigma: NoneType; accepted: 'auto', or 0 to 255"),
        ({"sigma": [25]}, "sigma: list; accepted"),
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


def test_threads_that_share_one_object_wait_for_each_other(
    photos: Path, tmp_path: Path, network: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    going: list[int] = []
    most: list[int] = []
    every = ThreadedRun.all

    def watched(self: ThreadedRun) -> Any:
        going.append(1)
        most.append(len(going))
        time.sleep(0.2)
        try:
            return every(self)
        finally:
            going.pop()

    planned: list[int] = []
    monkeypatch.setattr(
        "fastden.batch.denoiser.plan", lambda *given, **options: planned.append(len(going)) or plan(*given, **options)
    )
    monkeypatch.setattr(ThreadedRun, "all", watched)
    batch = fastden.BatchDenoiser(network, sigma=5)
    heard: dict[str, list[str]] = {"a": [], "b": []}

    def run(name: str) -> Any:
        listener = Listener(record=lambda job, record: heard[name].append(job.target.parent.name))
        return batch.run(photos, tmp_path / name, listener=listener)

    with ThreadPoolExecutor(2) as pool:
        assert [len(report.done) for report in pool.map(run, heard)] == [5, 5]
    assert most == [1, 1]
    assert planned == [0, 0]  # what the other run writes is there when the files are looked for
    assert heard == {"a": ["a"] * 5, "b": ["b"] * 5}


def test_a_run_that_its_own_listener_starts_is_refused(photos: Path, tmp_path: Path, network: Any) -> None:
    """It would wait for itself: in the thread that computes, and in those that read and write."""
    batch = fastden.BatchDenoiser(network, sigma=5)
    refused: list[str] = []

    def again(*_: Any) -> None:
        try:
            batch.run(photos / "0.png", tmp_path / "again.png")
        except RuntimeError as error:
            refused.append(f"{threading.current_thread().name}: {error}")

    (photos / "bad.png").write_bytes(b"no image")
    assert len(batch.run(photos, tmp_path / "out", listener=Listener(record=again, progress=again)).done) == 5
    assert {text.split(": ", 1)[1] for text in refused} == {
        "run: called by its own listener; accepted: when it has ended, or another BatchDenoiser"
    }
    assert {text.split(":")[0] for text in refused} == {threading.main_thread().name, "fastden-read", "fastden-write"}
    assert not (tmp_path / "again.png").exists()


def test_the_listener_is_not_kept(photos: Path, tmp_path: Path, network: Any) -> None:
    class Window:
        def show(self, text: str) -> None:
            pass

    window = Window()
    seen = weakref.ref(window)
    batch = fastden.BatchDenoiser(network, sigma=5)
    batch.run(photos, tmp_path / "out", listener=Listener(note=window.show))
    del window
    gc.collect()
    assert seen() is None


@pytest.mark.parametrize("named", [False, True])
def test_copies_and_pickles_denoise(photos: Path, tmp_path: Path, real: Any, named: bool) -> None:
    import cloudpickle

    model = "color" if named else real
    batch = fastden.BatchDenoiser(model, sigma=15, strength=0.5, overwrite=True, max_memory="400M")
    batch.run(photos, tmp_path / "out")
    expected = outputs(tmp_path / "out")
    copies = [copy.copy(batch), copy.deepcopy(batch)]
    copies += [module.loads(module.dumps(batch)) for module in (pickle, cloudpickle)]
    for other in copies:
        assert other.settings.budget == batch.settings.budget
        assert other.run(photos, tmp_path / "out").failed == []
        assert outputs(tmp_path / "out") == expected


def test_resume_without_a_manifest(photos: Path, tmp_path: Path, network: Any) -> None:
    with pytest.raises(UserError, match="resume: there is no manifest"):
        fastden.BatchDenoiser(network).run(photos / "0.png", tmp_path / "out.png", resume=True)


LIMITED = """
import resource, sys
from fastden import BatchDenoiser
resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))
report = BatchDenoiser(sys.argv[1], sigma=0, strength=0).run(sys.argv[2], sys.argv[3])
for record in report.failed:
    print(record.error)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no limits of file sizes")
def test_a_disk_that_fills_up(tmp_path: Path, root: Path) -> None:
    """A limit of file sizes stands for the full disk: the system refuses to write on, in the middle of a file."""
    from tests.image_files import save_model

    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "a.png").write_bytes(encoded(pixels(), "PNG"))
    (folder / "big.png").write_bytes(encoded(pixels(100, 100), "PNG"))
    model = save_model(tmp_path / "model")
    command = [sys.executable, "-c", LIMITED, str(model), str(folder), str(tmp_path / "out")]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    assert done.stdout == f"{tmp_path / 'out' / 'big.png'}: cannot be written: {os.strerror(27)}\n"
    assert sorted(outputs(tmp_path / "out")) == ["a.png"]
    assert list(tmp_path.rglob("*.tmp")) == []
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] != 20000


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
