"""Programs of torch.export and packages of AOTInductor."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import fastden
from fastden.exports.programs import Program
from fastden.exports.weights import collect
from fastden.network.model import Denoiser
from tests.helpers import random_network


def test_a_program_without_fastden(tmp_path: Path) -> None:
    path = fastden.export("color", tmp_path / "color.pt2")
    program = torch.export.load(path)
    named = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert not [name for name in named if "fastden" in name]
    model, network = Denoiser.from_pretrained("color"), program.module()
    for batch, height, width in ((1, 1, 1), (1, 7, 5), (2, 33, 47), (3, 40, 40)):
        image, level = torch.rand(batch, 3, height, width), 0.3 * torch.rand(batch, 1, height, width)
        with torch.no_grad():
            assert (network(image, level) - model(image, level)).abs().max() < 1e-5


@pytest.mark.parametrize("level", [True, False])
def test_a_program_takes_every_size(tmp_path: Path, level: bool) -> None:
    """All remainders of 4: it failed where one of the sides is 2 more than a multiple of 4."""
    path = fastden.export("color", tmp_path / "color.pt2", sigma=None if level else 25.5)
    model, network = Denoiser.from_pretrained("color"), torch.export.load(path).module()
    for height in (1, 2, 10, 11, 12, 13):
        for width in (1, 2, 6, 7, 8, 9, 34):
            image, sigma = torch.rand(2, 3, height, width), torch.full((2, 1, height, width), 0.1)
            with torch.no_grad():
                y = network(image, sigma) if level else network(image)
                assert y.shape == image.shape
                assert (y - model(image, 0.1)).abs().max() < 1e-5


@pytest.mark.parametrize("composed", [True, False])
@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16, torch.float16])
def test_defaults_of_others_do_not_matter(tmp_path: Path, composed: bool, default: torch.dtype) -> None:
    """A default device or dtype that a program chose for itself."""
    torch.set_default_dtype(default)
    try:
        with torch.device("meta"):
            weights = collect(Denoiser.from_pretrained("color"), composed=composed)
            path = fastden.export("color", tmp_path / "color.pt2", composed=composed)
    finally:
        torch.set_default_dtype(torch.float32)
    assert {value.device.type for pair in weights.pairs.values() for value in pair} == {"cpu"}
    image, level = torch.rand(1, 3, 20, 24), torch.full((1, 1, 20, 24), 0.1)
    with torch.no_grad():
        wanted = Denoiser.from_pretrained("color")(image, level)
        assert (torch.export.load(path).module()(image, level) - wanted).abs().max() < 1e-5


def test_exports_draw_no_random_numbers(tmp_path: Path) -> None:
    before = torch.get_rng_state()
    fastden.export("color", tmp_path / "color.pt2")
    fastden.export("color", tmp_path / "color.onnx")
    assert torch.equal(torch.get_rng_state(), before)


def test_layers_without_biases() -> None:
    """The plain form takes what the composed one takes."""
    model = random_network(noise_level_input=True)
    model.conv1.conv.bias, model.conv1.bn = None, nn.BatchNorm2d(model.conv1.bn.num_features, affine=False)
    model.eval()
    image = torch.rand(1, 3, 20, 24)
    for composed in (True, False):
        program = Program(collect(model, composed=composed, level=0.1)).eval()
        with torch.no_grad():
            wanted = model(image, 0.1)
            assert (program(image) - wanted).abs().max() < 1e-5 * wanted.abs().max()


def test_composed_does_less() -> None:
    model = Denoiser.from_pretrained("color")
    counts = []
    for composed in (True, False):
        program = Program(collect(model, composed=composed, level=0.1))
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            program(torch.rand(1, 3, 254, 254))
        counts.append(counter.get_total_flops() / 2 / 254**2)
    # The layers' sizes give 221 thousand multiply-accumulates a pixel, and 146 composed, plus up to 2 % for padding.
    # The latter counts all 16 taps of the head's kernels, though each phase uses 9.
    assert 145e3 < counts[0] < 149e3
    assert 220e3 < counts[1] < 225e3


def built_example(root: Path, folder: Path) -> Path:
    """The program of ``examples/aoti``, or skip."""
    if shutil.which("cmake") is None or shutil.which("c++") is None:
        pytest.skip("no cmake or no C++ compiler")
    build = folder / "build"
    prefix = f"-DCMAKE_PREFIX_PATH={torch.utils.cmake_prefix_path}"
    for command in (["cmake", "-S", root / "examples" / "aoti", "-B", build, prefix], ["cmake", "--build", build]):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
    return build / "denoise"


@pytest.mark.slow
@pytest.mark.skipif("FASTDEN_TEST_AOTI" not in os.environ, reason="takes minutes; FASTDEN_TEST_AOTI=1 runs it")
def test_mistakes_of_the_example_in_cpp(tmp_path: Path, root: Path) -> None:
    program, picture = built_example(root, tmp_path), tmp_path / "noisy.ppm"

    def said(header: str, sigma: str) -> tuple[int, str]:
        picture.write_bytes(header.encode() + bytes(12))
        words = [program, tmp_path / "missing.pt2", picture, tmp_path / "clean.ppm", sigma]
        done = subprocess.run(words, capture_output=True, text=True, check=False)
        return done.returncode, done.stderr

    for sigma in ("abc", "", "25x", "-1", "76", "nan", "1e999"):
        assert said("P6\n2 2\n255\n", sigma) == (2, f"SIGMA: {sigma}; accepted: a number from 0 to 75\n")
    for size in ("-2 2", "2 0", "2 4000000"):
        code, text = said(f"P6\n{size}\n255\n", "25")
        assert code == 1
        assert f"{size.replace(' ', ' x ')} pixels; accepted: sides of 1 to 1048576" in text
    code, text = said("P6\n2 2\n255\n", "25")  # the package is missing
    assert code == 1
    assert "missing.pt2" in text


@pytest.mark.slow
@pytest.mark.skipif("FASTDEN_TEST_AOTI" not in os.environ, reason="takes minutes; FASTDEN_TEST_AOTI=1 runs it")
def test_a_compiled_package_in_python_and_cpp(tmp_path: Path, root: Path) -> None:
    package = fastden.export("color", tmp_path / "color.pt2", format="aoti")
    model, network = Denoiser.from_pretrained("color"), torch._inductor.aoti_load_package(str(package))
    for batch, height, width in ((1, 1, 1), (1, 7, 5), (2, 33, 47), (3, 40, 40)):
        image, level = torch.rand(batch, 3, height, width), 0.3 * torch.rand(batch, 1, height, width)
        with torch.no_grad():
            assert (network(image, level) - model(image, level)).abs().max() < 1e-5
    program = built_example(root, tmp_path)
    header = b"P6\n50 37\n255\n"
    picture = np.random.default_rng(0).integers(0, 256, (37, 50, 3), np.uint8)
    (tmp_path / "noisy.ppm").write_bytes(header + picture.tobytes())
    files = [package, tmp_path / "noisy.ppm", tmp_path / "clean.ppm"]
    done = subprocess.run([program, *files, "25"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    written = (tmp_path / "clean.ppm").read_bytes()
    assert written.startswith(header)
    clean = np.frombuffer(written[len(header) :], np.uint8).reshape(picture.shape)
    assert np.abs(clean.astype(int) - fastden.denoise(picture, 25, dtype="float32")).max() <= 1
    (tmp_path / "noisy.ppm").write_bytes(b"P6\n50 37\n255\n short")
    done = subprocess.run([program, *files, "25"], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "ends too early" in done.stderr
