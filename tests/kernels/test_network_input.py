"""The network's input in one pass: the same bits as PyTorch's operations, step by step."""

from __future__ import annotations

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

import fastden
from fastden import ops
from fastden.inference.tiling import OwnScale, denoise_tiled
from fastden.kernels.network_input import network_input
from fastden.network.fused import FusedDenoiser
from fastden.network.inputs import Sigma, map_or_curve, noise_level
from fastden.network.level import BRIGHTNESS_RADIUS, KNOTS
from fastden.network.padding import pad_image, padding_for
from tests.helpers import max_error, random_network
from tests.kernels.images import DTYPES, image_in

#: What an image may bring: nothing, numbers, maps of any layout, and curves.
LEVELS = ("none", "number", "numbers", "map", "one map", "curve", "curves", "curve in half precision")


def level_of(kind: str, x: Tensor) -> Sigma:
    n, _, height, width = x.shape
    return {
        "none": lambda: None,
        "number": lambda: 0.1,
        "numbers": lambda: torch.rand(n, device=x.device),
        "map": lambda: torch.rand(n, 1, width, height, device=x.device).transpose(2, 3),
        "one map": lambda: torch.rand(1, 1, height, width, device=x.device),
        "curve": lambda: torch.rand(1, KNOTS, device=x.device),
        "curves": lambda: torch.rand(n, KNOTS, device=x.device),
        "curve in half precision": lambda: torch.rand(1, KNOTS, device=x.device).half(),
    }[kind]()


def tolerance(x: Tensor, dtype: torch.dtype) -> dict[str, float]:
    """None, but where the interpreter cuts bits off that PyTorch rounds, and on a GPU, whose mean multiplies."""
    if x.dtype == torch.bfloat16:
        return {"rtol": 2**-7, "atol": 7 * 2**-8}  # brightness, too: of the eight knots the next is 1/7 away
    if dtype == torch.bfloat16:
        return {"rtol": 2**-7, "atol": 0.0}
    return {"rtol": 0.0, "atol": 0.0} if x.device.type == "cpu" else {"rtol": 1e-3, "atol": 1e-6}


def assert_same_bits(x: Tensor, kind: str, dtype: torch.dtype) -> None:
    sigma, wanted = level_of(kind, x), kind != "none"
    level = noise_level(x, sigma, wanted)
    image = pad_image(x)
    expected = image if level is None else torch.cat([image, pad_image(level)], 1)
    padding = padding_for(x.shape[2]), padding_for(x.shape[3])
    y, of_image = network_input(x, map_or_curve(x, sigma, wanted), dtype, *padding, BRIGHTNESS_RADIUS)
    torch.testing.assert_close(y, expected.to(dtype), equal_nan=True, **tolerance(x, dtype))
    torch.testing.assert_close(of_image[:, : x.shape[1]], image, rtol=0, atol=0, equal_nan=True)
    assert of_image.dtype == x.dtype
    assert (of_image is y) == (x.dtype == dtype)


@settings(max_examples=15)
@given(
    size=st.tuples(st.integers(1, 19), st.integers(1, 23)),
    batch=st.integers(0, 2),
    kind=st.sampled_from(LEVELS),
    of_image=st.sampled_from(DTYPES),
    of_network=st.sampled_from(DTYPES),
)
@example(size=(1, 1), batch=1, kind="curve", of_image=torch.float32, of_network=torch.bfloat16)
@example(size=(13, 18), batch=2, kind="curves", of_image=torch.float32, of_network=torch.float32)
@example(size=(3, 2), batch=2, kind="map", of_image=torch.bfloat16, of_network=torch.bfloat16)
def test_same_bits(
    device: str, size: tuple[int, int], batch: int, kind: str, of_image: torch.dtype, of_network: torch.dtype
) -> None:
    # Noise leaves [0, 1], and so does brightness.
    x = (torch.rand(batch, 3, *size, device=device) * 1.6 - 0.3).to(of_image)
    assert_same_bits(x, kind, of_network)


@pytest.mark.parametrize("layout", ["channels last", "sliced", "expanded", "transposed"])
def test_any_layout(device: str, layout: str) -> None:
    assert_same_bits(image_in(layout, 3, device), "curves", torch.bfloat16)


def test_nan_and_infinity_show_where_they_are(device: str) -> None:
    x = torch.rand(1, 3, 12, 17, device=device)
    x[0, 1, 5, 6] = float("nan")
    x[0, 2, 0, 16] = float("inf")
    assert_same_bits(x, "curve", torch.float32)


def test_of_a_window_the_margin_is_left_out(device: str) -> None:
    """With negative padding, brightness is that of the pixels around, as of a tile of a larger image."""
    x, curve = torch.rand(1, 3, 14, 15, device=device), torch.rand(1, KNOTS, device=device)
    y, _ = network_input(x, curve, torch.float32, (-4, -3), (-2, -5), BRIGHTNESS_RADIUS)
    level = noise_level(x, curve, True)
    assert level is not None
    torch.testing.assert_close(y, torch.cat([x, level], 1)[:, :, 4:-3, 2:-5])
    half, image = network_input(x, curve, torch.float16, (-4, -3), (-2, -5), BRIGHTNESS_RADIUS)
    torch.testing.assert_close(half, y.half())
    # The image needs no padding, so nothing is copied.
    assert torch.equal(image, x[:, :, 4:-3, 2:-5])
    assert image.untyped_storage().data_ptr() == x.untyped_storage().data_ptr()


@pytest.mark.parametrize("kind", ["none", "number", "map", "curve", "curve on an own scale"])
def test_tiles_use_it(device: str, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """Each tile's input is what PyTorch's operations make of it, and these are not called."""
    seen: list[tuple[Tensor, Tensor]] = []

    def operators(self: FusedDenoiser, x: Tensor, image: Tensor, backend: str | None) -> Tensor:
        seen.append((x, image[:, :3]))
        return image[:, :3, 3:-3, 3:-3]

    def never(*_: object) -> Tensor:
        raise AssertionError("an operation of PyTorch makes the level")

    monkeypatch.setattr(FusedDenoiser, "_operators", operators)
    monkeypatch.setattr(FusedDenoiser, "_onednn_network", lambda self: None)
    fused = fastden.fuse(random_network(noise_level_input=kind != "none").to(device), torch.float16)
    image = torch.randint(0, 256, (1, 3, 41, 38), dtype=torch.uint8)
    sigma = level_of(kind.removesuffix(" on an own scale"), image.float())
    scale = OwnScale(0.1, 0.5, (-0.1, 1.2)) if kind.endswith("scale") else None
    with ops.use_backend("torch"):
        expected = denoise_tiled(fused, image, sigma, tile=16, scale=scale)
    with ops.use_backend("triton"), monkeypatch.context() as patched:
        patched.setattr("fastden.inference.tiling.level_inside", never)
        patched.setattr("fastden.inference.tiling.noise_level", never)
        result = denoise_tiled(fused, image, sigma, tile=16, scale=scale)
    assert torch.equal(result, expected)
    assert len(seen) == 2 * 9
    for (x, own), (y, other) in zip(seen[:9], seen[9:], strict=True):
        torch.testing.assert_close(y, x, **tolerance(own, torch.float16))
        assert torch.equal(other, own)


@pytest.mark.parametrize(
    ("dtype", "kind"), [(torch.float32, "none"), (torch.bfloat16, "map"), (torch.bfloat16, "curve")]
)
def test_fused_network_uses_it(device: str, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, kind: str) -> None:
    fused = fastden.fuse(random_network(noise_level_input=kind != "none").to(device), dtype)
    x = torch.rand(1, 3, 9, 6, device=device)
    sigma = level_of(kind, x)
    calls = []
    monkeypatch.setattr("fastden.network.fused.pad_image", lambda x: calls.append(x) or pad_image(x))
    with ops.use_backend("triton"), torch.no_grad():
        y = fused(x, sigma)
        assert not calls
        level = noise_level(x, sigma, kind != "none")
        padded = pad_image(x if level is None else torch.cat([x, level], 1))
        other = fused.forward_padded(padded)[:, :, :9, :6]
        assert max_error(y, other) < (1e-5 if dtype == torch.float32 else 0.05 * float(other.abs().max()))
    assert y.dtype == torch.float32
    # Gradients, and other backends, take PyTorch's operations.
    with ops.use_backend("triton"):
        fused(x.clone().requires_grad_(), sigma).sum().backward()
    assert len(calls) == 1
    with ops.use_backend("torch"), torch.no_grad():
        fused(x, sigma)
    assert len(calls) == 2
