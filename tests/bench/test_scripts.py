"""The suites for pytest-benchmark, and scripts beside them, as far as they run without a GPU."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import fastden
from fastden.bench import forms
from fastden.ops import backends
from tests.scripts import load

SUITES = (
    *("bottleneck", "concat_conv_bn_relu", "conv_bn_relu", "head", "stem", "upsample"),
    *("batch_norm", "network_input", "weight_gradient", "model", "train", "batch"),
)


def test_every_suite_names_itself(root: Path) -> None:
    assert {path.stem.removeprefix("bench_") for path in (root / "benchmarks").glob("bench_*.py")} == set(SUITES)
    for name in SUITES:
        assert f'SUITE = "{name}"' in (root / "benchmarks" / f"bench_{name}.py").read_text()


@pytest.mark.slow
def test_suites_run(root: Path) -> None:
    files = [f"benchmarks/bench_{name}.py" for name in SUITES if name != "batch"]
    options = ("--image-size", "64x72", "--bench-compare", "eager", "--bench-dtype", "float32")
    command = [sys.executable, "-m", "pytest", *files, "-q", "--benchmark-disable", "-p", "no:cacheprovider", *options]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    done = subprocess.run(
        [*command, "--bench-device", "cpu"], capture_output=True, text=True, env=environment, check=False, cwd=root
    )
    # Eleven places of operators, forward and in training; twelve of those that run in training alone; the step before
    # the network, the network and its training; two contenders each.
    assert f"{2 * (2 * 11 + 12 + 3)} passed" in done.stdout, done.stdout + done.stderr


def test_suites_ask_for_contenders_that_their_jobs_have(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also on a GPU with all backends. Contenders are not built here, which would need it."""
    conftest = load(root / "benchmarks" / "conftest.py")
    options = {"--image-size": "16x24", "--bench-compare": "eager", "--bench-device": "cpu", "--bench-dtype": "float32"}
    every = [backend for backend in backends.BACKENDS if backend.name != "torch"]

    def able(text: object, device: object, dtype: object, training: bool = False) -> tuple[tuple[str, ...], dict]:
        names = [backend.name for backend in every if backend.batch_statistics or not training]
        return ("torch", *names), {}

    monkeypatch.setattr(forms, "choose_backends", able)
    suite = conftest._Suite(SimpleNamespace(getoption=options.__getitem__))
    for name in SUITES:
        text = (root / "benchmarks" / f"bench_{name}.py").read_text()
        for function in re.findall(r"def (test_\w+)", text):
            backward = function == "test_backward"
            pairs = suite.parameters(name, backward or name == "train")
            assert pairs
            for part, contender in pairs:
                assert contender in suite.job(name, part, backward)[1], (name, part)
    suite.folder.cleanup()


def test_small_measures_many_pixels_too(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = load(root / "benchmarks" / "small.py")
    monkeypatch.setattr(script, "comparison", lambda dtype: {})
    rows: dict[str, Any] = {"fastden-torch": {"right": True}}
    jobs = {"256 x 256, 8": (8 * 256 * 256, rows, {"fastden-torch": lambda: time.sleep(0.002)})}
    script.measure(jobs, torch.float32)
    assert rows["fastden-torch"]["median_ms"] >= 2
    assert rows["fastden-torch"]["slower_by"] == 1


def test_level_factor_takes_every_kind_of_picture(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("lightning")
    script = load(root / "benchmarks" / "level_factor.py")
    monkeypatch.setattr(script, "CROP", 12)
    columns = np.arange(40, dtype=np.uint16)[None] * np.ones((32, 1), np.uint16)
    Image.fromarray((6 * columns).astype(np.uint8)).save(tmp_path / "gray.png")
    Image.fromarray(257 * 6 * columns).save(tmp_path / "deep.png")
    Image.new("RGB", (20, 40)).save(tmp_path / "narrow.png")
    taken: list[np.ndarray] = []

    def measure(pairs: Any) -> tuple[np.ndarray, ...]:
        taken.extend(pairs.pictures.images)
        assert pairs[0]["noisy"].shape == (3, 12, 12)
        return np.ones((1, len(script.MULTIPLES))), np.ones(1), np.ones(1)

    monkeypatch.setattr(script, "_measure", measure)
    monkeypatch.setattr("sys.argv", ["level_factor.py", "--data", str(tmp_path)])
    script.main()
    assert len(taken) == 2
    for image in taken:
        np.testing.assert_array_equal(image, np.repeat(6 * columns.astype(np.uint8)[..., None], 3, axis=2))


@pytest.mark.parametrize(
    ("name", "option", "package"),
    [
        ("export_int8", None, "onnxruntime"),
        ("fine_detail", "--data", None),
        ("fp8", None, "lightning"),
        ("int8", "--quality", "lightning"),
        ("int8_parts", "--quality", "lightning"),
        ("level_factor", "--data", "lightning"),
        ("noise_estimates", "--data", None),
        ("real_photos", "--data", None),
        ("textures", "--data", "lightning"),
    ],
)
def test_folders_without_pictures_are_refused(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, option: str | None, package: str | None
) -> None:
    """Before anything is measured, in one line, and what was measured before stays."""
    if package is not None:
        pytest.importorskip(package)
    script = load(root / "benchmarks" / f"{name}.py")
    empty, target = tmp_path / "empty", tmp_path / "a.json"
    empty.mkdir()
    target.write_text("{}")
    for folder in (empty, tmp_path / "missing"):
        command: list[object] = [f"{name}.py", *([] if option is None else [option]), folder, "--json", target]
        if name.startswith("int8"):
            command += ["--calibration", folder]
        monkeypatch.setattr("sys.argv", list(map(str, command)))
        with pytest.raises(SystemExit) as ended:
            script.main()
        assert re.fullmatch(rf"error: .*{folder}.*", str(ended.value.code))
    assert target.read_text() == "{}"


def test_fine_detail_refuses_folders_of_noisy_pictures(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = load(root / "benchmarks" / "fine_detail.py")
    Image.new("RGB", (8, 8)).save(tmp_path / "a_real.png")
    monkeypatch.setattr("sys.argv", ["fine_detail.py", "--data", str(tmp_path)])
    with pytest.raises(SystemExit, match=f"error: data: {tmp_path} has only noisy pictures"):
        script.main()


def test_int8_says_on_which_pictures(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("lightning")
    script = load(root / "benchmarks" / "int8.py")
    for index in range(5):
        Image.new("RGB", (8, 8)).save(tmp_path / f"{index}.png")
    monkeypatch.setattr(script, "_calls", lambda *given: {})
    monkeypatch.setattr(script, "_times", lambda *given: {})
    monkeypatch.setattr(script, "_quality", lambda model, files, *given: [file.name for file in files])
    command = ["int8.py", "--calibration", tmp_path, "--quality", tmp_path, "--every", 2, "--json", tmp_path / "a.json"]
    monkeypatch.setattr("sys.argv", list(map(str, command)))
    script.main()
    (entry,) = json.loads((tmp_path / "a.json").read_text()).values()
    assert (entry["every"], entry["pictures"]) == (2, 3)
    assert entry[tmp_path.name] == ["0.png", "2.png", "4.png"]
    parts = load(root / "benchmarks" / "int8_parts.py")
    monkeypatch.setattr(parts, "_variants", lambda *given: {})
    monkeypatch.setattr(parts, "_scores", lambda pictures, *given: [0.0 for _ in pictures])
    monkeypatch.setattr("sys.argv", ["int8_parts.py", *sys.argv[1:]])
    parts.main()
    document = json.loads((tmp_path / "a.json").read_text())
    assert (document["every"], document["pictures"]) == (2, 3)


def test_int8_parts_leaves_one_part_out_at_a_time(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("lightning")
    script = load(root / "benchmarks" / "int8_parts.py")
    levels: list[tuple[float, ...]] = []
    monkeypatch.setattr(script, "_fast", lambda model, ranges, weights: set(ranges))
    monkeypatch.setattr(script, "central_crops", lambda folders, count: [])
    monkeypatch.setattr(script, "calibrate", lambda model, crops: levels.append(script.calibration.PHOTO_SIGMAS))
    monkeypatch.setattr(script, "fuse", lambda model, quality: None)
    variants = script._variants(fastden.Denoiser.from_pretrained("photo"), [])
    ships, nearest = variants["ships"], variants["nearest"]
    assert {name.split(".")[0] for name in ships - nearest} == {"up", "mean"}
    assert nearest - variants["nearest, whole ranges"] == {"share"}
    assert nearest - variants["nearest, wide image"] == {"image"}
    assert nearest - variants["nearest, whole, wide"] == {"share", "image"}
    assert ([max(one) for one in levels], max(script.calibration.PHOTO_SIGMAS)) == ([40], 75)


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_make_bench_writes_into_a_new_folder(root: Path, tmp_path: Path) -> None:
    """Stand-ins for Python and the command: this one fails, as the command does, if the folder is missing."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").write_text("#!/bin/sh\necho float32 bfloat16\n")
    command = f'for last; do :; done\n[ -d "${{last%/*}}" ] && echo "$@" >>{tmp_path}/log'
    (tmp_path / "bin" / "fastden").write_text(f"#!/bin/sh\n{command}\n")
    for name in ("python", "fastden"):
        (tmp_path / "bin" / name).chmod(0o755)
    for name in (".torch", ".bench"):
        (tmp_path / name).touch()
    results = tmp_path / "results" / "new"
    variables = [f"VENV={tmp_path}", f"RESULTS={results}", "LARGE=", "BENCH_ARGS=--rounds 1"]
    subprocess.run(["make", "-C", root, "bench", *variables], check=True, capture_output=True)
    assert (tmp_path / "log").read_text().splitlines() == [
        f"bench model --device cpu --dtype float32 --rounds 1 --json {results}/float32.json",
        f"bench model --device cpu --dtype bfloat16 --rounds 1 --json {results}/bfloat16.json",
        f"bench train --device cpu --rounds 1 --json {results}/train.json",
    ]
