"""The operators of the network's hot path, each a plain function with a PyTorch reference."""

from fastden.ops.backends import BACKENDS, BackendError, use_backend, why_not
from fastden.ops.batch_norm import BatchNorm
from fastden.ops.bottleneck import bottleneck
from fastden.ops.concat_conv_bn_relu import concat_conv_bn_relu
from fastden.ops.concat_conv_fp8 import concat_conv_fp8
from fastden.ops.conv_bn_relu import conv_bn_relu
from fastden.ops.head import head
from fastden.ops.stem import stem
from fastden.ops.upsample import upsample

__all__ = [
    "BACKENDS",
    "BackendError",
    "BatchNorm",
    "bottleneck",
    "concat_conv_bn_relu",
    "concat_conv_fp8",
    "conv_bn_relu",
    "head",
    "stem",
    "upsample",
    "use_backend",
    "why_not",
]
