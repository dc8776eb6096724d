"""Convolution by tensor descriptors on Triton: as exact as the default form on all tensors that they describe."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from triton import language as tl

from fastden import ops
from fastden.kernels import _conv, _descriptors
from fastden.kernels._conv import chosen_config, launch_conv
from fastden.kernels._tiles import ONE_WAVE, ConvConfig, config_for
from fastden.kernels.concat_conv_bn_relu import DESCRIBED, concat_conv_bn_relu
from fastden.kernels.conv_bn_relu import conv_bn_relu
from tests.kernels.images import DTYPES
from tests.kernels.test_convolutions import assert_as_exact_as_eager, random

# Tiles of 4 x 4 pixels, so that small images have several.
SMALL = ConvConfig(block_m=16, block_n=16, block_k=16, warps=4, stages=2, descriptors=True)
sizes = st.tuples(st.integers(1, 9), st.integers(1, 9))


@pytest.fixture(autouse=True)
def bulk_copies(device: str) -> None:
    if device == "cuda" and torch.cuda.get_device_capability() < _descriptors.CAPABILITY:
        pytest.skip("no bulk copies before compute capability 9.0")


def by_descriptors(
    operator: Callable[..., Tensor], kernel: Callable[..., Tensor], config: ConvConfig
) -> Callable[..., Tensor]:
    def run(backend: str, **arguments: Any) -> Tensor:
        return operator(**arguments, backend="torch") if backend == "torch" else kernel(**arguments, config=config)

    return run


@settings(max_examples=10)
@given(
    size=sizes, batch=st.integers(0, 3), channels=st.sampled_from([8, 16, 24, 40]), outputs=st.integers(1, 20),
    kernel=st.sampled_from([1, 3, 5]), bias=st.booleans(), residual=st.booleans(), relu=st.booleans(),
    dtype=st.sampled_from(DTYPES),
)  # fmt: skip
@example((1, 1), 1, 8, 1, 3, True, True, True, torch.bfloat16)
@example((7, 9), 2, 24, 19, 3, True, True, True, torch.float32)
def test_conv_bn_relu(
    device: str, size: tuple[int, int], batch: int, channels: int, outputs: int, kernel: int, bias: bool,
    residual: bool, relu: bool, dtype: torch.dtype,
) -> None:  # fmt: skip
    tensors = {
        "x": random(device, batch, channels, *size, dtype=dtype),
        "weight": random(device, outputs, channels, kernel, kernel, dtype=dtype) / (channels * kernel**2) ** 0.5,
        "bias": random(device, outputs, dtype=dtype) if bias else None,
        "residual": random(device, batch, outputs, *size, dtype=dtype) if residual else None,
    }
    run = by_descriptors(ops.conv_bn_relu, conv_bn_relu, SMALL)
    assert_as_exact_as_eager(run, tensors, relu=relu, padding=kernel // 2)


@settings(max_examples=8)
@given(
    size=sizes, batch=st.integers(1, 2), a=st.sampled_from([8, 24, 32]), b=st.sampled_from([8, 16, 40]),
    outputs=st.integers(1, 20), padding=st.integers(0, 2), dtype=st.sampled_from(DTYPES),
)  # fmt: skip
@example((7, 5), 2, 24, 8, 19, 1, torch.bfloat16)
@example((3, 3), 1, 8, 40, 5, 0, torch.float16)
def test_concat_conv_bn_relu(
    device: str, size: tuple[int, int], batch: int, a: int, b: int, outputs: int, padding: int, dtype: torch.dtype
) -> None:
    height, width = (max(side, 3 - 2 * padding) for side in size)
    tensors = {
        "a": random(device, batch, a, height, width, dtype=dtype),
        "b": random(device, batch, b, height, width, dtype=dtype),
        "weight": random(device, outputs, a + b, 3, 3, dtype=dtype) / (9 * (a + b)) ** 0.5,
        "bias": random(device, outputs, dtype=dtype),
    }
    run = by_descriptors(ops.concat_conv_bn_relu, concat_conv_bn_relu, SMALL)
    assert_as_exact_as_eager(run, tensors, padding=padding)


@pytest.mark.parametrize("config", DESCRIBED, ids=str)
def test_tiles_for_the_network(device: str, config: ConvConfig) -> None:
    tensors = {
        "a": random(device, 1, 128, 9, 17, dtype=torch.bfloat16),
        "b": random(device, 1, 32, 9, 17, dtype=torch.bfloat16),
        "weight": random(device, 256, 160, 3, 3, dtype=torch.bfloat16) / 40,
        "bias": random(device, 256, dtype=torch.bfloat16),
    }
    assert_as_exact_as_eager(by_descriptors(ops.concat_conv_bn_relu, concat_conv_bn_relu, config), tensors)


def test_nan_reaches_its_neighbours_alone(device: str) -> None:
    x = random(device, 2, 24, 6, 7)
    x[1, 3, 3, 3] = float("nan")
    y = conv_bn_relu(x, random(device, 5, 24, 3, 3), padding=1, config=SMALL)
    assert y[1, :, 2:5, 2:5].isnan().all()
    assert y.isnan().sum() == 5 * 9


@pytest.mark.parametrize(
    ("change", "chosen"),
    [
        ({}, True),
        ({"found": (8, 0)}, False),
        ({"found": (10, 0)}, False),
        ({"found": None}, False),
        ({"dtype": torch.float16}, False),
        ({"dtype": torch.float32}, False),
        ({"outputs": 128}, False),
        ({"pixels": ONE_WAVE - 1}, False),
        ({"stride": 2}, False),
        ({"phases": 4}, False),
        ({"statistics": True}, False),
    ],
    ids=str,
)
def test_a_measured_tile_is_the_default_where_it_was_measured(
    device: str, change: dict[str, Any], chosen: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    values: dict[str, Any] = {"found": (9, 0), "dtype": torch.bfloat16, "outputs": 256, "pixels": ONE_WAVE} | change
    found, dtype, outputs, pixels = (values.pop(name) for name in ("found", "dtype", "outputs", "pixels"))
    monkeypatch.setattr(_conv, "capability", lambda x: found)
    monkeypatch.setattr(_conv, "precision", lambda x: "ieee")
    a, b = (torch.zeros(1, channels, 2, 2, dtype=dtype, device=device) for channels in (128, 32))
    weight = torch.zeros(outputs, 160, 3, 3, dtype=dtype, device=device)
    config = chosen_config(a, b, weight, pixels, **values)
    plain = config_for(128, outputs, pixels, dtype.itemsize, "ieee")
    assert config == (DESCRIBED[1] if chosen else plain)
    # A view that begins elsewhere has no descriptor.
    odd = torch.zeros(129 * 4, dtype=dtype, device=device)[1 : 1 + 128 * 4].view(1, 128, 2, 2)
    assert chosen_config(odd, b, weight, pixels, **values) == plain


class TestRefusals:
    def test_channels(self, device: str) -> None:
        x, weight = random(device, 1, 12, 4, 4).bfloat16(), random(device, 8, 12, 1, 1).bfloat16()
        message = r"config: descriptors=True; accepted: False here \(a: 12 channels; accepted: a multiple of 8; weight"
        with pytest.raises(ValueError, match=message):
            conv_bn_relu(x, weight, config=SMALL)
        assert conv_bn_relu(x.float(), weight.float(), config=SMALL).shape == (1, 8, 4, 4)

    def test_alignment(self, device: str) -> None:
        memory = random(device, 8 * 16 + 1)
        x = memory[1:].view(1, 4, 4, 8).permute(0, 3, 1, 2)
        (reason,) = _descriptors.why_not(x, None, random(device, 8, 8, 1, 1))
        assert reason.startswith("a: begins at 0x")
        assert reason.endswith("4; accepted: a multiple of 16 bytes")

    @pytest.mark.parametrize("other", [{"stride": 2}, {"phases": 4}, {"statistics": True}], ids=str)
    def test_other_convolutions(self, device: str, other: dict[str, int]) -> None:
        x, weight = random(device, 1, 8, 4, 4), random(device, *([4] if "phases" in other else []), 8, 8, 2, 2)
        with pytest.raises(ValueError, match=r"accepted: stride 1, 1 phase, no statistics"):
            launch_conv(x, None, weight, None, None, relu=False, config=SMALL, **other)  # type: ignore[arg-type]

    def test_device(self, monkeypatch: pytest.MonkeyPatch) -> None:
        x, weight = torch.rand(1, 8, 4, 4), torch.rand(8, 8, 1, 1)
        monkeypatch.setattr(_descriptors, "INTERPRETED", tl.constexpr(False))
        assert _descriptors.why_not(x, None, weight) == ["device: cpu; accepted: cuda"]
        monkeypatch.setattr(torch.Tensor, "is_cuda", True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
        (reason,) = _descriptors.why_not(x, None, weight)
        assert reason == "device: compute capability 8.6; accepted: 9.0 or later"

    def test_gpus_by_amd(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """An MI200 has the capability of an H100 and no bulk copies: neither they nor the tile measured there."""
        a, b = (torch.zeros(1, channels, 2, 2, dtype=torch.bfloat16) for channels in (128, 32))
        weight = torch.zeros(256, 160, 3, 3, dtype=torch.bfloat16)
        monkeypatch.setattr(_conv, "precision", lambda x: "ieee")
        monkeypatch.setattr(_conv, "choose", lambda kernel, key, pixels, x, default: default)
        monkeypatch.setattr(torch.Tensor, "is_cuda", True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
        assert chosen_config(a, b, weight, ONE_WAVE).descriptors
        monkeypatch.setattr(torch.version, "hip", "6.4.43482")
        assert _descriptors.why_not(a, b, weight) == ["device: a GPU of AMD; accepted: one of NVIDIA"]
        assert chosen_config(a, b, weight, ONE_WAVE) == config_for(128, 256, ONE_WAVE, 2, "ieee")
