"""The network's weights for a file: batch normalisation folded, chains composed or not, a noise level built in."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fastden.network import folding
from fastden.network.fused import FusedDenoiser, fuse
from fastden.network.model import Denoiser

BOTTLENECKS = ("res1", "res2", "res3")


@dataclass(frozen=True)
class Weights:
    """The convolutions by name, in float64 on the CPU.

    Args:
        pairs: weight and bias by name. Composed: ``stem`` (4, O, C, 7, 7), ``head`` and ``head_image``; plain:
            ``conv0``, ``conv1``, ``up3``, ``out``; in both ``conv2``, ``up2``, ``conv3`` and the three convolutions of
            each bottleneck, ``res1_reduce``, ``res1_conv``, ``res1_expand``.
        composed: which of the two.
        image_channels: of the image, without the noise level.
        takes_level: whether the noise level is the last input channel.
    """

    pairs: dict[str, tuple[Tensor, Tensor]]
    composed: bool
    image_channels: int
    takes_level: bool


@torch.no_grad()
def collect(model: Denoiser | FusedDenoiser, *, composed: bool = True, level: float | None = None) -> Weights:
    """The weights of ``model``.

    Args:
        model: a network; a fused one has no plain form any more.
        composed: conv1 o conv0 and out o cat(conv0, up3) as the single convolutions that they equal.
        level: a noise level on the scale of the image to build in. The level's channel is constant then and meets no
            zero padding, so it becomes part of the biases, exactly, and the network takes the image alone.

    Raises:
        TypeError: ``model`` is no network of fastden.
        ValueError: the plain form of a fused network; a level for a blind one, or outside [0, 1].
    """
    if not isinstance(model, Denoiser | FusedDenoiser):
        raise TypeError(f"model: {type(model).__name__}; accepted: fastden.Denoiser or fastden.FusedDenoiser")
    if isinstance(model, FusedDenoiser) and not composed:
        raise ValueError("composed: False with a FusedDenoiser, which is composed; accepted: a Denoiser, or True")
    if level is not None and not model.noise_level_input:
        raise ValueError("sigma: given for a blind network; accepted: None (or a network with noise_level_input=True)")
    if level is not None and not 0.0 <= level <= 1.0:  # also refuses NaN
        raise ValueError(f"sigma: {255 * level:g}; accepted: 0 to 255")
    fused = fuse(model, torch.float64, "cpu") if isinstance(model, Denoiser) else model
    state = {name: value.detach().cpu().double() for name, value in fused.state_dict().items()}
    names = [
        "conv2",
        "up2",
        "conv3",
        *(f"{block}_{part}" for block in BOTTLENECKS for part in ("reduce", "conv", "expand")),
    ]
    pairs = {name: (state[f"{name}_weight"], state[f"{name}_bias"]) for name in names}
    if composed:
        pairs["stem"] = (state["stem_weight"], state["stem_bias"])
        head = state["head_weight"]
        pairs["head"] = (head, head.new_zeros(len(head)))
        pairs["head_image"] = (state["head_image_weight"], state["head_bias"])
    else:
        assert isinstance(model, Denoiser)
        folded = folding.weights(model)
        pairs |= {name: folded[name] for name in ("conv0", "conv1", "up3", "out")}
    if level is not None:
        for name in ("stem", "head_image") if composed else ("conv0",):
            pairs[name] = _with_level(*pairs[name], level)
    return Weights(pairs, composed, model.image_channels, model.noise_level_input and level is None)


def _with_level(weight: Tensor, bias: Tensor, level: float) -> tuple[Tensor, Tensor]:
    """A convolution whose last input channel is ``level`` everywhere, as one of the other channels."""
    return weight[..., :-1, :, :].contiguous(), bias + level * weight[..., -1, :, :].sum((-2, -1))
