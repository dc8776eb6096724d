"""Triton is tried once, with a kernel of its own, before it is chosen automatically."""

from __future__ import annotations

import subprocess
import threading
import warnings
from typing import Any

import pytest
import torch

from fastden.ops import _triton_start
from fastden.ops._triton_start import why_not_started

CUDA = torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def nothing_found(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.setattr(_triton_start, "_found", {})
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (PermissionError(13, "Permission denied", "/.triton"), "PermissionError: [Errno 13] Permission denied: "),
        (AssertionError("libcuda.so cannot found!\nPossible files"), "AssertionError: libcuda.so cannot found!"),
        (subprocess.CalledProcessError(1, ["gcc", "main.c"]), "CalledProcessError: Command '['gcc', 'main.c']'"),
        (RuntimeError(), "RuntimeError"),
    ],
)
def test_whatever_it_raises(monkeypatch: pytest.MonkeyPatch, error: Exception, told: str) -> None:
    tried: list[torch.device] = []

    def probe(device: torch.device) -> None:
        tried.append(device)
        raise error

    monkeypatch.setattr("fastden.kernels._probe.probe", probe)
    with pytest.warns(RuntimeWarning, match="Triton cannot start here") as warned:
        reason = why_not_started(CUDA)
    assert reason.startswith(told)
    assert "\n" not in reason
    assert reason in str(warned[0].message)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert why_not_started(CUDA) == reason
        assert why_not_started(torch.device("cuda", 1)).startswith(told)
    assert tried == [CUDA, torch.device("cuda", 1)]


def test_it_is_tried_once_by_many_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[bool] = []
    monkeypatch.setattr("fastden.kernels._probe.probe", lambda device: tried.append(torch.is_grad_enabled()))
    found: list[str] = []
    with torch.no_grad():  # which the probe's own thread does not see
        threads = [threading.Thread(target=lambda: found.append(why_not_started(CUDA))) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert why_not_started(CUDA) == ""
    assert found == [""] * 8
    assert tried == [True]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_warning_that_is_an_error_tries_once(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[bool] = []

    def probe(device: torch.device) -> None:
        tried.append(True)
        raise SystemExit  # which ends a thread without a word

    monkeypatch.setattr("fastden.kernels._probe.probe", probe)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(RuntimeWarning, match="it ended without a result"):
            why_not_started(CUDA)
        assert why_not_started(CUDA) == "it ended without a result"
    assert len(tried) == 1


def test_no_more_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    def start(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", start)
    with pytest.warns(RuntimeWarning, match="can't start new thread"):
        assert why_not_started(CUDA) == "RuntimeError: can't start new thread"


def test_a_capture_is_not_disturbed(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[Any] = []
    monkeypatch.setattr("fastden.kernels._probe.probe", tried.append)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert "captured" in why_not_started(CUDA)
    assert not tried
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert why_not_started(CUDA) == ""
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert why_not_started(CUDA) == ""


@pytest.mark.gpu
def test_it_starts_on_this_gpu() -> None:
    with torch.inference_mode():
        assert why_not_started(CUDA) == ""


def test_without_a_gpu_the_probe_itself_fails() -> None:
    if torch.cuda.is_available():
        pytest.skip("a GPU is here")
    with pytest.warns(RuntimeWarning, match="Triton cannot start here"):
        assert why_not_started(CUDA)
