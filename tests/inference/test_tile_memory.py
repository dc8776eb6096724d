"""The side of tiles and the size of batches follow from the memory that they may take."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from fastden.inference.arguments import parse_memory
from fastden.inference.tiling import (
    BYTES_PER_PIXEL,
    CUDA_BYTES_PER_PIXEL,
    TiledNetwork,
    automatic_tile,
    bytes_per_pixel,
    denoise_tiled,
)
from fastden.network.fused import fuse
from fastden.network.model import Denoiser
from fastden.ops.post_operations import why_not
from tests.helpers import max_error, random_network


def test_automatic_tile_grows_with_memory() -> None:
    fused = fuse(Denoiser())
    sides = [side_for(fused, megabytes << 20) for megabytes in (8, 64, 512, 4096, 1 << 20)]
    assert sides == sorted(sides)
    assert all(side % 4 == 0 for side in sides)
    assert sides[0] < sides[1] < sides[2]
    assert sides[-1] <= 2048
    # Where oneDNN has no bfloat16, that network runs on the operators, which take more.
    half = side_for(fuse(Denoiser(), dtype=torch.bfloat16), 64 << 20)
    assert half > side_for(fused, 64 << 20) if has_onednn("bfloat16") else half < side_for(fused, 64 << 20)
    assert side_for(fuse(Denoiser(), dtype=torch.float64), 64 << 20) < side_for(fused, 64 << 20)


class OnGpu:
    """A network on a GPU, as far as memory goes."""

    noise_level_input = True
    image_channels = 3
    device = torch.device("cuda", 0)

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype

    def forward_padded(self, x: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError


def test_tiles_on_a_gpu_are_larger(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In 16 bits, where it was measured, by a quarter more than any backend took there."""
    assert {side_for(OnGpu(dtype), 1 << 30) for dtype in (torch.bfloat16, torch.float16)} == {1288}
    assert side_for(OnGpu(torch.float32), 1 << 30) == 424
    fused, plain = CUDA_BYTES_PER_PIXEL["operators"], CUDA_BYTES_PER_PIXEL["plain"]
    seen = set()
    for file in (root / "benchmarks" / "results" / "h200").glob("model-[0-9]*.json"):
        document = json.loads(file.read_text())
        assert document["settings"]["dtype"] == "bfloat16"
        pixels = math.prod(document["settings"]["size"]) * document["settings"]["batch"]
        for name, row in document["results"][0]["contenders"].items():
            if name.startswith("fastden-") or name == "eager":
                seen.add(name)
                assert 1.25 * row["peak_mib"] * 2**20 / pixels < (plain if name == "eager" else fused), (file, name)
    assert seen >= {"fastden-torch", "fastden-triton", "fastden-cuda", "eager"}
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert side_for(OnGpu(torch.bfloat16), 1 << 30) == 620


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("form", ["fused", "plain"])
def test_peak_memory_of_a_gpu(dtype: torch.dtype, form: str) -> None:
    model = Denoiser().eval().to("cuda")
    network: Any = fuse(model, dtype) if form == "fused" else model.to(dtype)
    image = torch.zeros(1, 3, 1000, 1200, dtype=torch.uint8)
    denoise_tiled(network, image[..., :64, :64], 0.1, tile=None)  # what libraries keep
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    denoise_tiled(network, image, 0.1, tile=None)
    assert torch.cuda.max_memory_allocated() - before < bytes_per_pixel(network) * image[0, 0].numel()


def has_onednn(dtype: str) -> bool:
    return not why_not(torch.device("cpu"), getattr(torch, dtype))


def side_for(model: TiledNetwork, max_memory: int) -> int:
    return automatic_tile(model, 4000, 6000, 1, max_memory)[0]


def test_small_images_go_together_and_large_ones_alone() -> None:
    fused = fuse(Denoiser())
    assert automatic_tile(fused, 8, 8, 500, 1 << 30)[1] == 500
    assert automatic_tile(fused, 8, 8, 500, 64 << 20)[1] < 100
    assert automatic_tile(fused, 4000, 6000, 4, 64 << 20) == (side_for(fused, 64 << 20), 1)


def test_a_batch_larger_than_memory_is_split() -> None:
    model = random_network(dtype=torch.float64)
    x = torch.rand(7, 3, 9, 12, dtype=torch.float64)
    sigma = torch.linspace(0.01, 0.2, 7, dtype=torch.float64)
    calls: list[int] = []
    y = denoise_tiled(model, x, sigma, max_memory=90 << 20, progress=lambda done, total: calls.append(done))
    assert 1 < len(calls) < 7
    assert calls[-1] == 7 * 9 * 12
    with torch.no_grad():
        assert max_error(y, model(x, sigma)) < 1e-13


def test_automatic_tile_is_exact_too() -> None:
    model = random_network(dtype=torch.float64)
    x = torch.rand(1, 3, 150, 90, dtype=torch.float64)
    calls: list[int] = []
    y = denoise_tiled(model, x, 0.1, max_memory=50 << 20, progress=lambda done, total: calls.append(done))
    assert len(calls) > 1
    with torch.no_grad():
        assert max_error(y, model(x, 0.1)) < 1e-13


def test_memory_may_be_text() -> None:
    model, x = random_network().eval(), torch.rand(1, 3, 20, 24)
    with torch.no_grad():
        expected = denoise_tiled(model, x, 0.1, max_memory=1 << 29)
        assert torch.equal(denoise_tiled(model, x, 0.1, max_memory="512MiB"), expected)


def test_the_smallest_accepted_memory_is_what_the_message_says() -> None:
    fused = fuse(Denoiser())
    with pytest.raises(ValueError, match="at least") as caught:
        automatic_tile(fused, 100, 100, 3, 1000)
    shown = str(caught.value).partition("at least ")[2].removesuffix(" for this model")
    least = parse_memory(shown)
    assert least is not None
    assert automatic_tile(fused, 100, 100, 3, least) == (16, 1)
    with pytest.raises(ValueError, match="max_memory"):
        automatic_tile(fused, 100, 100, 3, least - 2**20 // 100 - 1)  # it is rounded up to a hundredth


PEAK = """
import sys, torch
from fastden.network import onednn
from fastden.network.fused import fuse
from fastden.inference.tiling import denoise_tiled
from fastden.network.model import Denoiser

def peak():  # getrusage's ru_maxrss would start at the peak of the process that started this one
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))

side, form, dtype, max_memory = int(sys.argv[1]), sys.argv[2], getattr(torch, sys.argv[3]), int(sys.argv[4])
torch.set_num_threads(2)
torch.manual_seed(0)
model = Denoiser().eval()
model = fuse(model, dtype=dtype) if form != "plain" else model.to(dtype)
denoise_tiled(model, torch.zeros(1, 3, 64, 64, dtype=torch.uint8), 0.1, tile=None)
# From here on: what imports freed would else be filled before the peak moves.
open("/proc/self/clear_refs", "w").write("5")
before = peak()
image = torch.zeros(1, 3, side, side, dtype=torch.uint8)
denoise_tiled(model, image, 0.1, **({"max_memory": max_memory} if max_memory else {"tile": None}))
print((peak() - before) * 1024 - 2 * image.numel())
"""


def peak(root: Path, side: int, form: str, dtype: str, max_memory: int = 0) -> int:
    """Bytes by which a process grows, beyond the image and the result."""
    command = [sys.executable, "-c", PEAK, str(side), form, dtype, str(max_memory)]
    done = subprocess.run(command, cwd=root, check=True, capture_output=True, text=True)
    return int(done.stdout)


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize(
    ("form", "dtype"),
    [("onednn", "float32"), ("onednn", "bfloat16"), ("operators", "float64"), ("plain", "float32")],
)
def test_peak_memory(form: str, dtype: str, root: Path) -> None:
    """The stated bytes a pixel hold, and ``max_memory`` bounds the process whatever the image's size."""
    if form == "onednn" and not has_onednn(dtype):
        form = "operators"
    claimed = BYTES_PER_PIXEL[form] * getattr(torch, dtype).itemsize / 4
    assert 0.4 * claimed < peak(root, 512, form, dtype) / 512**2 < 1.1 * claimed
    if form == "onednn":
        assert peak(root, 1200, form, dtype, 256 << 20) < 256 << 20
