"""Contenders in turn, medians with their spread, memory."""

from __future__ import annotations

import gc
import itertools
import sys
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from unittest.mock import MagicMock

import pytest
import torch

from fastden.bench.timing import Replay, Stopwatch, interleaved, peak_mib, summary


def test_rounds_are_interleaved_and_begin_with_the_next_contender() -> None:
    order: list[str] = []
    calls = {name: partial(order.append, name) for name in "abc"}
    clock = itertools.count()

    def measure(call: partial[None]) -> float:
        call()
        return float(next(clock))

    times = interleaved(calls, measure, rounds=3, repeats=2)
    # Each is called once without timing and twice with.
    assert "".join(order) == "aaabbbccc" + "bbbcccaaa" + "cccaaabbb"
    assert times == {
        "a": [0.0, 1.0, 10.0, 11.0, 14.0, 15.0],
        "b": [2.0, 3.0, 6.0, 7.0, 16.0, 17.0],
        "c": [4.0, 5.0, 8.0, 9.0, 12.0, 13.0],
    }


def test_a_failure_names_the_contender(capsys: pytest.CaptureFixture[str]) -> None:
    calls = {"a": lambda: None, "b": lambda: 1 / 0}
    with pytest.raises(ZeroDivisionError):
        interleaved(calls, lambda call: 1.0, rounds=2)
    assert capsys.readouterr().err == "b: failed while it was timed\n"


def test_nothing_to_measure() -> None:
    assert interleaved({}, lambda call: 0.0, rounds=3) == {}


def test_summary_is_median_and_quartiles() -> None:
    assert summary([5.0, 1.0, 2.0, 3.0, 4.0]) == {"median_ms": 3.0, "q1_ms": 2.0, "q3_ms": 4.0, "iqr_ms": 2.0}
    assert summary([7.0]) == {"median_ms": 7.0, "q1_ms": 7.0, "q3_ms": 7.0, "iqr_ms": 0.0}


def test_stopwatch_counts_milliseconds() -> None:
    import time

    assert 20 <= Stopwatch(torch.device("cpu"))(lambda: time.sleep(0.02)) < 2000


@pytest.mark.skipif(sys.platform != "linux", reason="the resident set is Linux's")
def test_peak_memory_is_what_the_call_adds() -> None:
    kept = torch.ones(16 << 20, dtype=torch.uint8)
    found = peak_mib(lambda: torch.ones(64 << 20, dtype=torch.uint8), torch.device("cpu"))
    if found is None:
        pytest.skip("this system does not reset the peak")
    assert 60 <= found <= 90
    assert kept.all()


def added_to(value: float, device: str, size: int = 3) -> tuple[Callable[[], torch.Tensor], weakref.ref[torch.Tensor]]:
    """A call that adds 1 to a tensor which it alone holds, and that tensor."""
    source = torch.full((size,), value, device=device)
    return partial(torch.add, source, 1), weakref.ref(source)


def test_a_replay_holds_what_its_graph_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("Stream", "CUDAGraph", "current_stream"):
        monkeypatch.setattr(torch.cuda, name, MagicMock())
    for name in ("stream", "graph"):
        monkeypatch.setattr(torch.cuda, name, nullcontext)
    call, source = added_to(1.0, "cpu")
    replay = Replay(call)
    del call
    gc.collect()
    assert source() is not None
    assert torch.equal(replay(), torch.full((3,), 2.0))
    del replay
    gc.collect()
    assert source() is None


class Cycle:
    """Unreachable once its name is gone, but freed by a collection alone."""

    def __init__(self) -> None:
        self.own = self


def test_no_collection_during_a_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would destroy earlier graphs, which CUDA does not permit then. They go before."""
    for name in ("Stream", "CUDAGraph", "current_stream", "stream"):
        monkeypatch.setattr(torch.cuda, name, MagicMock())
    seen: list[tuple[bool, bool]] = []

    @contextmanager
    def graph(_: object) -> Iterator[None]:
        seen.append((gc.isenabled(), garbage() is None))
        yield
        seen.append((gc.isenabled(), garbage() is None))

    monkeypatch.setattr(torch.cuda, "graph", graph)
    cycle = Cycle()
    garbage = weakref.ref(cycle)
    del cycle
    Replay(lambda: None)
    assert seen == [(False, True), (False, True)]
    assert gc.isenabled()


@pytest.mark.gpu
def test_replays_read_their_inputs_after_the_next_capture() -> None:
    """A capture returns the memory that nothing holds to the driver; what comes next may take its place."""
    size = 16 << 20  # 64 MiB, an allocation of its own
    first = Replay(added_to(1.0, "cuda", size)[0])
    second = Replay(added_to(2.0, "cuda", size)[0])
    other = torch.full((size,), 7.0, device="cuda")
    assert (first() == 2).all()
    assert (second() == 3).all()
    assert (other == 7).all()
