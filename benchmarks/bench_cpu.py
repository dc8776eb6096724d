"""Speed of the fused network on this CPU beside eager PyTorch, torch.compile, OpenVINO and ONNX Runtime.

All contenders run the same weights on the same image in one process, in turn, round after round: in each round one
call that does not count, to have caches and memory as in steady use, and two that do; the median counts. Each result
is compared with the float64 network first: one that errs more than twice as much as eager PyTorch gets no ratio. The
machine's own matrix rate and copy bandwidth are measured beside them, and every time is given as a share of that rate.

    python benchmarks/bench_cpu.py --large              # all; writes benchmarks/results/cpu.json
    python benchmarks/bench_cpu.py --only fused eager   # those whose names start so, and no 24-megapixel image
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import fastden
from fastden.bench import forms, machine
from fastden.bench.counts import COMPOSED_MACS, PLAIN_MACS
from fastden.bench.images import SIGMA, photograph
from fastden.bench.timing import Call, interleaved, seconds, status_mib
from fastden.inference import denoise_tiled
from fastden.network.onednn import native_bf16

RESULTS = Path(__file__).parent / "results"
SIZE = (512, 768)
#: A contender gets a ratio if it errs, against float64, at most so many times as much as eager PyTorch in its dtype,
#: channels-last (the layout decides the order of sums: eager errs 1.8e-7 without, 6.9e-7 with it).
TOLERANCE = 2.0


def contenders(model: fastden.Denoiser, x: Tensor, folder: Path) -> dict[str, Callable[[], Call]]:
    """Builders by name; each takes its time to compile or convert, and returns a function of no arguments."""
    fused = fastden.fuse(model)

    def plain(form: str, dtype: torch.dtype) -> Call:
        return forms.plain(form, forms.WithLevel(model), (x,), dtype)

    def ours(dtype: torch.dtype) -> Call:
        network = fastden.fuse(model, dtype)
        return lambda: network(x, SIGMA)

    def exported(network: nn.Module, name: str) -> Path:
        return forms.export_onnx(network, x, folder / f"{name}.onnx")

    def openvino(network: nn.Module, name: str, dtype: torch.dtype) -> Call:
        return forms.openvino(exported(network, name), x, dtype)

    def onnxruntime(network: nn.Module, name: str) -> Call:
        return forms.onnxruntime(exported(network, name), x)

    single, half = torch.float32, torch.bfloat16
    found: dict[str, Callable[[], Call]] = {
        "fused float32": lambda: ours(single),
        "eager float32": lambda: plain("eager", single),
        "eager channels-last float32": lambda: plain("channels_last", single),
        "compile float32": lambda: plain("compile", single),
        "openvino float32": lambda: openvino(model, "plain", single),
        "openvino composed float32": lambda: openvino(fused, "composed", single),
        "onnxruntime float32": lambda: onnxruntime(model, "plain"),
        "onnxruntime composed float32": lambda: onnxruntime(fused, "composed"),
    }
    if native_bf16():
        found |= {
            "fused bfloat16": lambda: ours(half),
            "eager channels-last bfloat16": lambda: plain("channels_last", half),
            "compile bfloat16": lambda: plain("compile", half),
            "openvino bfloat16": lambda: openvino(model, "plain", half),
            "openvino composed bfloat16": lambda: openvino(fused, "composed", half),
        }
    return found


def ceilings() -> dict[str, float]:
    """This machine's rates through PyTorch: the best matrix product of some sizes in TFLOP/s, and a copy in GB/s."""
    cpu = torch.device("cpu")
    found = {
        f"matmul {str(dtype).removeprefix('torch.')} TFLOP/s": round(machine.matrix_rate(cpu, dtype) / 1e12, 3)
        for dtype in (torch.float32, torch.bfloat16)
    }
    return found | {"copy GB/s": round(machine.copy_rate(cpu) / 1e9, 1)}


def compare(model: fastden.Denoiser, height: int, width: int, rounds: int, only: list[str]) -> dict[str, Any]:
    """Errors, times and ratios of all contenders on one image size."""
    import copy

    x = photograph(height, width)
    with FlopCounterMode(display=False) as counter:
        model(x, SIGMA)
    plain_flops = counter.get_total_flops()
    reference = copy.deepcopy(model).double()(x.double(), SIGMA)
    tolerance = {}
    for dtype in (torch.float32, torch.bfloat16):
        eager = copy.deepcopy(model).to(dtype=dtype, memory_format=torch.channels_last)(x.to(dtype), SIGMA)
        tolerance[str(dtype).removeprefix("torch.")] = TOLERANCE * float((eager.double() - reference).abs().max())
    rows: dict[str, dict[str, Any]] = {}
    runners: dict[str, Call] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, build in contenders(model, x, Path(folder)).items():
            if only and not name.startswith(tuple(only)):
                continue
            try:
                runner = build()
                output = runner().double()
            except ImportError as error:
                print(f"{name}: left out ({error})", file=sys.stderr)
                continue
            error = float((output - reference).abs().max())
            dtype = name.split()[-1]
            rows[name] = {"max_error": error, "valid": error <= tolerance[dtype]}
            runners[name] = runner
            print(f"{name}: ready, error {error:.1e}", file=sys.stderr)
        for name, times in interleaved(runners, seconds, rounds).items():
            rows[name]["seconds"] = [round(value, 5) for value in times]
    rates = ceilings()
    pixels = height * width
    channels = model.conv0.in_channels
    plain, composed_network = (2 * pixels * macs.of(channels) for macs in (PLAIN_MACS, COMPOSED_MACS))
    for name, row in rows.items():
        dtype = name.split()[-1]
        row["median_s"] = statistics.median(row["seconds"])
        row["megapixels_per_s"] = round(pixels / row["median_s"] / 1e6, 3)
        composed = name.startswith("fused") or "composed" in name
        flops = composed_network if composed else plain
        row["TFLOP/s"] = round(flops / row["median_s"] / 1e12, 3)
        row["share_of_matmul_rate"] = round(row["TFLOP/s"] / rates[f"matmul {dtype} TFLOP/s"], 3)
        mine = rows.get(f"fused {dtype}")
        comparable = mine is not None and row["valid"] and mine["valid"]
        row["fused_is_faster_by"] = (
            round(row["median_s"] / statistics.median(mine["seconds"]), 3) if mine and comparable else None
        )
    floors = {
        f"composed {dtype} s": round(composed_network / rates[f"matmul {dtype} TFLOP/s"] / 1e12, 4)
        for dtype in ("float32", "bfloat16")
    }
    return {
        "height": height,
        "width": width,
        "counted_plain_gflop": round(plain_flops / 1e9, 1),
        "rounds": rounds,
        "tolerance": tolerance,
        "ceilings": rates,
        "floors": floors,
        "contenders": rows,
    }


@torch.enable_grad()
def training(model: fastden.Denoiser) -> dict[str, Any]:
    """A training step of 16 crops of 94 pixels: the plain network against the one that composes its weights."""
    import copy

    x = photograph(94, 94).repeat(16, 1, 1, 1)
    dtype = torch.bfloat16 if native_bf16() else torch.float32
    steps: dict[str, Callable[[], None]] = {}
    for name, composed in (("plain", False), ("composed", True)):
        network = copy.deepcopy(model).train().to(memory_format=torch.channels_last)
        network.composed = composed
        optimizer = torch.optim.Adam(network.parameters())

        def step(network: fastden.Denoiser = network, optimizer: torch.optim.Optimizer = optimizer) -> None:
            with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
                y = network(x, SIGMA)
            (y.float() - x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()

        steps[name] = step
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(8):
        for name, step in steps.items():
            times[name].append(round(seconds(step), 4))
    medians = {name: statistics.median(values[2:]) for name, values in times.items()}
    ratio = round(medians["plain"] / medians["composed"], 3)
    shown = str(dtype).removeprefix("torch.")
    return {
        "crops": 16,
        "side": 94,
        "autocast": shown,
        "seconds": times,
        "median_s": medians,
        "composed_is_faster_by": ratio,
    }


def peak_mib() -> int | None:
    """Largest resident memory of this process so far."""
    peak = status_mib("VmHWM")
    return None if peak is None else round(peak)


def large(model_name: str, dtype: torch.dtype) -> dict[str, Any]:
    """Time and peak memory of a 24-megapixel 8-bit image (4000 x 6000), by automatic tiles."""
    network = fastden.fuse(fastden.Denoiser.from_pretrained(model_name), dtype)
    # Repeated as bytes: a float picture of this size would be the peak.
    small = photograph(500, 750).clamp_(0, 1).mul_(255).round_().to(torch.uint8)
    image = small.repeat(1, 1, 8, 8)
    denoise_tiled(network, image[:, :, :512, :768], SIGMA)
    before = peak_mib()
    elapsed = seconds(lambda: denoise_tiled(network, image, SIGMA))
    return {
        "height": 4000,
        "width": 6000,
        "dtype": str(dtype).removeprefix("torch."),
        "seconds": round(elapsed, 2),
        "megapixels_per_s": round(24 / elapsed, 3),
        "peak_rss_mib": peak_mib(),
        "peak_rss_before_mib": before,
        "result_mib": round(image.nbytes / 2**20),
    }


def table(result: dict[str, Any]) -> str:
    lines = [f"{'':32}{'time s':>9}{'MP/s':>8}{'of matmul':>11}{'error':>10}  fused is faster by"]
    for name, row in result["contenders"].items():
        ratio = (
            "outputs differ: no ratio" if row["fused_is_faster_by"] is None else f"{row['fused_is_faster_by']:.2f} x"
        )
        share = f"{100 * row['share_of_matmul_rate']:.0f} %"
        lines.append(
            f"{name:32}{row['median_s']:9.4f}{row['megapixels_per_s']:8.2f}{share:>11}{row['max_error']:10.1e}  {ratio}"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="color", help="bundled name, or folder")
    parser.add_argument("--size", type=int, nargs=2, default=SIZE, metavar=("HEIGHT", "WIDTH"))
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--only", nargs="*", default=[], help="contenders whose names start so")
    parser.add_argument("--large", action="store_true", help="a 24-megapixel image too: time and peak memory")
    parser.add_argument("--json", type=Path, help="default: benchmarks/results/cpu.json for a whole run, else nowhere")
    parser.add_argument("--large-child", choices=("float32", "bfloat16"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_grad_enabled(False)
    if arguments.large_child:
        print(json.dumps(large(arguments.model, getattr(torch, arguments.large_child))))
        return
    model = fastden.Denoiser.from_pretrained(arguments.model)
    document: dict[str, Any] = {"machine": machine.describe(torch.device("cpu")), "model": arguments.model}
    document["image"] = result = compare(model, *arguments.size, arguments.rounds, arguments.only)
    print(table(result))
    if not arguments.only:
        document["training_step"] = training(model)
        print("training step, composed against plain:", document["training_step"]["composed_is_faster_by"])
    if arguments.large:
        document["large"] = []
        for dtype in ("float32", "bfloat16") if native_bf16() else ("float32",):
            # A process of its own: peak memory never falls again.
            command = [sys.executable, __file__, "--model", arguments.model, "--large-child", dtype]
            child = subprocess.run(command, capture_output=True, text=True, check=True)
            document["large"].append(json.loads(child.stdout))
            print(document["large"][-1])
    whole = arguments.model == "color" and tuple(arguments.size) == SIZE and not arguments.only and arguments.large
    target = arguments.json or (RESULTS / "cpu.json" if whole else None)
    if target is not None:
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(json.dumps(document, indent=1) + "\n")
        print(f"written to {target}")


if __name__ == "__main__":
    main()
