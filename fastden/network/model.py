"""The denoiser of Liu et al., "When Image Denoising Meets High-Level Vision Tasks" (IJCAI 2018), as a module."""

from __future__ import annotations

import copy
from numbers import Integral
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.module import _has_any_global_hook
from torch.nn.utils import parametrize

from fastden import ops
from fastden.algebra import BORDER, compose_head, compose_stem
from fastden.network.hub import PretrainedMixin
from fastden.network.inputs import Sigma, check_input, noise_level, warn_of_scale
from fastden.network.padding import pad_image
from fastden.nn import Bottleneck, ConcatConvBNReLU, ConvBNReLU, Upsample, is_plain_upsample
from fastden.ops.modes import without_autocast
from fastden.ops.tracing import autocast_enabled
from fastden.plain_layers import (
    evaluating,
    has_geometry,
    has_tensor,
    is_parametrised,
    is_plain_conv,
    is_plain_norm,
    is_untouched,
)


def _for_autocast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """``x`` for a network of ``dtype``, in another dtype where autocast is on and could not take its own.

    Raises:
        TypeError: the two dtypes differ, and autocast is off or one of them is float64, which it leaves alone.
    """
    kind, double = x.device.type, torch.float64 in (x.dtype, dtype)
    autocast = autocast_enabled(kind)
    if x.dtype != dtype and (double or not autocast):
        also = "" if double else ", or use autocast"
        raise TypeError(f"x: dtype {x.dtype}; accepted: {dtype}, the network's (convert x or the network{also})")
    if not autocast or double or x.dtype in (torch.float32, torch.get_autocast_dtype(kind)):
        return x
    return x.float()  # autocast's convolutions take the other 16-bit dtype too, its torch.cat does not


#: Weight and bias of a layer.
Pair = tuple[Tensor, Tensor]


def pair_of(layer: nn.Conv2d | nn.ConvTranspose2d) -> Pair:
    """Weight and bias of a layer that has both, each read once: a parametrisation may draw, or cost."""
    weight, bias = layer.weight, layer.bias
    assert bias is not None
    return weight, bias


def composed_stem(conv0: Pair, conv1: ConvBNReLU, x: Tensor) -> Tensor:
    """conv1 o conv0 as one convolution.

    Args:
        conv0: weight and bias of the layer.
        conv1: the layer, with a bias.
        x: (N, C, H, W), the padded input.

    Returns:
        (N, 128, h, w).
    """
    # Autocast would round the factors before they are composed. Composing is cheap, so it runs in their own dtype.
    with without_autocast(x.device):
        stem = compose_stem(*conv0, *pair_of(conv1.conv))
    return ops.stem(x, stem.weight, stem.bias, bn=ops.BatchNorm.of(conv1.bn))


def composed_head(conv0: Pair, up3: Upsample, out: nn.Conv2d, features: Tensor, x: Tensor) -> Tensor:
    """out o cat(conv0, up3), each in one convolution, and the added input.

    Args:
        conv0: weight and bias of the layer.
        up3, out: the layers, with biases.
        features: (N, 256, h, w), the last ones.
        x: (N, C, H, W), the padded input.
    """
    with without_autocast(x.device):  # as in composed_stem
        head = compose_head(*conv0, *pair_of(up3), *pair_of(out))
    return ops.head(features, x, head.weight, head.image_weight, head.bias, composed=True)


def _taken(conv0: nn.Conv2d) -> Tensor | None:
    """A tensor of conv0 that has the device and dtype of the images that it takes; None where that is not known.

    Hooks before a call may convert the image. No parametrisation runs.
    """
    if not is_plain_conv(conv0, hooks=True) or conv0._forward_pre_hooks:
        return None
    if not is_parametrised(conv0):
        return conv0.weight
    return next((own for own in conv0.parameters() if own.is_floating_point()), None)


class Denoiser(nn.Module, PretrainedMixin):
    """Image denoiser: ``model(x, sigma) -> y``, all images RGB, float, in [0, 1].

    The network of Liu et al. (section 3.1) as its authors ran it: 1,033,443 parameters with 3 input channels, a
    receptive field of 39 pixels, 220,544 multiply-accumulates a pixel. It takes any height and width: it pads by
    reflection, and crops the result.

    Args:
        noise_level_input: take the noise level as a fourth input channel (as FFDNet does), so one network serves all
            levels and the user controls the strength. False is the paper's blind network.
        image_channels: channels of the image, 3. A network for 1-channel images can be built and trained with 1; the
            shipped colour networks take gray images through :func:`fastden.denoise`, which repeats the channel.
        composed: run conv1 o conv0 and out o cat(conv0, up3) as the single convolutions that they equal
            (:mod:`fastden.algebra`), in training and evaluation. The function is the same up to rounding, with 36 %
            fewer multiply-accumulates. The parameters stay those of the factors. If a layer is not plain (it has hooks,
            an adapter or another normalisation, see :mod:`fastden.nn`), it is called as without this option. Hooks on
            all modules at once (``torch.nn.modules.module.register_module_forward_hook``) do not reach conv0, conv1,
            up3 and out: these layers are not called, and profilers should see what is computed.
    """

    def __init__(self, noise_level_input: bool = True, image_channels: int = 3, composed: bool = False) -> None:
        super().__init__()
        _check("image_channels", image_channels, (1, 3), "1 or 3")
        _check("noise_level_input", noise_level_input, (False, True), "true or false")
        _check("composed", composed, (False, True), "true or false")
        self.noise_level_input = noise_level_input
        self.image_channels = image_channels
        self.composed = composed
        in_channels = image_channels + int(noise_level_input)
        self.conv0 = nn.Conv2d(in_channels, 64, 5)
        self.conv1 = ConvBNReLU(64, 128, stride=2)
        self.res1 = Bottleneck(128, 32)
        self.conv2 = ConvBNReLU(128, 128, stride=2)
        self.res2 = Bottleneck(128, 32)
        self.up2 = Upsample(128, 32)
        self.conv3 = ConcatConvBNReLU(128, 32, 256)
        self.res3 = Bottleneck(256, 64)
        self.up3 = Upsample(256, 64)
        self.out = nn.Conv2d(128, image_channels, 3)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the first weights, which is that of all unless some were cast."""
        return next(self.parameters()).dtype

    @property
    def device(self) -> torch.device:
        """The device of the first weights."""
        return next(self.parameters()).device

    def forward(self, x: Tensor, sigma: Sigma = None) -> Tensor:
        """Denoise a batch.

        Args:
            x: (N, 3, H, W), a dense tensor of float64, float32, bfloat16 or float16, in [0, 1] (noise may exceed it),
                any H, W >= 1, any memory format.
            sigma: standard deviation of the noise on the scale of ``x`` (25 of 255 is 25 / 255), 0 to 1. It is one
                number; one number for each image, (N,), (N, 1) or (N, 1, 1, 1); a map (N, 1, H, W) or (1, 1, H, W); or
                a curve (N, 8) or (1, 8) over brightness (:mod:`fastden.network.level`). Its type is a number, list,
                array or tensor of Python, NumPy or PyTorch. A network with ``noise_level_input`` needs it; a blind
                network refuses it.

        Returns:
            (N, 3, H, W), not clipped, in the dtype of ``x`` (under autocast: in the dtype of autocast's result).

        Raises:
            ValueError, TypeError: an argument is not accepted. The message names it, and says what is accepted.

        Warns:
            ScaleWarning: once in a process, if values of ``x`` are far above 1, as in a picture on the scale 0-255.
        """
        taken = _taken(self.conv0)
        height, width = check_input(x, self.image_channels, None if taken is None else taken.device)
        x = _for_autocast(x, x.dtype if taken is None else taken.dtype)
        warn_of_scale(x)
        level = noise_level(x, sigma, self.noise_level_input)
        padded = pad_image(x if level is None else torch.cat([x, level], 1))
        y = self.forward_padded(padded)
        # A slice is a view. Its strides would limit an exported graph to sizes that need cropping, or to sizes that do
        # not.
        return F.pad(y, (0, width - y.shape[3], 0, height - y.shape[2]))

    def forward_padded(self, x: Tensor) -> Tensor:
        """Run the network on a padded input: (N, C, H, W) -> (N, 3, H - 6, W - 6), H and W multiples of 4."""
        if self.composed and self._composes():
            return self._forward_composed(x)
        fused = not _has_any_global_hook()
        conv0, out = self.conv0, self.out
        if fused and is_plain_conv(conv0) and has_geometry(conv0, 5, 1, 0):
            first = ops.conv_bn_relu(x, conv0.weight, conv0.bias, relu=False)
        else:
            first = conv0(x)
        upsampled = self.up3(self._trunk(self.conv1(first)))
        if fused and is_plain_conv(out) and has_geometry(out, 3, 1, 0):
            y = ops.concat_conv_bn_relu(first, upsampled, out.weight, out.bias, relu=False, padding=0)
        else:
            y = out(torch.cat([first, upsampled], 1))
        return x[:, : self.image_channels, BORDER:-BORDER, BORDER:-BORDER] + y

    def _composes(self) -> bool:
        """Whether the layers that the composed form never calls are plain, see :mod:`fastden.nn`.

        Global hooks on all modules do not count. Profilers and PyTorch's FLOP counter set them, and must measure the
        form that runs without them.
        """
        conv0, conv1, up3, out = self.conv0, self.conv1, self.up3, self.out
        if not (is_untouched(conv1, ConvBNReLU, hooks=False) and is_plain_norm(conv1.bn) and conv1.relu is True):
            return False
        convs = ((conv0, 5, 1, 0), (conv1.conv, 3, 2, 1), (out, 3, 1, 0))
        plain = all(is_plain_conv(conv) and has_geometry(conv, *geometry) for conv, *geometry in convs)
        layers = (conv0, conv1.conv, up3, out)
        return plain and is_plain_upsample(up3) and all(has_tensor(layer, "bias") for layer in layers)

    def _forward_composed(self, x: Tensor) -> Tensor:
        with without_autocast(x.device):  # as in composed_stem
            conv0 = pair_of(self.conv0)  # read once: stem and head have the same conv0
        features = self._trunk(composed_stem(conv0, self.conv1, x))
        return composed_head(conv0, self.up3, self.out, features, x)

    def _trunk(self, x: Tensor) -> Tensor:
        """Run res1 to res3, at half resolution: (N, 128, h, w) -> (N, 256, h, w)."""
        skip = self.res1(x)
        x = self.res2(self.conv2(skip))
        return self.res3(self.conv3(skip, self.up2(x)))

    def adapt(self, noise_level_input: bool) -> Denoiser:
        """A network with or without noise-level input that starts from this one's weights.

        Without the input, conv0 loses the weights of that channel. With it, conv0 gets zeros there: the function stays
        the same. The result is this very network where nothing changes, else a copy as ``copy.deepcopy`` makes it, with
        the same estimator. Parametrisations of conv0 end in the copy: it holds the tensors that they
        give in evaluation.

        Raises:
            TypeError: conv0 is no ``torch.nn.Conv2d``, or does not hold its weight (pruning, ``weight_norm``).
        """
        if noise_level_input == self.noise_level_input:
            return self
        conv0, own = self.conv0, parametrize.is_parametrized(self.conv0, "weight")
        if not isinstance(conv0, nn.Conv2d) or not (own or "weight" in conv0._parameters):
            raise TypeError(f"conv0: {type(conv0).__name__}; accepted: a torch.nn.Conv2d that holds its weight")
        other = copy.deepcopy(self, {id(self.estimator): self.estimator})
        conv0 = other.conv0
        _end_parametrisations(conv0)
        requires_grad = conv0.weight.requires_grad
        weight = conv0.weight.detach()[:, : self.image_channels]
        weight = torch.cat([weight, torch.zeros_like(weight[:, :1])], 1) if noise_level_input else weight.clone()
        conv0.weight, conv0.in_channels = nn.Parameter(weight, requires_grad), weight.shape[1]
        other.noise_level_input = noise_level_input
        other.int8_ranges = None  # those of other weights
        return other

    def extra_repr(self) -> str:
        return (
            f"noise_level_input={self.noise_level_input}, image_channels={self.image_channels},"
            f" composed={self.composed}"
        )


def _end_parametrisations(layer: nn.Module) -> None:
    """Make parameters of the tensors that parametrisations give.

    PyTorch's ``remove_parametrizations`` changes the class, which a copy shares with its original.
    """
    if not parametrize.is_parametrized(layer):
        return
    parameters = {}
    for name, module in layer.parametrizations.items():  # type: ignore[operator, union-attr]
        trained = any(parameter.requires_grad for parameter in module.parameters())
        with evaluating(layer):  # in training they may draw, or move buffers
            parameters[name] = nn.Parameter(getattr(layer, name).detach().clone(), trained)
    layer.__class__ = parametrize.type_before_parametrizations(layer)
    del layer.parametrizations
    for name, parameter in parameters.items():
        layer.register_parameter(name, parameter)


def _check(name: str, value: Any, values: tuple[int, int], accepted: str) -> None:
    """Raise ValueError unless an argument, which may come from a file, is one of two whole numbers or truth values."""
    kinds = (Integral, np.bool_) if values == (False, True) else Integral
    truth = isinstance(value, bool) and values != (False, True)
    if truth or not isinstance(value, kinds) or value not in values:
        raise ValueError(f"{name}: {value!r}; accepted: {accepted}")
