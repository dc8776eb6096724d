"""fastden's networks for spandrel (https://github.com/chaiNNer-org/spandrel), the loader of chaiNNer and others.

    >>> import fastden.integrations.spandrel
    >>> fastden.integrations.spandrel.install()
    >>> model = spandrel.ModelLoader().load_from_file("model.safetensors")
    >>> clean = model(noisy)  # (1, 3, H, W), [0, 1]

The file's tensors alone tell what the network is.
"""

from __future__ import annotations

from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from fastden.inference.estimate import estimate_noise
from fastden.inference.run import check_sigma
from fastden.integrations._missing import import_failure
from fastden.network.model import Denoiser

try:
    from spandrel import (
        MAIN_REGISTRY,
        Architecture,
        ArchSupport,
        ImageModelDescriptor,
        ModelTiling,
        SizeRequirements,
    )
    from spandrel.util import KeyCondition
except (ModuleNotFoundError, RuntimeError) as error:
    raise import_failure(error, "spandrel") from error

ID = "fastden"


class FastdenArch(Architecture):
    """The architecture: how it is recognised and loaded.

    Args:
        sigma: the noise level for networks that take one, on the scale 0-255; ``"auto"`` estimates it from each
            image (:func:`fastden.estimate_noise`), and programs are advised against tiles.

    Raises:
        TypeError: another type of ``sigma``.
        ValueError: a number outside of 0 to 255, or another text.
    """

    def __init__(self, sigma: float | Literal["auto"] = "auto") -> None:
        check_sigma(sigma, estimates=False)
        self.sigma = sigma
        super().__init__(
            id=ID,
            detect=KeyCondition.has_all(
                "conv0.weight",
                "conv1.conv.weight",
                "conv1.bn.running_mean",
                "res1.reduce.weight",
                "res3.expand.weight",
                "conv3.conv.weight",
                "up2.weight",
                "up3.weight",
                "out.weight",
            ),
        )

    def load(self, state_dict: Any) -> Any:
        """The network of a state dict, with the description that spandrel wants."""
        channels = state_dict["out.weight"].shape[0]
        takes_level = state_dict["conv0.weight"].shape[1] > channels
        return ImageModelDescriptor(
            Denoiser(takes_level, channels, composed=True),
            state_dict,
            architecture=self,
            purpose="Restoration",
            tags=["noise level"] if takes_level else ["blind"],
            # Not measured on a GPU yet.
            supports_half=False,
            supports_bfloat16=False,
            scale=1,
            input_channels=channels,
            output_channels=channels,
            size_requirements=SizeRequirements(),
            # A tile's level would be estimated from the tile alone, and neighbours would differ at the seam.
            tiling=ModelTiling.DISCOURAGED if takes_level and self.sigma == "auto" else ModelTiling.SUPPORTED,
            call_fn=partial(_call, sigma=self.sigma),  # the tiling above is advised for this sigma
        )


def _call(model: Denoiser, image: Tensor, *, sigma: float | Literal["auto"]) -> Tensor:
    if not model.noise_level_input:
        return model(image)
    if sigma != "auto":
        return model(image, sigma / 255)
    pictures = image.detach().cpu().float().permute(0, 2, 3, 1).numpy()
    return model(image, torch.cat([estimate_noise(picture).curve for picture in pictures]))


def install(sigma: float | Literal["auto"] = "auto") -> None:
    """Make spandrel's loaders know fastden's networks.

    A later call sets the ``sigma`` of networks that are loaded after it.

    Args:
        sigma: as of :class:`FastdenArch`.

    Raises:
        TypeError, ValueError: as of :class:`FastdenArch`.
    """
    architecture = FastdenArch(sigma)
    if ID not in MAIN_REGISTRY:
        MAIN_REGISTRY.add(ArchSupport.from_architecture(architecture))
        return
    registered: Any = MAIN_REGISTRY[ID].architecture
    registered.sigma = architecture.sigma
