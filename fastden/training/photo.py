"""Training for photographs: the denoiser and the estimator of its noise level together."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from fastden.errors import UserError, in_one_line
from fastden.images.samples import MAX_SIGMA
from fastden.inference.estimate import LEAST_CELLS
from fastden.network.level import (
    FLOOR,
    Cells,
    NoiseEstimator,
    basis,
    curve_of,
    fit_curve,
    level_map,
    levels_of,
    picture_coarseness,
    picture_uncertainty,
    true_cells,
    weights_of,
    white_factor,
)
from fastden.network.model import Denoiser
from fastden.network.own_estimator import ESTIMATOR_FILE
from fastden.network.padding import pad_image
from fastden.training.config import PhotoConfig
from fastden.training.data import Image, Pictures, sent, tell, to_gray
from fastden.training.denoise import VALIDATION_SIGMAS, DenoiserData, DenoiserTraining, white_noise
from fastden.training.photo_noise import PhotoNoise, PhotoRanges
from fastden.training.replay import Past, Replay

#: Weight of the estimator's loss. It shares no parameter with the denoiser; small enough, it leaves the limit on the
#: gradient's norm to the denoiser (Adam's steps do not depend on it).
ESTIMATOR_WEIGHT = 1e-3
#: An estimate that is too low costs this much more than one that is too high: noise stays, where a little detail goes.
UNDERESTIMATE = 1.5
#: Side of validation crops, pixels, and crops of each held-out photograph.
VALIDATION_CROP, VALIDATION_CROPS = 254, 2


class PhotoDataset(Dataset[dict[str, Tensor]]):
    """Pairs of clean and noisy crops, each a function of (seed, epoch, index) alone.

    Args:
        images: (H, W, 3) uint8.
        noise: draws the recipes.
        length: items an epoch.
        crop: side in pixels.
        gray: probability that a crop is made gray.
        key: seed, epoch.
    """

    def __init__(
        self, images: list[Image], noise: PhotoNoise, length: int, crop: int, gray: float, key: tuple[int, ...]
    ) -> None:
        self.pictures = Pictures(images)
        self.noise, self.length, self.crop, self.gray, self.key = noise, length, crop, gray, key

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        random = np.random.default_rng((*self.key, index))
        image = self.pictures.draw(random)
        recipe = self.noise.plan(random, self.crop, min(image.shape[:2]))
        top = random.integers(image.shape[0] - recipe.taken + 1)
        left = random.integers(image.shape[1] - recipe.taken + 1)
        piece = np.rot90(image[top : top + recipe.taken, left : left + recipe.taken], int(random.integers(4)))
        piece = piece[:, ::-1] if random.random() < 0.5 else piece
        clean = torch.from_numpy(np.ascontiguousarray(piece.transpose(2, 0, 1))).float().div_(255)
        gray = bool(random.random() < self.gray)
        target, noisy = recipe.make(to_gray(clean) if gray else clean, random, gray)
        return {"clean": target, "noisy": noisy, "white": torch.tensor(recipe.kind == "white")}


class PhotoData(DenoiserData):
    """Photographs in memory, and noise of all kinds on their crops."""

    config: PhotoConfig

    def __init__(self, config: PhotoConfig) -> None:
        super().__init__(config)
        self.past: Past | None = None

    def noise(self) -> PhotoNoise:
        """The noise model of the settings."""
        config = self.config
        white, camera, grain, clean = config.kinds
        ranges = PhotoRanges(
            white,
            camera,
            grain,
            clean,
            sigma=config.sigma,
            sigma_power=config.sigma_power,
            clean_quality=config.clean_quality,
            twice=config.twice,
            reduce=config.reduce,
            fabric=config.fabric,
            plain=config.plain,
            contrast=config.contrast,
            dark=config.dark,
            soft=config.soft,
        )
        return PhotoNoise(ranges)

    def train_dataloader(self) -> Any:
        config = self.config
        epoch, done = self.position()
        if config.replay == 1:
            return self.fresh(epoch, done)
        if self.past is None:
            self.past = self._refilled()
        rank = self.trainer.global_rank if self.trainer else 0
        return Replay(self.fresh(epoch), config.replay, self.past, (config.seed, epoch, 2, rank), done)

    def fresh(self, epoch: int, done: int = 0) -> DataLoader[dict[str, Tensor]]:
        """New batches of an epoch, without the first ``done``."""
        config = self.config
        length = config.batch * config.epoch_steps // config.replay
        pairs = PhotoDataset(self.train_images, self.noise(), length, config.crop, config.gray, (config.seed, epoch))
        return self.loader(pairs, done)

    def _refilled(self) -> Past:
        """The past of the run so far: that of a resumed run is made again, as it was where its epoch began."""
        config = self.config
        module = self.trainer.lightning_module if self.trainer else None
        # An estimator that learns must judge anew.
        judge = module.judge if isinstance(module, PhotoTraining) and config.estimator_lr == 0 else None
        epochs = self.trainer.global_step // config.epoch_steps if self.trainer else 0
        each = config.epoch_steps // config.replay
        first = max(epochs * each - config.replay_batches, 0)
        past = Past(config.replay_batches * self.share, self.device, judge, first * self.share)
        if self.trainer and self.trainer.global_step >= config.steps:
            return past  # no step is left to draw for
        if epochs:
            tell(f"replay: {epochs * each - first} batches are made again before the run goes on")
        for epoch in range(first // each, epochs):
            for batch in self.fresh(epoch, max(first - epoch * each, 0)):
                past.put(batch)
        return past

    @property
    def device(self) -> torch.device:
        """Where the network trains."""
        return self.trainer.strategy.root_device if self.trainer else torch.device("cpu")

    def val_dataloader(self) -> DataLoader[Any] | list[Any]:
        if not self.validation_images:
            return []
        length = VALIDATION_CROPS * len(self.validation_images)
        side = min(VALIDATION_CROP, *(min(image.shape[:2]) for image in self.validation_images))
        noise = PhotoNoise(PhotoRanges(white=0.0, camera=0.6, grain=0.3, clean=0.1))
        pairs = PhotoDataset(self.validation_images, noise, length, side, 0.0, (self.config.seed, 0, 1))
        return self.validation_loader(pairs, 4)


class PhotoTraining(DenoiserTraining):
    """The denoiser given a level, true or estimated, and the estimator given the true one.

    Args:
        model: the network, with noise-level input.
        config: all settings.
    """

    config: PhotoConfig

    def __init__(self, model: Denoiser, config: PhotoConfig) -> None:
        super().__init__(model, config)
        self.estimator = NoiseEstimator()
        if config.estimator is not None:
            load_estimator(self.estimator, config.estimator)
        self.estimator.requires_grad_(config.estimator_lr > 0)
        if not config.denoiser:
            model.requires_grad_(False)

    @property
    def trained(self) -> nn.ModuleDict:
        return nn.ModuleDict({"model": self.model, "estimator": self.estimator})

    def peak_rates(self) -> list[float]:
        return [self.config.lr, *([self.config.estimator_lr] if self.config.estimator_lr > 0 else [])]

    def _rates(self) -> str:
        return "lr, estimator_lr" if self.config.estimator_lr > 0 else "lr"

    def configure_optimizers(self) -> Any:
        groups: list[dict[str, Any]] = [
            {"params": [parameter for parameter in self.model.parameters() if parameter.requires_grad]}
        ]
        if self.config.estimator_lr > 0:
            groups.append({"params": list(self.estimator.parameters()), "lr": self.config.estimator_lr})
        optimizer = torch.optim.Adam(groups, lr=self.config.lr)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, self.rate)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def batch_loss(self, batch: dict[str, Tensor]) -> Tensor:
        clean, noisy = batch["clean"], batch["noisy"]
        judged = noisy.new_zeros(())
        if self.config.estimator_lr > 0:
            with torch.autocast(noisy.device.type, enabled=False):
                true, cells = true_cells(clean, noisy), self.estimator(noisy)
                judged = estimator_loss(cells, true)
            self.log("level_loss", judged)
            if not self.config.denoiser:
                return ESTIMATOR_WEIGHT * judged
            batch = {**batch, **known_levels(true, cells)}
        elif "true_logs" not in batch:
            batch = {**batch, **self.judge(batch)}
        whole = (noisy - clean).square().mean((1, 2, 3)).sqrt()
        # Weighed by the true level: one that is wrong on purpose would make the crop count for too much or too little.
        denoised = self.loss(self(noisy, self._level(batch, whole)), clean, whole)
        self.log("denoise_loss", denoised)
        return denoised + ESTIMATOR_WEIGHT * judged

    @torch.no_grad()
    def judge(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """What is known of a batch's levels: the truth, and what the estimator says, see :func:`known_levels`."""
        clean, noisy = batch["clean"], batch["noisy"]
        with torch.autocast(noisy.device.type, enabled=False):
            return known_levels(true_cells(clean, noisy), self.estimator(noisy))

    @torch.no_grad()
    def _level(self, batch: dict[str, Tensor], whole: Tensor) -> Tensor:
        """Level maps (N, 1, H, W): some from the estimator, the others true, of these some wrong by a factor.

        The true level of white noise is exact (``whole``), that of other noise jittered. A network that never met a
        wrong level fails on one: at 1.5 times the true level a picture came out worse than at none.
        """
        config, noisy = self.config, batch["noisy"]
        generator = torch.Generator().manual_seed(config.seed * 1_000_003 + self.global_step)
        # Each process takes the numbers of its own crops: together they draw what one process would.
        rank, processes = (self.trainer.global_rank, self.trainer.world_size) if self._trainer else (0, 1)
        whole_batch = processes * len(noisy)
        draws = sent(torch.rand(3, whole_batch, 1, generator=generator)[:, rank::processes], noisy.device)
        jitter = sent(torch.randn(whole_batch, 1, generator=generator)[rank::processes], noisy.device) * config.jitter
        exact = whole.clamp(min=FLOOR).log()[:, None]
        white = batch["white"][:, None]
        logs = torch.where(white, exact, batch["true_logs"] + jitter)
        factor = torch.where(white, 1.0, batch["true_factor"])
        share = config.estimate if self.global_step >= config.estimate_from else 0.0
        logs = torch.where(draws[0] < share, batch["logs"], logs)
        factor = torch.where(draws[0] < share, batch["factor"], factor)
        low, high = (draws.new_full((), math.log(bound)) for bound in config.factor)
        wrong = torch.lerp(low, high, draws[1])
        logs = torch.where(draws[2] < config.misjudged, logs + wrong, logs)
        return level_map((factor * levels_of(logs)).clamp(max=MAX_SIGMA / 255), noisy)

    @staticmethod
    def validation_figures() -> list[str]:
        names = ["photo", *map(str, VALIDATION_SIGMAS)]
        return ["val_level_loss", *(f"val_{kind}_{name}" for name in names for kind in ("psnr", "noisy"))]

    def validation_step(self, batch: dict[str, Tensor], batch_index: int) -> None:
        clean, noisy, numbers = batch["clean"], batch["noisy"], batch["number"]
        with torch.autocast(noisy.device.type, enabled=False):
            true, cells = true_cells(clean, noisy), self.estimator(noisy)
            each = [
                estimator_loss(*(Cells(*(tensor[i : i + 1] for tensor in both)) for both in (cells, true)))
                for i in range(len(clean))
            ]
            self.log_mean("val_level_loss", torch.stack(each), numbers)
            logs, factor = estimated_levels(cells)
            estimated = level_map((factor * levels_of(logs)).clamp(max=MAX_SIGMA / 255), noisy)
        if not self.config.denoiser:
            return
        self._score("photo", noisy, estimated, clean, numbers, batch_index)
        noise = white_noise(clean, numbers)
        for sigma in VALIDATION_SIGMAS:
            white = clean + sigma / 255 * noise
            level = torch.full_like(white[:, :1], sigma / 255)
            self._score(str(sigma), white, level, clean, numbers, batch_index)

    def _score(self, name: str, noisy: Tensor, level: Tensor, clean: Tensor, numbers: Tensor, batch_index: int) -> None:
        padded = pad_image(torch.cat([noisy, level], 1)).contiguous(memory_format=torch.channels_last)
        # Not the compiled function: another size would be compiled for minutes.
        output = self.model.forward_padded(padded)[:, :, : noisy.shape[2], : noisy.shape[3]].float().clamp(0, 1)
        for kind, image in (("psnr", output), ("noisy", noisy.clamp(0, 1))):
            error = ((image * 255).round() / 255 - clean).square().mean((1, 2, 3)).clamp(min=1e-6)
            self.log_mean(f"val_{kind}_{name}", -10 * error.log10(), numbers)
        if batch_index == 0:
            self.log_picture(0 if name == "photo" else int(name), noisy[0], output[0], clean[0])


@torch.no_grad()
def known_levels(true: Cells, cells: Cells) -> dict[str, Tensor]:
    """Curves of log levels and the factors of coarse noise, both (N, knots) and (N, 1), true and estimated."""
    uniform = true.usable.float().flatten(1) + 1e-6
    coarseness = picture_coarseness(true, uniform)
    logs, factor = estimated_levels(cells)
    return {
        "true_logs": fit_curve(true.log_level.flatten(1), true.brightness.flatten(1), uniform),
        "true_factor": white_factor(coarseness, torch.zeros_like(coarseness))[:, None],
        "logs": logs,
        "factor": factor,
    }


def estimated_levels(cells: Cells) -> tuple[Tensor, Tensor]:
    """Curves of estimated log levels (N, knots), and the factors of coarse noise (N, 1).

    A picture with too few usable cells is not judged, as in inference: its level is 0, its factor 1.
    """
    weights = weights_of(cells)
    factor = white_factor(picture_coarseness(cells, weights), picture_uncertainty(cells, weights))[:, None]
    judged = cells.usable.flatten(1).sum(1, keepdim=True) >= LEAST_CELLS
    return torch.where(judged, curve_of(cells), -math.inf), torch.where(judged, factor, 1.0)


def estimator_loss(cells: Cells, true: Cells) -> Tensor:
    """How far an estimator's cells, and the curves through them, are from the truth.

    Cells: negative log likelihood of a normal number in log levels, whose variance the estimator states itself, so that
    it may say of texture that it does not know. Curves: mean absolute difference of log levels where the picture has
    that brightness.
    """
    usable = true.usable.float()
    count = usable.sum().clamp(min=1)
    error = cells.log_level - true.log_level
    costs = torch.where(error < 0, UNDERESTIMATE, 1.0) * error.square()
    likelihood = 0.5 * (costs * torch.exp(-cells.log_variance) + cells.log_variance)
    coarse = (cells.coarseness - true.coarseness).abs() * (true.log_level > math.log(1 / 255))
    brightness = true.brightness.flatten(1)
    wanted = fit_curve(true.log_level.flatten(1), brightness, usable.flatten(1) + 1e-6)
    reached = fit_curve(cells.log_level.flatten(1), brightness, weights_of(cells) + 1e-6)
    held = (basis(brightness) * usable.flatten(1)[..., None]).mean(1)
    difference = reached - wanted
    curve = torch.where(difference < 0, UNDERESTIMATE, 1.0) * F.smooth_l1_loss(reached, wanted, reduction="none") * held
    return ((likelihood + 0.2 * coarse) * usable).sum() / count + 2.0 * curve.sum(1).mean()


def load_estimator(estimator: NoiseEstimator, path: Path) -> None:
    """Read an estimator's weights.

    Args:
        estimator: gets them.
        path: the file, or a model's folder that holds it.

    Raises:
        UserError: no such file, or one without these weights.
    """
    file = path / ESTIMATOR_FILE if path.is_dir() else path
    accepted = f"accepted: {ESTIMATOR_FILE} of a model for photographs, or the folder that holds it"
    if not file.is_file():
        raise UserError(f"estimator: {file} does not exist; {accepted}")
    try:
        estimator.load_state_dict(load_file(file))
    except (OSError, RuntimeError, SafetensorError) as error:  # RuntimeError: of weights that do not fit
        raise UserError(f"estimator: {file}: {in_one_line(error)}; {accepted}") from error
