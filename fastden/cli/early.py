"""A quick start: PyTorch's library is loaded in parallel with Python's imports, and imports collect no garbage."""

from __future__ import annotations

import atexit
import ctypes
import gc
import os
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path

#: Commands that always compute.
COMPUTING = ("denoise", "noise", "eval", "train")
#: PyTorch's libraries on Linux, in the order in which PyTorch loads them, and whether their symbols are for all.
LIBRARIES = (("libtorch_global_deps.so", True), ("libtorch_cpu.so", False))


def start_loading(arguments: Sequence[str]) -> threading.Thread | None:
    """Begin to load PyTorch's library where the command will need it; None where not.

    Mapping and linking it takes 0.2 s, in which Python can import what reads the command line. PyTorch then finds the
    library loaded. What fails here, PyTorch tells.

    Args:
        arguments: of the command, without the program's name.
    """
    if sys.platform != "linux" or not arguments or arguments[0] not in COMPUTING or "--help" in arguments:
        return None
    thread = threading.Thread(target=_load, name="fastden-early", daemon=True)
    thread.start()
    return thread


def _load() -> None:
    # ctypes.CDLL(path) keeps the interpreter's lock while it loads. A call of a C function lets go of it.
    dlopen = ctypes.CDLL(None).dlopen
    dlopen.argtypes, dlopen.restype = (ctypes.c_char_p, ctypes.c_int), ctypes.c_void_p
    with suppress(ValueError, ImportError):
        spec = find_spec("torch")
        for folder in (spec.submodule_search_locations or ()) if spec is not None else ():
            for name, shared in LIBRARIES:
                path = Path(folder) / "lib" / name
                dlopen(os.fsencode(path), os.RTLD_NOW | (os.RTLD_GLOBAL if shared else os.RTLD_LOCAL))


@contextmanager
def without_garbage_collection() -> Iterator[None]:
    """Import without garbage collection, and exempt what is there afterwards from later ones, until Python ends.

    Nearly all that an import makes lives to the end, and each full collection looks at all of it again.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        # Python frees modules when it ends. Without their cycles Triton's library prints that its objects leak.
        atexit.unregister(gc.unfreeze)
        atexit.register(gc.unfreeze)
        if enabled:
            gc.enable()
