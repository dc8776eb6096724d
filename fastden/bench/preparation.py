"""The step before the network as a job: an image is padded, its noise level is added, and both are cast."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from fastden.bench import forms
from fastden.bench.compare import Contender, Job, bounds
from fastden.bench.images import SIGMA, photograph
from fastden.bench.timing import Call
from fastden.network.inputs import noise_level
from fastden.network.level import BRIGHTNESS_RADIUS, KNOTS
from fastden.network.padding import pad_image, padding_for
from fastden.ops.network_input import network_input

#: Name of the job, and of the kernel in ``fastden/ops/proven.py``. It is no operator of the dispatcher.
NAME = "network_input"
#: fastden's backends that have a form of this step of their own.
BACKENDS = ("torch", "triton")


def job(
    size: tuple[int, int],
    batch: int,
    device: torch.device,
    dtype: torch.dtype,
    peers: Sequence[str],
    backends: Sequence[str],
) -> tuple[Job, list[Contender]]:
    """The input of a network in ``dtype``, from float32 images whose level is a curve over brightness.

    Args:
        size: of an image, (height, width).
        batch: number of images.
        device: where they are.
        dtype: of the network.
        peers: of :data:`fastden.bench.forms.PLAIN`.
        backends: fastden's own; those that are not in :data:`BACKENDS` are left out.
    """
    x = photograph(*size, count=batch).to(device)
    # A camera's noise: stronger where the picture is brighter.
    curve = torch.linspace(0.5 * SIGMA, 1.5 * SIGMA, KNOTS, device=device)[None]
    reference = (made(x.double(), curve.double(), torch.float64),)
    bound = bounds(made(x, curve, dtype), reference, dtype)
    contenders = [
        Contender(forms.own_name(name), partial(_own, name, x, curve, dtype), own=True)
        for name in backends
        if name in BACKENDS
    ]
    contenders += [
        Contender(name, partial(_peer, name, x, curve, dtype), graphs=name != "max_autotune") for name in peers
    ]
    pixels = x[:, 0].numel()
    # The image is read once. It is written with its level in the network's dtype, and padded in its own.
    moved = float(pixels * (2 * x.shape[1] * x.itemsize + (x.shape[1] + 1) * dtype.itemsize))
    return Job(NAME, batch, pixels, moved, reference, bound), contenders


def made(x: Tensor, curve: Tensor, dtype: torch.dtype) -> Tensor:
    """The padded image with its level, by PyTorch's operations."""
    level = noise_level(x, curve, True)
    assert level is not None
    return pad_image(torch.cat([x, level], 1)).to(dtype, memory_format=torch.channels_last)


def _peer(form: str, x: Tensor, curve: Tensor, dtype: torch.dtype) -> Call:
    (source,) = forms.laid_out((x,), x.dtype, form)
    run = forms.compiled(made, form)

    def call() -> Tensor:
        with torch.no_grad():
            return run(source, curve, dtype)

    return call


def _own(backend: str, x: Tensor, curve: Tensor, dtype: torch.dtype) -> Call:
    padding = padding_for(x.shape[2]), padding_for(x.shape[3])

    def call() -> Tensor:
        with torch.no_grad():
            if backend == "torch":
                return made(x, curve, dtype)
            return network_input(x, curve, dtype, *padding, BRIGHTNESS_RADIUS)[0]

    return call
