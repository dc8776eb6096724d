"""Training of the denoiser alone: its data and its Lightning module."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from itertools import islice
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, DistributedSampler, Sampler
from torchmetrics import MeanMetric

from fastden.errors import UserError
from fastden.network.inputs import noise_level
from fastden.network.model import Denoiser
from fastden.network.padding import pad_image
from fastden.ops.backends import BackendError, use_backend
from fastden.ops.capturing import without_collection
from fastden.training.config import TrainConfig
from fastden.training.data import CropDataset, Image, find_photographs, load_rgb, names_of, tell
from fastden.training.synthetic_noise import NoisyDataset

#: Levels (0-255 scale) of the validation noise, all on the same photographs.
VALIDATION_SIGMAS = (15, 25, 50)
#: The loss "psnr": mean squared errors below this one (51 dB) hardly count. Its weight gives gradients of about the
#: size that the limit on their norm was chosen for.
LEAST_ERROR, PSNR_WEIGHT = (0.7 / 255) ** 2, 3e-4
#: Largest side of a picture of the validation, pixels: four at once, untiled, must fit where training does.
VALIDATION_SIDE = 512
#: Steps on a GPU between looks at whether the loss is finite.
LOOK_EVERY = 50


class _Padded(nn.Module):
    """The network on padded input as a module, as graphs are captured of, with the autocast of where it is made."""

    def __init__(self, model: Denoiser, device: str) -> None:
        super().__init__()
        self.model = model
        # A cached cast of a weight would be captured as a constant.
        self.autocast = device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device), False

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(*self.autocast):
            return self.model.forward_padded(x)


def capture(model: Denoiser, padded: Tensor) -> Any:
    """CUDA graphs of ``model.forward_padded`` and its gradients, for inputs like ``padded`` alone.

    A step of 64 crops of 128 pixels starts some 400 kernels, most of them shorter than their start takes. The warm-up
    moves the running BN statistics, which is undone.
    """
    statistics = {name: buffer.clone() for name, buffer in model.named_buffers()}
    network = _Padded(model, padded.device.type)
    with without_collection(), torch.autocast(padded.device.type, enabled=False, cache_enabled=False):
        graphs = torch.cuda.make_graphed_callables(network, (padded.detach().clone(),))
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            buffer.copy_(statistics[name])
    return graphs


class _Rest(Sampler[int]):
    """The items of a sampler without the first ``done``. Its length counts them, for Lightning counts whole epochs."""

    def __init__(self, items: Iterable[int], done: int) -> None:
        self.items, self.done = items, done

    def __len__(self) -> int:
        return len(self.items)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[int]:
        return islice(self.items, self.done, None)


class Numbered(Dataset[dict[str, Any]]):
    """Items of a validation with their numbers, and as many more as each of ``processes`` needs for an equal share.

    The processes must take the same number of batches, for they wait for each other at each. The numbers of the items
    that are added are -1: counted, they would change the figures.

    Args:
        items: at least one.
        processes: that share them.
    """

    def __init__(self, items: Any, processes: int) -> None:
        self.items = items
        self.length = -(-len(items) // processes) * processes

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, Any]:
        count = len(self.items)
        return {**self.items[min(index, count - 1)], "number": index if index < count else -1}


def white_noise(clean: Tensor, numbers: Tensor) -> Tensor:
    """White noise (N, C, H, W) of deviation 1 on images of a validation, each by its number (N,) alone."""
    generators = [torch.Generator().manual_seed(max(number, 0)) for number in numbers.tolist()]
    return torch.stack([torch.randn(clean.shape[1:], generator=generator) for generator in generators]).to(clean)


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
        files = [find_photographs(folder) for folder in config.data]
        if config.validation > len(files[0]):
            raise UserError(
                f"validation: {config.validation}; accepted: up to the {len(files[0])} photographs in {config.data[0]}"
            )
        if config.validation == sum(map(len, files)):
            raise UserError(
                f"validation: {config.validation} leaves no photograph to train on; accepted: up to {len(files[0]) - 1}"
            )
        small: list[Path] = []
        first, *more = (self._usable(paths, small) for paths in files)
        # Folders may overlap, or come twice to count twice: what is held out of one is trained on from none.
        held = {path for path, _ in first[len(first) - config.validation :]} if config.validation else set()
        others = [image for pairs in more for path, image in pairs if path not in held]
        size = f"{config.crop} x {config.crop} pixels (crop: {config.crop})"
        if not first and not others:
            raise UserError(f"data: no photograph of at least {size}")
        if config.validation > len(first) - (not others):
            raise UserError(
                f"validation: {config.validation}; accepted: up to {len(first) - (not others)}, for {config.data[0]}"
                f" has {len(first)} photographs of at least {size}" + " and one is to train on" * (not others)
            )
        kept = len(first) - config.validation
        self.validation_images = [image for _, image in first[kept:]]
        self.train_images = [image for path, image in first[:kept] if path not in held] + others
        if not self.train_images:  # links to those held out
            raise UserError(f"validation: {config.validation} leaves no other photograph to train on; accepted: fewer")
        if small:
            tell(f"data: {len(small)} left out, smaller than {size}: {names_of(small)}")

    def _usable(self, files: list[Path], small: list[Path]) -> list[tuple[Path, Image]]:
        """The files that hold a crop, by their resolved names, with their pixels; the others are added to ``small``.

        Those held out must hold one too: the smallest of them decides the size of all crops of the validation.
        """
        images = []
        for path in files:
            image = load_rgb(path)
            if min(image.shape[:2]) >= self.config.crop:
                images.append((path.resolve(), image))
            else:
                small.append(path)
        return images

    def crops(self, length: int, epoch: int) -> Dataset[dict[str, Tensor]]:
        """The clean crops of one epoch."""
        config = self.config
        return CropDataset(self.train_images, length, config.crop, config.gray, config.seed, epoch)

    def train_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        config = self.config
        epoch, done = self.position()
        clean = self.crops(config.batch * config.epoch_steps, epoch)
        return self.loader(NoisyDataset(clean, config.noise(), config.seed, epoch), done)

    def position(self) -> tuple[int, int]:
        """The epoch, and how many of its steps are done: some, where a run is resumed that ended within it."""
        if self.trainer is None:
            return 0, 0
        epoch = self.trainer.current_epoch
        return epoch, self.trainer.global_step - epoch * self.config.epoch_steps

    @property
    def share(self) -> int:
        """Crops of a batch in each process."""
        return self.config.batch // (self.trainer.world_size if self.trainer else 1)

    def loader(self, pairs: Dataset[dict[str, Tensor]], done: int) -> DataLoader[dict[str, Tensor]]:
        """The batches of an epoch, without the first ``done``."""
        sampler = self.shared(pairs)
        if done:
            sampler = _Rest(range(len(pairs)) if sampler is None else sampler, done * self.share)  # type: ignore[arg-type]
        # Not pinned: a thread that pins memory would break the capture of CUDA graphs.
        return DataLoader(pairs, self.share, sampler=sampler, num_workers=self.config.workers, drop_last=True)

    def val_dataloader(self) -> DataLoader[Any] | list[Any]:
        if not self.validation_images:
            return []
        side = 4 * (min(VALIDATION_SIDE, *(min(image.shape[:2]) for image in self.validation_images)) // 4)
        crops = [torch.from_numpy(image[:side, :side].transpose(2, 0, 1).copy()) for image in self.validation_images]
        return self.validation_loader([{"clean": crop} for crop in crops], 4)

    def validation_loader(self, items: Any, batch: int) -> DataLoader[dict[str, Any]]:
        """Batches of :class:`Numbered` items, every n-th item for each of n processes."""
        processes, rank = (self.trainer.world_size, self.trainer.global_rank) if self.trainer else (1, 0)
        numbered = Numbered(items, processes)
        return DataLoader(numbered, batch, sampler=range(rank, len(numbered), processes), num_workers=0)

    def shared(self, dataset: Dataset[Any]) -> Sampler[int] | None:
        """A sampler that gives each of n processes every n-th item, in order; Lightning's own would shuffle."""
        if self.trainer is None or self.trainer.world_size == 1:
            return None
        return DistributedSampler(dataset, self.trainer.world_size, self.trainer.global_rank, shuffle=False)


class DenoiserTraining(pl.LightningModule):
    """Denoising with noise drawn for each image.

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
        self._graphs: tuple[bool, Callable[[Tensor], Tensor]] | None = None
        self.means = nn.ModuleDict({name: MeanMetric(nan_strategy="disable") for name in self.validation_figures()})
        # On a GPU: whether a loss since the epoch's start was not finite.
        self._wrong: Tensor | None = None

    @property
    def trained(self) -> nn.ModuleDict:
        """What is trained, averaged and kept in checkpoints, by its names in this module."""
        return nn.ModuleDict({"model": self.model})

    def _bn_frozen(self) -> bool:
        return self.global_step >= self.config.steps * (1 - self.config.freeze_bn)

    def forward(self, noisy: Tensor, sigma: Tensor) -> Tensor:
        """Denoise (N, 3, H, W) in [0, 1] at levels (N,) or (N, 1, H, W) on the same scale, on the chosen backend.

        Raises:
            UserError: the backend cannot run here.
        """
        level = noise_level(noisy, sigma if self.config.noise_level_input else None, self.config.noise_level_input)
        padded = pad_image(noisy if level is None else torch.cat([noisy, level], 1))
        padded = padded.contiguous(memory_format=torch.channels_last)
        backend = self.config.backend
        try:
            with nullcontext() if backend == "auto" else use_backend(backend):
                return self._network(padded)[:, :, : noisy.shape[2], : noisy.shape[3]]
        except BackendError as error:
            raise UserError(f"backend: {error}") from error

    def _network(self, padded: Tensor) -> Tensor:
        """Run the network, in a training step on a GPU perhaps as CUDA graphs."""
        if not (self.config.cuda_graphs and padded.is_cuda and torch.is_grad_enabled()):
            return self._run(padded)
        frozen = self._bn_frozen()
        if self._graphs is None or self._graphs[0] != frozen:
            self._graphs = None  # its memory goes before new memory is taken
            self._graphs = (frozen, capture(self.model, padded))
        return self._graphs[1](padded)

    def loss(self, output: Tensor, clean: Tensor, level: Tensor) -> Tensor:
        """Mean loss of a batch (N, 3, H, W) with levels (N,) or (N, 1, H, W), in float32."""
        error = output.float() - clean
        if self.config.loss == "l1":
            return error.abs().mean()
        squared = error.square().mean((1, 2, 3))
        if self.config.loss == "psnr":
            # All pictures weigh the same in dB. Coarse noise of which hardly anything can be removed otherwise has most
            # of the weight: white noise lost a decibel to it.
            return PSNR_WEIGHT * (squared + LEAST_ERROR).log().mean()
        if self.config.loss == "relative-mse":
            # The attainable squared error grows about as sigma: divided by it, all levels weigh the same in dB.
            squared = squared * (0.1 / (level.reshape(len(level), -1).mean(1) + 3 / 255))
        return squared.mean()

    def batch_loss(self, batch: dict[str, Tensor]) -> Tensor:
        """The loss of a batch, a scalar, which is differentiated."""
        return self.loss(self(batch["noisy"], batch["level"]), batch["clean"], batch["level"])

    def training_step(self, batch: dict[str, Tensor], batch_index: int) -> Tensor:
        if self._bn_frozen():
            for module in self.batch_norms:
                module.eval()
        loss = self.batch_loss(batch)
        if loss.is_cuda:
            # Looking at each loss would keep the next kernels from being started ahead.
            wrong = ~loss.detach().isfinite()
            self._wrong = wrong if self._wrong is None else self._wrong | wrong
        if (not loss.is_cuda or self.global_step % LOOK_EVERY == 0) and not torch.isfinite(loss):
            self._stop(loss, batch)
        self.log("train_loss", loss)  # not with prog_bar, see fastden.training.callbacks.LossBar
        return loss

    def _stop(self, loss: Tensor, batch: dict[str, Tensor]) -> None:
        """End a run that diverged, before its weights diverge too; the last epoch's checkpoint stays."""
        path = self.config.output / f"nonfinite-step-{self.global_step}-rank-{self.global_rank}.safetensors"
        save_file({name: value.detach().cpu().contiguous() for name, value in batch.items()}, path)
        raise UserError(
            f"training: the loss is {loss.item()} at step {self.global_step}; {self._remedy()}. The batch is in {path}"
        )

    def _remedy(self) -> str:
        has_checkpoint = (self.config.output / "checkpoints" / "last.ckpt").exists()
        return f"lower {self._rates()} or clip" + " and go on from the last epoch with --resume" * has_checkpoint

    def _rates(self) -> str:
        """The settings that hold the learning rates, for a message."""
        return "lr"

    def on_train_epoch_end(self) -> None:
        """Refuse a diverged network before its checkpoint replaces the last one: no rate would mend it.

        On a GPU nobody has looked at most losses. The loss of the epoch's last step was that of the weights before it.
        """
        if self._wrong is not None and bool(self._wrong):
            raise UserError(
                f"training: a loss of the epoch that ends with step {self.global_step} is not finite; {self._remedy()}"
            )
        self._wrong = None
        if not self._is_sound():
            raise UserError(f"training: the weights have diverged at step {self.global_step}; {self._remedy()}")

    @torch.no_grad()
    def _is_sound(self) -> bool:
        """Whether what is trained is finite, and so is what the network makes of a gray image.

        Weights of 1e30 are finite, and the results of the second layer are not.
        """
        values = [value for value in self.trained.state_dict().values() if value.is_floating_point()]
        if not bool(torch.stack([value.isfinite().all() for value in values]).all()):
            return False
        training = [module for module in self.model.modules() if module.training]
        self.model.eval()
        gray = torch.full((1, 3, 16, 16), 0.5, device=values[0].device)
        result = self.model(gray, 0.1 if self.config.noise_level_input else None)
        for module in training:
            module.training = True
        return bool(result.isfinite().all())

    def on_train_end(self) -> None:
        """The same for an epoch that the last step cuts short."""
        self.on_train_epoch_end()

    @staticmethod
    def validation_figures() -> list[str]:
        """Names of the means over validation images."""
        return [f"val_psnr_{sigma}" for sigma in VALIDATION_SIGMAS]

    def validation_step(self, batch: dict[str, Tensor], batch_index: int) -> None:
        clean = batch["clean"].float().div(255)
        noise = white_noise(clean, batch["number"])
        for sigma in VALIDATION_SIGMAS:
            level = torch.full((len(clean),), sigma / 255, device=self.device)
            noisy = clean + sigma / 255 * noise
            output = self(noisy, level).float().clamp(0, 1)
            self.log_quality(f"val_psnr_{sigma}", output, clean, batch["number"], prog_bar=sigma == 25)
            if batch_index == 0:
                self.log_picture(sigma, noisy[0], output[0], clean[0])

    def log_quality(self, name: str, output: Tensor, clean: Tensor, numbers: Tensor, prog_bar: bool = False) -> None:
        """Log the PSNR of images (N, 3, H, W) in [0, 1], rounded to 8 bits, at most 60 dB.

        A black image comes out without an error: at infinity it would hide all others.
        """
        error = ((output * 255).round() / 255 - clean).square().mean((1, 2, 3)).clamp(min=1e-6)
        self.log_mean(name, -10 * error.log10(), numbers, prog_bar)

    def log_mean(self, name: str, values: Tensor, numbers: Tensor, prog_bar: bool = False) -> None:
        """Log the mean of values (N,) over the images of all processes, without those whose number is -1.

        It is a metric, for Lightning's own mean divides the number of images by that of processes, as an integer: three
        images count for two in two processes.
        """
        metric = self.means[name]
        assert isinstance(metric, MeanMetric)
        counted = values[numbers >= 0]
        if len(counted):
            metric.update(counted)
        self.log(name, metric, prog_bar=prog_bar)

    def log_picture(self, sigma: int, *images: Tensor) -> None:
        """Show images (3, H, W) side by side in TensorBoard."""
        row = torch.cat([image.float().clamp(0, 1).cpu() for image in images], 2)
        for logger in self.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_image(f"sigma {sigma}: noisy, denoised, clean", row, self.global_step)

    def peak_rates(self) -> list[float]:
        """The peak learning rate of each group of parameters."""
        return [self.config.lr]

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.Adam(self.model.parameters(), lr=self.config.lr)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, self.rate)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_train_start(self) -> None:
        """Set the rate of the first step: a checkpoint of a run with fewer steps holds the rate behind its last, 0.

        It holds the peak rates of that run, too, which may be others now.
        """
        schedule = self.lr_schedulers()
        assert isinstance(schedule, torch.optim.lr_scheduler.LambdaLR)
        schedule.base_lrs[:] = self.peak_rates()
        for group, peak in zip(schedule.optimizer.param_groups, schedule.base_lrs, strict=True):
            group["lr"] = peak * self.rate(schedule.last_epoch)

    def rate(self, step: int) -> float:
        """Share of the peak learning rate at ``step``: linear warm-up, plateau, half a cosine down to 0."""
        config = self.config
        warm = min((step + 1) / (config.warmup + 1), 1.0)
        decay_steps = max(config.decay * config.steps, 1.0)
        done = min(max((step - (config.steps - decay_steps)) / decay_steps, 0.0), 1.0)
        return warm * 0.5 * (1 + math.cos(math.pi * done))
