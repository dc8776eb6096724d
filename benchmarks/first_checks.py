"""Checks of conv3 and res3 on a GPU, first those that show a wrong descriptor, swizzle, barrier or wait soonest.

    python benchmarks/first_checks.py one-pixel --backend cuda

one-pixel: 1 x 1 pixels. one-hot: a single tile with weights that are zero but for one tap of one channel each, so that
a result names the tap and channel that is wrong. tiles: 289 tiles, more than a GPU's blocks. large: a 4K image's
features. repeats: a hundred times the same bits. thread: the first work of a fresh thread. graph: captured and
replayed. fp8: conv3 in 8-bit floating point, all of it, and its time, also where a result is wrong; only on the backend
cuda. Exits with 1 where a result is wrong; a hang is for the caller's time limit. Interpreted on a CPU
(``TRITON_INTERPRET=1``) with ``--device cpu``.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from fastden import ops
from fastden.bench.timing import Replay, Stopwatch, interleaved, summary

#: Channels of conv3's two sources and of its result.
A, B, OUTPUTS = 128, 32, 256
KERNEL = 3
#: Sizes at which conv3 in fp8 is checked; the last one is timed. How often calls are repeated,
#: and in how many rounds they are timed.
FP8_SIZES = ((1, 1), (8, 16), (133, 265), (1080, 1920))
FP8_REPEATS, FP8_ROUNDS = 20, 15
#: Channels of res3, and of its reduced maps.
CHANNELS, MIDDLE = 256, 64


class NotChecked(Exception):
    """This GPU does not have what a check is of; the message says why."""


class Inputs(NamedTuple):
    """An operator's features (channels-last bfloat16), weights (bfloat16) and biases (float32)."""

    operator: str
    features: tuple[Tensor, ...]
    weights: tuple[Tensor, ...]
    biases: tuple[Tensor | None, ...]

    def run(self, backend: str) -> Tensor:
        if self.operator == "concat_conv_bn_relu":
            return ops.concat_conv_bn_relu(*self.features, *self.weights, *self.biases, backend=backend)
        (x,), (reduce, conv, expand), (first, second, third) = self.features, self.weights, self.biases
        return ops.bottleneck(x, reduce, conv, expand, biases=(first, second, third), backend=backend)

    def float(self) -> Inputs:
        return self._replace(
            features=tuple(x.float() for x in self.features), weights=tuple(x.float() for x in self.weights)
        )


def random(device: str, seed: int, *shape: int) -> Tensor:
    """Normal numbers, channels-last."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device, torch.bfloat16)
    return x.contiguous(memory_format=torch.channels_last)


def weights_and_bias(device: str, seed: int, *shape: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, generator=generator) / (shape[1] * shape[2] * shape[3]) ** 0.5
    return weight.to(device, torch.bfloat16), torch.randn(shape[0], generator=generator).to(device)


def conv3(device: str, height: int, width: int) -> Inputs:
    weight, bias = weights_and_bias(device, 2, OUTPUTS, A + B, KERNEL, KERNEL)
    sources = random(device, 0, 1, A, height, width), random(device, 1, 1, B, height, width)
    return Inputs("concat_conv_bn_relu", sources, (weight,), (bias,))


def res3(device: str, height: int, width: int) -> Inputs:
    shapes = (MIDDLE, CHANNELS, 1, 1), (MIDDLE, MIDDLE, KERNEL, KERNEL), (CHANNELS, MIDDLE, 1, 1)
    weights, biases = zip(*(weights_and_bias(device, 1 + i, *s) for i, s in enumerate(shapes)), strict=True)
    return Inputs("bottleneck", (random(device, 0, 1, CHANNELS, height, width),), weights, biases)


def both(device: str, height: int, width: int) -> Iterable[Inputs]:
    yield conv3(device, height, width)
    yield res3(device, height, width)


def is_near(device: str, backend: str, height: int, width: int) -> None:
    """The kernels err at most twice as much as PyTorch's own convolutions, relative to float32's."""
    for inputs in both(device, height, width):
        result, eager = inputs.run(backend), inputs.run("torch")
        expected = inputs.float().run("torch")
        error, allowed = ((y.float() - expected).abs().max().item() for y in (result, eager))
        unit = torch.finfo(torch.bfloat16).eps * expected.abs().max().item()
        if not error <= 2 * allowed + unit:  # nor where it is NaN
            wrong = (~((result.float() - expected).abs() <= 2 * allowed + unit)).any(1)[0].nonzero()
            message = f"{inputs.operator}, {height}x{width}: errs by {error}, eager by {allowed}"
            raise SystemExit(f"{message}; first at {wrong[:4].tolist()}")


def one_hot(device: str, backend: str) -> None:
    one_hot_conv3(*conv3(device, 8, 16).features, partial(ops.concat_conv_bn_relu, relu=False, backend=backend))
    one_hot_res3(device, backend)


def one_hot_conv3(a: Tensor, b: Tensor, run: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
    """Every tap of every channel, 256 at a time: copies of the sources (8 x 16 pixels), bit for bit."""
    padded = F.pad(torch.cat([a, b], 1), (1, 1, 1, 1))
    taps = [(channel, y, x) for y in range(KERNEL) for x in range(KERNEL) for channel in range(A + B)]
    for first in range(0, len(taps), OUTPUTS):
        chosen = [taps[(first + output) % len(taps)] for output in range(OUTPUTS)]
        weight = torch.zeros(OUTPUTS, A + B, KERNEL, KERNEL)
        for output, tap in enumerate(chosen):
            weight[output][tap] = 1
        result = run(a, b, weight.to(a))
        expected = torch.stack([padded[0, channel, y : y + 8, x : x + 16] for channel, y, x in chosen])
        wrong = [tap for tap, one, two in zip(chosen, result[0], expected, strict=True) if not torch.equal(one, two)]
        if wrong:
            raise SystemExit(f"{len(wrong)} of {OUTPUTS} (channel, row, column) of weights: first {wrong[:4]}")


def one_hot_res3(device: str, backend: str) -> None:
    """Every tap with every channel: x plus a copy of another channel at another pixel, both rectified, bit for bit."""
    (x,) = res3(device, 8, 16).features
    for case in range(KERNEL**2 * CHANNELS // MIDDLE):
        tap, part = case % KERNEL**2, case // KERNEL**2
        # Which channel of x, of the reduced map and of the convolved map an output takes. Odd steps reach all of them.
        reduced = [(part + CHANNELS // MIDDLE * m) % CHANNELS for m in range(MIDDLE)]
        convolved = [(tap + 3 * m) % MIDDLE for m in range(MIDDLE)]
        expanded = [(part + 7 * m) % MIDDLE for m in range(CHANNELS)]
        reduce, expand = torch.zeros(MIDDLE, CHANNELS, 1, 1), torch.zeros(CHANNELS, MIDDLE, 1, 1)
        conv = torch.zeros(MIDDLE, MIDDLE, KERNEL, KERNEL)
        for m in range(MIDDLE):
            reduce[m, reduced[m]] = conv[m, convolved[m], tap // KERNEL, tap % KERNEL] = 1
        for output in range(CHANNELS):
            expand[output, expanded[output]] = 1
        weights = (reduce.to(x), conv.to(x), expand.to(x))
        result = Inputs("bottleneck", (x,), weights, (None, None, None)).run(backend)
        padded = F.pad(x.relu(), (1, 1, 1, 1))[0, :, tap // KERNEL :, tap % KERNEL :][:, :8, :16]
        chosen = [reduced[convolved[m]] for m in expanded]
        expected = (x[0].float() + padded[chosen].float()).relu().to(x)
        wrong = [o for o, (one, two) in enumerate(zip(result[0], expected, strict=True)) if not torch.equal(one, two)]
        if wrong:
            names = f"tap {tap}, channel {chosen[wrong[0]]} in output {wrong[0]}"
            raise SystemExit(f"bottleneck: {len(wrong)} of {CHANNELS} outputs: first {names}")


def repeats(device: str, backend: str) -> None:
    for inputs in both(device, 133, 265):
        first = inputs.run(backend)
        for count in range(1, 100):
            if not torch.equal(inputs.run(backend), first):
                raise SystemExit(f"{inputs.operator}: call {count} gave other bits than the first")


def thread(device: str, backend: str) -> None:
    with ThreadPoolExecutor(1) as pool:
        pool.submit(is_near, device, backend, 9, 17).result()


def graph(device: str, backend: str) -> None:
    for inputs in both(device, 33, 65):
        expected = inputs.run(backend)
        captured = torch.cuda.CUDAGraph()
        with torch.cuda.graph(captured):
            y = inputs.run(backend)
        y.fill_(float("nan"))
        captured.replay()
        torch.cuda.synchronize()
        if not torch.equal(y, expected):
            raise SystemExit(f"{inputs.operator}: the replayed graph gave other bits")


def fp8(device: str, backend: str) -> None:
    """conv3 in fp8: whether it is right, and its time, which is printed where it is not, too."""
    if device == "cuda" and torch.cuda.get_device_capability() != (9, 0):
        raise NotChecked("this GPU's compute capability is not 9.0")
    wrong = None
    try:
        check_fp8(device, backend)
    except SystemExit as error:
        wrong = error
    if device == "cuda":
        time_fp8(device, backend)
    if wrong is not None:
        raise wrong


def conv3_in_fp8(device: str, height: int, width: int) -> tuple[Inputs, Tensor]:
    """Inputs of conv3, and the ranges of its channels."""
    inputs = conv3(device, height, width)
    return inputs, torch.cat(inputs.features, 1).float().abs().amax((0, 2, 3))


def check_fp8(device: str, backend: str) -> None:
    """Each size, one-hot weights, sums that 14 bits do not hold, and the same bits again."""
    for size in FP8_SIZES:
        inputs, ranges = conv3_in_fp8(device, *size)
        (weight,), (bias,) = inputs.weights, inputs.biases
        tensors = (*inputs.features, weight, bias)
        result = ops.concat_conv_fp8(*tensors, ranges=ranges, backend=backend)
        expected = ops.concat_conv_fp8(*(x.float() for x in tensors), ranges=ranges, backend="torch")
        # Results have 8 bits. Hopper's instruction cuts 33 addends, 32 products and the sum so far, to 13 bits behind
        # the largest exponent. It cuts toward zero, so products of both signs err both ways: by a unit / sqrt(3) each
        # if nothing is known of their bits. From the units of 45 instructions follows a standard deviation of 3.7e-4 at
        # 133 x 265 (emulated). But products have 8 bits, of which large ones lose none: 1.2e-4 are found, and 6.7e-4 at
        # most of 51,200 sums. The bound is 2^-12 of 7.1 there, 1.7e-3.
        wrong = ~((result.float() - expected).abs() <= 2**-8 * expected.abs() + 2**-12 * expected.abs().max())
        if wrong.any():  # where it is NaN, too
            raise SystemExit(f"fp8, {size}: {int(wrong.sum())} wrong, first at {wrong.nonzero()[:4].tolist()}")
        for count in range(1, FP8_REPEATS):
            if not torch.equal(ops.concat_conv_fp8(*tensors, ranges=ranges, backend=backend), result):
                raise SystemExit(f"fp8, {size}: call {count} gave other bits than the first")
    # With steps of 1, these integers are not rounded.
    a, b = (torch.randint(0, 16, (1, channels, 8, 16)).to(device, torch.bfloat16) for channels in (A, B))
    ones = torch.full((A + B,), 448.0, device=device)
    one_hot_conv3(a, b, partial(ops.concat_conv_fp8, ranges=ones, relu=False, backend=backend))
    # The bias takes the first sum away: the rest is below 14 bits of it, and must have been added in float32.
    weight = torch.full((OUTPUTS, A + B, KERNEL, KERNEL), 2.0**-6)
    weight[:, :A, 0, 0] = 448
    bias = torch.full((OUTPUTS,), -448.0 * A, device=device)
    left = ops.concat_conv_fp8(
        torch.ones_like(a), torch.ones_like(b), weight.to(a), bias, ranges=ones, backend=backend
    )[:, :, 1:-1, 1:-1]
    if not (left == (8 * A + 9 * B) * 2.0**-6).all():
        raise SystemExit(f"fp8: sums are not added in float32: {left.unique()[:4].tolist()}")


def time_fp8(device: str, backend: str) -> None:
    """Print the time of conv3 in fp8, its rounding included, beside that in bfloat16, in turn.

    They are timed as ``fastden bench ops`` times operators: replays of CUDA graphs, with a cold L2 cache.
    """
    inputs, ranges = conv3_in_fp8(device, *FP8_SIZES[-1])
    arguments = (*inputs.features, *inputs.weights, *inputs.biases)
    calls = {
        "fp8": Replay(partial(ops.concat_conv_fp8, *arguments, ranges=ranges, backend=backend)),
        "bfloat16": Replay(partial(ops.concat_conv_bn_relu, *arguments, backend=backend)),
    }
    for name, times in interleaved(calls, Stopwatch(torch.device(device)), FP8_ROUNDS).items():
        print(f"conv3 in {name}: {summary(times)['median_ms']:.3f} ms")


CHECKS: dict[str, Callable[[str, str], None]] = {
    "one-pixel": lambda device, backend: is_near(device, backend, 1, 1),
    "one-hot": one_hot,
    "tiles": lambda device, backend: is_near(device, backend, 133, 265),
    "large": lambda device, backend: is_near(device, backend, 1080, 1920),
    "repeats": repeats,
    "thread": thread,
    "graph": graph,
    "fp8": fp8,
}


def main() -> int:
    parser = argparse.ArgumentParser(description="Check conv3 and res3 on a GPU, one thing at a time.")
    parser.add_argument("check", choices=CHECKS)
    parser.add_argument("--backend", nargs="+", choices=("triton", "cuda"), default=["triton"])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    arguments = parser.parse_args()
    for backend in arguments.backend:
        try:
            CHECKS[arguments.check](arguments.device, backend)
        except NotChecked as reason:
            print(f"{arguments.check}: {backend} is not checked: {reason}")
        else:
            print(f"{arguments.check}: {backend} is right")
    return 0


if __name__ == "__main__":
    sys.exit(main())
