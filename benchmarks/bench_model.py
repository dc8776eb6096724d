"""Speed of the whole network on one device: each backend beside eager PyTorch and torch.compile; also in training.

All contenders run the same weights on the same input in one run, in turn, round after round; the median counts.
Before each timed call the L2 cache is overwritten, on a GPU. Each result is compared with the float32 reference first:
one that errs more than twice as much as eager PyTorch in the same dtype gets no ratio. The machine's own matrix rate
and copy bandwidth are measured beside them.

    python benchmarks/bench_model.py --size 2160 3840 --dtype bfloat16 --json benchmarks/results/model-2160.json
    python benchmarks/bench_model.py --train --batch 64 --size 128 128
    python benchmarks/bench_model.py --size 64 96 --rounds 2 --contenders eager channels-last     # a CPU can do it too
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import fastden
from fastden.backends import use_backend

SIGMA = 25 / 255
TOLERANCE = 2.0
#: Multiply-accumulates a pixel of the composed network with noise-level input, and of the plain one.
COMPOSED_MACS, PLAIN_MACS = 142_092, 222_144
CONTENDERS = ("triton", "torch", "eager", "channels-last", "compile", "max-autotune")

Step = Callable[[], Tensor]


def inference(name: str, model: fastden.Denoiser, x: Tensor, dtype: torch.dtype) -> Step:
    """One call of the network under ``name``; fastden's own forms are fused."""
    if name in ("triton", "torch"):
        fused = fastden.fuse(model, dtype=dtype)

        def fast() -> Tensor:
            with torch.no_grad(), use_backend(name):
                return fused(x, SIGMA)

        return fast
    network: nn.Module = copy.deepcopy(model).to(dtype)
    source = x.to(dtype)
    if name != "eager":
        network, source = network.to(memory_format=torch.channels_last), source.to(memory_format=torch.channels_last)
    if name in ("compile", "max-autotune"):
        network = torch.compile(network, mode="max-autotune" if name == "max-autotune" else None)  # type: ignore[assignment]

    def plain() -> Tensor:
        with torch.no_grad():
            return network(source, SIGMA)

    return plain


def training(name: str, model: fastden.Denoiser, x: Tensor, dtype: torch.dtype) -> Step:
    """One step, forward and backward, in batch statistics; the optimiser is the same for all and left out."""
    network = copy.deepcopy(model).train()
    network.composed = name in ("triton", "torch")
    source = x
    if name != "eager":
        network, source = network.to(memory_format=torch.channels_last), x.to(memory_format=torch.channels_last)
    run: Any = network
    if name in ("compile", "max-autotune"):
        run = torch.compile(network, mode="max-autotune" if name == "max-autotune" else None)

    def step() -> Tensor:
        network.zero_grad(set_to_none=True)
        with torch.autocast(x.device.type, dtype, enabled=dtype != torch.float32):
            if name == "triton":
                with use_backend("triton"):
                    y = run(source, SIGMA)
            else:
                y = run(source, SIGMA)
        loss = (y.float() - source).square().mean()
        loss.backward()
        return torch.stack([parameter.grad.norm() for parameter in network.parameters() if parameter.grad is not None])

    return step


def milliseconds(step: Step, device: torch.device, cold: Tensor) -> float:
    """Time of one call that finds the L2 cache full of something else."""
    if device.type != "cuda":
        start = time.perf_counter()
        step()
        return 1e3 * (time.perf_counter() - start)
    cold.zero_()
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    step()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end)


def ceilings(device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """The machine's matrix rate in ``dtype``, TFLOP/s, and its copy bandwidth, GB/s (read and written)."""
    side, copies = (8192, 1 << 28) if device.type == "cuda" else (2048, 1 << 24)
    a = torch.randn(side, side, device=device, dtype=dtype)
    source = torch.empty(copies, device=device, dtype=torch.uint8)
    target = torch.empty_like(source)
    cold = torch.empty(1, device=device)
    product = statistics.median(milliseconds(lambda: a @ a, device, cold) for _ in range(10))
    copied = statistics.median(milliseconds(lambda: target.copy_(source), device, cold) for _ in range(10))
    return {"tflops": 2e-9 * side**3 / product, "gigabytes_a_second": 2e-6 * copies / copied}


def clocks() -> dict[str, Any]:
    """Clock, power, temperature and throttling of the first GPU; empty without NVML."""
    try:
        import pynvml

        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByIndex(0)
        return {
            "sm_clock_mhz": pynvml.nvmlDeviceGetClockInfo(handle, pynvml.NVML_CLOCK_SM),
            "power_w": pynvml.nvmlDeviceGetPowerUsage(handle) / 1000,
            "temperature_c": pynvml.nvmlDeviceGetTemperature(handle, pynvml.NVML_TEMPERATURE_GPU),
            "throttle_reasons": pynvml.nvmlDeviceGetCurrentClocksThrottleReasons(handle),
        }
    except Exception as error:  # a machine without an NVIDIA GPU, or without the package
        return {"none": f"{type(error).__name__}: {error}"}


def relative_error(result: Tensor, reference: Tensor) -> float:
    return float((result.double() - reference.double()).norm() / reference.double().norm())


def main() -> None:
    parser = argparse.ArgumentParser(description="Speed of the whole network beside PyTorch's own.")
    parser.add_argument("--size", nargs=2, type=int, default=[2160, 3840], metavar=("HEIGHT", "WIDTH"))
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="bfloat16")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--train", action="store_true", help="a training step instead of inference")
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=list(CONTENDERS))
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    device, dtype = torch.device(arguments.device), getattr(torch, arguments.dtype)
    model = fastden.Denoiser.from_pretrained("color").to(device)
    x = torch.rand(arguments.batch, 3, *arguments.size, device=device)
    make = training if arguments.train else inference
    megapixels = arguments.batch * arguments.size[0] * arguments.size[1] / 1e6
    # The reference is float32 with nothing reduced, in rows that fit memory; eager's own error in dtype sets the bound.
    torch.backends.cudnn.allow_tf32 = False
    reference = make("eager", model, x, torch.float32)()
    bound = TOLERANCE * max(relative_error(make("eager", model, x, dtype)(), reference), 1e-6)
    cold = torch.empty(1 << 28 if device.type == "cuda" else 1, dtype=torch.uint8, device=device)
    steps: dict[str, Step] = {}
    found: dict[str, dict[str, Any]] = {}
    for name in arguments.contenders:
        try:
            steps[name] = make(name, model, x, dtype)
            error = relative_error(steps[name](), reference)
        except Exception as failure:  # one contender's failure must not take the others' results along
            steps.pop(name, None)
            found[name] = {"failed": f"{type(failure).__name__}: {str(failure).splitlines()[0]}"}
            continue
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            steps[name]()
        found[name] = {"error": error, "right": error <= bound}
        if device.type == "cuda":
            found[name]["peak_mib"] = round(torch.cuda.max_memory_allocated() / 2**20)
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(arguments.rounds):
        for name, step in steps.items():
            step()
            times[name].append(milliseconds(step, device, cold))
    limits = ceilings(device, dtype)
    own = next((name for name in ("triton", "torch") if found.get(name, {}).get("right")), None)
    table = Table("contender", "ms", "ms / MP", "images / s", "share of matrix rate", "slower by", "error")
    for name, row in found.items():
        if "failed" in row:
            table.add_row(name, row["failed"])
            continue
        row["ms"] = statistics.median(times[name])
        row["ms_a_megapixel"] = row["ms"] / megapixels
        macs = (COMPOSED_MACS if name in ("triton", "torch") else PLAIN_MACS) * (3 if arguments.train else 1)
        row["tflops"] = 2e-3 * macs * megapixels / row["ms"]
        row["share_of_matrix_rate"] = row["tflops"] / limits["tflops"]
        if own and row["right"]:
            row["slower_by"] = row["ms"] / statistics.median(times[own])
        table.add_row(
            name,
            f"{row['ms']:.3f}",
            f"{row['ms_a_megapixel']:.3f}",
            f"{1e3 * arguments.batch / row['ms']:.1f}",
            f"{100 * row['share_of_matrix_rate']:.0f} %",
            f"{row['slower_by']:.2f} x" if "slower_by" in row else "wrong result",
            f"{row['error']:.1e}",
        )
    Console(width=120).print(table)
    document = {
        "command": "python benchmarks/bench_model.py",
        "settings": {key: str(value) if isinstance(value, Path) else value for key, value in vars(arguments).items()},
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "torch": torch.__version__,
        "ceilings": limits,
        "error_bound": bound,
        "clocks_after": clocks(),
        "contenders": found,
        "milliseconds": times,
    }
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
