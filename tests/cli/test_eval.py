"""``fastden eval``: the protocol, the options, and a results file that can be repeated."""

from __future__ import annotations

import json
import math
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.error import URLError

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import fastden
from fastden import evaluation
from fastden.cli.main import app
from fastden.evaluation import psnr
from fastden.images.codec import ImageFile, read_image, write_image
from fastden.network.loading import load_network
from tests.cli.run import fails, works
from tests.image_files import encoded, pixels, save_model


def test_eval_follows_the_protocol(photos: Path, tmp_path: Path, model: str) -> None:
    results = tmp_path / "results.json"
    text = works("eval", photos, "--sigma", "15", "25", "50", "--model", model, "--json", results)
    document = json.loads(results.read_text())
    assert (document["dtype"], document["settings"]["seed"]) == ("float32", 0)
    assert {"torch", "numpy", "scikit-image", "fastden"} <= set(document["versions"])
    assert str(tmp_path) not in json.dumps(document["sets"])
    rows = document["sets"]["photos"]
    assert [row["sigma"] for row in rows] == [15, 25, 50]
    clean = read_image(photos / "b.jpg").pixels
    noise = np.random.default_rng(0 + 1).standard_normal(clean.shape, dtype=np.float32)
    noisy = clean.astype(np.float32) / 255 + np.float32(25 / 255) * noise
    found = fastden.denoise(noisy, 25, model=model, dtype="float32")
    error = np.rint(np.clip(found, 0, 1) * 255).astype(float) - clean
    expected = 10 * np.log10(255**2 / np.square(error).mean())
    assert rows[1]["images"]["b.jpg"]["psnr"] == pytest.approx(expected, abs=1e-3)
    assert rows[1]["psnr"] == pytest.approx(np.mean([image["psnr"] for image in rows[1]["images"].values()]), abs=1e-3)
    assert rows[1]["psnr_noisy"] == pytest.approx(20 * np.log10(255 / 25), abs=0.2)
    assert 0 < rows[1]["ssim"] < 1
    for row in rows:
        assert f"{row['psnr']:.2f}" in text


def test_eval_sigma_forms_and_folder_order(photos: Path, tmp_path: Path, model: str) -> None:
    seen = []
    for arguments in (
        ["eval", photos, "--sigma", "15,25"],
        ["eval", "--sigma", "15", "25", "--model", model, photos],
        ["eval", photos, "--sigma", "15", "--sigma", "25"],
        ["eval", photos, "--sigma=15", "25"],
        ["eval", "--sigma=15", "25", photos],
    ):
        results = tmp_path / "results.json"
        works(*arguments, "--model", model, "--json", results)
        seen.append(json.loads(results.read_text())["sets"])
    assert [row["sigma"] for row in seen[0]["photos"]] == [15, 25]
    assert all(sets == seen[0] for sets in seen)


def test_a_folder_named_as_a_number_is_a_folder(
    photos: Path, tmp_path: Path, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    photos.rename(tmp_path / "25")
    monkeypatch.chdir(tmp_path)
    works("eval", "--sigma", "25", "15", "25", "--model", model, "--json", "r.json")
    (rows,) = json.loads((tmp_path / "r.json").read_text())["sets"].values()
    assert [row["sigma"] for row in rows] == [25, 15]


def test_eval_of_several_sets_gray_and_blind(photos: Path, tmp_path: Path, blind: str) -> None:
    results = tmp_path / "results.json"
    works("eval", photos, photos / "inner", "--gray", "--sigma", "25", "--model", blind, "--json", results)
    sets = json.loads(results.read_text())["sets"]
    assert {name: len(rows[0]["images"]) for name, rows in sets.items()} == {"photos": 2, "inner": 1}
    gray = np.rint(pixels(seed=3).astype(np.float32) @ np.array([0.299, 0.587, 0.114], np.float32))
    noise = np.random.default_rng(0).standard_normal((32, 40, 1), dtype=np.float32)[:, :, 0]
    noisy = (gray / 255 + np.float32(25 / 255) * noise).astype(np.float32)
    found = np.rint(np.clip(fastden.denoise(noisy, model=blind, dtype="float32"), 0, 1) * 255)
    expected = 10 * np.log10(255**2 / np.square(found - gray).mean())
    assert sets["inner"][0]["psnr"] == pytest.approx(expected, abs=0.01)


def test_eval_of_real_pairs(tmp_path: Path, model: str) -> None:
    folder = tmp_path / "pairs"
    folder.mkdir()
    for name in ("x", "y"):
        (folder / f"{name}_mean.png").write_bytes(encoded(np.full((32, 40, 3), 90, np.uint8), "PNG"))
        (folder / f"{name}_real.png").write_bytes(encoded(pixels(), "PNG"))
    results = tmp_path / "results.json"
    text = works("eval", folder, "--real", "--model", model, "--json", results)
    (row,) = json.loads(results.read_text())["sets"]["pairs"]
    assert row["sigma"] == "auto"
    assert "auto" in text
    assert row["images"]["x_real.png"]["sigma"] == pytest.approx(fastden.estimate_sigma(pixels()), abs=0.1)
    expected = 10 * np.log10(255**2 / np.square(pixels().astype(float) - 90).mean())
    assert row["psnr_noisy"] == pytest.approx(expected, abs=1e-3)
    (folder / "x_mean.csv").write_text("its scores, no image")
    works("eval", folder, "--real", "--model", model)
    # A lossy preview beside a reference of the shot's own suffix is none; of several others none is preferred.
    (folder / "x_mean.jpg").write_bytes(encoded(np.full((32, 40, 3), 120, np.uint8), "JPEG"))
    works("eval", folder, "--real", "--model", model, "--json", results)
    assert json.loads(results.read_text())["sets"]["pairs"][0] == row
    (folder / "x_mean.png").rename(folder / "x_mean.tif")
    message = r"x_real.png has references x_mean.jpg, x_mean.tif; accepted: one, or one of suffix .png"
    fails("eval", folder, "--real", "--model", model, saying=message)
    (folder / "x_mean.jpg").unlink()
    (folder / "y_mean.png").unlink()
    fails("eval", folder, "--real", "--model", model, saying="has no reference y_mean")


@pytest.mark.parametrize("orientation", [3, 6])
def test_eval_of_turned_pairs(tmp_path: Path, model: str, orientation: int) -> None:
    """Cameras turn by a tag, and references are often saved upright."""
    stored = pixels()
    write_image(tmp_path / "x_real.png", ImageFile(stored, metadata={"orientation": orientation}))
    upright = np.rot90(stored, 2 if orientation == 3 else -1)
    (tmp_path / "x_mean.png").write_bytes(encoded(np.ascontiguousarray(upright), "PNG"))
    network = load_network(model)
    (row,) = evaluation.evaluate_pairs(tmp_path, network, [10.0])
    assert row["psnr_noisy"] == math.inf
    found = fastden.denoise(stored, sigma=10, model=model, dtype="float32").astype(float)
    expected = 10 * np.log10(255**2 / np.square(found - stored).mean())
    assert row["psnr"] == pytest.approx(expected, abs=0.01)


def test_eval_compares_the_sizes_of_turned_pairs(tmp_path: Path, model: str) -> None:
    write_image(tmp_path / "x_real.png", ImageFile(pixels(), metadata={"orientation": 6}))
    (tmp_path / "x_mean.png").write_bytes(encoded(pixels(), "PNG"))
    message = r"x_real.png is \(40, 32, 3\), its reference \(32, 40, 3\)"
    fails("eval", tmp_path, "--real", "--model", model, saying=message)


def test_eval_with_the_estimated_level(photos: Path, tmp_path: Path, model: str) -> None:
    results = tmp_path / "results.json"
    works("eval", photos, "--sigma", "20", "--estimate", "--model", model, "--json", results)
    document = json.loads(results.read_text())
    (row,) = document["sets"]["photos"]
    assert document["settings"]["estimate"]
    assert row["sigma"] == 20
    assert all(scores["sigma"] != 20 for scores in row["images"].values())
    works("eval", photos, "--sigma", "20", "--model", model, "--json", results)
    (given,) = json.loads(results.read_text())["sets"]["photos"]
    assert given["psnr"] != row["psnr"]


def test_eval_mistakes(photos: Path, tmp_path: Path, model: str) -> None:
    fails("eval", tmp_path / "missing", "--model", model, saying="missing is not a folder")
    fails("eval", photos, "--sigma", "300", "--model", model, saying="sigma: '300'")
    fails("eval", photos, "--sigma", "auto", "--model", model, saying="sigma: 'auto'; accepted: numbers from 0 to 255")
    fails("eval", photos, "--real", "--model", model, saying=r"no file \*_real")
    fails("eval", photos, "--gray", "--real", "--model", model, saying="gray: given with --real")
    fails("eval", photos, "--model", model, "--json", tmp_path / "no" / "x.json", saying="does not exist")
    write_image(photos / "deep.png", ImageFile(pixels(dtype=np.uint16), bits=16))
    fails("eval", photos, "--model", model, saying="deep.png: 16 bits; accepted for an evaluation: 8 bits")


def test_eval_replaces_results_and_no_other_file(photos: Path, tmp_path: Path, model: str) -> None:
    words, cut = photos / "notes.txt", tmp_path / "cut.json"
    cut.write_text('{"sets": [')
    for file in (photos / "a.png", photos / "b.jpg", words, cut):
        before = file.read_bytes()
        message = f"^error: json: {file} exists and holds no JSON; accepted: a new file, or one of earlier results"
        fails("eval", photos, "--sigma", "25", "--model", model, "--json", file, saying=message)
        assert file.read_bytes() == before
    earlier, empty = tmp_path / "earlier.json", tmp_path / "empty"
    earlier.write_text('{"a": "\u00fc"}')
    empty.touch()
    for file in (earlier, empty):
        works("eval", photos / "inner", "--sigma", "25", "--model", model, "--json", file)
        assert list(json.loads(file.read_text())["sets"]) == ["inner"]


def test_eval_of_colour_with_a_gray_model_is_one_line(photos: Path, tmp_path: Path) -> None:
    gray = save_model(tmp_path / "gray", image_channels=1)
    error = fails(
        "eval", photos, "--model", gray, saying="^error: .*photos: image: 3 channels, but the model is for gray"
    )
    assert len(error.splitlines()) == 1
    works("eval", photos, "--gray", "--sigma", "25", "--model", gray)


def test_equal_and_tiny_images_give_valid_json(tmp_path: Path, model: str) -> None:
    folder = tmp_path / "tiny"
    folder.mkdir()
    (folder / "a_mean.png").write_bytes(encoded(pixels(5, 5), "PNG"))
    (folder / "a_real.png").write_bytes(encoded(pixels(5, 5), "PNG"))
    works("eval", folder, "--real", "--model", model, "--json", tmp_path / "r.json")

    def refuse(text: str) -> None:
        raise AssertionError(f"{text} is not JSON")

    (row,) = json.loads((tmp_path / "r.json").read_text(), parse_constant=refuse)["sets"]["tiny"]
    assert (row["psnr_noisy"], row["ssim"]) == (None, None)


def test_eval_with_dists(photos: Path, tmp_path: Path, model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for piq, whose weights take a download: the mean absolute difference of values in [0, 1]."""

    class Distance:
        def __call__(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            assert x.shape == y.shape
            assert x.shape[:2] == (1, 3)
            assert 0 <= float(x.min()) <= float(x.max()) <= 1
            return (x - y).abs().mean()

    def unreachable() -> Distance:
        raise URLError("no network")

    monkeypatch.setitem(sys.modules, "piq", None)  # type: ignore[arg-type]
    fails("eval", photos, "--dists", "--model", model, saying=r"dists: the package piq is missing; .*perceptual")
    monkeypatch.setitem(sys.modules, "piq", SimpleNamespace(DISTS=unreachable))  # type: ignore[arg-type]
    fails("eval", photos, "--dists", "--model", model, saying="dists: its weights cannot be had .*no network")
    monkeypatch.setitem(sys.modules, "piq", SimpleNamespace(DISTS=Distance))  # type: ignore[arg-type]
    results = tmp_path / "results.json"
    text = works("eval", photos, "--dists", "--sigma", "0", "20", "--model", model, "--json", results)
    assert "DISTS" in text
    clean, noisy = json.loads(results.read_text())["sets"]["photos"]
    assert clean["dists_noisy"] == 0
    # The mean absolute value of a normal number is 0.8 deviations.
    assert noisy["dists_noisy"] == pytest.approx(0.8 * 20 / 255, rel=0.2)
    assert noisy["dists"] != noisy["dists_noisy"]


@pytest.mark.shared
def test_eval_of_photographs(shared_data: Path, tmp_path: Path, model: str) -> None:
    folder = tmp_path / "pairs"
    folder.mkdir()
    source = shared_data / "eval" / "real" / "cc"
    first = sorted(source.glob("*_real.webp"))[0]
    for name in (first.name, first.name.replace("_real", "_mean")):
        (folder / name).symlink_to(source / name)
    works("eval", folder, "--real", "--model", model, "--json", tmp_path / "r.json")
    (row,) = json.loads((tmp_path / "r.json").read_text())["sets"]["pairs"]
    assert 28 < row["psnr_noisy"] < 45
    assert 0 < row["images"][first.name]["sigma"] < 30


def test_dark_pictures_of_eight_bits_are_scored_as_they_are_denoised(tmp_path: Path, model: str) -> None:
    """A night shot spans a part of 0 to 255. The command takes 8 bits as they are, and so does the evaluation."""
    ramp = np.repeat(np.linspace(5, 40, 96)[None, :, None], 96, 0).repeat(3, 2)
    noise = np.random.default_rng(0).normal(0, 4, ramp.shape)
    clean, noisy = (np.rint(np.clip(values, 0, 255)).astype(np.uint8) for values in (ramp, ramp + noise))
    for name, picture in (("x_mean.png", clean), ("x_real.png", noisy)):
        (tmp_path / name).write_bytes(encoded(picture, "PNG"))
    for options, sigma in (((), "auto"), (("--sigma", "4"), 4.0)):
        works(
            "eval", tmp_path, "--real", "--model", model, "--dtype", "float32", *options, "--json", tmp_path / "r.json"
        )
        document = json.loads((tmp_path / "r.json").read_text())
        assert document["settings"]["estimate"] == (sigma == "auto")
        ((result,),) = document["sets"].values()
        wanted = psnr(clean, fastden.denoise(noisy, sigma, model=model, dtype="float32"))
        assert result["psnr"] == pytest.approx(wanted, abs=1e-3)


def test_an_estimate_beside_a_given_level(tmp_path: Path, model: str) -> None:
    fails(
        "eval",
        tmp_path,
        "--real",
        "--sigma",
        "10",
        "--estimate",
        "--model",
        model,
        saying="estimate: given with --real",
    )


def test_a_mistake_in_a_later_folder_shows_before_anything_is_computed(
    photos: Path, tmp_path: Path, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    deep, pairs, results = tmp_path / "deep", tmp_path / "pairs", tmp_path / "r.json"
    deep.mkdir()
    pairs.mkdir()
    write_image(deep / "b.png", ImageFile(pixels(dtype=np.uint16), bits=16))
    (pairs / "x_real.png").write_bytes(encoded(pixels(32, 40), "PNG"))
    (pairs / "x_mean.png").write_bytes(encoded(pixels(32, 41), "PNG"))
    gray = save_model(tmp_path / "gray", image_channels=1)
    (tmp_path / "grays").mkdir()
    (tmp_path / "grays" / "a.png").write_bytes(encoded(pixels(channels=0), "PNG"))

    def computed(*_: Any, **__: Any) -> None:
        raise AssertionError("computed before all folders are checked")

    monkeypatch.setattr(evaluation, "denoise_pixels", computed)
    for arguments, saying in (
        ([photos, tmp_path / "typo", "--model", model], "typo is not a folder"),
        ([photos, deep, "--model", model], "b.png: 16 bits; accepted for an evaluation: 8 bits"),
        ([pairs, "--real", "--model", model], r"x_real.png is \(32, 40, 3\), its reference \(32, 41, 3\)"),
        ([tmp_path / "grays", photos, "--model", gray], "3 channels, but the model is for gray images"),
    ):
        fails("eval", *arguments, "--json", results, saying=saying)
        assert not results.exists()


def test_sets_that_are_finished_outlive_one_that_fails(photos: Path, tmp_path: Path, model: str) -> None:
    """A header tells nothing of damaged pixels."""
    damaged, results = tmp_path / "damaged", tmp_path / "r.json"
    damaged.mkdir()
    (damaged / "a.png").write_bytes(encoded(pixels(96, 96), "PNG")[:-2000])
    arguments = [photos, damaged, "--sigma", 25, "--model", model, "--json", results]
    done = CliRunner().invoke(app, ["eval", *map(str, arguments)])
    assert done.exit_code == 1
    assert "a.png" in done.stderr
    document = json.loads(results.read_text())
    assert (list(document["sets"]), document["complete"]) == (["photos"], False)
    assert f"{document['sets']['photos'][0]['psnr']:.2f}" in done.stdout
    works("eval", photos, "--sigma", "25", "--model", model, "--json", results)
    assert json.loads(results.read_text())["complete"] is True


def test_two_sets_of_one_name(photos: Path, tmp_path: Path, model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(photos, tmp_path / "a" / "photos")
    (tmp_path / "a" / "photos" / "a.png").unlink()
    text = works(
        "eval", "a/photos", "photos", "photos/inner", "--sigma", "25", "--model", model, "--json", tmp_path / "r.json"
    )
    sets = json.loads((tmp_path / "r.json").read_text())["sets"]
    names = {"a/photos": 1, f"{tmp_path.name}/photos": 2, "inner": 1}
    assert {name: len(rows[0]["images"]) for name, rows in sets.items()} == names
    assert all(f" {name} " in text for name in names)
    fails("eval", "photos", "photos/../photos", "--model", model, saying="photos is given more than once")


def test_what_would_have_no_effect_is_refused(photos: Path, tmp_path: Path, model: str, blind: str) -> None:
    for name in ("x_real.png", "x_mean.png"):
        (tmp_path / name).write_bytes(encoded(pixels(), "PNG"))
    blind_to = r"but this model is blind \(it takes no noise level\)"
    for options, saying in (
        (["--real", "--sigma", "10", "--model", blind], f"^error: sigma: 10, {blind_to}; accepted: none"),
        (["--estimate", "--model", blind], f"^error: estimate: given, {blind_to}; accepted: a model that takes one"),
        (["--real", "--estimate", "--model", blind], f"^error: estimate: given, {blind_to}"),
        (["--real", "--seed", "0", "--model", model], "^error: seed: given with --real, which adds no noise"),
    ):
        fails("eval", tmp_path, *options, saying=saying)
    network = load_network(blind)
    with pytest.raises(ValueError, match="sigma: 10, but this model is blind"):
        evaluation.evaluate_pairs(tmp_path, network, [10.0])
    with pytest.raises(ValueError, match="estimate: given, but this model is blind"):
        evaluation.evaluate_folder(photos, network, [10.0], estimate=True)
    results = tmp_path / "r.json"
    works("eval", tmp_path, "--real", "--model", blind, "--json", results)
    settings = json.loads(results.read_text())["settings"]
    assert (settings["estimate"], settings["seed"]) == (False, None)


def test_out_of_memory_names_no_option_that_it_lacks(photos: Path, model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: Any, **options: Any) -> None:
        raise MemoryError

    monkeypatch.setattr(evaluation, "denoise_pixels", full)
    fails("eval", photos, "--model", model, saying=f"^error: {photos}: out of memory; smaller photographs need less$")
