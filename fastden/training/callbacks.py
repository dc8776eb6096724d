"""What Lightning's trainer is given: averages of the weights, the progress bar, a limit on time, whole checkpoints."""

from __future__ import annotations

import io
import math
import operator
from pathlib import Path
from time import monotonic
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import RichProgressBar, WeightAveraging
from lightning.pytorch.callbacks.progress.rich_progress import RichProgressBarTheme
from lightning.pytorch.plugins.io import TorchCheckpointIO
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from fastden.errors import UserError
from fastden.training.config import TrainConfig
from fastden.training.denoise import LOOK_EVERY
from fastden.whole_files import write_bytes

#: Steps between looks at the clock.
FIT_EVERY = 50

#: A module's parameters or buffers, and the name of one.
_Place = tuple[dict[str, Any], str]


class WholeCheckpoints(TorchCheckpointIO):
    """Writes a checkpoint beside its target and renames it.

    Lightning writes it in the folder for temporary files. On another disk that is copied over the last checkpoint, and
    where the copy fails the run is lost.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        buffer = io.BytesIO()
        torch.save(checkpoint, buffer)
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(target, buffer.getbuffer())


class _AveragedModel(AveragedModel):
    """Averages of parameters and buffers, for which no step waits.

    PyTorch's own ask the GPU at each step how often they have averaged.
    """

    _begun = False
    #: What was averaged last, and where its tensors and those of the averages are.
    _listed: tuple[list[nn.Module], list[_Place], list[_Place]] | None = None

    @torch.no_grad()
    def update_parameters(self, model: nn.Module) -> None:
        """Take in what ``model`` holds; the first time PyTorch does it, which copies a run's beginning."""
        if not self._begun:
            super().update_parameters(model)
            self._begun = True
            return
        assert self.multi_avg_fn is not None
        if self._listed is None or not _same(self._listed[0], model):
            self._listed = [*model.children()], _places(self.module), _places(model)
        both = [[tensors[name] for tensors, name in places] for places in self._listed[1:]]
        for is_float in (True, False):
            old, new = ([value for value in values if value.is_floating_point() == is_float] for values in both)
            if old:
                self.multi_avg_fn(old, new, 1)
        self.n_averaged += 1


def _same(children: list[nn.Module], model: nn.Module) -> bool:
    """Whether ``model`` holds these modules; :attr:`DenoiserTraining.trained` makes a new one for the same."""
    own = [*model.children()]
    return len(own) == len(children) > 0 and all(map(operator.is_, own, children))


def _places(module: nn.Module) -> list[_Place]:
    """Where a module has its parameters and buffers, each once, in PyTorch's order; the tensors may be replaced."""
    places: dict[int, _Place] = {}
    modules = [*module.modules()]
    for tensors in [part._parameters for part in modules] + [part._buffers for part in modules]:
        for name, value in tensors.items():
            if value is not None:
                places.setdefault(id(value), (tensors, name))
    return [*places.values()]


class Averages(WeightAveraging):
    """Averages of what is trained, and of nothing else.

    Lightning averages the whole module. Of a frozen network behind the denoiser that was a second copy, whose buffers
    changed: the average of -inf with itself is NaN, and integers were cut off (``arange(64)`` became 9, 10, 10, 12, ...
    at a decay of 0.9999). They were validated with, and written into the network when training ended.

    Args:
        decay: of the average.
    """

    def __init__(self, decay: float) -> None:
        # All tensors at once: one by one, as Lightning's own EMA callback goes, they take 300 kernels a step.
        average = get_ema_multi_avg_fn(decay)

        @torch.no_grad()
        def update(averages: Any, current: Any, count: Tensor | int) -> None:
            if averages[0].is_floating_point():
                average(averages, current, count)
            else:
                for old, new in zip(averages, current, strict=True):
                    old.copy_(new)

        super().__init__(multi_avg_fn=update)

    def setup(self, trainer: pl.Trainer, pl_module: Any, stage: str) -> None:
        if stage == "fit":
            # Lightning moves the module after this. Averages elsewhere would need a copy of all weights at each step.
            device = trainer.strategy.root_device
            self._average_model = _AveragedModel(pl_module.trained, device, use_buffers=True, **self._kwargs)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *arguments: Any) -> None:
        super().on_train_batch_end(trainer, pl_module.trained, *arguments)

    def on_train_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        super().on_train_end(trainer, pl_module.trained)

    def on_validation_epoch_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        super().on_validation_epoch_start(trainer, pl_module.trained)

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        super().on_validation_epoch_end(trainer, pl_module.trained)

    def on_save_checkpoint(self, trainer: pl.Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(trainer, pl_module, checkpoint)
        # A frozen network is loaded by its name when the run goes on.
        current = checkpoint["current_model_state"]
        checkpoint["current_model_state"] = {name: current[name] for name in checkpoint["state_dict"]}

    def on_load_checkpoint(self, trainer: pl.Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        trained = pl_module.trained
        names = trained.state_dict().keys()
        own = {key: {name: checkpoint[key][name] for name in names} for key in ("state_dict", "current_model_state")}
        super().on_load_checkpoint(trainer, trained, {**checkpoint, **own})


class LossBar(RichProgressBar):
    """Lightning's progress bar with the losses of one step in :data:`LOOK_EVERY`, and of the last step of each epoch.

    Lightning makes a Python number of what is logged with ``prog_bar``, at each step, which waits for the GPU.
    """

    #: Logged values that are shown, where there are such.
    NAMES = ("train_loss", "train_task_loss")

    def __init__(self) -> None:
        # Lightning's three decimals show a loss of 0.0004 as 0.000.
        super().__init__(theme=RichProgressBarTheme(metrics_format="#.4g"))
        self._losses: dict[str, float] = {}

    def get_metrics(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, Any]:
        # The training step has looked at the loss of the same step already.
        if not self._losses or trainer.global_step % LOOK_EVERY == 1 or trainer.is_last_batch:
            logged = trainer.callback_metrics
            self._losses = {name: float(logged[name]) for name in self.NAMES if name in logged}
        return {**super().get_metrics(trainer, pl_module), **self._losses}


class Steps(pl.Callback):
    """Keeps the number of steps in each checkpoint, as it was asked for and as it is, so that a fitted run goes on.

    Args:
        config: holds the number as it is.
        asked: the number that the run began with.
    """

    def __init__(self, config: TrainConfig, asked: int) -> None:
        self.config, self.asked = config, asked

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        checkpoint["fastden_steps"] = {"asked": self.asked, "steps": self.config.steps}


class TimeLimit(pl.Callback):
    """Ends a run behind the first epoch that ends after ``minutes``: what it leaves resumes as the whole run would."""

    def __init__(self, minutes: float) -> None:
        self.end = monotonic() + 60 * minutes

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # All processes must stop at the same epoch, and their clocks differ.
        trainer.should_stop = trainer.strategy.reduce_boolean_decision(monotonic() >= self.end, all=False)


class FittedSteps(TimeLimit):
    """Sets the number of steps so that the last one ends ``minutes`` after the first began.

    It does so only while neither the learning rate nor the BN statistics depend on that number, so that the run is the
    one that had this number from the start. For the speed to come it takes the mean so far. A run that is resumed
    later keeps its number, and ends as with :class:`TimeLimit`.

    Args:
        config: its ``steps`` are set.
        minutes: see above; those of a resumed run begin when it is resumed.
        fitted: the number was fitted before the run was resumed, and stays where it matters already.
    """

    def __init__(self, config: TrainConfig, minutes: float, fitted: bool) -> None:
        super().__init__(minutes)
        self.config, self.minutes, self.fitted = config, minutes, fitted
        self.began, self.first, self.is_fixed = 0.0, 0, False

    @staticmethod
    def check(config: TrainConfig, step: int = 0) -> None:
        """Refuse a run, from ``step`` on, whose speed cannot be measured before the number of steps matters.

        Raises:
            UserError: as told.
        """
        free = int((1 - max(config.decay, config.freeze_bn)) * config.steps)
        if step // FIT_EVERY * FIT_EVERY + FIT_EVERY >= free:
            shares = f"decay {config.decay}, freeze_bn {config.freeze_bn} and steps {config.steps}"
            text = f"fit: {shares} leave {max(free - step, 0)} steps to measure the speed in"
            raise UserError(f"{text}; accepted: more than {FIT_EVERY}, by smaller shares or more steps")

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.began, self.first = monotonic(), trainer.global_step
        self.is_fixed = self.fitted and self.first >= self._free() * self.config.steps
        if not self.fitted:
            self.check(self.config, self.first)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.is_fixed:
            super().on_train_epoch_end(trainer, pl_module)

    def _free(self) -> float:
        """The share of the run in which nothing depends on the number of steps."""
        return 1 - max(self.config.decay, self.config.freeze_bn)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        step = trainer.global_step
        free = self._free()
        if step % FIT_EVERY or step >= free * self.config.steps:
            return
        passed = monotonic() - self.began
        speed = (step - self.first) / passed
        steps = step + max(round(speed * (60 * self.minutes - passed)), 1)
        # The clock of one process decides for all. Steps that are behind must have been as they are.
        steps = max(trainer.strategy.broadcast(steps), math.ceil((step + 1) / free))
        self.config.steps = trainer.fit_loop.epoch_loop.max_steps = steps
