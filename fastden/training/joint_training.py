"""Joint training of the denoiser with a frozen network: its data and its Lightning module (:mod:`fastden.joint`)."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchmetrics import Metric
from torchmetrics.classification import MulticlassAccuracy, MulticlassJaccardIndex

from fastden.errors import UserError, in_one_line, is_out_of_memory
from fastden.joint import (
    TASK,
    ClassificationLoss,
    FrozenTask,
    JointLoss,
    JointOutput,
    SegmentationLoss,
    resize_prediction,
)
from fastden.network.model import Denoiser
from fastden.training.config import JointConfig
from fastden.training.data import Image, evenly_spaced, tell
from fastden.training.denoise import DenoiserData, DenoiserTraining, white_noise
from fastden.training.labelled import (
    Label,
    LabelledCrops,
    LabelledImages,
    load_one_classified,
    load_one_segmented,
    read_classes,
    read_masks,
)
from fastden.training.tasks import Task

#: Levels (0-255 scale) of the validation noise.
VALIDATION_SIGMAS = (30, 60)
#: Number of the form in which pictures are read, kept in checkpoints; before 2 it was not kept, and
#: :func:`fastden.training.labelled.load_classified` scaled no picture down.
PICTURES = 2


class _Read(NamedTuple):
    """A labelled image: its file, the file that names its label, and its pixels with the label."""

    image: Path
    label: Path
    pair: tuple[Image, Label]


class JointData(DenoiserData):
    """Labelled images, decoded once into memory; those that are held out for validation are not trained on.

    Args:
        config: all settings.
        task: the frozen network; its classes are what labels may be. None checks no labels.
    """

    config: JointConfig

    def __init__(self, config: JointConfig, task: Task | None = None) -> None:
        super().__init__(config)
        self.task = task
        self.labelled: list[Any] = []
        self.held_out: list[Any] = []

    def setup(self, stage: str) -> None:
        if self.labelled:
            return
        config = self.config
        training = [self._read(*pair) for folder in config.data for pair in self._pairs(folder)]
        held_out: list[_Read] = []
        if config.validation_data is not None and config.validation:
            chosen = evenly_spaced(self._pairs(config.validation_data), config.validation)
            held_out = [self._read(*pair) for pair in chosen]
            training = _without(training, held_out)
        if self.task is not None:
            _check_labels(self.task, "training", training)
            _check_labels(self.task, "validation", held_out)
        self.labelled, self.held_out = [read.pair for read in training], [read.pair for read in held_out]

    def _pairs(self, folder: Path) -> list[Any]:
        """The images of a folder, each with its class or the file of its classes."""
        return read_classes(folder) if self.config.objective == "joint-classify" else read_masks(folder)

    def _read(self, image: Path, label: Any) -> _Read:
        crop = self.config.crop
        if self.config.objective == "joint-classify":
            return _Read(image, image, load_one_classified(image, label, crop))
        return _Read(image, label, load_one_segmented(image, label, crop))

    def crops(self, length: int, epoch: int) -> Dataset[dict[str, Tensor]]:
        config = self.config
        return LabelledCrops(self.labelled, length, config.crop, config.gray, config.seed, epoch)

    def val_dataloader(self) -> DataLoader[Any] | list[Any]:
        if not self.held_out:
            return []
        classify = self.config.objective == "joint-classify"
        images = LabelledImages(self.held_out, self.config.crop if classify else None)
        return self.validation_loader(images, 4 if classify else 1)


def _without(training: list[_Read], held_out: list[_Read]) -> list[_Read]:
    """The images that are not held out, by their resolved names; all of them, with a note, where that leaves none."""
    held = {read.image.resolve() for read in held_out}
    kept = [read for read in training if read.image.resolve() not in held]
    if kept:
        return kept
    tell(
        f"validation: all {len(training)} images to train on are held out too and stay, so that its figures are of"
        " images that the denoiser knows; others in validation_data, or a smaller validation, would not be"
    )
    return training


def _check_labels(task: Task, part: str, images: list[_Read]) -> None:
    """Refuse labels that are no class, which the validation would count as errors or fail at.

    Raises:
        UserError: naming the file, its labels and what is accepted.
    """
    for read in images:
        values = np.asarray(read.pair[1], np.int64)
        values = values[values != task.ignore_index]
        if values.size and not 0 <= values.min() <= values.max() < task.classes:
            accepted = f"0 to {task.classes - 1}, and {task.ignore_index} to be ignored"
            text = f"{part}: labels: from {values.min()} to {values.max()}; accepted: {accepted} ({read.label})"
            raise UserError(text)


class JointTraining(DenoiserTraining):
    """Denoising with the loss of a frozen network beside the denoiser's own.

    Args:
        model: the denoiser.
        config: all settings.
        task: the frozen network.

    Raises:
        UserError: ``task`` is not of the kind that ``config.objective`` names, cannot be kept in evaluation mode, or
            has weights without values.
    """

    config: JointConfig

    def __init__(self, model: Denoiser, config: JointConfig, task: Task) -> None:
        super().__init__(model, config)
        wanted = "classification" if config.objective == "joint-classify" else "segmentation"
        if task.kind != wanted:
            raise UserError(f"network: {config.network} is for {task.kind}; accepted for {config.objective}: {wanted}")
        try:
            self.task = FrozenTask(task.network, task.preprocess)
            self.fingerprint = _fingerprint(self.task)
        except (TypeError, ValueError) as error:
            raise UserError(f"network: {config.network}: {error}") from error
        self._predict = torch.compile(self.task.forward) if config.compile else self.task.forward
        task_loss = (ClassificationLoss if wanted == "classification" else SegmentationLoss)(task.ignore_index)
        self.joint_loss = JointLoss(config.weight, task_loss, F.l1_loss if config.loss == "l1" else None)
        self.metrics = nn.ModuleList([_metric(task) for _ in VALIDATION_SIGMAS])

    def check_task(self, task: Task, device: torch.device, precision: AbstractContextManager[object]) -> None:
        """Refuse a network that passes no gradient, or whose prediction is not what its Task says.

        Where it has fewer classes than that, the loss is fine, and the first validation would end the run.

        Args:
            task: as it was given.
            device: the run's; there the network stays. It may have kernels for that one alone.
            precision: the run's autocast. A network in bfloat16 takes images in float32 under it.

        Raises:
            UserError: naming the network.
        """
        side = self.config.crop
        images = torch.rand(min(2, self.config.batch), 3, side, side, generator=torch.Generator().manual_seed(0))
        try:
            with torch.cuda.device(device) if device.type == "cuda" else nullcontext(), precision:
                prediction = self._prediction(images.to(device), self.task.to(device).check)
        except (TypeError, ValueError, RuntimeError) as error:
            if is_out_of_memory(error):
                raise
            raise UserError(f"network: {self.config.network}: {in_one_line(error)}") from error
        shape = "(N, classes)" if task.kind == "classification" else "(N, classes, h, w)"
        returned = f"shape {tuple(prediction.shape)}" if isinstance(prediction, Tensor) else type(prediction).__name__
        if not isinstance(prediction, Tensor) or prediction.dim() != shape.count(",") + 1:
            raise UserError(f"network: {self.config.network}: prediction: {returned}; accepted: a tensor {shape}")
        if prediction.shape[1] != task.classes:
            raise UserError(
                f"network: {self.config.network}: prediction: {returned}; accepted: {task.classes} classes, as its Task"
                " says (classes)"
            )

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["fastden_task"] = self.fingerprint
        checkpoint["fastden_pictures"] = PICTURES

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the frozen network, which checkpoints do not hold. Those of earlier versions do, with changed buffers."""
        own = {name: value for name, value in self.state_dict().items() if name.startswith("task.")}
        checkpoint["state_dict"] = {**checkpoint["state_dict"], **own}

    def batch_loss(self, batch: dict[str, Tensor]) -> Tensor:
        """The joint loss of a batch, a scalar.

        Raises:
            UserError: the network's prediction does not fit the labels.
        """
        _seed((self.config.seed, self.global_step, self.global_rank))
        denoised = self(batch["noisy"], batch["level"]).float()
        output = JointOutput(denoised, {TASK: self._prediction(denoised, self._predict)})
        try:
            terms = self.joint_loss(output, batch["clean"], batch["label"])
        except (TypeError, ValueError) as error:
            raise UserError(f"training: {error}") from error
        self.log("train_denoise_loss", terms.denoise)
        self.log("train_task_loss", terms.tasks[TASK])
        return terms.total

    def _prediction(self, images: Tensor, predict: Callable[[Tensor], Any]) -> Any:
        """The network's prediction; with a weight of 0 nothing needs its gradient, and it may have none."""
        if self.config.weight:
            return predict(images)
        with torch.no_grad():
            return self.task(images)

    @staticmethod
    def validation_figures() -> list[str]:
        return [f"val_psnr_{sigma}" for sigma in VALIDATION_SIGMAS]

    def validation_step(self, batch: dict[str, Tensor], batch_index: int) -> None:
        clean, labels, numbers = batch["clean"], batch["label"], batch["number"]
        noise, counted = white_noise(clean, numbers), numbers >= 0
        for sigma, metric in zip(VALIDATION_SIGMAS, self.metrics, strict=True):
            assert isinstance(metric, Metric)
            level = torch.full((len(clean),), sigma / 255, device=self.device)
            noisy = clean + sigma / 255 * noise
            output = self(noisy, level).float()
            prediction = self.task(output).float()
            if prediction.dim() == 4:
                prediction = resize_prediction(prediction, labels.shape[1:])
            if bool(counted.any()):
                metric.update(prediction[counted], labels[counted])
            name = "top1" if prediction.dim() == 2 else "miou"
            self.log(f"val_{name}_{sigma}", metric, prog_bar=sigma == 60)
            self.log_quality(f"val_psnr_{sigma}", output.clamp(0, 1), clean, numbers)
            if batch_index == 0:
                self.log_picture(sigma, noisy[0], output[0], clean[0])


def _seed(key: tuple[int, ...]) -> None:
    """Seed PyTorch, NumPy and Python, for a ``preprocess`` that is random: a resumed run draws what one run would."""
    seed = int(np.random.SeedSequence(key).generate_state(1)[0])
    torch.manual_seed(seed)
    np.random.seed(seed)  # noqa: NPY002 -- a function may draw from it
    random.seed(seed)


def _fingerprint(network: nn.Module) -> str:
    """SHA-256 of a network's parameters and buffers, hexadecimal: by it a resumed run knows the network again.

    Raises:
        ValueError: weights on meta, which have no values.
    """
    sha = hashlib.sha256()
    for name, value in network.state_dict().items():
        sha.update(name.encode())
        if isinstance(value, Tensor) and value.is_meta:
            raise ValueError(
                f"{name} is on the device meta and has no values; accepted: a network whose weights are loaded"
            )
        if isinstance(value, Tensor) and value.layout == torch.strided and not value.is_quantized:
            plain = value.detach().cpu().resolve_conj().resolve_neg().contiguous().reshape(-1)
            sha.update(plain.view(torch.uint8).numpy().data)
    return sha.hexdigest()


def _metric(task: Task) -> Metric:
    if task.kind == "classification":
        return MulticlassAccuracy(task.classes, average="micro", ignore_index=task.ignore_index)
    return MulticlassJaccardIndex(task.classes, ignore_index=task.ignore_index)
