"""fastden's networks through spandrel's loader."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import fastden
from fastden.network.model import Denoiser
from tests.helpers import random_network
from tests.integrations.installed import package

spandrel = package("spandrel", needs_torchvision=True)

from fastden.integrations.spandrel import FastdenArch, install  # noqa: E402


@pytest.fixture(autouse=True, scope="module")
def installed() -> None:
    install()
    install()  # twice does no harm


@pytest.mark.parametrize("name", ["color", "color-blind"])
def test_the_bundled_files(name: str) -> None:
    """The safetensors file alone tells the network; the level is estimated."""
    loaded = spandrel.ModelLoader().load_from_file(fastden.models()[name] / "model.safetensors")
    assert (loaded.architecture.id, loaded.purpose, loaded.scale) == ("fastden", "Restoration", 1)
    image = (0.5 + 0.1 * torch.randn(1, 3, 37, 50)).clamp(0, 1)
    result = loaded(image)
    assert result.shape == image.shape
    wanted = fastden.denoise(image, model=name, dtype="float32").clamp(0, 1)
    assert (result - wanted).abs().max() < 1e-4
    assert (result - 0.5).std() < 0.3 * (image - 0.5).std()


@pytest.mark.parametrize("noise_level_input", [True, False])
@pytest.mark.parametrize("channels", [1, 3])
def test_any_network(tmp_path: Path, noise_level_input: bool, channels: int) -> None:
    model = random_network(noise_level_input, channels)
    save_file({key: value.contiguous() for key, value in model.state_dict().items()}, tmp_path / "a.safetensors")
    loaded = spandrel.ModelLoader().load_from_file(tmp_path / "a.safetensors").model
    assert isinstance(loaded, Denoiser)
    assert (loaded.noise_level_input, loaded.image_channels) == (noise_level_input, channels)


def test_a_fixed_level() -> None:
    registry = spandrel.ArchRegistry()
    registry.add(spandrel.ArchSupport.from_architecture(FastdenArch(sigma=25)))
    loaded = spandrel.ModelLoader(registry=registry).load_from_file(fastden.models()["color"] / "model.safetensors")
    image = torch.rand(1, 3, 20, 20)
    with torch.no_grad():
        wanted = Denoiser.from_pretrained("color")(image, 25 / 255).clamp(0, 1)
    assert (loaded(image) - wanted).abs().max() < 1e-5
    assert FastdenArch(np.float32(25)).sigma == 25
    with pytest.raises(ValueError, match="sigma: 300; accepted: 'auto', or a number from 0 to 255"):
        FastdenArch(sigma=300)
    for wrong in (True, None, [1.0]):
        with pytest.raises(TypeError, match=r"sigma: .*; accepted: 'auto', or a number from 0 to 255"):
            FastdenArch(sigma=wrong)  # type: ignore[arg-type]


def test_a_later_installation_sets_the_level() -> None:
    image, file = torch.rand(1, 3, 20, 20), fastden.models()["color"] / "model.safetensors"
    earlier = spandrel.ModelLoader().load_from_file(file)
    estimated = earlier(image)
    try:
        install(sigma=25)
        later = spandrel.ModelLoader().load_from_file(file)
        with torch.no_grad():
            wanted = Denoiser.from_pretrained("color")(image, 25 / 255).clamp(0, 1)
        assert (later(image) - wanted).abs().max() < 1e-5
        assert later.tiling.name == "SUPPORTED"
        assert torch.equal(earlier(image), estimated)
        with pytest.raises(ValueError, match="sigma: 300"):
            install(sigma=300)
    finally:
        install()
    assert spandrel.MAIN_REGISTRY["fastden"].architecture.sigma == "auto"


@pytest.mark.parametrize(
    ("name", "sigma", "tiling"),
    [("color", "auto", "DISCOURAGED"), ("color", 25, "SUPPORTED"), ("color-blind", "auto", "SUPPORTED")],
)
def test_tiles(name: str, sigma: Any, tiling: str) -> None:
    """A program that cuts a picture into tiles would have the level of each estimated, and show the seams."""
    loaded = FastdenArch(sigma).load(load_file(fastden.models()[name] / "model.safetensors"))
    assert loaded.tiling.name == tiling


def test_others_are_still_told_apart() -> None:
    state = spandrel.MAIN_REGISTRY["DnCNN"].architecture
    assert not FastdenArch().detect({"model.0.weight": torch.zeros(1)})
    assert not state.detect(Denoiser.from_pretrained("color").state_dict())
