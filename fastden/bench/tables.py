"""A benchmark's output: a table, a JSON document, an exit code."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from fastden.bench.compare import all_right
from fastden.whole_files import write_bytes

COLUMNS = (
    "contender", "ms", "IQR", "ms / MP", "images / s", "matrix rate", "bandwidth", "MiB", "J / MP", "slower by",
    "error",
)  # fmt: skip


def table(result: Mapping[str, Any]) -> Table:
    """A comparison as a table: one row for each contender."""
    shown = Table(*COLUMNS, title=f"{result['name']}, {result['megapixels']:.2f} MP", title_justify="left")
    for name, row in result["contenders"].items():
        if "failed" in row:
            shown.add_row(name, "failed", *[""] * 7, row["failed"][:40])
            continue
        ratio = f"{row['slower_by']:.2f} x" if "slower_by" in row else "" if row["right"] else "wrong result"
        shown.add_row(
            name,
            f"{row['median_ms']:.3f}",
            f"{row['iqr_ms']:.3f}",
            f"{row['ms_a_megapixel']:.3f}",
            f"{row['images_a_second']:.1f}",
            _percent(row.get("share_of_matrix_rate")),
            _percent(row.get("share_of_copy_bandwidth")),
            _number(row.get("peak_mib"), ".0f"),
            _number(row.get("joules_a_megapixel"), ".3f"),
            ratio,
            f"{row['errors']['relative_l2']:.1e}",
        )
    return shown


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.0f} %"


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def show(results: Sequence[Mapping[str, Any]], limits: Mapping[str, float], left_out: Mapping[str, str]) -> None:
    """Print all tables, the ceilings, and which contenders were left out and why."""
    console = Console(width=None if sys.stdout.isatty() else 132)
    for result in results:
        console.print(table(result))
    if limits:
        rate, copied = limits["matrix_tflops"], limits["copy_gigabytes_a_second"]
        console.print(f"this machine multiplies matrices at {rate:.2f} TFLOP/s and copies at {copied:.0f} GB/s")
    for name, reason in left_out.items():
        console.print(f"left out: {name}: {reason}", markup=False, highlight=False)


def exit_code(results: Sequence[Mapping[str, Any]]) -> int:
    """0 where every contender ran and was right."""
    return 0 if all(all_right(result) for result in results) else 1


def write(path: Path, document: Mapping[str, Any]) -> None:
    """Write a document as JSON, whole or not at all."""
    write_bytes(path, (json.dumps(document, indent=1) + "\n").encode())
