"""Pictures: written whole, drawn from right results alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from PIL import Image, ImageColor

from fastden.bench import forms, plots
from fastden.ops.backends import NAMES


def row(milliseconds: float, **changes: Any) -> dict[str, Any]:
    found = {"right": True, "median_ms": milliseconds, "q1_ms": 0.9 * milliseconds, "q3_ms": 1.2 * milliseconds}
    return {**found, "ms_a_megapixel": 2 * milliseconds, "flops": 1e9, "tflops": 1 / milliseconds, **changes}


def document(*jobs: str, **contenders: dict[str, Any]) -> dict[str, Any]:
    result = {"megapixels": 0.5, "bytes_at_least": 1e7, "contenders": contenders}
    return {
        "name": "ops",
        "command": "fastden bench ops",
        "machine": {"cpu": "a processor", "threads": 2},
        "settings": {"size": [512, 768], "batch": 1, "dtype": "float32"},
        "ceilings": {"matrix_tflops": 0.3, "copy_gigabytes_a_second": 10.0},
        "results": [{"name": job, **result} for job in jobs],
    }


def colours(path: Path) -> set[tuple[int, ...]]:
    found = Image.open(path).convert("RGB").getcolors(1 << 24)
    assert found is not None
    return {colour for _, colour in found if isinstance(colour, tuple)}


@pytest.mark.parametrize("jobs", [["model"], ["stem", "bottleneck res1", "head"]])
def test_pictures_show_what_is_right(tmp_path: Path, jobs: list[str]) -> None:
    contenders = {
        "fastden-torch": row(5, slower_by=1.0),
        "eager": row(9, slower_by=1.8),
        "compile": row(3, right=False),
    }
    written = plots.draw(document(*jobs, **contenders), tmp_path)
    assert written == [tmp_path / "ops-bars.png", tmp_path / "ops-roofline.png"]
    for path in written:
        shown = colours(path)
        for name, right in (("fastden-torch", True), ("eager", True), ("compile", False)):
            assert (ImageColor.getrgb(plots.STYLES[name][0]) in shown) == right, (path.name, name)


def test_every_contender_has_a_style_of_its_own() -> None:
    own = {"fastden", forms.FAST, forms.AUTO, *map(forms.own_name, NAMES)}
    assert set(plots.STYLES) == {*own, *forms.PLAIN, forms.FUSED_COMPILE, *forms.RUNTIMES}
    # The command's pictures, of batches, are not those of the kernels.
    apart = [style for name, style in plots.STYLES.items() if name != "fastden-triton"]
    for values in zip(*apart, plots.OTHER, strict=True):
        assert len(set(values)) == len(values)


def test_no_roofline_without_counted_operations(tmp_path: Path) -> None:
    uncounted = row(5)
    del uncounted["flops"]
    assert plots.draw(document("batch", fastden=uncounted), tmp_path) == [tmp_path / "ops-bars.png"]


def test_nothing_is_drawn_where_nothing_is_right(tmp_path: Path) -> None:
    assert plots.draw(document("model", eager={"failed": "no memory"}), tmp_path) == []
    assert list(tmp_path.iterdir()) == []
