"""The CUDA extension: its place, whether it fits the installed PyTorch, and its loading at the first use.

It comes with the installation (``FASTDEN_BUILD=cuda pip install ...``), or from ``fastden build``, which compiles it
into the user's cache. Beside each library lies a description of what it was built for: a library of another PyTorch
would fail with undefined symbols, which tell a user nothing.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import util
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import Any

from fastden.cuda import build

PACKAGE = Path(__file__).resolve().parents[1]

_config: dict[str, Any] | None = None
#: Why the extension could not be loaded; empty before the first try, and behind a build.
_reasons: list[str] = []
#: How many builds this process has asked for.
_builds = 0
_after_loading: list[Callable[[], None]] = []
_lock = threading.RLock()


@dataclass(frozen=True)
class Library:
    """A built extension.

    Args:
        path: of the library.
        description: its own, see :meth:`fastden.cuda.build.Plan.description`.
    """

    path: Path
    description: dict[str, Any]

    def why_not(self) -> list[str]:
        """Why it does not fit this PyTorch and machine; empty where it does."""
        here = build.environment()
        own = {key: str(self.description.get(key, "unknown")) for key in here}
        if (own["torch"], own["cuda"]) != (here["torch"], here["cuda"]):
            there = f"built for torch {own['torch']} / CUDA {own['cuda']}"
            return [f"{there}; this is torch {here['torch']} / CUDA {here['cuda']}; run `fastden build`"]
        if own["python"] != here["python"]:
            return [f"built for Python {own['python']}; this is {here['python']}; run `fastden build`"]
        return []


def sources() -> Path | None:
    """The folder of the extension's sources: inside an installation, beside the package in a checkout."""
    folders = (PACKAGE / "_csrc", PACKAGE.parent / "csrc")
    return next((folder for folder in folders if (folder / "bindings.cpp").is_file()), None)


def cache() -> Path:
    """The folder under which ``fastden build`` keeps its libraries."""
    root = os.environ.get("TORCH_EXTENSIONS_DIR")
    if not root:
        variable = "LOCALAPPDATA" if os.name == "nt" else "XDG_CACHE_HOME"
        root = os.environ.get(variable) or str(Path.home() / ".cache")
    return Path(root) / "fastden"


def build_here(say: Callable[[str], None] = lambda text: None, force: bool = False) -> Path:
    """Build the extension for the PyTorch and the GPUs that are here, into the cache, unless it is there already.

    Args:
        say: gets messages about the progress.
        force: build even if the library is there.

    Returns:
        The library's path.

    Raises:
        fastden.cuda.build.BuildError: something is missing, or a compiler failed.
    """
    global _builds, _reasons
    source, toolkit = sources(), build.find_toolkit()
    reasons = build.missing(toolkit) + ([] if source else ["this installation has no CUDA sources"])
    if reasons or source is None or toolkit is None:
        raise build.BuildError("; ".join(reasons))
    import torch

    devices = range(torch.cuda.device_count())
    listed = build.ask_nvcc(toolkit, "--list-gpu-arch")
    capabilities = [torch.cuda.get_device_capability(index) for index in devices]
    architectures = build.choose_architectures(os.environ, listed, capabilities, say)
    wanted = build.plan(source, architectures, toolkit=toolkit)
    folder = cache() / wanted.key(build.environment())
    library = folder / f"{build.NAME}.so"
    if library.is_file() and (folder / build.DESCRIPTION).is_file() and not force:
        os.utime(library)  # the newest is loaded
        _builds, _reasons = _builds + 1, []
        say(f"built already: {library}")
        return library
    say(
        f"building {len(wanted.sources)} sources for {', '.join(wanted.architectures)} with"
        f" {build.jobs(os.environ, os.cpu_count() or 1, build.free_memory())} compilers at once: this takes minutes"
    )
    library = build.build(wanted, folder)
    _builds, _reasons = _builds + 1, []
    say(f"built {library}")
    return library


def libraries() -> Iterator[Library]:
    """All built libraries: first the one that came with the installation, then the newest."""
    found = [PACKAGE / f"{build.NAME}{suffix}" for suffix in EXTENSION_SUFFIXES]
    cached = list(cache().glob(f"*/{build.NAME}.so"))
    found += sorted(cached, key=lambda path: path.stat().st_mtime, reverse=True)
    for path in found:
        description = path.parent / build.DESCRIPTION
        if path.is_file() and description.is_file():
            try:
                yield Library(path, json.loads(description.read_text(encoding="utf-8")))
            except (OSError, ValueError):  # a damaged description counts as none
                continue


def find() -> tuple[Library | None, list[str]]:
    """The library to load; or None, and why there is none.

    It is the first of :func:`libraries` that fits this PyTorch and serves most of the GPUs here.
    """
    source = sources()
    digest = None if source is None else build.digest([source])
    reasons: list[str] = []
    fitting: list[Library] = []
    for library in libraries():
        if digest is not None and library.description.get("sources") != digest:
            reasons.append("built from other sources than these; run `fastden build`")
            continue
        unfit = library.why_not()
        if not unfit:
            fitting.append(library)
        reasons += unfit
    if fitting:
        return min(fitting, key=_unserved), []  # the first of equals
    if reasons:
        # The user learns of a library for another PyTorch, but not of those from older sources, which fill any cache.
        return None, [next((reason for reason in reasons if "built for" in reason), reasons[0])]
    lacking = build.missing(build.find_toolkit())
    return None, [
        f"not built, and cannot be built here: {'; '.join(lacking)}" if lacking else "not built; run `fastden build`"
    ]


def _unserved(library: Library) -> tuple[int, int]:
    """How many of the GPUs here a library has no code for, and how many it has no matrix instruction of Hopper for."""
    import torch

    architectures = library.description.get("architectures", [])
    here = [torch.cuda.get_device_capability(index) for index in range(torch.cuda.device_count())]
    wgmma = build.has_wgmma(architectures)
    return sum(not build.covers(architectures, one) for one in here), sum(one == (9, 0) and not wgmma for one in here)


def load(library: Path | None = None) -> dict[str, Any]:
    """Load the extension, which registers its operators as ``torch.ops.fastden_cuda``; once in a process.

    Args:
        library: the library; None for the result of :func:`find`.

    Returns:
        The library's description: its build, and the versions that it needs.

    Raises:
        RuntimeError: there is none that fits, or it cannot be loaded, with the reason.
    """
    global _config  # noqa: PLW0603 - a process loads one extension: operators register once
    with _lock:
        if _config is not None:
            return _config
        if library is None:
            found, reasons = find()
            if found is None:
                raise RuntimeError("; ".join(reasons))
            library = found.path
        import torch  # noqa: F401 - its libraries are those that the extension needs

        spec = util.spec_from_file_location(f"fastden.{build.NAME}", library)
        assert spec is not None
        assert spec.loader is not None
        try:
            module = util.module_from_spec(spec)
            spec.loader.exec_module(module)
        except (ImportError, OSError) as error:
            raise RuntimeError(f"{library} cannot be loaded ({error}); run `fastden build --force`") from error
        _config = dict(module.build_config())
        for function in _after_loading:
            function()
        return _config


def after_loading(function: Callable[[], None]) -> None:
    """Call ``function`` when the extension is loaded; at once if it is loaded already.

    The operators' shape functions are registered so: this module does not know the operators.
    """
    with _lock:
        _after_loading.append(function)
        if _config is not None:
            function()


def why_not() -> list[str]:
    """Why the extension cannot be used here with any inputs; empty where it can. Loads it."""
    global _reasons  # noqa: PLW0603 - a process has one extension
    if _config is not None:
        return []
    try:
        load()
    except RuntimeError as error:
        _reasons = [str(error)]
        return [*_reasons]
    return []


def missing() -> bool:
    """Whether :func:`why_not` found reasons before. To look again reads all sources, and may start ``nvcc``."""
    return _config is None and bool(_reasons)


def builds() -> int:
    """How many builds this process has asked for: what was missing before may be there."""
    return _builds


def loaded() -> bool:
    """Whether this process has loaded the extension."""
    return _config is not None


def emulated() -> bool:
    """Whether the extension that is loaded runs its kernels on the CPU."""
    return _config is not None and bool(_config["emulated"])
