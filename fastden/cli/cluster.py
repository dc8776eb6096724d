"""``fastden denoise --engine ray``: image files on the workers of a Ray cluster."""

from __future__ import annotations

import os
import time
from contextlib import suppress
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from fastden.batch.denoiser import BatchDenoiser
from fastden.batch.manifest import Manifest, Record, made_before, open_manifest
from fastden.batch.plan import Job
from fastden.batch.ray import Row, connect, distribute, has_scheme, mark_absent, plan_rows, told_by_ray
from fastden.batch.report import Report
from fastden.batch.settings import Settings
from fastden.cli.console import say
from fastden.cli.display import Display
from fastden.cli.options import Request, check_model, naming
from fastden.errors import UserError
from fastden.images.finder import left_out_note
from fastden.images.whole_files import remove_leftovers
from fastden.network.hub import models


def denoise_on_cluster(request: Request, *, workers: int | None, workers_per_device: int) -> int:
    """Denoise image files on Ray; the exit code. This process alone writes the manifest; with URLs there is none.

    Args:
        request: what the command was asked for; inputs and output may be URLs.
        workers, workers_per_device: as of :func:`fastden.batch.ray.choose_pool`.

    Raises:
        UserError: a wrong setting, an output that is its own input, or Ray does not start or stops.
    """
    unreadable: list[OSError] = []
    left_out: list[Path] = []
    rows = plan_rows(
        request.inputs,
        request.output,
        recursive=request.recursive,
        format_name=request.format_name,
        unreadable=unreadable,
        made=made_before(request.manifest, Path(request.output)) if request.resume else None,
        left_out=left_out,
    )
    for row in rows:
        if os.path.realpath(row["input"]) == os.path.realpath(row["output"]):
            raise UserError(f"output: {row['output']} is the input; accepted with --engine ray: another folder")
    settings = _for_any_folder(request.settings)
    # Checked here, before Ray starts, and without a device: perhaps only the workers have one.
    fast = settings["quality"] == "fast"  # which this CPU may not be able to compute
    here = {**settings, "device": "cpu", "quality": "normal" if fast else settings["quality"]}
    check_model(here)
    with naming():
        known = BatchDenoiser(**here).settings
    known.wishes = replace(known.wishes, quality=settings["quality"])
    manifest = _open_manifest(rows, request)
    if request.resume and manifest is None:
        raise UserError("resume: there is no manifest to resume from; accepted: local files and an output folder")
    display, report, start = Display(len(rows), unreadable), Report(len(rows)), time.perf_counter()
    rows = mark_absent(rows, request.output)
    if manifest is not None:
        rows, report.skipped = _prepare(rows, known, manifest, request.resume)
    interrupted = False
    with display:
        try:
            if rows:
                pool = connect(workers, workers_per_device, settings["device"])
                report.networks = min(pool.workers, len(rows))
                for record in distribute(rows, settings, pool):
                    report.add(record)
                    if manifest is not None:
                        manifest.add(replace(record, output=manifest.name_of(Path(record.output))))
                    display.record(record.input, record.output, record)
                    display.progress(len(report.skipped) + len(report.records))
        except KeyboardInterrupt:
            interrupted = True
        except Exception as error:
            cause = told_by_ray(error)
            if not cause:
                raise
            raise UserError(f"engine: ray stopped: {cause}") from error
    report.close(time.perf_counter() - start)
    code = display.summary(
        report, interrupted=interrupted, resumable=manifest is not None, including=", Ray's start included"
    )
    if left_out:
        say(f"note: {left_out_note(left_out)}", error=True)
    return code


def _for_any_folder(settings: dict[str, Any]) -> dict[str, Any]:
    """Paths become absolute, because workers have their own working folders."""
    model, sigma_map = settings["model"], settings["sigma_map"]
    if model is not None and model not in models() and Path(model).is_dir():
        model = os.path.abspath(model)
    return {**settings, "model": model, "sigma_map": None if sigma_map is None else os.path.abspath(sigma_map)}


def _job(row: Row) -> Job:
    return Job(Path(row["input"]), Path(row["output"]))


def _open_manifest(rows: list[Row], request: Request) -> Manifest | None:
    if any(has_scheme(name) for row in rows for name in row.values()):
        return None
    return open_manifest(request.manifest, list(map(_job, rows)), Path(os.path.abspath(request.output)))


def _prepare(rows: list[Row], shared: Settings, manifest: Manifest, resume: bool) -> tuple[list[Row], list[Job]]:
    """The rows to do, and the jobs that an earlier run has done.

    The manifest records each job before it begins. Where an output did not exist before, a resumed run may replace it.
    """
    todo: list[Row] = []
    done: list[Job] = []
    for row in rows:
        job = _job(row)
        try:
            options = shared.options(job)
        except UserError:  # the format cannot be written: the worker reports it
            todo.append(row)
            continue
        if resume and manifest.finished(job, shared.known_weights, options):
            done.append(job)
        elif resume and manifest.knows(job):
            todo.append({**row, "replaces": "yes"})
        else:
            todo.append(row)
            if "replaces" in row:
                with suppress(OSError):  # the worker reports it
                    job.target.parent.mkdir(parents=True, exist_ok=True)
                now = datetime.now(timezone.utc).isoformat(timespec="seconds")
                name = manifest.name_of(job.target)
                manifest.add(Record(row["input"], name, "writing", now, shared.weights(), dict(options)))
    if resume:
        for folder in {Path(row["output"]).parent for row in rows}:
            remove_leftovers(folder)
    return todo, done
