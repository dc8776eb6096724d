"""Small images that a batch denoises together: the same bytes, and where they do not go together."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import fastden
from fastden.batch.computing import Computing
from fastden.batch.grouping import Equality, together
from fastden.batch.plan import Job
from fastden.batch.reading import Reading
from fastden.images.codec import ImageFile, read_image, write_image
from fastden.inference.tiling import least_memory
from tests.image_files import pixels


def test_small_images_go_together(photos: Path, tmp_path: Path, network: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """If the reader is far ahead, all images of one size make one pass, and their files keep their bytes."""
    sizes: list[int] = []
    compute = Computing.compute
    ready = threading.Event()
    monkeypatch.setattr(
        Computing, "compute", lambda self, works, progress: sizes.append(len(works)) or compute(self, works)
    )
    limit = Computing.group_limit
    monkeypatch.setattr(Computing, "group_limit", lambda self, work: ready.wait(30) and limit(self, work))
    read = Reading.read

    def count(self: Any, work: Any) -> None:
        read(self, work)
        if work.job.source.name == "wide.jpg":
            threading.Timer(0.3, ready.set).start()

    monkeypatch.setattr(Reading, "read", count)
    fastden.BatchDenoiser(network, sigma=20).run(photos, tmp_path / "out")
    assert sizes == [4, 1]
    for index in range(4):
        expected = fastden.denoise(photos / f"{index}.png", 20, model=network)
        np.testing.assert_array_equal(read_image(tmp_path / "out" / f"{index}.png").pixels, expected)


def test_bright_values_are_judged_alike_alone_and_in_groups(tmp_path: Path, network: Any) -> None:
    """A value of 2 is noise of an unknown level, but none of sigma 5."""
    folder, generator = tmp_path / "in", np.random.default_rng(0)
    folder.mkdir()
    for name in ("a", "b"):
        bright = (0.5 + 5 / 255 * generator.standard_normal((40, 40, 3))).astype(np.float32)
        bright[20, 20], bright[5:7, 30:32] = 2.0, 1.6
        write_image(folder / f"{name}.tif", ImageFile(bright))
    stages = fastden.BatchDenoiser(network, sigma=5).stages
    works = [stages.reading.look(Job(path, tmp_path / path.name)) for path in sorted(folder.iterdir())]
    for work in works:
        stages.reading.read(work)
    assert not stages.computing.alike(*works)
    assert stages.computing.group_limit(works[0]) == 1
    assert fastden.BatchDenoiser(network, sigma=5).run(folder, tmp_path / "out").failed == []
    for path in sorted(folder.iterdir()):
        expected = fastden.denoise(read_image(path).pixels, 5, model=network)
        np.testing.assert_array_equal(read_image(tmp_path / "out" / path.name).pixels, expected)
        tensor = torch.from_numpy(read_image(path).pixels).permute(2, 0, 1)
        for batch in (tensor, torch.stack([tensor, tensor / 2])):
            other = fastden.denoise(batch, 5, model=network).reshape(-1, 3, 40, 40)[0].permute(1, 2, 0).numpy()
            np.testing.assert_allclose(other, expected, atol=3e-6, rtol=0)


def test_batches_that_change_bits_are_not_used(real: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    images = [pixels(seed=index) for index in range(3)]
    levels = torch.tensor([0.1, 0.2, 0.29])  # a picture with a level above 75 / 255 goes alone
    assert Equality().holds(real, images, levels, 1 << 28)
    exact = fastden.batch.grouping.denoise_batch

    def other_order(images: list[Any], level: Any, network: Any, **options: Any) -> list[Any]:
        results = exact(images, level, network, **options)
        return [result + np.float32(1e-6) * (len(images) > 1) for result in results]

    monkeypatch.setattr("fastden.batch.grouping.denoise_batch", other_order)
    assert not Equality().holds(real, images, levels, 1 << 28)


def test_how_many_go_together(network: Any) -> None:
    assert together(network, 32, 40, 1 << 30) == 16
    assert together(network, 200, 200, 1 << 30) == 2
    assert together(network, 400, 400, 1 << 30) == 1
    assert together(network, 32, 40, 2 * least_memory(network)) == 1
