"""The node of ComfyUI, found as ComfyUI finds it: a folder that is imported by its path."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import fastden
from fastden.inference.estimate import median_estimate


@pytest.fixture
def node(root: Path) -> Any:
    folder = root / "examples" / "comfyui"
    spec = importlib.util.spec_from_file_location("custom_nodes_fastden", folder / "__init__.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert set(module.NODE_DISPLAY_NAME_MAPPINGS) == set(module.NODE_CLASS_MAPPINGS)
    return module.NODE_CLASS_MAPPINGS["FastdenDenoise"]


def test_what_the_loader_reads(node: Any) -> None:
    required = node.INPUT_TYPES()["required"]
    assert list(required) == ["image", "model", "sigma", "strength"]
    assert required["image"] == ("IMAGE",)
    assert required["model"][0] == ["auto", *fastden.models()]
    for name in ("sigma", "strength"):
        kind, limits = required[name]
        assert kind == "FLOAT"
        assert limits["min"] <= limits["default"] <= limits["max"]
    assert node.RETURN_TYPES == ("IMAGE",)
    assert callable(getattr(node(), node.FUNCTION))


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_a_batch(node: Any, channels: int) -> None:
    images = torch.rand(2, 20, 31, channels)
    (result,) = node().denoise(images, "color", 25.0, 0.5)
    assert (result.shape, result.dtype) == (images.shape, torch.float32)
    colours = images[..., :3].permute(0, 3, 1, 2)
    wanted = fastden.denoise(colours, 25, strength=0.5).clamp(0, 1).permute(0, 2, 3, 1)
    assert (result[..., :3] - wanted).abs().max() < 1e-5
    assert torch.equal(result[..., 3:], images[..., 3:])


def test_sigma_0_estimates(node: Any) -> None:
    images = (0.5 + 0.1 * torch.randn(1, 40, 40, 3)).clamp(0, 1)
    (result,) = node().denoise(images, "auto", 0.0, 1.0)
    assert (result - 0.5).std() < 0.3 * (images - 0.5).std()


def test_a_batch_has_one_level(node: Any) -> None:
    """Levels that are estimated from each frame would make a video flicker."""
    generator = torch.Generator().manual_seed(0)
    clean = torch.linspace(0.2, 0.8, 64).expand(48, 64)[..., None]
    noise = torch.randn((3, 48, 64, 3), generator=generator) * torch.tensor([0.05, 0.06, 0.15]).view(3, 1, 1, 1)
    frames = (clean + noise).clamp(0, 1)
    estimates = [fastden.estimate_noise(frame.permute(2, 0, 1)) for frame in frames]
    shared = median_estimate(estimates)
    for model in ("auto", "photo"):
        (result,) = node().denoise(frames, model, 0.0, 1.0)
        for frame, cleaned in zip(frames, result, strict=True):
            wanted = fastden.denoise(frame.permute(2, 0, 1), shared, model=None if model == "auto" else model)
            assert (cleaned - wanted.clamp(0, 1).permute(1, 2, 0)).abs().max() < 1e-5
    assert node().denoise(frames[:0], "auto", 0.0, 1.0)[0].shape == (0, 48, 64, 3)
    assert node().denoise(frames, "color-blind", 0.0, 1.0)[0].shape == frames.shape


def test_a_level_for_a_blind_model_is_refused_in_the_terms_of_the_node(node: Any) -> None:
    with pytest.raises(ValueError, match=r"sigma: 25, but the model color-blind takes no noise level; accepted: 0$"):
        node().denoise(torch.rand(1, 20, 20, 3), "color-blind", 25.0, 1.0)


def test_progress_and_the_cancel_button(node: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The two parts of ComfyUI that the node asks for, by the names that ComfyUI has for them."""
    seen = []
    utils, management = ModuleType("comfy.utils"), ModuleType("comfy.model_management")

    class ProgressBar:
        def __init__(self, total: int) -> None:
            self.total = total

        def update_absolute(self, value: int, total: int) -> None:
            assert total == self.total
            seen.append(value)

    cancelled = False

    def check() -> None:
        if cancelled:
            raise RuntimeError("interrupted")

    utils.ProgressBar = ProgressBar  # type: ignore[attr-defined]
    management.throw_exception_if_processing_interrupted = check  # type: ignore[attr-defined]
    management.get_torch_device = lambda: torch.device("cpu")  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "comfy.utils", utils)
    monkeypatch.setitem(sys.modules, "comfy.model_management", management)
    images = torch.rand(2, 16, 16, 3)
    node().denoise(images, "color", 10.0, 1.0)
    assert seen == sorted(seen)
    assert seen[-1] == 200
    # A device that fastden does not know.
    management.get_torch_device = lambda: torch.device("xpu", 0)  # type: ignore[attr-defined]
    assert node().denoise(images, "color", 10.0, 1.0)[0].shape == images.shape
    cancelled = True
    with pytest.raises(RuntimeError, match="interrupted"):
        node().denoise(images, "color", 10.0, 1.0)
