"""Capturing CUDA graphs."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def without_collection() -> Iterator[None]:
    """A context in which Python collects no garbage, around the capture of a CUDA graph.

    A collection may destroy an earlier graph, or unload a kernel. CUDA permits neither while a stream is captured, and
    ends the capture with an error (PyTorch's pull request 161037 shows how). PyTorch collected before each capture up
    to 2.8; now it does not. What nothing reaches is destroyed before the context begins.
    """
    gc.collect()
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
