"""The network's blocks as modules that any network can use: PyTorch parameters, fastden's fused operators.

    from fastden.nn import Bottleneck, ConcatConvBNReLU, ConvBNReLU, Upsample

Each holds the layers that it fuses as ordinary ``torch.nn`` layers, so that states load into, and from, the unfused
sequence; ``train()``, ``eval()``, autocast and ``torch.compile`` work as for those. Which kernels run is the operators'
choice (:mod:`fastden.ops.backends`). A layer that another module wraps or replaces inside a block (pruning hooks,
spectral normalisation by forward hooks) is not called: the block reads its tensors.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from fastden import ops

__all__ = ["Bottleneck", "ConcatConvBNReLU", "ConvBNReLU", "Upsample"]


class _ConvBNReLU(nn.Module):
    """A convolution, BN and perhaps ReLU; parameters as of :class:`ConvBNReLU`."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        stride: int,
        padding: int | None,
        bias: bool,
        relu: bool,
    ) -> None:
        super().__init__()
        padding = kernel_size // 2 if padding is None else padding
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding, bias=bias)
        self.bn = nn.BatchNorm2d(out_channels)
        self.relu = relu

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
        super().__init__(in_channels, out_channels, kernel_size, stride, padding, bias, relu)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """``x`` (N, C, H, W) and ``residual``, of the result's shape, or None."""
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
        """``a`` (N, A, H, W) and ``b`` (N, B, H, W), the second behind the first."""
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
        bns = (ops.BatchNorm.of(self.bn1), ops.BatchNorm.of(self.bn2), ops.BatchNorm.of(self.bn3))
        return ops.bottleneck(x, self.reduce.weight, self.conv.weight, self.expand.weight, bns=bns)


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
        return ops.upsample(x, self.weight, self.bias)

    def extra_repr(self) -> str:
        return f"{self.in_channels}, {self.out_channels}, bias={self.bias is not None}"
