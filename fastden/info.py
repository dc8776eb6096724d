"""A description of this machine and this installation, for ``fastden info`` and bug reports.

It needs only the standard library, and it never raises: a broken or missing part becomes a line of the report.
``python -m fastden.info`` works even where the command line's own packages are broken.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

PACKAGES = (
    "fastden",
    "torch",
    "triton",
    "numpy",
    "pyvips",
    "pyvips-binary",
    "scikit-image",
    "safetensors",
    "huggingface_hub",
    "lightning",
    "typer",
    "rich",
    "pillow",
    "openvino",
    "onnxruntime",
)
#: Instruction sets that decide the speed of matrix multiplications.
CPU_FLAGS = (
    "avx2", "fma", "f16c", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16",
    "amx_tile", "amx_bf16", "amx_int8", "amx_fp16", "asimd", "sve", "bf16", "i8mm",
)  # fmt: skip


def collect(*, paths: bool = True) -> dict[str, Any]:
    """Versions, system, CPU, PyTorch, GPUs, CUDA extension, image library, models, backends and choice, as JSON types.

    A part that fails is ``{"error": "..."}``. Each backend has ``available`` and ``why_not``, a list of reasons.

    Args:
        paths: include the path of the Python program; published results do not include it.
    """
    sections: dict[str, Callable[[], Any]] = {
        "versions": _versions,
        "system": _system,
        "cpu": _cpu,
        "torch": _torch,
        "gpu": _gpu,
        "extension": _extension,
        "images": _images,
        "models": _models,
    }
    report = {name: _guarded(section) for name, section in sections.items()}
    report["backends"] = _guarded(lambda: _backends(report))
    report["automatic choice here"] = _guarded(_automatic)
    if not paths and isinstance(report["system"], dict):
        report["system"].pop("python", None)
    return report


def _guarded(section: Callable[[], Any]) -> Any:
    try:
        return section()
    # A broken native library can raise anything on import, SystemExit included.
    except (Exception, SystemExit) as error:
        return {"error": f"{type(error).__name__}: {error}".splitlines()[0]}


def _versions() -> dict[str, str]:
    return {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}}


def _version(name: str) -> str:
    try:
        return metadata.version(name) or "unknown"
    except metadata.PackageNotFoundError:
        return "not installed"
    except Exception as error:  # a damaged metadata folder
        return f"unknown ({type(error).__name__})"


def _system() -> dict[str, Any]:
    try:
        memory: float | None = round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (AttributeError, ValueError, OSError):  # no sysconf on Windows
        memory = None
    return {"platform": platform.platform(), "python": sys.executable, "memory_gib": memory}


def _cpu() -> dict[str, Any]:
    name, flags = platform.processor() or platform.machine(), set[str]()
    path = Path("/proc/cpuinfo")
    if path.is_file():
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                name = value.strip()
            elif key.strip() in ("flags", "Features"):
                flags.update(value.split())
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "name": name,
        "cores": os.cpu_count(),
        "usable_cores": usable,
        "features": [flag for flag in CPU_FLAGS if flag in flags],
        "native_bf16": _guarded(_native_bf16),
    }


def _native_bf16() -> bool:
    from fastden.network.onednn import native_bf16

    return native_bf16()


def _torch() -> dict[str, Any]:
    import torch

    return {
        "version": torch.__version__,
        "built_for_cuda": torch.version.cuda,
        "built_for_rocm": getattr(torch.version, "hip", None),
        "threads": torch.get_num_threads(),
        "onednn": torch.backends.mkldnn.is_available(),
        "devices": _guarded(_torch_devices),
    }


def _torch_devices() -> list[str]:
    import torch

    devices = ["cpu"]
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            major, minor = torch.cuda.get_device_capability(index)
            devices.append(f"cuda:{index} {torch.cuda.get_device_name(index)} (sm_{major}{minor})")
    if getattr(torch.backends, "mps", None) and torch.backends.mps.is_available():
        devices.append("mps")
    return devices


def _gpu() -> dict[str, Any]:
    """NVIDIA GPUs and nvcc, as the build finds it. It does not matter what PyTorch was built for."""
    return {"nvidia": _nvidia_smi(), "nvcc": _guarded(_nvcc)}


def _nvidia_smi() -> list[str]:
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    command = [program, "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    try:
        text = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError, UnicodeError):
        return []
    return [line.strip() for line in text.splitlines() if line.strip()]


def _nvcc() -> str | None:
    from fastden.cuda import build

    toolkit = build.find_toolkit()
    if toolkit is None:
        return None
    lines = [line for line in build.ask_nvcc(toolkit, "--version").splitlines() if "release" in line]
    return " ".join([str(toolkit / "bin" / "nvcc"), *(f"({line.strip()})" for line in lines[:1])])


def _extension() -> dict[str, Any]:
    """The CUDA extension's build and the versions that it needs, or the reasons why it cannot run."""
    from fastden.cuda import extension

    reasons = extension.why_not()
    return {"why_not": reasons} if reasons else extension.load()


def _images() -> dict[str, Any]:
    import pyvips

    version = ".".join(str(pyvips.version(part)) for part in range(3))
    loaders = {"jpeg": "jpegload", "png": "pngload", "tiff": "tiffload", "webp": "webpload", "avif": "heifload"}
    readable = [name for name, loader in loaders.items() if pyvips.type_find("VipsForeign", f"{loader}_buffer")]
    from fastden.images.kinds import PACKAGES as FORMATS

    readable += [kind for kind, package in FORMATS.items() if find_spec(package) is not None]
    return {"libvips": version, "formats": readable}


def _models() -> list[str]:
    from fastden.network.hub import models

    return list(models())


def _backends(report: dict[str, Any]) -> dict[str, dict[str, Any]]:
    torch_report, gpu = report["torch"], report["gpu"]
    broken = [f"PyTorch cannot be imported ({torch_report['error']})"] if "error" in torch_report else []
    no_gpu = []
    devices = torch_report.get("devices", [])
    if not any(str(device).startswith("cuda") for device in devices):
        if gpu.get("nvidia"):
            no_gpu.append(f"a GPU is here ({gpu['nvidia'][0]}), but this PyTorch cannot use it")
        else:
            no_gpu.append("no GPU is found")
    extension = report.get("extension", {})
    not_built = [extension["error"]] if "error" in extension else extension.get("why_not", [])
    reasons = {
        "torch": broken,
        **{f"onednn {dtype}": broken or _asked(partial(_why_not_onednn, dtype)) for dtype in ("float32", "bfloat16")},
        "triton": broken or [*no_gpu, *_asked(_why_not_triton)],
        "cuda": broken or [*not_built, *no_gpu],
    }
    return {name: {"available": not why, "why_not": why} for name, why in reasons.items()}


def _asked(section: Callable[[], list[str]]) -> list[str]:
    reasons = _guarded(section)
    return [reasons["error"]] if isinstance(reasons, dict) else reasons


def _why_not_onednn(dtype: str) -> list[str]:
    import torch

    from fastden.ops.post_operations import why_not

    return why_not(torch.device("cpu"), getattr(torch, dtype))


def _why_not_triton() -> list[str]:
    from fastden.ops.backends import BACKENDS, unavailable

    return next(unavailable(backend) for backend in BACKENDS if backend.name == "triton")


def _automatic() -> dict[str, str]:
    """What each GPU's operators run on where nobody names a backend, by dtype, and why some backends are left out."""
    import torch

    from fastden.ops import backends

    asked = os.environ.get(backends.ENVIRONMENT)
    if asked:
        return {"all": f"{backends.ENVIRONMENT}={asked} leaves no choice"}
    found = {"cpu": "torch"}
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        found |= _automatic_on(torch.device("cuda", index))
    return found


def _automatic_on(device: Any) -> dict[str, str]:
    import torch

    from fastden.ops import backends
    from fastden.ops.proven import PROVEN

    operators = list(dict.fromkeys(operator for _, operator, _, _ in PROVEN))
    found: dict[str, str] = {}
    proven: set[str] = set()
    for dtype in backends.KERNEL_DTYPES:
        proven.update(*(backends.proven_backends(operator, device, dtype) for operator in operators))
        chosen: dict[str, list[str]] = {}
        for operator, name in backends.expected(operators, device, dtype).items():
            chosen.setdefault(name, []).append(operator)
        chosen.pop("torch", None)
        if chosen:
            told = [f"{name}: {', '.join(names)}" for name, names in chosen.items()]
            label = str(dtype).removeprefix("torch.")
            found[f"{device} {label}"] = "; ".join([*told, "torch: all else, and training"])
    for backend in backends.BACKENDS:
        if backend.name in proven:
            reasons = backends.unavailable(backend) or backends.why_left_out(backend.name, device)
            if reasons:
                found[f"{device} not {backend.name}"] = "; ".join(reasons)
    major, minor = torch.cuda.get_device_capability(device)
    measured = f"no kernel is proven faster on compute capability {major}.{minor}"
    return found or {str(device): f"torch: {measured}"}


def as_text(report: dict[str, Any]) -> str:
    """The report as aligned lines."""
    lines = []
    for section, content in report.items():
        lines.append(section)
        entries = content.items() if isinstance(content, dict) else [("", content)]
        lines += [f"  {key:<16} {_shown(value)}".rstrip() for key, value in entries]
    return "\n".join(lines)


def _shown(value: Any) -> str:
    if isinstance(value, dict) and "why_not" in value:
        return "yes" if value["available"] else "no: " + "; ".join(value["why_not"])
    if isinstance(value, dict):
        return "; ".join(f"{name}: {item}" for name, item in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value)) or "none"
    return "none" if value is None else str(value)


if __name__ == "__main__":
    print(json.dumps(collect(), indent=2) if "--json" in sys.argv[1:] else as_text(collect()))
