"""What ``quality="fast"`` on a GPU costs in PSNR: conv3 in fp8 (e4m3), by the reference of ``ops.concat_conv_fp8``.

conv3 is two thirds of the network's products. The ranges are those that ship with the model. The rest of the network is
in float32 on a CPU. How many bits the sums of a GPU keep is not part of this. The file says whether the loss is
accepted (at most 0.02 dB).

    python benchmarks/fp8.py ../shared/data/eval/kodak24 --json benchmarks/results/fp8.json
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from fastden import Denoiser, fuse, ops
from fastden.bench.scripts import command
from fastden.bench.tables import write
from fastden.network.calibrated import calibrated_ranges
from fastden.network.fp8 import conv3_ranges
from fastden.network.fused import FusedDenoiser
from fastden.ops.backends import use_backend
from fastden.training.data import find_photographs, load_rgb

#: Accepted loss, dB.
ACCEPTED = 0.02


def with_noise(path: Path, sigma: float, seed: int) -> tuple[Tensor, Tensor]:
    """A photograph and the same with white noise, (1, 3, H, W) in [0, 1]."""
    clean = torch.from_numpy(load_rgb(path).copy()).permute(2, 0, 1)[None].float() / 255
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(seed))
    return clean, clean + sigma / 255 * noise


def psnr(result: Tensor, clean: Tensor) -> float:
    """PSNR in dB of results rounded to 8 bits."""
    error = ((result.clamp(0, 1) * 255).round() / 255 - clean).square().mean()
    return float(-10 * error.log10())


def in_fp8(network: FusedDenoiser, ranges: Tensor, x: Tensor, level: float) -> Tensor:
    """The network's result with conv3 in fp8, on PyTorch's own operations."""
    conv3 = partial(ops.concat_conv_fp8, ranges=ranges)
    # oneDNN's form would not do: it does not call conv3 by its name.
    with (
        mock.patch.object(ops, "concat_conv_bn_relu", conv3),
        mock.patch.object(network, "_onednn_network", return_value=None),
        use_backend("torch"),
    ):
        return network(x, level)


@torch.inference_mode()
def measure(model: Denoiser, images: list[Path], level: float) -> list[dict[str, Any]]:
    """PSNR of each image with conv3 in float32 and in fp8."""
    network, ranges = fuse(model), conv3_ranges(calibrated_ranges(model))
    rows = []
    for index, path in enumerate(images):
        clean, x = with_noise(path, level, index)
        single, rounded = network(x, level / 255), in_fp8(network, ranges, x, level / 255)
        rows.append({"image": path.name, "float32": psnr(single, clean), "fp8": psnr(rounded, clean)})
    return rows


@command
def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", type=Path, help="folder of clean photographs to measure on")
    parser.add_argument("--model", default="color")
    parser.add_argument("--sigma", type=float, default=25, help="0-255 scale")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    rows = measure(Denoiser.from_pretrained(arguments.model), find_photographs(arguments.images), arguments.sigma)
    means = {name: sum(row[name] for row in rows) / len(rows) for name in ("float32", "fp8")}
    loss = means["float32"] - means["fp8"]
    accepted = "accepted" if loss <= ACCEPTED else "not accepted"
    print(f"{means['float32']:.3f} dB in float32, {means['fp8']:.3f} with conv3 in fp8: {loss:.4f} less, {accepted}")
    if arguments.json is not None:
        document = {
            "command": "python benchmarks/fp8.py",
            "model": arguments.model,
            "images": arguments.images.name,
            "sigma": arguments.sigma,
            "psnr": means,
            "loss_db": loss,
            "accepted_db": ACCEPTED,
            "rows": rows,
        }
        write(arguments.json, document)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
