"""stem on Triton: against the reference in float64, on every pixel of the border and in every layout of the image."""

from __future__ import annotations

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastden import ops
from tests.kernels.images import DTYPES, amid_nan, assert_as_exact_as_eager, image_in

kernels = pytest.importorskip("fastden.kernels.stem")
SMALL = kernels.StemConfig(block_m=16, block_n=16, warps=4, stages=2)


def arguments(
    device: str,
    size: tuple[int, int],
    batch: int = 1,
    channels: int = 3,
    outputs: int = 5,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor, Tensor]:
    """x, weight, bias; the four sets of weights differ everywhere, unlike composed ones."""
    x = torch.rand(batch, channels, *size)
    weight = torch.randn(4, outputs, channels, 7, 7) / (49 * channels) ** 0.5
    return tuple(value.to(device, dtype) for value in (x, weight, torch.randn(4, outputs)))  # type: ignore[return-value]


def check(y: Tensor, inputs: tuple[Tensor, Tensor, Tensor], relu: bool = True) -> None:
    assert_as_exact_as_eager(y, ops.stem, inputs, relu=relu)
    assert y.is_contiguous(memory_format=torch.channels_last)


@settings(max_examples=12)
@given(
    size=st.tuples(st.integers(4, 9), st.integers(4, 9)),
    batch=st.integers(1, 2),
    channels=st.integers(1, 4),
    outputs=st.integers(1, 20),
    relu=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    config=st.sampled_from([None, SMALL]),
)
@example((4, 4), 1, 1, 1, True, torch.bfloat16, None)
@example((9, 7), 2, 4, 17, False, torch.float16, SMALL)
@example((5, 12), 3, 3, 5, True, torch.float32, SMALL)
def test_against_the_reference(
    device: str,
    size: tuple[int, int],
    batch: int,
    channels: int,
    outputs: int,
    relu: bool,
    dtype: torch.dtype,
    config: kernels.StemConfig | None,
) -> None:
    inputs = arguments(device, (2 * size[0], 2 * size[1]), batch, channels, outputs, dtype)
    assert kernels.why_not(*inputs) == []
    check(kernels.stem(*inputs, relu=relu, config=config), inputs, relu)


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("layout", ["channels last", "sliced", "expanded", "transposed"])
def test_any_layout(device: str, layout: str, channels: int) -> None:
    _, weight, bias = arguments(device, (12, 10), 2, channels)
    x = image_in(layout, channels, device)
    check(kernels.stem(x, weight, bias, config=SMALL), (x, weight, bias))


def test_nan_shows_where_the_reference_shows_it(device: str) -> None:
    for place in ((0, 0), (3, 0), (0, 5), (7, 9)):
        x, weight, bias = arguments(device, (12, 14))
        x[0, 1, place[0], place[1]] = float("nan")
        expected = ops.stem(x, weight, bias, backend="torch").isnan()
        assert expected.any()
        assert torch.equal(kernels.stem(x, weight, bias).isnan(), expected)


def test_nan_beside_the_image_is_not_read(device: str) -> None:
    x, weight, bias = arguments(device, (10, 12), 2)
    assert torch.equal(kernels.stem(amid_nan(x), weight, bias), kernels.stem(x, weight, bias))


def test_empty_batch(device: str) -> None:
    x, weight, bias = arguments(device, (8, 12), batch=0)
    assert kernels.stem(x, weight, bias).shape == (0, 5, 2, 4)


def test_why_not(device: str) -> None:
    x, weight, bias = arguments(device, (8, 8))
    assert "H and W even" in kernels.why_not(x[:, :, :7], weight, bias)[0]
    assert kernels.why_not(x[:, :, :6], weight, bias)
    assert "weight" in kernels.why_not(x[:, :2], weight, bias)[0]
    assert "bias" in kernels.why_not(x, weight, bias[:, :1])[0]
