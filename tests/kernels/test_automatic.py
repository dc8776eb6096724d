"""The automatic choice of a proven kernel: in compiled code too, and for inference that runs here alone."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.flop_counter import FlopCounterMode

from fastden import ops
from fastden.ops import backends
from tests.helpers import max_error
from tests.kernels.test_convolutions import normalisation


@pytest.fixture(autouse=True)
def proven(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's kernels are proven for any operator, with the weights of :class:`Convolution`."""
    monkeypatch.delenv(backends.ENVIRONMENT, raising=False)
    monkeypatch.setattr(backends, "SHAPES", {"conv_bn_relu": [((5, 4, kernel, kernel),) for kernel in (3, 9)]})
    monkeypatch.setattr(backends, "proven_backends", lambda operator, device, dtype: ["triton"])


class Convolution(nn.Module):
    def __init__(self, kernel: int = 3, **options: Any) -> None:
        super().__init__()
        self.register_buffer("weight", torch.randn(5, 4, kernel, kernel))
        self.register_buffer("bias", torch.randn(5))
        self.options = options

    def forward(self, x: Tensor) -> Tensor:
        return ops.conv_bn_relu(x, self.weight, self.bias, padding=1, **self.options)


def chosen(call: Callable[[], object], monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """The backends that :func:`fastden.ops.backends.choose` chooses in a call."""
    found: set[str] = set()
    automatic = backends._automatic
    with monkeypatch.context() as patch:
        patch.setattr(backends, "_automatic", lambda *given: found.add(automatic(*given)) or automatic(*given))
        call()
    return found


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_without_a_break(device: str, dynamic: bool) -> None:
    module = Convolution().to(device)
    graphs: list[str] = []

    def keep(graph: torch.fx.GraphModule, _: object) -> Callable[..., Any]:
        graphs.append(graph.print_readable(print_output=False))
        return graph.forward

    compiled = torch.compile(module, backend=keep, fullgraph=True, dynamic=dynamic)
    for size in ((5, 6), (7, 9)):
        x = torch.randn(1, 4, *size, device=device)
        assert (
            max_error(compiled(x), ops.conv_bn_relu(x, module.weight, module.bias, padding=1, backend="torch")) < 1e-5
        )
    assert len(graphs) == (1 if dynamic else 2)
    assert all("fastden.conv_bn_relu" in graph for graph in graphs)


def test_what_the_kernel_cannot_run_is_compiled_for_pytorch(device: str) -> None:
    module, x = Convolution(kernel=9).to(device), torch.randn(1, 4, 9, 10, device=device)
    assert backends.why_not("conv_bn_relu", "triton", x=x, weight=module.weight)
    compiled = torch.compile(module, backend="eager", fullgraph=True)
    assert max_error(compiled(x), module(x)) < 1e-5


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("backend", [None, "triton"])
def test_exported(device: str, strict: bool, backend: str | None) -> None:
    """A program runs wherever PyTorch does; with a backend that was asked for, where fastden is."""
    module, x = Convolution(backend=backend).to(device), torch.randn(1, 4, 5, 6, device=device)
    sizes = {2: torch.export.Dim("height", min=3), 3: torch.export.Dim("width", min=3)}
    program = torch.export.export(module, (x,), dynamic_shapes=({**sizes},), strict=strict)
    assert ("fastden" in str(program.graph)) == (backend is not None)
    x = torch.randn(1, 4, 8, 7, device=device)
    assert max_error(program.module()(x), module(x)) < 1e-5


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_traced_and_saved(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """``torch.jit`` saves no autograd function; the file is read where fastden is not."""
    module, x = Convolution().to(device), torch.randn(1, 4, 5, 6, device=device)
    assert chosen(lambda: module(x), monkeypatch) == {"triton"}
    file = io.BytesIO()
    torch.jit.save(torch.jit.trace(module, (x,)), file)
    file.seek(0)
    loaded = torch.jit.load(file)
    assert "fastden::" not in str(loaded.graph)
    assert "aten::_convolution" in str(loaded.graph)
    assert max_error(loaded(x), module(x)) < 1e-5


@torch.no_grad()
def test_recorded_operations_are_pytorchs(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A counter of operations, or a graph of them, knows no others."""
    module, x = Convolution().to(device), torch.randn(1, 4, 5, 6, device=device)
    with FlopCounterMode(display=False) as counter:
        assert chosen(lambda: module(x), monkeypatch) == {"torch"}
    assert counter.get_total_flops() == 2 * 5 * 4 * 9 * 5 * 6
    for before_autograd in (False, True):
        graph = make_fx(module, pre_dispatch=before_autograd)(x)
        assert "convolution" in graph.code or "conv2d" in graph.code
        assert "fastden" not in graph.code
    with FakeTensorMode() as mode:
        fake = mode.from_tensor(x), mode.from_tensor(module.weight), mode.from_tensor(module.bias)
    assert chosen(lambda: ops.conv_bn_relu(fake[0], *fake[1:], padding=1), monkeypatch) == {"torch"}


def test_only_the_normalisation_is_trained(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is proven has none; these gradients would be those of kernels."""
    norm = normalisation(5, device, True).eval()
    module, x = Convolution(bn=ops.BatchNorm.of(norm)).to(device), torch.randn(2, 4, 5, 6, device=device)
    assert chosen(lambda: module(x), monkeypatch) == {"torch"}
    with torch.no_grad():
        assert chosen(lambda: module(x), monkeypatch) == {"torch"}


def test_inference_alone_is_proven(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module, x = Convolution().to(device), torch.randn(2, 4, 5, 6, device=device)
    wanting = x.clone().requires_grad_()
    assert chosen(lambda: module(x), monkeypatch) == {"triton"}
    with torch.no_grad():
        assert chosen(lambda: module(wanting), monkeypatch) == {"triton"}
    assert chosen(lambda: module(wanting), monkeypatch) == {"torch"}
    bn = ops.BatchNorm.of(normalisation(5, device, True))
    assert chosen(lambda: Convolution(bn=bn).to(device)(x), monkeypatch) == {"torch"}


def test_compiled_training_is_pytorchs(device: str) -> None:
    module, x = Convolution().to(device), torch.randn(1, 4, 5, 6, device=device, requires_grad=True)
    graphs: list[str] = []

    def keep(graph: torch.fx.GraphModule, _: object) -> Callable[..., Any]:
        graphs.append(graph.print_readable(print_output=False))
        return graph.forward

    compiled = torch.compile(module, backend=keep, fullgraph=True)
    assert max_error(compiled(x), module(x)) < 1e-5
    assert "fastden" not in "".join(line for line in graphs[0].splitlines(True) if "torch.ops" in line)
    with torch.no_grad():
        compiled(x)
    assert "torch.ops.fastden.conv_bn_relu" in graphs[1]


@pytest.mark.parametrize("compiled", [False, True])
def test_transforms_run_as_ever(device: str, compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    module, x = Convolution().to(device), torch.randn(2, 4, 5, 6, device=device)
    gradient = torch.func.grad(lambda x: module(x).square().sum())
    batched = torch.func.vmap(lambda x: module(x[None])[0])
    wanted = x.clone().requires_grad_()
    module(wanted).square().sum().backward()
    for function, expected in ((gradient, wanted.grad), (batched, module(x))):
        call = torch.compile(function, backend="eager", fullgraph=True) if compiled else function
        with torch.no_grad():
            assert max_error(call(x), expected) < 1e-4
            if not compiled:
                assert chosen(lambda call=call: call(x), monkeypatch) == {"torch"}  # type: ignore[misc]
