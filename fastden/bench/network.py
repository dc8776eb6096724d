"""The whole network as a job: inference, and a training step."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from fastden.bench import forms
from fastden.bench.compare import Contender, Job, bounds
from fastden.bench.counts import COMPOSED_MACS, PLAIN_MACS, TRAINING, VALUES
from fastden.bench.images import SIGMA, photograph
from fastden.bench.timing import Call
from fastden.inference import denoise_tiled
from fastden.network.fused import fuse
from fastden.network.model import Denoiser
from fastden.ops.backends import use_backend


def level(model: Denoiser) -> float | None:
    """The noise level, for a network that takes one."""
    return SIGMA if model.noise_level_input else None


def inference(
    model: Denoiser,
    size: tuple[int, int],
    batch: int,
    dtype: torch.dtype,
    peers: Sequence[str],
    backends: Sequence[str],
    folder: Path,
) -> tuple[Job, list[Contender]]:
    """Denoising ``batch`` images of ``size`` (height, width) on the model's device.

    Args:
        model: float32, in evaluation mode.
        size, batch: of the input.
        dtype: of weights and activations.
        peers: other contenders, of :data:`fastden.bench.forms.PLAIN` and RUNTIMES, or FUSED_COMPILE, FAST or AUTO.
        backends: fastden's own.
        folder: for the files of other runtimes.
    """
    device = model.device
    x = photograph(*size, count=batch, channels=model.image_channels).to(device)
    with use_backend("torch"):
        # By tiles: float64 activations of large images would not fit.
        reference = denoise_tiled(copy.deepcopy(model).double(), x.double(), level(model))
    network = forms.WithLevel(model, level(model))
    eager = [forms.plain(form, network, (x,), dtype)() for form in ("eager", "channels_last")]
    bound = bounds(eager, (reference,), dtype)
    pixels = x[:, 0].numel()
    channels = model.conv0.in_channels
    colours = model.image_channels
    plain_flops, own_flops = (2.0 * macs.of(channels, colours) * pixels for macs in (PLAIN_MACS, COMPOSED_MACS))
    contenders = [
        Contender(forms.own_name(name), partial(_own, model, x, dtype, name), own_flops, own=True) for name in backends
    ]
    if forms.AUTO in peers:
        contenders.append(Contender(forms.AUTO, partial(_own, model, x, dtype, None), own_flops, own=True))
    for name in peers:
        if name == forms.AUTO:
            continue
        if name in forms.PLAIN:
            build = partial(forms.plain, name, network, (x,), dtype)
        elif name == forms.FUSED_COMPILE:
            build = partial(_compiled, model, x, dtype)
        elif name == forms.FAST:
            build = partial(_fast, model, x, dtype)
        else:
            build = partial(_runtime, name, model, x, dtype, folder)
        graphs = name in (*forms.PLAIN, forms.FUSED_COMPILE) and name != "max_autotune"
        composed = name in (forms.FUSED_COMPILE, forms.FAST) or name.endswith(forms.COMPOSED)
        flops = own_flops if composed else plain_flops
        fast = name == forms.FAST
        bounds_of = {"relative_l2": forms.FAST_ERROR} if fast else None
        contenders.append(Contender(name, build, flops, graphs=graphs, bounds=bounds_of, counted=not fast))
    moved = float(VALUES.of(channels, colours) * pixels * dtype.itemsize)
    return Job("model", batch, pixels, moved, (reference,), bound), contenders


def _own(model: Denoiser, x: Tensor, dtype: torch.dtype, backend: str | None) -> Call:
    fused = fuse(model, dtype)

    def call() -> Tensor:
        with torch.no_grad(), nullcontext() if backend is None else use_backend(backend):
            return fused(x, level(model))

    return call


def _fast(model: Denoiser, x: Tensor, dtype: torch.dtype) -> Call:
    """``quality="fast"``: 8-bit integers inside, the head in ``dtype``."""
    fused = fuse(model, dtype, quality="fast")

    def call() -> Tensor:
        with torch.no_grad():
            return fused(x, level(model))

    return call


def _compiled(model: Denoiser, x: Tensor, dtype: torch.dtype) -> Call:
    """The inference form without fastden's kernels, compiled by PyTorch: PyTorch's fastest form."""
    run = forms.compiled(forms.WithLevel(fuse(model, dtype), level(model)), "compile")

    def call() -> Tensor:
        with torch.no_grad(), use_backend("torch"):
            return run(x)

    return call


def _runtime(name: str, model: Denoiser, x: Tensor, dtype: torch.dtype, folder: Path) -> Call:
    composed = name.endswith(forms.COMPOSED)
    network: nn.Module = fuse(model) if composed else model
    path = forms.export_onnx(network, x, folder / ("composed.onnx" if composed else "plain.onnx"))
    return partial(forms.openvino(path, dtype), x) if name.startswith("openvino") else forms.onnxruntime(path, x)


def training(
    model: Denoiser,
    size: tuple[int, int],
    batch: int,
    dtype: torch.dtype,
    peers: Sequence[str],
    backends: Sequence[str],
) -> tuple[Job, list[Contender]]:
    """A training step on the model's device: forward and backward, batch statistics, float32 weights, autocast.

    The optimiser's part is the same for all and left out. Errors are those of the gradients of all parameters, by their
    relative L2 norms. Arguments as of :func:`inference`; ``size`` is that of the crops.
    """
    x = photograph(*size, count=batch, channels=model.image_channels).to(model.device)
    reference = _step("eager", copy.deepcopy(model).double(), x.double(), torch.float64, None)()
    eager = [_step(form, model, x, dtype, None)() for form in ("eager", "channels_last")]
    bound = bounds(eager, reference, dtype, gradients=True)
    pixels = x[:, 0].numel()
    channels = model.conv0.in_channels
    colours = model.image_channels
    plain_flops, own_flops = (
        2.0 * macs.of(channels, colours, training=True) * pixels for macs in (PLAIN_MACS, COMPOSED_MACS)
    )
    contenders = [
        Contender(forms.own_name(name), partial(_step, "channels_last", model, x, dtype, name), own_flops, own=True)
        for name in backends
    ]
    contenders += [
        Contender(name, partial(_step, name, model, x, dtype, None), plain_flops, graphs=name != "max_autotune")
        for name in peers
    ]
    moved = float(TRAINING * VALUES.of(channels, colours) * pixels * dtype.itemsize)
    return Job("train", batch, pixels, moved, reference, bound), contenders


def _step(form: str, model: Denoiser, x: Tensor, dtype: torch.dtype, backend: str | None) -> Call:
    """One step, its loss the mean square of the result.

    ``backend`` is fastden's, which composes the weights, or None for the plain network.
    """
    network = forms.arranged(model, form).train()
    assert isinstance(network, Denoiser)
    network.composed = backend is not None
    (source,) = forms.laid_out((x,), x.dtype, form)
    run: nn.Module = forms.compiled(network, form)
    parameters = list(network.parameters())

    def step() -> tuple[Tensor, ...]:
        network.zero_grad(set_to_none=True)
        with (
            use_backend(backend or "torch"),
            torch.autocast(x.device.type, dtype, enabled=dtype not in (torch.float32, torch.float64)),
        ):
            y = run(source, level(model))
        # The distance to the image would not do: for a trained network that gradient's mean is zero up to rounding.
        y.to(source.dtype).square().mean().backward()
        return tuple(parameter.grad for parameter in parameters if parameter.grad is not None)

    return step
