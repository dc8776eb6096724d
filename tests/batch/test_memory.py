"""Memory of a batch: what is in hand, what encoders take, tiles where a device has too little, a full disk."""

from __future__ import annotations

import gc
import os
import resource
import subprocess
import sys
import threading
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fastden
from fastden.batch.memory import Gate, Stopped, split_memory
from fastden.batch.plan import Job
from fastden.batch.report import Listener
from fastden.errors import shown_bytes
from fastden.images.codec import ImageFile, read_image, write_image
from fastden.images.decoding import decoding_memory
from fastden.images.strips import StripWriter, read_header
from fastden.inference.tiling import least_memory
from tests.batch.conftest import Greedy, outputs
from tests.helpers import streaming
from tests.image_files import encoded, pixels


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


@pytest.mark.parametrize(
    ("suffix", "options", "factor"),
    [("avif", {}, 7), ("webp", {"lossless": True}, 3.6), ("jxl", {}, 3.6)],
)
def test_what_a_decoder_takes_is_claimed(
    tmp_path: Path, network: Any, suffix: str, options: dict[str, Any], factor: float
) -> None:
    """What does not fit for that alone is not streamed, which would take no less: it goes through whole, and alone."""
    if suffix == "jxl":
        pytest.importorskip("pillow_jxl", reason="pillow-jxl-plugin is not installed")
    image = np.full((600, 700, 3), 120, np.uint8)
    for name in "ab":
        (tmp_path / f"{name}.{suffix}").write_bytes(encoded(image, suffix.upper(), **options))
    batch = fastden.BatchDenoiser(network, sigma=5, max_memory="12MiB")
    source = tmp_path / f"a.{suffix}"
    picture = batch.stages.reading.look(Job(source, tmp_path / "a.tif"))
    assert picture.size == int(factor * image.nbytes) + 2 * source.stat().st_size
    assert not picture.streamed
    if suffix == "avif":
        assert picture.size > batch.settings.budget.images
        report = batch.run(tmp_path, tmp_path / "out", format="tiff")
        assert [record.streamed for record in report.done] == [False, False]


@pytest.mark.parametrize(("progressive", "factor"), [(False, 1.0), (True, 2.4)])
def test_what_the_decoder_of_a_progressive_jpeg_takes(tmp_path: Path, progressive: bool, factor: float) -> None:
    image = pixels(80, 90)
    (tmp_path / "a.jpg").write_bytes(encoded(image, "JPEG", progressive=progressive))
    assert decoding_memory(read_header(tmp_path / "a.jpg")) == int(factor * image.nbytes)


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


@pytest.mark.parametrize("count", [1, 3])
def test_images_that_cannot_be_computed_give_their_memory_back(
    tmp_path: Path, network: Any, monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    """Else a run of many failures would wait for memory that nobody holds."""
    for index in range(count):
        (tmp_path / f"{index}.png").write_bytes(encoded(pixels(seed=index), "PNG"))
    batch, gates = fastden.BatchDenoiser(network, sigma=5), set()
    take = Gate.take

    def watched(self: Gate, size: int) -> None:
        gates.add(self)
        take(self, size)

    def failing(*_: Any) -> None:
        raise RuntimeError("no result")

    monkeypatch.setattr(Gate, "take", watched)
    monkeypatch.setattr(batch.stages.computing, "compute", failing)
    report = batch.run(tmp_path, tmp_path / "out")
    assert [record.error for record in report.failed] == ["no result"] * count
    assert [gate.taken for gate in gates] == [0]


@pytest.mark.parametrize("fails", [False, True])
def test_pixels_are_gone_when_their_memory_is_given_back(
    tmp_path: Path, network: Any, monkeypatch: pytest.MonkeyPatch, fails: bool
) -> None:
    """The limit admits one image at a time: at that moment those before it must be gone."""
    folder = tmp_path / "in"
    folder.mkdir()
    for index in range(4):
        write_image(folder / f"{index}.tif", ImageFile(pixels(600, 900, seed=index)))
    batch = fastden.BatchDenoiser(network, sigma=5, max_memory="12MiB")
    claimed = batch.stages.reading.open(Job(folder / "0.tif", tmp_path / "0.tif"))
    assert not claimed.streamed
    assert 2 * claimed.size > batch.settings.budget.images
    ended: list[weakref.ref[Any]] = []
    alive: list[int] = []
    take = Gate.take

    def watched(self: Gate, size: int) -> None:
        take(self, size)
        alive.append(sum(pixels() is not None for pixels in ended))

    def compute(pictures: list[Any], _progress: Any) -> None:
        ended.extend(weakref.ref(picture.image.pixels) for picture in pictures)
        if fails:
            raise RuntimeError("no result")
        for picture in pictures:
            picture.image = replace(picture.image, pixels=picture.image.pixels.copy())
            ended.append(weakref.ref(picture.image.pixels))

    monkeypatch.setattr(Gate, "take", watched)
    monkeypatch.setattr(batch.stages.computing, "compute", compute)
    report = batch.run(folder, tmp_path / "out")
    assert (len(report.done), len(report.failed)) == ((0, 4) if fails else (4, 0))
    assert alive == [0, 0, 0, 0]


def given_back(monkeypatch: pytest.MonkeyPatch, held: list[weakref.ref[Any]]) -> list[int]:
    """How many of ``held`` are alive whenever a claim is given back."""
    alive: list[int] = []
    give_back = Gate.give_back

    def watched(self: Gate, size: int) -> None:
        alive.append(sum(one() is not None for one in held))
        give_back(self, size)

    monkeypatch.setattr(Gate, "give_back", watched)
    return alive


@pytest.mark.parametrize("alone", [False, True])
def test_an_error_of_reading_lets_go_of_the_pixels(
    tmp_path: Path, network: Any, monkeypatch: pytest.MonkeyPatch, alone: bool
) -> None:
    """An exception knows the calls that it came through, and they know the pixels."""
    held: list[weakref.ref[Any]] = []

    def failing(_asked: Any, _network: Any, pages: list[Any], *_: Any) -> Any:
        held.append(weakref.ref(pages[0].base))
        try:
            raise LookupError("cause")
        except LookupError as error:
            raise RuntimeError("no level") from error

    write_image(tmp_path / "a.png", ImageFile(pixels()))
    monkeypatch.setattr("fastden.batch.reading.noise_level_of", failing)
    batch = fastden.BatchDenoiser(network, sigma=5)
    alive = given_back(monkeypatch, held)
    if alone:
        assert batch.one(Job(tmp_path / "a.png", tmp_path / "b.png")).error == "no level"
    else:
        assert batch.run(tmp_path / "a.png", tmp_path / "b.png").failed[0].error == "no level"
    assert (len(held), alive) == (1, [0])


@pytest.mark.parametrize("alone", [False, True])
def test_pixels_of_one_are_gone_too(tmp_path: Path, network: Any, monkeypatch: pytest.MonkeyPatch, alone: bool) -> None:
    held: list[weakref.ref[Any]] = []
    write_image(tmp_path / "a.png", ImageFile(pixels()))
    batch = fastden.BatchDenoiser(network, sigma=5)
    write = batch.stages.writing.write

    def watched(picture: Any, *rest: Any) -> Any:
        held.append(weakref.ref(picture.image.pixels))
        return write(picture, *rest)

    monkeypatch.setattr(batch.stages.writing, "write", watched)
    alive = given_back(monkeypatch, held)
    if alone:
        batch.one(Job(tmp_path / "a.png", tmp_path / "b.png"))
    else:
        batch.run(tmp_path / "a.png", tmp_path / "b.png")
    assert (len(held), alive) == (1, [0])


def test_an_encoder_that_fails_lets_go_of_the_strips(
    tmp_path: Path, network: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The writer keeps its error, and the error the writer: without help both wait for the garbage collector."""
    held: list[weakref.ref[Any]] = []
    write = StripWriter.write

    def watched(self: StripWriter, rows: Any) -> None:
        held.append(weakref.ref(rows))
        write(self, rows)

    def refused(*_: Any, **__: Any) -> Any:
        raise RuntimeError("no encoder")

    write_image(tmp_path / "a.tif", ImageFile(pixels(300, 200)))
    monkeypatch.setattr(StripWriter, "write", watched)
    monkeypatch.setattr("fastden.images.strips.described", refused)
    batch = streaming(fastden.BatchDenoiser(network, sigma=5, tile=64))
    alive = given_back(monkeypatch, held)
    gc.disable()
    try:
        assert batch.run(tmp_path / "a.tif", tmp_path / "b.tif").failed[0].error == "no encoder"
    finally:
        gc.enable()
    assert held
    assert alive == [0]


def test_images_of_a_group_do_not_hold_each_other(tmp_path: Path, network: Any) -> None:
    """The claim of each is given back when it is written."""
    for index in range(3):
        write_image(tmp_path / f"{index}.png", ImageFile(pixels(seed=index)))
    batch = fastden.BatchDenoiser(network, sigma=5)
    gate = Gate(1 << 30)
    group = [batch.stages.read(Job(tmp_path / f"{i}.png", tmp_path / f"{i}.tif"), gate) for i in range(3)]
    batch.stages.computing.compute(group)
    for picture in group:
        assert picture.image is not None
        assert picture.image.pixels.base is None  # no view of what the others are views of


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
