"""Limits of the CUDA C++ kernels, those of ``csrc/fastden.h``, as reasons that name the argument."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fastden.cuda import extension
from fastden.cuda.build import covers, has_wgmma, name_of

#: Whole fragments of the matrix instructions, in channels.
FRAGMENT = 8
MAPS = 16
BLOCK = 32
MIDDLES = (32, 64)
IMAGE_CHANNELS = 4
STEM_OUTPUTS = 128
SMALLEST_CAPABILITY = (8, 0)
#: The kernels keep a bit for each tap of a convolution in 32 bits.
LARGEST_KERNEL = 5
#: Positions of pixels are 32 bits wide.
PIXELS = 2**31
#: The operators that have kernels of their own for Hopper, and the compute capability whose instruction these need.
HOPPER = (("bottleneck", "concat_conv_bn_relu", "concat_conv_fp8"), (9, 0))
#: Of them, those that have no other kernel.
HOPPER_ONLY = ("concat_conv_fp8",)
#: Channels of the sources of concat_conv_fp8, and what its outputs are a multiple of.
FP8_CHANNELS = (128, 32)
FP8_OUTPUTS = 256


def why_not(operator: str, **tensors: Tensor) -> list[str]:
    """Why the kernel of ``operator`` cannot do these inputs; empty where it can."""
    return _why_not_device(operator, next(iter(tensors.values())).device) + LIMITS[operator](**tensors)


def _why_not_device(operator: str, device: torch.device) -> list[str]:
    if device.type != "cuda":
        return []  # another reason already, or the emulated build
    capability = torch.cuda.get_device_capability(device)
    reason = f"compute capability {capability[0]}.{capability[1]}"
    if capability < SMALLEST_CAPABILITY:
        return [f"{reason}; accepted: from 8.0 on"]
    if operator in HOPPER_ONLY and capability != HOPPER[1]:
        return [f"{reason}; accepted: {name_of(HOPPER[1]).removesuffix('a')}"]
    built = extension.load()["architectures"]
    advice = f"run `fastden build` with TORCH_CUDA_ARCH_LIST={name_of(capability)}"
    if not covers(built, capability):
        return [f"{reason}; built for {', '.join(built)}: {advice}"]
    if operator in HOPPER[0] and capability == HOPPER[1] and not has_wgmma(built):
        return [f"{reason}; built without wgmma, for {', '.join(built)}: {advice}"]
    return []


def _channels(name: str, value: int, of: int, most: int | None = None) -> list[str]:
    if value > 0 and value % of == 0 and (most is None or value <= most):
        return []
    return [f"{name}: {value}; accepted: a multiple of {of}" + ("" if most is None else f" up to {most}")]


def _pixels(name: str, x: Tensor, around: int) -> list[str]:
    """Why positions in images with ``around`` more rows and columns each exceed 32 bits; empty where they fit."""
    batch, _, height, width = x.shape
    if (batch * (height + around) + around) * (width + around) < PIXELS:
        return []
    return [f"{name}: {tuple(x.shape)}; accepted: less than 2^31 pixels, {around} rows and columns more each"]


def _convolution(weight: Tensor, x: Tensor | None = None, a: Tensor | None = None, **_: Tensor) -> list[str]:
    # The bindings fill channels up to whole fragments.
    kernel = weight.shape[-1]
    reasons = []
    if kernel > LARGEST_KERNEL:
        reasons.append(f"weight: kernel of {kernel}; accepted: up to {LARGEST_KERNEL}")
    if x is not None:
        return reasons + _pixels("x", x, kernel)
    return reasons + (_pixels("a", a, kernel) if a is not None else [])


def _fp8(a: Tensor, b: Tensor, weight: Tensor, **_: Tensor) -> list[str]:
    channels = (a.shape[1], b.shape[1])
    reasons = [] if channels == FP8_CHANNELS else [f"a's and b's channels: {channels}; accepted: {FP8_CHANNELS}"]
    return reasons + _channels("weight's outputs", weight.shape[0], FP8_OUTPUTS) + _pixels("a", a, 2)


def _upsample(x: Tensor, **_: Tensor) -> list[str]:
    return _pixels("x", x, 2)


def _bottleneck(x: Tensor, reduce: Tensor, **_: Tensor) -> list[str]:
    reasons = _channels("x's channels", x.shape[1], BLOCK) + _pixels("x", x[:1], 0)
    if reduce.shape[0] not in MIDDLES:
        reasons.append(f"reduce's outputs: {reduce.shape[0]}; accepted: {', '.join(map(str, MIDDLES))}")
    return reasons


def _image(x: Tensor) -> list[str]:
    if x.shape[1] <= IMAGE_CHANNELS:
        return []
    return [f"x's channels: {x.shape[1]}; accepted: up to {IMAGE_CHANNELS}"]


def _stem(x: Tensor, weight: Tensor, **_: Tensor) -> list[str]:
    return _image(x) + _channels("weight's outputs", weight.shape[1], FRAGMENT, STEM_OUTPUTS)


def _head(features: Tensor, x: Tensor, **_: Tensor) -> list[str]:
    return _channels("features' channels", features.shape[1], MAPS) + _image(x)


LIMITS: dict[str, Callable[..., list[str]]] = {
    "bottleneck": _bottleneck,
    "concat_conv_bn_relu": _convolution,
    "concat_conv_fp8": _fp8,
    "conv_bn_relu": _convolution,
    "head": _head,
    "stem": _stem,
    "upsample": _upsample,
}
