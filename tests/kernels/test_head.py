"""head on Triton: against the reference in float64, on every border, for any group of pixels and layout of inputs."""

from __future__ import annotations

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastden import algebra, ops
from tests.kernels.images import DTYPES, amid_nan, assert_as_exact_as_eager, image_in

kernels = pytest.importorskip("fastden.kernels.head")
Inputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def small(group: int) -> kernels.HeadConfig:
    return kernels.HeadConfig(block_m=16, block_n=64, block_k=16, group=group, warps=4, stages=2)


def arguments(
    device: str,
    size: tuple[int, int],
    batch: int = 1,
    channels: tuple[int, int] = (4, 3),
    maps: int = 5,
    dtype: torch.dtype = torch.float32,
) -> Inputs:
    """features, x, weight, image_weight, bias; ``size`` of the features, ``channels`` of the input and the image."""
    c, k = channels
    values = (
        torch.randn(batch, maps, *size),
        torch.rand(batch, c, 2 * size[0] + 4, 2 * size[1] + 4),
        torch.randn(4 * k, maps, 4, 4) / (16 * maps) ** 0.5,
        torch.randn(k, c, 7, 7) / (49 * c) ** 0.5,
        torch.randn(k),
    )
    return tuple(value.to(device, dtype) for value in values)  # type: ignore[return-value]


def composed_arguments(device: str, size: tuple[int, int], channels: tuple[int, int] = (4, 3)) -> Inputs:
    """:func:`arguments` with weights that are composed, hence zero on 7 of 16 taps."""
    features, x, *_ = arguments(device, size, 2, channels)
    c, k = channels
    shapes = (3, c, 5, 5), (3,), (5, 2, 4, 4), (2,), (k, 5, 3, 3), (k,)
    factors = (torch.randn(shape) / max(1, torch.Size(shape[1:]).numel()) ** 0.5 for shape in shapes)
    weights = algebra.compose_head(*factors)
    return (features, x, *(value.to(device) for value in weights))  # type: ignore[return-value]


def check(y: Tensor, inputs: Inputs, add_input: bool = True) -> None:
    assert_as_exact_as_eager(y, ops.head, inputs, add_input=add_input)
    assert y.is_contiguous()


@settings(max_examples=12)
@given(
    size=st.tuples(st.integers(2, 6), st.integers(2, 6)),
    batch=st.integers(1, 2),
    channels=st.sampled_from([(1, 1), (2, 1), (3, 3), (4, 3), (4, 4)]),
    maps=st.integers(1, 17),
    add_input=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    group=st.sampled_from([None, 1, 2, 3]),
)
@example((2, 2), 1, (4, 3), 5, True, torch.bfloat16, None)
@example((6, 5), 2, (4, 3), 17, True, torch.float16, 1)
@example((4, 6), 2, (3, 3), 5, False, torch.float32, 3)
def test_against_the_reference(
    device: str,
    size: tuple[int, int],
    batch: int,
    channels: tuple[int, int],
    maps: int,
    add_input: bool,
    dtype: torch.dtype,
    group: int | None,
) -> None:
    inputs = arguments(device, size, batch, channels, maps, dtype)
    assert kernels.why_not(*inputs) == []
    config = None if group is None else small(group)
    check(kernels.head(*inputs, add_input=add_input, config=config), inputs, add_input)


@pytest.mark.parametrize(
    ("size", "channels", "group"),
    [((4, 5), (4, 3), 1), ((2, 2), (4, 3), 2), ((5, 4), (4, 3), 2), ((4, 4), (1, 1), 3), ((3, 5), (1, 1), 4)],
)
def test_composed_weights_need_nine_taps(
    device: str, size: tuple[int, int], channels: tuple[int, int], group: int
) -> None:
    inputs = composed_arguments(device, size, channels)
    check(kernels.head(*inputs, composed=True, config=small(group)), inputs)


@pytest.mark.parametrize(
    ("layout", "channels"),
    [
        ("channels last", (1, 1)),
        ("channels last", (3, 3)),
        ("channels last", (4, 3)),
        ("sliced", (4, 3)),
        ("expanded", (3, 3)),
        ("transposed", (4, 3)),
    ],
)
def test_any_layout(device: str, layout: str, channels: tuple[int, int]) -> None:
    features, _, *weights = arguments(device, (4, 3), 2, channels)
    x = image_in(layout, channels[0], device)
    if layout == "channels last":
        features = features.contiguous(memory_format=torch.channels_last)
    inputs = (features, x, *weights)
    check(kernels.head(*inputs, config=small(2)), inputs)  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_the_image_keeps_its_precision(device: str, dtype: torch.dtype) -> None:
    """Weights of zero return the image as it was, though the products would round it."""
    features, x, *weights = arguments(device, (4, 5), batch=2)
    image = x[:, :3].contiguous(memory_format=torch.channels_last)
    rounded = (features.to(dtype), x.to(dtype), *(torch.zeros_like(value, dtype=dtype) for value in weights))
    y = kernels.head(*rounded, image=image, out_dtype=torch.float32, config=small(2))
    assert y.dtype == torch.float32
    assert torch.equal(y, image[:, :, 3:-3, 3:-3])


def test_clamp(device: str) -> None:
    inputs = arguments(device, (5, 4))
    expected = kernels.head(*inputs, config=small(2)).clamp(0, 1)
    assert expected.min() == 0
    assert expected.max() == 1
    assert torch.equal(kernels.head(*inputs, clamp=True, config=small(2)), expected)


@pytest.mark.parametrize(("clamp", "group"), [(False, 1), (True, 2)])
def test_nan_is_not_hidden(device: str, clamp: bool, group: int) -> None:
    """NaN appears wherever the reference has it, and elsewhere only in the same groups."""
    for argument, place in ((0, (2, 5)), (1, (0, 0)), (1, (7, 15))):
        inputs = arguments(device, (4, 8))
        inputs[argument][0, 1, place[0], place[1]] = float("nan")
        expected = ops.head(*inputs, backend="torch").isnan()
        shown = kernels.head(*inputs, clamp=clamp, config=small(group)).isnan()
        assert expected.any()
        assert shown[expected].all()
        near = torch.nn.functional.max_pool2d(expected.float(), 4 * group - 1, 1, 2 * group - 1) > 0
        assert not shown[~near].any()


def test_nan_beside_the_image_is_not_read(device: str) -> None:
    features, x, *weights = composed_arguments(device, (3, 5))
    for composed in (False, True):
        y = kernels.head(features, amid_nan(x), *weights, composed=composed, config=small(2))
        assert torch.equal(y, kernels.head(features, x, *weights, composed=composed, config=small(2)))


def test_empty_batch(device: str) -> None:
    assert kernels.head(*arguments(device, (3, 4), batch=0)).shape == (0, 3, 4, 6)


def test_why_not(device: str) -> None:
    features, x, weight, image_weight, bias = arguments(device, (3, 4))
    assert "x:" in kernels.why_not(features, x[..., 1:], weight, image_weight, bias)[0]
    assert "features" in kernels.why_not(features[..., 1:], x, weight, image_weight, bias)[0]
    assert "image_weight" in kernels.why_not(features, x[:, :3], weight, image_weight, bias)[0]
    assert "weight" in kernels.why_not(features, x, weight[1:], image_weight, bias)[0]
    assert "bias" in kernels.why_not(features, x, weight, image_weight, bias[1:])[0]
