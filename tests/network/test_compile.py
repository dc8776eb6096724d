"""The network under torch.compile and torch.export."""

from __future__ import annotations

import copy
import shutil

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.export import Dim

from fastden.network.model import Denoiser
from tests.helpers import max_error, random_network


class Compiled:
    """``torch.compile`` of a network with a count of its compilations."""

    def __init__(self, model: Denoiser, backend: str) -> None:
        torch._dynamo.reset()
        self.counter = CompileCounterWithBackend(backend)
        self.run = torch.compile(model, fullgraph=True, backend=self.counter)

    def __call__(self, x: Tensor, sigma: float | Tensor | None) -> Tensor:
        return self.run(x, sigma)


@pytest.mark.parametrize("composed", [False, True])
def test_compile_without_graph_breaks(composed: bool) -> None:
    model = random_network(composed=composed)
    compiled = Compiled(model, "eager")
    with torch.no_grad():
        for size in ((33, 50), (40, 41), (62, 35), (29, 64)):
            x = torch.rand(2, 3, *size)
            assert max_error(compiled(x, 0.1), model(x, 0.1)) < 1e-5
        for sigma in (0.2, 0.3, torch.tensor([0.1, 0.4])):
            assert max_error(compiled(x, sigma), model(x, sigma)) < 1e-5
    # One for the first size, one for any size, one for any number, one for a tensor.
    assert compiled.counter.frame_count <= 4


def test_compile_trains() -> None:
    model = random_network(composed=True).train()
    twin = copy.deepcopy(model)
    x = torch.rand(2, 3, 14, 17)
    Compiled(model, "aot_eager")(x, 0.1).square().sum().backward()
    twin(x, 0.1).square().sum().backward()
    for (name, one), other in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert torch.allclose(one.grad, other.grad, rtol=1e-3, atol=1e-3 * float(other.grad.abs().max()) + 1e-5), name
    for (name, one), other in zip(model.named_buffers(), twin.buffers(), strict=True):
        assert torch.allclose(one, other, rtol=1e-4, atol=1e-5), name


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile's default backend needs a C++ compiler")
def test_compile_with_the_default_backend() -> None:
    model = random_network(noise_level_input=False)
    x = torch.rand(1, 3, 19, 16)
    with torch.no_grad():
        assert max_error(Compiled(model, "inductor")(x, None), model(x)) < 1e-5


@pytest.mark.parametrize("composed", [False, True])
@pytest.mark.parametrize("example_size", [(17, 21), (18, 22)])
def test_export_for_any_size(composed: bool, example_size: tuple[int, int]) -> None:
    """One exported graph serves every batch of 2 and more and every height and width from 7."""
    model = random_network(composed=composed)
    # Smaller sizes mirror by another path, and torch.export takes a batch of 1 for a constant.
    shapes = {"x": {0: Dim.AUTO, 2: Dim.AUTO, 3: Dim.AUTO}, "sigma": None}
    program = torch.export.export(model, (torch.rand(2, 3, *example_size), torch.tensor(0.1)), dynamic_shapes=shapes)
    exported = program.module()
    with torch.no_grad():
        for batch, height, width in ((2, 17, 21), (3, 18, 22), (2, 18, 21), (4, 33, 40), (2, 7, 9)):
            x = torch.rand(batch, 3, height, width)
            assert max_error(exported(x, torch.tensor(0.2)), model(x, 0.2)) < 1e-5


def test_export_with_a_map_and_blind() -> None:
    x, sigma = torch.rand(1, 3, 9, 11), torch.rand(1, 1, 9, 11)
    model = random_network()
    with torch.no_grad():
        assert max_error(torch.export.export(model, (x, sigma)).module()(x, sigma), model(x, sigma)) < 1e-5
        blind = random_network(noise_level_input=False)
        assert max_error(torch.export.export(blind, (x,)).module()(x), blind(x)) < 1e-5
