"""How an operator calls CUDA's runtime and driver: its own code, compiled by nvcc, on a runtime that does nothing."""

from __future__ import annotations

import ctypes
import itertools
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import pytest

from fastden.cuda import build

#: CUDA_ERROR_NOT_PERMITTED, which tests/cuda/runtime.cpp names so.
NOT_PERMITTED = 800
LAUNCH_FAILURE = "719"


@pytest.fixture(scope="module")
def library(root: Path, tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    toolkit = build.find_toolkit()
    if toolkit is None:
        pytest.skip("nvcc is not found")
    target = tmp_path_factory.mktemp("runtime") / "library.so"
    options = ("-std=c++17", "--expt-relaxed-constexpr", "-DFASTDEN_HOPPER", "-cudart=none")
    sources = (root / "tests" / "cuda" / "runtime.cpp", root / "csrc" / "concat_conv_bn_relu.cu")
    options += ("-gencode=arch=compute_90a,code=compute_90a",)  # no binary code: quicker, and nothing runs it
    own = ("-Xlinker", "-Bsymbolic")  # else calls go to the runtime that PyTorch's CUDA builds have loaded
    command = [f"{toolkit}/bin/nvcc", *options, "-Xcompiler", "-fPIC", "-shared", *own, f"-I{root / 'csrc'}", *sources]
    subprocess.run([*command, "-o", target], check=True)
    loaded = ctypes.CDLL(str(target))
    loaded.concat.restype = ctypes.c_char_p
    return loaded


#: Each run has a device of its own, of which nothing is known.
DEVICES = itertools.count(1)


def run(
    library: ctypes.CDLL, fails: str = "", driver_error: int = 0, kernel: int = 3, size: tuple[int, int] = (133, 265),
    device: int | None = None,
) -> str:  # fmt: skip
    library.use_device(next(DEVICES) if device is None else device)
    return str(library.concat(fails.encode(), driver_error, kernel, *size).decode())


CALLS = (
    "cudaGetDevice",
    "cudaDeviceGetAttribute",
    "cudaSetDevice",
    "cudaFuncSetAttribute",
    "cudaOccupancyMaxActiveClusters",
    "cudaLaunchKernelExC",
)


@pytest.mark.parametrize("call", CALLS)
def test_no_error_is_left_behind(library: ctypes.CDLL, call: str) -> None:
    """The runtime keeps its last error until a call asks for it; PyTorch would take it for its own launch's."""
    assert run(library, fails=call) == LAUNCH_FAILURE
    assert library.left_behind() == 0


def test_a_context_is_current_before_the_driver_is_asked(library: ctypes.CDLL) -> None:
    """A fresh thread, whose first work on the GPU this is, has none."""
    assert run(library) == ""


def test_the_drivers_error_has_its_name(library: ctypes.CDLL) -> None:
    assert run(library, driver_error=NOT_PERMITTED) == "CUDA_ERROR_NOT_PERMITTED"


def test_as_many_clusters_as_the_device_runs_at_once(library: ctypes.CDLL) -> None:
    """The runtime allows 3 clusters of 2 blocks, fewer than half of 132 multiprocessors; a small image takes fewer."""
    assert run(library) == ""
    assert library.blocks_launched() == 2 * 3
    assert run(library, size=(8, 16)) == ""
    assert library.blocks_launched() == 2 * 1


def test_the_runtime_is_asked_once_for_each_device(library: ctypes.CDLL) -> None:
    """What failed is asked again. The host's part of a launch decides at small images."""
    one, other = next(DEVICES), next(DEVICES)
    before = library.asked()
    for device, asked in ((one, 2), (one, 2), (other, 4), (one, 4), (other, 4)):
        assert run(library, device=device) == ""
        assert library.blocks_launched() == 2 * 3
        assert library.asked() - before == asked
    again = next(DEVICES)
    for call in ("cudaFuncSetAttribute", "cudaOccupancyMaxActiveClusters"):
        assert run(library, fails=call, device=again) == LAUNCH_FAILURE
    assert run(library, device=again) == ""
    assert library.blocks_launched() == 2 * 3


def test_threads_may_launch_at_the_same_time(library: ctypes.CDLL) -> None:
    """The first launches on a device come from all threads at once, and one of them asks."""
    before = library.asked()
    assert run(library) == ""
    once = library.asked() - before
    assert once > 0
    with ThreadPoolExecutor(8) as pool:
        for _ in range(50):
            library.use_device(next(DEVICES))
            ready, before = Barrier(8), library.asked()

            def launch(_: int, ready: Barrier = ready) -> int:
                ready.wait(60)
                return int(library.launch_again())

            assert list(pool.map(launch, range(8))) == [0] * 8
            assert library.asked() - before == once


def test_limits_are_named(library: ctypes.CDLL) -> None:
    assert run(library, kernel=6) == "kernel: accepted up to 5"
    assert run(library, kernel=2, size=(70_000, 40_000)) == "pixels: accepted up to 2^31"
