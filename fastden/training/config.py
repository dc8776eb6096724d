"""Validated configuration of a training run. An unknown key or an impossible value is an error before it starts."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from fastden.errors import UserError
from fastden.images.samples import MAX_SIGMA
from fastden.training.synthetic_noise import NoiseModel
from fastden.training.tasks import EFFICIENTNET_LITE

#: Settings that are a number or a range.
RANGES = ("sigma", "gain", "jpeg", "clean_quality", "factor", "contrast")
#: Of these, qualities of JPEG.
WHOLE = ("jpeg", "clean_quality")


def _number(value: Any) -> Any:
    """Text as the number that it spells. YAML takes 1e-3 for text: its numbers have a point."""
    if isinstance(value, str):
        with suppress(ValueError):
            return float(value)
    return value


class TrainConfig(BaseModel):
    """All settings of ``fastden train``; YAML keys and ``--set key=value`` use these names."""

    model_config = ConfigDict(extra="forbid")

    data: list[Path] = Field(min_length=1, description="folders of training photographs, searched recursively")
    output: Path = Field(description="folder for checkpoints, logs and the final model")
    objective: Literal["denoise"] = Field(
        "denoise", description="denoise alone; joint-classify and joint-segment train in front of a frozen network"
    )
    noise_level_input: bool = Field(True, description="give the noise level to the network as a fourth channel")
    init: str | None = Field(None, description="model to start from: bundled name, folder or Hub id")
    sigma: tuple[float, float] = Field(
        (0.0, MAX_SIGMA), description="noise level, 0-255 scale: a number, or a range that is drawn from uniformly"
    )
    gain: tuple[float, float] = Field(
        (0.0, 0.0), description="photon noise in addition: its variance at white, scale [0, 1]; a number or a range"
    )
    jpeg: tuple[int, int] | None = Field(
        None, description="JPEG compression after the noise: quality, a number or a range; null is none"
    )
    jpeg_share: float = Field(0.5, ge=0, le=1, description="share of crops that are compressed, where jpeg is given")
    gray: float = Field(0.05, ge=0, le=1, description="share of crops made gray, with the same noise in all channels")
    crop: int = Field(94, ge=16, description="side of a training crop, pixels; 2 under a multiple of 4 wastes nothing")
    batch: int = Field(16, ge=1, description="crops a step, over all devices")
    steps: int = Field(20000, ge=1, description="optimiser steps")
    epoch_steps: int = Field(500, ge=1, description="steps between validation and checkpoint")
    lr: float = Field(1e-3, gt=0, description="peak learning rate of Adam")
    warmup: int = Field(200, ge=0, description="steps of linear warm-up")
    decay: float = Field(
        1.0, ge=0, le=1, description="last share of the steps in which the rate falls to 0 by a cosine"
    )
    freeze_bn: float = Field(0.25, ge=0, le=1, description="last share of the steps with frozen BN statistics")
    bn_momentum: float = Field(0.02, gt=0, le=1, description="momentum of the running BN statistics")
    loss: Literal["mse", "l1", "relative-mse", "psnr"] = Field(
        "relative-mse",
        description="relative-mse divides an image's squared error by its noise level; psnr takes its logarithm",
    )
    ema: float = Field(0.999, ge=0, lt=1, description="decay of the averaged weights, which are what is saved")
    blend: float = Field(
        1.0, gt=0, le=1, description="share of the trained weights in what is saved; the rest is init's weights"
    )
    clip: float = Field(0.02, gt=0, description="limit of the gradient's norm")
    precision: Literal["32-true", "bf16-mixed", "16-mixed"] = Field("bf16-mixed", description="Lightning's precision")
    composed: bool = Field(True, description="train through the composed weights (exact, fewer operations)")
    compile: bool = Field(False, description="compile the network with torch.compile")
    cuda_graphs: bool = Field(
        False, description="on a GPU, replay the network's two passes as CUDA graphs; not together with compile"
    )
    backend: Literal["auto", "torch", "triton", "cuda"] = Field(
        "auto", description="kernels of the forward pass and its gradients; cuda has none for batch statistics"
    )
    workers: int = Field(0, ge=0, description="processes that prepare crops; a GPU needs some, two CPU cores none")
    validation: int = Field(12, ge=0, description="photographs held out of the first folder for validation")
    seed: int = Field(0, ge=0, lt=2**32, description="seed of crops, noise and initial weights")

    @field_validator(*RANGES, mode="before", check_fields=False)
    @classmethod
    def _number_is_a_range(cls, value: Any) -> Any:
        if isinstance(value, list | tuple):
            return [_number(item) for item in value]
        value = _number(value)
        return (value, value) if isinstance(value, int | float) and not isinstance(value, bool) else value

    @field_validator("sigma")
    @classmethod
    def _check_sigma(cls, sigma: tuple[float, float]) -> tuple[float, float]:
        return _check_range(sigma, 0, 255)

    @field_validator("gain")
    @classmethod
    def _check_gain(cls, gain: tuple[float, float]) -> tuple[float, float]:
        return _check_range(gain, 0, 1)

    @field_validator("jpeg")
    @classmethod
    def _check_jpeg(cls, jpeg: tuple[int, int] | None) -> tuple[int, int] | None:
        return jpeg if jpeg is None else _check_range(jpeg, 1, 100)

    @model_validator(mode="after")
    def _check_graphs(self) -> TrainConfig:
        if self.cuda_graphs and self.compile:
            raise ValueError("cuda_graphs: true with compile: true; accepted: one of the two")
        return self

    @model_validator(mode="after")
    def _check_blend(self) -> TrainConfig:
        if self.blend < 1 and not self.init:
            raise ValueError(f"blend: {self.blend} without init; accepted: 1, or a model to start from")
        return self

    def noise(self) -> NoiseModel:
        """The noise model of these settings."""
        return NoiseModel(self.sigma, self.gain, self.jpeg, self.jpeg_share)


class PhotoConfig(TrainConfig):
    """Settings of training for photographs: the denoiser and the estimator of its noise level together.

    :mod:`fastden.training.photo_noise` draws the noise. ``sigma`` is the range of its white share, up to the highest
    level that the network is given. ``gain`` and ``jpeg`` are refused: cameras have photon noise and JPEG of their own.
    """

    objective: Literal["photo"] = Field(  # type: ignore[assignment]
        description="photo: noise as cameras, film and white noise make it, and the estimator of its level"
    )
    noise_level_input: Literal[True] = Field(
        True, description="a network for photographs takes the level that the estimator gives"
    )
    estimate: float = Field(0.4, ge=0, le=1, description="share of crops whose level comes from the estimator")
    estimate_from: int = Field(1000, ge=0, description="first step at which it does")
    estimator_lr: float = Field(
        1e-3, ge=0, description="peak learning rate of the estimator; 0 leaves it as it is and saves its gradients"
    )
    denoiser: bool = Field(
        True, description="train the denoiser too; false: the estimator alone, in a fraction of the time"
    )
    estimator: Path | None = Field(
        None, description="an estimator to start from: its weights, or a model's folder that holds them; null is none"
    )
    kinds: tuple[float, float, float, float] = Field(
        (0.3, 0.42, 0.22, 0.06), description="shares of white noise, camera noise, grain and clean pictures"
    )
    clean_quality: tuple[int, int] = Field((50, 98), description="JPEG quality of clean pictures: a number or a range")
    twice: float = Field(0.15, ge=0, le=1, description="share of JPEGs that are saved as a JPEG twice")
    sigma_power: float = Field(1.0, gt=0, description="white noise: 2 draws more of the weak, 1 all alike")
    reduce: float = Field(0.0, ge=0, le=1, description="share of crops from pictures that are reduced before the noise")
    fabric: float = Field(0.0, ge=0, le=1, description="share of crops that a regular texture covers, as cloth has it")
    plain: float = Field(0.0, ge=0, le=1, description="share of these textures that cannot be seen: even areas")
    contrast: tuple[float, float] = Field(
        (0.06, 0.4), description="how plainly the others show: a range of the deviation of the logarithm of brightness"
    )
    dark: float = Field(0.0, ge=0, le=1, description="share of crops from pictures that are darkened before the noise")
    soft: float = Field(
        0.0, ge=0, le=1, description="share of camera noise and grain on pictures blurred as a lens blurs them"
    )
    replay: int = Field(
        1,
        ge=1,
        description="steps for each batch of new noise; all draw from the last replay_batches, turned and mirrored",
    )
    replay_batches: int = Field(
        256,
        ge=1,
        description="batches to draw from; 64 crops of 126 pixels are 12 MB. A resumed run first makes them again",
    )
    jitter: float = Field(0.1, ge=0, le=1, description="standard deviation of the true log level's error, where given")
    misjudged: float = Field(0.3, ge=0, le=1, description="share of crops whose level is wrong by a factor")
    factor: tuple[float, float] = Field(
        (0.6, 2.0), description="that factor: a number, or a range that is drawn from log-uniformly"
    )
    crop: int = Field(126, ge=32, description="side of a training crop, pixels; 2 under a multiple of 4 wastes nothing")
    batch: int = Field(8, ge=1, description="crops a step, over all devices")

    @model_validator(mode="after")
    def _check_replay(self) -> PhotoConfig:
        if self.epoch_steps % self.replay:
            raise ValueError(f"replay: {self.replay}; accepted: a divisor of epoch_steps, {self.epoch_steps}")
        return self

    @model_validator(mode="after")
    def _check_estimator(self) -> PhotoConfig:
        if self.estimator_lr == 0 and not (self.denoiser and self.estimator):
            raise ValueError("estimator_lr: 0; accepted: above 0, or a denoiser that learns beside a given estimator")
        return self

    @model_validator(mode="after")
    def _check_denoiser(self) -> PhotoConfig:
        if not self.denoiser and self.init is None:
            raise ValueError("denoiser: false without init; accepted: with init, the model that stays as it is")
        return self

    @model_validator(mode="after")
    def _check_noise(self) -> PhotoConfig:
        accepted = "its cameras have noise and JPEG of their own"
        if self.gain != (0, 0):
            raise ValueError(f"gain: {self.gain}; accepted for photo: 0, {accepted}")
        if self.jpeg is not None:
            raise ValueError(f"jpeg: {self.jpeg}; accepted for photo: null, {accepted}")
        return self

    @field_validator("sigma")
    @classmethod
    def _check_sigma(cls, sigma: tuple[float, float]) -> tuple[float, float]:
        return _check_range(sigma, 0, MAX_SIGMA)

    @field_validator("kinds")
    @classmethod
    def _check_kinds(cls, kinds: tuple[float, float, float, float]) -> tuple[float, float, float, float]:
        total = sum(kinds)
        if min(kinds) < 0 or abs(total - 1) > 1e-6:
            raise ValueError("accepted: four shares of at least 0 that add up to 1")
        # NumPy draws with shares whose sum is off by at most 1.5e-8. Those that it takes stay: so do their recipes.
        if abs(total - 1) <= 1e-8:
            return kinds
        white, camera, grain, clean = kinds
        return white / total, camera / total, grain / total, clean / total

    @field_validator("factor")
    @classmethod
    def _check_factor(cls, factor: tuple[float, float]) -> tuple[float, float]:
        return _check_range(factor, 0.1, 10)

    @field_validator("contrast")
    @classmethod
    def _check_contrast(cls, contrast: tuple[float, float]) -> tuple[float, float]:
        return _check_range(contrast, 0.001, 2)

    @field_validator("clean_quality")
    @classmethod
    def _check_quality(cls, quality: tuple[int, int]) -> tuple[int, int]:
        return _check_range(quality, 1, 100)


class JointConfig(TrainConfig):
    """Settings of joint training with a frozen network: those of the denoiser, some with other defaults, and more."""

    objective: Literal["joint-classify", "joint-segment"] = Field(  # type: ignore[assignment]
        description="joint-classify: folders with labels.csv; joint-segment: folders with images/ and labels/"
    )
    network: str = Field(
        description="the frozen network: a built-in name (efficientnet-lite0, -lite1, -lite2), module:function or"
        " file.py:function; the function returns a fastden.training.tasks.Task"
    )
    network_arguments: dict[str, Any] = Field(default_factory=dict, description="keyword arguments of that function")
    weight: float = Field(1e-3, ge=0, allow_inf_nan=False, description="lambda: weight of the task's loss")
    data: list[Path] = Field(min_length=1, description="folders of labelled training images")
    validation_data: Path | None = Field(None, description="folder of labelled images for validation; null is none")
    validation: int = Field(100, ge=0, description="images of it that are used, evenly spaced")
    init: str | None = Field("color", description="model to start from: bundled name, folder or Hub id; null is none")
    sigma: tuple[float, float] = Field((15.0, 60.0), description="noise level, 0-255 scale: a number or a range")
    gray: float = Field(0.0, ge=0, le=1, description="share of crops made gray")
    crop: int = Field(
        224,
        ge=16,
        description="side of a training crop, pixels; 240 for efficientnet-lite1, 260 for -lite2. For classes, pictures"
        " are first scaled so that their shorter side is at most 8/7 of it",
    )
    batch: int = Field(8, ge=1, description="crops a step, over all devices")
    steps: int = Field(2000, ge=1, description="optimiser steps")
    lr: float = Field(1e-4, gt=0, description="peak learning rate of Adam")
    freeze_bn: float = Field(1.0, ge=0, le=1, description="last share of the steps with frozen BN statistics")
    loss: Literal["mse", "l1"] = Field("mse", description="the denoiser's own loss")

    @model_validator(mode="after")
    def _crop_of_the_network(self) -> JointConfig:
        if "crop" not in self.model_fields_set:
            self.crop = EFFICIENTNET_LITE.get(self.network, self.crop)
            self.model_fields_set.discard("crop")  # a run that is resumed asks whether it was named
        return self


def _check_range(bounds: Any, low: float, high: float) -> Any:
    if not low <= bounds[0] <= bounds[1] <= high:
        raise ValueError(f"accepted: [low, high] with {low} <= low <= high <= {high}")
    return bounds


def load_config(path: Path | None, overrides: list[str]) -> TrainConfig:
    """Read YAML and ``key=value`` overrides (values are YAML too); ``objective`` chooses the kind of configuration.

    Raises:
        UserError: naming each wrong key, its value and what is accepted.
    """
    values: dict[str, object] = {}
    if path is not None:
        try:
            loaded = yaml.safe_load(path.read_text(encoding="utf-8-sig"))
        except OSError as error:
            raise UserError(f"config: cannot read {path}: {error.strerror or error}") from error
        except UnicodeDecodeError as error:
            raise UserError(f"config: {path} is no text in UTF-8; accepted: a YAML file") from error
        except yaml.YAMLError as error:
            raise UserError(f"config: {path} is not YAML: {' '.join(str(error).split())}") from error
        if not isinstance(loaded, dict):
            raise UserError(f"config: {path} holds {type(loaded).__name__}; accepted: keys and values")
        values.update(loaded)
    for override in overrides:
        key, sign, value = override.partition("=")
        if not sign:
            raise UserError(f"set: {override!r}; accepted: key=value")
        try:
            values[key] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise UserError(f"set: {override!r} is not YAML: {error}") from error
    objective = values.get("objective", "denoise")
    if objective not in ("denoise", "photo", "joint-classify", "joint-segment"):
        raise UserError(f"objective: {objective!r}; accepted: denoise, photo, joint-classify, joint-segment")
    kinds: dict[str, type[TrainConfig]] = {"denoise": TrainConfig, "photo": PhotoConfig}
    kind = kinds.get(str(objective), JointConfig)
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        known = ", ".join(kind.model_fields)
        lines = []
        for item in error.errors():
            name = ".".join(str(part) for part in item["loc"])
            lines.append(f"{name}: {item.get('input')!r}: {item['msg']}" if name else item["msg"])
            if item["loc"] and item["loc"][0] in RANGES and item["type"] != "value_error":
                lines[-1] += "; accepted: a number or [low, high]" + ", whole numbers" * (item["loc"][0] in WHOLE)
            if item["type"] == "extra_forbidden":
                lines[-1] += f"; accepted keys: {known}"
        raise UserError("; ".join(lines)) from error
