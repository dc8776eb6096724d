"""A transform for torchvision's pipelines (``torchvision.transforms.v2``), in DataLoader workers too.

>>> from fastden.integrations.transforms import Denoise
>>> transform = v2.Compose([v2.ToImage(), Denoise(sigma=15), v2.RandomCrop(64)])
"""

from __future__ import annotations

from typing import Any

import PIL.Image
import torch
from torch import Tensor

from fastden.api import denoise
from fastden.inference.estimate import NoiseEstimate
from fastden.integrations._frames import level_of_frames
from fastden.integrations._missing import import_failure
from fastden.integrations._settings import check_settings

try:
    from torchvision import tv_tensors
    from torchvision.transforms import v2
except (ModuleNotFoundError, RuntimeError) as error:
    raise import_failure(error, "torchvision") from error


def _is_image(value: Any) -> bool:
    if isinstance(value, tv_tensors.TVTensor):
        return isinstance(value, tv_tensors.Image | tv_tensors.Video)
    return isinstance(value, PIL.Image.Image | Tensor)


class Denoise(v2.Transform):
    """Denoises images and videos of a sample; boxes, masks, labels and all else pass.

    Images are PIL images, ``tv_tensors.Image``, ``tv_tensors.Video`` (frame by frame) or plain tensors, as every
    transform of v2 takes them: gray or RGB, uint8, uint16 or floating in [0, 1]. Kind, size, dtype and device stay.
    Where the level is estimated, all frames of a video get the median of theirs, so that it does not flicker; frames
    that are denoised on a range of their own (:func:`fastden.denoise`) get each its own.

    The network is loaded where it is first needed, in each worker once: the transform itself is small to pickle.

    Args:
        sigma: the noise level on the scale 0-255, a :class:`fastden.NoiseEstimate`, or ``"auto"``, see
            :func:`fastden.denoise`.
        model: a bundled name, a folder, a Hugging Face Hub id, or None, which is :func:`fastden.denoise`'s choice.
        strength: 0 to 2.
        device: where to compute; a CPU by default, because workers that are forked cannot use CUDA.

    Raises:
        TypeError: another type of ``sigma`` or ``model``.
        ValueError: a ``sigma`` or ``strength`` outside of its range; no such model or device.
    """

    def __init__(
        self,
        sigma: float | str | NoiseEstimate = "auto",
        *,
        model: str | None = None,
        strength: float = 1.0,
        device: str = "cpu",
    ) -> None:
        super().__init__()
        check_settings(sigma=sigma, model=model, strength=strength, device=device)
        self.sigma, self.model, self.strength, self.device = sigma, model, strength, device

    _transformed_types = (_is_image,)

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        """Denoise one image or video."""
        options: dict[str, Any] = {"model": self.model, "strength": self.strength, "device": self.device}
        if not isinstance(inpt, Tensor):
            return denoise(inpt, self.sigma, **options)
        plain = inpt.as_subclass(Tensor)
        is_video = isinstance(inpt, tv_tensors.Video)
        # Images and videos may have any dimensions in front.
        batches = plain[None].flatten(0, -5) if is_video else [plain.reshape(-1, *plain.shape[-3:])]
        shared = is_video and isinstance(self.sigma, str)
        levels = [level_of_frames(batch, self.model, self.device) if shared else self.sigma for batch in batches]
        cleaned = [denoise(batch, level, **options) for batch, level in zip(batches, levels, strict=True)]
        result = (cleaned[0] if len(cleaned) == 1 else torch.stack(cleaned)).reshape(plain.shape)
        return tv_tensors.wrap(result, like=inpt) if isinstance(inpt, tv_tensors.TVTensor) else result
