"""Times of calls: cold caches, contenders in turn, medians with their spread; and the memory that a call takes."""

from __future__ import annotations

import ctypes
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from fastden.ops.capturing import without_collection

Call = Callable[[], Any]


class Stopwatch:
    """Time of one call on a device, in milliseconds.

    On a GPU the L2 cache holds other data when the call begins, and CUDA events measure the time.

    Args:
        device: where the calls run.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._cold: torch.Tensor | None = None
        if device.type == "cuda":
            cache = getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0)
            self._cold = torch.empty(max(4 * cache, 1 << 28), dtype=torch.uint8, device=device)

    def __call__(self, call: Call) -> float:
        if self._cold is None:
            start = time.perf_counter()
            call()
            return 1e3 * (time.perf_counter() - start)
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        self._cold.zero_()
        begin.record()
        call()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end)


def seconds(call: Call) -> float:
    """Time of one call by the host's clock."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def interleaved(
    calls: Mapping[str, Call], measure: Callable[[Call], float], rounds: int, repeats: int = 2
) -> dict[str, list[float]]:
    """Measurements by name: each round runs every call in turn, once untimed and then ``repeats`` times.

    The untimed call brings clocks and memory to steady use. Each round begins with the next contender, so that none
    always follows the same one.
    """
    names = list(calls)
    times: dict[str, list[float]] = {name: [] for name in names}
    for index in range(rounds):
        first = index % max(len(names), 1)
        for name in names[first:] + names[:first]:
            try:
                calls[name]()
                times[name] += [measure(calls[name]) for _ in range(repeats)]
            except Exception:
                # On a GPU the error's own text names neither the kernel nor the call.
                print(f"{name}: failed while it was timed", file=sys.stderr)
                raise
    return times


def summary(times: list[float]) -> dict[str, float]:
    """Median, quartiles and the distance between them, in the unit of ``times``."""
    if len(times) < 2:
        low = middle = high = times[0]
    else:
        low, middle, high = statistics.quantiles(times, n=4, method="inclusive")
    return {"median_ms": middle, "q1_ms": low, "q3_ms": high, "iqr_ms": high - low}


class Replay:
    """A call as the replay of a CUDA graph: the device's time without the host's.

    A graph holds the addresses that it reads, not the tensors, and only what it allocates itself lies in its own memory
    pool. So this object holds the call, and with it the inputs and weights. Otherwise PyTorch returns their memory to
    the driver when the next graph is captured, and a replay may end in an illegal memory access, as it did on an H200
    with single operators at 512 x 768 pixels and more.

    Args:
        call: must hold all tensors that it reads and does not make itself.
    """

    def __init__(self, call: Call) -> None:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                call()
        torch.cuda.current_stream().wait_stream(side)
        self._graph = torch.cuda.CUDAGraph()
        # On an H200 one of 48 captures of ``fastden bench ops`` failed ("a previous error during capture"). The same
        # call was captured right for the next contender but one.
        with without_collection(), torch.cuda.graph(self._graph):
            self._result = call()
        self._call = call

    def __call__(self) -> Any:
        self._graph.replay()
        return self._result


def peak_mib(call: Call, device: torch.device) -> float | None:
    """What one call adds at its peak to the memory in use before, its result included; None where that is unknown.

    On a GPU it is what PyTorch's allocator gives out; on Linux's CPUs, the growth of the resident set.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        call()
        torch.cuda.synchronize(device)
        return (torch.cuda.max_memory_allocated(device) - before) / 2**20
    try:
        # Memory that the allocator kept would serve the call without showing.
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    except (AttributeError, OSError, TypeError):  # not glibc, or no such file
        return None
    resident = status_mib("VmRSS")
    call()
    peak = status_mib("VmHWM")
    return None if peak is None or resident is None else peak - resident


def status_mib(key: str) -> float | None:
    """A line of Linux's status of this process: VmRSS, its resident memory, or VmHWM, the most so far."""
    # getrusage starts at the peak of the parent process.
    status = Path("/proc/self/status")
    lines = status.read_text(encoding="utf-8").splitlines() if status.exists() else []
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith(f"{key}:")), None)
