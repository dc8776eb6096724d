"""The demonstration, run as by ``make demo``, but into another folder."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import fastden
from tests.helpers import random_network

COMMAND = Path(sys.executable).with_name("fastden")

pytestmark = pytest.mark.skipif(
    not COMMAND.exists() and shutil.which("fastden") is None, reason="the fastden command is not installed"
)


def run_demo(root: Path, folder: Path, *arguments: str) -> str:
    command = [sys.executable, str(root / "examples" / "demo.py"), "--output", str(folder), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_demo_writes_the_pictures_and_prints_its_figures(root: Path, tmp_path: Path) -> None:
    random_network().eval().save_pretrained(tmp_path / "model")
    output = run_demo(root, tmp_path / "demo", "--model", str(tmp_path / "model"))
    sizes = {path.name: Image.open(path).size for path in (tmp_path / "demo").iterdir()}
    for kind, suffix in (("camera", "jpg"), ("white", "png")):
        assert sizes[f"{kind}-noisy.{suffix}"] == sizes[f"{kind}-denoised.png"] == (451, 300)
        assert sizes[f"{kind}.png"] == (3 * 451 + 4 * 12, 40 + 2 * (300 + 12))
    assert sizes["real-denoised.png"] == (512, 600)
    assert sizes["real.png"] == (2 * 512 + 3 * 12, 40 + 2 * (600 + 12))
    assert re.search(r"A real photograph: level \d", output)
    assert re.search(r"PSNR +20\.2\d dB noisy, +-?\d+\.\d\d dB denoised", output)
    assert re.search(r"denoising \d+\.\d+ s, \d+\.\d+ megapixels a second", output)


def test_demo_of_a_blind_model(root: Path, tmp_path: Path) -> None:
    """It takes no level, not even where the level is known."""
    random_network(noise_level_input=False).eval().save_pretrained(tmp_path / "model")
    output = run_demo(root, tmp_path / "demo", "--model", str(tmp_path / "model"))
    assert "--sigma" not in output
    assert (tmp_path / "demo" / "white.png").exists()


@pytest.mark.skipif("photo" not in fastden.models(), reason="the model photo is not in this checkout")
def test_demo_makes_a_noisy_photograph_clean(root: Path, tmp_path: Path) -> None:
    output = run_demo(root, tmp_path)
    real, denoised = (
        fastden.estimate_noise(np.asarray(Image.open(file).convert("RGB"))).sigma
        for file in (root / "examples" / "photographs" / "hopper.jpg", tmp_path / "real-denoised.png")
    )
    assert denoised < 0.5 * real  # 1.1 of 5.0 stays: the estimator takes texture for noise, too
    camera, white = re.findall(r"PSNR +([\d.]+) dB noisy, +([\d.]+) dB denoised", output)
    assert float(camera[1]) > float(camera[0]) + 5
    assert float(white[1]) > float(white[0]) + 8


def test_demo_stops_with_the_commands_error(root: Path, tmp_path: Path) -> None:
    command = [
        sys.executable,
        str(root / "examples" / "demo.py"),
        "--output",
        str(tmp_path),
        "--model",
        "no such model",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "no such model" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "denoised.png").exists()
