"""A map function for Hugging Face datasets.

>>> from fastden.integrations.datasets import DenoiseColumn
>>> clean = dataset.map(DenoiseColumn("image", sigma=25), num_proc=4)
>>> lazy = dataset.with_transform(DenoiseColumn("image"))
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from copy import copy
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import torch

import fastden
from fastden.api import denoise
from fastden.inference.estimate import WITH_ESTIMATOR, NoiseEstimate
from fastden.integrations._settings import check_settings
from fastden.network.hub import CONFIG_FILE, WEIGHTS_FILE, files_of
from fastden.network.int8 import RANGES_FILE
from fastden.network.loading import default_model
from fastden.network.own_estimator import ESTIMATOR_FILE

#: The name of what a pickle says of the model's files; only the fingerprint reads it.
_MADE_WITH = "made_with"


class _Process:
    """The process that computed last, or imported this file: another one is its fork."""

    number = os.getpid()


def _use_one_thread_in_a_fork() -> None:
    """One thread for PyTorch, once in a forked process.

    A fork has none of the threads that its parent computed with, and waits for them for ever: PyTorch's OpenMP.
    """
    if _Process.number != os.getpid():
        torch.set_num_threads(1)
        _Process.number = os.getpid()


@dataclass(frozen=True)
class DenoiseColumn:
    """Denoises the images of one column; rows and batches of rows, on any number of processes.

    Each process loads the network once, when it first needs it. On Linux the processes of ``num_proc`` are forks. A
    fork computes on one thread (``torch.set_num_threads``), because PyTorch hangs in a fork of a process that has
    computed on several.

    ``datasets`` finds the results of an earlier run by a fingerprint. It is made of the settings, fastden's version and
    the model's files: after a training that wrote the files again, ``map`` computes again.

    With the format ``torch``, ``map`` stores the results as nested lists, as it does with all tensors: set that format
    after ``map``.

    Args:
        column: of images: whatever :func:`fastden.denoise` takes, such as the PIL images that ``datasets.Image`` makes.
        sigma: the noise level on the scale 0-255, ``"auto"``, the name of a column that holds it, or a
            :class:`fastden.NoiseEstimate`.
        into: the column for the results; None replaces the images.
        model, strength, device: as of :func:`fastden.denoise`. A CPU by default, because processes that are forked
            cannot use CUDA.
        batched: whether a call gets a batch. None: it does where the column holds a list, or an array of more axes
            than an image has. Gray images 1, 3 or 4 pixels wide that come stacked, as with the format ``numpy``, look
            like one colour image: say ``batched=True`` for them.

    Raises:
        TypeError, ValueError: a column's name is no text or is empty, ``sigma`` is none of these, ``strength`` is
            outside 0 to 2, or there is no such model or device.
    """

    column: str = "image"
    sigma: float | str | NoiseEstimate = "auto"
    into: str | None = None
    model: str | None = None
    strength: float = 1.0
    device: str = "cpu"
    batched: bool | None = None

    def __post_init__(self) -> None:
        for name, column in (("column", self.column), ("into", self.into)):
            if not isinstance(column, str) and not (name == "into" and column is None):
                raise TypeError(f"{name}: {column!r}; accepted: the name of a column")
            if column == "":
                raise ValueError(f"{name}: ''; accepted: the name of a column")
        if self.batched is not None and not isinstance(self.batched, bool):
            raise TypeError(f"batched: {self.batched!r}; accepted: True, False or None")
        sigma: Any = "auto" if self.sigma and self._sigma_is_a_column() else self.sigma
        try:
            check_settings(sigma=sigma, model=self.model, strength=self.strength, device=self.device)
        except (TypeError, ValueError) as error:
            if not str(error).startswith("sigma:"):
                raise
            raise type(error)(f"{error}; or the name of a column") from None

    def __getstate__(self) -> dict[str, Any]:
        """The settings, and what tells one state of the model from another, for the fingerprint of ``datasets``."""
        return {**self.__dict__, _MADE_WITH: (fastden.__version__, self._digests())}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update({name: value for name, value in state.items() if name != _MADE_WITH})

    def _digests(self) -> tuple[str, ...]:
        """Digests of the files that decide the result: of the models that may compute, and of the bundled estimator."""
        if self.model is not None and not isinstance(self.model, str | Path):  # a network: its weights are pickled
            return _digests_of(WITH_ESTIMATOR)
        names = [self.model] if self.model is not None else [default_model("auto"), default_model(0)]
        return tuple(digest for name in names for digest in _digests_of(files_of(name))) + _digests_of(WITH_ESTIMATOR)

    def __call__(self, rows: Mapping[str, Any]) -> dict[str, Any]:
        """Denoise a row, or a batch as ``batched=True`` and ``with_transform`` give it.

        Of a row of ``map`` only the result comes back, to which ``map`` adds the other columns.

        Raises:
            KeyError: there is no such column.
        """
        wanted = {"column": self.column} | ({"sigma": str(self.sigma)} if self._sigma_is_a_column() else {})
        for argument, name in wanted.items():
            if name not in rows:
                raise KeyError(f"{argument}: {name!r}; accepted: {', '.join(map(str, rows))}")
        # map gives rows that decode a column when it is read. A decoded column is encoded again, JPEG with losses, so
        # the columns are read from a copy, and only the result is returned: map adds it to the others. A transform gets
        # decoded rows, and only what it returns is kept.
        lazy = not isinstance(rows, dict)
        source = copy(rows) if lazy else rows
        images = source[self.column]
        sigmas = source[str(self.sigma)] if self._sigma_is_a_column() else self.sigma
        if _is_a_batch(images) if self.batched is None else self.batched:
            each: Any = sigmas if self._sigma_is_a_column() else [sigmas] * len(images)
            result: Any = [self._one(image, sigma) for image, sigma in zip(images, each, strict=True)]
        else:
            result = self._one(images, sigmas)
        return {**({} if lazy else rows), self.into or self.column: result}

    def _sigma_is_a_column(self) -> bool:
        return isinstance(self.sigma, str) and self.sigma != "auto"

    def _one(self, image: Any, sigma: Any) -> Any:
        if image is None:
            return None
        _use_one_thread_in_a_fork()
        return denoise(image, sigma, model=self.model, strength=self.strength, device=self.device)


def _digests_of(folder: Path) -> tuple[str, ...]:
    """SHA-256 of the files of a model's folder; "" for a file that is not there."""
    files = [folder / name for name in (CONFIG_FILE, WEIGHTS_FILE, ESTIMATOR_FILE, RANGES_FILE)]
    return tuple(sha256(file.read_bytes()).hexdigest() if file.is_file() else "" for file in files)


def _is_a_batch(images: Any) -> bool:
    """Whether a column holds several images: a list, or what ``with_format("numpy")`` makes of them.

    Images of one shape come stacked there, those of several shapes as an array of objects.
    """
    if not isinstance(images, np.ndarray):
        return isinstance(images, list)
    return images.dtype == object or images.ndim > 3 or (images.ndim == 3 and images.shape[2] > 4)
