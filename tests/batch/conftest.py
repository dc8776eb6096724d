"""A small network and folders of small images."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import fastden
from tests.helpers import random_network
from tests.image_files import encoded, exif, pixels


def outputs(folder: Path) -> dict[str, bytes]:
    """Name and bytes of each result in a folder."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if not path.name.startswith(".")}


class Blend(fastden.FusedDenoiser):
    """Stands for a network where the arithmetic does not matter: each pixel blended with neighbours and sigma."""

    def forward_padded(self, x: Tensor) -> Tensor:
        image, level = x[:, :3], x[:, 3:, 3:-3, 3:-3]
        return (2 * image[:, :, 3:-3, 3:-3] + image[:, :, :-6, 3:-3] + image[:, :, 6:, :-6]) / 4 + level / 8


class Greedy(Blend):
    """Runs out of memory on tiles above a size, as a device does."""

    #: Pixels of the largest tile that fits, padding included.
    largest = 100 * 100

    def forward_padded(self, x: Tensor) -> Tensor:
        if x.shape[2] * x.shape[3] > self.largest:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")
        return super().forward_padded(x)


@pytest.fixture(scope="session")
def network() -> fastden.FusedDenoiser:
    return Blend(fastden.Denoiser().eval()).float().eval()


@pytest.fixture(scope="session")
def real() -> fastden.FusedDenoiser:
    return fastden.fuse(random_network())


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Five images, four of them of one size."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for index in range(4):
        (folder / f"{index}.png").write_bytes(encoded(pixels(seed=index), "PNG"))
    (folder / "wide.jpg").write_bytes(encoded(pixels(24, 61, seed=9), "JPEG"))
    return folder


@pytest.fixture
def nested(tmp_path: Path) -> Path:
    """Three images of three formats, one of them in a folder below; one is turned, one has 16 bits."""
    folder = tmp_path / "photos"
    (folder / "inner").mkdir(parents=True)
    (folder / "a.png").write_bytes(encoded(pixels(seed=1), "PNG"))
    (folder / "b.jpg").write_bytes(encoded(pixels(seed=2), "JPEG", exif=exif(6)))
    (folder / "inner" / "c.tif").write_bytes(encoded(pixels(dtype=np.uint16, channels=0, seed=3), "TIFF"))
    return folder


@pytest.fixture
def memory() -> Iterator[Any]:
    """A file system behind URLs, in this process alone."""
    system = pytest.importorskip("fsspec").filesystem("memory")
    yield system
    system.store.clear()
    system.pseudo_dirs[:] = [""]
