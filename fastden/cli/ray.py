"""``fastden denoise --engine ray``: what was done before, progress and the summary."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import fields
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn, TimeRemainingColumn

from fastden.batch.denoiser import BatchDenoiser
from fastden.batch.manifest import Manifest, Record, open_manifest
from fastden.batch.plan import Job
from fastden.batch.ray import Row, distribute, has_scheme
from fastden.cli.console import say
from fastden.errors import UserError, in_one_line
from fastden.images.whole_files import remove_leftovers
from fastden.network.hub import models


def run_rows(
    rows: list[Row],
    settings: dict[str, Any],
    *,
    output: str,
    manifest: str | None,
    resume: bool,
    workers: int | None,
    workers_per_device: int,
    unreadable: Sequence[OSError] = (),
) -> int:
    """Do the rows on Ray, print a line for each and the sums, return the exit code.

    Args:
        rows: from :func:`fastden.batch.ray.plan_rows`.
        settings: keyword arguments of :class:`fastden.BatchDenoiser`.
        output: of the command.
        manifest, resume: as of :meth:`fastden.BatchDenoiser.run`. This process alone writes the manifest; a run that
            names URLs has none.
        workers, workers_per_device: as of :func:`fastden.batch.ray.choose_pool`.
        unreadable: folders that could not be looked into; they count as failures.

    Raises:
        UserError: a wrong setting, an output that is its own input, or Ray does not start.
    """
    for row in rows:
        if os.path.realpath(row["input"]) == os.path.realpath(row["output"]):
            raise UserError(f"output: {row['output']} is the input; accepted with --engine ray: another folder")
    settings = _for_any_folder(settings)
    start = time.perf_counter()
    book = None if any(has_scheme(name) for row in rows for name in row.values()) else _open(rows, output, manifest)
    if resume and book is None:
        raise UserError("resume: there is no manifest to resume from; accepted: local files and an output folder")
    rows, before = (rows, 0) if book is None else _prepared(rows, settings, book, resume)
    console = Console(stderr=True)
    columns = (MofNCompleteColumn(), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    bar = Progress(*columns, console=console, disable=not console.is_terminal, transient=True, redirect_stdout=False)
    failed: list[str] = []
    pixels = 0
    for missing in unreadable:
        say(f"error: {in_one_line(missing)}", error=True)
    with bar:
        task = bar.add_task("denoising", total=len(rows))
        for record in distribute(rows, settings, workers=workers, workers_per_device=workers_per_device):
            bar.advance(task)
            if book is not None:
                _note_down(book, record)
            source, target = record["input"], record["output"]
            if record["status"] != "done":
                failed.append(source)
                text = record["error"]
                say(f"error: {text}" if text.startswith((source, target)) else f"error: {source}: {text}", error=True)
                continue
            pixels += record["width"] * record["height"] * record["pages"]
            estimated = " (estimated)" if record["sigma_source"] == "estimated" else ""
            level = "" if record["sigma"] is None else f", sigma {record['sigma']:.1f}{estimated}"
            pages = f", {record['pages']} pages" if record["pages"] > 1 else ""
            say(f"{source} -> {target}, {record['width']} x {record['height']}{pages}{level}")
            for note in record["notes"]:
                say(f"note: {target}: {note}", error=True)
    seconds = time.perf_counter() - start
    done = len(rows) - len(failed)
    if before:
        say(f"{before} image{'s' * (before != 1)} done before")
    if done:
        rate = f"{pixels / 1e6 / seconds:.2f} MP/s, files read and written, Ray's start included"
        say(f"{done} image{'s' * (done != 1)}, {pixels / 1e6:.2f} megapixels, {seconds:.2f} s ({rate})")
    failed += [str(missing.filename) for missing in unreadable]
    if failed and len(rows) > 1:
        say(f"error: {len(failed)} of {len(rows) + len(unreadable)} files failed: {', '.join(failed)}", error=True)
    return 1 if failed else 0


def _for_any_folder(settings: dict[str, Any]) -> dict[str, Any]:
    """Workers have working folders of their own: paths become absolute."""
    model, sigma_map = str(settings["model"]), settings["sigma_map"]
    if model not in models() and Path(model).is_dir():
        model = os.path.abspath(model)
    return {**settings, "model": model, "sigma_map": None if sigma_map is None else os.path.abspath(sigma_map)}


def _open(rows: list[Row], output: str, manifest: str | None) -> Manifest | None:
    target = Path(os.path.abspath(output))
    return open_manifest(manifest, [Job(Path(row["input"]), Path(row["output"])) for row in rows], target)


def _prepared(rows: list[Row], settings: dict[str, Any], book: Manifest, resume: bool) -> tuple[list[Row], int]:
    """The rows to do, and how many of an earlier run are done.

    What is begun goes on record first: an output that is there afterwards, but was not before, may be replaced by a
    run that resumes.
    """
    # Which weights and options count is known without a device, which the workers alone may have.
    shared = BatchDenoiser(**{**settings, "device": "cpu"}).settings
    left = []
    for row in rows:
        job = Job(Path(row["input"]), Path(row["output"]))
        try:
            options = shared.options(job)
        except UserError:  # no format that can be written: the worker says so
            left.append(row)
            continue
        if resume and book.finished(job, shared.weights, options):
            continue
        if resume and book.knows(job):
            left.append({**row, "replaces": "yes"})
            continue
        left.append(row)
        if not job.target.exists():
            job.target.parent.mkdir(parents=True, exist_ok=True)
            began = datetime.now(timezone.utc).isoformat(timespec="seconds")
            book.add(
                Record(row["input"], book.name_of(job.target), "writing", began, dict(shared.weights), dict(options))
            )
    if resume:
        for folder in {Path(row["output"]).parent for row in rows}:
            remove_leftovers(folder)
    return left, len(rows) - len(left)


def _note_down(book: Manifest, record: dict[str, Any]) -> None:
    kept = {field.name: record[field.name] for field in fields(Record) if field.name in record}
    book.add(Record(**{**kept, "output": book.name_of(Path(record["output"])), "notes": tuple(record["notes"])}))
