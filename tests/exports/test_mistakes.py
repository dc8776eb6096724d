"""Impossible exports: their messages, and no file left behind; the command."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import onnx
import pytest

import fastden
from fastden.errors import UserError
from fastden.exports import exporter
from tests.cli.run import fails, works
from tests.helpers import random_network


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"output": "network.txt"}, r"output: .*network.txt.*\.onnx, \.pt2, \.dtmodel, or format"),
        ({"format": "tensorrt"}, "format: 'tensorrt'; accepted: onnx, pt2, aoti, dtmodel"),
        ({"precision": "int4"}, "precision: 'int4'; accepted for onnx: fp32, fp16, fp16-weights, int8"),
        ({"precision": "int8", "output": "a.pt2"}, "precision: 'int8'; accepted for pt2: fp32, fp16, bf16"),
        ({"precision": "bf16"}, "precision: 'bf16'; accepted for onnx: fp32, fp16, fp16-weights, int8"),
        ({"layout": "bgr"}, "layout: 'bgr'; accepted: separate, dpir"),
        ({"layout": "dpir", "format": "dtmodel"}, "layout: 'dpir' with dtmodel; accepted: with onnx"),
        ({"layout": "dpir", "sigma": 25}, "layout: 'dpir' with a network that takes no noise level"),
        ({"opset": 12}, "opset: 12; accepted: 13 to 23"),
        ({"opset": 99}, "opset: 99; accepted: 13 to 23"),
        ({"opset": 99, "output": "a.dtmodel"}, "opset: 99; accepted: 13 to 23"),
        ({"opset": 99, "output": "a.pt2"}, "opset: 99 with pt2; accepted: with onnx and dtmodel"),
        ({"opset": 17, "format": "aoti"}, "opset: 17 with aoti; accepted: with onnx and dtmodel"),
        ({"sigma": 256}, "sigma: 256; accepted: 0 to 255"),
        ({"sigma": float("nan")}, "sigma: nan; accepted: 0 to 255"),
    ],
)
def test_refused(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    output = tmp_path / options.pop("output", "network.onnx")
    with pytest.raises(ValueError, match=message):
        fastden.export(random_network(), output, **options)
    assert not list(tmp_path.iterdir())


def test_wrong_types(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="sigma: str; accepted: a number from 0 to 255, or None"):
        fastden.export("color", tmp_path / "a.onnx", sigma="auto")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="model: int; accepted: a name, folder"):
        fastden.export(3, tmp_path / "a.onnx")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="output: NoneType; accepted: the path of a file"):
        fastden.export("color", None)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="composed: False with a FusedDenoiser"):
        fastden.export(fastden.fuse(random_network()), tmp_path / "a.onnx", composed=False)
    with pytest.raises(ValueError, match="format: 'dtmodel' with a network for gray images; accepted: one for RGB"):
        fastden.export(random_network(image_channels=1), tmp_path / "a.dtmodel")
    with pytest.raises(ValueError, match="sigma: given for a blind network"):
        fastden.export(random_network(noise_level_input=False), tmp_path / "a.onnx", sigma=25)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"precision": "fp16"}, "precision: 'fp16' with the model 'noise'; accepted: 'fp32'"),
        ({"sigma": 25}, "sigma: 25 with the model 'noise'; accepted: None"),
        ({"opset": 12}, "opset: 12; accepted: 13 to 23"),
    ],
)
def test_the_estimator_is_one_file(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fastden.export("noise", tmp_path / "noise.onnx", **options)
    assert not list(tmp_path.iterdir())


def test_a_missing_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exporter, "find_spec", lambda name: None if name == "onnx" else importlib.util.find_spec(name))
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'fastden\[export\]'"):
        fastden.export("color", tmp_path / "a.onnx")
    fails("export", "color", "-o", tmp_path / "a.onnx", saying=r"export: .*pip install 'fastden\[export\]'")


def test_an_existing_file_stays(tmp_path: Path) -> None:
    path = tmp_path / "a.onnx"
    path.write_text("mine")
    with pytest.raises(UserError, match="exists already"):
        fastden.export("color", path)
    assert path.read_text() == "mine"
    fastden.export("color", path, overwrite=True)
    onnx.checker.check_model(str(path))


def test_a_cancelled_export_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def cancel(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("fastden.exports.programs.trace", cancel)
    with pytest.raises(KeyboardInterrupt):
        fastden.export("color", tmp_path / "a.pt2")
    assert not list(tmp_path.iterdir())


def test_the_command(tmp_path: Path) -> None:
    out = works("export", "color", "-o", tmp_path / "color.onnx", "--precision", "fp16", "--sigma", 15)
    assert "color.onnx, 1.6 MB" in out
    assert [value.name for value in onnx.load(tmp_path / "color.onnx").graph.input] == ["input"]
    fails("export", "color", "-o", tmp_path / "color.onnx", saying="exists already")
    fails("export", "color", "-o", tmp_path / "b.onnx", "--opset", 5, saying="opset: 5; accepted: 13 to 23")
    fails("export", "color", "-o", tmp_path / "b.pt2", "--opset", 17, saying="opset: 17 with pt2; accepted: with onnx")
    fails("export", "nothing", "-o", tmp_path / "b.onnx", saying="model: 'nothing'; accepted: color")
    fails("export", "color", "-o", tmp_path / "b.onnx", "--sigma", "auto", saying="sigma")
    assert [path.name for path in tmp_path.iterdir()] == ["color.onnx"]


@pytest.mark.parametrize(("sigma", "inputs"), [(None, 2), (12.5, 1)])
def test_darktable(tmp_path: Path, sigma: float | None, inputs: int) -> None:
    """Names and fields that darktable reads."""
    path = fastden.export("color", tmp_path / "color.dtmodel", sigma=sigma)
    assert path.read_bytes() == fastden.export("color", tmp_path / "again.dtmodel", sigma=sigma).read_bytes()
    name = "denoise-fastden-color" + ("" if sigma is None else "-12-5")
    with ZipFile(path) as archive:
        assert sorted(archive.namelist()) == [f"{name}/{file}" for file in ("README.md", "config.json", "model.onnx")]
        config = json.loads(archive.read(f"{name}/config.json"))
        network = onnx.load_model_from_string(archive.read(f"{name}/model.onnx"))
    assert (config["id"], config["task"], config["backend"], config["num_inputs"]) == (name, "denoise", "onnx", inputs)
    assert [value.name for value in network.graph.input] == ["input", "sigma"][:inputs]
    assert [value.name for value in network.graph.output] == ["output"]
    assert config["version"] == fastden.__version__
    card = config["model_card"]
    assert card["license"] == "Apache-2.0"
    assert "No licence is stated with the data set" in card["training_data"]
    assert "white Gaussian noise" in card["notes"]


def test_darktable_says_what_is_not_known(tmp_path: Path) -> None:
    path = fastden.export(random_network(), tmp_path / "mine.dtmodel")
    with ZipFile(path) as archive:
        card = json.loads(archive.read("denoise-fastden-custom/config.json"))["model_card"]
    assert {card["license"], card["training_data"], card["training_data_license"], card["notes"]} == {"not stated"}
