"""The operators that only a training step runs, as jobs at the shapes that the network gives them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from fastden import ops
from fastden.bench import forms
from fastden.bench.compare import Contender, Job, bounds, tensors
from fastden.bench.counts import PARTS, UNITS
from fastden.bench.timing import Call
from fastden.network.padding import padding_for
from fastden.ops.batch_norm import batch_norm_relu, finish
from fastden.ops.weight_gradient import reference, stem_reference

#: The places of the network where each operator runs. ``head`` is the convolution of its features, all phases in one.
OPERATORS = {
    "weight_gradient": (*("stem", "conv2", "up2", "conv3"), *UNITS, "head"),
    "batch_norm": ("stem", "conv2", "res3_reduce", "conv3"),
}
#: Channels of the normalised tensors, and the height and width of the image as a multiple of theirs.
NORMALISED = {"stem": (128, 2), "conv2": (128, 4), "res3_reduce": (64, 2), "conv3": (256, 2)}

#: Of the input: a color image and its noise level.
COLOURS = 3
IMAGE_CHANNELS = COLOURS + 1

Draw = Callable[[int, int], Tensor]


def jobs(
    size: tuple[int, int],
    batch: int,
    names: Sequence[str],
    device: torch.device,
    dtype: torch.dtype,
    peers: Sequence[str],
    backends: Sequence[str],
) -> Iterator[tuple[Job, list[Contender]]]:
    """The jobs of ``names``, of :data:`OPERATORS`; each is made when its turn comes.

    Args:
        size, batch: of the images.
        names: of operators.
        device, dtype: of activations and gradients.
        peers: of :data:`fastden.bench.forms.PLAIN`.
        backends: fastden's own.
    """
    for name in names:
        for part in OPERATORS[name]:
            yield job(name, part, size, batch, device, dtype, peers, backends)


def job(
    name: str,
    part: str,
    size: tuple[int, int],
    batch: int,
    device: torch.device,
    dtype: torch.dtype,
    peers: Sequence[str],
    backends: Sequence[str],
) -> tuple[Job, list[Contender]]:
    """One operator at one place; arguments as of :func:`jobs`."""
    generator = torch.Generator(device).manual_seed(0)
    height, width = (length + sum(padding_for(length)) - 4 for length in size)

    def draw(channels: int, scale: int) -> Tensor:
        shape = (batch, channels, height // scale, width // scale)
        return torch.randn(shape, device=device, generator=generator).to(dtype)

    make = {"weight_gradient": _weight_gradient, "batch_norm": _batch_norm}[name]
    work = make(part, draw, batch * size[0] * size[1], dtype)
    builders = {
        forms.own_name(backend): partial(work.call, work.own[backend], "channels_last", dtype)
        for backend in backends
        if backend in work.own
    }
    builders |= {form: partial(work.call, forms.compiled(work.plain, form), form, dtype) for form in peers}
    contenders = [
        Contender(form, build, work.flops, own=form not in peers, graphs=form != "max_autotune")
        for form, build in builders.items()
    ]
    reference = tensors(work.call(work.plain, "eager", torch.float64)())
    eager = [work.call(work.plain, form, dtype)() for form in ("eager", "channels_last")]
    bound = bounds(eager, reference, dtype, gradients=name == "batch_norm")
    return Job(f"{name} {part}", batch, batch * size[0] * size[1], work.bytes, reference, bound), contenders


class _Work(NamedTuple):
    """What the contenders of a job do.

    Attributes:
        call: makes the call of a function, in a form and a dtype.
        plain: the function on PyTorch's operations.
        own: the function on each of fastden's backends that has one.
        bytes: read and written at least.
        flops: of one call; 0 where they are not counted.
    """

    call: Callable[[Callable[..., Any], str, torch.dtype], Call]
    plain: Callable[..., Tensor]
    own: dict[str, Callable[..., Tensor]]
    bytes: float
    flops: float


def _weight_gradient(part: str, draw: Draw, pixels: int, dtype: torch.dtype) -> _Work:
    sources, settings = _sources(part, draw)
    stem = part == "stem"
    plain: Callable[..., Tensor] = stem_reference if stem else reference
    kernel = torch.ops.fastden.weight_gradient_stem if stem else torch.ops.fastden.weight_gradient

    def call(function: Callable[..., Tensor], form: str, dtype: torch.dtype) -> Call:
        given = [None if x is None else forms.laid_out((x,), dtype, form)[0] for x in sources]

        def run() -> Tensor:
            with torch.no_grad():
                return function(*given, *settings)

        return run

    counts = (PARTS | UNITS)[part].own
    macs = counts.channel * IMAGE_CHANNELS if stem else counts.fixed + counts.colour * COLOURS
    moved = float(sum(x.numel() for x in sources if x is not None) * dtype.itemsize)
    return _Work(call, plain, {"torch": plain, "triton": kernel}, moved, 2.0 * macs * pixels)


def _sources(part: str, draw: Draw) -> tuple[tuple[Tensor | None, ...], tuple[int, ...]]:
    """Tensors and settings of the operator: the gradient of the result, the sources; kernel, stride, padding."""
    if part == "stem":
        # The padded image has four rows and columns more than twice the result.
        return (draw(128, 2), F.pad(draw(IMAGE_CHANNELS, 1), (2, 2, 2, 2))), ()
    return {
        "conv2": lambda: ((draw(128, 4), draw(128, 2), None), (3, 2, 1)),
        # The weight of a transposed convolution: the roles of input and gradient are exchanged.
        "up2": lambda: ((draw(128, 4), draw(32, 2), None), (4, 2, 1)),
        "conv3": lambda: ((draw(256, 2), draw(128, 2), draw(32, 2)), (3, 1, 1)),
        "res3_reduce": lambda: ((draw(64, 2), draw(256, 2), None), (1, 1, 0)),
        "res3_conv": lambda: ((draw(64, 2), draw(64, 2), None), (3, 1, 1)),
        "res3_expand": lambda: ((draw(256, 2), draw(64, 2), None), (1, 1, 0)),
        "head": lambda: ((draw(12, 2), draw(256, 2), None), (3, 1, 1)),
    }[part]()


def _batch_norm(part: str, draw: Draw, pixels: int, dtype: torch.dtype) -> _Work:
    """Forward and backward of a ReLU after normalisation by the statistics of the batch."""
    channels, scale = NORMALISED[part]
    raw, grad = draw(channels, scale), draw(channels, scale)

    def call(function: Callable[..., Tensor], form: str, dtype: torch.dtype) -> Call:
        x, wanted = forms.laid_out((raw, grad), dtype, form)
        x.requires_grad_()
        # Parameters and statistics have at least float32, as under autocast.
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        module = torch.nn.BatchNorm2d(channels, device=x.device, dtype=wide)
        state = ops.BatchNorm.of(module)

        def run() -> tuple[Tensor, ...]:
            with torch.enable_grad():
                y = function(x, state, True)
            return (y.detach(), *torch.autograd.grad(y, (x, module.weight, module.bias), wanted))

        return run

    # Forward reads the input for its statistics and for the result, which it writes. Backward reads the input and the
    # gradient for sums and for the result, which it writes.
    return _Work(call, _plain, {"torch": _plain, "triton": batch_norm_relu}, 8.0 * raw.numel() * dtype.itemsize, 0.0)


def _plain(raw: Tensor, bn: ops.BatchNorm, relu: bool) -> Tensor:
    return finish(raw, bn, None, relu)
