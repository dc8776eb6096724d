"""Joint training: mistakes in the network, the labels and the configuration, told before a run."""

from __future__ import annotations

import re
import shutil
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image as PIL

pytest.importorskip("lightning")

from fastden.errors import UserError
from fastden.network.model import Denoiser
from fastden.training import joint_training
from fastden.training.config import JointConfig, TrainConfig, load_config
from fastden.training.joint_training import JointTraining
from fastden.training.labelled import load_mask
from fastden.training.tasks import Task, load_task
from fastden.training.trainer import train
from tests.training.conftest import NETWORKS, Run

pytestmark = pytest.mark.usefixtures("quiet")


class TestMistakes:
    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"network": "resnet"}, r"network: 'resnet'; accepted: efficientnet-lite0, .*module:function"),
            ({"network": "no.such:thing"}, r"network: cannot import no\.such"),
            ({"network": "none.py:thing"}, r"network: cannot import none\.py: no such file"),
            ({"network": f"{NETWORKS}:detector"}, r"network: .*networks\.py has no function detector"),
            ({"network": f"{NETWORKS}:nothing"}, r"network: .*nothing returned NoneType; accepted: a .*Task"),
            ({"network": f"{NETWORKS}:segmenter"}, r"is for segmentation; accepted for joint-classify: classification"),
            ({"network_arguments": {"classes": 2}}, r"training: labels: from \d to 2; accepted: 0 to 1"),
            (
                {"network": f"{NETWORKS}:rounding"},
                r"network: .*:rounding: preprocess of task: its gradient is zero everywhere",
            ),
            ({"network": f"{NETWORKS}:program"}, r"network: .*:program: task: \w+ has no evaluation mode"),
            ({"data": ["none"]}, r"data: none/labels\.csv does not exist"),
        ],
    )
    def test_message(self, joint: Run, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
        with pytest.raises(UserError, match=message):
            joint(tmp_path / "run", **changes)
        assert not (tmp_path / "run" / "model").exists()

    @pytest.mark.parametrize(
        ("fault", "message"),
        [
            (
                "no gradient",
                "task: no gradient passes through the network; accepted: a network whose prediction can be",
            ),
            ("dictionary", r"prediction: dict; accepted: a tensor \(N, classes\)"),
            ("classes", r"prediction: shape \(2, 3\); accepted: 5 classes, as its Task says \(classes\)"),
        ],
    )
    def test_the_network_is_checked_before_the_run(self, joint: Run, tmp_path: Path, fault: str, message: str) -> None:
        settings = {"network": f"{NETWORKS}:other", "network_arguments": {"fault": fault}}
        with pytest.raises(UserError, match=rf"^network: .*networks\.py:other: {message}"):
            joint(tmp_path / "run", **settings)
        assert not (tmp_path / "run").exists()

    def test_a_weight_of_0_needs_no_gradient(self, joint: Run, tmp_path: Path) -> None:
        """Its figures are logged all the same; the prediction must have its shape."""
        settings: dict[str, Any] = {"network": f"{NETWORKS}:other", "weight": 0.0, "steps": 2}
        joint(tmp_path / "run", network_arguments={"fault": "no gradient"}, **settings)
        assert "val_top1_60" in (tmp_path / "run" / "log" / "metrics.csv").read_text()
        with pytest.raises(UserError, match="accepted: 5 classes, as its Task says"):
            joint(tmp_path / "other", network_arguments={"fault": "classes"}, **settings)

    def test_weights_of_unusual_kinds(self, tmp_path: Path) -> None:
        """Conjugates and negatives of complex numbers are as what they show; on meta there are no values."""
        network = load_task(f"{NETWORKS}:classifier").network
        values = torch.tensor([1 + 2j, 3 - 4j])
        fingerprints = set()
        for value in (values.conj(), values.conj().clone().resolve_conj(), values):
            network.register_buffer("kept", value)
            fingerprints.add(joint_training._fingerprint(network))
        assert len(fingerprints) == 2
        config = JointConfig.model_validate(
            {"objective": "joint-classify", "data": ["x"], "output": tmp_path, "network": "x:y"}
        )
        with pytest.raises(UserError, match=r"network: x:y: .*weight is on the device meta and has no values"):
            JointTraining(Denoiser(), config, Task(torch.nn.Linear(2, 2, device="meta"), 2, "classification"))

    @pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
    def test_a_network_in_16_bits_trains_under_autocast(self, joint: Run, tmp_path: Path, dtype: str) -> None:
        settings = {"network": f"{NETWORKS}:half", "network_arguments": {"dtype": dtype}, "validation": 0}
        assert joint(tmp_path / "mixed", precision="bf16-mixed", **settings).is_dir()
        with pytest.raises(UserError, match=r"^network: .*networks\.py:half: .*(Float|same|dtype)"):
            joint(tmp_path / "float32", **settings)
        assert not (tmp_path / "float32").exists()

    def test_the_network_is_checked_on_the_device_of_the_run(self, joint: Run, tmp_path: Path) -> None:
        """It may have kernels for that one alone; the module can be made without it."""
        name = f"{NETWORKS}:accelerated"
        config = JointConfig.model_validate(
            {"objective": "joint-classify", "data": ["x"], "output": tmp_path, "network": name, "crop": 30}
        )
        tasks = {kind: load_task(name, {"kind": kind}) for kind in ("cpu", "meta")}
        modules = {kind: JointTraining(Denoiser(), config, task) for kind, task in tasks.items()}
        modules["cpu"].check_task(tasks["cpu"], torch.device("cpu"), nullcontext())
        with pytest.raises(UserError, match=r"^network: .*:accelerated: selective_scan: expected a tensor on meta"):
            joint(tmp_path / "run", network=name, network_arguments={"kind": "meta"})
        assert not (tmp_path / "run").exists()

    @pytest.mark.parametrize(("kind", "void"), [("classify", 7), ("segment", 255)])
    def test_labels_are_checked_before_the_run(
        self, joint: Run, classified: Path, segmented: Path, tmp_path: Path, kind: str, void: int
    ) -> None:
        """Of validation too: a class too many counted as an error there, or ended the run at the first validation."""
        folder = tmp_path / "labelled"
        shutil.copytree(classified if kind == "classify" else segmented, folder)
        if kind == "classify":
            file = folder / "4.png"
            (folder / "labels.csv").write_text((folder / "labels.csv").read_text().replace("4.png,1", f"4.png,{void}"))
        else:
            file = folder / "labels" / "2.png"
            label = load_mask(file)
            label[5, 5] = void
            PIL.fromarray(label).save(file)
        labels = rf"labels: from \d to {void}; accepted: 0 to 2, and -?\d+ to be ignored \({re.escape(str(file))}\)"
        with pytest.raises(UserError, match=f"validation: {labels}"):
            joint(tmp_path / "run", kind, validation_data=folder)
        with pytest.raises(UserError, match=f"training: {labels}"):
            joint(tmp_path / "run", kind, data=[folder], validation_data=None)
        assert not (tmp_path / "run").exists()

    def test_wrong_data_leaves_nothing_behind(self, joint: Run, tmp_path: Path) -> None:
        with pytest.raises(UserError):
            joint(tmp_path / "run", data=[tmp_path / "none"])
        assert not (tmp_path / "run").exists()

    def test_wrong_accelerator_leaves_nothing_behind(self, photographs: Path, tmp_path: Path) -> None:
        config = TrainConfig.model_validate({"data": [photographs], "output": tmp_path / "run", "crop": 30})
        with pytest.raises(ValueError, match="accelerator"):
            train(config, accelerator="abacus")
        assert not (tmp_path / "run").exists()

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ([], r"network: .*required"),
            (["network=efficientnet-lite0", "weight=-1"], r"weight: -1"),
            (["network=efficientnet-lite0", "weight=.inf"], r"weight: inf"),
            (["network=efficientnet-lite0", "loss=relative-mse"], r"loss: 'relative-mse': .*'mse' or 'l1'"),
            (
                ["network=efficientnet-lite0", "blend=0.5", "init=null"],
                r"^Value error, blend: 0.5 without init; accepted",
            ),
            (["network=efficientnet-lite0", "wieght=1"], r"wieght: 1: .*accepted keys: .*weight"),
        ],
    )
    def test_configuration(self, changes: list[str], message: str) -> None:
        with pytest.raises(UserError, match=message):
            load_config(None, ["objective=joint-classify", "data=[photographs]", "output=run", *changes])
