"""bottleneck on Triton: near the reference in every storage type, at every shape, in both forms."""

from __future__ import annotations

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastden import ops
from fastden.kernels import bottleneck as kernel
from fastden.kernels.bottleneck import BottleneckConfig, bottleneck, config_for, why_not
from tests.kernels.images import DTYPES
from tests.rounding import assert_as_exact, slack

# Tiles of 4 x 4 pixels, so that small images have several; two interpreted programs share them.
FUSED = BottleneckConfig(block_m=16, warps=4, stages=2, fused=True)
SPLIT = BottleneckConfig(block_m=16, warps=4, stages=2, fused=False)
Inputs = tuple[Tensor, Tensor, Tensor, Tensor, tuple[Tensor | None, Tensor | None, Tensor | None]]


def inputs(
    batch: int,
    channels: int,
    middle: int,
    size: tuple[int, int],
    dtype: torch.dtype,
    device: str,
    biases: tuple[bool, bool, bool] = (True, True, True),
) -> Inputs:
    def random(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape) * scale).to(device, dtype)

    x = random(batch, channels, *size)
    reduce = random(middle, channels, 1, 1, scale=channels**-0.5)
    conv = random(middle, middle, 3, 3, scale=(9 * middle) ** -0.5)
    expand = random(channels, middle, 1, 1, scale=middle**-0.5)
    sizes = (middle, middle, channels)
    return x, reduce, conv, expand, tuple(random(n) if has else None for n, has in zip(sizes, biases, strict=True))


def exact(given: Inputs) -> Tensor:
    *tensors, biases = given
    return ops.bottleneck(
        *(tensor.double() for tensor in tensors),
        biases=tuple(None if bias is None else bias.double() for bias in biases),
    )


def check(given: Inputs, config: BottleneckConfig | None) -> None:
    """At most twice eager's largest error, apart from rounding."""
    x, reduce, conv, expand, biases = given
    y = bottleneck(x, reduce, conv, expand, biases, config)
    assert y.is_contiguous(memory_format=torch.channels_last)
    expected = exact(given)
    eager = ops.bottleneck(x, reduce, conv, expand, biases=biases)
    unit = slack(ops.bottleneck, x, reduce, conv, expand, biases=biases, exact=expected, dtype=x.dtype)
    assert_as_exact(y, eager, expected, unit, borders=False)


@settings(max_examples=12)
@given(
    batch=st.integers(1, 3),
    channels=st.integers(1, 40),
    middle=st.integers(1, 20),
    size=st.tuples(st.integers(1, 11), st.integers(1, 11)),
    dtype=st.sampled_from(DTYPES),
    biases=st.tuples(st.booleans(), st.booleans(), st.booleans()),
    config=st.sampled_from((FUSED, SPLIT)),
)
@example(2, 5, 3, (1, 1), torch.float32, (True, True, True), FUSED)
@example(1, 130, 70, (5, 7), torch.float16, (True, True, True), FUSED)
@example(1, 130, 70, (5, 7), torch.float16, (True, True, True), SPLIT)
@example(2, 16, 16, (11, 13), torch.bfloat16, (False, False, False), FUSED)
def test_error_is_at_most_twice_that_of_eager(
    device: str,
    batch: int,
    channels: int,
    middle: int,
    size: tuple[int, int],
    dtype: torch.dtype,
    biases: tuple[bool, bool, bool],
    config: BottleneckConfig,
) -> None:
    torch.manual_seed(0)
    check(inputs(batch, channels, middle, size, dtype, device, biases), config)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("channels", "middle"), [(128, 32), (256, 64)])
def test_networks_sizes_by_default(channels: int, middle: int, dtype: torch.dtype, device: str) -> None:
    check(inputs(1, channels, middle, (9, 17), dtype, device), None)


@pytest.mark.parametrize(("channels", "middle"), [(128, 32), (256, 64)])
def test_configurations_of_large_images(channels: int, middle: int, device: str) -> None:
    check(inputs(1, channels, middle, (18, 17), torch.float16, device), config_for(channels, middle, 1 << 20, 2))


def test_several_tiles_a_program(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two programs for 24 tiles, on a GPU too: each writes its scratch again while its threads may still read it."""
    monkeypatch.setattr(kernel, "multiprocessors", lambda x, interpreted: 1)
    check(inputs(1, 32, 16, (24, 15), torch.bfloat16, device), FUSED)


@pytest.mark.parametrize("config", [FUSED, SPLIT])
def test_the_reduced_map_is_padded_with_zeros(config: BottleneckConfig, device: str) -> None:
    """The padding is not relu(bias), the value of a reduced pixel outside the image."""
    x, reduce, conv, expand, biases = inputs(1, 16, 16, (5, 6), torch.float32, device)
    assert biases[0] is not None
    biases[0].fill_(100.0)
    check((x, reduce, conv, expand, biases), config)


@pytest.mark.parametrize("config", [FUSED, SPLIT])
def test_nan_stays_and_reaches_its_neighbours_alone(config: BottleneckConfig, device: str) -> None:
    x, reduce, conv, expand, biases = inputs(2, 16, 16, (9, 6), torch.float32, device)
    x[1, 3, 4, 4] = torch.nan
    y = bottleneck(x, reduce, conv, expand, biases, config)
    found = y.isnan().any(1)
    assert found.nonzero().tolist() == [[1, row, column] for row in (3, 4, 5) for column in (3, 4, 5)]
    assert y[1, :, 4, 4].isnan().all()


@pytest.mark.parametrize("config", [FUSED, SPLIT])
def test_any_memory_layout(config: BottleneckConfig, device: str) -> None:
    x, reduce, conv, expand, biases = inputs(2, 16, 16, (5, 6), torch.float32, device)
    expected = bottleneck(x, reduce, conv, expand, biases, config)
    wide = torch.full((2, 16, 7, 9), torch.nan, device=device)
    view = wide[:, :, 1:6, 2:8]
    view.copy_(x)
    spread = conv.transpose(0, 1).contiguous().transpose(0, 1)
    last = x.contiguous(memory_format=torch.channels_last)
    for source, weight in ((view, conv), (last, spread), (x.transpose(2, 3).contiguous().transpose(2, 3), conv)):
        before = source.clone()
        y = bottleneck(source, reduce, weight, expand, biases, config)
        assert torch.equal(y, expected)
        assert torch.equal(source, before)
        assert y.data_ptr() != source.data_ptr()


def test_tf32_is_off_where_torch_has_it_off(device: str) -> None:
    given = inputs(1, 32, 16, (6, 6), torch.float32, device)
    with torch.backends.cudnn.flags(allow_tf32=False):
        y = bottleneck(*given, FUSED)
    assert (y.double() - exact(given)).abs().max() < 1e-5


@pytest.mark.parametrize("config", [None, SPLIT])
@pytest.mark.parametrize("shape", [(0, 16, 4, 4), (1, 16, 0, 4), (1, 16, 4, 0)])
def test_nothing_of_nothing(shape: tuple[int, int, int, int], config: BottleneckConfig | None, device: str) -> None:
    _, reduce, conv, expand, biases = inputs(1, 16, 16, (1, 1), torch.float32, device)
    assert bottleneck(torch.empty(shape, device=device), reduce, conv, expand, biases, config).shape == shape


def test_reasons_against() -> None:
    def reasons(channels: int, middle: int, kernel: int = 3, inner: int | None = None) -> list[str]:
        inner = channels if inner is None else inner
        x, reduce = torch.empty(1, inner, 2, 2), torch.empty(middle, channels, 1, 1)
        return why_not(x, reduce, torch.empty(middle, middle, kernel, kernel), torch.empty(channels, middle, 1, 1))

    assert reasons(7, 128) == []
    assert reasons(256, 200) == ["M: 200; accepted: 1 up to 128"]
    assert reasons(8, 4, kernel=5) == ["conv: (4, 4, 5, 5); accepted: (4, 4, 3, 3)"]
    assert reasons(8, 4, inner=9) == ["x: (1, 9, 2, 2); accepted: (1, 8, 2, 2)"]


def test_tiles_hold_their_pixels() -> None:
    for power in range(4, 9):
        height, width = BottleneckConfig(1 << power, warps=4, stages=2, fused=True).tile
        assert height * width == 1 << power
        assert height <= width
