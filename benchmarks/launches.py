"""Record what Triton would compile for the network, with a driver that launches nothing.

Every launch function runs at the network's sizes on tensors without memory. Triton calls a hook before it compiles. The
hook answers that the kernel is compiled already, and records what Triton would have compiled. So the checks use the
kernels, constants and options of a real launch, and no code repeats them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib import import_module
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget

from fastden.kernels import _conv, _descriptors, batch_norm, bottleneck, head, stem, upsample, weight_gradient
from fastden.kernels._tiles import config_for
from fastden.kernels.concat_conv_bn_relu import DESCRIBED, concat_conv_bn_relu
from fastden.kernels.conv_bn_relu import conv_bn_relu, conv_statistics
from fastden.kernels.network_input import network_input

#: Triton's names of dtypes. Float32 has two: fp32 for IEEE products, tf32 for TF32 products.
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "tf32": torch.float32}
#: Batch, height and width of half-resolution features, by suffix of the label. The first size is a photograph's; the
#: second is so small that tiles are smaller. Batches and sizes are not constants of a kernel
#: (tests/kernels/test_compilations.py), so one batch is enough.
SIZES = {"": (1, 540, 960), ", few pixels": (1, 32, 32)}


class Launch(NamedTuple):
    """A launch of a kernel.

    Attributes:
        label: name of the launch in tables.
        kernel: the jitted function.
        signature, constants, attributes: arguments of Triton's compilation.
        options: warps, pipeline stages, and whether products and sums may fuse.
        products: whether the kernel multiplies matrices.
        described: whether the kernel loads through TMA, which only sm_90 and later have.
    """

    label: str
    kernel: Any
    signature: dict[str, str]
    constants: dict[Any, Any]
    attributes: dict[Any, Any]
    options: dict[str, Any]
    products: bool
    described: bool


class _Driver:
    """A GPU that does not exist. Its index is its architecture, because Triton caches data of a GPU by its index."""

    def __init__(self, architecture: int) -> None:
        self.architecture = architecture

    def get_current_device(self) -> int:
        return self.architecture

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.architecture, 32)


@contextmanager
def _recorded(architecture: int, dtype: str) -> Iterator[list[dict[str, Any]]]:
    """Record what launches in the ``with`` block would have compiled."""
    recorded: list[dict[str, Any]] = []

    def hook(*, fn: Any, compile: dict[str, Any], **_: Any) -> bool:
        recorded.append({"kernel": fn.jit_function, **compile})
        return True

    patched = {module: module.precision for module in _with_products()}
    described, capability = _descriptors.why_not, _descriptors.capability
    triton.runtime.driver.set_active(_Driver(architecture))
    triton.knobs.runtime.jit_cache_hook = hook
    for module in patched:
        module.precision = lambda x: "tf32" if dtype == "tf32" else "ieee"
    _descriptors.why_not = _conv.cannot_describe = lambda a, b, weight: []
    _conv.capability = weight_gradient.capability = lambda x: divmod(architecture, 10)
    try:
        yield recorded
    finally:
        triton.knobs.runtime.jit_cache_hook = None
        for module, precision in patched.items():
            module.precision = precision
        _descriptors.why_not = _conv.cannot_describe = described
        _conv.capability = weight_gradient.capability = capability


def _with_products() -> list[Any]:
    names = ("_conv", "_descriptors", "bottleneck", "head", "stem", "weight_gradient")
    return [import_module(f"fastden.kernels.{name}") for name in names]


def launches(operator: str, dtype: str, architecture: int) -> list[Launch]:
    """The launches of an operator at the network's sizes; each compilation occurs once.

    Args:
        operator: a module of ``fastden.kernels``.
        dtype: a key of :data:`DTYPES`.
        architecture: compute capability without the point, such as 90.
    """
    result: dict[str, Launch] = {}
    for suffix, size in SIZES.items():
        for name, call in CALLS[operator](Network(DTYPES[dtype], *size)).items():
            if "descriptors" in name and architecture < 90:
                continue
            with _recorded(architecture, dtype) as recorded:
                call()
            for one in recorded:
                kernel = one["kernel"].fn.__name__
                if kernel in OTHERS and operator != OTHERS[kernel]:
                    continue  # it is in the table of another operator
                key = f"{one['key']}"
                short = kernel.removesuffix("_kernel")
                part = "" if short in (operator, "conv", "descriptor_conv") else f" {short}"
                label = f"{operator} {name}{part}{suffix} {dtype}"
                options = {option: one[option] for option in ("num_warps", "num_stages", "enable_fp_fusion")}
                products = any(parameter == "PRECISION" for parameter in one["kernel"].arg_names)
                launch = Launch(
                    label, one["kernel"], one["signature"], one["constants"], one["configs"][0], options, products,
                    kernel == "descriptor_conv_kernel",
                )  # fmt: skip
                result.setdefault(kernel + key, launch)
    return list(result.values())


#: Kernels that several operators launch, with the operator whose table has them.
OTHERS = {"combine_kernel": "batch_norm", "sum_kernel": "weight_gradient"}


class Network:
    """Tensors with the network's shapes: without memory, or random numbers on a device.

    Args:
        dtype: dtype of all tensors but vectors, which are float32.
        batch: number of images.
        height, width: size of half-resolution features.
        device: device of the tensors; "meta" for tensors without memory.
    """

    def __init__(self, dtype: torch.dtype, batch: int, height: int, width: int, device: str = "meta") -> None:
        self.dtype, self.batch, self.height, self.width, self.device = dtype, batch, height, width, device

    def tensor(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        if self.device == "meta":
            return torch.empty(shape, dtype=dtype or self.dtype, device="meta")
        return torch.randn(shape, device=self.device).div_(8).to(dtype or self.dtype)

    def features(self, channels: int, scale: float = 1) -> Tensor:
        """Features at ``scale`` times half resolution, channels-last."""
        shape = (self.batch, channels, int(self.height * scale), int(self.width * scale))
        return self.tensor(*shape).contiguous(memory_format=torch.channels_last)

    def image(self, channels: int, dense: bool) -> Tensor:
        x = self.tensor(self.batch, channels, 2 * self.height + 4, 2 * self.width + 4)
        return x.contiguous(memory_format=torch.channels_last) if dense else x

    def vector(self, *shape: int) -> Tensor:
        """A float32 tensor, for biases and statistics."""
        return self.tensor(*shape, dtype=torch.float32)


Calls = dict[str, Callable[[], Any]]


def _conv_bn_relu(n: Network) -> Calls:
    # The configuration of a bottleneck's 3x3 convolution on descriptors.
    described = replace(config_for(64, 64, 1 << 20, n.dtype.itemsize), descriptors=True)
    x, w = n.features, n.tensor
    of, statistics = functools.partial(functools.partial, conv_bn_relu), conv_statistics
    calls: Calls = {
        "conv2": of(x(128), w(128, 128, 3, 3), n.vector(128), stride=2, padding=1),
        "reduce": of(x(256), w(64, 256, 1, 1), n.vector(64)),
        "expand": of(x(64), w(256, 64, 1, 1), n.vector(256), x(256)),
        "conv2 with statistics": functools.partial(statistics, x(128), None, w(128, 128, 3, 3), None, 2, 1, 1e-5),
    }
    if n.dtype.itemsize == 2:
        calls["conv by descriptors"] = of(x(64), w(64, 64, 3, 3), n.vector(64), padding=1, config=described)
    return calls


def _concat_conv_bn_relu(n: Network) -> Calls:
    a, b, weight = n.features(128), n.features(32), n.tensor(256, 160, 3, 3)

    def conv3(config: Any = None) -> Tensor:
        return concat_conv_bn_relu(a, b, weight, n.vector(256), config=config)

    def statistics() -> Any:
        return conv_statistics(a, b, weight, None, 1, 1, 1e-5)

    calls: Calls = {"conv3": conv3, "conv3 with statistics": statistics}
    if n.dtype.itemsize == 2:
        # What conv3 runs where no measured tile replaces it.
        plain = config_for(128, 256, n.batch * n.height * n.width, n.dtype.itemsize)
        calls["conv3, no measured tile"] = functools.partial(conv3, plain)
        for config in DESCRIBED:
            name = f"conv3 by descriptors {config.block_m}x{config.block_n}x{config.block_k}"
            calls[name] = functools.partial(conv3, config)
    return calls


def _bottleneck(n: Network) -> Calls:
    def block(channels: int, middle: int) -> Callable[..., Tensor]:
        weights = n.tensor(middle, channels, 1, 1), n.tensor(middle, middle, 3, 3), n.tensor(channels, middle, 1, 1)
        biases = n.vector(middle), n.vector(middle), n.vector(channels)
        return functools.partial(bottleneck.bottleneck, n.features(channels), *weights, biases)

    calls: Calls = {}
    for channels, middle in ((128, 32), (256, 64)):
        calls[f"{channels}-{middle}"] = block(channels, middle)
        chosen = bottleneck.config_for(channels, middle, 1 << 20, n.dtype.itemsize)
        # This form is never a default. With 4 warps its second kernel spilled 32 bytes on sm_100 under Triton 3.9.
        split = replace(chosen, fused=False, warps=8)
        calls[f"{channels}-{middle} in two"] = functools.partial(block(channels, middle), config=split)
    return calls


def _upsample(n: Network) -> Calls:
    of = functools.partial(functools.partial, upsample.upsample)
    return {
        "up2": of(n.features(128, 0.5), n.tensor(128, 32, 4, 4), n.vector(32)),
        # Gradients of conv2's input and of the stem's input.
        "conv2's gradient": of(n.features(128, 0.5), n.tensor(128, 128, 4, 4)),
        "stem's gradient": of(n.features(128), n.tensor(128, 3, 8, 8)),
    }


def _network_input(n: Network) -> Calls:
    x = n.tensor(n.batch, 3, 2 * n.height - 2, 2 * n.width - 2, dtype=torch.float32)
    levels = {"no level": None, "a map": x[:, :1], "a curve": n.vector(n.batch, 8)}
    return {
        name: functools.partial(network_input, x, level, n.dtype, (3, 3), (3, 3), 2) for name, level in levels.items()
    }


def _stem(n: Network) -> Calls:
    def first(channels: int, dense: bool) -> Callable[[], Tensor]:
        weights = n.tensor(4, 128, channels, 7, 7), n.vector(4, 128)
        return functools.partial(stem.stem, n.image(channels, dense), *weights)

    return {
        f"{channels} channels {'channels-last' if dense else 'planar'}": first(channels, dense)
        for channels in (3, 4)
        for dense in (False, True)
    }


def _head(n: Network) -> Calls:
    def last(composed: bool, dense: bool) -> Callable[[], Tensor]:
        return functools.partial(
            head.head,
            n.features(256), n.image(4, dense), n.tensor(12, 256, 4, 4), n.tensor(3, 4, 7, 7), n.vector(3), True, True,
            n.tensor(n.batch, 3, 2 * n.height + 4, 2 * n.width + 4, dtype=torch.float32), torch.float32, composed,
        )  # fmt: skip

    return {
        f"{9 if composed else 16} taps, input {'channels-last' if dense else 'planar'}": last(composed, dense)
        for composed in (False, True)
        for dense in (False, True)
    }


def _batch_norm(n: Network) -> Calls:
    calls: Calls = {}
    for channels in (32, 256):
        x, vector = n.features(channels), n.vector(channels)
        own = n.tensor(channels)  # BN's parameters, in the dtype that they have under .to(dtype)
        affine = functools.partial(batch_norm.affine, x, vector, vector, own, own)
        gradient = functools.partial(batch_norm.affine_gradient, x, raw=x, mean=vector, rstd=vector)
        gradient = functools.partial(gradient, weight=own, bias=own, relu=True)
        calls |= {
            f"{channels}, statistics": functools.partial(batch_norm.statistics, x, 1e-5),
            f"{channels}, affine, residual": functools.partial(affine, x, True),
            f"{channels}, affine": functools.partial(affine, None, True),
            f"{channels}, of a residual": functools.partial(gradient, y=x, residual=True),
            f"{channels}, of none": functools.partial(gradient, y=None, residual=False),
        }
    return calls


def _weight_gradient(n: Network) -> Calls:
    of = functools.partial(functools.partial, weight_gradient.weight_gradient)
    x = n.features
    image = n.tensor(n.batch, 3, 2 * n.height - 2, 2 * n.width - 2)
    return {
        "conv3": of(x(256), x(128), x(32), 3, 1, 1),
        "conv2": of(x(128, 0.5), x(128), None, 3, 2, 1),
        "reduce": of(x(64), x(256), None, 1, 1, 0),
        "conv": of(x(64), x(64), None, 3, 1, 1),
        "expand": of(x(256), x(64), None, 1, 1, 0),
        "up2": of(x(128, 0.5), x(32), None, 4, 2, 1),
        "head": of(x(12), x(256), None, 3, 1, 1),
        "head's image": of(image, n.image(4, True), None, 7, 1, 0),
        "stem": functools.partial(weight_gradient.stem_weight_gradient, x(128), n.image(4, True)),
    }


#: Functions that return the calls to launch, by operator.
CALLS: dict[str, Callable[[Network], Calls]] = {
    "batch_norm": _batch_norm,
    "bottleneck": _bottleneck,
    "concat_conv_bn_relu": _concat_conv_bn_relu,
    "conv_bn_relu": _conv_bn_relu,
    "head": _head,
    "network_input": _network_input,
    "stem": _stem,
    "upsample": _upsample,
    "weight_gradient": _weight_gradient,
}
