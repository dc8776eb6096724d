"""The network's blocks as modules that any network can use: PyTorch parameters, fastden's fused operators.

    from fastden.nn import Bottleneck, ConcatConvBNReLU, ConvBNReLU, Upsample

Each holds the layers that it fuses as ordinary ``torch.nn`` layers, so that states load into, and from, the unfused
sequence; ``train()``, ``eval()``, autocast and ``torch.compile`` work as for those. Which kernels run is the operators'
choice (:mod:`fastden.ops.backends`).

A block hands its layers' tensors to a fused operator where each layer is what the operator computes. Where one is not,
the block calls its layers one by one, as a plain sequence would: with hooks on a layer (also those of ``weight_norm``,
``spectral_norm``, pruning and FSDP2) or on all modules, with a layer of another class (adapters such as LoRA,
quantisation, ``SyncBatchNorm`` in training), with another ``padding_mode``, dilation or grouping, with a normalisation
that averages cumulatively (``momentum=None``, which ``update_bn`` sets) or has no running statistics, with a module in
the place of the flag ``relu`` (another activation), and under ``torch.fx.symbolic_trace``. Parametrisations
(``torch.nn.utils.parametrize``) need no call: reading the tensor applies them.

Under autocast a block's result has autocast's dtype, and a residual in float32 is rounded to it, whether or not the
layers are called one by one. (In a plain sequence ``y + residual`` would be float32, twice the memory to read.)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from fastden import ops
from fastden.ops.tracing import autocast_enabled
from fastden.plain_layers import has_geometry, has_tensor, is_hooked, is_plain_conv, is_plain_norm, is_untouched

__all__ = ["Bottleneck", "ConcatConvBNReLU", "ConvBNReLU", "Upsample"]

#: PyTorch's own method, as it was at import. Where it is replaced later, the replacement must run.
_TRANSPOSED_FORWARD = nn.ConvTranspose2d.forward


@torch.fx.wrap
def _plus(y: Tensor, residual: Tensor | None) -> Tensor:
    """``y + residual``, one node of a graph: in a block that is traced alone, the residual may be None.

    Under autocast in the dtype of ``y``, as the operators add: a hook on a layer must not change a block's result.
    """
    if residual is None:
        return y
    return y + (residual.to(y.dtype) if autocast_enabled(y.device.type) else residual)


class _SumOfProcesses(torch.autograd.Function):
    """The sum of a tensor over the processes of a group, with its gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.group = group
        total = x.detach().clone(memory_format=torch.contiguous_format)
        torch.distributed.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        # Not the sum alone: it has a gradient of its own, for second derivatives.
        return _SumOfProcesses.apply(grads[0], ctx.group), None


def normalise(bn: nn.Module, x: Tensor) -> Tensor:
    """``bn(x)``. A ``SyncBatchNorm`` that trains on CPUs, which PyTorch refuses, computes the same function.

    Args:
        bn: any module.
        x: (N, C, H, W); N may differ between processes.

    Raises:
        ValueError: all processes together have one value a channel.
    """
    if not isinstance(bn, nn.SyncBatchNorm) or not bn.training or x.device.type != "cpu" or is_hooked(bn):
        return bn(x)
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return bn(x)
    group = bn.process_group or torch.distributed.group.WORLD
    if torch.distributed.get_world_size(group) == 1:
        return bn(x)
    wide = x if x.dtype == torch.float64 else x.float()
    counted = torch.cat([wide.sum((0, 2, 3)), wide.new_tensor([x.shape[0] * x.shape[2] * x.shape[3]])])
    total = _SumOfProcesses.apply(counted, group)
    count = total[-1].detach()
    if count == 1:  # as PyTorch's
        raise ValueError(f"Expected more than 1 value per channel when training, got input size {tuple(x.shape)}")
    mean = total[:-1] / count
    centred = wide - mean[:, None, None]
    variance = _SumOfProcesses.apply(centred.square().sum((0, 2, 3)), group) / count
    if count > 0 and bn.track_running_stats and bn.running_mean is not None and bn.running_var is not None:
        with torch.no_grad():
            assert bn.num_batches_tracked is not None
            bn.num_batches_tracked.add_(1)
            momentum = 1.0 / float(bn.num_batches_tracked) if bn.momentum is None else bn.momentum
            bn.running_mean.lerp_(mean.to(bn.running_mean), momentum)
            bn.running_var.lerp_((variance * (count / (count - 1))).to(bn.running_var), momentum)
    y = centred * torch.rsqrt(variance + bn.eps)[:, None, None]
    if bn.affine:
        y = y * bn.weight[:, None, None] + bn.bias[:, None, None]
    return y.to(x.dtype)


class _ConvBNReLU(nn.Module):
    """A convolution, BN and perhaps ReLU; parameters as of :class:`ConvBNReLU`."""

    relu: bool | nn.Module

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 3,
        stride: int = 1,
        padding: int | None = None,
        bias: bool = True,
        relu: bool = True,
    ) -> None:
        super().__init__()
        padding = kernel_size // 2 if padding is None else padding
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding, bias=bias)
        self.bn = nn.BatchNorm2d(out_channels)
        self.relu = relu

    def _fuses(self, *inputs: Any) -> bool:
        """Whether the operator may stand for the layers' calls."""
        return (
            all(isinstance(x, Tensor) for x in inputs)  # not the stand-ins of torch.fx
            and not _has_any_global_hook()
            and is_plain_conv(self.conv)
            and is_plain_norm(self.bn)
            and isinstance(self.relu, bool)
        )

    def _call_layers(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        y = normalise(self.bn, self.conv(x))
        if residual is not None:
            y = _plus(y, residual)
        if isinstance(self.relu, nn.Module):
            return self.relu(y)
        # Out of place: the result of a layer with backward hooks may not be written to.
        return torch.relu(y) if self.relu else y

    def _settings(self) -> dict[str, Any]:
        return {"bn": ops.BatchNorm.of(self.bn), "relu": self.relu, "padding": int(self.conv.padding[0])}


class ConvBNReLU(_ConvBNReLU):
    """``relu(bn(conv(x)) + residual)``: (N, C, H, W) -> (N, O, H', W').

    Args:
        in_channels, out_channels: C and O.
        kernel_size: side of the square kernel.
        stride: of the convolution.
        padding: zeros on each side; None for ``kernel_size // 2``, which keeps the size at stride 1.
        bias: whether the convolution has one.
        relu: whether the ReLU is applied.
    """

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """``x`` (N, C, H, W) and ``residual``, of the result's shape, or None; autocast rounds it."""
        if not self._fuses(x):
            return self._call_layers(x, residual)
        conv = self.conv
        return ops.conv_bn_relu(x, conv.weight, conv.bias, residual=residual, stride=conv.stride[0], **self._settings())


class ConcatConvBNReLU(_ConvBNReLU):
    """``relu(bn(conv(cat([a, b], 1))))`` without the concatenation: (N, A, H, W), (N, B, H, W) -> (N, O, H', W').

    Args:
        a_channels, b_channels, out_channels: A, B and O.
        kernel_size: side of the square kernel.
        padding: zeros on each side; None for ``kernel_size // 2``.
        bias: whether the convolution has one.
        relu: whether the ReLU is applied.
    """

    def __init__(
        self,
        a_channels: int,
        b_channels: int,
        out_channels: int,
        kernel_size: int = 3,
        padding: int | None = None,
        bias: bool = True,
        relu: bool = True,
    ) -> None:
        super().__init__(a_channels + b_channels, out_channels, kernel_size, 1, padding, bias, relu)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """``a`` (N, A, H, W) and ``b`` (N, B, H, W), in this order of channels."""
        if not self._fuses(a, b) or self.conv.stride[0] != 1:
            return self._call_layers(torch.cat([a, b], 1))
        return ops.concat_conv_bn_relu(a, b, self.conv.weight, self.conv.bias, **self._settings())


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 convolutions, each with BN and none with a bias, around a residual: (N, C, H, W) -> same.

    Args:
        channels: C.
        middle: channels of the 3x3 convolution.
    """

    def __init__(self, channels: int, middle: int) -> None:
        super().__init__()
        self.reduce = nn.Conv2d(channels, middle, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(middle)
        self.conv = nn.Conv2d(middle, middle, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(middle)
        self.expand = nn.Conv2d(middle, channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        """``relu(x + bn3(expand(relu(bn2(conv(relu(bn1(reduce(x)))))))))``."""
        if not self._fuses(x):
            y = torch.relu(normalise(self.bn1, self.reduce(x)))
            y = torch.relu(normalise(self.bn2, self.conv(y)))
            return torch.relu(_plus(normalise(self.bn3, self.expand(y)), x))
        bns = (ops.BatchNorm.of(self.bn1), ops.BatchNorm.of(self.bn2), ops.BatchNorm.of(self.bn3))
        return ops.bottleneck(x, self.reduce.weight, self.conv.weight, self.expand.weight, bns=bns)

    def _fuses(self, x: Any) -> bool:
        """Whether the operator may stand for the layers' calls."""
        convs = ((self.reduce, 1, 0), (self.conv, 3, 1), (self.expand, 1, 0))
        return (
            isinstance(x, Tensor)  # not the stand-ins of torch.fx
            and not _has_any_global_hook()
            and all(is_plain_conv(conv) and has_geometry(conv, kernel, 1, padding) for conv, kernel, padding in convs)
            and not any(has_tensor(conv, "bias") for conv, _, _ in convs)
            and all(is_plain_norm(bn) for bn in (self.bn1, self.bn2, self.bn3))
        )


class Upsample(nn.ConvTranspose2d):
    """Twice the height and width by a transposed convolution (4x4, stride 2): (N, C, H, W) -> (N, O, 2 H, 2 W).

    Args:
        in_channels, out_channels: C and O.
        bias: whether there is one.
    """

    def __init__(self, in_channels: int, out_channels: int, bias: bool = True) -> None:
        super().__init__(in_channels, out_channels, 4, stride=2, padding=1, bias=bias)

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        """``x`` (N, C, H, W)."""
        if not isinstance(x, Tensor) or not self._is_as_built():
            return super().forward(x)
        return ops.upsample(x, self.weight, self.bias)

    def _is_as_built(self) -> bool:
        """Whether this object and PyTorch's class are unchanged, as the operator assumes."""
        built = (4, 4), (2, 2), (1, 1), (0, 0), (1, 1), 1, "zeros"
        return nn.ConvTranspose2d.forward is _TRANSPOSED_FORWARD and built == (
            self.kernel_size, self.stride, self.padding, self.output_padding, self.dilation, self.groups,
            self.padding_mode,
        )  # fmt: skip

    def extra_repr(self) -> str:
        return f"{self.in_channels}, {self.out_channels}, bias={self.bias is not None}"


def is_plain_upsample(layer: nn.Module, *, hooks: bool = False) -> bool:
    """Whether calling ``layer`` is a transposed 4x4 convolution of stride 2, computed of ``weight`` and ``bias``.

    Arguments as of :func:`fastden.plain_layers.is_plain_conv`.
    """
    return is_untouched(layer, Upsample, hooks=hooks) and layer._is_as_built()
