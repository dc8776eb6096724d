"""Which way computes the gradients of each kind of convolution: defaults, what they rest on, and the variable."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from fastden.ops import _gradients
from fastden.ops._gradients import DEFAULT, Ways, kind_of, ways

#: The parts of ops-gradients.json, by kind of convolution.
PARTS = {
    "stem": ["stem"],
    "convolution": ["res3_reduce", "res3_conv", "res3_expand"],
    "strided convolution": ["conv2"],
    "two sources": ["conv3"],
    "upsample": ["up2"],
    "head": ["head"],
}


@pytest.fixture(autouse=True)
def unset(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(_gradients.ENVIRONMENT, raising=False)


@pytest.mark.parametrize("kind", DEFAULT)
def test_the_variable_comes_before_the_default(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert ways("triton", kind) == DEFAULT[kind]
    assert ways("cuda", kind) == Ways("aten", "aten")
    for text, expected in (
        ("kernels", Ways("kernels", "kernels")),
        ("aten", Ways("aten", "aten")),
        ("weight=kernels", DEFAULT[kind]._replace(weight="kernels")),
        ("input=aten", DEFAULT[kind]._replace(input="aten")),
        ("input=aten,weight=kernels", Ways("aten", "kernels")),
    ):
        monkeypatch.setenv(_gradients.ENVIRONMENT, text)
        assert ways("triton", kind) == expected


def test_kinds() -> None:
    x = torch.zeros(1)
    assert {kind_of(None, 1), kind_of(None, 2), kind_of(x, 1)} < set(DEFAULT)
    assert kind_of(None, 3) == kind_of(None, 2)
    assert set(PARTS) == set(DEFAULT)


@pytest.mark.parametrize("kind", DEFAULT)
def test_weights_take_the_way_that_was_faster_alone(kind: str, root: Path) -> None:
    file = root / "benchmarks" / "results" / "h200" / "ops-gradients.json"
    if not file.exists():
        pytest.skip(f"no {file}")
    jobs = {job["name"]: job["contenders"] for job in json.loads(file.read_text(encoding="utf-8"))["results"]}
    aten, kernels = (
        sum(jobs[f"weight_gradient {part}"][f"fastden-{backend}"]["median_ms"] for part in PARTS[kind])
        for backend in ("torch", "triton")
    )
    assert DEFAULT[kind].weight == ("aten" if aten < kernels else "kernels")
