"""What conv3 in fp8 (e4m3) would cost in PSNR: a reference in PyTorch that rounds as a GPU's products of fp8 would.

conv3 is two thirds of the network's products. Its inputs are rounded to e4m3 with a scale for each channel, found on
training photographs, its weights with a scale for each output; both scales leave the sum as factors, one before the
weights are rounded. Products of e4m3 numbers are exact in float32, and are summed in float32; how many bits the sums of
a GPU keep is not part of this. No kernel does this yet: the file says whether one would be accepted (at most 0.02 dB).

    python benchmarks/fp8.py ../shared/data/eval/kodak24 --calibration ../shared/data/train/free \
        --json benchmarks/results/fp8.json
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fastden import Denoiser, fuse, ops
from fastden.network.fused import FusedDenoiser
from fastden.ops.backends import use_backend
from fastden.training.data import find_photographs, load_rgb

E4M3 = torch.float8_e4m3fn
LARGEST = torch.finfo(E4M3).max
#: Accepted loss, dB.
ACCEPTED = 0.02


def rounded(x: Tensor) -> Tensor:
    """``x`` rounded to e4m3 and clamped to its range, as conversions with saturation do; NaN stays."""
    return x.clamp(-LARGEST, LARGEST).to(E4M3).to(x.dtype)


def conv3_in_fp8(a: Tensor, b: Tensor, weight: Tensor, bias: Tensor, scales: Tensor) -> Tensor:
    """``relu(conv2d(cat([a, b], 1), weight, bias))``, both factors of the products in e4m3.

    Args:
        a: (N, A, H, W), float32.
        b: (N, B, H, W).
        weight: (O, A + B, 3, 3).
        bias: (O,).
        scales: (A + B,): what a channel is divided by before it is rounded.
    """
    x = rounded(torch.cat([a, b], 1) / scales[:, None, None])
    weight = weight * scales[:, None, None]
    outputs = weight.abs().amax((1, 2, 3)).clamp_min(1e-30) / LARGEST
    y = F.conv2d(x, rounded(weight / outputs[:, None, None, None]), padding=1)
    return (y * outputs[:, None, None] + bias[:, None, None]).relu()


class Watched:
    """Stands for ``ops.concat_conv_bn_relu``: notes channels' largest values, or computes in fp8."""

    def __init__(self) -> None:
        self.original = ops.concat_conv_bn_relu
        self.largest: Tensor | None = None
        self.scales: Tensor | None = None

    def __call__(self, a: Tensor, b: Tensor, weight: Tensor, bias: Tensor, **options: Any) -> Tensor:
        if self.scales is not None:
            return conv3_in_fp8(a, b, weight, bias, self.scales)
        largest = torch.cat([a.abs().amax((0, 2, 3)), b.abs().amax((0, 2, 3))])
        self.largest = largest if self.largest is None else torch.maximum(self.largest, largest)
        return self.original(a, b, weight, bias, **options)


def noisy(path: Path, level: float, seed: int, crop: int | None = None) -> tuple[Tensor, Tensor]:
    """A photograph and the same with white noise, (1, 3, H, W) in [0, 1]."""
    clean = torch.from_numpy(load_rgb(path)[:crop, :crop].copy()).permute(2, 0, 1)[None].float() / 255
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(seed))
    return clean, clean + level / 255 * noise


def psnr(result: Tensor, clean: Tensor) -> float:
    """PSNR in dB of results rounded to 8 bits."""
    error = ((result.clamp(0, 1) * 255).round() / 255 - clean).square().mean()
    return float(-10 * error.log10())


def calibrated(network: FusedDenoiser, photographs: list[Path], watched: Watched) -> Tensor:
    """Scales by which the largest value of each channel at three levels of noise becomes e4m3's largest."""
    for index, path in enumerate(photographs):
        for level in (15.0, 25.0, 50.0):
            network(noisy(path, level, index, crop=256)[1], level / 255)
    assert watched.largest is not None
    return watched.largest.clamp_min(1e-6) / LARGEST


def measure(
    network: FusedDenoiser, images: list[Path], photographs: list[Path], level: float
) -> list[dict[str, float | str]]:
    """PSNR of each image with conv3 in float32 and in fp8."""
    watched = Watched()
    ops.concat_conv_bn_relu = watched  # type: ignore[assignment]
    rows: list[dict[str, float | str]] = []
    try:
        # oneDNN's form would not do: it does not call conv3 by its name.
        with torch.inference_mode(), torch.backends.mkldnn.flags(enabled=True), use_backend("torch"):
            network._onednn_network = lambda: None  # type: ignore[method-assign]
            scales = calibrated(network, photographs, watched)
            for index, path in enumerate(images):
                clean, x = noisy(path, level, index)
                watched.scales = None
                single = psnr(network(x, level / 255), clean)
                watched.scales = scales
                rows.append({"image": path.name, "float32": single, "fp8": psnr(network(x, level / 255), clean)})
    finally:
        ops.concat_conv_bn_relu = watched.original
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", type=Path, help="folder of clean photographs to measure on")
    parser.add_argument("--calibration", type=Path, required=True, help="folder of training photographs")
    parser.add_argument("--count", type=int, default=16, help="of them that are used")
    parser.add_argument("--model", default="color")
    parser.add_argument("--sigma", type=float, default=25, help="0-255 scale")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    found = find_photographs(arguments.calibration)
    photographs = found[:: max(1, len(found) // arguments.count)][: arguments.count]
    network = fuse(Denoiser.from_pretrained(arguments.model))
    rows = measure(network, find_photographs(arguments.images), photographs, arguments.sigma)
    means = {name: sum(float(row[name]) for row in rows) / len(rows) for name in ("float32", "fp8")}
    loss = means["float32"] - means["fp8"]
    accepted = "accepted" if loss <= ACCEPTED else "not accepted"
    print(f"{means['float32']:.3f} dB in float32, {means['fp8']:.3f} with conv3 in fp8: {loss:.4f} less, {accepted}")
    if arguments.json is not None:
        document = {
            "command": "python benchmarks/fp8.py",
            "model": arguments.model,
            "images": arguments.images.name,
            "calibration": f"{len(photographs)} of {arguments.calibration.name}",
            "sigma": arguments.sigma,
            "psnr": means,
            "loss_db": loss,
            "accepted_db": ACCEPTED,
            "rows": rows,
        }
        arguments.json.write_text(json.dumps(document, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
