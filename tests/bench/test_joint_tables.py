"""The script of the joint experiments' tables: which earlier results it keeps."""

from __future__ import annotations

import argparse
import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch import nn

from tests.scripts import load


def begin(root: Path, target: Path, picture: tuple[Any, Any], network: nn.Module) -> Any:
    script = load(root / "benchmarks/joint/evaluate.py")
    arguments = argparse.Namespace(
        experiment="classify", dtype="float32", models=[], sigma=[15.0], seeds=[0], cbm3d_seeds=[0]
    )
    return script.begin(target, arguments, {"noisy": ""}, [picture], 0, network)


def write_results(root: Path, target: Path, picture: tuple[Any, Any], network: nn.Module) -> Any:
    document = begin(root, target, picture, network)
    document["results"]["noisy"] = {"15": {"0": {"top1": 50.0}}}
    target.write_text(json.dumps(document), encoding="utf-8")
    return document


def test_results_of_other_pictures_are_dropped(root: Path, tmp_path: Path) -> None:
    picture, network = np.zeros((4, 5, 3), np.uint8), nn.Conv2d(3, 2, 1)
    target = tmp_path / "classify.json"
    document = write_results(root, target, (picture, 3), network)
    assert begin(root, target, (picture, 3), network)["results"] == document["results"]
    for other in ((picture + 1, 3), (picture, 4), (picture.reshape(5, 4, 3), 3)):
        assert begin(root, target, other, network)["results"] == {"noisy": {}}


def test_results_of_another_frozen_network_are_dropped(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture, network, target = (np.zeros((4, 5, 3), np.uint8), 3), nn.BatchNorm2d(2), tmp_path / "classify.json"
    document = write_results(root, target, picture, network)
    assert begin(root, target, picture, copy.deepcopy(network))["results"] == document["results"]
    assert capsys.readouterr().err == ""
    moved, counted, named = copy.deepcopy(network), copy.deepcopy(network), nn.Sequential(copy.deepcopy(network))
    assert moved.running_mean is not None
    assert counted.num_batches_tracked is not None
    moved.running_mean[1] = 1e-30
    counted.num_batches_tracked += 1
    for other in (moved, counted, named, copy.deepcopy(network).half()):
        assert begin(root, target, picture, other)["results"] == {"noisy": {}}
        assert capsys.readouterr().err == f"{target}: other network; its results are dropped\n"
    # An earlier file does not say which network it is of.
    del document["network"]
    target.write_text(json.dumps(document), encoding="utf-8")
    assert begin(root, target, picture, network)["results"] == {"noisy": {}}
    assert "other network" in capsys.readouterr().err
