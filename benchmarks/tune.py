"""Search tiles, warps and pipeline stages of the Triton kernels on this GPU, and keep what is faster.

Each launch of the network is measured at four sizes of image, from its default on: one setting is moved a step at a
time, and a move stays where the call is right and takes at least 2 % less time. What was found is written to a file for
this compute capability, version of Triton and text of the kernels (``kernels/_tuned.py``), which launches read from
then on; a size that was not searched takes the nearest one's. The file is written after each launch, and a search that
runs out of time keeps what it has; a later one adds to it. Delete the file to have the defaults again.

    python benchmarks/tune.py                                     # inference in bfloat16, at most 9 minutes
    python benchmarks/tune.py --only conv_bn_relu weight_gradient --dtypes bf16 fp16
    python benchmarks/tune.py --dtypes tf32                       # float32 as PyTorch computes it by default
    FASTDEN_TUNED=h100.json python benchmarks/tune.py             # into a file of that name, read under the same name
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from itertools import product
from pathlib import Path
from typing import Any

import torch
from launches import CALLS, DTYPES, Network

from fastden.bench import machine
from fastden.bench.timing import Stopwatch
from fastden.kernels import _tuned
from fastden.kernels._tuned import Request

#: Values of each setting, in order; a setting that is not listed stays.
STEPS: dict[str, tuple[Any, ...]] = {
    "block_m": (16, 32, 64, 128, 256),
    "block_n": (16, 32, 64, 128, 256),
    "block_k": (16, 32, 64, 128),
    "group": (1, 2, 3, 4),
    "warps": (2, 4, 8),
    "stages": (1, 2, 3, 4, 5),
    "programs": (1, 2, 3, 4),
    "fused": (False, True),
    "descriptors": (False, True),
}
#: Height and width of images.
SIZES = ((2160, 3840), (1080, 1920), (512, 768), (256, 256))
#: Operators of inference; the others are of training.
OPERATORS = ("bottleneck", "concat_conv_bn_relu", "conv_bn_relu", "head", "stem", "upsample")
#: A move stays where it takes at most this share of the time before.
GAIN = 0.98

Timer = Callable[[Callable[[], Any]], float]


def neighbours(config: Any) -> Iterator[Any]:
    """Configurations that differ from ``config`` by a step of one setting."""
    for field in fields(config):
        steps = STEPS.get(field.name, ())
        value = getattr(config, field.name)
        if value not in steps:
            continue
        position = steps.index(value)
        for other in (position + 1, position - 1):
            if 0 <= other < len(steps):
                yield replace(config, **{field.name: steps[other]})


def is_right(results: Any, expected: Any) -> bool:
    """Whether a call's results differ from those of the default by no more than the dtype's rounding."""
    results, expected = ((one,) if isinstance(one, torch.Tensor) else one for one in (results, expected))
    for one, other in zip(results, expected, strict=True):
        error = (one.double() - other.double()).norm() / other.double().norm().clamp_min(1e-30)
        if not error <= 4 * torch.finfo(one.dtype).eps:  # nor where it is NaN
            return False
    return True


def search(
    request: Request, default: Any, call: Callable[[], Any], timer: Timer, deadline: float
) -> tuple[Any, dict[str, float]]:
    """The fastest right configuration that steps from ``default`` lead to, and its time beside the default's.

    Args:
        request: which of the launches of ``call`` is moved.
        default: its configuration.
        call: runs it.
        timer: milliseconds of a call.
        deadline: of ``time.monotonic()``, after which nothing more is tried.
    """

    def measured(config: Any) -> float | None:
        with _tuned.trial({request: config}):
            try:
                if not is_right(call(), expected):
                    return None
            except Exception as error:  # too much shared memory, no such tile, ...
                print(f"  {config}: {type(error).__name__}", file=sys.stderr)
                return None
            return timer(call)

    with _tuned.trial():
        expected = call()
    first = measured(default)
    if first is None:
        raise ValueError(f"{request}: its default fails")
    best, best_ms, tried = default, first, {default}
    moved = True
    while moved:
        moved = False
        for config in neighbours(best):
            if time.monotonic() > deadline:
                return best, {"ms": best_ms, "default_ms": first}
            if config in tried:
                continue
            tried.add(config)
            taken = measured(config)
            if taken is not None and taken < GAIN * best_ms:
                best, best_ms, moved = config, taken, True
                break
    return best, {"ms": best_ms, "default_ms": first}


@contextmanager
def products(dtype: str) -> Iterator[None]:
    """In the ``with`` block, products of float32 are in TF32 if ``dtype`` is tf32, and only then."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = dtype == "tf32"
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


def tune(
    operators: list[str],
    dtypes: list[str],
    sizes: list[tuple[int, int]],
    device: torch.device,
    timer: Timer,
    deadline: float,
    keep: Callable[[dict[Request, tuple[Any, dict[str, float]]]], None],
) -> dict[Request, tuple[Any, dict[str, float]]]:
    """Search every launch of the operators; ``keep`` is handed all that was found so far, after each."""
    found: dict[Request, tuple[Any, dict[str, float]]] = {}
    for size, dtype in product(sizes, dtypes):
        with products(dtype):
            for operator in operators:
                network = Network(DTYPES[dtype], 1, size[0] // 2, size[1] // 2, str(device))
                for name, call in CALLS[operator](network).items():
                    if time.monotonic() > deadline:
                        return found
                    with _tuned.trial() as asked:
                        call()
                    for request, default in asked.asked.items():
                        if request in found:
                            continue
                        config, times = search(request, default, call, timer, deadline)
                        found[request] = (config, times)
                        keep(found)
                        share = times["ms"] / times["default_ms"]
                        print(f"{size[0]}x{size[1]} {operator} {name} {dtype}: {share:.2f} of the default, {config}")
    return found


class MedianTimer:
    """Milliseconds of a call with cold caches: the median of ``repeats`` after one that is not counted."""

    def __init__(self, device: torch.device, repeats: int) -> None:
        self.stopwatch, self.repeats = Stopwatch(device), repeats

    def __call__(self, call: Callable[[], Any]) -> float:
        self.stopwatch(call)
        return statistics.median(self.stopwatch(call) for _ in range(self.repeats))


def main() -> int:
    parser = argparse.ArgumentParser(description="Search configurations of the Triton kernels on this GPU.")
    parser.add_argument("--only", nargs="+", choices=CALLS, default=list(OPERATORS))
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["bf16"])
    parser.add_argument("--size", type=int, nargs=2, action="append", help="height and width of an image; repeatable")
    parser.add_argument("--budget", type=float, default=540, help="seconds")
    parser.add_argument("--repeats", type=int, default=10, help="timed calls of a configuration")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu interprets, for a test")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    capability = _tuned.capability(torch.cuda.current_device() if device.type == "cuda" else None)
    file = _tuned.path(capability)
    sizes = [tuple(size) for size in arguments.size] if arguments.size else list(SIZES)
    about = {"command": "python benchmarks/tune.py", "machine": machine.describe(device)}

    def keep(found: dict[Request, tuple[Any, dict[str, float]]]) -> None:
        _tuned.write(Path(file), found, capability=capability, **about)

    timer, deadline = MedianTimer(device, arguments.repeats), time.monotonic() + arguments.budget
    with machine.steady_settings(device):
        found = tune(arguments.only, arguments.dtypes, sizes, device, timer, deadline, keep)
    print(f"{len(found)} launches in {file}")
    return 0 if found else 1


if __name__ == "__main__":
    sys.exit(main())
