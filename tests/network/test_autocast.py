"""The network under autocast, and in short dtypes."""

from __future__ import annotations

import copy

import pytest
import torch

import fastden
from tests.helpers import max_error, poison_freed_memory, random_network


@pytest.mark.parametrize("composed", [False, True])
def test_autocast(composed: bool) -> None:
    model = random_network(composed=composed)
    x = torch.rand(1, 3, 21, 18)
    with torch.no_grad():
        exact = model(x, 0.1)
        with torch.autocast("cpu", torch.bfloat16):
            y = model(x, 0.1)
    assert y.shape == x.shape
    assert 0 < max_error(y, exact) < 0.05


@pytest.mark.parametrize("autocast", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_takes_both_short_dtypes(autocast: torch.dtype, dtype: torch.dtype) -> None:
    """Its torch.cat, with the level, refuses the one that is not its own; a convolution does not."""
    model, x = random_network(), torch.rand(1, 3, 21, 18).to(dtype)
    hooked = copy.deepcopy(model)
    hooked.conv0.register_forward_hook(lambda *_: None)
    with torch.no_grad():
        exact = model(x.float(), 0.1)
        for network in (model, hooked, fastden.fuse(model)):
            with torch.autocast("cpu", autocast):
                y = network(x, 0.1)
            assert max_error(y, exact) < 0.05
    assert y.dtype == dtype  # of a fused network, which autocast does not change


def test_autocast_does_not_convert_double() -> None:
    for model, x in (
        (random_network(), torch.rand(1, 3, 9, 9).double()),
        (random_network().double(), torch.rand(1, 3, 9, 9)),
    ):
        accepted = rf"accepted: {model.dtype}, the network's \(convert x or the network\)$"
        for on in (True, False):
            with torch.autocast("cpu", torch.bfloat16, enabled=on), pytest.raises(TypeError, match=accepted):
                model(x, 0.1)


@pytest.mark.parametrize("composed", [False, True])
def test_autocast_trains(composed: bool) -> None:
    model = random_network(composed=composed).train()
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(torch.rand(2, 3, 14, 14), 0.1).float().square().mean()
    loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.dtype == torch.float32
        assert bool(parameter.grad.isfinite().all()), name


@pytest.mark.parametrize("composed", [False, True])
@pytest.mark.parametrize("size", [(1, 1), (30, 1), (30, 2), (2, 30), (33, 40)])
def test_bfloat16_reads_only_what_was_written(composed: bool, size: tuple[int, int]) -> None:
    """oneDNN 3.12's bf16 convolution picks up freed memory where an output is one column wide; none may be."""
    model = random_network(composed=composed).to(memory_format=torch.channels_last)
    x = torch.rand(1, 3, *size)
    for _ in range(3):
        poison_freed_memory()
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            assert bool(model(x, 0.1).isfinite().all())
