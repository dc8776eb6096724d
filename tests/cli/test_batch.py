"""``fastden denoise`` with a manifest, resumed, rehearsed, interrupted, and folders that are not as they should be."""

from __future__ import annotations

import errno
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import PngImagePlugin
from typer.testing import CliRunner

import fastden
from fastden.batch import dry_run
from fastden.batch.manifest import NAME
from fastden.batch.plan import plan
from fastden.batch.report import Interrupted, Report
from fastden.cli.main import app
from fastden.images.codec import ImageFile, read_image, write_image
from tests.cli.run import fails, outputs, works
from tests.image_files import cannot_be_looked_at, encoded, pixels, save_model


def test_resume(photos: Path, tmp_path: Path, model: str) -> None:
    rest = ["-o", tmp_path / "out", "--model", model, "--sigma", 9, "--resume"]
    assert works("denoise", photos, *rest).count(" -> ") == 2
    (tmp_path / "out" / "a.png").unlink()
    text = works("denoise", photos, *rest)
    assert text.count(" -> ") == 1
    assert re.search(r"done before.*\n.*\n. *1 *. *1 *. *0 *. *0 ", text), text
    records = [json.loads(line) for line in (tmp_path / "out" / NAME).read_text().splitlines()]
    assert [record["status"] for record in records].count("done") == 3


def test_a_pattern_that_names_the_output_folder_too(photos: Path, tmp_path: Path, model: str) -> None:
    """The shell's ``photos/*`` has the output folder in it from the second run on."""
    inputs, output = [photos / "a.png", photos / "b.jpg"], photos / "clean"
    rest = ["-o", output, "--model", model, "--sigma", 9, "--resume"]
    works("denoise", *inputs, *rest)
    (output / "a.png").unlink()
    text = works("denoise", *inputs, output, *rest)
    assert text.count(" -> ") == 1
    assert re.search(r"done before.*\n.*\n. *1 *. *1 *. *0 *. *0 ", text), text
    (output / "a.png").unlink()
    (output / "b.jpg").unlink()
    assert works("denoise", *inputs, output, *rest).count(" -> ") == 2
    fails("denoise", output, *rest, saying="all images in .*clean are results of earlier runs")


def test_manifest_options(photos: Path, tmp_path: Path, model: str) -> None:
    works("denoise", photos, "-o", tmp_path / "a", "--model", model, "--manifest", "none")
    assert sorted(os.listdir(tmp_path / "a")) == ["a.png", "b.jpg"]
    works("denoise", photos, "-o", tmp_path / "b", "--model", model, "--manifest", tmp_path / "record.jsonl")
    assert len((tmp_path / "record.jsonl").read_text().splitlines()) == 4
    fails(
        "denoise",
        photos / "a.png",
        "-o",
        tmp_path / "a.png",
        "--model",
        model,
        "--resume",
        saying="error: resume: there",
    )


def test_dry_run_writes_nothing(photos: Path, tmp_path: Path, model: str) -> None:
    output = tmp_path / "out"
    text = works("denoise", photos, "-o", output, "--model", model, "--dry-run")
    assert f"{photos / 'a.png'} -> {output / 'a.png'}, 40 x 32, sigma to be estimated\n" in text
    expected = r"would denoise 2 images, 0\.00 megapixels: about \S+ s at [\d.]+ MP/s, measured now; at most [\d.]+ GiB"
    assert re.search(expected, text)
    assert not output.exists()
    works("denoise", photos / "a.png", "-o", tmp_path / "a.png", "--model", model, "--dry-run", "--sigma", 5)
    works("denoise", photos, "-o", output, "--model", model)
    (photos / "bad.png").write_bytes(b"no image")
    rest = ["-o", output, "--model", model, "--dry-run"]
    error = fails("denoise", photos, *rest, saying="a.png: exists already")
    assert f"error: {photos / 'bad.png'}: not an image in a known format; accepted: JPEG" in error
    done = CliRunner().invoke(app, ["denoise", str(photos), *map(str, rest), "--resume"])
    assert done.exit_code == 1
    assert f"{output / 'a.png'}: done before" in done.stdout
    if os.path.exists("/dev/fd"):
        reading, writing = os.pipe()
        pipe, said = f"/dev/fd/{reading}", "no regular file; only a run reads it"
        fails("denoise", pipe, *rest[2:], "-o", tmp_path / "b.png", saying=said)
        os.close(reading)
        os.close(writing)
    assert sorted(os.listdir(output)) == [NAME, "a.png", "b.jpg"]


@pytest.mark.parametrize(
    ("arguments", "saying"),
    [
        (["a.png", "-o", "b.jpg/out.png"], "output: cannot make the folder b.jpg: b.jpg is a file"),
        (["a.png", "-o", "b.jpg"], "b.jpg: exists already; accepted"),
        (["long.png", "-o", "out.webp"], "long.png: 16384 x 8 pixels; accepted: at most 16383 pixels a side in webp"),
        (["long.png", "-o", "out", "--format", "webp"], "long.png: 16384 x 8 pixels; accepted: at most 16383 pixels"),
        (["../photos", "-r", "-o", "a.png/out"], "output: cannot make the folder a.png.out: a.png is a file"),
        (["a.png", "-o", "out.png", "--sigma-map", "small.png"], "sigma_map: small.png is 8 x 8 pixels; accepted: 40"),
        (["a.png", "-o", "out.png", "--sigma-map", "b.jpg"], "sigma_map: b.jpg has 3 channels; accepted: 1"),
        (["a.png", "-o", "out.png", "--model", "gray"], "image: 3 channels, but the model is for gray images"),
        (["linear.png", "-o", "out.jpg"], "values have their own gamma or primaries .gAMA.*, which jpeg would not say"),
        (["a.png", "-o", "out.png", "--resume"], "resume: there is no manifest to resume from"),
        (["wide.tif", "-o", "out.tif", "--max-memory", "40M", "--tile", "auto"], "max_memory: strips of 400000 pixels"),
        (["wide.tif", "-o", "out.heic", "--max-memory", "40M"], "is larger than --max-memory, and heic is not written"),
    ],
)
def test_a_rehearsal_refuses_what_the_run_refuses(
    photos: Path, model: str, arguments: list[str], saying: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The messages are the same, and neither writes anything."""
    save_model(photos / "gray", image_channels=1)
    gamma = PngImagePlugin.PngInfo()
    gamma.add(b"gAMA", (100_000).to_bytes(4, "big"))
    (photos / "linear.png").write_bytes(encoded(pixels(), "PNG", pnginfo=gamma))
    write_image(photos / "small.png", ImageFile(np.full((8, 8, 1), 30, np.uint8)))
    write_image(photos / "long.png", ImageFile(np.zeros((8, 16_384, 3), np.uint8)))
    write_image(photos / "wide.tif", ImageFile(np.zeros((20, 400_000, 3), np.uint8)))
    monkeypatch.chdir(photos)
    before = sorted(photos.rglob("*"))
    arguments = ["denoise", *arguments, *([] if "--model" in arguments else ["--model", model])]
    refused = [fails(*arguments, *how, saying=saying).splitlines() for how in ([], ["--dry-run"])]
    assert [line for line in refused[0] if "files failed" not in line] == refused[1]
    assert sorted(photos.rglob("*")) == before


def test_strength_and_sigma_map(photos: Path, tmp_path: Path, model: str) -> None:
    image = pixels(seed=1).astype(np.float32) / 255
    write_image(tmp_path / "noisy.tif", ImageFile(image))
    write_image(tmp_path / "map.png", ImageFile(np.full((32, 40, 1), 30, np.uint8)))
    for name, rest in (
        ("full", ["--sigma", 30]),
        ("map", ["--sigma-map", tmp_path / "map.png"]),
        ("half", ["--sigma", 30, "--strength", 0.25]),
        ("less", ["--sigma", 7.5]),
    ):
        works("denoise", tmp_path / "noisy.tif", "-o", tmp_path / f"{name}.tif", "--model", model, *rest)
    names = ("full", "map", "half", "less")
    full, same, half, less = (read_image(tmp_path / f"{name}.tif").pixels for name in names)
    np.testing.assert_allclose(same, full, atol=1e-6)
    np.testing.assert_allclose(half, less, atol=1e-6)
    rest = ["-o", tmp_path / "no.tif", "--model", model, "--sigma-map", tmp_path / "map.png"]
    fails("denoise", tmp_path / "noisy.tif", *rest, "--sigma", 5, saying="sigma_map: given together with sigma=5")
    fails("denoise", photos / "a.png", *rest[:-1], tmp_path / "missing.png", saying="missing.png: No such file")


@pytest.mark.usefixtures("unreadable_inner")
@pytest.mark.parametrize("pattern", [None, "**/[abc].*"])
def test_an_unreadable_folder_is_reported_and_skipped(
    photos: Path, tmp_path: Path, model: str, pattern: str | None
) -> None:
    what = [photos, "-r"] if pattern is None else [f"{photos}/{pattern}"]
    rest = ["-o", tmp_path / "out", "--model", model]
    error = fails("denoise", *what, *rest, saying=f"^error: {photos / 'inner'}: {os.strerror(errno.EACCES)}")
    assert "error: 1 of 3 files failed" in error
    assert outputs(tmp_path / "out") == ["a.png", "b.jpg"]


@pytest.mark.parametrize("pattern", [None, "[abc].*"])
def test_a_file_that_cannot_be_looked_at_is_reported_and_skipped(
    photos: Path, tmp_path: Path, model: str, pattern: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    (photos / "c.png").write_bytes(encoded(pixels(seed=3), "PNG"))
    cannot_be_looked_at(photos / "b.jpg", monkeypatch)
    what = photos if pattern is None else f"{photos}/{pattern}"
    rest = ["-o", tmp_path / "out", "--model", model]
    error = fails("denoise", what, *rest, saying=f"^error: {photos / 'b.jpg'}: {os.strerror(errno.EACCES)}")
    assert "error: 1 of 3 files failed" in error
    assert outputs(tmp_path / "out") == ["a.png", "c.png"]
    # Where none can be looked at, the reason is told, and not that there are no images.
    (photos / "a.png").unlink()
    (photos / "c.png").unlink()
    fails("denoise", what, *rest, saying=f"^error: {photos / 'b.jpg'}: {os.strerror(errno.EACCES)}")


@pytest.mark.usefixtures("unreadable_inner")
def test_a_pattern_that_leads_into_an_unreadable_folder_alone(
    photos: Path, tmp_path: Path, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    refused = f"inner: {os.strerror(errno.EACCES)}"
    for pattern in ("inner/*.png", "*/c.png", "inner/**/*.png"):
        rest = ["-o", tmp_path / "out", "--model", model]
        fails("denoise", f"{photos}/{pattern}", *rest, saying=f"^error: {photos}/{refused}")
    monkeypatch.chdir(photos)
    error = fails("denoise", "**/[abc].*", "-o", tmp_path / "out", "--model", model, saying=f"^error: {refused}")
    assert "error: 1 of 3 files failed" in error
    works("denoise", "[ab].*", "-o", tmp_path / "again", "--model", model)


@pytest.mark.skipif(sys.platform == "win32", reason="links need a privilege on Windows")
def test_links_that_lead_back(photos: Path, tmp_path: Path, model: str) -> None:
    (photos / "inner" / "back").symlink_to(photos, target_is_directory=True)
    works("denoise", photos, "-o", tmp_path / "out", "--model", model, "-r")
    found = [str(path.relative_to(tmp_path / "out")) for path in sorted((tmp_path / "out").rglob("[!.]*.*"))]
    assert found == ["a.png", "b.jpg", "inner/c.png"]
    works("denoise", f"{photos}/**/*.png", "-o", tmp_path / "glob", "--model", model)
    assert outputs(tmp_path / "glob") == ["a.png", "c.png"]


def test_decompression_bombs_are_refused_and_admitted(tmp_path: Path, model: str) -> None:
    (tmp_path / "bomb.png").write_bytes(encoded(np.zeros((1200, 1000, 3), np.uint8), "PNG"))
    rest = ["-o", tmp_path / "out.png", "--model", model, "--sigma", 5, "--max-megapixels"]
    fails("denoise", tmp_path / "bomb.png", *rest, 1, saying="1000 x 1200 pixels; accepted: at most 1 megapixels")
    works("denoise", tmp_path / "bomb.png", *rest, 1.2, "--dry-run")


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGINT to send")
def test_interruption(photos: Path, tmp_path: Path, model: str) -> None:
    """Ctrl-C while the second image is computed: the first is whole, one line is printed, the exit code is 130."""
    code = (
        "import signal, sys, time\n"
        # A process that a shell starts in the background ignores SIGINT.
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from fastden.cli import main as cli\n"
        "from fastden.batch.computing import Computing\n"
        "compute = Computing.compute\n"
        "def slow(self, works, progress):\n"
        "    if works[0].job.source.name == 'b.jpg':\n"
        "        print('computing', flush=True)\n"
        "        time.sleep(60)\n"
        "    compute(self, works, progress)\n"
        "Computing.compute = slow\n"
        "cli.app(prog_name='fastden')\n"
    )
    arguments = ["denoise", str(photos), "-o", str(tmp_path / "out"), "--model", model]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    running = subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )
    try:
        assert running.stdout is not None
        lines = [running.stdout.readline(), running.stdout.readline()]
        assert "computing\n" in lines
        running.send_signal(signal.SIGINT)
        output, error = running.communicate(timeout=180)
    finally:
        running.kill()
        running.wait()
    assert running.returncode == 130, error
    assert error == "error: interrupted; --resume goes on from here\n"
    assert "1 image, " in output
    assert outputs(tmp_path / "out") == ["a.png"]
    assert list(tmp_path.rglob("*.tmp")) == []


@pytest.mark.parametrize(("into", "manifest"), [("one.png", []), ("out", ["--manifest", "none"])])
def test_no_resuming_is_promised_without_a_manifest(
    photos: Path, tmp_path: Path, model: str, into: str, manifest: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*arguments: Any, **options: Any) -> None:
        raise Interrupted(Report(1))

    monkeypatch.setattr("fastden.batch.denoiser.BatchDenoiser.run_jobs", interrupt)
    source = photos / "a.png" if into == "one.png" else photos
    done = CliRunner().invoke(app, ["denoise", str(source), "-o", str(tmp_path / into), "--model", model, *manifest])
    assert (done.exit_code, done.stderr) == (130, "error: interrupted; what is named above is complete\n")


@pytest.mark.parametrize("quality", ["normal", "best"])
def test_a_rehearsal_measures_what_would_run(
    tmp_path: Path, model: str, quality: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The network for each depth, and the wishes."""
    for name, dtype in (("a", np.uint8), ("b", np.uint16), ("c", np.uint16)):
        (tmp_path / "in").mkdir(exist_ok=True)
        write_image(tmp_path / "in" / f"{name}.png", ImageFile(pixels(dtype=dtype)))
    seen: list[tuple[str, str]] = []
    batch = fastden.BatchDenoiser(model, quality=quality, sigma=5)  # type: ignore[arg-type]
    load = batch.settings.network

    def network(eight_bit: bool, white: bool = False) -> Any:
        seen.append(("network", str(eight_bit)))
        return load(eight_bit, white)

    def measured(images: Any, level: Any, network: Any, *, wishes: Any) -> None:
        seen.append(("wishes", wishes.quality))
        time.sleep(0.01)

    monkeypatch.setattr(dry_run, "denoise_batch", measured)
    monkeypatch.setattr(batch.settings, "network", network)
    jobs = plan([str(tmp_path / "in")], tmp_path / "out")
    found = dry_run.rehearse(batch, jobs, tmp_path / "out", manifest=None)
    assert {value for what, value in seen if what == "wishes"} == {quality}
    assert {("network", "True"), ("network", "False")} <= set(seen)
    assert found.seconds > 0
    assert [step.deep for step in found.steps] == [False, True, True]
