"""``fastden denoise --engine ray``: progress and the summary."""

from __future__ import annotations

import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn, TimeRemainingColumn

from fastden.batch import say
from fastden.inference.distributed import Row, distribute


def run_rows(rows: list[Row], settings: dict[str, Any], *, workers: int | None, workers_per_device: int) -> int:
    """Do the rows on Ray, print a line for each and the sums, return the exit code."""
    start = time.perf_counter()
    console = Console(stderr=True)
    columns = (MofNCompleteColumn(), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    bar = Progress(*columns, console=console, disable=not console.is_terminal, transient=True, redirect_stdout=False)
    failed: list[str] = []
    pixels = 0
    with bar:
        task = bar.add_task("denoising", total=len(rows))
        for record in distribute(rows, settings, workers=workers, workers_per_device=workers_per_device):
            bar.advance(task)
            source, target = record["input"], record["output"]
            if record["status"] != "done":
                failed.append(source)
                text = record["error"]
                say(f"error: {text}" if text.startswith((source, target)) else f"error: {source}: {text}", error=True)
                continue
            pixels += record["width"] * record["height"]
            estimated = " (estimated)" if settings["sigma"] == "auto" else ""
            level = "" if record["sigma"] is None else f", sigma {record['sigma']:.1f}{estimated}"
            say(f"{source} -> {target}, {record['width']} x {record['height']}{level}")
            for note in record["notes"]:
                say(f"note: {target}: {note}", error=True)
    seconds = time.perf_counter() - start
    done = len(rows) - len(failed)
    if done:
        rate = f"{pixels / 1e6 / seconds:.2f} MP/s, files read and written, Ray's start included"
        say(f"{done} image{'s' * (done != 1)}, {pixels / 1e6:.2f} megapixels, {seconds:.2f} s ({rate})")
    if failed and len(rows) > 1:
        say(f"error: {len(failed)} of {len(rows)} files failed: {', '.join(failed)}", error=True)
    return 1 if failed else 0
