"""``fastden noise``: words, JSON, maps, and mistakes."""

from __future__ import annotations

import errno
import json
import os
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

import fastden
from fastden.cli.main import app
from fastden.cli.options import MAX_MEGAPIXELS, parse_megapixels
from fastden.images.codec import MAX_PIXELS, ImageFile, read_image, write_image
from tests.cli.run import fails, works
from tests.image_files import cannot_be_looked_at, encoded


def noisy(sigma: float, side: int = 64) -> np.ndarray:
    values = 128 + np.random.default_rng(0).normal(0, sigma, (side, side, 3))
    return np.rint(values.clip(0, 255)).astype(np.uint8)


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "a b.png"
    path.write_bytes(encoded(noisy(20), "PNG"))
    return path


def test_words(picture: Path, tmp_path: Path) -> None:
    flat = tmp_path / "flat.png"
    flat.write_bytes(encoded(np.full((64, 64, 3), 90, np.uint8), "PNG"))
    text = works("noise", picture, flat)
    estimate = fastden.estimate_noise(noisy(20))
    assert f"{picture}: {estimate.describe()}" in text
    assert f"fastden denoise '{picture}' -o '{tmp_path / 'a b-clean.png'}'" in text
    assert f"{flat}: too little to judge by" in text


def test_json_is_the_estimate(picture: Path) -> None:
    row = json.loads(works("noise", picture, "--json"))
    estimate = fastden.estimate_noise(noisy(20))
    assert row["sigmas"] == pytest.approx(estimate.sigmas)
    assert (row["sigma"], row["kind"]) == (pytest.approx(estimate.sigma), estimate.kind)


def test_the_map_serves_as_sigma_map(picture: Path, tmp_path: Path) -> None:
    target = tmp_path / "map.png"
    works("noise", picture, "--map", target)
    levels = read_image(target).pixels
    assert (levels.shape, levels.dtype) == ((64, 64, 1), np.uint16)
    estimate = fastden.estimate_noise(noisy(20))
    assert abs(float(levels.mean()) / 257 - 255 * float(estimate.curve.mean())) < 2.5
    works("denoise", picture, "-o", tmp_path / "out.png", "--sigma-map", target)
    fails("noise", picture, "--map", target, saying="exists")
    works("noise", picture, "--map", target, "--overwrite")
    fails("noise", picture, "--overwrite", saying="^error: overwrite: given without --map; accepted: with --map")
    fails("noise", picture, picture, "--map", tmp_path / "two.png", saying="with 2 pictures; accepted: with one")


def test_a_map_of_weak_noise_is_what_the_picture_is_denoised_with(tmp_path: Path) -> None:
    """In 8 bits the map was rounded up, here from level 1.4 to 2."""
    source, target = tmp_path / "weak.png", tmp_path / "map.png"
    source.write_bytes(encoded(noisy(1), "PNG"))
    works("noise", source, "--map", target)
    levels = read_image(target).pixels / 257
    estimate = fastden.estimate_noise(noisy(1))
    least, most = (float(level) for level in (estimate.curve.min() * 255, estimate.curve.max() * 255))
    assert least < 1.5
    assert least - 1e-4 <= levels.min() <= levels.max() <= most + 0.0041
    works("denoise", source, "-o", tmp_path / "by_map.png", "--sigma-map", target, "--model", "color")
    works("denoise", source, "-o", tmp_path / "auto.png", "--model", "color")
    by_map, auto = (read_image(tmp_path / f"{name}.png").pixels.astype(int) for name in ("by_map", "auto"))
    assert (by_map != auto).mean() < 0.01


def test_of_several_pages_the_first_is_judged(tmp_path: Path) -> None:
    """As fastden denoise, the command takes such a TIFF."""
    pages, first = tmp_path / "pages.tif", tmp_path / "first.tif"
    both = np.concatenate([noisy(20), np.full((64, 64, 3), 90, np.uint8)])
    write_image(pages, ImageFile(both, pages=2))
    write_image(first, ImageFile(noisy(20)))
    done = CliRunner().invoke(app, ["noise", str(pages), "--map", str(tmp_path / "map.png")])
    assert (done.exit_code, done.stderr) == (0, f"note: {pages}: of 2 pages the first is judged\n")
    judged_first = works("noise", first, "--map", tmp_path / "one.png")
    assert done.stdout.replace(str(tmp_path / "pages"), str(tmp_path / "first")) == judged_first
    one, judged = (read_image(tmp_path / name).pixels for name in ("one.png", "map.png"))
    assert np.array_equal(one, judged)


def test_a_bad_file_does_not_stop_the_others(picture: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad.png"
    bad.write_bytes(b"no picture")
    error = fails("noise", bad, picture, saying="bad.png")
    assert len(error.splitlines()) == 1


def test_a_file_that_may_not_be_read_does_not_stop_the_others(
    picture: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Typer asks for the permission of all paths, and fastden for that of none. Root may read everything."""
    secret = tmp_path / "secret.png"
    secret.write_bytes(encoded(noisy(20), "PNG"))
    system, opened = os.access, open

    def access(path: Any, mode: int, **options: Any) -> bool:
        return os.fspath(path) != str(secret) and system(path, mode, **options)

    def refuse(path: Any, *arguments: Any, **options: Any) -> Any:
        if path == secret:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return opened(path, *arguments, **options)

    monkeypatch.setattr(os, "access", access)
    monkeypatch.setattr("builtins.open", refuse)
    done = CliRunner().invoke(app, ["noise", str(secret), str(picture)])
    said = f"error: {secret}: cannot be read: {os.strerror(errno.EACCES)}\n"
    assert (done.exit_code, done.stderr) == (1, said)
    assert f"{picture}: level" in done.stdout


def test_a_folder_without_pictures_does_not_stop_the_others(picture: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    done = CliRunner().invoke(app, ["noise", str(tmp_path / "empty"), str(picture)])
    said = f"error: file: no images in the folder {tmp_path / 'empty'}; accepted: image files\n"
    assert (done.exit_code, done.stderr) == (1, said)
    assert f"{picture}: level" in done.stdout


@pytest.mark.parametrize("value", [0, 255])
@pytest.mark.parametrize("shape", [(1, 1, 3), (64, 64, 3)])
def test_pictures_that_say_nothing_come_out_as_they_went_in(
    value: int, shape: tuple[int, int, int], tmp_path: Path
) -> None:
    """The default takes black, white and one-pixel pictures for clean, says so, and changes next to nothing."""
    source, target = tmp_path / "a.png", tmp_path / "b.png"
    write_image(source, ImageFile(np.full(shape, value, np.uint8)))
    works("denoise", source, "-o", target)
    assert np.abs(read_image(target).pixels.astype(int) - value).max() <= 3


def test_a_folder_stands_for_its_pictures(picture: Path, tmp_path: Path) -> None:
    (tmp_path / "old.bmp").write_bytes(b"BM")
    done = CliRunner().invoke(app, ["noise", str(tmp_path)])
    assert done.exit_code == 0
    assert f"{picture}: level" in done.stdout
    assert "note: 1 image file left out, not read here: 1 BMP" in done.stderr
    fails("noise", tmp_path, "--map", tmp_path / "map.png", saying="with a folder; accepted: with one picture")
    (tmp_path / "empty").mkdir()
    fails("noise", tmp_path / "empty", saying="file: no images in the folder .*empty; accepted: image files")


def test_a_file_that_cannot_be_looked_at_is_reported_and_skipped(
    picture: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refused = tmp_path / "b.png"
    refused.write_bytes(picture.read_bytes())
    cannot_be_looked_at(refused, monkeypatch)
    done = CliRunner().invoke(app, ["noise", str(tmp_path)])
    assert (done.exit_code, done.stderr) == (1, f"error: {refused}: {os.strerror(errno.EACCES)}\n")
    assert f"{picture}: level" in done.stdout
    assert f"{picture}: level" in works("noise", refused, picture), "reading a file that is named tells what is wrong"
    picture.unlink()
    fails("noise", tmp_path, saying=f"^error: {refused}: {os.strerror(errno.EACCES)}")


def test_what_cannot_be_judged_gets_no_empty_advice(tmp_path: Path) -> None:
    path = tmp_path / "flat.png"
    path.write_bytes(encoded(np.full((64, 64, 3), 90, np.uint8), "PNG"))
    lines = works("noise", path).splitlines()
    assert lines[1:] == [
        "    nothing would be removed; if you see noise, give its level:",
        f"    fastden denoise {path} -o {tmp_path / 'flat-clean.png'} --sigma N",
    ]


@pytest.mark.parametrize(
    "name", ["a b.png", "-x.png", "new\nline.png", "it's \x1b[31m.png", "b\udcff\\.png", "$HOME.png", "x.gif"]
)
def test_a_shell_takes_the_advice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).write_bytes(encoded(noisy(20), "GIF" if name.endswith("gif") else "PNG"))
    command = works("noise", "--", name).splitlines()[1].strip()
    words = f"printf '%s\\0' {command.removeprefix('fastden ')}"
    shown = subprocess.run(["bash", "-c", words], capture_output=True, check=True).stdout
    written = [os.fsdecode(word) for word in shown.split(b"\0")[:-1]]
    source = f"./{name}" if name.startswith("-") else name
    stem, suffix = name.rsplit(".", 1)
    target = f"{stem}-clean.{suffix.replace('gif', 'png')}"
    assert written == ["denoise", source, "-o", f"./{target}" if target.startswith("-") else target]


@pytest.mark.parametrize("name", ["map.jpg", "map.webp", "map.avif", "map"])
def test_a_map_is_written_where_it_keeps_its_levels(
    picture: Path, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read(*_: object) -> None:
        raise AssertionError("read before the map's name is checked")

    monkeypatch.setattr("fastden.images.strips.read_samples", read)
    fails("noise", picture, "--map", tmp_path / name, saying=f"map: .*{name}; accepted: a name with .png, .tif, .tiff")


def test_a_map_does_not_replace_its_picture(picture: Path, tmp_path: Path) -> None:
    before = picture.read_bytes()
    link = tmp_path / "link.png"
    link.symlink_to(picture)
    for target in (picture, tmp_path / "." / picture.name, link):
        for options in ([], ["--overwrite"]):
            fails("noise", picture, "--map", target, *options, saying="^error: map: .* is the picture itself; accepted")
    fails("noise", link, "--map", picture, "--overwrite", saying="^error: map: .* is the picture itself; accepted")
    assert picture.read_bytes() == before


def test_a_map_as_tiff(picture: Path, tmp_path: Path) -> None:
    works("noise", picture, "--map", tmp_path / "a.png")
    works("noise", picture, "--map", tmp_path / "a.TIF")
    assert np.array_equal(read_image(tmp_path / "a.png").pixels, read_image(tmp_path / "a.TIF").pixels)


def test_large_pictures_are_refused_and_admitted(picture: Path, tmp_path: Path) -> None:
    rest = ["--map", tmp_path / "map.png", "--max-megapixels"]
    fails("noise", picture, *rest, 0.004, saying="64 x 64 pixels; accepted: at most 0.004 megapixels")
    fails("noise", picture, *rest, "inf", saying="max_megapixels: inf; accepted")
    text = works("noise", picture, *rest, 0.0041)
    assert text.endswith("-clean.png' --max-megapixels 0.0041\n")
    assert (tmp_path / "map.png").exists()


def test_the_default_limit_is_that_of_reading() -> None:
    assert parse_megapixels(MAX_MEGAPIXELS) == MAX_PIXELS
