"""The script of the joint experiments' tables: which earlier results it keeps."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np

from tests.scripts import load


def test_results_of_other_pictures_are_dropped(root: Path, tmp_path: Path) -> None:
    script = load(root / "benchmarks/joint/evaluate.py")
    arguments = argparse.Namespace(
        experiment="classify", dtype="float32", models=[], sigma=[15.0], seeds=[0], cbm3d_seeds=[0]
    )
    picture = np.zeros((4, 5, 3), np.uint8)
    target, weights = tmp_path / "classify.json", {"noisy": ""}
    document = script.begin(target, arguments, weights, [(picture, 3)], 0)
    document["results"]["noisy"] = {"15": {"0": {"top1": 50.0}}}
    target.write_text(json.dumps(document))
    assert script.begin(target, arguments, weights, [(picture, 3)], 0)["results"] == document["results"]
    for other in ((picture + 1, 3), (picture, 4), (picture.reshape(5, 4, 3), 3)):
        assert script.begin(target, arguments, weights, [other], 0)["results"] == {"noisy": {}}
