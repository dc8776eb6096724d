"""PyTorch's library, loaded in parallel with the reading of the command line."""

from __future__ import annotations

import ctypes
import sys
import threading
from collections.abc import Sequence
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path

#: Commands that always compute.
COMPUTING = ("denoise", "noise", "eval", "train")
#: PyTorch's libraries on Linux, in the order in which PyTorch loads them, and whether their symbols are for all.
LIBRARIES = (("libtorch_global_deps.so", True), ("libtorch_cpu.so", False))


def start_loading(arguments: Sequence[str]) -> threading.Thread | None:
    """Begin to load PyTorch's library where the command will need it; None where not.

    Mapping and linking it takes 0.3 s, in which Python can import what reads the command line: ctypes lets go of the
    interpreter's lock, an import does not. PyTorch then finds the library loaded. What fails here, PyTorch tells.

    Args:
        arguments: of the command, without the program's name.
    """
    if sys.platform != "linux" or not arguments or arguments[0] not in COMPUTING or "--help" in arguments:
        return None
    thread = threading.Thread(target=_load, name="fastden-early", daemon=True)
    thread.start()
    return thread


def _load() -> None:
    with suppress(OSError, ValueError, ImportError):
        spec = find_spec("torch")
        for folder in (spec.submodule_search_locations or ()) if spec is not None else ():
            for name, shared in LIBRARIES:
                ctypes.CDLL(str(Path(folder) / "lib" / name), ctypes.RTLD_GLOBAL if shared else ctypes.DEFAULT_MODE)
