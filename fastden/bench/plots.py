"""Pictures of a benchmark's document: bars of the times, and the roofline."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from fastden.errors import UserError

#: Colour and marker of each contender in all pictures. Most colours are Okabe and Ito's. To colour-blind readers some
#: of the others are close, so each has a marker of its own.
STYLES = {
    "fastden": ("#0072B2", "o"),
    "fastden-triton": ("#0072B2", "o"),
    "fastden-torch": ("#56B4E9", "s"),
    "fastden-cuda": ("#000000", "*"),
    "fastden-fast": ("#882255", "p"),
    "fastden-auto": ("#44AA99", "H"),
    "eager": ("#999999", "v"),
    "channels_last": ("#E69F00", "^"),
    "compile": ("#009E73", "D"),
    "max_autotune": ("#D55E00", "P"),
    "fused_compile": ("#332288", "<"),
    "openvino": ("#CC79A7", "X"),
    "openvino_composed": ("#DDCC77", ">"),
    "onnxruntime": ("#8C6D31", "h"),
    "onnxruntime_composed": ("#553300", "8"),
}
OTHER = ("#444444", "d")


def check_folder(folder: Path) -> None:
    """Make ``folder`` if it does not exist; raise UserError where pictures cannot be drawn, or not there."""
    if find_spec("matplotlib") is None:
        raise UserError("plots: matplotlib is not installed; install: pip install 'fastden[bench]'")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"plots: cannot make the folder {folder}: {error.strerror}") from error


def draw(document: Mapping[str, Any], folder: Path) -> list[Path]:
    """Draw the right results of ``document``; returns the files.

    They are NAME-bars.png and, where operations are counted, NAME-roofline.png in ``folder``, NAME the command's.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    name = document["name"]
    written = []
    for kind, picture in (("bars", _bars), ("roofline", _roofline)):
        # pyplot would choose a window system.
        figure = Figure(figsize=(10, 5.6), dpi=120, layout="constrained")
        FigureCanvasAgg(figure)
        if picture(document, figure.add_subplot()):
            path = folder / f"{name}-{kind}.png"
            figure.savefig(path)
            written.append(path)
    return written


def _right(document: Mapping[str, Any]) -> Iterator[tuple[str, str, Mapping[str, Any], Mapping[str, Any]]]:
    """Name of the job, name of the contender, the job, the row."""
    for result in document["results"]:
        for name, row in result["contenders"].items():
            if row.get("right"):
                yield result["name"], name, result, row


def _title(document: Mapping[str, Any]) -> str:
    machine, settings = document["machine"], document["settings"]
    height, width = settings["size"]
    where = machine.get("gpu") or f"{machine['cpu']}, {machine['threads']} thread{'s' * (machine['threads'] != 1)}"
    return f"{document['command']}: {settings['batch']} x {height} x {width}, {settings['dtype']}, {where}"


def _bars(document: Mapping[str, Any], axes: Any) -> bool:
    jobs = [result["name"] for result in document["results"]]
    rows = {(job, name): row for job, name, _, row in _right(document)}
    contenders = list(dict.fromkeys(name for _, name in rows))
    if not contenders:
        return False
    thickness = 0.8 / len(contenders)
    for index, contender in enumerate(contenders):
        rows_at = [(position, rows[job, contender]) for position, job in enumerate(jobs) if (job, contender) in rows]
        scale = [1 / result["megapixels"] for result in document["results"]]
        middles = [row["ms_a_megapixel"] for _, row in rows_at]
        spread = [
            [(row["median_ms"] - row["q1_ms"]) * scale[position] for position, row in rows_at],
            [(row["q3_ms"] - row["median_ms"]) * scale[position] for position, row in rows_at],
        ]
        offsets = [position + (index - (len(contenders) - 1) / 2) * thickness for position, _ in rows_at]
        colour, _ = STYLES.get(contender, OTHER)
        bars = axes.barh(offsets, middles, thickness * 0.94, xerr=spread, color=colour, label=contender)
        if len(jobs) * len(contenders) <= 16:
            labels = [f"  {_short(value)}{_ratio(row)}" for value, (_, row) in zip(middles, rows_at, strict=True)]
            axes.bar_label(bars, labels, fontsize=8)
    if len(jobs) > 1:
        axes.set_xscale("log")
        axes.set_yticks(range(len(jobs)), jobs)
        axes.legend(fontsize=8, loc="best")
    else:
        middle = (len(contenders) - 1) / 2
        axes.set_yticks([(index - middle) * thickness for index in range(len(contenders))], contenders)
        longest = max(row["q3_ms"] * row["ms_a_megapixel"] / row["median_ms"] for row in rows.values())
        axes.set_xlim(0, 1.25 * longest)
    axes.set_xlabel("milliseconds a megapixel: median, and quartiles as whiskers (shorter is faster)")
    axes.set_title(_title(document), fontsize=9)
    axes.grid(axis="x", which="both", alpha=0.25)
    axes.set_axisbelow(True)
    axes.invert_yaxis()
    return True


def _short(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _ratio(row: Mapping[str, Any]) -> str:
    return f"  ({row['slower_by']:.2f} x)" if row.get("slower_by", 1) != 1 else ""


def _is_plain(points: Sequence[tuple[str, str, float, float]], job: str, intensity: float) -> bool:
    """Whether only others than fastden do a job with so much arithmetic."""
    return not any(name.startswith("fastden") for at, name, x, _ in points if (at, x) == (job, intensity))


def _roofline(document: Mapping[str, Any], axes: Any) -> bool:
    points = [
        (job, name, row["flops"] / result["bytes_at_least"], row["tflops"])
        for job, name, result, row in _right(document)
        if "flops" in row and result["bytes_at_least"]
    ]
    if not points:
        return False
    limits = document["ceilings"]
    rate, copied = limits["matrix_tflops"], limits["copy_gigabytes_a_second"] / 1e3
    ridge = rate / copied
    low = min(ridge, *(point[2] for point in points)) / 3
    high = max(ridge, *(point[2] for point in points)) * 3
    axes.plot([low, ridge, high], [low * copied, rate, rate], color="black", linewidth=1.5)
    axes.annotate(
        f"matrix products: {rate:.3g} TFLOP/s",
        (high, rate),
        (-4, 5),
        textcoords="offset points",
        ha="right",
        fontsize=8,
    )
    middle = (low * ridge) ** 0.5
    axes.annotate(
        f"copies: {1e3 * copied:.3g} GB/s", (middle, middle * copied), (-6, 6), textcoords="offset points", ha="right",
        fontsize=8,
    )  # fmt: skip
    for contender in dict.fromkeys(name for _, name, _, _ in points):
        colour, marker = STYLES.get(contender, OTHER)
        mine = [(x, y) for _, name, x, y in points if name == contender]
        axes.scatter(*zip(*mine, strict=True), color=colour, marker=marker, s=36, label=contender, zorder=3)
    # One label for each job and amount of arithmetic, below the lowest point.
    for job, x in dict.fromkeys((job, x) for job, _, x, _ in points):
        y = min(y for name, _, at, y in points if (name, at) == (job, x))
        label = job.split(" ")[-1] + (" (plain)" if _is_plain(points, job, x) else "")
        axes.annotate(label, (x, y), (0, -12), textcoords="offset points", ha="center", fontsize=7)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("arithmetic intensity: floating-point operations for each byte that must move")
    axes.set_ylabel("TFLOP/s")
    axes.set_title(_title(document), fontsize=9)
    axes.grid(which="both", alpha=0.2)
    axes.legend(fontsize=8, loc="lower right")
    return True
