"""Mutated files: the reader refuses them in one line or reads them, in memory and strip by strip alike."""

from __future__ import annotations

import random
import tempfile
from pathlib import Path
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from tests.soak import fuzz_reader

FILES = fuzz_reader.corpus()


@settings(max_examples=150)
@given(name=st.sampled_from(sorted(FILES)), seed=st.integers(0, 2**32))
def test_mutated_files(name: str, seed: int) -> None:
    data = fuzz_reader.mutate(FILES[name], list(FILES.values()), random.Random(seed))
    with tempfile.TemporaryDirectory() as folder:
        path, output = Path(folder) / f"input{Path(name).suffix}", Path(folder) / "out"
        output.mkdir()
        path.write_bytes(data)
        assert fuzz_reader.examine(path, output) in ("read", "refused", "read, not written")


def test_valid_files_are_read() -> None:
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "out"
        output.mkdir()
        for name, data in FILES.items():
            path = Path(folder) / name
            path.write_bytes(data)
            assert fuzz_reader.examine(path, output) == "read", name


def test_a_worker_that_dies_or_hangs_is_counted(monkeypatch: Any) -> None:
    class Broken:
        """Replaces a pipe to a process."""

        def __init__(self, error: bool) -> None:
            self.error = error

        def send(self, number: int) -> None:
            assert number == 7

        def poll(self, limit: float) -> bool:
            if self.error:
                raise EOFError
            return False

    monkeypatch.setattr(fuzz_reader.Worker, "_start", lambda self: None)
    for error, outcome in ((True, "crash"), (False, "hang")):
        worker = fuzz_reader.Worker(0)
        worker.connection, worker.ready = Broken(error), True
        worker.process = type("Process", (), {"kill": lambda _: None, "join": lambda _: None, "exitcode": -11})()
        assert worker.examine(7) == ("", f"{outcome} (exit code -11)")
