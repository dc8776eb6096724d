"""batch_norm: the state of a module, the epilogue of operators on PyTorch, and shapes that its operators refuse."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from fastden import ops
from fastden.ops import batch_norm
from tests.helpers import max_error
from tests.ops import naive
from tests.ops.test_conv_bn_relu import random, random_bn


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"track_running_stats": False}, "bn: track_running_stats=False; accepted: True"),
        ({"momentum": None}, r"bn: momentum=None \(a cumulative average\); accepted: a number"),
        ({"affine": False}, "bn: affine=False; accepted: True"),
    ],
)
def test_unusable_module(arguments: dict[str, None], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ops.BatchNorm.of(nn.BatchNorm2d(2, **arguments))


def test_statistics_of_all_processes_are_refused() -> None:
    module = nn.SyncBatchNorm(2)
    with pytest.raises(ValueError, match=r"bn: SyncBatchNorm in training; accepted: BatchNorm2d, or SyncBatchNorm in"):
        ops.BatchNorm.of(module)
    assert not ops.BatchNorm.of(module.eval()).training


def test_a_batch_is_counted_once_in_training() -> None:
    module = nn.BatchNorm2d(2)
    assert ops.BatchNorm.of(module).training
    assert module.num_batches_tracked == 1
    ops.BatchNorm.of(module.eval())
    assert module.num_batches_tracked == 1


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("relu", [False, True])
def test_finish(training: bool, residual: bool, relu: bool) -> None:
    module = random_bn(4, training)
    twin = copy.deepcopy(module)
    x, other = random(3, 4, 5, 2), random(3, 4, 5, 2)
    y = batch_norm.finish(x.clone(), ops.BatchNorm.of(module), other if residual else None, relu)
    expected = twin(x) + other if residual else twin(x)
    assert max_error(y, expected.clamp(min=0) if relu else expected) < 1e-12
    for (name, value), wanted in zip(module.named_buffers(), twin.buffers(), strict=True):
        assert torch.equal(value, wanted), name
    mean, var = naive.statistics(x)
    formula = naive.batch_norm(x, module.weight, module.bias, mean, var, module.eps)
    assert not training or max_error(twin(x), formula) < 1e-12


@pytest.mark.parametrize("values", [0, 1])
def test_too_few_values(values: int) -> None:
    with pytest.raises(ValueError, match=rf"bn: {values} values a channel in the batch; accepted .*: 2 or more"):
        batch_norm.check_values(values)


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        (
            "batch_norm_affine",
            ((1, 4, 3, 3), *[(5,)] * 4, None, True),
            r"mean: shape \(5,\); accepted: as many as chan",
        ),
        ("batch_norm_affine", ((1, 4, 3, 3), *[(4,)] * 4, (1, 4, 3, 2), True), r"residual: shape \(1, 4, 3, 2\)"),
        (
            "batch_norm_gradient",
            ((1, 4, 3, 2), None, (1, 4, 3, 3), *[(4,)] * 4, True, False),
            r"grad: shape \(1, 4, 3, 2\); accepted: that of raw",
        ),
    ],
)
def test_shapes_that_do_not_fit(name: str, arguments: tuple[Any, ...], message: str) -> None:
    """The kernel would read beyond these; traced code meets the shape function alone."""
    with FakeTensorMode():
        values: list[Tensor | bool | None] = [torch.empty(x) if isinstance(x, tuple) else x for x in arguments]
        with pytest.raises(RuntimeError, match=message):
            getattr(torch.ops.fastden, name)(*values)
