"""Settings, networks and limits that all images of a batch share."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import asdict
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal

import torch

from fastden.batch.memory import Budget, split_memory
from fastden.batch.plan import Job
from fastden.batch.transfer import Transfer
from fastden.images.codec import format_for
from fastden.images.whole_files import digest
from fastden.inference.run import Wishes
from fastden.network.fused import FusedDenoiser
from fastden.network.hub import models
from fastden.network.loading import Model, load_network
from fastden.network.model import Denoiser


class Settings:
    """Settings that the stages share.

    Args:
        model, device, dtype, tile: as in :func:`fastden.denoise`.
        wishes: how the network is applied.
        sigma: ``"auto"`` or a number on the scale 0-255.
        sigma_map: an image file of noise levels.
        max_memory: bytes, halved as :func:`fastden.batch.memory.split_memory` says.
        overwrite, strip_metadata: as in :func:`fastden.images.codec.write_image`.
        max_pixels: as in :func:`fastden.images.codec.read_image`.
        say: takes notes that concern the whole run.
    """

    def __init__(
        self,
        model: Model,
        *,
        sigma: Literal["auto"] | float,
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
        self.model, self.device, self.dtype = model, device, dtype
        self.sigma, self.sigma_map, self.wishes = sigma, sigma_map, wishes
        self.tile, self.max_pixels, self.say = tile, max_pixels, say
        self.overwrite, self.strip_metadata = overwrite, strip_metadata
        self._networks: dict[bool, FusedDenoiser] = {}
        self._lock = threading.Lock()
        self._map_digest = None if sigma_map is None else digest(sigma_map)
        network = self.network(eight_bit=True)
        if (sigma != "auto" or sigma_map is not None) and not network.noise_level_input:
            asked = f"{sigma}" if sigma_map is None else f"the map {sigma_map}"
            raise ValueError(f"sigma: {asked}, but this model is blind (it takes no noise level); accepted: 'auto'")
        self.transfer = Transfer(network.device) if network.device.type == "cuda" else None
        # Images of more than 8 bits may use another network, which takes more memory. Without a limit it is not loaded.
        largest = network if max_memory is None else self.network(eight_bit=dtype != "auto")
        self.budget: Budget = split_memory(max_memory, largest)
        self.weights = {"name": _name(model), "sha256": _weights_digest(model, network)}

    def network(self, eight_bit: bool) -> FusedDenoiser:
        """The network for images of 8 bits, or of more."""
        with self._lock:
            if eight_bit not in self._networks:
                self._networks[eight_bit] = load_network(
                    self.model, self.device, self.dtype, eight_bit=eight_bit, fast=self.wishes.fast
                )
            return self._networks[eight_bit]

    def options(self, job: Job) -> dict[str, Any]:
        """The settings that decide a result, beside input and weights. Tiles change rounding alone."""
        return {
            "sigma": self.sigma,
            "sigma_map": self._map_digest,
            **asdict(self.wishes),
            "dtype": str(self.dtype),
            "format": format_for(job.target),
            "strip_metadata": self.strip_metadata,
        }


def _name(model: Model) -> str:
    return str(model) if isinstance(model, str | Path) else type(model).__name__


def _weights_digest(model: Model, network: FusedDenoiser) -> str:
    """The SHA-256 of the weights' file where there is one, else of the loaded weights."""
    if isinstance(model, str | Path):
        file = models().get(str(model), Path(model)) / "model.safetensors"
        if file.is_file():
            return digest(file)
    state = model.state_dict() if isinstance(model, Denoiser) else network.state_dict()
    sha = sha256()
    for name, tensor in sorted(state.items()):
        sha.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        sha.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()
