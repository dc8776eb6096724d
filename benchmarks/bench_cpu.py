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
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import fastden
from fastden.cpu import native_bf16
from fastden.inference import denoise_tiled

RESULTS = Path(__file__).parent / "results"
SIGMA = 25 / 255
SIZE = (512, 768)
#: Multiply-accumulates a pixel for each channel of the input (conv0, or the stem and the image's own path), and of the
#: rest: of the plain network, and with the chains composed (nine taps for each of the head's phases).
PLAIN_MACS, COMPOSED_MACS = (1600, 215_744), (1715, 135_232)
#: A contender gets a ratio if it errs, against float64, at most so many times as much as eager PyTorch in its dtype,
#: channels-last (the layout decides the order of sums: eager errs 1.8e-7 without, 6.9e-7 with it).
TOLERANCE = 2.0

Runner = Callable[[], Tensor]


class WithLevel(nn.Module):
    """A network with its noise level built in: every contender takes the image alone."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x, SIGMA)


def photograph(height: int, width: int) -> Tensor:
    """(1, 3, height, width) float32: scikit-image's cat, tiled by reflection, with noise of level 25."""
    from skimage.data import chelsea

    cat = chelsea()
    rows, columns = (-(-size // cat.shape[axis]) for axis, size in enumerate((height, width)))
    tiled = np.pad(cat, ((0, (rows - 1) * cat.shape[0]), (0, (columns - 1) * cat.shape[1]), (0, 0)), mode="symmetric")
    clean = torch.from_numpy(tiled[:height, :width].transpose(2, 0, 1).copy()).float().div(255)[None]
    return clean + SIGMA * torch.randn(clean.shape, generator=torch.Generator().manual_seed(0))


def contenders(model: fastden.Denoiser, x: Tensor, folder: Path) -> dict[str, Callable[[], Runner]]:
    """Builders by name; each takes its time to compile or convert, and returns a function of no arguments."""
    fused = fastden.fuse(model)

    def eager(dtype: torch.dtype, layout: torch.memory_format) -> Runner:
        import copy

        network = WithLevel(copy.deepcopy(model)).to(dtype=dtype, memory_format=layout)
        image = x.to(dtype).contiguous(memory_format=layout)
        return lambda: network(image)

    def compiled(dtype: torch.dtype) -> Runner:
        import copy

        network = torch.compile(WithLevel(copy.deepcopy(model)).to(dtype=dtype, memory_format=torch.channels_last))
        image = x.to(dtype).contiguous(memory_format=torch.channels_last)
        return lambda: network(image)

    def ours(dtype: torch.dtype) -> Runner:
        network = fastden.fuse(model, dtype)
        return lambda: network(x, SIGMA)

    def exported(network: nn.Module, name: str) -> Path:
        path = folder / f"{name}.onnx"
        if not path.exists():
            program = torch.onnx.export(WithLevel(network).eval(), (x,), dynamo=True, verbose=False)
            assert program is not None
            program.save(path)
        return path

    def openvino(network: nn.Module, name: str, precision: str) -> Runner:
        import openvino as ov

        settings = {
            "INFERENCE_PRECISION_HINT": precision,
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        }
        request = ov.Core().compile_model(str(exported(network, name)), "CPU", settings).create_infer_request()
        image = x.numpy()
        return lambda: torch.from_numpy(next(iter(request.infer([image]).values())))

    def onnxruntime(network: nn.Module, name: str) -> Runner:
        import onnxruntime as ort

        options = ort.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        session = ort.InferenceSession(str(exported(network, name)), options, providers=["CPUExecutionProvider"])
        inputs = {session.get_inputs()[0].name: x.numpy()}
        return lambda: torch.from_numpy(session.run(None, inputs)[0])

    single, half, last = torch.float32, torch.bfloat16, torch.channels_last
    found: dict[str, Callable[[], Runner]] = {
        "fused float32": lambda: ours(single),
        "eager float32": lambda: eager(single, torch.contiguous_format),
        "eager channels-last float32": lambda: eager(single, last),
        "compile float32": lambda: compiled(single),
        "openvino float32": lambda: openvino(model, "plain", "f32"),
        "openvino composed float32": lambda: openvino(fused, "composed", "f32"),
        "onnxruntime float32": lambda: onnxruntime(model, "plain"),
        "onnxruntime composed float32": lambda: onnxruntime(fused, "composed"),
    }
    if native_bf16():
        found |= {
            "fused bfloat16": lambda: ours(half),
            "eager channels-last bfloat16": lambda: eager(half, last),
            "compile bfloat16": lambda: compiled(half),
            "openvino bfloat16": lambda: openvino(model, "plain", "bf16"),
            "openvino composed bfloat16": lambda: openvino(fused, "composed", "bf16"),
        }
    return found


def seconds(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def ceilings() -> dict[str, float]:
    """This machine's rates through PyTorch: the best matrix product of some sizes in TFLOP/s, and a copy in GB/s."""
    found = {}
    for dtype in (torch.float32, torch.bfloat16):
        best = 0.0
        for n in (1024, 2048, 3072):
            a, b = torch.randn(n, n).to(dtype), torch.randn(n, n).to(dtype)
            best = max(best, 2 * n**3 / min(seconds(lambda a=a, b=b: a @ b) for _ in range(6)) / 1e12)
        found[f"matmul {str(dtype).removeprefix('torch.')} TFLOP/s"] = round(best, 3)
    source = torch.randn(64 << 20)
    target = torch.empty_like(source)
    found["copy GB/s"] = round(
        2 * source.nbytes / min(seconds(lambda: target.copy_(source)) for _ in range(6)) / 1e9, 1
    )
    return found


def installed(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"


def machine() -> dict[str, Any]:
    model = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line),
        platform.processor(),
    )
    names = ("torch", "openvino", "onnxruntime", "numpy")
    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "native_bf16": native_bf16(),
        "python": platform.python_version(),
        "versions": {name: installed(name) for name in names},
        "commit": _commit(),
        "date": time.strftime("%Y-%m-%d"),
    }


def _commit() -> str:
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


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
    runners: dict[str, Runner] = {}
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
            rows[name] = {"max_error": error, "valid": error <= tolerance[dtype], "seconds": []}
            runners[name] = runner
            print(f"{name}: ready, error {error:.1e}", file=sys.stderr)
        for _ in range(rounds):
            for name, runner in runners.items():
                runner()
                rows[name]["seconds"] += [round(seconds(runner), 5) for _ in range(2)]
    rates = ceilings()
    pixels = height * width
    channels = model.conv0.in_channels
    plain, composed_network = (2 * pixels * (channels * each + rest) for each, rest in (PLAIN_MACS, COMPOSED_MACS))
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
    """Largest resident memory of this process so far; getrusage would start at that of the process that started it."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return next((round(int(line.split()[1]) / 1024) for line in lines if line.startswith("VmHWM")), None)


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
    document: dict[str, Any] = {"machine": machine(), "model": arguments.model}
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
