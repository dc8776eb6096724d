"""The fused network in 8-bit integers on a CPU: 1.5 (AMX) to 1.8 times (VNNI) as fast as bfloat16.

Weights have one scale for each output channel, and activations have one scale for each channel. The weights on both
sides of an activation absorb its scale; this works because activations are rectified. So the convolutions use only the
scales of their weights. Each weight gets one of the two codes next to it (:mod:`fastden.network.weight_rounding`).
Codes of rectified activations are unsigned and begin at 0. up2's activations have both signs, so 128 is added to their
codes. The codes of the network's input begin where its range begins. Sums are exact integers, so tiles agree with the
whole image in every bit. Only the head's results and the image's own path are floating point. The image itself is added
at its own precision.

:func:`calibrate` measures the ranges of activations once, and rounds the weights. Both are stored beside the weights.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import NamedTuple, TypedDict

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor, nn

from fastden.algebra import phase_weights, unshuffled_weight
from fastden.network import onednn
from fastden.network.model_files import naming_file
from fastden.network.onednn import FoldedWeights, OneDnnNetwork, OneDnnTiledNetwork
from fastden.network.packed import PackedWeights
from fastden.network.tiles import gathered, join_phases
from fastden.ops.activations import fold, zeros_for
from fastden.ops.post_operations import missing_parts
from fastden.whole_files import replacing


class _Float(TypedDict):
    dtype: torch.dtype
    device: str


#: File beside ``model.safetensors`` with the ranges of the network's activations.
RANGES_FILE = "int8.safetensors"
#: Image values that 8 bits hold; noise goes beyond 0 and 1. A step is 1.5 grey levels, so the rounding error is 0.4,
#: less than the noise. Only the features see this error. The correction is added to the unrounded image.
IMAGE_RANGE = (-0.25, 1.25)
#: The same for a model of photographs, which are clipped: 8 bits hold those of files without an error.
CLIPPED_RANGE = (0.0, 1.0)
#: Largest unsigned code of 8 bits.
CODES = 255
#: Code that stands for zero where values have both signs.
MIDDLE = 128
#: Largest code of a weight; the smallest is its negative.
HIGHEST = 127
#: Activations whose ranges are measured, and their number of channels. A bottleneck's input and output share a scale.
ACTIVATIONS = {
    "res1": 128, "res1_reduce": 32, "res1_conv": 32,
    "res2": 128, "res2_reduce": 32, "res2_conv": 32,
    "up2": 32,
    "res3": 256, "res3_reduce": 64, "res3_conv": 64,
}  # fmt: skip
#: Smallest range of a channel. A channel may be zero almost everywhere; this range prevents a division by zero.
LEAST_RANGE = 1e-4
#: Users may have set another default dtype or device.
FLOAT: _Float = {"dtype": torch.float32, "device": "cpu"}

#: What :func:`fastden.calibrate` finds: by activation the range of each channel; the highest ``level``; ``image``, the
#: lowest and highest value; ``share``, what share of the activations' ranges codes hold; ``up.<convolution>`` and
#: ``mean.<convolution>``, see :class:`Rounding`. Earlier files hold the activations and ``level`` alone.
Ranges = dict[str, Tensor]


class Rounding(NamedTuple):
    """How the weights of a convolution are rounded.

    Attributes:
        up: (O, C, k, k), bool, which weights get the code above them; the others get the one below.
        mean: (O,), by how much the sums of rounded weights are too small in the mean, in units of codes.
    """

    up: Tensor
    mean: Tensor

    def as_tensors(self, name: str) -> Ranges:
        """For a file: eight weights a byte."""
        bits = np.packbits(self.up.flatten().numpy())
        return {f"up.{name}": torch.from_numpy(bits), f"mean.{name}": self.mean}

    @classmethod
    def of(cls, ranges: Ranges, name: str, shape: torch.Size) -> Rounding | None:
        """That of a convolution with weights of ``shape``; None where there is none."""
        packed = ranges.get(f"up.{name}")
        if packed is None:
            return None
        bits = np.unpackbits(packed.numpy(), count=shape.numel()).astype(bool)
        return cls(torch.from_numpy(bits).view(shape), ranges[f"mean.{name}"])


def why_not() -> list[str]:
    """Reasons why this machine cannot run the network in 8-bit integers; empty where it can."""
    reasons = list(missing_parts())
    lacking = [
        f"torch.ops.onednn.{name}"
        for name in ("qconv_prepack", "qconv2d_pointwise")
        if not hasattr(torch.ops.onednn, name)
    ]
    if lacking:
        reasons.append(f"this PyTorch lacks {', '.join(lacking)}")
    if not torch.backends.mkldnn.enabled:
        reasons.append("torch.backends.mkldnn.enabled is False")
    if not reasons and saturates():
        reasons.append("sums of 8-bit products saturate on this CPU (VNNI is missing, or switched off for oneDNN)")
    return reasons


@cache
def saturates() -> bool:
    """Whether oneDNN's sums of 8-bit products are wrong on this CPU. The function tries the largest products.

    Without VNNI (AVX-512 VNNI, AVX-VNNI or AMX) two products are added in 16 bits. The processor's flags are not enough
    to know this: ``ONEDNN_MAX_CPU_ISA`` may stop oneDNN from using units that the CPU has.
    """
    channels = 64
    step = torch.full((channels,), 1.0, **FLOAT)
    weight, bias = torch.full((16, channels, 1, 1), 127.0, **FLOAT), torch.zeros(16, **FLOAT)
    layer = QuantizedConvolution(weight, bias, step, None, relu=False)
    codes = torch.full((1, channels, 2, 2), CODES, dtype=torch.uint8, device="cpu")
    codes = codes.contiguous(memory_format=torch.channels_last)
    return bool((layer(codes) != channels * 127.0 * CODES).any())


def fingerprint(model: nn.Module) -> str:
    """A SHA-256 hash (hexadecimal) of all weights of a network; stored ranges name the weights that they belong to."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        if value.is_floating_point():
            digest.update(name.encode())
            digest.update(value.detach().cpu().float().contiguous().numpy().tobytes())
    return digest.hexdigest()


def load_ranges(folder: Path) -> tuple[Ranges, str] | None:
    """Read ranges from a model's folder, and the fingerprint of their weights; None if the folder has no ranges."""
    file = folder / RANGES_FILE
    if not file.is_file():
        return None
    with naming_file(file), safe_open(file, "pt") as opened:
        return {name: opened.get_tensor(name) for name in opened.keys()}, opened.metadata()["weights"]  # noqa: SIM118


def without_rounding(ranges: Ranges) -> Ranges:
    """Ranges for weights that are near to those that were measured: these get the nearest codes."""
    return {name: value for name, value in ranges.items() if not name.startswith(("up.", "mean."))}


def save_ranges(folder: Path, ranges: Ranges, weights: str) -> None:
    """Write ranges and the fingerprint ``weights`` into ``folder``; :func:`load_ranges` reads them."""
    with replacing(folder / RANGES_FILE) as temporary:
        temporary.write_bytes(save(ranges, {"weights": weights}))


class _Observer(OneDnnNetwork):
    """The network in floating point. It records the largest magnitude of each channel of each activation."""

    def __init__(self, weights: FoldedWeights) -> None:
        super().__init__(weights)
        self.ranges: Ranges = {}
        self.level = 0.0

    def _see(self, name: str, x: Tensor) -> Tensor:
        largest = x.abs().amax((0, 2, 3))
        self.ranges[name] = torch.maximum(self.ranges.get(name, torch.zeros_like(largest)), largest)
        return x

    def _block(self, name: str, x: Tensor) -> Tensor:
        block = getattr(self, name)
        reduced = self._see(f"{name}_reduce", block.reduce(self._see(name, x)))
        return self._see(name, block.expand.add_to_(x, self._see(f"{name}_conv", block.conv(reduced))))

    def observe(self, x: Tensor) -> None:
        """Run the network on one padded input (N, C, H, W), and record its magnitudes."""
        folded = fold(x, self.features, self.zero_channels)
        skip = self._block("res1", self._stem(folded, at_top=True))
        low = self._block("res2", self.conv2(skip))
        upsampled = self._see("up2", join_phases(self.up2(low)))
        spans = (0, skip.shape[2]), (0, skip.shape[3])
        self._block("res3", self.conv3(gathered(skip, upsampled, *spans)))
        if x.shape[1] > self.channels:
            self.level = max(self.level, float(x[:, self.channels :].max()))


@torch.no_grad()
def observed_ranges(weights: FoldedWeights, inputs: Iterable[Tensor]) -> Ranges:
    """The ranges of all activations over padded inputs (N, C, H, W): (channels,) each, and ``level``, (1,).

    A range is the largest value, not a quantile. In a trial on training photographs, quantiles of 0.9999 and 0.999 lost
    more at every noise level.
    """
    observer = _Observer(weights)
    for x in inputs:
        observer.observe(x)
    return {**observer.ranges, "level": torch.tensor([observer.level], **FLOAT)}


def below(exact: Tensor) -> Tensor:
    """The code below each weight (O, C, k, k), given in units of codes; the one above it is a code too."""
    # The largest weight is 127 but for the last bits, of which machines may hold different ones.
    return (exact - 1e-6).floor().clamp(-HIGHEST, HIGHEST - 1)


class QuantizedConvolution:
    """A convolution of 8-bit codes, with its bias and, on call, a residual sum and ReLU as post-operations.

    A code ``q`` of channel c stands for ``(q - zero[c]) * step[c]``.

    Args:
        weight, bias: (O, C, k, k) and (O,), floating.
        step: (C,), step of the input's codes.
        out_step: (O,), step of the result's codes; None for float32 results. The result's zero is code 0 with ReLU, and
            code :data:`MIDDLE` without.
        zero: (C,), the input's code of zero. None stands for 0 in all channels; padding needs None.
        stride, padding: as in ``torch.nn.functional.conv2d``.
        relu: whether ReLU follows.

    Attributes:
        zero: (C,), float64, the code of zero of each channel of the input.
    """

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor,
        step: Tensor,
        out_step: Tensor | None,
        *,
        zero: Tensor | None = None,
        stride: int = 1,
        padding: int = 0,
        relu: bool = True,
    ) -> None:
        out = torch.ones_like(bias) if out_step is None else out_step
        self._float = weight, step.double()[:, None, None], out.double()[:, None, None, None]
        self._scale = self._scaled().abs().amax((1, 2, 3)).clamp(min=1e-30) / HIGHEST
        self._offset = bias.double() / out.double()
        if out_step is not None and not relu:
            self._offset += MIDDLE
        self.zero = torch.zeros_like(step, dtype=torch.float64) if zero is None else zero.double()
        self.scale = self._scale.float()
        self.round(None)
        self.zero_points = torch.zeros(len(bias), dtype=torch.int32, device="cpu")
        self.geometry = [stride] * 2, [padding] * 2, [1, 1], 1
        self.dtype = torch.uint8 if out_step is not None else torch.float32
        self.activation = "relu" if relu else "none"

    def _scaled(self) -> Tensor:
        """Weights between the codes of the input and of the result, float64; made anew to save memory."""
        weight, step, out_step = self._float
        return weight.double() * step / out_step

    def exact(self) -> Tensor:
        """(O, C, k, k), float64, the weights in units of their codes."""
        return self._scaled() / self._scale[:, None, None, None]

    def round(self, rounding: Rounding | None) -> None:
        """Set the codes of the weights; None stands for the nearest ones."""
        exact = self.exact()
        codes = exact.round() if rounding is None else below(exact) + rounding.up
        # Use the rounded weights: then this removes exactly what the products with the code of zero add.
        sums = -torch.einsum("ocij,c->o", codes, self.zero)
        if rounding is not None:
            sums = sums + rounding.mean
        self.weight = codes.to(torch.int8)
        self.bias = (self._offset + self._scale * sums).float()
        self._packed = PackedWeights()

    def _pack(self, shape: tuple[int, ...]) -> Tensor:
        packed = self._packed.get(shape)
        if packed is None:
            packed = torch.ops.onednn.qconv_prepack(self.weight, self.scale, 1.0, 0, *self.geometry, list(shape))
            packed = self._packed.add(shape, packed)
        return packed

    def __call__(self, x: Tensor) -> Tensor:
        """(N, C, H, W) channels-last codes -> (N, O, H', W') channels-last codes, or float32."""
        return torch.ops.onednn.qconv2d_pointwise(
            x, 1.0, 0, self._pack(x.shape), self.scale, self.zero_points, self.bias, *self.geometry,
            1.0, 0, self.dtype, self.activation, [], "",
        )  # fmt: skip

    def add_to_(self, y: Tensor, x: Tensor) -> Tensor:
        """``y <- relu(y + conv(x))`` in place; the codes of ``y`` have the step of the result."""
        return torch.ops.onednn.qconv2d_pointwise.binary(
            x, 1.0, 0, self._pack(x.shape), self.scale, self.zero_points, y, self.bias, *self.geometry,
            1.0, 0, self.dtype, 1.0, 0, "sum", 1.0, "relu", [], "",
        )  # fmt: skip


class _QuantizedBottleneck:
    """Three convolutions with BN folded. ``step`` is the step of input and result, ``inner`` the steps between."""

    def __init__(self, pairs: tuple[tuple[Tensor, Tensor], ...], step: Tensor, inner: tuple[Tensor, Tensor]) -> None:
        reduce, conv, expand = pairs
        self.reduce = QuantizedConvolution(*reduce, step, inner[0])
        self.conv = QuantizedConvolution(*conv, inner[0], inner[1], padding=1)
        self.expand = QuantizedConvolution(*expand, inner[1], step)

    def __call__(self, x: Tensor) -> Tensor:
        return self.expand.add_to_(x, self.conv(self.reduce(x)))


class Int8Network(OneDnnTiledNetwork):
    """The fused network in 8-bit integers, without gradients.

    Args:
        weights: floating, on the CPU.
        ranges: result of :func:`observed_ranges`.
    """

    features = torch.uint8
    outside = MIDDLE

    def __init__(self, weights: FoldedWeights, ranges: Ranges) -> None:
        head = weights.head
        self.channels = head.image_weight.shape[0]
        colours = weights.stem.weight.shape[2]
        bounds = ranges["image"].tolist() if "image" in ranges else IMAGE_RANGE
        lows, highs = ([bound] * self.channels for bound in bounds)
        if colours > self.channels:
            lows, highs = [*lows, 0.0], [*highs, float(ranges["level"])]
        low, high = torch.tensor(lows, **FLOAT), torch.tensor(highs, **FLOAT)
        self.input_step = (high - low).clamp(min=LEAST_RANGE) / CODES
        self.input_zero = (-low / self.input_step).round()
        share = float(ranges.get("share", 1.0))
        step = {name: (share * ranges[name]).clamp(min=LEAST_RANGE) / CODES for name in ACTIVATIONS}
        # MIDDLE - 1 steps on each side of the middle, so that both ends of the range have a code.
        step["up2"] = step["up2"] * (CODES / (MIDDLE - 1))
        zero = torch.cat([torch.zeros_like(step["res1"]), torch.full_like(step["up2"], MIDDLE)])

        def block(name: str) -> _QuantizedBottleneck:
            return _QuantizedBottleneck(
                getattr(weights, name), step[name], (step[f"{name}_reduce"], step[f"{name}_conv"])
            )

        input_step, input_zero = self.input_step.repeat_interleave(4), self.input_zero.repeat_interleave(4)
        self.stem, self._left, self._top = (
            QuantizedConvolution(
                unshuffled_weight(w, 4, 0),
                b,
                input_step,
                step["res1"].repeat(len(b) // len(step["res1"])),
                zero=input_zero,
            )
            for w, b in onednn.stem_parts(weights.stem)
        )
        self.res1 = block("res1")
        self.conv2 = QuantizedConvolution(*weights.conv2, step["res1"], step["res2"], stride=2, padding=1)
        self.res2 = block("res2")
        phases = torch.cat(phase_weights(weights.up2[0]))
        up2_step = step["up2"].repeat(4)
        self.up2 = QuantizedConvolution(phases, weights.up2[1].repeat(4), step["res2"], up2_step, padding=1, relu=False)
        both = torch.cat([step["res1"], step["up2"]])
        self.conv3 = QuantizedConvolution(*weights.conv3, both, step["res3"], zero=zero)
        self.res3 = block("res3")
        bias = head.bias.repeat_interleave(4)
        self.head = QuantizedConvolution(head.weight, bias, step["res3"], None, padding=1, relu=False)
        self.image_dtype = torch.bfloat16 if onednn.native_bf16() else torch.float32
        self.zero_channels = zeros_for(self.image_dtype, colours)
        image_weight = head.image_weight.to(self.image_dtype)
        self.image = onednn.image_convolution(head._replace(image_weight=image_weight), self.zero_channels)
        for name, convolution in self.convolutions().items():
            rounding = Rounding.of(ranges, name, convolution.weight.shape)
            if rounding is not None:
                convolution.round(rounding)

    def convolutions(self) -> dict[str, QuantizedConvolution]:
        """All convolutions of codes but those of the image's left and top edges, in the order of their calls."""
        convolutions: dict[str, QuantizedConvolution] = {}
        for name in ("stem", "res1", "conv2", "res2", "up2", "conv3", "res3", "head"):
            part = getattr(self, name)
            inner = ("reduce", "conv", "expand") if isinstance(part, _QuantizedBottleneck) else ()
            convolutions |= {f"{name}.{one}": getattr(part, one) for one in inner} or {name: part}
        return convolutions

    def left(self, folded: Tensor) -> Tensor:
        """The left column of the first features."""
        # Five columns are computed, because a result of one column may be wrong: see fastden.ops.stem.
        return self._left(folded[..., :5].contiguous(memory_format=torch.channels_last))[..., :1]

    def top(self, folded: Tensor) -> Tensor:
        """The top row of the first features, and the corner."""
        return self._top(folded[:, :, :4])

    def _inputs(self, x: Tensor) -> tuple[Tensor, Tensor]:
        image = self.image(fold(x, self.image_dtype, self.zero_channels)).float()
        scale, shift = (1 / self.input_step)[:, None, None], (self.input_zero + 0.5)[:, None, None]
        codes = torch.addcmul(shift, x.float(), scale).clamp_(0, CODES).to(torch.uint8)
        return fold(codes, torch.uint8, outside=self.input_zero), image
