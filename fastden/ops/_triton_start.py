"""Whether Triton starts: found once for each GPU, by a small kernel.

A package that can be imported does not show it. At its first launch Triton compiles C code, loads libcuda and writes a
cache, and raises all kinds of errors where one of these fails: a read-only home, a missing libc header, a folder that
is mounted noexec.
"""

from __future__ import annotations

import threading
import warnings

import torch

#: What each GPU's probe raised; empty where Triton started.
_found: dict[int, str] = {}
_lock = threading.Lock()


def why_not_started(device: torch.device) -> str:
    """Why Triton does not start on a CUDA device; empty if it does. The first failure is also a warning.

    While a CUDA graph is captured, nothing new is tried: the probe waits for the device, which ends a capture.
    """
    index = torch.cuda.current_device() if device.index is None else device.index
    reason = _found.get(index)
    if reason is not None:
        return reason
    if torch.cuda.is_current_stream_capturing():
        return "a CUDA graph is captured, and Triton has not started before"
    with _lock:
        if index not in _found:
            reason = _probed(torch.device("cuda", index))
            first = not any(_found.values())
            _found[index] = reason  # before the warning, which may be an error
            if reason and first:
                warnings.warn(
                    f"Triton cannot start here ({reason}). fastden runs without its Triton kernels, which takes longer;"
                    " FASTDEN_BACKEND=triton shows Triton's own error, FASTDEN_BACKEND=torch does not try",
                    RuntimeWarning,
                    stacklevel=2,
                )
        return _found[index]


def _probed(device: torch.device) -> str:
    # In a thread of its own, which no mode, transform, autocast or tracing of the caller reaches.
    reasons = ["it ended without a result"]

    def run() -> None:
        try:
            from fastden.kernels._probe import probe

            probe(device)
            reasons.clear()
        except Exception as error:  # OSError, AssertionError, CalledProcessError, Triton's own
            lines = [line.strip() for line in str(error).splitlines() if line.strip()]
            reasons[:] = [": ".join([type(error).__name__, *lines[:1]])]

    thread = threading.Thread(target=run, name="fastden-probe")
    try:
        thread.start()
    except RuntimeError as error:  # the system allows no more threads
        return f"RuntimeError: {error}"
    thread.join()
    return reasons[0] if reasons else ""
