"""One ``BatchDenoiser`` in several hands: threads, listeners, copies and pickles."""

from __future__ import annotations

import copy
import gc
import pickle
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

import fastden
from fastden.batch.plan import plan
from fastden.batch.report import Listener
from fastden.batch.threads import ThreadedRun
from tests.batch.conftest import outputs


def test_threads_that_share_one_object_wait_for_each_other(
    photos: Path, tmp_path: Path, network: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    going: list[int] = []
    most: list[int] = []
    every = ThreadedRun.all

    def watched(self: ThreadedRun) -> Any:
        going.append(1)
        most.append(len(going))
        time.sleep(0.2)
        try:
            return every(self)
        finally:
            going.pop()

    planned: list[int] = []
    monkeypatch.setattr(
        "fastden.batch.denoiser.plan", lambda *given, **options: planned.append(len(going)) or plan(*given, **options)
    )
    monkeypatch.setattr(ThreadedRun, "all", watched)
    batch = fastden.BatchDenoiser(network, sigma=5)
    heard: dict[str, list[str]] = {"a": [], "b": []}

    def run(name: str) -> Any:
        listener = Listener(record=lambda job, record: heard[name].append(job.target.parent.name))
        return batch.run(photos, tmp_path / name, listener=listener)

    with ThreadPoolExecutor(2) as pool:
        assert [len(report.done) for report in pool.map(run, heard)] == [5, 5]
    assert most == [1, 1]
    assert planned == [0, 0]  # what the other run writes is there when the files are looked for
    assert heard == {"a": ["a"] * 5, "b": ["b"] * 5}


def test_a_run_that_its_own_listener_starts_is_refused(photos: Path, tmp_path: Path, network: Any) -> None:
    """It would wait for itself: in the thread that computes, and in those that read and write."""
    batch = fastden.BatchDenoiser(network, sigma=5)
    refused: list[str] = []

    def again(*_: Any) -> None:
        try:
            batch.run(photos / "0.png", tmp_path / "again.png")
        except RuntimeError as error:
            refused.append(f"{threading.current_thread().name}: {error}")

    (photos / "bad.png").write_bytes(b"no image")
    assert len(batch.run(photos, tmp_path / "out", listener=Listener(record=again, progress=again)).done) == 5
    assert {text.split(": ", 1)[1] for text in refused} == {
        "run: called by its own listener; accepted: when it has ended, or another BatchDenoiser"
    }
    assert {text.split(":")[0] for text in refused} == {threading.main_thread().name, "fastden-read", "fastden-write"}
    assert not (tmp_path / "again.png").exists()


def test_the_listener_is_not_kept(photos: Path, tmp_path: Path, network: Any) -> None:
    class Window:
        def show(self, text: str) -> None:
            pass

    window = Window()
    seen = weakref.ref(window)
    batch = fastden.BatchDenoiser(network, sigma=5)
    batch.run(photos, tmp_path / "out", listener=Listener(note=window.show))
    del window
    gc.collect()
    assert seen() is None


@pytest.mark.parametrize("named", [False, True])
def test_copies_and_pickles_denoise(photos: Path, tmp_path: Path, real: Any, named: bool) -> None:
    import cloudpickle

    model = "color" if named else real
    batch = fastden.BatchDenoiser(model, sigma=15, strength=0.5, overwrite=True, max_memory="400M")
    batch.run(photos, tmp_path / "out")
    expected = outputs(tmp_path / "out")
    copies = [copy.copy(batch), copy.deepcopy(batch)]
    copies += [module.loads(module.dumps(batch)) for module in (pickle, cloudpickle)]
    for other in copies:
        assert other.settings.budget == batch.settings.budget
        assert other.run(photos, tmp_path / "out").failed == []
        assert outputs(tmp_path / "out") == expected
