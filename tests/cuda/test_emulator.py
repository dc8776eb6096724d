"""The emulator shows faults that a GPU shows by chance: kernels without one of their waits or barriers fail on it."""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from fastden.cuda import build

#: The kernels' functions for ctypes, which knows no exceptions, and the number of the statement that they leave out.
PLAIN = """
#include <exception>
#include "fastden.h"
#include "machine.h"

int left_out = 0;

extern "C" void leave_out(int statement) { left_out = statement; }

extern "C" int shared_bytes_launched() { return fastden::emulator::machine.shared_bytes; }

template <typename Operation, typename Arguments>
int tried(Operation operation, const Arguments& arguments) {
    try {
        return operation(arguments, nullptr).error;
    } catch (const std::exception& error) {
        return -1;
    }
}

extern "C" int run(const fastden::Convolution* arguments) {
    return tried(arguments->b ? fastden::concat_conv_bn_relu : fastden::conv_bn_relu, *arguments);
}

// Copies 16 bytes, or no bytes, from an address that is only a number; -1 if the emulator refuses it.
extern "C" int copy_from(unsigned long long address, bool valid) {
    try {
        fastden::emulator::run(dim3(1), 32, 1024, 1, [=] {
            const void* source = reinterpret_cast<const void*>(address);
            fastden::copy_async(fastden::shared_address(fastden::shared_memory()), source, valid);
            fastden::copy_commit();
            fastden::copy_wait<0>();
        });
        return 0;
    } catch (const std::exception& error) {
        return -1;
    }
}

extern "C" int run_fp8(const fastden::Fp8Convolution* arguments) {
    return tried(fastden::concat_conv_fp8, *arguments);
}

extern "C" int run_bottleneck(const fastden::Bottleneck* arguments) {
    return tried(fastden::bottleneck, *arguments);
}
"""
SOURCES = ("bottleneck.cu", "concat_conv_bn_relu.cu", "concat_conv_fp8.cu", "conv_bn_relu.cu")
#: Waits for the other ring of stages bound how far loads of pixels run ahead of a 3x3 convolution, but not of a 1x1.
POINTWISE = "hopper's convolution: pixels over those in use"
#: The file, and the text whose first statement is left out; any white space stands for a blank. The first of them makes
#: a null pointer instead. A product is a meeting
#: of the emulated warp group, which a GPU does not promise: a missing barrier between two tiles' maps does not show.
NULL_POINTER = "bottleneck: no pixels from a null pointer"
BROKEN = {
    NULL_POINTER: ("bottleneck.cu", "source[pass] = x + (inside[pass]"),
    "convolution: copies that nobody waits for": ("convolution.cuh", "copy_wait<kStages - 2>();"),
    "convolution: a stage overwritten while read": ("convolution.cuh", "__syncthreads(); copy_step();"),
    "convolution: results stored before they are there": ("convolution.cuh", "__syncthreads(); T* y"),
    **{
        f"hopper's convolution: {name}": ("concat_hopper.cuh", text)
        for name, text in {
            "pixels that nobody waits for": "barrier_wait(left.full(), left.parity);",
            "weights that nobody waits for": "barrier_wait(right.full(), right.parity);",
            "pixels over those in use": "barrier_wait(left.empty(), left.parity ^ 1);",
            "weights over those in use": "barrier_wait(right.empty(), right.parity ^ 1);",
            "products that nobody waits for": "group_wait<0>(sums); give_back",
            "stores that nobody waits for": "if (member == 0) tensor_store_wait_read<0>();",
        }.items()
    },
    "fp8: products that nobody waits for": ("concat_hopper.cuh", "group_wait<0>(products);"),
    "fp8: a scale that is not there yet": ("concat_conv_fp8.cu", "__syncthreads();"),
    **{
        f"hopper's bottleneck: {name}": ("bottleneck_hopper.cuh", text)
        for name, text in {
            "weights that nobody waits for": "copy_wait<0>();",
            "pixels that nobody waits for": "barrier_wait(ring.full(), ring.parity);",
            "pixels over those in use": "barrier_wait(ring.empty(), ring.parity ^ 1);",
            "a stage given back in use": "group_wait<1>(sums[0]);",
            "pixels of the other group": "barrier_wait(turn, turn_parity);",
            "products that nobody waits for": "group_wait<0>(sums[block]); give_back();",
            "a map that is not there yet": "meet_at(1 + group, kGroupThreads); }",
            "a factor over one in use": "group_wait<kTileBlocks - 1>(sums[block]); keep_left",
            "a result that nobody waits for": "group_wait<0>(sums[block]); keep_left",
            "a sum that nobody waits for": "group_wait<kTileBlocks - 1>(sums[block]); }",
            "the last sum that nobody waits for": "group_wait<0>(sums[block]); }",
        }.items()
    },
}


class Convolution(ctypes.Structure):
    """``fastden::Convolution``."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("a", "b", "weight", "bias", "residual", "y")),
        *((name, ctypes.c_int) for name in ("dtype", "batch", "height", "width", "channels_a", "channels_b")),
        *((name, ctypes.c_int) for name in ("outputs", "kernel", "stride", "padding")),
        ("relu", ctypes.c_bool),
    ]


class Fp8Convolution(ctypes.Structure):
    """``fastden::Fp8Convolution``."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("a", "b", "weight", "ranges", "bias", "y", "workspace")),
        *(
            (name, ctypes.c_int)
            for name in ("dtype", "batch", "height", "width", "channels_a", "channels_b", "outputs")
        ),
        ("relu", ctypes.c_bool),
    ]


class Bottleneck(ctypes.Structure):
    """``fastden::Bottleneck``."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("x", "reduce", "conv", "expand")),
        *((name, ctypes.c_void_p) for name in ("reduce_bias", "conv_bias", "expand_bias", "y")),
        *((name, ctypes.c_int) for name in ("dtype", "batch", "height", "width", "channels", "middle")),
    ]


@pytest.fixture(scope="module")
def library(root: Path, tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """The kernels and the emulator; ``leave_out(n)`` makes kernels leave out statement n of ``BROKEN``, from 1."""
    toolkit = build.find_toolkit()
    if toolkit is None or shutil.which("g++") is None:
        pytest.skip("the emulator needs g++ and the CUDA toolkit's headers")
    csrc = shutil.copytree(root / "csrc", tmp_path_factory.mktemp("emulator") / "csrc")
    for number, (name, text) in enumerate(BROKEN.values(), 1):
        source = (csrc / name).read_text()
        pattern = r"\s+".join(map(re.escape, text.split()))
        parts = re.split(f"(?={pattern})", source)
        assert len(parts) == 2, (name, text)
        instead = f"if (left_out == {number} && !inside[pass]) source[pass] = nullptr; else "
        left_out = f"if (left_out != {number}) "
        (csrc / name).write_text((instead if text == BROKEN[NULL_POINTER][1] else left_out).join(parts))
    for name in dict.fromkeys(name for name, _ in BROKEN.values()):
        (csrc / name).write_text(f"extern int left_out;\n{(csrc / name).read_text()}")
    (csrc / "plain.cpp").write_text(PLAIN)
    emulator = root / "tests" / "emulator"
    command = ["g++", "-std=c++17", "-O1", "-w", "-fPIC", "-shared", "-DFASTDEN_EMULATED", "-DFASTDEN_HOPPER"]
    command += [f"-I{csrc}", f"-I{emulator}", f"-I{toolkit / 'include'}", "-x", "c++"]
    sources = [*emulator.glob("*.cpp"), csrc / "plain.cpp", *(csrc / name for name in SOURCES)]
    subprocess.run([*command, *map(str, sources), "-o", str(csrc / "library.so")], check=True)
    return ctypes.CDLL(str(csrc / "library.so"))


def is_right(library: ctypes.CDLL, two_sources: bool, kernel: int = 3, outputs: int = 32) -> bool:
    """Whether a small convolution is right; with two sources its tiles and steps fill the kernel's ring twice.

    With two sources it has 256 outputs.
    """
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).bfloat16().contiguous(memory_format=torch.channels_last)

    a, b = draw(2, 64, 9, 20), draw(2, 32, 9, 20) if two_sources else None
    weight = draw(256 if two_sources else outputs, 96 if two_sources else 64, kernel, kernel)
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


def fp8_is_right(library: ctypes.CDLL) -> bool:
    """Whether a small convolution in fp8 is right; no factor is rounded."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        x = torch.randint(-7, 8, shape, generator=generator)
        return x.bfloat16().contiguous(memory_format=torch.channels_last)

    a, b, weight = draw(1, 128, 9, 20), draw(1, 32, 9, 20), draw(256, 160, 3, 3)
    weight[:, 0, 0, 0] = 7
    ranges = torch.full((160,), 448.0)
    expected = F.conv2d(torch.cat([a, b], 1).double(), weight.double(), padding=1).relu()
    y = torch.full_like(expected, float("nan"), dtype=a.dtype, memory_format=torch.channels_last)
    workspace = torch.empty(1 << 20, dtype=torch.uint8)
    pointers = [x.data_ptr() for x in (a, b, weight, ranges)]
    arguments = Fp8Convolution(*pointers, None, y.data_ptr(), workspace.data_ptr(), 1, 1, 9, 20, 128, 32, 256, True)
    if library.run_fp8(ctypes.byref(arguments)):
        return False
    return bool((y.double() - expected).norm() <= 0.01 * expected.norm())  # false where a NaN is


def bottleneck_is_right(library: ctypes.CDLL, middle: int = 64) -> bool:
    """Whether a small bottleneck is right; of 64 reduced channels on Hopper's kernel, of 32 on the portable one."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int, fan_in: int = 1) -> Tensor:
        x = torch.randn(shape, generator=generator) / fan_in**0.5
        return x.bfloat16().contiguous(memory_format=torch.channels_last)

    x = draw(2, 128, 9, 20)
    shapes = (middle, 128, 1, 1), (middle, middle, 3, 3), (128, middle, 1, 1)
    weights = [draw(*shape, fan_in=shape[1] * shape[2] * shape[3]) for shape in shapes]
    reduce, conv, expand = (weight.double() for weight in weights)
    reduced = F.conv2d(x.double(), reduce).relu().bfloat16().double()
    convolved = F.conv2d(reduced, conv, padding=1).relu().bfloat16().double()
    expected = (x.double() + F.conv2d(convolved, expand)).relu()
    y = torch.full_like(x, float("nan"))
    pointers = [tensor.data_ptr() for tensor in (x, *weights)]
    arguments = Bottleneck(*pointers, None, None, None, y.data_ptr(), 1, 2, 9, 20, 128, middle)
    if library.run_bottleneck(ctypes.byref(arguments)):
        return False
    return bool((y.double() - expected).norm() <= 0.01 * expected.norm())  # false where a NaN is


def outcomes(
    library: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch, check: Callable[[ctypes.CDLL], bool], statement: int = 0
) -> list[bool]:
    """Whether results are right without a statement (0: with all), for several orders of threads and copies."""
    library.leave_out(statement)
    found = []
    for seed in range(6):
        monkeypatch.setenv("FASTDEN_EMULATOR_SEED", str(seed))
        found.append(check(library))
    return found


@pytest.mark.parametrize("two_sources", [False, True], ids=["portable", "hopper"])
@pytest.mark.parametrize("kernel", [1, 3])
def test_right_kernels_pass_whatever_the_order_of_threads(
    library: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch, two_sources: bool, kernel: int
) -> None:
    assert all(outcomes(library, monkeypatch, lambda library: is_right(library, two_sources, kernel)))


@pytest.mark.parametrize(
    ("kibibytes", "outputs", "expected"),
    [
        ("228", 128, 4 * 256 * 64),
        ("164", 128, 4 * 256 * 64),
        ("164", 256, 4 * 256 * 64),
        ("100", 128, 3 * 256 * 64),
        ("164", 32, 4 * 160 * 64),
        ("100", 32, 3 * 160 * 64),
        ("100", 64, 4 * 192 * 64),
    ],
)
def test_several_blocks_fit_into_a_multiprocessor(
    library: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch, kibibytes: str, outputs: int, expected: int
) -> None:
    """Two of 128 outputs or three of 32, whatever the number of tiles; where memory is small, with fewer stages.

    A stage has 32 channels of a tile's pixels and of its outputs.
    """
    monkeypatch.setenv("FASTDEN_EMULATED_SHARED_KIB", kibibytes)
    monkeypatch.setenv("FASTDEN_EMULATED_MULTIPROCESSORS", "2")  # 360 pixels would be a tile of 256 for each
    library.leave_out(0)
    assert is_right(library, False, outputs=outputs)
    assert library.shared_bytes_launched() == expected
    assert (expected + 1024) * (3 if outputs == 32 else 2) <= int(kibibytes) * 1024


@pytest.mark.parametrize("multiprocessors", ["1", "2"])
def test_right_bottlenecks_pass_whatever_the_order_of_threads(
    library: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch, multiprocessors: str
) -> None:
    monkeypatch.setenv("FASTDEN_EMULATED_MULTIPROCESSORS", multiprocessors)
    assert all(outcomes(library, monkeypatch, bottleneck_is_right))


@pytest.mark.parametrize("valid", [False, True])
def test_a_copy_takes_a_pointer(library: ctypes.CDLL, valid: bool) -> None:
    """A copy of no bytes, which writes zeros, takes one too: all kernels run on the emulator, and none passes null."""
    values = torch.zeros(64, dtype=torch.int32)
    pointer = (values.data_ptr() + 15) // 16 * 16
    for address, expected in ((pointer, 0), (pointer + 8, -1), (0, -1), (4096, -1), (2**64 - 4096, -1)):
        found = library.copy_from(ctypes.c_ulonglong(address), ctypes.c_bool(valid))
        assert found == expected, hex(address)


def test_the_portable_bottleneck_is_right(library: ctypes.CDLL) -> None:
    library.leave_out(0)
    assert bottleneck_is_right(library, 32)


def test_right_convolutions_in_fp8_pass_whatever_the_order_of_threads(
    library: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert all(outcomes(library, monkeypatch, fp8_is_right))


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_missing_shows(library: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    def check(library: ctypes.CDLL) -> bool:
        if "bottleneck" in name:
            return bottleneck_is_right(library, 32 if name == NULL_POINTER else 64)
        if "fp8" in name:
            return fp8_is_right(library)
        return is_right(library, "hopper" in name, 1 if name == POINTWISE else 3)

    if "bottleneck" in name:
        monkeypatch.setenv("FASTDEN_EMULATED_MULTIPROCESSORS", "1")  # all of its eight tiles for one block
    statement = list(BROKEN).index(name) + 1
    assert not all(outcomes(library, monkeypatch, check, statement))
