"""Validated configuration of a training run. An unknown key or an impossible value is an error before it starts."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from fastden.errors import UserError


class TrainConfig(BaseModel):
    """All settings of ``fastden train``; YAML keys and ``--set key=value`` use these names."""

    model_config = ConfigDict(extra="forbid")

    data: list[Path] = Field(min_length=1, description="folders of training photographs, searched recursively")
    output: Path = Field(description="folder for checkpoints, logs and the final model")
    noise_level_input: bool = Field(True, description="give the noise level to the network as a fourth channel")
    init: str | None = Field(None, description="model to start from: bundled name, folder or Hub id")
    sigma: tuple[float, float] = Field((0.0, 75.0), description="range of the noise level, 0-255 scale, uniform")
    gray: float = Field(0.05, ge=0, le=1, description="share of crops made gray, with the same noise in all channels")
    crop: int = Field(94, ge=16, description="side of a training crop, pixels; 2 under a multiple of 4 wastes nothing")
    batch: int = Field(16, ge=1, description="crops a step, over all devices")
    steps: int = Field(20000, ge=1, description="optimiser steps")
    epoch_steps: int = Field(500, ge=1, description="steps between validation and checkpoint")
    lr: float = Field(1e-3, gt=0, description="peak learning rate of Adam")
    warmup: int = Field(200, ge=0, description="steps of linear warm-up")
    decay: float = Field(
        0.4, ge=0, le=1, description="last share of the steps in which the rate falls to 0 by a cosine"
    )
    freeze_bn: float = Field(0.25, ge=0, le=1, description="last share of the steps with frozen BN statistics")
    bn_momentum: float = Field(0.02, gt=0, le=1, description="momentum of the running BN statistics")
    loss: Literal["mse", "l1", "relative-mse"] = Field(
        "relative-mse", description="relative-mse divides an image's squared error by its noise level"
    )
    ema: float = Field(0.999, ge=0, lt=1, description="decay of the averaged weights, which are what is saved")
    clip: float = Field(
        0.005, gt=0, description="limit of the gradient's norm, which is about 0.0015 (relative-mse, behind the start)"
    )
    precision: Literal["32-true", "bf16-mixed", "16-mixed"] = Field("bf16-mixed", description="Lightning's precision")
    composed: bool = Field(True, description="train through the composed weights (exact, fewer operations)")
    compile: bool = Field(False, description="compile the network with torch.compile")
    validation: int = Field(12, ge=0, description="photographs held out of the first folder for validation")
    seed: int = Field(0, ge=0, lt=2**32, description="seed of crops, noise and initial weights")

    @field_validator("sigma")
    @classmethod
    def _check_sigma(cls, sigma: tuple[float, float]) -> tuple[float, float]:
        if not 0 <= sigma[0] <= sigma[1] <= 255:
            raise ValueError("accepted: [low, high] with 0 <= low <= high <= 255")
        return sigma


def load_config(path: Path | None, overrides: list[str]) -> TrainConfig:
    """Read YAML and ``key=value`` overrides (values are YAML too).

    Raises:
        UserError: naming each wrong key, its value and what is accepted.
    """
    values: dict[str, object] = {}
    if path is not None:
        try:
            loaded = yaml.safe_load(path.read_text())
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise UserError(f"config: cannot read {path}: {error}") from error
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
    try:
        return TrainConfig.model_validate(values)
    except ValidationError as error:
        known = ", ".join(TrainConfig.model_fields)
        lines = []
        for item in error.errors():
            name = ".".join(str(part) for part in item["loc"]) or "config"
            lines.append(f"{name}: {item.get('input')!r}: {item['msg']}")
            if item["type"] == "extra_forbidden":
                lines[-1] += f"; accepted keys: {known}"
        raise UserError("; ".join(lines)) from error
