"""A network's ranges of activations together with the weights that they belong to, for ``quality="fast"``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from weakref import ref

import torch
from torch import Tensor

from fastden.network import int8, onednn
from fastden.network.model import Denoiser

#: Relative change of a weight by casts to bfloat16 and back, with room: such weights keep their ranges.
CAST = 0.01


def calibrated_ranges(model: Denoiser) -> int8.Ranges:
    """The ranges of a network's activations.

    Raises:
        ValueError: the model has no ranges, or its weights changed after the ranges were measured.
    """
    wanted = "accepted: a bundled model, or one behind fastden.calibrate()"
    if model.int8_ranges is None:
        raise ValueError(f"quality: 'fast', but this model does not know the ranges of its activations; {wanted}")
    ranges, weights = model.int8_ranges
    if weights != int8.fingerprint(model):
        raise ValueError(
            "quality: 'fast', but the weights have changed since their ranges were measured, or were cast (give dtype"
            f" to fuse() instead); {wanted}"
        )
    return ranges


class Calibrated:
    """The ranges of a fused network's activations, and a copy of the weights with which they were measured.

    Weights are given by name, those of :class:`fastden.network.fused.FusedDenoiser`. They may have been cast.

    Args:
        ranges: of the activations.
        weights: with which they were measured.
    """

    def __init__(self, ranges: int8.Ranges, weights: Mapping[str, Tensor]) -> None:
        self.ranges = ranges
        # On the CPU, and no buffers: they follow no cast.
        self.measured = {name: weight.detach().cpu().float().clone() for name, weight in weights.items()}
        # The weights when they were checked last, with their versions.
        self._seen: list[tuple[ref[Tensor], int]] = []

    def check(self, weights: Mapping[str, Tensor]) -> None:
        """Raise ValueError for other weights than the measured ones. A cast changes no range."""
        # Weights on meta have no values. Those that hold a NaN keep it: they never run in integers.
        if any(weight.is_meta or not bool(weight.isfinite().all()) for weight in weights.values()):
            return
        for name, measured in self.measured.items():
            if name.startswith("head"):  # behind all activations with ranges
                continue
            now = weights[name].detach().cpu().float()
            if now.shape != measured.shape or not torch.allclose(now, measured, rtol=CAST, atol=1e-6):
                raise ValueError(
                    f"quality: 'fast', but {name} has changed since the ranges of activations were measured; accepted:"
                    ' fuse(model, quality="fast") of the new model, behind fastden.calibrate'
                )

    def check_changes(self, weights: Mapping[str, Tensor]) -> None:
        """:meth:`check`, which reads all weights, where one is another tensor or its version counter shows a change.

        Weights of inference mode have no counter, and are read at each call.
        """
        # Tensors, not addresses: memory that was freed is given to others.
        known = len(self._seen) == len(weights) and all(
            seen() is weight and not weight.is_inference() and weight._version == version
            for weight, (seen, version) in zip(weights.values(), self._seen, strict=True)
        )
        if not known:
            self.check(weights)
            self._seen = [(ref(one), 0 if one.is_inference() else one._version) for one in weights.values()]

    def quantized(self, weights: Mapping[str, Tensor]) -> int8.Int8Network:
        """The network in 8-bit integers, of finite weights on the CPU; raises as :meth:`check`."""
        self.check(weights)
        exact = {name: weight for name, weight in self.measured.items() if name.endswith("_weight")}
        if all(torch.equal(weight.to(weights[name]), weights[name]) for name, weight in exact.items()):
            # A cast moves a weight by up to a quarter of a code. Those that were measured have the codes that fit them.
            return int8.Int8Network(onednn.FoldedWeights.of({**weights, **exact}), self.ranges)
        return int8.Int8Network(onednn.FoldedWeights.of(weights), int8.without_rounding(self.ranges))

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_seen": []}  # pickle and deepcopy cannot read references
