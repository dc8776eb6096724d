"""Right results get a ratio, wrong ones get none, and a failure loses no other result."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from fastden.bench.compare import Contender, Job, Settings, all_right, bounds, compare, errors
from fastden.bench.timing import Call

LIMITS = {"matrix_tflops": 2.0, "copy_gigabytes_a_second": 10.0}
SETTINGS = Settings(torch.device("cpu"), torch.float32, rounds=3)


def contender(name: str, result: Tensor, **options: Any) -> Contender:
    def build() -> Call:
        return lambda: result

    return Contender(name, build, flops=4e9, **options)


def run(*contenders: Contender, reference: Tensor) -> dict[str, Any]:
    job = Job("job", 2, 500_000, 1e7, (reference,), {"relative_l2": 1e-3, "maximum": 1e-2})
    return compare(job, contenders, SETTINGS, LIMITS, measure=lambda call: 8.0)


@pytest.fixture
def reference() -> Tensor:
    return torch.rand(2, 3, 5, 4, dtype=torch.float64)


def test_rates_and_shares(reference: Tensor) -> None:
    row = run(contender("fastden-torch", reference.clone(), own=True), reference=reference)["contenders"][
        "fastden-torch"
    ]
    assert row["right"]
    assert row["raw_ms"] == [8.0] * 6
    assert row["timing"] == "host clock"
    found = {key: row[key] for key in ("ms_a_megapixel", "megapixels_a_second", "images_a_second")}
    assert found == {"ms_a_megapixel": 16.0, "megapixels_a_second": 62.5, "images_a_second": 250.0}
    # 4 GFLOP and 10 MB in 8 ms: 0.5 TFLOP/s of 2, 1.25 GB/s of 10.
    assert row["share_of_matrix_rate"] == pytest.approx(0.25)
    assert row["share_of_copy_bandwidth"] == pytest.approx(0.125)
    assert row["slower_by"] == 1


@pytest.mark.parametrize("damage", ["one value", "all", "nan", "shape"])
def test_wrong_results_are_refused(reference: Tensor, damage: str, capsys: pytest.CaptureFixture[str]) -> None:
    wrong = reference.clone()
    if damage == "one value":
        wrong[0, 0, 0, 0] += 0.02 * float(reference.max())
    elif damage == "all":
        wrong *= 1.002
    elif damage == "nan":
        wrong[1, 2, 4, 3] = math.nan
    else:
        wrong = wrong[:, :, :-1]
    found = run(contender("own", reference, own=True), contender("eager", wrong), reference=reference)
    row = found["contenders"]["eager"]
    assert not row.get("right")
    assert "slower_by" not in row
    assert ("failed" in row) == (damage == "shape")
    assert found["contenders"]["own"]["slower_by"] == 1
    assert not all_right(found)
    assert "eager: " + ("ValueError" if damage == "shape" else "wrong result") in capsys.readouterr().err


def test_without_a_right_result_of_ours_there_is_no_ratio(reference: Tensor) -> None:
    found = run(contender("own", reference + 1, own=True), contender("eager", reference), reference=reference)
    assert not any("slower_by" in row for row in found["contenders"].values())


def test_ratios_are_to_the_fastest_of_ours(reference: Tensor) -> None:
    times = {"slow": 6.0, "fast": 2.0, "eager": 5.0}
    results = {name: reference.clone() for name in times}
    job = Job("job", 1, 1000, 0.0, (reference,), {"relative_l2": 1e-3})
    contenders = [contender(name, results[name], own=name != "eager") for name in times]
    duration = {results[name].data_ptr(): value for name, value in times.items()}
    found = compare(job, contenders, SETTINGS, LIMITS, measure=lambda call: duration[call().data_ptr()])
    assert {name: row["slower_by"] for name, row in found["contenders"].items()} == {"slow": 3, "fast": 1, "eager": 2.5}
    assert all_right(found)


def test_a_failure_is_a_row(reference: Tensor) -> None:
    def build() -> Call:
        raise RuntimeError("no such\nengine")

    found = run(contender("own", reference, own=True), Contender("other", build), reference=reference)
    assert found["contenders"]["other"] == {"own": False, "failed": "RuntimeError: no such engine"}
    assert found["contenders"]["own"]["right"]
    assert not all_right(found)


def test_values_that_are_zero_but_for_rounding_have_no_relative_error() -> None:
    references = (torch.ones(3, dtype=torch.float64), torch.full((2,), 1e-18, dtype=torch.float64))
    found = errors((torch.full((3,), 1.5), torch.full((2,), 1e-7)), references)
    assert found == {"relative_l2": 0.5, "maximum": 0.5}
    with pytest.raises(ValueError, match="1 results; the reference has 2"):
        errors(references[:1], references)


def test_bounds_are_twice_eagers_error_and_no_less_than_the_dtype_resolves() -> None:
    reference = (torch.tensor([1.0, 2.0], dtype=torch.float64),)
    found = bounds(torch.tensor([1.0, 2.2]), reference, torch.float32)
    # The maximum's bound is twice as wide again: chance decides which of many errors is the largest.
    assert found["maximum"] == pytest.approx(0.4)
    # The worst of several ways counts.
    assert bounds([torch.tensor([1.0, 2.1]), torch.tensor([1.0, 2.2])], reference, torch.float32) == found
    assert found["relative_l2"] == pytest.approx(0.4 / 5**0.5)
    assert bounds(torch.tensor([1.0, 2.2]), reference, torch.float32, gradients=True) == {
        "relative_l2": found["relative_l2"]
    }
    # 2**-23 is the share of ReLUs that rounding may open or close.
    exact = bounds(torch.tensor([1.0, 2.0]), reference, torch.float32, gradients=True)
    assert exact == {"relative_l2": pytest.approx(2**-10.5)}
    assert bounds(torch.tensor([1.0, 2.0]), reference, torch.bfloat16) == {"relative_l2": 2**-8, "maximum": 2**-7}
