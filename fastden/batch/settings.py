"""Settings, networks and limits that all images of a batch share."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from fastden.batch.memory import Budget, split_memory
from fastden.batch.plan import Job, format_of_result
from fastden.batch.transfer import Transfer
from fastden.errors import UserError, in_one_line
from fastden.inference.estimate import NoiseEstimate
from fastden.inference.run import Wishes, check_strengths
from fastden.network.fused import FusedDenoiser
from fastden.network.hub import WEIGHTS_FILE, files_of, model_folder, models
from fastden.network.int8 import RANGES_FILE
from fastden.network.loading import Model, default_model, load_network
from fastden.network.model import Denoiser
from fastden.whole_files import check_readable, digest

#: The model for white noise, where the noise chooses.
FOR_WHITE = default_model(0.0)


class Settings:
    """Settings that the stages share.

    Args:
        model, device, dtype, tile: as in :func:`fastden.denoise`. Without a model the estimate of each picture's noise
            chooses one.
        wishes: how the network is applied.
        sigma: ``"auto"``, a number on the scale 0-255, or an estimate that all images share.
        sigma_map: an image file of noise levels.
        max_memory: bytes, halved as :func:`fastden.batch.memory.split_memory` says.
        overwrite, strip_metadata: as in :func:`fastden.images.codec.write_image`.
        max_pixels: as in :func:`fastden.images.codec.read_image`.
        say: takes notes that concern the whole run.
    """

    def __init__(
        self,
        model: Model | None,
        *,
        sigma: Literal["auto"] | float | NoiseEstimate,
        sigma_map: Path | None,
        wishes: Wishes,
        device: str | torch.device | None,
        dtype: str | torch.dtype,
        tile: int | Literal["auto"] | None,
        max_memory: int | None,
        overwrite: bool,
        strip_metadata: bool,
        max_pixels: int,
        say: Callable[[str], None],
    ) -> None:
        self.by_noise = model is None and sigma == "auto" and sigma_map is None
        self.model = default_model(sigma if sigma_map is None else 0.0) if model is None else model
        self.device, self.dtype = device, dtype
        self.sigma, self.sigma_map, self.wishes = sigma, sigma_map, wishes
        self.tile, self.max_pixels, self.say = tile, max_pixels, say
        self.overwrite, self.strip_metadata = overwrite, strip_metadata
        self._networks: dict[tuple[bool, bool], FusedDenoiser] = {}
        self._lock = threading.Lock()
        try:
            if sigma_map is not None:
                check_readable(sigma_map)
            self._map_digest = None if sigma_map is None else digest(sigma_map)
        except UserError as error:
            raise UserError(f"sigma_map: {sigma_map} {error}") from error
        except OSError as error:
            raise UserError(f"sigma_map: {in_one_line(error)}") from error
        network = self.network(eight_bit=True)
        if (sigma != "auto" or sigma_map is not None) and not network.noise_level_input:
            number = "a NoiseEstimate" if isinstance(sigma, NoiseEstimate) else f"{sigma}"
            asked = number if sigma_map is None else f"the map {sigma_map}"
            raise ValueError(f"sigma: {asked}, but this model is blind (it takes no noise level); accepted: 'auto'")
        check_strengths(network, wishes)
        self.transfer = Transfer(network.device) if network.device.type == "cuda" else None
        # Images of more than 8 bits may use another network, which takes more memory. Without a limit it is not loaded.
        largest = network if max_memory is None else self.network(eight_bit=dtype != "auto")
        self.budget: Budget = split_memory(max_memory, largest)
        self._weights = {False: {"name": _name(self.model), "sha256": _weights_digest(self.model, network)}}
        if self.by_noise:
            self._weights[True] = {"name": FOR_WHITE, "sha256": _weights_digest(FOR_WHITE, network)}
        # An estimator of the user's own, where it is asked. The bundled one comes with the bundled weights.
        estimated = sigma == "auto" and sigma_map is None and network.noise_level_input
        bundled = isinstance(self.model, str) and self.model in models()
        own = network.estimator if estimated and not bundled else None
        self._estimator = None if own is None else digest_of(own.weights)
        self._network_is_fast = network.quality == "fast"
        if wishes.fast:
            _ = self._ranges  # now, as the networks are loaded: a calibration may come before the first image
        #: The weights that a picture's noise may choose.
        self.known_weights = tuple(weights["sha256"] for weights in self._weights.values())

    def network(self, eight_bit: bool, white: bool = False) -> FusedDenoiser:
        """The network for images of 8 bits, or of more; for white noise, or for any noise.

        All have one form, and take the same memory and time.
        """
        key = (eight_bit, white and self.by_noise)
        with self._lock:
            if key not in self._networks:
                self._networks[key] = load_network(
                    FOR_WHITE if key[1] else self.model,
                    self.device,
                    self.dtype,
                    eight_bit=eight_bit,
                    fast=self.wishes.fast,
                )
            return self._networks[key]

    def weights(self, white: bool = False) -> dict[str, str]:
        """Name and SHA-256 of the weights for white noise, or for any noise."""
        return self._weights[white and self.by_noise]

    @cached_property
    def _ranges(self) -> str:
        """SHA-256 of the calibrations of the models, where 8-bit numbers need them."""
        return " ".join(map(_ranges_digest, [self.model, FOR_WHITE] if self.by_noise else [self.model]))

    def options(self, job: Job) -> dict[str, Any]:
        """The settings that decide a result, beside input and weights. Tiles change rounding alone."""
        return {
            "sigma": _as_json(asdict(self.sigma)) if isinstance(self.sigma, NoiseEstimate) else self.sigma,
            "sigma_map": self._map_digest,
            **asdict(self.wishes),
            "model_by_noise": self.by_noise,
            "dtype": str(self.dtype),
            "format": format_of_result(job, self.max_pixels),
            "strip_metadata": self.strip_metadata,
            **({"estimator": self._estimator} if self._estimator else {}),
            # A cluster's driver computes nothing, and wishes for the workers' quality.
            **({"ranges": self._ranges} if self.wishes.fast or self._network_is_fast else {}),
        }


def _as_json(fields: dict[str, Any]) -> dict[str, Any]:
    """As a manifest gives them back: JSON has no tuples."""
    return {name: list(value) if isinstance(value, tuple) else value for name, value in fields.items()}


def _name(model: Model) -> str:
    return str(model) if isinstance(model, str | Path) else type(model).__name__


def _weights_digest(model: Model, network: FusedDenoiser) -> str:
    """The SHA-256 of the weights' file where there is one, else of the loaded weights."""
    if isinstance(model, str | Path):
        file = model_folder(model) / WEIGHTS_FILE
        if file.is_file():
            return digest(file)
    state = model.state_dict() if isinstance(model, Denoiser) else network.state_dict()
    return digest_of(state)


def _ranges_digest(model: Model) -> str:
    """The SHA-256 of what :func:`fastden.calibrate` found: of its file, else of the ranges in memory; "" for none."""
    if isinstance(model, str | Path):
        file = files_of(model) / RANGES_FILE
        return digest(file) if file.is_file() else ""
    ranges = model.ranges if isinstance(model, FusedDenoiser) else (model.int8_ranges or (None, ""))[0]
    return digest_of(ranges) if ranges else ""


def digest_of(state: Mapping[str, Tensor]) -> str:
    """The SHA-256 of tensors in memory, by their names."""
    sha = sha256()
    for name, tensor in sorted(state.items()):
        sha.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        sha.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()
