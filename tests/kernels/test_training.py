"""Training on the kernels: stored tensors, recomputed tensors, and PyTorch's own tools around a block."""

from __future__ import annotations

import copy
import io
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from fastden import ops
from fastden.nn import Bottleneck, ConvBNReLU
from fastden.ops import _recompute
from tests.helpers import max_error, random_network, relative_l2
from tests.kernels.test_convolutions import normalisation


def block(device: str, channels: int = 12, middle: int = 4) -> Bottleneck:
    """A block in training mode, with other BN weights than ones and zeros."""
    module = Bottleneck(channels, middle).to(device)
    for name in ("bn1", "bn2", "bn3"):
        setattr(module, name, normalisation(getattr(module, name).num_features, device, True))
    return module


def gradients(
    module: nn.Module, x: Tensor, backend: str, call: Callable[..., Tensor] | None = None
) -> dict[str, Tensor]:
    x = x.detach().clone().requires_grad_()
    with ops.use_backend(backend):
        y = (module if call is None else call)(x)
        grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y)
        y.backward(grad)
    assert x.grad is not None
    found = {name: parameter.grad for name, parameter in module.named_parameters() if parameter.grad is not None}
    return {"result": y.detach(), "x": x.grad, **found}


@pytest.mark.parametrize("shape", [(2, 12, 5, 7), (2, 12, 1, 3), (3, 12, 9, 4)])
def test_bottleneck_in_batch_statistics(device: str, shape: tuple[int, ...]) -> None:
    module = block(device)
    other = copy.deepcopy(module)
    x = torch.randn(shape, device=device)
    expected, found = gradients(module, x, "torch"), gradients(other, x, "triton")
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert relative_l2(found[name], value) < 1e-4, name
    for (name, one), two in zip(module.named_buffers(), other.buffers(), strict=True):
        torch.testing.assert_close(two, one, rtol=1e-5, atol=1e-5, msg=name)


def test_bottleneck_under_autocast(device: str) -> None:
    module = block(device)
    with torch.no_grad():  # all ReLUs are open: one that rounding opens or closes would outweigh all other errors
        for bn in (module.bn1, module.bn2, module.bn3):
            bn.bias.add_(10)
    other, exact = copy.deepcopy(module), copy.deepcopy(module).double()
    x = torch.randn(2, 12, 6, 5, device=device)
    reference = gradients(exact, x.double(), "torch")

    def in_half(net: nn.Module) -> Callable[[Tensor], Tensor]:
        def call(x: Tensor) -> Tensor:
            with torch.autocast(device, torch.bfloat16):
                return net(x)

        return call

    eager = gradients(module, x, "torch", in_half(module))
    kernel = gradients(other, x, "triton", in_half(other))
    for name, value in reference.items():
        assert relative_l2(kernel[name], value) <= 2 * relative_l2(eager[name], value) + 1e-2, name


def test_bottleneck_compiles_without_a_break(device: str) -> None:
    module = block(device)
    compiled = copy.deepcopy(module)
    x = torch.randn(2, 12, 5, 4, device=device)
    with ops.use_backend("triton"):
        call = torch.compile(compiled, fullgraph=True, backend="aot_eager")
        found = gradients(compiled, x, "triton", call)
    for name, value in gradients(module, x, "triton").items():
        torch.testing.assert_close(found[name], value, msg=name)


def stored(run: Callable[[], Tensor], batch: int) -> int:
    """Bytes of activations (first dimension ``batch``) that autograd holds for the backward pass.

    Found in the graph: hooks on saved tensors would change what is saved.
    """
    found: dict[int, int] = {}
    result = run()
    seen, waiting = set(), [result.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        waiting += [following for following, _ in node.next_functions]
        saved: list[Any] = list(getattr(node, "saved_tensors", ()))  # of Python's own functions
        saved += [getattr(node, name) for name in dir(node) if name.startswith("_saved_")]
        for tensor in saved:
            if isinstance(tensor, Tensor) and tensor.dim() == 4 and tensor.shape[0] == batch:
                storage = tensor.untyped_storage()
                found[storage.data_ptr()] = storage.nbytes()
    return sum(found.values())


def test_what_the_network_stores(device: str) -> None:
    plain = random_network().to(device).train()
    composed = random_network(composed=True).to(device).train()
    x = torch.rand(2, 3, 18, 22, device=device)
    before = stored(lambda: plain(x, 0.1), len(x))
    with ops.use_backend("triton"):
        after = stored(lambda: composed(x, 0.1), len(x))
    assert round(after / before, 2) == 0.36


def test_an_input_that_was_written_to_is_not_made_again(device: str) -> None:
    convolution, module = ConvBNReLU(3, 12, bias=False).to(device), block(device)
    other = copy.deepcopy(nn.Sequential(convolution, module))
    x = torch.randn(2, 3, 5, 6, device=device)

    both = nn.Sequential(convolution, module)
    expected = gradients(both, x, "torch", lambda x: both[1](both[0](x) * 2))
    found = gradients(other, x, "triton", lambda x: other[1](other[0](x).mul_(2)))
    for name, value in expected.items():
        assert relative_l2(found[name], value) < 1e-4, name


def test_activation_checkpointing(device: str) -> None:
    module = block(device)
    for bn in (module.bn1, module.bn2, module.bn3):
        bn.momentum = 1.0  # so that a second forward pass leaves the statistics where the first put them
    other = copy.deepcopy(module)
    x = torch.randn(2, 12, 5, 4, device=device)
    expected = gradients(module, x, "triton")
    found = gradients(other, x, "triton", lambda x: checkpoint(other, x, use_reentrant=False))
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, msg=name)


def checkpointed(module: nn.Module, x: Tensor) -> Tensor:
    return checkpoint(module, x, use_reentrant=False)  # type: ignore[no-any-return]


def pair(device: str) -> nn.Sequential:
    """A convolution and a block, which makes its input again from the convolution's output."""
    convolution = ConvBNReLU(3, 12, bias=False).to(device)
    both = nn.Sequential(convolution, block(device))
    for module in both.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0  # so that a second forward pass leaves the statistics where the first put them
    return both


@pytest.mark.parametrize("way", ["nested", "inner", "on the cpu"])
def test_hooks_on_saved_tensors(device: str, way: str) -> None:
    """Nested checkpoints and ``save_on_cpu`` decide what is stored; the block then saves its input unchanged."""
    both = pair(device)
    other = copy.deepcopy(both)
    x = torch.randn(2, 3, 5, 6, device=device)
    expected = gradients(both, x, "triton")

    def run(x: Tensor) -> Tensor:
        if way == "nested":
            return checkpointed(nn.Sequential(other[0], _Checkpointed(other[1])), x)
        if way == "inner":
            return checkpointed(other[1], other[0](x))
        with torch.autograd.graph.save_on_cpu():
            return other[1](other[0](x))

    found = gradients(other, x, "triton", run)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, msg=name)


class _Checkpointed(nn.Module):
    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        return checkpointed(self.module, x)


def test_a_stored_result_carries_nothing_along(device: str) -> None:
    """A small tensor makes a small file, without the convolution's output from which it can be made again."""
    with ops.use_backend("triton"):
        y = pair(device)[0](torch.randn(2, 3, 5, 6, device=device))
    assert y in _recompute._recipes
    file = io.BytesIO()
    torch.save(y, file)
    plain = io.BytesIO()
    torch.save(y.detach().clone(), plain)
    assert len(file.getvalue()) < 1.2 * len(plain.getvalue())
    file.seek(0)
    assert not vars(torch.load(file, weights_only=True))


class Calls(TorchDispatchMode):
    """Counts the dispatcher's operators by name."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        self.count[func._schema.name] += 1
        return func(*args, **(kwargs or {}))


def choose_gradients(monkeypatch: pytest.MonkeyPatch, backward: str | None) -> None:
    """Set FASTDEN_BACKWARD; None is the default, by kinds of convolutions."""
    if backward is None:
        monkeypatch.delenv("FASTDEN_BACKWARD")
    else:
        monkeypatch.setenv("FASTDEN_BACKWARD", backward)


@pytest.mark.parametrize("backward", [None, "kernels", "aten", "weight=aten", "input=kernels"])
def test_what_a_training_step_runs(device: str, monkeypatch: pytest.MonkeyPatch, backward: str | None) -> None:
    """The forward pass runs on kernels alone, and the gradients where they are faster, unless one way is asked for."""
    choose_gradients(monkeypatch, backward)
    model = random_network(composed=True).to(device).train()
    x = torch.rand(1, 3, 10, 14, device=device)
    with ops.use_backend("triton"), Calls() as forward:
        loss = model(x, 0.1).square().mean()
    assert forward.count["fastden::conv_bn_relu_statistics"] == 11
    assert not [name for name in forward.count if "conv" in name and "fastden::" not in name]
    with ops.use_backend("triton"), Calls() as calls:
        loss.backward()
    own = {name.removeprefix("fastden::"): count for name, count in calls.count.items() if "fastden::" in name}
    # Nine in three blocks, conv2, conv3, up2, the head's two, and the stem. conv3 and the head have two inputs, but
    # nothing needs the gradient of the image. Each block computes a convolution again.
    if backward == "kernels":
        assert (own["weight_gradient"], own["weight_gradient_stem"]) == (14, 1)
        assert (own["conv_bn_relu"], own["upsample"]) == (9 + 3 + 2 + 1 + 1, 1)
        # Of the whole step: the gradients of composing the weights are matrix products.
        assert not [name for name in calls.count if "conv" in name and "fastden::" not in name]
    elif backward == "aten":
        assert not {"weight_gradient", "weight_gradient_stem", "upsample"} & set(own)
        assert own["conv_bn_relu"] == 3
        # conv3 has one call for each source, the stem one for each region.
        assert calls.count["aten::convolution_backward"] == 9 + 1 + 2 + 1 + 2 + 4
    else:  # what is not named stays as by default
        inputs, weights = backward == "input=kernels", backward == "weight=aten"
        assert "weight_gradient" not in own
        assert own.get("weight_gradient_stem", 0) == (not weights)
        # On PyTorch by default: the inputs of conv2 and conv3.
        assert (own["conv_bn_relu"], own.get("upsample", 0)) == (9 + 3 + 1 + 1 + 2 * inputs, inputs)
        assert calls.count["aten::convolution_backward"] == 9 + 1 + 2 + 1 + 2 + 4 * weights


def test_a_malformed_choice_of_gradients(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTDEN_BACKWARD", "input=cudnn")
    x, weight = torch.randn(1, 2, 3, 3, device=device), torch.randn(2, 2, 1, 1, device=device)
    with pytest.raises(ValueError, match=r"FASTDEN_BACKWARD: 'input=cudnn'; accepted: aten, kernels, or input="):
        ops.conv_bn_relu(x, weight, backend="triton")


@pytest.mark.parametrize("backward", [None, "aten", "input=aten", "weight=aten"])
def test_a_block_of_every_choice(device: str, monkeypatch: pytest.MonkeyPatch, backward: str | None) -> None:
    """It stores little, and makes the sources of its weights' gradients again."""
    both = pair(device)
    other = copy.deepcopy(both)
    x = torch.randn(2, 3, 5, 6, device=device)
    expected = gradients(both, x, "torch")
    choose_gradients(monkeypatch, backward)
    for name, value in gradients(other, x, "triton").items():
        assert relative_l2(value, expected[name]) < 1e-4, name


def test_second_derivatives_are_refused(device: str) -> None:
    x = torch.randn(1, 3, 5, 4, device=device, requires_grad=True)
    weight = torch.randn(4, 3, 3, 3, device=device, requires_grad=True)
    y = ops.conv_bn_relu(x, weight, padding=1, backend="triton")
    (grad,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=r"convolution: second derivatives on kernels; accepted: first .* torch"):
        grad.square().sum().backward()
    y = ops.conv_bn_relu(x, weight, padding=1, backend="torch")
    (other,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    other.square().sum().backward()
    assert weight.grad is not None
    torch.testing.assert_close(grad, other)


def by_grad(function: Callable[[Tensor], Tensor], x: Tensor) -> None:
    (grad,) = torch.autograd.grad(function(x), x, create_graph=True)
    torch.autograd.grad((grad * torch.ones_like(grad)).sum(), x)


def by_penalty(function: Callable[[Tensor], Tensor], x: Tensor) -> None:
    loss = function(x)
    (grad,) = torch.autograd.grad(loss, x, create_graph=True)
    torch.autograd.grad(loss + grad.square().sum(), x)


def by_inputs(function: Callable[[Tensor], Tensor], x: Tensor) -> None:
    (grad,) = torch.autograd.grad(function(x), x, create_graph=True)
    grad.square().sum().backward(inputs=[x])


def by_hvp(function: Callable[[Tensor], Tensor], x: Tensor) -> None:
    torch.autograd.functional.hvp(function, x, torch.ones_like(x))


def one_operator(name: str, device: str) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    """An operator as a function of its first input, and that input."""

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, device=device)

    head = head_arguments(device)
    conv = random(4, 4, 3, 3)
    stem = random(4, 5, 4, 7, 7), random(4, 5)
    functions: dict[str, tuple[Callable[[Tensor], Tensor], Tensor]] = {
        "convolution": (lambda x: ops.conv_bn_relu(x, conv, padding=1), random(1, 4, 5, 6)),
        "two sources": (lambda x: ops.concat_conv_bn_relu(x[:, :1], x[:, 1:], conv, padding=1), random(1, 4, 5, 6)),
        "upsample": (partial(ops.upsample, weight=random(4, 5, 4, 4)), random(1, 4, 3, 2)),
        "stem": (lambda x: ops.stem(x, *stem), random(1, 4, 10, 12)),
        "stem in batch statistics": (
            lambda x: ops.stem(x, *stem, bn=ops.BatchNorm.of(normalisation(5, device, True))),
            random(2, 4, 10, 12),
        ),
        "head": (lambda x: ops.head(**head | {"features": x}), head["features"]),
        "batch statistics": (
            lambda x: ops.conv_bn_relu(x, conv, bn=ops.BatchNorm.of(normalisation(4, device, True)), padding=1),
            random(2, 4, 5, 6),
        ),
        "bottleneck": (block(device), random(2, 12, 5, 4)),
    }
    return functions[name]


OPERATORS = (
    *("convolution", "two sources", "upsample", "stem", "stem in batch statistics", "head", "batch statistics"),
    "bottleneck",
)


@pytest.mark.parametrize(
    ("name", "way"),
    [*((name, by_penalty) for name in OPERATORS), *(("convolution", way) for way in (by_grad, by_inputs, by_hvp))],
)
def test_second_derivatives_beside_other_paths_are_refused(device: str, name: str, way: Callable[..., None]) -> None:
    """Autograd skips what is on no way to the input, and the loss makes ways around the operator."""
    operator, x = one_operator(name, device)
    with ops.use_backend("triton"), pytest.raises(RuntimeError, match="second derivatives on kernels"):
        way(lambda x: operator(x).pow(3).sum() + x.pow(3).sum(), x.requires_grad_())


def test_second_derivatives_through_an_input_that_is_made_again(device: str) -> None:
    """The block stores no input that leads to the convolution; its weights' gradients depend on it all the same."""
    both = pair(device)
    x = torch.randn(2, 3, 5, 6, device=device, requires_grad=True)
    with ops.use_backend("triton"):
        y = both[0](x)
        assert y in _recompute._recipes
        z = both[1](y)
        (grad,) = torch.autograd.grad(z.sum(), both[1].reduce.weight, create_graph=True)
        with pytest.raises(RuntimeError, match="second derivatives on kernels"):
            torch.autograd.grad(grad.square().sum() + x.square().sum(), x)


def test_a_derivative_that_is_constant_has_no_second_one(device: str) -> None:
    """As with PyTorch's operations: it requires no gradient."""
    x, weight = torch.randn(1, 3, 5, 4, device=device), torch.randn(4, 3, 3, 3, device=device)
    bias = torch.randn(4, device=device, requires_grad=True)
    for backend in ("torch", "triton"):
        y = ops.conv_bn_relu(x, weight, bias, relu=False, backend=backend)
        (grad,) = torch.autograd.grad(y.sum(), bias, create_graph=True)
        assert not grad.requires_grad


@pytest.mark.parametrize("name", OPERATORS)
def test_a_graph_of_the_derivative_changes_no_bit_of_it(device: str, name: str) -> None:
    operator, x = one_operator(name, device)
    with ops.use_backend("triton"):
        loss = operator(x.requires_grad_()).pow(3).sum()
        (with_graph,) = torch.autograd.grad(loss, x, create_graph=True)
        (grad,) = torch.autograd.grad(loss, x)
    assert torch.equal(with_graph, grad)


def test_frozen_parts_get_no_gradient(device: str) -> None:
    model = random_network(composed=True).to(device).train()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith("res3"))
    with ops.use_backend("triton"):
        model(torch.rand(1, 3, 10, 14, device=device), 0.1).square().mean().backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == name.startswith("res3"), name


def test_gradient_scaler(device: str) -> None:
    module = block(device)
    optimizer = torch.optim.SGD(module.parameters(), 0.1)
    scaler = torch.amp.GradScaler(device, init_scale=2.0**10)
    before = [parameter.detach().clone() for parameter in module.parameters()]
    with ops.use_backend("triton"), torch.autocast(device, torch.float16):
        loss = module(torch.randn(2, 12, 5, 4, device=device)).float().square().mean()
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 2.0**10  # no step was left out
    assert all(not torch.equal(one, two) for one, two in zip(before, module.parameters(), strict=True))


def head_arguments(device: str, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    def random(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape, device=device) * scale).to(dtype)

    return {
        "features": random(2, 5, 3, 4),
        "x": random(2, 4, 10, 12),
        "weight": random(12, 5, 4, 4, scale=0.1),
        "image_weight": random(3, 4, 7, 7, scale=0.1),
        "bias": random(3),
    }


@pytest.mark.parametrize("options", [{}, {"clamp": True}, {"add_input": False}, {"clamp": True, "image": True}])
def test_head_gradients(device: str, options: dict[str, Any]) -> None:
    tensors = head_arguments(device)
    if "image" in options:
        options = {**options, "image": torch.rand(2, 3, 10, 12, device=device)}
    found = {}
    for backend in ("torch", "triton"):
        leaves = {name: tensor.clone().requires_grad_() for name, tensor in tensors.items()}
        extra = {
            name: value.clone().requires_grad_() if isinstance(value, Tensor) else value
            for name, value in options.items()
        }
        y = ops.head(**leaves, **extra, backend=backend)
        wanted = [*leaves.values(), *(value for value in extra.values() if isinstance(value, Tensor))]
        grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(2)).to(y)
        found[backend] = [y, *torch.autograd.grad(y, wanted, grad)]
    for one, other in zip(found["torch"], found["triton"], strict=True):
        assert relative_l2(other, one) < 1e-5


@pytest.mark.parametrize("clamp", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_head_corrects_a_float32_image(device: str, dtype: torch.dtype, clamp: bool) -> None:
    tensors = head_arguments(device, dtype)
    image = torch.rand(2, 3, 10, 12, device=device)
    found = ops.head(**tensors, image=image, clamp=clamp, backend="triton")
    wide = {name: tensor.float() for name, tensor in tensors.items()}
    expected = ops.head(**wide, image=image, clamp=clamp, backend="torch")
    assert found.dtype == torch.float32
    assert max_error(found, expected) < 1e-5


@pytest.mark.parametrize("name", ["stem", "head", "bottleneck"])
def test_dispatcher_operator(device: str, name: str) -> None:
    def random(*shape: int) -> Tensor:
        return torch.randn(shape, device=device)

    arguments: dict[str, tuple[Any, ...]] = {
        "stem": (random(2, 4, 10, 12), random(4, 5, 4, 7, 7), random(4, 5), True),
        "head": (*head_arguments(device).values(), torch.rand(2, 3, 10, 12, device=device), True, True, False),
        "bottleneck": (
            random(1, 6, 5, 4).contiguous(memory_format=torch.channels_last),
            *(random(2, 6, 1, 1), random(2, 2, 3, 3), random(6, 2, 1, 1), random(2), None, random(6)),
        ),
    }
    checks = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(getattr(torch.ops.fastden, name).default, arguments[name], test_utils=checks)


def test_vectors_need_not_be_contiguous(device: str) -> None:
    x, weight = torch.randn(1, 3, 5, 4, device=device), torch.randn(6, 3, 1, 1, device=device)
    table = torch.randn(6, 2, device=device)
    for bias in (table[:, 0], table[0, 0].expand(6)):
        found = ops.conv_bn_relu(x, weight, bias, backend="triton")
        assert max_error(found, ops.conv_bn_relu(x, weight, bias, backend="torch")) < 1e-5


def test_training_mode_without_gradients(device: str) -> None:
    """Such a pass finds BN statistics anew, for instance; it keeps nothing for a backward pass."""
    module = nn.Sequential(ConvBNReLU(3, 12, bias=False), block(device)).to(device)
    x = torch.randn(2, 3, 5, 6, device=device)
    with torch.no_grad():
        expected = copy.deepcopy(module)(x)
    for mode in (torch.no_grad, torch.inference_mode):
        other = copy.deepcopy(module)
        with mode(), ops.use_backend("triton"):
            first = other[0](x)
            assert first not in _recompute._recipes
            assert max_error(other[1](first), expected) < 1e-5


@pytest.mark.parametrize("composed", [False, True])
def test_an_empty_batch_trains_as_on_pytorchs_operations(device: str, composed: bool) -> None:
    model = random_network(composed=composed).to(device).train()
    state = {name: value.clone() for name, value in model.named_buffers() if value.is_floating_point()}
    with ops.use_backend("triton"):
        y = model(torch.rand(0, 3, 8, 8, device=device), 0.1)
        y.sum().backward()
    assert y.shape == (0, 3, 8, 8)
    assert all(not parameter.grad.any() for parameter in model.parameters() if parameter.grad is not None)
    assert all(torch.equal(value, state[name]) for name, value in model.named_buffers() if name in state)
