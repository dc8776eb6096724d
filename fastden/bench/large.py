"""A picture that is far larger than a cache: time and peak memory by tiles, in a process of its own.

    python -m fastden.bench.large color float32 4000 6000

A process's peak memory never falls, so each measurement takes a new process.
"""

from __future__ import annotations

import json
import sys
from typing import Any

from fastden.bench.images import SIGMA, photograph
from fastden.bench.processes import run_module
from fastden.bench.timing import seconds, status_mib
from fastden.inference import denoise_tiled
from fastden.network.fused import fuse
from fastden.network.model import Denoiser

#: Height and width: 24 megapixels.
SIZE = (4000, 6000)
#: Height and width of the picture that is denoised first, to pack weights and to bring memory to steady use.
WARM_UP = (512, 768)


def measured(model: str, dtype: str, size: tuple[int, int] = SIZE) -> dict[str, Any]:
    """Run :func:`measure` in a process of its own.

    Args:
        model: name or folder of the network.
        dtype: to compute in, a name of PyTorch's.
        size: height and width, pixels.

    Raises:
        RuntimeError: the process failed.
    """
    done = run_module("fastden.bench.large", model, dtype, *map(str, size))
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise RuntimeError(f"the large picture: exit code {done.returncode}: {last}")
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def measure(model: str, dtype: str, height: int, width: int) -> dict[str, Any]:
    """Seconds and peak resident memory of an 8-bit picture on the CPU, by automatic tiles."""
    import torch

    denoiser = Denoiser.from_pretrained(model)
    network = fuse(denoiser, getattr(torch, dtype))
    sigma = SIGMA if denoiser.noise_level_input else None
    # The picture is repeated as bytes: a float picture of this size would be the peak.
    values = photograph(-(-height // 8), -(-width // 8), channels=denoiser.image_channels)
    part = values.clamp_(0, 1).mul_(255).round_().to(torch.uint8)
    image = part.repeat(1, 1, 8, 8)[:, :, :height, :width].contiguous()
    denoise_tiled(network, image[:, :, : WARM_UP[0], : WARM_UP[1]], sigma)
    before = status_mib("VmHWM")
    elapsed = seconds(lambda: denoise_tiled(network, image, sigma))
    return {
        "height": height,
        "width": width,
        "dtype": dtype,
        "seconds": round(elapsed, 2),
        "megapixels_per_s": round(height * width / 1e6 / elapsed, 3),
        "peak_rss_mib": status_mib("VmHWM"),
        "peak_rss_before_mib": before,
        "result_mib": round(image.nbytes / 2**20),
    }


if __name__ == "__main__":
    name, precision, *sides = sys.argv[1:]
    print(json.dumps(measure(name, precision, int(sides[0]), int(sides[1]))))
