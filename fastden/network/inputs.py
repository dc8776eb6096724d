"""Check a network's input image, and turn the noise level into a map of the image's size."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from numbers import Real
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fastden.errors import ScaleWarning
from fastden.network.level import KNOTS, level_map
from fastden.ops.modes import runs_as_written, transforming

#: Types that a noise level may have; None for a blind network.
Sigma: TypeAlias = float | Tensor | npt.NDArray[Any] | Sequence[Any] | None

# Tuples: torch.compile cannot follow a union of NumPy's types.
_ARRAYS = (np.ndarray, np.generic)
_LISTS = (list, tuple)

#: Floating dtypes of images and noise levels. PyTorch has others, such as float8, and computes little in them.
FLOATING = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

#: An image with values above this is probably on another scale than [0, 1]. Noisy images stay below it, and so do the
#: images that plug-and-play methods pass to a denoiser.
LARGEST_VALUE = 16.0
#: White points of images with 8, 10, 12, 14 and 16 bits.
WHITES = (255, 1023, 4095, 16383, 65535)
#: Environment variable. The value 0 turns off the check of the scale.
SCALE_ENVIRONMENT = "FASTDEN_SCALE_WARNING"
#: Number of images on a GPU that a process checks: each check waits for the GPU.
LOOKS = 3


def check_input(x: Tensor, channels: int, device: torch.device | None = None) -> tuple[int, int]:
    """Check a network's input, and return its height and width in pixels.

    Args:
        x: the input.
        channels: that the network takes.
        device: of the network's weights; None does not compare it.

    Raises:
        TypeError: ``x`` is not a dense tensor of one of :data:`FLOATING`.
        ValueError: ``x`` is not (N, ``channels``, H, W) with H, W >= 1, or it is on another device.
    """
    if not isinstance(x, Tensor):
        raise TypeError(f"x: {type(x).__name__}; accepted: a torch.Tensor of shape (N, {channels}, H, W)")
    if x.is_nested:
        raise TypeError("x: a nested tensor; accepted: a dense one (torch.stack for images of one size)")
    if x.layout != torch.strided:
        raise TypeError(f"x: layout {x.layout}; accepted: torch.strided (x.to_dense())")
    if x.is_floating_point() and x.dtype not in FLOATING:
        raise TypeError(f"x: dtype {x.dtype}; accepted: float64, float32, bfloat16 or float16 (x.float())")
    if not x.is_floating_point():
        raise TypeError(
            f"x: dtype {x.dtype}; accepted: a floating dtype, values in [0, 1] (divide integers by their maximum)"
        )
    if x.dim() != 4 or x.shape[1] != channels:
        raise ValueError(f"x: shape {tuple(x.shape)}; accepted: (N, {channels}, H, W)")
    height, width = x.shape[2], x.shape[3]
    if height < 1 or width < 1:
        raise ValueError(f"x: shape {tuple(x.shape)}; accepted: height and width of at least 1")
    if device is not None and x.device != device:
        raise ValueError(f"x: on {x.device}; accepted: {device}, where the network is (move one of them with .to())")
    return height, width


def noise_level(x: Tensor, sigma: Sigma, wanted: bool) -> Tensor | None:
    """``sigma`` as a map (N, 1, H, W) in the dtype and on the device of ``x``; None for a blind network.

    A curve (N, 8) or (1, 8) holds levels at eight values of brightness (:mod:`fastden.network.level`).

    Raises:
        TypeError: ``sigma`` does not hold real numbers, or is no dense tensor.
        ValueError: ``sigma`` is missing, or given to a blind network; its shape does not fit; or a value is outside
            [0, 1] (on a GPU the values of a tensor are not checked).
    """
    return as_map(map_or_curve(x, sigma, wanted), x)


def as_map(level: Tensor | None, x: Tensor) -> Tensor | None:
    """What :func:`map_or_curve` returned, as a map (N, 1, H, W) in the dtype of ``x``; None stays None."""
    return level if level is None or level.dim() == 4 else level_map(level, x).to(x.dtype)


def map_or_curve(x: Tensor, sigma: Sigma, wanted: bool) -> Tensor | None:
    """As :func:`noise_level`, but keep a curve: (N, 8) or (1, 8), in its own dtype, on the device of ``x``."""
    if not wanted:
        if sigma is not None:
            raise ValueError(
                "sigma: given to a blind network; accepted: None (or a network with noise_level_input=True)"
            )
        return None
    n, _, height, width = x.shape
    if sigma is None:
        raise ValueError(
            "sigma: None, but this network takes the noise level; accepted: a number, a tensor (N,) or a map"
            " (N, 1, H, W), the noise's standard deviation on the scale of x (25 of 255 is 25 / 255)"
        )
    if isinstance(sigma, Real) and not isinstance(sigma, bool):
        number = float(sigma)
        if not 0.0 <= number <= 1.0:  # also refuses NaN
            raise ValueError(f"sigma: {sigma}; accepted: 0 to 1, on the scale of x (25 of 255 is 25 / 255)")
        return x.new_full((1, 1, 1, 1), number).expand(n, 1, height, width)
    tensor = as_tensor(sigma)
    if tensor.device.type == "meta" and x.device.type != "meta":
        raise TypeError("sigma: a meta tensor, without values; accepted: one with values, or a number")
    if not tensor.is_floating_point():
        tensor = tensor.to(x.dtype)  # PyTorch finds no extremes of uint16
    if runs_as_written(tensor) and tensor.device.type == "cpu" and tensor.numel():
        low, high = (float(bound) for bound in tensor.detach().aminmax())  # on a GPU the check would wait
        if not 0.0 <= low <= high <= 1.0:
            raise ValueError(f"sigma: values from {low} to {high}; accepted: 0 to 1, on the scale of x")
    level = tensor.to(device=x.device, dtype=x.dtype)
    shape = tuple(level.shape)
    if len(shape) == 2 and shape[1] == KNOTS and shape[0] in (1, n):
        return tensor.to(x.device)
    ones = all(size == 1 for size in shape[1:])
    if level.dim() == 0 or (level.dim() <= 4 and ones and shape[0] in (1, n)):
        level = level.reshape(-1, 1, 1, 1)
    elif level.dim() != 4 or shape[1:] != (1, height, width) or shape[0] not in (1, n):
        raise ValueError(
            f"sigma: shape {shape}; accepted for x {tuple(x.shape)}: a number, ({n},), ({n}, 1, 1, 1),"
            f" ({n}, 1, {height}, {width}), or a curve ({n}, {KNOTS})"
        )
    return level.expand(n, 1, height, width)


def as_tensor(sigma: Any) -> Tensor:
    """A tensor of real numbers from a tensor, an array or a list of numbers."""
    accepted = "accepted: a number, a tensor (N,) or a map (N, 1, H, W)"
    if isinstance(sigma, _ARRAYS):
        sigma = _from_numpy(sigma, accepted)
    elif isinstance(sigma, _LISTS):
        try:
            # Tensors in a list are stacked, which keeps their gradients.
            stacked = len(sigma) > 0 and all(isinstance(value, Tensor) for value in sigma)
            sigma = torch.stack(list(sigma)) if stacked else torch.as_tensor(sigma, device="cpu")
        except (TypeError, ValueError, RuntimeError) as error:
            raise TypeError(f"sigma: {type(sigma).__name__} holds values that are not numbers; {accepted}") from error
    if not isinstance(sigma, Tensor):
        raise TypeError(f"sigma: {type(sigma).__name__}; {accepted}")
    if sigma.is_nested or sigma.layout != torch.strided or sigma.is_quantized:
        kind = "nested" if sigma.is_nested else str(sigma.dtype if sigma.is_quantized else sigma.layout)
        raise TypeError(f"sigma: a tensor of another kind ({kind}); accepted: a dense tensor")
    if sigma.is_complex() or sigma.dtype == torch.bool or (sigma.is_floating_point() and sigma.dtype not in FLOATING):
        raise TypeError(f"sigma: dtype {sigma.dtype}; {accepted}")
    return sigma


def _from_numpy(array: Any, accepted: str) -> Tensor:
    if not torch.compiler.is_compiling():
        if isinstance(array, np.ma.MaskedArray):
            raise TypeError("sigma: a masked array; accepted: a plain array (array.filled(value))")
        # A copy: torch takes neither negative strides nor foreign byte orders, and warns about read-only memory.
        array = np.array(array, array.dtype.newbyteorder("="), order="C")
    try:
        return torch.as_tensor(array, device="cpu")
    except TypeError as error:
        raise TypeError(f"sigma: an array of dtype {array.dtype}; {accepted}") from error


class _Scale:
    """State of this process's check of the scale."""

    warned = False
    looks = 0


def warn_of_scale(x: Tensor) -> None:
    """Warn, once in a process, where ``x`` (N, C, H, W) looks like a picture on another scale than [0, 1].

    A picture on the scale 0-255 with a noise level on 0-1 is hardly denoised, and nothing else tells the user. Values
    outside [0, 1] are no error: noise and plug-and-play iterations make them. A filter for
    :class:`fastden.ScaleWarning` turns the warning off. ``FASTDEN_SCALE_WARNING=0`` in the environment turns off the
    check itself.
    """
    if _Scale.warned or transforming() or not runs_as_written(x) or not x.numel():
        return
    if x.device.type != "cpu":
        if _Scale.looks >= LOOKS or x.is_meta or (x.is_cuda and torch.cuda.is_current_stream_capturing()):
            return
        _Scale.looks += 1
    if os.environ.get(SCALE_ENVIRONMENT) == "0":
        return
    # A grid of about 64 x 64 pixels is enough, and its cost does not grow with the image.
    rows, columns = (max(size // 64, 1) for size in x.shape[2:])
    highest = float(x.detach()[:, :, ::rows, ::columns].amax())
    if not highest > LARGEST_VALUE:
        return
    _Scale.warned = True
    # Noise adds to white: values lie above the white point.
    white = next((white for white in WHITES if highest <= 1.5 * white), WHITES[-1])
    warnings.warn(
        f"x: values up to {highest:.4g}; the network takes images on the scale [0, 1] and a noise level on the same"
        f" scale: divide x by its white point ({white} for {white.bit_length()} bits). Shown once in a process; to turn"
        f" it off: warnings.filterwarnings('ignore', category=fastden.ScaleWarning), or {SCALE_ENVIRONMENT}=0",
        ScaleWarning,
        stacklevel=5,  # skips this function, forward, and two calls in torch.nn.Module
    )
