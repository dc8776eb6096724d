"""Checks of conv3 on a GPU, first those that show a wrong descriptor, swizzle, barrier or wait soonest.

    python benchmarks/first_checks.py one-pixel --backend cuda

one-pixel: 1 x 1 pixels. one-hot: a single tile with weights that are zero but for one tap of one channel each, so that
a result names the tap and channel that is wrong. tiles: 289 tiles, more than a GPU's blocks. large: a 4K image's
features. repeats: a hundred times the same bits. thread: the first work of a fresh thread. graph: captured and
replayed. Exits with 1 where a result is wrong; a hang is for the caller's time limit. Interpreted on a CPU
(``TRITON_INTERPRET=1``) with ``--device cpu``.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor
from torch.nn import functional as F

from fastden import ops

#: Channels of conv3's two sources and of its result.
A, B, OUTPUTS = 128, 32, 256
KERNEL = 3


def features(device: str, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Both sources, channels-last bfloat16."""
    generator = torch.Generator().manual_seed(0)
    shapes = (1, A, height, width), (1, B, height, width)
    a, b = (torch.randn(shape, generator=generator).to(device, torch.bfloat16) for shape in shapes)
    return a.contiguous(memory_format=torch.channels_last), b.contiguous(memory_format=torch.channels_last)


def random_weights(device: str) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(OUTPUTS, A + B, KERNEL, KERNEL, generator=generator) / (KERNEL**2 * (A + B)) ** 0.5
    bias = torch.randn(OUTPUTS, generator=generator)
    return weight.to(device, torch.bfloat16), bias.to(device)


def is_near(device: str, backend: str, height: int, width: int) -> None:
    """The kernel errs at most twice as much as PyTorch's own convolution, relative to float32's."""
    a, b = features(device, height, width)
    weight, bias = random_weights(device)
    result = ops.concat_conv_bn_relu(a, b, weight, bias, backend=backend)
    expected = ops.concat_conv_bn_relu(a.float(), b.float(), weight.float(), bias, backend="torch")
    eager = ops.concat_conv_bn_relu(a, b, weight, bias, backend="torch")
    error, allowed = ((y.float() - expected).abs().max().item() for y in (result, eager))
    unit = torch.finfo(torch.bfloat16).eps * expected.abs().max().item()
    if not error <= 2 * allowed + unit:  # nor where it is NaN
        wrong = ((result.float() - expected).abs() > 2 * allowed + unit).any(1)[0].nonzero()
        raise SystemExit(f"{height}x{width}: errs by {error}, eager by {allowed}; first at {wrong[:4].tolist()}")


def one_hot(device: str, backend: str) -> None:
    """Every tap of every channel, 256 at a time: copies of the sources, bit for bit."""
    a, b = features(device, 8, 16)
    padded = F.pad(torch.cat([a, b], 1), (1, 1, 1, 1))
    taps = [(channel, y, x) for y in range(KERNEL) for x in range(KERNEL) for channel in range(A + B)]
    for first in range(0, len(taps), OUTPUTS):
        chosen = [taps[(first + output) % len(taps)] for output in range(OUTPUTS)]
        weight = torch.zeros(OUTPUTS, A + B, KERNEL, KERNEL)
        for output, tap in enumerate(chosen):
            weight[output][tap] = 1
        result = ops.concat_conv_bn_relu(a, b, weight.to(a), relu=False, backend=backend)
        expected = torch.stack([padded[0, channel, y : y + 8, x : x + 16] for channel, y, x in chosen])
        wrong = [tap for tap, one, two in zip(chosen, result[0], expected, strict=True) if not torch.equal(one, two)]
        if wrong:
            raise SystemExit(f"{len(wrong)} of {OUTPUTS} (channel, row, column) of weights: first {wrong[:4]}")


def repeats(device: str, backend: str) -> None:
    a, b = features(device, 133, 265)
    weight, bias = random_weights(device)
    first = ops.concat_conv_bn_relu(a, b, weight, bias, backend=backend)
    for count in range(1, 100):
        if not torch.equal(ops.concat_conv_bn_relu(a, b, weight, bias, backend=backend), first):
            raise SystemExit(f"call {count} gave other bits than the first")


def thread(device: str, backend: str) -> None:
    with ThreadPoolExecutor(1) as pool:
        pool.submit(is_near, device, backend, 9, 17).result()


def graph(device: str, backend: str) -> None:
    a, b = features(device, 33, 65)
    weight, bias = random_weights(device)
    expected = ops.concat_conv_bn_relu(a, b, weight, bias, backend=backend)
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        y = ops.concat_conv_bn_relu(a, b, weight, bias, backend=backend)
    y.fill_(float("nan"))
    captured.replay()
    torch.cuda.synchronize()
    if not torch.equal(y, expected):
        raise SystemExit("the replayed graph gave other bits")


CHECKS: dict[str, Callable[[str, str], None]] = {
    "one-pixel": lambda device, backend: is_near(device, backend, 1, 1),
    "one-hot": one_hot,
    "tiles": lambda device, backend: is_near(device, backend, 133, 265),
    "large": lambda device, backend: is_near(device, backend, 1080, 1920),
    "repeats": repeats,
    "thread": thread,
    "graph": graph,
}


def main() -> int:
    parser = argparse.ArgumentParser(description="Check conv3 on a GPU, one thing at a time.")
    parser.add_argument("check", choices=CHECKS)
    parser.add_argument("--backend", nargs="+", choices=("triton", "cuda"), default=["triton"])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    arguments = parser.parse_args()
    for backend in arguments.backend:
        CHECKS[arguments.check](arguments.device, backend)
        print(f"{arguments.check}: {backend} is right")
    return 0


if __name__ == "__main__":
    sys.exit(main())
