"""``fastden denoise --engine ray``: image files on the workers of a Ray cluster."""

from __future__ import annotations

import os
import time
from pathlib import Path

from fastden.batch.driver import for_any_folder, for_driver, known_settings, manifest_of, prepare, remember
from fastden.batch.manifest import Record, made_before
from fastden.batch.ray import check_places, connect, distribute, mark_absent, plan_rows, told_by_ray
from fastden.batch.report import Report
from fastden.cli.console import clean_termination, say
from fastden.cli.display import Display
from fastden.cli.options import Request, check_model, naming
from fastden.errors import UserError
from fastden.images.finder import left_out_note


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
    check_places(rows)
    settings = for_any_folder(request.settings)
    check_model(for_driver(settings))  # before Ray starts
    with naming():
        known = known_settings(settings)
    request.note_sigma()
    manifest = manifest_of(rows, request.manifest, request.output)
    if request.resume and manifest is None:
        raise UserError("resume: there is no manifest to resume from; accepted: local files and an output folder")
    earlier = manifest is not None and not request.resume and manifest.path.exists()
    display = Display(len(rows), unreadable, earlier=earlier)
    report, start = Report(len(rows)), time.perf_counter()
    rows = mark_absent(rows, request.output)
    refused: list[Record] = []
    if manifest is not None:
        rows, report.skipped, refused = prepare(rows, known, manifest, resume=request.resume)

    def ended(record: Record) -> None:
        report.add(record)
        if manifest is not None:
            remember(record, manifest)
        display.record(record.input, record.output, record)
        display.progress(len(report.skipped) + len(report.records))

    interrupted = False
    with display:
        try:
            for record in refused:
                ended(record)
            if rows:
                pool = connect(workers, workers_per_device, settings["device"])
                report.networks = min(pool.workers, len(rows))
                path = None if manifest is None else os.path.abspath(manifest.path)
                with clean_termination():  # behind Ray's start, which sets a handler that ends in a crash
                    for record in distribute(rows, settings, pool, path):
                        ended(record)
            if manifest is not None:
                manifest.take_over()
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
