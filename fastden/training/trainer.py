"""A training run: Lightning's trainer, checkpoints, logs, and the model that it leaves."""

from __future__ import annotations

import logging
import math
import os
import random
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
import yaml
from lightning.pytorch.callbacks import LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only

from fastden.errors import UserError, in_one_line
from fastden.network.model import Denoiser
from fastden.network.own_estimator import OwnEstimator
from fastden.training.callbacks import Averages, FittedSteps, LossBar, Steps, TimeLimit, WholeCheckpoints
from fastden.training.config import JointConfig, PhotoConfig, TrainConfig
from fastden.training.data import tell
from fastden.training.denoise import DenoiserData, DenoiserTraining
from fastden.training.joint_training import PICTURES, JointData, JointTraining
from fastden.training.photo import PhotoData, PhotoTraining
from fastden.training.tasks import load_task
from fastden.whole_files import remove_leftovers, replacing

#: Settings that a resumed run may change: a run that diverged goes on with a lower rate or limit, and what is learned
#: depends neither on the number of processes that prepare crops nor on the folder's place.
CHANGEABLE = ("steps", "lr", "estimator_lr", "clip", "warmup", "workers", "output")
#: Of these, what changes the steps to come. ``train.yaml`` tells from which step on.
TUNED = ("lr", "estimator_lr", "clip", "warmup")


#: What Lightning warns of, and is so on purpose or none of the user's business: validations are made in the process
#: itself, an epoch may be short, and PyTorch has a newer way to ask for a leaf.
HINTS = ("does not have many workers", "smaller than the logging interval", "is deprecated, use .isinstance.treespec")


@contextmanager
def _without_praise() -> Iterator[None]:
    """Lightning praises services of its maker at each start; here it does not. Its logger is the whole process's.

    Nor does it give the :data:`HINTS`.
    """

    def is_no_praise(record: logging.LogRecord) -> bool:
        return "💡" not in record.getMessage()

    logger = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    logger.addFilter(is_no_praise)
    try:
        with warnings.catch_warnings():
            for hint in HINTS:
                warnings.filterwarnings("ignore", f".*{hint}")
            yield
    finally:
        logger.removeFilter(is_no_praise)


#: What Lightning writes into the environment. ``seed_everything()`` of a program's own reads the seed there.
VARIABLES = ("PL_GLOBAL_SEED", "PL_SEED_WORKERS", "CUDA_DEVICE_ORDER")


@contextmanager
def _process_as_it_was() -> Iterator[None]:
    """Leave the whole process's random numbers, environment and cuDNN flag as they were, which a run sets for itself.

    Those of a GPU that was not in use before, and all of a run on several devices, stay as Lightning leaves them.
    """
    variables = {name: os.environ.get(name) for name in VARIABLES}
    benchmark = torch.backends.cudnn.benchmark
    drawn = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002 -- seeded by Lightning
    # Asking a GPU for the state of its random numbers would start CUDA.
    drawn_on_gpus = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = benchmark
        random.setstate(drawn[0])
        np.random.set_state(drawn[1])  # noqa: NPY002
        torch.set_rng_state(drawn[2])
        torch.cuda.set_rng_state_all(drawn_on_gpus)
        for name, value in variables.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


@_process_as_it_was()
@_without_praise()
def train(
    config: TrainConfig,
    *,
    resume: bool = False,
    minutes: float | None = None,
    fit: bool = False,
    accelerator: str = "auto",
    devices: str | int = "auto",
) -> Path:
    """Train a denoiser, alone or jointly, and save it.

    Writes ``checkpoints/last.ckpt`` after every epoch, ``log/metrics.csv`` (a resumed run keeps the earlier part as
    ``metrics-1.csv`` and so on) and TensorBoard files, and at the end
    ``model/`` (weights averaged over the run, as ``save_pretrained`` writes them) with ``train.yaml`` beside them.

    Under ``torchrun`` every process calls this, and the batch is shared among them. The model is there when any of them
    returns.

    Args:
        config: all settings.
        resume: go on from the last checkpoint in ``config.output``, with the same settings except for
            :data:`CHANGEABLE`; ``train.yaml`` gets what changed, unless no step is left.
            With the ``steps`` that a fitted run began with, it has those that were fitted.
        minutes: stop behind the first epoch that ends after this time; the model is saved, and the run can be resumed.
            None for no limit.
        fit: set ``steps`` by the speed of the first part so that the run, its decay included, is complete after
            ``minutes``; ``train.yaml`` gets the number. A validation that is due, and saving the model, come on top.
            Steps behind the last whole epoch are not validated.
        accelerator, devices: as Lightning's. Under ``torchrun`` its processes count, and ``devices`` is not used.

    Returns:
        The folder of the final model.

    Raises:
        UserError: unusable data or network, a used output folder, other settings than those of the run to resume, or a
            loss or weights that are not finite.
        KeyboardInterrupt: Ctrl-C; the run can be resumed from its last epoch.
    """
    last = config.output / "checkpoints" / "last.ckpt"
    if minutes is not None and not 0 <= minutes < math.inf:
        raise UserError(f"minutes: {minutes:g}; accepted: a number of at least 0")
    if fit and minutes is None:
        raise UserError("fit: without minutes; accepted: with the minutes that the run may take")
    if fit and not resume:
        FittedSteps.check(config)
    if resume and not last.exists():
        raise UserError(f"resume: {last} does not exist; accepted: an output folder with a checkpoint")
    if not resume and last.exists():
        raise UserError(f"output: {config.output} holds a run already; accepted: a new folder, or --resume")
    asked = config.steps
    saved: dict[str, Any] = {}
    if resume:
        _check_settings(config)
        checkpoint = torch.load(last, map_location="cpu", weights_only=False)
        names = ("fastden_steps", "fastden_task", "fastden_pictures", "global_step")
        saved = {name: checkpoint.get(name) for name in names}
        del checkpoint
        asked = _restore_steps(config, saved["fastden_steps"] or {})
        if saved["global_step"] >= config.steps:
            _restore_tuned(config, saved["fastden_steps"] or {})
    pl.seed_everything(config.seed, verbose=False)
    ema = Averages(config.ema)
    trainer = _trainer(config, ema, last, accelerator, devices)
    trainer.callbacks.insert(0, Steps(config, asked))  # type: ignore[attr-defined]
    if minutes is not None:
        limit = FittedSteps(config, minutes, fitted=asked != config.steps) if fit else TimeLimit(minutes)
        trainer.callbacks.insert(0, limit)  # type: ignore[attr-defined]
    if config.batch % trainer.world_size:
        raise UserError(f"batch: {config.batch}; accepted for {trainer.world_size} processes: a multiple of them")
    model = _model(config)
    module: DenoiserTraining
    if isinstance(config, JointConfig):
        task = load_task(config.network, config.network_arguments)
        module = JointTraining(model, config, task)
        module.check_task(task, trainer.strategy.root_device, trainer.precision_plugin.forward_context())
        if saved.get("fastden_task", module.fingerprint) not in (None, module.fingerprint):
            raise UserError(
                f"resume: the weights of network {config.network} are others than the run had; accepted: the same"
            )
        if resume:
            _tell_of_pictures(config, saved)
        data: DenoiserData = JointData(config, task)
    elif isinstance(config, PhotoConfig):
        module, data = PhotoTraining(model, config), PhotoData(config)
    else:
        module, data = DenoiserTraining(model, config), DenoiserData(config)
    data.setup("fit")  # faults of the data show before anything is written
    _prepare_output(config, int(saved.get("global_step", 0)))
    try:
        trainer.fit(module, data, ckpt_path=last if resume else None, weights_only=False)
    except SystemExit as error:
        if isinstance(error.__context__, KeyboardInterrupt):  # Lightning ends the process with code 1 after Ctrl-C
            raise KeyboardInterrupt from error
        raise
    # Lightning does this when a fit ends, but not if a resumed run had no step left to do.
    ema.on_train_end(trainer, module)
    target = config.output / "model"
    if trainer.is_global_zero:
        if fit:
            _write_settings(config)
        blend_weights(model, config)
        _save(module, target)
    trainer.strategy.barrier("fastden: the model is there")  # other processes may load it at once
    return target


def _model(config: TrainConfig) -> Denoiser:
    if config.init:
        try:
            model = Denoiser.from_pretrained(config.init)
        except (OSError, RuntimeError, TypeError, ValueError) as error:  # RuntimeError: of weights that do not fit
            raise UserError(f"init: {in_one_line(error).removeprefix('model: ')}") from error
        if model.image_channels != 3:
            raise UserError(f"init: {config.init} is a model for gray images; accepted: one for colour images")
        model = model.adapt(config.noise_level_input)
    else:
        model = Denoiser(config.noise_level_input)
    model.composed = config.composed
    return model.train().to(memory_format=torch.channels_last)  # type: ignore[call-overload]


@torch.no_grad()
def blend_weights(model: Denoiser, config: TrainConfig) -> None:
    """Move the trained weights back towards those that training started from, as ``config.blend`` says.

    Along the path from the first weights to the trained ones, the loss in PSNR grows with the square of the distance,
    and the task's gain about in proportion to it: half of the distance keeps most of the gain at a quarter of the loss.
    """
    if config.blend == 1.0:
        return
    assert config.init is not None  # the configuration's check
    start = Denoiser.from_pretrained(config.init).adapt(config.noise_level_input).state_dict()
    for name, value in model.state_dict().items():
        if value.is_floating_point():
            value.lerp_(start[name].to(value), 1.0 - config.blend)


def _trainer(config: TrainConfig, ema: Averages, last: Path, accelerator: str, devices: str | int) -> pl.Trainer:
    nodes = 1
    if "TORCHELASTIC_RUN_ID" in os.environ:
        # Lightning takes the ranks from torchrun, but not the counts.
        devices = int(os.environ["LOCAL_WORLD_SIZE"])
        nodes = int(os.environ["WORLD_SIZE"]) // devices
    return pl.Trainer(
        accelerator=accelerator,
        devices=devices,
        num_nodes=nodes,
        precision=config.precision,
        # All crops have one size: on a GPU cuDNN times its algorithms once for each convolution, and guesses none.
        benchmark=True,
        max_steps=config.steps,
        gradient_clip_val=config.clip,
        default_root_dir=config.output,
        reload_dataloaders_every_n_epochs=1,
        use_distributed_sampler=False,
        num_sanity_val_steps=0,
        enable_model_summary=False,
        log_every_n_steps=50,
        plugins=[WholeCheckpoints()],
        callbacks=[
            ema,
            LossBar(),
            LearningRateMonitor("step"),
            # One file, replaced after every epoch. (save_last with save_top_k=0 would write it only when training
            # ends.)
            ModelCheckpoint(
                last.parent, last.stem, save_top_k=1, enable_version_counter=False, save_on_train_epoch_end=True
            ),
        ],
        logger=[
            CSVLogger(config.output, "log", version=""),
            TensorBoardLogger(config.output, "tensorboard", version=""),
        ],
    )


def _check_settings(config: TrainConfig) -> None:
    """Raise unless the run to resume had the same settings, except for :data:`CHANGEABLE`."""
    record = config.output / "train.yaml"
    if not record.exists():
        return
    before = yaml.safe_load(record.read_text(encoding="utf-8"))
    if isinstance(config, JointConfig) and "crop" not in config.model_fields_set:
        config.crop = before.get("crop", config.crop)  # earlier code took 224 for all networks
    settings = config.model_dump(mode="json")
    # A run of an earlier version does not record settings that came later: it had what is now their default.
    before = type(config).model_construct().model_dump(mode="json") | before
    paths = {name for name, value in config if isinstance(value, Path) or name == "data"}
    # Whether the estimator learns at all may not change: the optimiser would have other parameters.
    learns = bool(before.get("estimator_lr")) and bool(settings.get("estimator_lr"))
    changeable = tuple(name for name in CHANGEABLE if name in settings and (name != "estimator_lr" or learns))
    changed = [
        name
        for name, value in settings.items()
        if name not in changeable
        and before.get(name) != value
        and not (name in paths and _resolved(before.get(name)) == _resolved(value))
    ]
    if changed:
        shown = "; ".join(f"{name}: {settings[name]!r}, was {before.get(name)!r}" for name in changed)
        raise UserError(
            f"resume: other settings than the run had ({shown}); accepted: the same, except for {_listed(changeable)}"
        )


def _tell_of_pictures(config: JointConfig, saved: dict[str, Any]) -> None:
    """Say so where an unfinished run goes on with pictures that are scaled in another way than before."""
    is_classified = config.objective == "joint-classify"
    if is_classified and saved["fastden_pictures"] != PICTURES and saved["global_step"] < config.steps:
        side = round(config.crop * 8 / 7)
        tell(
            f"resume: pictures whose shorter side is above {side} pixels are scaled down to that, which they were not"
            " when this run began; a new run would have them so from its start"
        )


def _resolved(paths: Any) -> Any:
    """A path, or a list of them, as it is written in a configuration, without links and relative parts."""
    if isinstance(paths, list):
        return [_resolved(path) for path in paths]
    return Path(paths).resolve() if isinstance(paths, str) else paths


def _listed(names: tuple[str, ...]) -> str:
    return f"{', '.join(names[:-1])} and {names[-1]}"


def _restore_steps(config: TrainConfig, steps: dict[str, int]) -> int:
    """Give a run that was fitted the number of steps of its checkpoint, and return the number that it began with."""
    if steps.get("asked") == config.steps:
        config.steps = steps["steps"]
        return int(steps["asked"])
    # The fitted number, as train.yaml of a complete run has it, or one that was chosen for a longer run.
    return int(steps["asked"]) if steps.get("steps") == config.steps else config.steps


def _restore_tuned(config: TrainConfig, steps: dict[str, int]) -> None:
    """Give a run that has no step left the settings that its steps had, so that its record stays true."""
    record = config.output / "train.yaml"
    if record.exists():
        before = yaml.safe_load(record.read_text(encoding="utf-8"))
        for name in TUNED:
            if name in before:
                setattr(config, name, before[name])
        config.steps = steps.get("steps", before["steps"])


@rank_zero_only
def _prepare_output(config: TrainConfig, step: int = 0) -> None:
    """Write ``train.yaml``, and rename the log of the run that is resumed at ``step``."""
    remove_leftovers(config.output / "checkpoints")
    metrics = config.output / "log" / "metrics.csv"
    if metrics.exists():  # CSVLogger would delete it
        earlier = [
            int(number) for file in metrics.parent.glob("metrics-*.csv") if (number := file.stem[8:]).isdecimal()
        ]
        metrics.rename(metrics.with_name(f"metrics-{max(earlier, default=0) + 1}.csv"))
    _write_settings(config, step)


def _write_settings(config: TrainConfig, step: int | None = None) -> None:
    """Write ``train.yaml``; of a run that goes on at ``step``, comments in it tell what is another from there on."""
    config.output.mkdir(parents=True, exist_ok=True)
    record = config.output / "train.yaml"
    settings = config.model_dump(mode="json")
    changes: list[str] = []
    if record.exists():
        text = record.read_text(encoding="utf-8")
        changes = [line for line in text.splitlines() if line.startswith("# from step ")]
        before = yaml.safe_load(text)
        changes += [
            f"# from step {step} on: {name}: {settings[name]}, was {before[name]}"
            for name in TUNED
            if step and name in settings and name in before and settings[name] != before[name]
        ]
    lines = "".join(f"{line}\n" for line in changes)
    with replacing(record) as temporary:  # other processes of the run may be reading it
        temporary.write_text(yaml.safe_dump(settings, sort_keys=False) + lines, encoding="utf-8")


def _save(module: DenoiserTraining, target: Path) -> None:
    """Write the model, and an estimator with it, beside ``target``, then put it there."""
    model = module.model
    model.composed = False
    partial = target.with_name(target.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.eval().to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    if isinstance(module, PhotoTraining):
        model.estimator = OwnEstimator.of(module.estimator)
    model.save_pretrained(partial)
    shutil.copy(target.parent / "train.yaml", partial / "train.yaml")
    shutil.rmtree(target, ignore_errors=True)
    partial.rename(target)
