"""The blocks as modules: equal to the layers that they hold, in training and evaluation, with the same states."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import fastden
from fastden.nn import Bottleneck, ConcatConvBNReLU, ConvBNReLU, Upsample
from tests.helpers import max_error

Plain = Callable[..., Tensor]


def conv_bn_relu() -> tuple[nn.Module, Plain, list[Tensor]]:
    block = ConvBNReLU(3, 5, kernel_size=5, stride=2, bias=False)
    return block, lambda x: block.bn(block.conv(x)).relu(), [torch.randn(2, 3, 9, 8)]


def with_residual() -> tuple[nn.Module, Plain, list[Tensor]]:
    block = ConvBNReLU(3, 5, relu=False)
    return block, lambda x, r: block.bn(block.conv(x)) + r, [torch.randn(2, 3, 6, 7), torch.randn(2, 5, 6, 7)]


def concat() -> tuple[nn.Module, Plain, list[Tensor]]:
    block = ConcatConvBNReLU(3, 2, 5, kernel_size=1)
    parts = [torch.randn(2, 3, 6, 7), torch.randn(2, 2, 6, 7)]
    return block, lambda a, b: block.bn(block.conv(torch.cat([a, b], 1))).relu(), parts


def bottleneck() -> tuple[nn.Module, Plain, list[Tensor]]:
    block = Bottleneck(6, 2)

    def plain(x: Tensor) -> Tensor:
        y = block.bn1(block.reduce(x)).relu()
        y = block.bn2(block.conv(y)).relu()
        return (x + block.bn3(block.expand(y))).relu()

    return block, plain, [torch.randn(2, 6, 5, 4)]


def upsample() -> tuple[nn.Module, Plain, list[Tensor]]:
    block = Upsample(3, 5)
    return block, lambda x: nn.functional.conv_transpose2d(x, block.weight, block.bias, 2, 1), [torch.randn(2, 3, 4, 5)]


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("make", [conv_bn_relu, with_residual, concat, bottleneck, upsample])
def test_equals_its_layers(make: Callable[[], tuple[nn.Module, Plain, list[Tensor]]], training: bool) -> None:
    block, plain, inputs = make()
    block.train(training)
    expected = plain(*inputs)
    statistics = {name: value.clone() for name, value in block.named_buffers()}
    if training:  # both calls start from the same running statistics
        for module in block.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.reset_running_stats()
    found = block(*inputs)
    assert max_error(found, expected) < 1e-6
    for name, value in block.named_buffers():
        torch.testing.assert_close(value, statistics[name], msg=name)
    found.sum().backward()
    assert all(parameter.grad is not None for parameter in block.parameters())


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("make", [with_residual, bottleneck, conv_bn_relu, concat, upsample])
def test_a_hook_changes_no_dtype_under_autocast(
    make: Callable[[], tuple[nn.Module, Plain, list[Tensor]]], training: bool
) -> None:
    block, _, inputs = make()
    hooked = copy.deepcopy(block.train(training))
    for module in (hooked, *hooked.children()):
        module.register_forward_hook(lambda *_: None)
    with torch.autocast("cpu", torch.bfloat16):
        found, expected = block(*inputs), hooked(*inputs)
    assert found.dtype == expected.dtype == torch.bfloat16
    assert max_error(found.float(), expected.float()) < 0.05


def test_in_another_network() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.down = fastden.nn.ConvBNReLU(3, 8, stride=2)
            self.middle = fastden.nn.Bottleneck(8, 4)
            self.up = fastden.nn.Upsample(8, 4)
            self.join = fastden.nn.ConcatConvBNReLU(3, 4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.join(x, self.up(self.middle(self.down(x))))

    net, x = Net(), torch.randn(2, 3, 8, 12)
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled.eval()(x), net.eval()(x))
    other = Net()
    other.load_state_dict(net.state_dict())
    assert torch.equal(other.eval()(x), net(x))


def test_prints_what_it_is() -> None:
    assert "Upsample(8, 4, bias=True)" in repr(Upsample(8, 4))
