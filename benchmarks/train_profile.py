"""Say where the time of a training step goes: the kernels of each block, forward and backward, and the GPU's idle time.

A step is that of ``fastden bench train``: forward and backward pass of 64 crops of 128 pixels, channels-last, bfloat16
autocast, float32 weights with random numbers, statistics of the batch. Its forms:

- plain: the network as it is written, on PyTorch's kernels;
- composed: stem and head composed, on PyTorch's kernels;
- composed_search: the same, where cuDNN times its algorithms for each shape in the first step
  (``torch.backends.cudnn.benchmark``) and takes the fastest, instead of guessing it;
- triton: composed, on Triton's kernels, with the gradients of convolutions that are the default there;
- triton_kernels, triton_aten: the same with all of these gradients on Triton's kernels, or all on PyTorch's. Block by
  block, they say what the default (``fastden/ops/_gradients.py``) should take. In
  ``benchmarks/results/h200/train-profile.json``, ``triton`` is what is ``triton_kernels`` now.

For each form:

- the step's time by the clock, without the profiler, and as a CUDA graph;
- how long the GPU computes, its kernels' times added, and their number. If the clock shows more, the GPU waits for the
  host;
- each kernel, by the block and the pass that started it and by the operator. A kernel of the backward pass belongs to
  the block in whose forward pass autograd recorded its operation.

    python benchmarks/train_profile.py --json train-profile.json     # some 30 seconds once Triton has compiled
    python benchmarks/train_profile.py --device cpu --batch 1 --size 32 32 --steps 1    # operators instead of kernels
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

from fastden import ops
from fastden.bench.tables import write
from fastden.bench.timing import Replay
from fastden.network import model as network
from fastden.network.model import Denoiser
from fastden.ops._gradients import ENVIRONMENT
from fastden.ops.backends import use_backend

FORMS = ("plain", "composed", "composed_search", "triton", "triton_kernels", "triton_aten")
#: FASTDEN_BACKWARD of a form; the others have the default.
GRADIENTS = {"triton_kernels": "kernels", "triton_aten": "aten"}
#: Begins the names of ranges in the profile.
RANGE = "block: "
EVALUATED = "autograd::engine::evaluate_function: "
#: What sums gradients in parameters, and what no block records.
PARAMETERS, REST = "parameters", "rest"
#: Operators by name, and the functions that compose weights.
OPERATORS = ("bottleneck", "concat_conv_bn_relu", "conv_bn_relu", "head", "stem", "upsample")
COMPOSE = ("compose_stem", "compose_head")


@contextmanager
def blocks(model: Denoiser) -> Iterator[None]:
    """Give each block of ``model`` a range in the profile while it runs forward.

    Hooks or other ``forward`` methods would make the network call its layers one by one, so the operators are wrapped.
    A parameter among an operator's arguments tells the block; composed operators have no parameter among them.
    """
    owner = {id(value): name.partition(".")[0] for name, value in model.named_parameters()}

    def ranged(function: Callable[..., Any], own: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            name = own if own in COMPOSE else next((owner[id(one)] for one in args if id(one) in owner), own)
            with record_function(RANGE + name):
                return function(*args, **kwargs)

        return call

    with ExitStack() as stack:
        for module, names in ((ops, OPERATORS), (network, COMPOSE)):
            for name in names:
                stack.enter_context(mock.patch.object(module, name, ranged(getattr(module, name), name)))
        yield


def make_step(form: str, device: torch.device, batch: int, size: tuple[int, int]) -> tuple[Denoiser, Callable[[], Any]]:
    """The network, and a call that runs one step."""
    torch.manual_seed(0)
    model = Denoiser(composed=form != "plain").to(device).train().to(memory_format=torch.channels_last)
    x = torch.rand(batch, 3, *size, device=device).contiguous(memory_format=torch.channels_last)
    backend = "triton" if form.startswith("triton") else "torch"

    def step() -> tuple[Tensor | None, ...]:
        model.zero_grad(set_to_none=True)
        with use_backend(backend), torch.autocast(device.type, torch.bfloat16):
            y = model(x, 0.1)
        with record_function(RANGE + "loss"):
            loss = y.float().square().mean()
        loss.backward()
        return tuple(parameter.grad for parameter in model.parameters())

    return model, step


def attribute(events: list[Any], device: str) -> list[dict[str, Any]]:
    """Time on the device of each operator that the host ran, by its block and its pass.

    Args:
        events: of a profile, ``torch.autograd.profiler_util.FunctionEvent``.
        device: on "cuda" the time is that of the kernels which the operator started; on "cpu" it is the operator's own.

    Returns:
        Rows with block, pass ("forward", "backward"), operator, kernel, calls and microseconds.
    """
    host = sorted((one for one in events if one.device_type == DeviceType.CPU), key=lambda one: one.time_range.start)
    recorded: dict[int, str] = {}
    for event in host:
        block = _parent(event, RANGE)
        if block is not None and event.sequence_nr >= 0 and _parent(event, EVALUATED) is None:
            # An operation that autograd does not record has the number of the next one that it does.
            recorded[event.sequence_nr] = block.name.removeprefix(RANGE)
    times: Counter[tuple[str, str, str, str]] = Counter()
    calls: Counter[tuple[str, str, str, str]] = Counter()
    for event in host:
        started = [(one.name, one.duration) for one in event.kernels]
        if device == "cpu":
            started = [("", event.self_cpu_time_total)] if not event.name.startswith((RANGE, EVALUATED)) else []
        if not started:
            continue
        node = _parent(event, EVALUATED)
        if node is not None:
            block, direction = recorded.get(node.sequence_nr, REST), "backward"
            if "AccumulateGrad" in node.name:
                block = PARAMETERS
        else:
            inside = _parent(event, RANGE)
            block, direction = (REST if inside is None else inside.name.removeprefix(RANGE)), "forward"
        for kernel, duration in started:
            key = block, direction, event.name, kernel
            times[key] += duration
            calls[key] += 1
    names = ("block", "pass", "operator", "kernel")
    return [dict(zip(names, key, strict=True)) | {"calls": calls[key], "us": us} for key, us in times.most_common()]


def _parent(event: Any, prefix: str) -> Any:
    """The innermost event around ``event``, or itself, whose name begins with ``prefix``; None if there is none."""
    while event is not None and not event.name.startswith(prefix):
        event = event.cpu_parent
    return event


@contextmanager
def gradients_of(form: str) -> Iterator[None]:
    """FASTDEN_BACKWARD as the form has it, whatever it is outside."""
    with mock.patch.dict(os.environ):
        os.environ.pop(ENVIRONMENT, None)
        if form in GRADIENTS:
            os.environ[ENVIRONMENT] = GRADIENTS[form]
        yield


def clock(call: Callable[[], Any], device: torch.device, times: int) -> float:
    """Median time of a call in milliseconds, by the host's clock."""
    taken = []
    for _ in range(times):
        _wait(device)
        start = time.perf_counter()
        call()
        _wait(device)
        taken.append(1e3 * (time.perf_counter() - start))
    return statistics.median(taken)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def profiled(form: str, device: torch.device, batch: int, size: tuple[int, int], steps: int) -> dict[str, Any]:
    """Measure one form; all times and numbers are those of one step."""
    cuda = device.type == "cuda"
    searches = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = form == "composed_search"
    try:
        model, step = make_step(form, device, batch, size)
        for _ in range(3 if cuda else 1):
            step()
        wall = clock(step, device, steps)
        activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * cuda
        with blocks(model), profile(activities=activities) as recorded:
            for _ in range(steps):
                step()
            _wait(device)
        rows = attribute(list(recorded.events()), device.type)
        result: dict[str, Any] = {"clock_ms": wall, "graph_ms": None}
        if cuda:
            try:
                result["graph_ms"] = clock(Replay(step), device, 4 * steps)
            except Exception as error:  # the profile is worth keeping without it
                result["graph_error"] = str(error).splitlines()[0]
    finally:
        torch.backends.cudnn.benchmark = searches
    for row in rows:
        row["ms"] = row.pop("us") / 1e3 / steps
        row["calls"] /= steps
    by_block: Counter[str] = Counter()
    for row in rows:
        by_block[f"{row['block']} {row['pass']}"] += row["ms"]
    result |= {"busy_ms": sum(by_block.values()), "launches": sum(row["calls"] for row in rows)}
    return result | {"blocks": dict(by_block.most_common()), "kernels": rows}


def show(form: str, result: dict[str, Any], console: Console, most: int = 20) -> None:
    busy = result["busy_ms"]
    graph = "" if result["graph_ms"] is None else f", as a graph {result['graph_ms']:.2f} ms"
    console.print(
        f"{form}: {result['clock_ms']:.2f} ms a step by the clock{graph}; computing {busy:.2f} ms in"
        f" {result['launches']:.0f} launches"
    )
    table = Table("block", "forward ms", "backward ms", "%")
    names = dict.fromkeys(name.rpartition(" ")[0] for name in result["blocks"])
    for name in names:
        forward, backward = (result["blocks"].get(f"{name} {way}", 0.0) for way in ("forward", "backward"))
        table.add_row(name, f"{forward:.3f}", f"{backward:.3f}", f"{100 * (forward + backward) / busy:.1f}")
    console.print(table)
    table = Table("block", "pass", "operator", "kernel", "calls", "ms")
    for row in result["kernels"][:most]:
        kernel = row["kernel"] if len(row["kernel"]) <= 60 else row["kernel"][:57] + "..."
        table.add_row(row["block"], row["pass"], row["operator"], kernel, f"{row['calls']:.0f}", f"{row['ms']:.3f}")
    console.print(table)


def main() -> int:
    parser = argparse.ArgumentParser(description="Say where the time of a training step goes.")
    parser.add_argument(
        "--forms", nargs="+", choices=FORMS, help="all by default; on a CPU, those on PyTorch's kernels"
    )
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--size", type=int, nargs=2, default=(128, 128), metavar=("HEIGHT", "WIDTH"))
    parser.add_argument("--steps", type=int, default=5, help="of the profile")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--json", type=Path, help="write all kernels there")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print("device: cuda, but there is no GPU; accepted: cpu, or cuda with one", file=sys.stderr)
        return 2
    forms = arguments.forms or (FORMS if device.type == "cuda" else FORMS[:2])
    document: dict[str, Any] = {
        "command": "python benchmarks/train_profile.py",
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "torch": torch.__version__,
        "cudnn": torch.backends.cudnn.version(),
        "batch": arguments.batch,
        "size": list(arguments.size),
        "forms": {},
    }
    console = Console(width=150)
    failed = False
    for form in forms:
        try:
            with gradients_of(form):
                result = profiled(form, device, arguments.batch, tuple(arguments.size), arguments.steps)
        except Exception as error:  # the other forms are worth their time
            failed = True
            result = {"error": f"{type(error).__name__}: {error}"}
            print(f"{form}: {result['error']}", file=sys.stderr)
        else:
            show(form, result, console)
        document["forms"][form] = result
        if arguments.json:  # after each form: what is stopped leaves what it has
            arguments.json.parent.mkdir(parents=True, exist_ok=True)
            write(arguments.json, document)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
