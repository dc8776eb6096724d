"""What the process that drives a cluster does itself: it checks the settings, and writes the manifest alone."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from fastden.batch.denoiser import BatchDenoiser
from fastden.batch.manifest import Manifest, Record, open_manifest
from fastden.batch.plan import Job
from fastden.batch.ray import Row, has_scheme
from fastden.batch.settings import Settings
from fastden.batch.writing import Writing
from fastden.errors import UserError
from fastden.network.hub import models
from fastden.whole_files import remove_leftovers


def for_any_folder(settings: dict[str, Any]) -> dict[str, Any]:
    """Keyword arguments of :class:`fastden.BatchDenoiser`, with absolute paths: workers have their own folders."""
    model, sigma_map = settings["model"], settings["sigma_map"]
    if model is not None and model not in models() and Path(model).is_dir():
        model = os.path.abspath(model)
    return {**settings, "model": model, "sigma_map": None if sigma_map is None else os.path.abspath(sigma_map)}


def for_driver(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings as this process can check them: perhaps only the workers have the device, or compute in 8 bits."""
    fast = settings["quality"] == "fast"
    return {**settings, "device": "cpu", "quality": "normal" if fast else settings["quality"]}


def known_settings(settings: dict[str, Any]) -> Settings:
    """The workers' settings, for the manifest.

    Raises:
        UserError, ValueError, TypeError: as :class:`fastden.BatchDenoiser`.
    """
    known = BatchDenoiser(**for_driver(settings)).settings
    known.wishes = replace(known.wishes, quality=settings["quality"])
    return known


def _job(row: Row) -> Job:
    return Job(Path(row["input"]), Path(row["output"]))


def manifest_of(rows: Sequence[Row], manifest: str | None, output: str) -> Manifest | None:
    """The manifest of a run, which this process alone writes; none with URLs.

    Args:
        rows, output: of :func:`plan_rows`.
        manifest: as of :meth:`fastden.BatchDenoiser.run`.
    """
    if any(has_scheme(name) for row in rows for name in row.values()):
        return None
    opened = open_manifest(manifest, list(map(_job, rows)), Path(os.path.abspath(output)))
    if opened is not None:
        opened.take_over()
    return opened


def prepare(
    rows: Sequence[Row], shared: Settings, manifest: Manifest, *, resume: bool
) -> tuple[list[Row], list[Job], list[Record]]:
    """The rows to do, the jobs that an earlier run has done, and the failures of those that cannot be done again."""
    if not resume:
        return list(rows), [], []
    todo: list[Row] = []
    done: list[Job] = []
    refused: list[Record] = []
    for row in rows:
        job = _job(row)
        try:
            if manifest.finished(job, shared.known_weights, shared.options(job)):
                done.append(job)
                continue
            replaces = manifest.may_replace(job, overwrite=shared.overwrite)
        except UserError as error:
            refused.append(Writing(shared).failure(job, error))
            continue
        todo.append({"input": row["input"], "output": row["output"], "replaces": "yes"} if replaces else row)
    for folder in {Path(row["output"]).parent for row in rows}:
        remove_leftovers(folder)
    return todo, done, refused


def remember(record: Record, manifest: Manifest) -> None:
    """Add a worker's record to the manifest, which has names of its own for outputs."""
    manifest.add(replace(record, output=manifest.name_of(Path(record.output))))
