"""The inference form of the network: batch normalisation folded, linear chains composed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastden import ops
from fastden.algebra import HeadWeights, StemWeights, compose_head, compose_stem, fold_batch_norm
from fastden.network import onednn
from fastden.network.inputs import check_input, noise_level
from fastden.network.model import Denoiser
from fastden.network.padding import pad_image
from fastden.ops.backends import requested

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@torch.inference_mode(mode=False)  # tensors made in inference mode would not count their versions
def fuse(model: Denoiser, dtype: torch.dtype | None = None, device: torch.device | str | None = None) -> FusedDenoiser:
    """The inference form of ``model``: the same function, faster.

    BN (running statistics) is folded, conv1 o conv0 and out o cat(conv0, up3) are composed, all in float64, then cast.
    The result shares nothing with ``model``.

    Args:
        model: a :class:`fastden.Denoiser`.
        dtype: of weights and activations: torch.float64, float32, bfloat16 or float16; None keeps the model's.
        device: None keeps the model's.

    Raises:
        TypeError: ``model`` is no Denoiser.
        ValueError: another dtype.
    """
    if not isinstance(model, Denoiser):
        raise TypeError(f"model: {type(model).__name__}; accepted: fastden.Denoiser")
    dtype = model.conv0.weight.dtype if dtype is None else dtype
    if dtype not in DTYPES:
        raise ValueError(f"dtype: {dtype}; accepted: {', '.join(map(str, DTYPES))}")
    return FusedDenoiser(model).to(dtype=dtype, device=model.conv0.weight.device if device is None else device).eval()


def _folded(conv: nn.Conv2d, bn: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """Weight and bias of ``conv`` with ``bn`` folded, float64."""
    assert bn.running_mean is not None
    assert bn.running_var is not None
    bias = None if conv.bias is None else _exact(conv.bias)
    statistics = (_exact(bn.running_mean), _exact(bn.running_var))
    return fold_batch_norm(_exact(conv.weight), bias, _exact(bn.weight), _exact(bn.bias), *statistics, bn.eps)


def _exact(tensor: Tensor) -> Tensor:
    """In float64, on the CPU: not every device has it."""
    return tensor.detach().cpu().double()


class FusedDenoiser(nn.Module):
    """What :func:`fuse` returns: called like :class:`fastden.Denoiser`, for inference only.

    Weights are buffers named as the network's parts. Biases stay in float32 beside weights in half precision: kernels
    add them to float32 sums. On a CPU in float32 and bfloat16, where no gradient is asked for, it runs on oneDNN
    (:mod:`fastden.network.onednn`); elsewhere on :mod:`fastden.ops`.

    Args:
        model: the network to fuse.
    """

    stem_weight: Tensor
    stem_bias: Tensor
    head_weight: Tensor
    head_image_weight: Tensor
    head_bias: Tensor

    @torch.no_grad()
    def __init__(self, model: Denoiser) -> None:
        super().__init__()
        self.noise_level_input = model.noise_level_input
        self.image_channels = model.image_channels
        conv0 = (_exact(model.conv0.weight), _bias(model.conv0))
        stem = compose_stem(*conv0, *_folded(model.conv1.conv, model.conv1.bn))
        head = compose_head(
            *conv0, _exact(model.up3.weight), _bias(model.up3), _exact(model.out.weight), _bias(model.out)
        )
        pairs = {
            "stem": (stem.weight, stem.bias),
            "conv2": _folded(model.conv2.conv, model.conv2.bn),
            "up2": (_exact(model.up2.weight), _bias(model.up2)),
            "conv3": _folded(model.conv3.conv, model.conv3.bn),
            "head": (head.weight, head.bias),
        }
        for name, block in (("res1", model.res1), ("res2", model.res2), ("res3", model.res3)):
            pairs[f"{name}_reduce"] = _folded(block.reduce, block.bn1)
            pairs[f"{name}_conv"] = _folded(block.conv, block.bn2)
            pairs[f"{name}_expand"] = _folded(block.expand, block.bn3)
        for name, (weight, bias) in pairs.items():
            # Convolutions' weights in the order in which kernels read them, lest each call copies them.
            order = torch.channels_last if weight.dim() == 4 else torch.contiguous_format
            self.register_buffer(f"{name}_weight", weight.clone(memory_format=order))
            self.register_buffer(f"{name}_bias", bias.clone())
        self.register_buffer("head_image_weight", head.image_weight.clone())
        self._onednn: tuple[Any, onednn.OneDnnNetwork] | None = None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FusedDenoiser:
        before = {name: buffer for name, buffer in self.named_buffers() if name.endswith("_bias")}
        super()._apply(fn, recurse)
        for name, exact in before.items():
            cast = getattr(self, name)
            if cast.dtype in (torch.float16, torch.bfloat16):
                setattr(self, name, exact.to(device=cast.device, dtype=torch.float32))
        return self

    @property
    def dtype(self) -> torch.dtype:
        """Of weights and activations."""
        return self.head_weight.dtype

    @property
    def device(self) -> torch.device:
        return self.head_weight.device

    def forward(self, x: Tensor, sigma: float | Tensor | None = None) -> Tensor:
        """Denoise a batch; arguments, result and errors as :meth:`fastden.Denoiser.forward`.

        ``x`` may have any floating dtype: activations are computed in this module's dtype, and the network's
        correction, which is small, is added to ``x`` at the precision of ``x``, which is that of the result.
        """
        height, width = check_input(x, self.image_channels)
        level = noise_level(x, sigma, self.noise_level_input)
        padded = pad_image(x if level is None else torch.cat([x, level], 1))
        y = self.forward_padded(padded)
        if torch.compiler.is_compiling():
            # The strides of a view would tie an exported graph to sizes that need cropping, or do not.
            return F.pad(y, (0, width - y.shape[3], 0, height - y.shape[2]))
        return y[:, :, :height, :width]

    def forward_padded(self, x: Tensor) -> Tensor:
        """The network on a padded input: (N, C, H, W) -> (N, 3, H - 6, W - 6), H and W multiples of 4."""
        wants_gradient = torch.is_grad_enabled() and x.requires_grad
        if not torch.compiler.is_compiling() and not wants_gradient and requested() in (None, "torch"):
            network = self._onednn_network()
            if network is not None and x.shape[0] > 0:
                return network(x)
        y = x.to(self.dtype)
        skip = self._bottleneck("res1", ops.stem(y, self.stem_weight, self.stem_bias))
        low = self._bottleneck("res2", ops.conv_bn_relu(skip, *self._pair("conv2"), stride=2, padding=1))
        up = ops.upsample(low, *self._pair("up2"))
        features = self._bottleneck("res3", ops.concat_conv_bn_relu(skip, up, *self._pair("conv3")))
        weights = HeadWeights(self.head_weight, self.head_image_weight, self.head_bias)
        return ops.head(features, y, *weights, image=x, composed=True)

    def _pair(self, name: str) -> tuple[Tensor, Tensor]:
        return getattr(self, f"{name}_weight"), getattr(self, f"{name}_bias")

    def _triple(self, name: str) -> tuple[tuple[Tensor, Tensor], ...]:
        return self._pair(f"{name}_reduce"), self._pair(f"{name}_conv"), self._pair(f"{name}_expand")

    def _bottleneck(self, name: str, x: Tensor) -> Tensor:
        (reduce, a), (conv, b), (expand, c) = self._triple(name)
        return ops.bottleneck(x, reduce, conv, expand, biases=(a, b, c))

    def _onednn_network(self) -> onednn.OneDnnNetwork | None:
        """The packed form of the present weights; None where it cannot run."""
        if onednn.why_not(self.device, self.dtype):
            return None
        # Loading a state or casting gives buffers new storage or a new version: pack again then.
        key = tuple((buffer.data_ptr(), -1 if buffer.is_inference() else buffer._version) for buffer in self.buffers())
        if self._onednn is None or self._onednn[0] != key:
            weights = onednn.FoldedWeights(
                stem=StemWeights(self.stem_weight, self.stem_bias),
                res1=self._triple("res1"),
                conv2=self._pair("conv2"),
                res2=self._triple("res2"),
                up2=self._pair("up2"),
                conv3=self._pair("conv3"),
                res3=self._triple("res3"),
                head=HeadWeights(self.head_weight, self.head_image_weight, self.head_bias),
            )
            self._onednn = (key, onednn.OneDnnNetwork(weights))
        return self._onednn[1]

    def __getstate__(self) -> dict[str, Any]:
        # Packed weights are opaque to pickle and deepcopy, and are made again on first use.
        return {**self.__dict__, "_onednn": None}

    def extra_repr(self) -> str:
        return f"noise_level_input={self.noise_level_input}, image_channels={self.image_channels}, dtype={self.dtype}"


def _bias(conv: nn.Conv2d | nn.ConvTranspose2d) -> Tensor:
    assert conv.bias is not None
    return _exact(conv.bias)
