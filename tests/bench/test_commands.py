"""``fastden bench`` from its options to its files and exit codes, on tiny images."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from importlib import util
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from fastden.bench import files, forms, gradients, large, machine, network, operators, preparation, processes
from fastden.cli import bench
from fastden.cli.main import app
from fastden.network import int8
from fastden.ops import backends
from tests.cli.run import fails, works
from tests.image_files import encoded, pixels, save_model

TINY = ("--device", "cpu", "--dtype", "float32", "--rounds", "2")


@pytest.fixture(autouse=True)
def quick_ceilings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Large matrix products take seconds, and no test looks at their rate."""
    limits = {"matrix_tflops": 0.3, "copy_gigabytes_a_second": 10.0}
    monkeypatch.setattr(machine, "ceilings", lambda device, dtype: dict(limits))


def document(path: Path, command: str, contenders: set[str]) -> dict[str, Any]:
    """The JSON of a benchmark on 2 rounds, with everything that a reader needs to judge its figures."""
    found = json.loads(path.read_text())
    assert found["command"] == f"fastden bench {command}"
    assert found["machine"]["device"] == "cpu"
    assert set(found["machine"]) >= {"cpu", "threads", "versions", "commit", "date"}
    assert set(found["settings"]) >= {"model", "size", "batch", "dtype", "rounds", "repeats", "peers", "backends"}
    assert found["sensors"] == {"before": None, "after": None}
    assert found["all_right"] is True
    assert found["complete"] is True
    for result in found["results"]:
        assert set(result["contenders"]) == contenders
        assert set(result["bounds"]) <= {"relative_l2", "maximum"}
        for row in result["contenders"].values():
            assert row["right"]
            assert len(row["raw_ms"]) == 2 * found["settings"]["repeats"]
            assert row["q1_ms"] <= row["median_ms"] <= row["q3_ms"]
            assert row["slower_by"] > 0
            assert row["slower_by_range"][0] <= row["slower_by"] <= row["slower_by_range"][1]
            assert row["ms_a_megapixel"] == pytest.approx(row["median_ms"] / result["megapixels"])
    return found


def test_variables_that_change_what_is_measured_are_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTDEN_BACKWARD", "aten")
    monkeypatch.setenv("FASTDEN_TUNED", str(tmp_path / "tuned.json"))  # it is not there: tiles are the defaults
    works("bench", "model", *TINY, "--size", 16, 16, "--compare", "", "--json", tmp_path / "a.json")
    assert json.loads((tmp_path / "a.json").read_text())["environment"] == {"FASTDEN_BACKWARD": "aten"}
    (tmp_path / "tuned.json").touch()
    assert bench._changing() == {"FASTDEN_BACKWARD": "aten", "FASTDEN_TUNED": "tuned.json"}


def test_model(tmp_path: Path) -> None:
    size = ("--size", 20, 24, "--batch", 2, "--compare", "eager,channels_last")
    plots = tmp_path / "plots" / "new"
    shown = works("bench", "model", *TINY, *size, "--json", tmp_path / "a.json", "--plots", plots)
    assert "slower by" in shown
    assert "left out: fastden-triton" in shown
    found = document(tmp_path / "a.json", "model", {"fastden-torch", "eager", "channels_last"})
    (result,) = found["results"]
    assert (result["images"], result["megapixels"]) == (2, 2 * 20 * 24 / 1e6)
    row = result["contenders"]["eager"]
    assert row["flops"] == 2 * 222_144 * 2 * 20 * 24
    assert row["share_of_matrix_rate"] == pytest.approx(row["tflops"] / 0.3)
    assert sorted(path.name for path in plots.iterdir()) == ["model-bars.png", "model-roofline.png"]


def test_the_automatic_choice_is_a_contender_where_it_is_a_mixture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert set(forms.NETWORK_OPERATORS) == set(operators.OPERATORS)
    cuda, chosen = torch.device("cuda", 0), {"stem": "cuda", "upsample": "triton", "conv_bn_relu": "torch"}
    monkeypatch.delenv("FASTDEN_BACKEND", raising=False)
    monkeypatch.setattr(backends, "expected", lambda operators, device, dtype: chosen)
    assert forms.why_not_automatic(cuda, torch.bfloat16) == ""
    assert bench._peers("model", cuda, torch.bfloat16)[1][0] == forms.AUTO
    monkeypatch.setenv("FASTDEN_BACKEND", "torch")
    assert forms.why_not_automatic(cuda, torch.bfloat16) == "torch is asked for"
    monkeypatch.delenv("FASTDEN_BACKEND")
    # On a CPU it is measured as it would be on a GPU.
    monkeypatch.setattr(bench, "_peers", lambda *given: ((forms.AUTO, "eager"), ()))
    named = ("bench", "model", *TINY, "--size", 16, 16, "--compare", "eager,fastden-auto", "--json")
    works(*named, tmp_path / "a.json")
    document(tmp_path / "a.json", "model", {"fastden-torch", "fastden-auto", "eager"})
    chosen = dict.fromkeys(chosen, "cuda")
    works(*named, tmp_path / "b.json")
    found = document(tmp_path / "b.json", "model", {"fastden-torch", "eager"})
    assert found["left_out"]["fastden-auto"] == "the automatic choice is cuda alone"
    assert found["settings"]["peers"] == ["eager"]


@pytest.mark.slow
def test_model_beside_other_runtimes(tmp_path: Path) -> None:
    for package in ("openvino", "onnxruntime", "onnx", "onnxscript"):
        pytest.importorskip(package)
    target = tmp_path / "a.json"
    runtimes = ("openvino", "openvino_composed", "onnxruntime", "onnxruntime_composed")
    works("bench", "model", *TINY, "--size", 16, 16, "--compare", ",".join(runtimes), "--json", target)
    rows = document(target, "model", {"fastden-torch", *runtimes})["results"][0]["contenders"]
    assert rows["openvino"]["peak_mib"] is None
    assert rows["openvino_composed"]["flops"] == rows["fastden-torch"]["flops"] < rows["openvino"]["flops"]


@pytest.mark.skipif(bool(int8.why_not()), reason="; ".join(int8.why_not()))
def test_model_in_eight_bits(tmp_path: Path) -> None:
    target = tmp_path / "a.json"
    works("bench", "model", *TINY, "--size", 64, 64, "--compare", "fastden-fast", "--json", target)
    rows = document(target, "model", {"fastden-torch", "fastden-fast"})["results"][0]["contenders"]
    row = rows["fastden-fast"]
    assert row["right"]
    # The machine's rates were measured in float32: of 8 bits there would be more than all of it.
    assert set(rows["fastden-torch"]) - set(row) == {
        *("flops", "tflops", "share_of_matrix_rate", "gigabytes_a_second", "share_of_copy_bandwidth")
    }
    assert 1e-3 < row["errors"]["relative_l2"] < 0.01, "8 bits round"


def test_a_large_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is computed in a process of its own; its result stands beside the contenders'."""
    row = large.measured("color", "float32", (20, 28))
    assert (row["height"], row["width"], row["dtype"], row["result_mib"]) == (20, 28, "float32", 0)
    assert row["seconds"] >= 0
    assert row["peak_rss_mib"] is None or row["peak_rss_mib"] >= row["peak_rss_before_mib"] > 100
    monkeypatch.setattr(sys, "executable", "false")
    with pytest.raises(RuntimeError, match=r"the large picture: exit code 1: no message"):
        large.measured("color", "float32")
    asked: list[tuple[str, str]] = []
    monkeypatch.setattr(large, "measured", lambda *names: asked.append(names) or row)
    target = tmp_path / "a.json"
    shown = works("bench", "model", *TINY, "--size", 16, 16, "--compare", "", "--large", "--json", target)
    assert "20 x 28 pixels by tiles: " in shown
    assert json.loads(target.read_text())["results"][0]["large"] == row
    assert asked == [("color", "float32")]


def test_a_large_picture_that_fails_leaves_the_comparison(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failed(*_: str) -> None:
        raise RuntimeError("the large picture: exit code -9: no message")

    monkeypatch.setattr(large, "measured", failed)
    target = tmp_path / "a.json"
    options = ("--size", 16, 16, "--compare", "", "--large", "--json", target)
    done = CliRunner().invoke(app, ["bench", "model", *TINY, *map(str, options)])
    assert done.exit_code == 1
    assert isinstance(done.exception, SystemExit)
    assert "the large picture: exit code -9" in done.stderr
    assert "fastden-torch" in done.stdout
    found = json.loads(target.read_text())
    assert (found["complete"], found["all_right"]) == (True, False)
    assert found["results"][0]["large"] == {"failed": "the large picture: exit code -9: no message"}
    assert found["results"][0]["contenders"]["fastden-torch"]["right"]


def test_a_gray_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gray, target = save_model(tmp_path / "gray", image_channels=1), tmp_path / "a.json"
    options = ("--model", gray, "--size", 32, 32, "--compare", "eager", "--json", target)
    works("bench", "model", *TINY, *options)
    found = document(target, "model", {"fastden-torch", "eager"})
    # Of one channel and its level: conv0 reads, and out makes, less.
    assert found["results"][0]["contenders"]["eager"]["flops"] == 2 * (222_144 - 2 * 25 * 64 - 2 * 9 * 128) * 32 * 32
    works("bench", "train", *TINY, *options)
    document(target, "train", {"fastden-torch", "eager"})
    works("bench", "ops", "--only", "stem,head", *TINY, *options)
    document(target, "ops", {"fastden-torch", "eager"})
    assert large.measure(str(gray), "float32", 20, 28)["width"] == 28
    with_times(monkeypatch, 1.0)
    works("bench", "batch", *TINY, *options, "--images", 1)
    assert json.loads(target.read_text())["all_right"]


def test_ops(tmp_path: Path) -> None:
    target = tmp_path / "a.json"
    works("bench", "ops", *TINY, "--size", 14, 18, "--compare", "eager", "--json", target)
    found = document(target, "ops", {"fastden-torch", "eager"})
    names = [result["name"] for result in found["results"]]
    assert names[-1] == preparation.NAME
    assert len(names) == len(set(names)) == 1 + sum(map(len, operators.OPERATORS.values()))
    assert all(any(name.split()[0] == operator for name in names) for operator in operators.OPERATORS)


def test_what_is_measured_is_written_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A command that is stopped leaves the results that it has."""

    def stopped(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(preparation, "job", stopped)
    target = tmp_path / "a.json"
    options = ("--only", "upsample, network_input", "--size", 14, 18, "--compare", "eager", "--json", target)
    done = CliRunner().invoke(app, ["bench", "ops", *TINY, *map(str, options)])
    assert done.exit_code != 0
    found = json.loads(target.read_text())
    assert found["complete"] is False
    assert [result["name"] for result in found["results"]] == ["upsample"]
    assert found["results"][0]["contenders"]["eager"]["median_ms"] > 0


def test_ops_backward(tmp_path: Path) -> None:
    target = tmp_path / "a.json"
    only = ["stem", "conv_bn_relu", "head", "weight_gradient", "batch_norm"]
    options = ("--backward", "--only", ", ".join(only), "--size", 22, 18, "--compare", "eager")
    works("bench", "ops", *TINY, *options, "--json", target)
    found = document(target, "ops", {"fastden-torch", "eager"})
    assert found["settings"]["operators"] == only
    assert found["settings"]["backward"] is True
    names = [result["name"] for result in found["results"]]
    assert len(names) == len(set(names)) == 6 + sum(map(len, gradients.OPERATORS.values()))
    assert {name.split()[0] for name in names} == set(only)


def test_train(tmp_path: Path) -> None:
    target = tmp_path / "a.json"
    options = ("--size", 32, 32, "--batch", 2, "--compare", "channels_last", "--json", target)
    works("bench", "train", *TINY, *options)
    found = document(target, "train", {"fastden-torch", "channels_last"})
    assert set(found["results"][0]["bounds"]) == {"relative_l2"}


def run_here(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
    """Run the command in this process, which has loaded everything already."""
    done = CliRunner().invoke(app, command[3:])
    return subprocess.CompletedProcess(command, done.exit_code, done.stdout, done.stderr)


def with_times(monkeypatch: pytest.MonkeyPatch, *starts: float) -> None:
    """``fastden denoise`` runs in this process; a folder takes 3 seconds, its start what ``starts`` has, in turn."""
    start, left = files.Command._start, itertools.cycle(starts)
    monkeypatch.setattr(processes.subprocess, "run", run_here)
    monkeypatch.setattr(files, "seconds", lambda call: (call(), 3.0)[1])
    monkeypatch.setattr(files.Command, "_start", lambda command: (start(command), next(left))[1])


def test_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with_times(monkeypatch, 1.0, 1.25)
    target = tmp_path / "a.json"
    options = ("--size", 40, 48, "--images", 2, "--compare", "eager", "--json", target)
    shown = works("bench", "batch", *TINY, *options)
    assert "computing takes" in shown
    found = json.loads(target.read_text())
    (result,) = found["results"]
    assert result["megapixels"] == 2 * 40 * 48 / 1e6
    assert all(row["right"] for row in result["contenders"].values())
    assert {len(result["command"][key]) for key in ("seconds", "start_seconds", "compute_seconds")} == {2}
    differences = [1e3 * (whole - start) for whole, start in zip(*list(result["command"].values())[:2], strict=True)]
    assert result["contenders"]["fastden"]["raw_ms"] == pytest.approx(differences) == [2000, 1750]
    assert result["command"]["further_start_seconds"] == [1.0, 1.25, 1.0]
    assert result["command"]["compute_share"] == pytest.approx((3 / 2 + 3 / 1.75) / 2)


@pytest.mark.parametrize("starts", [(1.5, 1.0), (3.8,)])
def test_batch_of_a_folder_that_is_too_small_to_time(
    starts: tuple[float, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It takes no longer than three times what the start varies by, or even less than the start."""
    with_times(monkeypatch, *starts)
    target = tmp_path / "a.json"
    options = ("--size", 16, 16, "--images", 1, "--rounds", 1, "--compare", "eager", "--json", target)
    done = CliRunner().invoke(app, ["bench", "batch", *TINY, *map(str, options)])
    assert done.exit_code == 1
    assert "computing takes" not in done.output
    found = json.loads(target.read_text())
    assert found["all_right"] is False
    (result,) = found["results"]
    row = result["contenders"]["fastden"]
    assert set(row) == {"own", "failed"}
    times = f"{3 - starts[0]:.3f} s without the start, which varies by {max(starts) - min(starts):.3f} s"
    assert row["failed"] == f"folder too small to time: {times}; accepted: more images or larger ones"
    assert row["failed"] in done.stderr
    assert "median_ms" in result["contenders"]["eager"]
    assert "slower_by" not in result["contenders"]["eager"]
    assert "compute_share" not in result["command"]
    assert len(result["command"]["further_start_seconds"]) == files.STARTS - 1


def test_batch_reports_why_the_command_failed(tmp_path: Path) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    command = files.Command(folder, folder, tmp_path / "out", [], lambda: None)
    with pytest.raises(RuntimeError, match=r"exit code 1: error: input: no images in"):
        command()


class Wrong(torch.nn.Module):
    def __init__(self, right: Any) -> None:
        super().__init__()
        self.right = right

    def forward(self, x: Tensor, sigma: float) -> Tensor:
        y = self.right(x, sigma).clone()
        y[..., -1:] += 0.01  # a seam on one column
        return y


def test_wrong_results_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fuse = network.fuse
    monkeypatch.setattr(network, "fuse", lambda *arguments: Wrong(fuse(*arguments)))
    target = tmp_path / "a.json"
    options = ("--size", 16, 16, "--compare", "eager", "--json", target)
    done = CliRunner().invoke(app, ["bench", "model", *TINY, *map(str, options)])
    assert done.exit_code == 1
    assert "wrong result" in done.stdout
    assert " x " not in done.stdout
    found = json.loads(target.read_text())
    assert found["all_right"] is False
    assert not any("slower_by" in row for row in found["results"][0]["contenders"].values())


@pytest.mark.parametrize(
    ("arguments", "saying"),
    [
        (["model", "--compare", "eagre"], r"compare: 'eagre'; accepted here: eager, channels_last, compile"),
        (["ops", "--compare", "openvino"], r"compare: 'openvino'; accepted here: eager"),
        (["model", "--compare", "onnxruntime", "--dtype", "bfloat16"], r"compare: 'onnxruntime'; accepted here: eager"),
        (["ops", "--only", "conv"], r"only: 'conv'; accepted: stem, bottleneck, conv_bn_relu"),
        (["ops", "--only", "network_input", "--backward"], r"only: 'network_input'; accepted: stem, .*, head"),
        (["model", "--backends", "cuda9"], r"backends: 'cuda9'; accepted: torch, triton"),
        (["ops", "--backends", "triton"], r"backends: triton cannot run: .*device cpu; accepted: cuda"),
        (["model", "--model", "colour"], r"model: .*colour"),
        (["model", "--size", "0", "16"], r"size: 0 16; accepted: height and width of at least 1"),
        (["train", "--graphs"], r"graphs: device cpu; accepted: cuda"),
        (["train", "--json", "missing/a.json"], r"missing/a.json: the folder .* does not exist"),
        (["train", "--json", "picture.png"], r"json: picture.png exists and holds no JSON"),
        (["batch", "--json", "lines.txt"], r"json: lines.txt exists and holds no JSON"),
        (["train", "--plots", "file.txt/inside"], r"plots: cannot make the folder file.txt/inside"),
        (["model", "--device", "cpu:7x"], r"device: 'cpu:7x'; accepted: cpu, cuda"),
    ],
)
def test_mistakes(arguments: list[str], saying: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file.txt").touch()
    Path("lines.txt").write_text("{}\n{}\n")
    Path("picture.png").write_bytes(encoded(pixels(), "PNG"))
    rest = () if "--device" in arguments else ("--device", "cpu")
    fails("bench", *arguments, *rest, saying=saying)


@pytest.mark.parametrize(
    ("missing", "arguments", "saying"),
    [
        (
            "openvino",
            ["model", "--dtype", "float32"],
            r"compare: openvino needs openvino; install: .*'fastden\[bench\]'",
        ),
        ("onnxscript", ["model", "--dtype", "float32"], r"compare: openvino needs onnxscript; .* or name others"),
        (
            "matplotlib",
            ["train", "--plots", "plots"],
            r"plots: matplotlib is not installed; install: .*'fastden\[bench\]'",
        ),
    ],
)
def test_without_the_extra(missing: str, arguments: list[str], saying: str, monkeypatch: pytest.MonkeyPatch) -> None:
    find = util.find_spec
    for module in (forms, "fastden.bench.plots"):
        where = f"{module}.find_spec" if isinstance(module, str) else "fastden.bench.forms.find_spec"
        monkeypatch.setattr(where, lambda name, *rest: None if name == missing else find(name, *rest))
    fails("bench", *arguments, "--device", "cpu", saying=saying)
    assert not Path("plots").exists()
