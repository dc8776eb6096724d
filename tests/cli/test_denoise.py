"""``fastden denoise``: files, folders and patterns in; the same kind of file out."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image
from typer.testing import CliRunner

import fastden
from fastden.batch.plan import SUFFIX_OF
from fastden.batch.ray import plan_rows
from fastden.cli.main import app
from fastden.cli.options import TRAINED
from fastden.images.codec import ImageFile, read_image, write_image
from tests.cli.run import fails, outputs, process, works
from tests.image_files import MAKE, ORIENTATION, encoded, icc_profile, pixels


def test_one_file(photos: Path, tmp_path: Path, model: str) -> None:
    output = tmp_path / "out.png"
    text = works("denoise", photos / "a.png", "-o", output, "--sigma", 20, "--model", model, "--dtype", "float32")
    expected = fastden.denoise(pixels(seed=1), 20, model=model, dtype="float32")
    np.testing.assert_array_equal(read_image(output).pixels, expected)
    assert f"{photos / 'a.png'} -> {output}, 40 x 32, sigma 20.0" in text
    assert re.search(r"^1 image, 0\.00 megapixels, [\d.]+ s \([\d.]+ MP/s", text, re.MULTILINE)


def test_a_real_process(photos: Path, tmp_path: Path, model: str) -> None:
    done = process("denoise", photos / "a.png", "-o", tmp_path / "out", "--model", model)
    assert (done.returncode, done.stderr) == (0, "")
    name = re.escape(Path(model).name)
    assert re.search(rf", sigma [\d.]+ \(estimated(, white noise)?; model {name}\)$", done.stdout, re.MULTILINE)
    assert outputs(tmp_path / "out") == ["a.png"]
    failed = process("denoise", tmp_path / "missing.png", "-o", tmp_path / "out", "--model", model)
    assert failed.returncode == 1
    assert (
        failed.stderr
        == f"error: input: {tmp_path / 'missing.png'} does not exist; accepted: files, folders and glob patterns\n"
    )


def test_folder(photos: Path, tmp_path: Path, model: str) -> None:
    text = works("denoise", photos, "-o", tmp_path / "out", "--model", model)
    assert outputs(tmp_path / "out") == ["a.png", "b.jpg"]
    assert "2 images, " in text
    works("denoise", photos, "-o", tmp_path / "deep", "--model", model, "--recursive")
    assert sorted(str(path.relative_to(tmp_path / "deep")) for path in (tmp_path / "deep").rglob("[!.]*.*")) == [
        "a.png",
        "b.jpg",
        "inner/c.png",
    ]


def test_files_and_globs(photos: Path, tmp_path: Path, model: str) -> None:
    works("denoise", photos / "b.jpg", f"{photos}/**/*.png", "-o", tmp_path / "out", "--model", model, "--strength", 0)
    assert outputs(tmp_path / "out") == ["a.png", "b.jpg", "c.png"]
    np.testing.assert_array_equal(read_image(tmp_path / "out" / "a.png").pixels, pixels(seed=1))


def test_output_inside_the_input_is_no_input(photos: Path, model: str) -> None:
    for _ in range(2):
        works("denoise", photos, "-o", photos / "out", "--model", model, "-r", "--overwrite")
    assert not (photos / "out" / "out").exists()


def test_metadata_stays_or_goes(photos: Path, tmp_path: Path, model: str) -> None:
    works("denoise", photos / "b.jpg", "-o", tmp_path / "kept.jpg", "--model", model)
    kept = Image.open(tmp_path / "kept.jpg")
    assert (kept.getexif()[ORIENTATION], kept.getexif()[MAKE], kept.size) == (6, "Camera", (40, 32))
    assert kept.info["icc_profile"] == icc_profile()
    works("denoise", photos / "b.jpg", "-o", tmp_path / "stripped.jpg", "--model", model, "--strip-metadata")
    stripped = Image.open(tmp_path / "stripped.jpg")
    assert (dict(stripped.getexif()), stripped.size) == ({}, (32, 40))


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
@pytest.mark.parametrize("channels", [1, 3])
def test_depth_gray_and_alpha_stay(tmp_path: Path, model: str, dtype: Any, channels: int) -> None:
    bits = 8 * np.dtype(dtype).itemsize
    picture = ImageFile(pixels(channels=channels, dtype=dtype), pixels(channels=0, dtype=dtype, seed=9), bits=bits)
    write_image(tmp_path / "a.tif", picture)
    works("denoise", tmp_path / "a.tif", "-o", tmp_path / "b.tif", "--model", model, "--sigma", 15)
    back = read_image(tmp_path / "b.tif")
    assert (back.pixels.dtype, back.pixels.shape) == (picture.pixels.dtype, picture.pixels.shape)
    np.testing.assert_array_equal(back.alpha, picture.alpha)
    if dtype == np.uint16:
        assert len(np.unique(back.pixels & 255)) > 100, "16 bits do not pass through 8"


def test_format_option(photos: Path, tmp_path: Path, model: str) -> None:
    works("denoise", photos, "-o", tmp_path / "out", "--model", model, "--format", "webp")
    assert outputs(tmp_path / "out") == ["a.webp", "b.webp"]
    assert read_image(tmp_path / "out" / "a.webp").lossless
    assert not read_image(tmp_path / "out" / "b.webp").lossless
    works("denoise", photos / "b.jpg", "-o", tmp_path / "same", "--model", model, "--format", "jpeg")
    assert outputs(tmp_path / "same") == ["b.jpg"]


@pytest.mark.parametrize(("sigma", "said"), [("0.098", True), ("0", False), ("15", False)])
def test_sigma_below_rounding_is_said(photos: Path, tmp_path: Path, model: str, sigma: str, said: bool) -> None:
    arguments = ["denoise", str(photos / "a.png"), "-o", str(tmp_path / "a.png"), "--sigma", sigma, "--model", model]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0
    assert ("note: sigma 0.098: on the scale 0-255, less than the rounding of 8-bit" in done.stderr) == said


def test_loss_is_said(tmp_path: Path, model: str) -> None:
    write_image(tmp_path / "a.png", ImageFile(pixels(dtype=np.uint16), bits=16))
    done = CliRunner().invoke(
        app, ["denoise", str(tmp_path / "a.png"), "-o", str(tmp_path / "a.jpg"), "--model", model]
    )
    assert done.exit_code == 0
    assert "note: " in done.stderr
    assert "rounded to the 8 bits of jpeg" in done.stderr


@pytest.mark.parametrize(
    ("name", "sigma", "who", "levels"),
    [
        (None, "90", "the bundled models were", "0 to 75"),
        ("photo", "70", "the model photo was", "0 to 60"),
        ("color-classify", "5", "the model color-classify was", "10 to 65"),
    ],
)
def test_sigma_beyond_training_is_said(
    photos: Path, tmp_path: Path, model: str, name: str | None, sigma: str, who: str, levels: str
) -> None:
    arguments = ["denoise", str(photos / "a.png"), "-o", str(tmp_path / "a.png"), "--sigma", sigma]
    done = CliRunner().invoke(app, [*arguments, "--model", name or model])
    assert done.exit_code == 0
    assert f"note: sigma {sigma}: {who} trained for {levels}" in done.stderr


def test_levels_that_the_models_were_trained_for(root: Path) -> None:
    settings = {name: yaml.safe_load((folder / "train.yaml").read_text()) for name, folder in fastden.models().items()}
    assert {name: list(levels) for name, levels in TRAINED.items()} == {
        name: run["sigma"] for name, run in settings.items()
    }


def test_tile_and_memory_options_do_not_change_the_result(photos: Path, tmp_path: Path, model: str) -> None:
    for name, options in (("a", ["--tile", "none"]), ("b", ["--tile", "16"]), ("c", ["--max-memory", "8MiB"])):
        works(
            "denoise",
            photos / "a.png",
            "-o",
            tmp_path / f"{name}.png",
            "--model",
            model,
            "--dtype",
            "float32",
            *options,
        )
    whole, *others = (read_image(tmp_path / f"{name}.png").pixels.astype(int) for name in "abc")
    for other in others:
        assert np.abs(whole - other).max() <= 1


def test_a_blind_model_takes_no_sigma(photos: Path, tmp_path: Path, blind: str) -> None:
    output = tmp_path / "out.png"
    fails("denoise", photos / "a.png", "-o", output, "--model", blind, "--sigma", 20, saying="blind")
    text = works("denoise", photos / "a.png", "-o", output, "--model", blind)
    assert "sigma" not in text


def test_speed_is_measured_over_the_files(
    photos: Path, tmp_path: Path, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ticks = iter([100.0, 102.0])
    monkeypatch.setattr(
        "fastden.cli.display.time", type("Clock", (), {"perf_counter": staticmethod(lambda: next(ticks))})
    )
    image = np.zeros((100, 200, 3), np.uint8)
    (tmp_path / "big.png").write_bytes(encoded(image, "PNG"))
    text = works("denoise", tmp_path / "big.png", "-o", tmp_path / "out.png", "--model", model)
    assert "1 image, 0.02 megapixels, 2.00 s (0.01 MP/s, files read and written)" in text
    assert time.perf_counter() > 0


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no pseudo-terminals")
def test_the_bar_is_for_terminals_and_lines_go_where_they_are_sent(photos: Path, tmp_path: Path, model: str) -> None:
    master, slave = os.openpty()
    command = [sys.executable, "-m", "fastden", "denoise", str(photos), "-o", str(tmp_path / "out"), "--model", model]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2]), "TERM": "xterm"}
    read = bytearray()

    def drain() -> None:
        with suppress(OSError):  # the other end is closed
            while part := os.read(master, 4096):
                read.extend(part)

    # Read while the command runs: a terminal that nobody reads holds 4096 bytes, and then its writer waits.
    reader = threading.Thread(target=drain)
    reader.start()
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=slave, text=True, env=environment, check=False)
    os.close(slave)
    reader.join()
    os.close(master)
    shown = read.decode()
    assert done.returncode == 0
    assert "2 of 2" in shown
    assert " -> " not in shown
    assert done.stdout.count(" -> ") == 2
    assert "\x1b" not in done.stdout


@pytest.mark.parametrize("folder", ["2024.05", "clean.png"])
def test_a_separator_at_the_end_means_a_folder(
    photos: Path, tmp_path: Path, model: str, folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    options = ("--model", model, "--sigma", 20)
    works("denoise", photos / "a.png", "-o", f"{folder}/", *options)
    assert outputs(tmp_path / folder) == ["a.png"]
    works("denoise", photos, "-o", f"all/{folder}/", *options)
    assert outputs(tmp_path / "all" / folder) == ["a.png", "b.jpg"]
    batch = fastden.BatchDenoiser(model, sigma=20)
    batch.run(photos / "a.png", f"other/{folder}/")
    assert outputs(tmp_path / "other" / folder) == ["a.png"]
    (row,) = plan_rows([str(photos / "a.png")], f"ray/{folder}/")
    assert row["output"] == str(tmp_path / "ray" / folder / "a.png")
    Path("file.png").touch()
    fails("denoise", photos / "a.png", "-o", "file.png/", *options, saying="file.png is a file; accepted: a folder")


def test_a_separator_at_the_end_means_a_folder_for_a_video(
    tmp_path: Path, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    targets: list[Path] = []

    def interrupted(source: Path, target: Path, *_: Any, **__: Any) -> None:
        targets.append(target)
        raise KeyboardInterrupt

    monkeypatch.setattr("fastden.cli.video.denoise_video", interrupted)
    arguments = ["denoise", str(tmp_path / "a.mp4"), "-o", f"{tmp_path}/2024.05/", "--model", model]
    assert CliRunner().invoke(app, arguments).exit_code == 130
    assert targets == [tmp_path / "2024.05" / "a.mp4"]


@pytest.mark.parametrize(
    ("name", "suffix"),
    [("jpg", ".jpg"), ("JPEG", ".jpg"), ("Jpg", ".jpg"), ("tif", ".tif"), ("TIFF", ".tif"), ("PNG", ".png")],
)
@pytest.mark.parametrize("engine", ["local", "ray"])
def test_names_of_formats(
    name: str, suffix: str, engine: str, photos: Path, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each format by the names that people and suffixes give it, in any case."""
    asked: list[Any] = []
    monkeypatch.setattr("fastden.cli.local.denoise_here", lambda request, **_: asked.append(request) or 0)
    monkeypatch.setattr("fastden.cli.cluster.denoise_on_cluster", lambda request, **_: asked.append(request) or 0)
    works("denoise", photos, "-o", tmp_path / "out", "--model", model, "--format", name, "--engine", engine)
    (request,) = asked
    assert {SUFFIX_OF[request.format_name]} == {suffix}
    fails("denoise", photos, "-o", tmp_path / "out", "--format", "bmp", saying="'bmp' is not one of", code=2)
