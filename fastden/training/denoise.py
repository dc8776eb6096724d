"""Training of the denoiser alone: Lightning module, data module and the run itself."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import yaml
from lightning.pytorch.callbacks import EMAWeightAveraging, LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from fastden.errors import UserError
from fastden.model import Denoiser, noise_level, pad_image
from fastden.training.config import TrainConfig
from fastden.training.data import CropDataset, Image, find_images, load_rgb
from fastden.training.noise import gaussian

#: Levels (0-255 scale) of the validation noise, all on the same photographs.
VALIDATION_SIGMAS = (15, 25, 50)


class DenoiserData(pl.LightningDataModule):
    """Photographs decoded once into memory; the last ones of the first folder are held out for validation."""

    def __init__(self, config: TrainConfig) -> None:
        super().__init__()
        self.config = config
        self.train_images: list[Image] = []
        self.validation_images: list[Image] = []

    def setup(self, stage: str) -> None:
        if self.train_images:
            return
        config = self.config
        files = [find_images(folder) for folder in config.data]
        if config.validation > len(files[0]):
            raise UserError(
                f"validation: {config.validation}; accepted: up to the {len(files[0])} photographs in {config.data[0]}"
            )
        held = files[0][len(files[0]) - config.validation :]
        kept = files[0][: len(files[0]) - config.validation] + [path for more in files[1:] for path in more]
        self.validation_images = [load_rgb(path) for path in held]
        self.train_images = [image for image in map(load_rgb, kept) if min(image.shape[:2]) >= config.crop]
        if not self.train_images:
            raise UserError(
                f"data: no photograph of at least {config.crop} x {config.crop} pixels (crop: {config.crop})"
            )

    def train_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        config = self.config
        epoch = self.trainer.current_epoch if self.trainer else 0
        dataset = CropDataset(
            self.train_images, config.batch * config.epoch_steps, config.crop, config.gray, config.seed, epoch
        )
        world = self.trainer.world_size if self.trainer else 1
        # A crop costs 0.1 ms, a step a hundred times the batch's crops: no workers, and nothing to restore on resume.
        return DataLoader(dataset, batch_size=max(config.batch // world, 1), num_workers=0, drop_last=True)

    def val_dataloader(self) -> DataLoader[tuple[Tensor, ...]] | list[Any]:
        if not self.validation_images:
            return []
        side = 4 * (min(min(image.shape[:2]) for image in self.validation_images) // 4)
        crops = [torch.from_numpy(image[:side, :side].transpose(2, 0, 1).copy()) for image in self.validation_images]
        return DataLoader(TensorDataset(torch.stack(crops)), batch_size=4, num_workers=0)


class DenoiserTraining(pl.LightningModule):
    """Gaussian denoising with a noise level drawn for each image.

    Args:
        model: the network; BN momentum is set from ``config``.
        config: all settings.
    """

    def __init__(self, model: Denoiser, config: TrainConfig) -> None:
        super().__init__()
        self.model = model
        self.config = config
        self.batch_norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
        for module in self.batch_norms:
            module.momentum = config.bn_momentum
        self._run = torch.compile(model.forward_padded) if config.compile else model.forward_padded

    def _bn_frozen(self) -> bool:
        return self.global_step >= self.config.steps * (1 - self.config.freeze_bn)

    def forward(self, noisy: Tensor, sigma: Tensor) -> Tensor:
        level = noise_level(noisy, sigma if self.config.noise_level_input else None, self.config.noise_level_input)
        padded = pad_image(noisy if level is None else torch.cat([noisy, level], 1))
        padded = padded.contiguous(memory_format=torch.channels_last)
        return self._run(padded)[:, :, : noisy.shape[2], : noisy.shape[3]]

    def loss(self, output: Tensor, clean: Tensor, sigma: Tensor) -> Tensor:
        """Mean loss of a batch (N, 3, H, W) with levels (N,), in float32."""
        error = output.float() - clean
        if self.config.loss == "l1":
            return error.abs().mean()
        squared = error.square().mean((1, 2, 3))
        if self.config.loss == "relative-mse":
            # The attainable squared error grows about as sigma: dividing by it lets every level weigh alike in dB.
            squared = squared * (0.1 / (sigma + 3 / 255))
        return squared.mean()

    def training_step(self, batch: dict[str, Tensor], batch_index: int) -> Tensor:
        if self._bn_frozen():
            for module in self.batch_norms:
                module.eval()
        clean = batch["clean"]
        # Noise is a function of (seed, step, rank) alone, so that a resumed run repeats the uninterrupted one.
        generator = torch.Generator(self.device)
        generator.manual_seed((self.config.seed * 1_000_003 + self.global_step) * 1009 + self.global_rank)
        low, high = (bound / 255 for bound in self.config.sigma)
        sigma = low + (high - low) * torch.rand(len(clean), generator=generator, device=self.device)
        gray_noise = gaussian(clean, sigma, generator, gray=True)
        noisy = torch.where(batch["gray"].view(-1, 1, 1, 1), gray_noise, gaussian(clean, sigma, generator))
        loss = self.loss(self(noisy, sigma), clean, sigma)
        if not torch.isfinite(loss):
            raise UserError(f"training: the loss is {loss.item()} at step {self.global_step}; lower lr or clip")
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: tuple[Tensor], batch_index: int) -> None:
        clean = batch[0].float().div(255)
        for level in VALIDATION_SIGMAS:
            sigma = torch.full((len(clean),), level / 255, device=self.device)
            generator = torch.Generator(self.device).manual_seed(batch_index)
            output = self(gaussian(clean, sigma, generator), sigma).float().clamp(0, 1)
            error = ((output * 255).round() / 255 - clean).square().mean((1, 2, 3))
            psnr = (-10 * error.log10()).mean()
            self.log(f"val_psnr_{level}", psnr, prog_bar=level == 25, batch_size=len(clean), sync_dist=True)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.Adam(self.model.parameters(), lr=self.config.lr)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, self.rate)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def rate(self, step: int) -> float:
        """Share of the peak learning rate at ``step``: linear warm-up, plateau, half a cosine down to 0."""
        config = self.config
        warm = min((step + 1) / (config.warmup + 1), 1.0)
        decay_steps = max(config.decay * config.steps, 1.0)
        done = min(max((step - (config.steps - decay_steps)) / decay_steps, 0.0), 1.0)
        return warm * 0.5 * (1 + math.cos(math.pi * done))


@rank_zero_only
def _prepare_output(config: TrainConfig, resume: bool) -> None:
    """Write ``train.yaml``, and put the log of the run that is resumed aside."""
    settings = config.model_dump(mode="json")
    record = config.output / "train.yaml"
    if resume and record.exists():
        before = yaml.safe_load(record.read_text())
        changed = [name for name, value in settings.items() if name != "steps" and before.get(name) != value]
        if changed:
            shown = "; ".join(f"{name}: {settings[name]!r}, was {before.get(name)!r}" for name in changed)
            raise UserError(f"resume: other settings than the run had ({shown}); accepted: the same, but for steps")
    metrics = config.output / "log" / "metrics.csv"
    if metrics.exists():  # CSVLogger would delete it
        metrics.rename(metrics.with_name(f"metrics-{len(list(metrics.parent.glob('*.csv')))}.csv"))
    config.output.mkdir(parents=True, exist_ok=True)
    record.write_text(yaml.safe_dump(settings, sort_keys=False))


def train(config: TrainConfig, *, resume: bool = False, accelerator: str = "auto", devices: str = "auto") -> Path:
    """Train a denoiser and save it.

    Writes ``checkpoints/last.ckpt`` after every epoch, ``log/metrics.csv`` (a resumed run keeps the earlier part as
    ``metrics-1.csv`` and so on) and TensorBoard files, and at the end
    ``model/`` (weights averaged over the run, as ``save_pretrained`` writes them) with ``train.yaml`` beside them.

    Args:
        config: all settings.
        resume: go on from the last checkpoint in ``config.output``, with the same settings; only ``steps`` may change.
        accelerator, devices: as Lightning's.

    Returns:
        The folder of the final model.

    Raises:
        UserError: unusable data, a used output folder, or other settings than those of the run to resume.
    """
    last = config.output / "checkpoints" / "last.ckpt"
    if resume and not last.exists():
        raise UserError(f"resume: {last} does not exist; accepted: an output folder with a checkpoint")
    if not resume and last.exists():
        raise UserError(f"output: {config.output} holds a run already; accepted: a new folder, or --resume")
    _prepare_output(config, resume)
    pl.seed_everything(config.seed, verbose=False)
    if config.init:
        model = Denoiser.from_pretrained(config.init).adapt(config.noise_level_input)
    else:
        model = Denoiser(config.noise_level_input)
    model.composed = config.composed
    model = model.train().to(memory_format=torch.channels_last)
    ema = EMAWeightAveraging(decay=config.ema)
    trainer = pl.Trainer(
        accelerator=accelerator,
        devices=devices,
        precision=config.precision,
        max_steps=config.steps,
        gradient_clip_val=config.clip,
        default_root_dir=config.output,
        reload_dataloaders_every_n_epochs=1,
        num_sanity_val_steps=0,
        enable_model_summary=False,
        log_every_n_steps=50,
        callbacks=[
            ema,
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
    module = DenoiserTraining(model, config)
    trainer.fit(module, DenoiserData(config), ckpt_path=last if resume else None, weights_only=False)
    # Lightning does this when a fit ends, but not where a resumed run had no step left to do.
    ema.on_train_end(trainer, module)
    target = config.output / "model"
    if trainer.is_global_zero:
        model.composed = False
        model.to(memory_format=torch.contiguous_format).eval().save_pretrained(target)
        shutil.copy(config.output / "train.yaml", target / "train.yaml")
    return target
