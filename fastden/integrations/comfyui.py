"""A node for ComfyUI: images in, denoised images out. ComfyUI's loader takes the folder ``examples/comfyui``."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor

from fastden.api import denoise
from fastden.images.samples import MAX_SIGMA
from fastden.integrations._frames import level_of_frames
from fastden.network.hub import models
from fastden.network.loading import load_network

#: The model that fastden chooses.
CHOICE = "auto"


class FastdenDenoise:
    """The node *Denoise (fastden)*, under *image/denoise*."""

    CATEGORY = "image/denoise"
    FUNCTION = "denoise"
    RETURN_TYPES = ("IMAGE",)
    RETURN_NAMES = ("image",)
    DESCRIPTION = (
        "Removes noise from images and keeps their detail. Sigma 0 estimates the noise, one level for a batch."
    )

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """The inputs that ComfyUI shows: the image, and the settings with their limits."""
        names = [CHOICE, *models()]
        sigma = {
            "default": 0.0,
            "min": 0.0,
            "max": MAX_SIGMA,
            "step": 0.5,
            "tooltip": "Noise level, 0-255 scale; 0: auto",
        }
        strength = {"default": 1.0, "min": 0.0, "max": 2.0, "step": 0.05, "tooltip": "0: nothing; above 1: more"}
        return {
            "required": {
                "image": ("IMAGE",),
                "model": (names, {"default": CHOICE}),
                "sigma": ("FLOAT", sigma),
                "strength": ("FLOAT", strength),
            }
        }

    def denoise(self, image: Tensor, model: str, sigma: float, strength: float) -> tuple[Tensor]:
        """Denoise a batch.

        Args:
            image: (N, H, W, 1, 3 or 4), float in [0, 1], as ComfyUI has images; a fourth channel is not touched.
            model: a bundled name, or ``"auto"``: as :func:`fastden.denoise` chooses.
            sigma: on the scale 0-255; 0 estimates it, as the median of the images, so that frames do not flicker.
                (Images that are denoised on a range of their own, see :func:`fastden.denoise`, get each its own.)
            strength: 0 to 2.

        Returns:
            As ``image``, limited to [0, 1].

        Raises:
            ValueError: a ``sigma`` above 0 for a model that takes none; what :func:`fastden.denoise` raises.
        """
        pixels, alpha = image[..., :3], image[..., 3:]
        batch = pixels.permute(0, 3, 1, 2)
        chosen, device = None if model == CHOICE else model, _device()
        if sigma > 0 and chosen is not None and not load_network(chosen, device).noise_level_input:
            raise ValueError(f"sigma: {sigma:g}, but the model {chosen} takes no noise level; accepted: 0")
        asked = sigma if sigma > 0 else level_of_frames(batch, chosen, device)
        cleaned = []
        for index, picture in enumerate(batch):
            report = _Report(index, len(batch))
            cleaned.append(
                denoise(picture, asked, model=chosen, strength=strength, device=device, progress=report).clamp(0, 1)
            )
        result = torch.stack(cleaned).permute(0, 2, 3, 1) if cleaned else pixels
        return (torch.cat([result, alpha], -1),)


class _Report:
    """ComfyUI's progress bar, and its button that cancels; nothing where ComfyUI is not running."""

    def __init__(self, index: int, count: int) -> None:
        self.index, self.count = index, count
        utils = sys.modules.get("comfy.utils")
        self.bar = None if utils is None else utils.ProgressBar(100 * count)

    def __call__(self, done: int, total: int) -> None:
        management = sys.modules.get("comfy.model_management")
        if management is not None:
            management.throw_exception_if_processing_interrupted()
        if self.bar is not None:
            self.bar.update_absolute(100 * self.index + 100 * done // max(total, 1), 100 * self.count)


def _device() -> Any:
    """Where ComfyUI computes, or a CPU where it computes on a device that fastden does not know, such as XPU.

    None leaves the choice to fastden.
    """
    management = sys.modules.get("comfy.model_management")
    if management is None:
        return None
    device = management.get_torch_device()
    return device if torch.device(device).type in ("cpu", "cuda", "mps") else torch.device("cpu")


NODE_CLASS_MAPPINGS = {"FastdenDenoise": FastdenDenoise}
NODE_DISPLAY_NAME_MAPPINGS = {"FastdenDenoise": "Denoise (fastden)"}
