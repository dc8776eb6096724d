"""Each operator as a job, at the shapes that the network gives it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from fastden import ops
from fastden.algebra import BORDER
from fastden.bench import forms, gradients, preparation
from fastden.bench.compare import Contender, Job, bounds, tensors
from fastden.bench.counts import PARTS, TRAINING, UNITS
from fastden.bench.timing import Call
from fastden.errors import UserError
from fastden.network.fused import FusedDenoiser, fuse
from fastden.network.model import Denoiser, composed_head, composed_stem, pair_of
from fastden.network.padding import padding_for
from fastden.nn import Bottleneck
from fastden.ops.backends import use_backend

#: The parts of the network that each operator serves; those of res3, one by one, are conv_bn_relu's in training.
OPERATORS = {
    "stem": ("stem",),
    "bottleneck": ("res1", "res2", "res3"),
    "conv_bn_relu": ("conv2", "res3_reduce", "res3_conv", "res3_expand"),
    "concat_conv_bn_relu": ("conv3",),
    "upsample": ("up2",),
    "head": ("head",),
}
#: What the fused network calls the weights of a part, in the order of the operator's arguments, where not as the part.
WEIGHTS = {"head": ("head", "head_image")} | {
    part: tuple(f"{part}_{name}" for name in ("reduce", "conv", "expand")) for part in OPERATORS["bottleneck"]
}
#: Inputs of at most so many channels are images, with or without noise level; the others are feature maps.
IMAGE_CHANNELS = 4


class _Stem(nn.Module):
    """conv1 after conv0; ``composed``: fastden's stem from the same parameters."""

    def __init__(self, model: Denoiser, composed: bool) -> None:
        super().__init__()
        self.conv0, self.conv1, self.composed = model.conv0, model.conv1, composed

    def forward(self, x: Tensor) -> Tensor:
        return composed_stem(pair_of(self.conv0), self.conv1, x) if self.composed else self.conv1(self.conv0(x))


class _Head(nn.Module):
    """out after conv0 and up3, and the added input; ``composed``: fastden's head from the same parameters."""

    def __init__(self, model: Denoiser, composed: bool) -> None:
        super().__init__()
        self.conv0, self.up3, self.out, self.composed = model.conv0, model.up3, model.out, composed

    def forward(self, features: Tensor, x: Tensor) -> Tensor:
        if self.composed:
            return composed_head(pair_of(self.conv0), self.up3, self.out, features, x)
        y = self.out(torch.cat([self.conv0(x), self.up3(features)], 1))
        return x[:, : self.out.out_channels, BORDER:-BORDER, BORDER:-BORDER] + y


class _Unit(nn.Module):
    """One convolution of a bottleneck with its BN, a residual where it is the last, and ReLU."""

    def __init__(self, block: Bottleneck, name: str) -> None:
        super().__init__()
        self.conv: nn.Conv2d = getattr(block, name)
        self.bn: nn.BatchNorm2d = {"reduce": block.bn1, "conv": block.bn2, "expand": block.bn3}[name]

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        padding = self.conv.padding[0]
        assert isinstance(padding, int)
        bn = ops.BatchNorm.of(self.bn)
        return ops.conv_bn_relu(x, self.conv.weight, bn=bn, residual=residual, padding=padding)


@dataclass(frozen=True)
class Case:
    """One operator at one place of the network.

    Args:
        operator: its name.
        part: of the network.
        plain: the layers that it stands for.
        composed: fastden's form of them in training, with the same parameters.
        inputs: what they take, float32.
    """

    operator: str
    part: str
    plain: nn.Module
    composed: nn.Module
    inputs: tuple[Tensor, ...]


def job_name(operator: str, part: str) -> str:
    """What the results call an operator at a part of the network."""
    return operator if len(OPERATORS[operator]) == 1 else f"{operator} {part}"


def weight_shapes(operator: str) -> list[tuple[tuple[int, ...], ...]]:
    """The shapes of an operator's weights, without biases, at each of its parts; as ``fastden/ops/proven.py`` has them.

    They are those of the models for colours with a noise level, such as ``color``, by which kernels are proven.
    """
    fused = fuse(Denoiser())
    shapes = [
        tuple(tuple(getattr(fused, f"{name}_weight").shape) for name in WEIGHTS.get(part, (part,)))
        for part in OPERATORS[operator]
    ]
    return list(dict.fromkeys(shapes))


def choose(text: str | None, training: bool = False) -> list[str]:
    """The operators that ``--only`` names, or all; some run at inference only, and others in training only.

    Raises:
        UserError: an unknown name.
    """
    accepted = [*OPERATORS, *(gradients.OPERATORS if training else (preparation.NAME,))]
    names = accepted if text is None else [part.strip() for part in text.split(",")]
    for name in names:
        if name not in accepted:
            raise UserError(f"only: {name!r}; accepted: {', '.join(accepted)}")
    return names


def jobs(
    model: Denoiser,
    size: tuple[int, int],
    batch: int,
    names: Sequence[str],
    dtype: torch.dtype,
    peers: Sequence[str],
    backends: Sequence[str],
    training: bool = False,
) -> Iterator[tuple[Job, list[Contender]]]:
    """What ``names`` of :func:`choose` are measured by; each job is made when its turn comes.

    Args:
        model: float32, in evaluation mode.
        size, batch: of the images.
        dtype: of weights and activations.
        peers: of :data:`fastden.bench.forms.PLAIN`.
        backends: fastden's own.
        training: forward and backward with batch statistics.
    """
    for case in cases(model, size, batch, [name for name in names if name in OPERATORS]):
        if training:
            yield backward(case, size, dtype, peers, backends)
        else:
            yield forward(case, model, size, dtype, peers, backends)
    device = model.device
    if preparation.NAME in names:
        yield preparation.job(size, batch, device, dtype, peers, backends)
    others = [name for name in names if name in gradients.OPERATORS]
    yield from gradients.jobs(size, batch, others, device, dtype, peers, backends)


def cases(model: Denoiser, size: tuple[int, int], batch: int, operators: Sequence[str]) -> Iterator[Case]:
    """The cases of ``operators`` for ``batch`` images of ``size`` (height, width), on the model's device."""
    device = model.device
    generator = torch.Generator(device).manual_seed(0)
    height, width = (length + sum(padding_for(length)) for length in size)
    half, quarter = ((height - 4) // 2, (width - 4) // 2), ((height - 4) // 4, (width - 4) // 4)

    def image() -> Tensor:
        return torch.rand(batch, model.conv0.in_channels, height, width, device=device, generator=generator)

    def features(channels: int, size: tuple[int, int]) -> Tensor:
        # Half zeros, as behind a ReLU.
        return torch.randn(batch, channels, *size, device=device, generator=generator).relu_()

    def inputs(part: str) -> tuple[Tensor, ...]:
        made: dict[str, Callable[[], tuple[Tensor, ...]]] = {
            "stem": lambda: (image(),),
            "res1": lambda: (features(128, half),),
            "conv2": lambda: (features(128, half),),
            "res2": lambda: (features(128, quarter),),
            "up2": lambda: (features(128, quarter),),
            "conv3": lambda: (features(128, half), features(32, half)),
            "res3": lambda: (features(256, half),),
            "res3_reduce": lambda: (features(256, half),),
            "res3_conv": lambda: (features(64, half),),
            "res3_expand": lambda: (features(64, half), features(256, half)),
            "head": lambda: (features(256, half), image()),
        }
        return made[part]()

    for operator in operators:
        for part in OPERATORS[operator]:
            if part in UNITS:
                plain: nn.Module = _Unit(model.res3, part.removeprefix("res3_"))
                composed = plain
            elif part in ("stem", "head"):
                kind = _Stem if part == "stem" else _Head
                plain, composed = kind(model, False), kind(model, True)
            else:
                plain = composed = getattr(model, part)
            yield Case(operator, part, plain, composed, inputs(part))


def forward(
    case: Case,
    model: Denoiser,
    size: tuple[int, int],
    dtype: torch.dtype,
    peers: Sequence[str],
    backends: Sequence[str],
) -> tuple[Job, list[Contender]]:
    """Inference: BN is folded in fastden's operators, and is a layer of its own in the plain form, as in the network.

    Args:
        case: what to measure.
        model: the network that it is of, float32, in evaluation mode.
        size: of the image.
        dtype: of weights and activations.
        peers: of :data:`fastden.bench.forms.PLAIN`.
        backends: fastden's own.
    """
    inputs = tuple(tensor.to(dtype) for tensor in case.inputs)
    reference = forms.plain("eager", case.plain, inputs, torch.float64)()
    eager = [forms.plain(form, case.plain, inputs, dtype)() for form in ("eager", "channels_last")]
    bound = bounds(eager, (reference,), dtype)
    fused = fuse(model, dtype)
    builders = {name: partial(forms.plain, name, case.plain, inputs, dtype) for name in peers}
    own = {name: partial(_own, case.part, fused, inputs, name) for name in backends}
    return _job(case, size, dtype, (reference,), bound, builders, own)


def backward(
    case: Case, size: tuple[int, int], dtype: torch.dtype, peers: Sequence[str], backends: Sequence[str]
) -> tuple[Job, list[Contender]]:
    """Training: forward with batch statistics, and the gradients of inputs and parameters; float32 weights, autocast.

    Arguments as of :func:`forward`.
    """
    inputs = tuple(tensor.to(dtype) for tensor in case.inputs)
    reference = tensors(_step("eager", case.plain, inputs, torch.float64, None)())
    eager = [_step(form, case.plain, inputs, dtype, None)() for form in ("eager", "channels_last")]
    bound = bounds(eager, reference, dtype, gradients=True)
    builders = {name: partial(_step, name, case.plain, inputs, dtype, None) for name in peers}
    own = {name: partial(_step, "channels_last", case.composed, inputs, dtype, name) for name in backends}
    return _job(case, size, dtype, reference, bound, builders, own, training=True)


def _job(
    case: Case,
    size: tuple[int, int],
    dtype: torch.dtype,
    reference: tuple[Tensor, ...],
    bound: Mapping[str, float],
    peers: Mapping[str, Callable[[], Call]],
    own: Mapping[str, Callable[[], Call]],
    training: bool = False,
) -> tuple[Job, list[Contender]]:
    counts = (PARTS | UNITS)[case.part]
    batch = len(case.inputs[0])
    channels = next((tensor.shape[1] for tensor in case.inputs if tensor.shape[1] <= IMAGE_CHANNELS), 0)
    colours = reference[0].shape[1]  # of the image that the head returns; the other counts do not depend on it
    pixels = batch * size[0] * size[1]
    own_flops, flops = (2.0 * macs.of(channels, colours, training) * pixels for macs in (counts.own, counts.plain))
    contenders = [Contender(forms.own_name(name), build, own_flops, own=True) for name, build in own.items()]
    contenders += [Contender(name, build, flops, graphs=name != "max_autotune") for name, build in peers.items()]
    moved = float((TRAINING if training else 1) * counts.values.of(channels, colours) * pixels * dtype.itemsize)
    return Job(job_name(case.operator, case.part), batch, pixels, moved, reference, bound), contenders


def _own(part: str, fused: FusedDenoiser, inputs: Sequence[Tensor], backend: str) -> Call:
    """fastden's operator for ``part`` with the weights of the fused network."""
    sources = forms.laid_out(inputs, fused.dtype, "channels_last")

    def weights(name: str) -> tuple[Tensor, Tensor]:
        return getattr(fused, f"{name}_weight"), getattr(fused, f"{name}_bias")

    def run() -> Tensor:
        x, *others = sources
        if part == "stem":
            return ops.stem(x, *weights("stem"), backend=backend)
        if part == "conv2":
            return ops.conv_bn_relu(x, *weights("conv2"), stride=2, padding=1, backend=backend)
        if part == "conv3":
            return ops.concat_conv_bn_relu(x, others[0], *weights("conv3"), backend=backend)
        if part == "up2":
            return ops.upsample(x, *weights("up2"), backend=backend)
        if part == "head":
            weight, bias = weights("head")
            return ops.head(x, others[0], weight, fused.head_image_weight, bias, composed=True, backend=backend)
        if part in UNITS:
            residual = others[0] if others else None
            padding = 1 if part == "res3_conv" else 0
            return ops.conv_bn_relu(x, *weights(part), residual=residual, padding=padding, backend=backend)
        (reduce, a), (conv, b), (expand, c) = (weights(f"{part}_{name}") for name in ("reduce", "conv", "expand"))
        return ops.bottleneck(x, reduce, conv, expand, biases=(a, b, c), backend=backend)

    def call() -> Tensor:
        with torch.no_grad():
            return run()

    return call


def _step(form: str, module: nn.Module, inputs: Sequence[Tensor], dtype: torch.dtype, backend: str | None) -> Call:
    """One step in ``dtype``; a float64 one computes the reference for inputs and gradients of their own dtype."""
    network = forms.arranged(module, form).train()
    if dtype == torch.float64:
        network = network.double()
    run = forms.compiled(network, form)
    # The network's first layers have images for inputs, which no training step differentiates.
    sources = tuple(
        tensor.detach().requires_grad_(tensor.shape[1] > IMAGE_CHANNELS)
        for tensor in forms.laid_out(inputs, dtype, form)
    )
    parameters = [tensor for tensor in (*sources, *network.parameters()) if tensor.requires_grad]
    device = sources[0].device.type
    with torch.no_grad(), use_backend("torch"), torch.autocast(device, dtype, enabled=dtype.itemsize == 2):
        like = network(*sources)
    layout = torch.contiguous_format if form == "eager" else torch.channels_last
    # All forms get the same values: they are drawn in one order of memory, and then laid out.
    generator = torch.Generator(device).manual_seed(1)
    grad = torch.randn(like.shape, device=device, generator=generator).to(inputs[0].dtype)
    grad = grad.to(like.dtype).contiguous(memory_format=layout)

    def step() -> tuple[Tensor, ...]:
        with (
            torch.enable_grad(),
            use_backend(backend or "torch"),
            torch.autocast(device, dtype, enabled=dtype.itemsize == 2, cache_enabled=False),
        ):
            y = run(*sources)
        return (y, *torch.autograd.grad(y, parameters, grad))

    return step
