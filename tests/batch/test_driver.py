"""What the process that drives a cluster records, and what a resumed run may replace; no cluster runs here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from fastden.batch.driver import known_settings, manifest_of, prepare, remember
from fastden.batch.manifest import Record
from fastden.batch.ray import Worker, mark_absent, plan_rows
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
    todo, _ = prepare(rows, known_settings(settings), manifest, resume=resume)
    worker = Worker(settings, torch.get_num_threads())
    records = [Record.from_json(worker(row)["record"]) for row in todo]
    for record in [] if stopped else records:
        remember(record, manifest)
    return [record.error for record in records]


def make(folder: Path) -> Path:
    (folder / "in").mkdir()
    (folder / "in" / "a.png").write_bytes(encoded(pixels(), "PNG"))
    return folder / "out" / "a.png"


def test_what_was_in_flight_under_other_settings_is_replaced(tmp_path: Path) -> None:
    make(tmp_path)
    assert run(tmp_path, 10) == [None]
    assert run(tmp_path, 20, resume=True, stopped=True) == [None]
    assert run(tmp_path, 20, resume=True) == [None]
    assert run(tmp_path, 20, resume=True) == []


def test_what_was_in_flight_where_results_were_deleted_is_replaced(tmp_path: Path) -> None:
    result = make(tmp_path)
    assert run(tmp_path, 10) == [None]
    result.unlink()
    assert run(tmp_path, 20, stopped=True) == [None]
    assert run(tmp_path, 20, resume=True) == [None]


def test_what_somebody_changed_stays(tmp_path: Path) -> None:
    result = make(tmp_path)
    assert run(tmp_path, 10) == [None]
    edited = encoded(pixels(seed=3), "PNG")
    result.write_bytes(edited)
    (error,) = run(tmp_path, 20, resume=True)
    assert error is not None
    assert "exists already" in error
    assert result.read_bytes() == edited
