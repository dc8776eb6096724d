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
from numbers import Real
from typing import Any

import numpy as np
import torch

from fastden.api import denoise
from fastden.inference.arguments import check_strength
from fastden.inference.estimate import NoiseEstimate


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

    The network is loaded where it is first needed, in each process once. A process that was forked, as those of
    ``num_proc`` are on Linux, computes on one thread (``torch.set_num_threads``): in a fork of a process that has
    computed on several, PyTorch hangs. The settings alone make the fingerprint by
    which ``datasets`` finds results of an earlier run.

    Args:
        column: of images: whatever :func:`fastden.denoise` takes, such as the PIL images that ``datasets.Image`` makes.
        sigma: the noise level on the scale 0-255, ``"auto"``, the name of a column that holds it, or a
            :class:`fastden.NoiseEstimate`.
        into: the column for the results; None replaces the images.
        model, strength, device: as of :func:`fastden.denoise`. A CPU by default, because processes that are forked
            cannot use CUDA.

    Raises:
        TypeError, ValueError: a column's name is no text or is empty, ``sigma`` is none of these, or ``strength`` is
            outside 0 to 2.
    """

    column: str = "image"
    sigma: float | str | NoiseEstimate = "auto"
    into: str | None = None
    model: str | None = None
    strength: float = 1.0
    device: str = "cpu"

    def __post_init__(self) -> None:
        check_strength(self.strength)
        for name, column in (("column", self.column), ("into", self.into)):
            if not isinstance(column, str) and not (name == "into" and column is None):
                raise TypeError(f"{name}: {column!r}; accepted: the name of a column")
            if column == "":
                raise ValueError(f"{name}: ''; accepted: the name of a column")
        sigma: Any = self.sigma
        accepted = "accepted: 'auto', the name of a column, a number from 0 to 255, or a NoiseEstimate"
        if isinstance(sigma, bool) or not isinstance(sigma, str | Real | NoiseEstimate):
            raise TypeError(f"sigma: {sigma!r}; {accepted}")
        if sigma == "" or (isinstance(sigma, Real) and not 0 <= float(sigma) <= 255):  # refuses NaN too
            raise ValueError(f"sigma: {sigma!r}; {accepted}")

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
        # Rows of map decode a column when it is read, and what is decoded is encoded again, JPEG with losses. So they
        # are read through a copy, and only the result goes back; map adds it to the other columns. A transform's rows
        # are decoded, and what it returns is all that there is.
        lazy = not isinstance(rows, dict)
        source = copy(rows) if lazy else rows
        images = source[self.column]
        sigmas = source[str(self.sigma)] if self._sigma_is_a_column() else self.sigma
        if _is_a_batch(images):
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


def _is_a_batch(images: Any) -> bool:
    """Whether a column holds several images: a list, or what ``with_format("numpy")`` makes of them.

    Images of one shape come stacked there, those of several shapes as an array of objects.
    """
    if not isinstance(images, np.ndarray):
        return isinstance(images, list)
    return images.dtype == object or images.ndim > 3 or (images.ndim == 3 and images.shape[2] > 4)
