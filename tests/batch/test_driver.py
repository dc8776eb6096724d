"""What the process that drives a cluster records, and what a resumed run may replace; no cluster runs here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import fastden
from fastden.batch.driver import known_settings, manifest_of, prepare, remember
from fastden.batch.manifest import NAME, Record
from fastden.batch.ray import Row, Worker, mark_absent, plan_rows
from fastden.batch.writing import Writing
from tests.image_files import encoded, pixels


def run(folder: Path, sigma: float, *, resume: bool = False, stopped: bool = False) -> list[str | None]:
    """One run as the command does it; the error of each file, None where there is none.

    Args:
        stopped: the worker's records come too late: the driver has ended.
    """
    settings: dict[str, Any] = {
        "model": "color", "sigma": sigma, "sigma_map": None, "device": "cpu", "quality": "normal",
    }  # fmt: skip
    out = str(folder / "out")
    rows = mark_absent(plan_rows([str(folder / "in")], out), out)
    manifest = manifest_of(rows, "auto", out)
    assert manifest is not None
    todo, _, refused = prepare(rows, known_settings(settings), manifest, resume=resume)
    worker = Worker(settings, torch.get_num_threads(), str(manifest.path))
    records = [Record.from_json(worker(row)["record"]) for row in todo]
    if not stopped:
        for record in records:
            remember(record, manifest)
        manifest.take_over()
    return [record.error for record in refused + records]


def make(folder: Path) -> Path:
    (folder / "in").mkdir()
    (folder / "in" / "a.png").write_bytes(encoded(pixels(), "PNG"))
    return folder / "out" / "a.png"


def test_what_was_in_flight_under_other_settings_is_replaced(tmp_path: Path) -> None:
    make(tmp_path)
    assert run(tmp_path, 10) == [None]
    assert run(tmp_path, 20, resume=True, stopped=True) == [None]
    assert run(tmp_path, 30, resume=True) == [None]
    assert run(tmp_path, 30, resume=True) == []


def test_what_was_in_flight_where_results_were_deleted_is_replaced(tmp_path: Path) -> None:
    result = make(tmp_path)
    assert run(tmp_path, 10) == [None]
    result.unlink()
    assert run(tmp_path, 20, stopped=True) == [None]
    assert run(tmp_path, 30, resume=True) == [None]


def test_a_file_that_appears_after_the_start_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a run that ended before its worker wrote, and in one that goes on; an earlier result is there or not."""
    result = make(tmp_path)
    own = encoded(pixels(seed=3), "PNG")
    for earlier in (False, True):
        if earlier:
            result.unlink()
            assert run(tmp_path, 10) == [None]
        with monkeypatch.context() as dying:
            dying.setattr(Worker, "__call__", lambda self, row: {"record": failed(row)})
            run(tmp_path, 20, resume=earlier, stopped=True)
        result.parent.mkdir(exist_ok=True)
        result.write_bytes(own)
        (error,) = run(tmp_path, 20, resume=True)
        assert error is not None
        assert ("changed since fastden wrote it" if earlier else "exists already") in error
        assert result.read_bytes() == own
    result.unlink()
    begin = Writing.begin

    def begin_late(self: Writing, *arguments: Any, **values: Any) -> Record:
        result.write_bytes(own)
        return begin(self, *arguments, **values)

    with monkeypatch.context() as late:
        late.setattr(Writing, "begin", begin_late)
        (error,) = run(tmp_path, 20, resume=True)
    assert error is not None
    assert "exists already" in error
    assert result.read_bytes() == own


def failed(row: Row) -> str:
    return Record(row["input"], row["output"], "failed", "", {}, {}).as_json()


def test_files_of_workers_go_at_the_end(tmp_path: Path) -> None:
    """What an early end left in them goes into the manifest, once."""
    result = make(tmp_path)
    assert run(tmp_path, 10, stopped=True) == [None]
    names = {path.name for path in result.parent.iterdir()}
    assert len(names) == 2
    assert NAME not in names
    assert run(tmp_path, 10, resume=True) == []
    assert {path.name for path in result.parent.iterdir()} == {NAME, "a.png"}
    assert len((result.parent / NAME).read_bytes().splitlines()) == 1
    assert run(tmp_path, 10, resume=True) == []
    assert fastden.BatchDenoiser("color", sigma=10).run(tmp_path / "in", tmp_path / "out", resume=True).records == []


def test_what_somebody_changed_stays(tmp_path: Path) -> None:
    result = make(tmp_path)
    assert run(tmp_path, 10) == [None]
    edited = encoded(pixels(seed=3), "PNG")
    result.write_bytes(edited)
    (error,) = run(tmp_path, 20, resume=True)
    assert error is not None
    assert "changed since fastden wrote it" in error
    assert result.read_bytes() == edited
