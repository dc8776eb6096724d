"""Capturing CUDA graphs."""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator
from contextlib import contextmanager

_lock = threading.Lock()
#: Whether collection was enabled before the first capture, and then one entry for each capture that goes on.
_enabled: list[bool] = []


@contextmanager
def without_collection() -> Iterator[None]:
    """A context in which Python collects no garbage, around the capture of a CUDA graph.

    A collection may destroy an earlier graph, or unload a kernel. CUDA permits neither while a stream is captured, and
    ends the capture with an error (PyTorch's pull request 161037 shows how). PyTorch collected before each capture up
    to 2.8; now it does not. What nothing reaches is destroyed before the context begins.
    """
    gc.collect()
    with _lock:  # several threads may capture: the last one to end enables it again
        if not _enabled:
            _enabled.append(gc.isenabled())
        _enabled.append(True)
        gc.disable()
    try:
        yield
    finally:
        with _lock:
            _enabled.pop()
            if len(_enabled) == 1 and _enabled.pop():
                gc.enable()
