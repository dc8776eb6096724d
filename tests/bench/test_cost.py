"""The cost model of a batch: images an hour, from milliseconds a megapixel."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from fastden.batch.manifest import Record
from tests.scripts import load


def test_cost(root: Path) -> None:
    """100 ms a megapixel of network, 20 and 30 of reading and writing."""
    Cost = load(root / "benchmarks" / "batch" / "cost_model.py").Cost
    blank = Record("in.png", "out.png", "done", "", {}, {})
    records = [
        replace(blank, width=1000, height=1000, seconds={"read": 0.02, "compute": 0.1, "write": 0.03}),
        replace(blank, width=2000, height=1000, seconds={"read": 0.04, "compute": 0.2, "write": 0.06}),
        replace(blank, status="failed"),
    ]
    cost = Cost.of(records)
    assert (cost.read, cost.compute, cost.write) == pytest.approx((20, 100, 30))
    assert cost.images_an_hour(24) == pytest.approx(1000)
    assert cost.images_an_hour(24, workers=2) == pytest.approx(1500)
    assert cost.images_an_hour(24, files_at_once=9) == pytest.approx(1500)
    # Half of each core is reading or writing while the network has the other halves.
    assert cost.images_an_hour(24, files_at_once=3, cores=2) == pytest.approx(1200)
    assert cost.images_an_hour(24, files_at_once=1, cores=2) == pytest.approx(1000)
    with pytest.raises(ValueError, match=r"records: none is done"):
        Cost.of(records[2:])
