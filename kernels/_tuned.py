"""Configurations that a search found on this GPU (``benchmarks/tune.py``); they replace the defaults.

There is one file for each compute capability, version of Triton and text of the kernels. So a configuration is never
used with other kernels than those it was measured with, nor on a GPU of another compute capability. The file is in
``fastden/tuned`` in the user's cache folder, or FASTDEN_TUNED names it. A call of a kernel never starts a search.
Without a file, kernels use the defaults.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import asdict, dataclass
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any, TypeVar

import torch
import triton
from torch import Tensor

ENVIRONMENT = "FASTDEN_TUNED"
#: Version of the file format.
FORMAT = 1

Config = TypeVar("Config")


@dataclass(frozen=True)
class Request:
    """A launch that needs a configuration.

    Args:
        kernel: name of the kernel.
        key: all values that are compiled in, and the dtype.
        pixels: number of output pixels in all images.
    """

    kernel: str
    key: str
    pixels: int


class Trial:
    """Configurations that a search tries, and the requests that launches made.

    Attributes:
        configs: the configuration of each request; it replaces all others.
        asked: each request with its default, in the order of its first launch.
    """

    def __init__(self, configs: Mapping[Request, Any] | None = None) -> None:
        self.configs = dict(configs or {})
        self.asked: dict[Request, Any] = {}


_trial: ContextVar[Trial | None] = ContextVar("fastden_trial", default=None)


@contextmanager
def trial(configs: Mapping[Request, Any] | None = None) -> Iterator[Trial]:
    """In the ``with`` block, launches of this thread use ``configs``, or the default if the request is not there."""
    current = Trial(configs)
    token = _trial.set(current)
    try:
        yield current
    finally:
        _trial.reset(token)


def choose(kernel: str, key: str, pixels: int, x: Tensor, default: Config) -> Config:
    """The configuration of a launch: the tuned one with the nearest number of pixels, or ``default``.

    Args:
        kernel: name of the kernel.
        key: all values that are compiled in, except the configuration.
        pixels: number of output pixels in all images.
        x: an input, for the device and the dtype.
        default: the configuration if the file has none for this kernel and key.

    Raises:
        ValueError: the configurations in the file are not of the default's type.
    """
    name = f"{key} {str(x.dtype).removeprefix('torch.')}"
    current = _trial.get()
    if current is not None:
        request = Request(kernel, name, pixels)
        current.asked.setdefault(request, default)
        return current.configs.get(request, default)  # type: ignore[no-any-return]
    device = (x.device.index or 0) if x.is_cuda else None
    entries = _table(device).get(f"{kernel} {name}")
    if not entries:
        return default
    nearest = min(entries, key=lambda entry: abs(math.log(entry["pixels"] / max(pixels, 1))))
    try:
        return type(default)(**nearest["config"])
    except TypeError as error:
        raise ValueError(f"{path(capability(device))}: {nearest['config']} for {kernel}: {error}") from error


def path(capability: str) -> Path:
    """The file for a compute capability such as "9.0"."""
    named = os.environ.get(ENVIRONMENT)
    if named:
        return Path(named)
    # Not Path.home(), which fails where the user has no home.
    folder = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(folder) / "fastden" / "tuned" / f"{capability}-triton-{triton.__version__}-{digest()}.json"


@cache
def digest() -> str:
    """The digest of the text of all kernels and launch functions."""
    text = b"".join(file.read_bytes() for file in sorted(Path(__file__).parent.glob("*.py")))
    return sha256(text).hexdigest()[:12]


def capability(device: int | None) -> str:
    """The compute capability of a CUDA device; "interpreted" if there is no device."""
    if device is None:
        return "interpreted"
    major, minor = torch.cuda.get_device_capability(device)
    return f"{major}.{minor}"


def write(
    file: Path, results: Mapping[Request, tuple[Any, Mapping[str, float]]], *, capability: str, **about: Any
) -> None:
    """Write configurations and their times in the format that :func:`choose` reads, in one atomic step.

    What the file has for other requests stays, if it was found with the same kernels on the same kind of GPU.

    Args:
        file: the path that :func:`path` returns.
        results: a configuration and its times, for each request.
        capability: the compute capability of the GPU on which they were found.
        about: more entries for the file, for example the machine.
    """
    made = {**_made(), "capability": capability}
    entries = _earlier(file, made)
    for request, (config, times) in results.items():
        row = {"pixels": request.pixels, "config": asdict(config), **times}
        name = f"{request.kernel} {request.key}"
        entries[name] = [other for other in entries.get(name, []) if other["pixels"] != request.pixels] + [row]
    document = {**made, **about, "entries": entries}
    file.parent.mkdir(parents=True, exist_ok=True)
    beside = file.with_name(f"{file.name}.{os.getpid()}")
    beside.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    beside.replace(file)


def _made() -> dict[str, Any]:
    """What a file says of the program that it is for."""
    return {"format": FORMAT, "triton": triton.__version__, "kernels": digest()}


def _earlier(file: Path, made: Mapping[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """The entries of a file that was ``made`` in the same way; empty if there is none, or another one."""
    try:
        document = json.loads(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return {}
    same = isinstance(document, dict) and all(document.get(name) == value for name, value in made.items())
    return dict(document["entries"]) if same else {}


@cache
def _table(device: int | None) -> dict[str, list[dict[str, Any]]]:
    here = capability(device)
    file = path(here)
    try:
        document = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except OSError:
        if os.environ.get(ENVIRONMENT):
            raise
        return {}  # a cache folder of another user, or none
    except ValueError as error:
        raise ValueError(f"{file}: not JSON ({error}); accepted: what benchmarks/tune.py writes") from error
    if not isinstance(document, dict):
        raise ValueError(f"{file}: a JSON {type(document).__name__}; accepted: what benchmarks/tune.py writes")
    made = _made()
    other = {name: document.get(name) for name, value in made.items() if document.get(name) != value}
    if other:
        raise ValueError(f"{file}: made with {other}; accepted: {made}. Run benchmarks/tune.py again, or delete it")
    # FASTDEN_TUNED names one file for all GPUs of a machine.
    return dict(document["entries"]) if document.get("capability") == here else {}
