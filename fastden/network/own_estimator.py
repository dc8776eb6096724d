"""The noise estimator that belongs to one model: the file ``noise.safetensors`` in the model's folder."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save
from torch import Tensor

from fastden.network.level import NoiseEstimator
from fastden.network.model_files import naming_file
from fastden.ops.modes import Undrawn
from fastden.whole_files import replacing

#: An estimator's file in a model's folder.
ESTIMATOR_FILE = "noise.safetensors"


@dataclass(frozen=True, eq=False)
class OwnEstimator:
    """An estimator that a model carries with it. It runs on the CPU, wherever the model runs.

    It is no module: as one it would be among the model's parameters, in its state dict, and move with it.

    Args:
        weights: state dict of a :class:`fastden.network.level.NoiseEstimator`, float32, on the CPU.
    """

    weights: dict[str, Tensor]

    @cached_property
    def network(self) -> NoiseEstimator:
        """The estimator with its weights, in evaluation mode."""
        # The caller may have set a default dtype, or a device context such as torch.device("meta").
        with torch.device("cpu"), Undrawn():
            estimator = NoiseEstimator().float()
            estimator.load_state_dict(self.weights)
        return estimator.eval()

    def __getstate__(self) -> dict[str, Any]:
        return {"weights": self.weights}  # a copy makes its network again, from its own weights

    @classmethod
    def of(cls, estimator: NoiseEstimator) -> OwnEstimator:
        """A copy of an estimator."""
        state = estimator.state_dict()
        return cls({name: value.detach().to("cpu", torch.float32, copy=True) for name, value in state.items()})

    @classmethod
    def load(cls, folder: Path) -> OwnEstimator | None:
        """Read the estimator in a model's folder; None where it has none.

        Raises:
            ValueError: the file is no safetensors file.
            RuntimeError: its weights do not fit.
        """
        file = folder / ESTIMATOR_FILE
        if not file.is_file():
            return None
        with naming_file(file):
            own = cls(load_file(file))
            own.network  # noqa: B018 -- weights that do not fit raise here, and name the file
        return own

    def save(self, folder: Path) -> None:
        """Write the file into a model's folder; :meth:`load` reads it."""
        with replacing(folder / ESTIMATOR_FILE) as temporary:
            temporary.write_bytes(save(self.weights))
