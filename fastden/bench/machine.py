"""The machine: its description, its rates of multiplying and copying, and its GPU's sensors."""

from __future__ import annotations

import json
import platform
import re
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from fastden.bench.timing import Call, Stopwatch
from fastden.whole_files import write_bytes

#: NVML's reasons for a clock below the highest, by bit.
THROTTLE_REASONS = {
    0x1: "idle",
    0x2: "application clocks",
    0x4: "software power cap",
    0x8: "hardware slowdown",
    0x10: "sync boost",
    0x20: "software thermal slowdown",
    0x40: "hardware thermal slowdown",
    0x80: "hardware power brake",
    0x100: "display clocks",
}


def processor() -> str:
    """This machine's processor as the name of a folder: "amd-epyc"."""
    from fastden.info import collect

    name = collect()["cpu"].get("name") or platform.machine()
    return re.sub("[^a-z0-9]+", "-", name.lower()).strip("-") or "cpu"


def describe(device: torch.device) -> dict[str, Any]:
    """Device, driver, versions, commit and date."""
    from fastden.info import collect

    report = collect()
    facts = {
        "device": str(device),
        "cpu": report["cpu"].get("name"),
        "cores": report["cpu"].get("cores"),
        "threads": torch.get_num_threads(),
        "native_bf16": report["cpu"].get("native_bf16"),
        "platform": report["system"].get("platform"),
        "python": report["versions"].get("python"),
        "versions": {name: value for name, value in report["versions"].items() if value != "not installed"},
        "commit": commit(),
        "date": time.strftime("%Y-%m-%d"),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        facts |= {
            "gpu": properties.name,
            "compute_capability": f"{properties.major}.{properties.minor}",
            "gpu_memory_mib": properties.total_memory >> 20,
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            # Name, driver and memory, as nvidia-smi gives them.
            "driver": report["gpu"].get("nvidia"),
        }
    return facts


def commit() -> str | None:
    """The commit that fastden runs from, marked if files are changed; None outside a repository.

    Results are no part of what runs: writing them does not mark the commit. Nor do the modes of files, which a copy may
    lose.
    """
    git = ["git", "-C", str(Path(__file__).parent), "-c", "core.fileMode=false"]
    changed = ["diff", "--quiet", "HEAD", "--", ":/", ":(top,exclude)benchmarks/results"]
    try:
        named, same = (
            subprocess.run([*git, *arguments], capture_output=True, text=True, check=False, timeout=20)
            for arguments in (["describe", "--always"], changed)
        )
    except (OSError, subprocess.SubprocessError):
        return None
    name = named.stdout.strip()
    return name + "-dirty" * (same.returncode != 0) if named.returncode == 0 and name else None


def report(entry: dict[str, Any], file: Path | None, name: str | None = None) -> None:
    """Print what was measured and, with a file, store it there beside the entries of other processors.

    Args:
        entry: what was measured; its ``"machine"`` is what :func:`describe` gives, and is stored, not printed.
        file: JSON, an object whose keys are processors; made if there is none.
        name: of the entry, where a processor has several. An entry of the same processor and name is replaced.
    """
    print(json.dumps({key: value for key, value in entry.items() if key != "machine"}, indent=1))
    if file is None:
        return
    entries: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    processor = str(entry["machine"].get("cpu"))
    if name is None:
        entries[processor] = entry
    else:
        entries.setdefault(processor, {})[name] = entry
    write_bytes(file, (json.dumps(entries, indent=1) + "\n").encode())


@contextmanager
def steady_settings(device: torch.device) -> Iterator[None]:
    """On a GPU: float32 without TF32, and cuDNN's fastest algorithm for all contenders. On a CPU nothing is set."""
    if device.type != "cuda":
        yield
        return
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    before = cudnn.allow_tf32, matmul.allow_tf32, cudnn.benchmark
    cudnn.allow_tf32, matmul.allow_tf32, cudnn.benchmark = False, False, True
    try:
        with torch.cuda.device(device):
            yield
    finally:
        cudnn.allow_tf32, matmul.allow_tf32, cudnn.benchmark = before


def matrix_rate(device: torch.device, dtype: torch.dtype, sides: tuple[int, ...] = ()) -> float:
    """The best rate at which PyTorch multiplies square matrices, FLOP/s; random values, as zeros can run faster."""
    watch = Stopwatch(device)
    best = 0.0
    for side in sides or ((4096, 8192, 16384) if device.type == "cuda" else (1024, 2048, 3072)):
        a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
        best = max(best, 2e3 * side**3 / _typical(watch, lambda a=a, b=b: a @ b))  # type: ignore[misc]
    return best


def copy_rate(device: torch.device, size: int = 0) -> float:
    """The rate at which PyTorch copies memory, bytes a second, read and written; ``size`` in bytes."""
    size = size or (1 << 30 if device.type == "cuda" else 1 << 28)
    source = torch.randn(size // 4, device=device)
    target = torch.empty_like(source)
    return 2e3 * source.nbytes / _typical(Stopwatch(device), lambda: target.copy_(source))


def _typical(watch: Stopwatch, call: Call) -> float:
    """Milliseconds: the median of a GPU's calls; the minimum of a CPU's calls, which other processes interrupt."""
    call()
    times = [watch(call) for _ in range(10 if watch.device.type == "cuda" else 6)]
    return statistics.median(times) if watch.device.type == "cuda" else min(times)


def ceilings(device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """Limits of all contenders: the matrix rate in ``dtype``, TFLOP/s, and the copy bandwidth, GB/s."""
    return {"matrix_tflops": matrix_rate(device, dtype) / 1e12, "copy_gigabytes_a_second": copy_rate(device) / 1e9}


class Sensors:
    """Clocks, power, temperature and energy of one GPU through NVML.

    Args:
        nvml: the module ``pynvml``, initialised.
        handle: its handle of the GPU.
    """

    def __init__(self, nvml: Any, handle: Any) -> None:
        self._nvml, self._handle = nvml, handle

    @classmethod
    def of(cls, device: torch.device) -> Sensors | str:
        """The sensors of ``device``, or why there are none."""
        if device.type != "cuda":
            return f"device {device} has no NVML"
        try:
            import pynvml
        except ModuleNotFoundError:
            return "pynvml is not installed (pip install 'fastden[bench]')"
        try:
            pynvml.nvmlInit()
            if pynvml.nvmlDeviceGetCount() == 1:
                return cls(pynvml, pynvml.nvmlDeviceGetHandleByIndex(0))
            # An index would be wrong: CUDA_VISIBLE_DEVICES renumbers PyTorch's devices and not NVML's.
            uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
            return cls(pynvml, pynvml.nvmlDeviceGetHandleByUUID(uuid))
        except pynvml.NVMLError as error:
            return f"NVML: {error}"

    def state(self) -> dict[str, Any]:
        """Clocks in MHz, power in W, temperature in degrees Celsius, reasons for throttling; None where not offered."""
        nvml, handle = self._nvml, self._handle
        power = self._ask(lambda: nvml.nvmlDeviceGetPowerUsage(handle))
        limit = self._ask(lambda: nvml.nvmlDeviceGetEnforcedPowerLimit(handle))
        bits = self._ask(lambda: nvml.nvmlDeviceGetCurrentClocksThrottleReasons(handle))
        return {
            "sm_clock_mhz": self._ask(lambda: nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_SM)),
            "memory_clock_mhz": self._ask(lambda: nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_MEM)),
            "power_w": None if power is None else power / 1e3,
            "power_limit_w": None if limit is None else limit / 1e3,
            "temperature_c": self._ask(lambda: nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU)),
            "throttle_reasons": None
            if bits is None
            else [name for bit, name in THROTTLE_REASONS.items() if bits & bit],
        }

    def joules(self) -> float | None:
        """Energy since the driver was loaded."""
        millijoules = self._ask(lambda: self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._handle))
        return None if millijoules is None else millijoules / 1e3

    def under_load(self, call: Call, milliseconds: float, duration: float) -> dict[str, Any]:
        """Energy of a call, and the sensors while it runs again and again.

        Args:
            call: what to run.
            milliseconds: what one call takes, about.
            duration: seconds to run for at least. NVML renews its energy count some ten times a second, so the
                measurement begins and ends with a renewal.

        Returns:
            The last :meth:`state` under load, ``throttle_reasons`` of all samples, ``mean_power_w`` and
            ``joules_a_call``.
        """
        together = max(1, int(50 / max(milliseconds, 1e-3)))
        reasons, state = set[str](), dict[str, Any]()

        def run() -> float | None:
            nonlocal state
            for _ in range(together):
                call()
            # Read while the device still works.
            state = self.state()
            reasons.update(state["throttle_reasons"] or [])
            torch.cuda.synchronize()
            return self.joules()

        # Some counts never move.
        patience = time.perf_counter() + 3 * duration + 1
        first = before = run()
        while before is not None and before == first and time.perf_counter() < patience:
            before = run()
        start, calls, after, renewed = time.perf_counter(), 0, before, False
        while (elapsed := time.perf_counter() - start) < duration or not renewed:
            previous, after = after, run()
            calls += together
            renewed = after is None or after != previous or time.perf_counter() > patience
        used = None if before is None or after is None else after - before
        return {
            **state,
            "throttle_reasons": sorted(reasons),
            "seconds": elapsed,
            "mean_power_w": None if used is None else used / elapsed,
            "joules_a_call": None if used is None or not calls else used / calls,
        }

    def _ask(self, question: Callable[[], Any]) -> Any:
        """The answer; None where this GPU or driver does not give it."""
        try:
            return question()
        except self._nvml.NVMLError:
            return None
