"""The emulator shows faults that a GPU shows by chance: kernels without one of their waits or barriers fail on it."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from fastden.cuda import build

#: The kernel's function for ctypes, which knows no exceptions.
PLAIN = """
#include <cstdio>
#include <exception>
#include "fastden.h"

extern "C" int run(const fastden::Convolution* arguments) {
    try {
        const auto operation = arguments->b ? fastden::concat_conv_bn_relu : fastden::conv_bn_relu;
        return operation(*arguments, nullptr).error;
    } catch (const std::exception& error) {
        return -1;
    }
}
"""
#: Waits for the other ring of stages bound how far loads of pixels run ahead of a 3x3 convolution, but not of a 1x1.
POINTWISE = "pixels over those in use"
#: File, the text that is taken out, and whether the convolution has two sources (Hopper's kernel).
BROKEN = {
    "copies that nobody waits for": ("convolution.cuh", "copy_wait<kStages - 2>();", False),
    "a stage overwritten while read": ("convolution.cuh", "__syncthreads();\n        copy_step();", False),
    "results stored before they are there": ("convolution.cuh", "__syncthreads();\n    T* y", False),
    "pixels that nobody waits for": ("concat_conv_bn_relu.cu", "barrier_wait(left.full(), left.parity);", True),
    "weights that nobody waits for": ("concat_conv_bn_relu.cu", "barrier_wait(right.full(), right.parity);", True),
    POINTWISE: ("concat_conv_bn_relu.cu", "barrier_wait(left.empty(), left.parity ^ 1);", True),
    "weights over those in use": ("concat_conv_bn_relu.cu", "barrier_wait(right.empty(), right.parity ^ 1);", True),
    "products that nobody waits for": ("concat_conv_bn_relu.cu", "group_wait<0>(sums);", True),
    "stores that nobody waits for": ("concat_conv_bn_relu.cu", "if (member == 0) tensor_store_wait_read<0>();", True),
}


class Convolution(ctypes.Structure):
    """``fastden::Convolution``."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("a", "b", "weight", "bias", "residual", "y")),
        *((name, ctypes.c_int) for name in ("dtype", "batch", "height", "width", "channels_a", "channels_b")),
        *((name, ctypes.c_int) for name in ("outputs", "kernel", "stride", "padding")),
        ("relu", ctypes.c_bool),
    ]


@pytest.fixture(scope="module")
def compiler(root: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """g++, with the compiled emulator among its inputs."""
    toolkit = build.find_toolkit()
    if toolkit is None or shutil.which("g++") is None:
        pytest.skip("the emulator needs g++ and the CUDA toolkit's headers")
    emulator = root / "tests" / "emulator"
    command = ["g++", "-std=c++17", "-O1", "-w", "-fPIC", "-DFASTDEN_EMULATED", "-DFASTDEN_HOPPER"]
    command += [f"-I{emulator}", f"-I{toolkit / 'include'}"]
    objects = tmp_path_factory.mktemp("emulator")
    subprocess.run([*command, "-c", *map(str, emulator.glob("*.cpp"))], cwd=objects, check=True)
    return [*command, "-shared", *map(str, objects.glob("*.o"))]


def build_from(compiler: list[str], csrc: Path) -> ctypes.CDLL:
    plain = csrc / "plain.cpp"
    plain.write_text(PLAIN)
    sources = [str(plain), str(csrc / "conv_bn_relu.cu"), str(csrc / "concat_conv_bn_relu.cu")]
    library = csrc / "library.so"
    subprocess.run([*compiler, f"-I{csrc}", "-x", "c++", *sources, "-o", str(library)], check=True)
    return ctypes.CDLL(str(library))


def is_right(library: ctypes.CDLL, two_sources: bool, kernel: int = 3) -> bool:
    """Whether a small convolution is right; with two sources its tiles and steps fill the kernel's ring twice."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).bfloat16().contiguous(memory_format=torch.channels_last)

    a, b = draw(2, 64, 9, 20), draw(2, 32, 9, 20) if two_sources else None
    weight = draw(256 if two_sources else 32, 96 if two_sources else 64, kernel, kernel)
    whole = a if b is None else torch.cat([a, b], 1)
    expected = F.conv2d(whole.double(), weight.double(), padding=kernel // 2).relu()
    y = torch.full_like(expected, float("nan"), dtype=a.dtype, memory_format=torch.channels_last)
    arguments = Convolution(
        a.data_ptr(), None if b is None else b.data_ptr(), weight.data_ptr(), None, None, y.data_ptr(),
        1, 2, 9, 20, 64, 32 if two_sources else 0, len(weight), kernel, 1, kernel // 2,
        True,
    )  # fmt: skip
    if library.run(ctypes.byref(arguments)):
        return False
    return bool((y.double() - expected).norm() <= 0.01 * expected.norm())  # false where a NaN is


@pytest.mark.parametrize("two_sources", [False, True], ids=["portable", "hopper"])
def test_right_kernels_pass_whatever_the_order_of_threads(
    root: Path, compiler: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, two_sources: bool
) -> None:
    csrc = shutil.copytree(root / "csrc", tmp_path / "csrc")
    library = build_from(compiler, csrc)
    for seed in range(6):
        monkeypatch.setenv("FASTDEN_EMULATOR_SEED", str(seed))
        assert is_right(library, two_sources, kernel=3 - seed % 2 * 2), f"seed {seed}"


@pytest.mark.parametrize(("file", "removed", "two_sources"), BROKEN.values(), ids=BROKEN)
def test_what_is_missing_shows(
    root: Path, compiler: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str, removed: str,
    two_sources: bool,
) -> None:  # fmt: skip
    csrc = shutil.copytree(root / "csrc", tmp_path / "csrc")
    source = (csrc / file).read_text()
    assert source.count(removed) == 1
    (csrc / file).write_text(source.replace(removed, removed.partition(";")[2]))
    library = build_from(compiler, csrc)
    found = []
    for seed in range(6):
        monkeypatch.setenv("FASTDEN_EMULATOR_SEED", str(seed))
        found.append(is_right(library, two_sources, 1 if removed == BROKEN[POINTWISE][1] else 3))
    assert not all(found)
