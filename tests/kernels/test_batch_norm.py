"""batch_norm on Triton: statistics, normalisation and gradient against float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from fastden.kernels import batch_norm
from tests.helpers import relative_l2
from tests.kernels.images import DTYPES
from tests.kernels.test_convolutions import random


@settings(max_examples=12)
@given(
    size=st.tuples(st.integers(1, 9), st.integers(1, 9)), batch=st.integers(1, 3), channels=st.integers(1, 40),
    residual=st.booleans(), relu=st.booleans(), dtype=st.sampled_from(DTYPES),
)  # fmt: skip
@example(size=(1, 2), batch=1, channels=1, residual=True, relu=True, dtype=torch.float32)
@example(size=(7, 9), batch=2, channels=33, residual=False, relu=True, dtype=torch.bfloat16)
def test_a_step(
    device: str, size: tuple[int, int], batch: int, channels: int, residual: bool, relu: bool, dtype: torch.dtype
) -> None:
    """What a training step does with a convolution's output, forward and backward, in three calls."""
    if batch * size[0] * size[1] < 2:
        return
    eps = 1e-3
    raw, other, grad = (
        random(device, batch, channels, *size, dtype=dtype).contiguous(memory_format=torch.channels_last)
        for _ in range(3)
    )
    weight, bias = random(device, channels), random(device, channels)
    mean, rstd, unbiased = torch.ops.fastden.batch_norm_statistics(raw, eps)
    wide = [value.double().requires_grad_() for value in (raw, other, weight, bias)]
    values = wide[0].detach().transpose(0, 1).flatten(1)
    torch.testing.assert_close(mean.double(), values.mean(1), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(unbiased.double(), values.var(1), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(rstd.double(), (values.var(1, correction=0) + eps).rsqrt(), rtol=1e-4, atol=0)

    y = torch.ops.fastden.batch_norm_affine(raw, mean, rstd, weight, bias, other if residual else None, relu)
    before = F.batch_norm(wide[0], None, None, wide[2], wide[3], True, eps=eps) + (wide[1] if residual else 0)
    unit, largest = torch.finfo(dtype).eps, float(before.detach().abs().max().clamp(min=1))
    exact = before.detach().clamp(min=0) if relu else before.detach()
    torch.testing.assert_close(y.double(), exact, rtol=unit, atol=1e-5 * largest)

    # The reference opens the ReLUs that are open in y: one that rounding opens would outweigh all other errors.
    expected = before * (y > 0) if relu else before
    found = torch.ops.fastden.batch_norm_gradient(
        grad, y if residual else None, raw, mean, rstd, weight, bias, relu, residual
    )
    references = torch.autograd.grad(expected, wide, grad.double(), allow_unused=True)
    for name, one, exact_one in zip(("raw", "residual", "weight", "bias"), found, references, strict=True):
        if exact_one is None:
            assert not one.numel(), name
            continue
        # Sums of float32 values cancel: their error goes with the gradient that is summed.
        error, scale = float((one.double() - exact_one).norm()), float(exact_one.norm())
        assert error <= unit * scale + 1e-5 * max(scale, float(grad.double().norm()) * largest), name


def test_the_mean_dwarfs_the_deviation(device: str) -> None:
    raw = (random(device, 2, 3, 16, 12) * 1e-2 + 100).contiguous(memory_format=torch.channels_last)
    mean, _, unbiased = torch.ops.fastden.batch_norm_statistics(raw, 1e-5)
    assert relative_l2(mean, raw.double().mean((0, 2, 3))) < 1e-6
    assert relative_l2(unbiased, raw.double().var((0, 2, 3))) < 1e-3


def test_statistics_of_more_tiles_than_a_step_holds(device: str) -> None:
    """As merged in float64; also those of the last tile, which has fewer rows."""
    block, eps, tiles, channels = 5, 1e-3, 2 * batch_norm.COMBINED_TILES + 3, batch_norm.COMBINED_CHANNELS + 1
    count = block * tiles - 2
    statistics = random(device, tiles, 2, channels)
    statistics[:, 0] += 30
    statistics[:, 1].abs_()
    rows = torch.full((tiles, 1), block, dtype=torch.float64, device=device)
    rows[-1] = block - 2
    means, squares = statistics.double().unbind(1)
    average = (means * rows).sum(0) / count
    total = squares.sum(0) + ((means - average).square() * rows).sum(0)
    mean, rstd, unbiased = batch_norm.combine(statistics, count, block, eps)
    torch.testing.assert_close(mean.double(), average, rtol=1e-6, atol=0)
    torch.testing.assert_close(unbiased.double(), total / (count - 1), rtol=1e-5, atol=0)
    torch.testing.assert_close(rstd.double(), (total / count + eps).rsqrt(), rtol=1e-5, atol=0)
    again = batch_norm.combine(statistics, count, block, eps)
    assert all(torch.equal(one, two) for one, two in zip((mean, rstd, unbiased), again, strict=True))


@pytest.mark.parametrize(
    ("rows", "block_rows", "block", "multiprocessors", "expected"),
    [
        (64 * 64 * 64, 64, 128, 132, 1024),  # a half-resolution layer of 64 crops of 128 x 128 on an H100: 256 programs
        (64 * 128 * 128, 256, 32, 132, 4096),
        (2160 * 3840, 32, 256, 132, 1024),  # as many as one sums at most
        (100, 256, 32, 132, 256),  # whole tiles
        (5000, 256, 32, 3, 1024),
        (0, 256, 32, 132, 256),
    ],
)
def test_rows_of_a_program_keep_all_multiprocessors_busy(
    rows: int, block_rows: int, block: int, multiprocessors: int, expected: int
) -> None:
    assert batch_norm.rows_of_program(rows, block_rows, block, multiprocessors) == expected


@pytest.mark.parametrize("multiprocessors", [1, 2, 5])
def test_gradient_is_that_of_any_number_of_programs(
    device: str, multiprocessors: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batch_norm, "multiprocessors", lambda x, interpreted: multiprocessors)
    raw, grad = (random(device, 1, 20, 61, 43).contiguous(memory_format=torch.channels_last) for _ in range(2))
    weight, bias = random(device, 20), random(device, 20)
    mean, rstd, _ = batch_norm.statistics(raw, 1e-5)
    found = batch_norm.affine_gradient(grad, None, raw, mean, rstd, weight, bias, relu=False, residual=False)
    wide = [value.double().requires_grad_() for value in (raw, weight, bias)]
    expected = torch.autograd.grad(F.batch_norm(wide[0], None, None, *wide[1:], training=True), wide, grad.double())
    for one, exact in zip((found[0], *found[2:]), expected, strict=True):
        assert relative_l2(one, exact) < 1e-5


@pytest.mark.parametrize("name", ["batch_norm_statistics", "batch_norm_affine", "batch_norm_gradient"])
def test_dispatcher_operator(device: str, name: str) -> None:
    x, vector = random(device, 2, 6, 5, 7).contiguous(memory_format=torch.channels_last), random(device, 6)
    arguments: dict[str, tuple[Any, ...]] = {
        "batch_norm_statistics": (x, 1e-5),
        "batch_norm_affine": (x, vector, vector, vector, vector, x, True),
        "batch_norm_gradient": (x, x, x, vector, vector.abs(), vector, vector, True, True),
    }
    checks = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(getattr(torch.ops.fastden, name).default, arguments[name], test_utils=checks)
