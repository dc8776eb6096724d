"""The profile of a training step: each operator belongs to its block and its pass."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.autograd import DeviceType

from fastden.ops._gradients import DEFAULT, Ways, ways
from tests.scripts import load

BLOCKS = {"res1", "conv2", "res2", "up2", "conv3", "res3", "loss"}
OWN = {"plain": {"conv0", "conv1", "up3", "out"}, "composed": {"compose_stem", "compose_head", "stem", "head"}}


@pytest.fixture(scope="module")
def script(root: Path) -> Any:
    return load(root / "benchmarks" / "train_profile.py")


def test_each_operator_has_its_block(
    script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "profile.json"
    options = ["--device", "cpu", "--batch", "1", "--size", "16", "16", "--steps", "1", "--json", str(file)]
    monkeypatch.setattr("sys.argv", ["train_profile.py", *options])
    assert script.main() == 0
    assert "res3" in capsys.readouterr().out
    forms = json.loads(file.read_text())["forms"]
    assert set(forms) == set(OWN)
    for form, result in forms.items():
        rows = result["kernels"]
        assert result["clock_ms"] > 0
        assert result["busy_ms"] == pytest.approx(sum(row["ms"] for row in rows))
        found: dict[tuple[str, str], dict[str, float]] = {}
        for row in rows:
            operators = found.setdefault((row["block"], row["pass"]), {})
            operators[row["operator"]] = operators.get(row["operator"], 0) + row["calls"]
        for block in BLOCKS | OWN[form]:
            assert found[block, "forward"]
            assert found[block, "backward"]
        assert {block for block, _ in found} == BLOCKS | OWN[form] | {script.PARAMETERS, script.REST}
        for block, convolutions in {"res1": 3, "conv2": 1, "res2": 3, "up2": 1, "conv3": 1, "res3": 3}.items():
            for direction, operator in (("forward", "aten::convolution"), ("backward", "aten::convolution_backward")):
                assert found[block, direction][operator] == convolutions, (form, block, direction)
            normalised = found[block, "backward"].get("aten::native_batch_norm_backward", 0)
            assert normalised == (0 if block == "up2" else convolutions), (form, block)
        assert "aten::convolution_backward" not in found[script.REST, "backward"]


class Event:
    """What the script reads of an event of a profile with a GPU."""

    device_type = DeviceType.CPU
    self_cpu_time_total = 1.0

    def __init__(self, start: float, name: str, parent: Event | None = None, number: int = -1, *kernels: Any) -> None:
        self.name, self.cpu_parent, self.sequence_nr, self.kernels = name, parent, number, kernels
        self.time_range = torch.autograd.profiler_util.Interval(start, start + 1)


def test_kernels_of_a_gpu(script: Any) -> None:
    kernel = torch.autograd.profiler_util.Kernel
    block = Event(0, script.RANGE + "res1")
    plain = Event(1, "aten::ones", block, 7)  # not recorded by autograd: the next operation has its number
    other = Event(3, script.RANGE + "conv2")
    events = [
        block,
        plain,
        Event(2, "aten::relu", block, 6, kernel("relu_kernel", 0, 3.0)),
        other,
        Event(4, "aten::convolution", other, 7, kernel("sgemm", 0, 5.0), kernel("transpose", 0, 1.0)),
    ]
    for start, number in ((5, 7), (7, 6)):
        node = Event(start, script.EVALUATED + "Backward0", None, number)
        events += [node, Event(start + 1, "aten::mul", node, -1, kernel("mul_kernel", 0, 2.0))]
    node = Event(9, script.EVALUATED + "torch::autograd::AccumulateGrad")
    events += [node, Event(10, "aten::add_", node, -1, kernel("add_kernel", 0, 0.5))]
    rows = script.attribute(events[::-1], "cuda")
    assert {(row["block"], row["pass"], row["kernel"], row["us"]) for row in rows} == {
        ("res1", "forward", "relu_kernel", 3.0),
        ("conv2", "forward", "sgemm", 5.0),
        ("conv2", "forward", "transpose", 1.0),
        ("conv2", "backward", "mul_kernel", 2.0),
        ("res1", "backward", "mul_kernel", 2.0),
        (script.PARAMETERS, "backward", "add_kernel", 0.5),
    }


def test_the_network_keeps_its_form(script: Any) -> None:
    """Ranges change neither what is computed nor which operators run."""
    for form in ("plain", "composed"):
        model, step = script.make_step(form, torch.device("cpu"), 1, (16, 16))
        expected = step()
        with script.blocks(model):
            got = step()
        assert all(torch.equal(one, other) for one, other in zip(expected, got, strict=True))


def test_forms_differ_in_their_gradients(script: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the caller's environment says."""
    monkeypatch.setenv("FASTDEN_BACKWARD", "input=aten")
    found = {}
    for form in script.FORMS:
        with script.gradients_of(form):
            found[form] = ways("triton", "convolution")
    assert found.pop("triton_kernels") == Ways("kernels", "kernels")
    assert found.pop("triton_aten") == Ways("aten", "aten")
    assert set(found.values()) == {DEFAULT["convolution"]}
    assert os.environ["FASTDEN_BACKWARD"] == "input=aten"
