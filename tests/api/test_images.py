"""``fastden.denoise``: every kind of image in, the same kind out, all with the same values."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

import fastden
from fastden.images.codec import ImageFile, write_image
from tests.api.conftest import SIGMA, reference
from tests.helpers import random_network
from tests.image_files import ORIENTATION, encoded, exif, icc_profile, pixels


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float16, np.float32, np.float64])
def test_arrays_keep_dtype_and_shape(network: fastden.FusedDenoiser, dtype: Any) -> None:
    image = pixels(dtype=dtype)
    before = image.copy()
    result = fastden.denoise(image, SIGMA, model=network)
    assert (result.dtype, result.shape) == (image.dtype, image.shape)
    np.testing.assert_array_equal(image, before)
    full = 1 if image.dtype.kind == "f" else np.iinfo(dtype).max
    expected = reference(network, image.astype(np.float64) / full)
    if full == 1:
        assert np.abs(result - expected).max() < (1e-3 if dtype == np.float16 else 1e-5)
    else:
        expected = np.clip(expected * full, 0, full)
        assert np.abs(result - expected).max() < 0.5 + 1e-5 * full
    assert np.abs(result.astype(float) - image).max() > 0


def test_gray_is_the_mean_of_equal_channels(network: fastden.FusedDenoiser) -> None:
    gray = pixels(channels=1, dtype=np.float32)
    expected = reference(network, np.repeat(gray, 3, 2)).mean(2)
    np.testing.assert_allclose(fastden.denoise(gray, SIGMA, model=network)[:, :, 0], expected, atol=1e-6)
    np.testing.assert_allclose(fastden.denoise(gray[:, :, 0], SIGMA, model=network), expected, atol=1e-6)


def test_three_equal_channels_stay_equal(network: fastden.FusedDenoiser) -> None:
    gray = pixels(channels=1)
    expected = fastden.denoise(gray, SIGMA, model=network)
    for options in ({}, {"tile": 16}, {"chroma": 0.5}, {"quality": "best"}):
        result = fastden.denoise(np.repeat(gray, 3, 2), SIGMA, model=network, **options)
        assert (result == result[:, :, :1]).all(), options
    np.testing.assert_array_equal(fastden.denoise(np.repeat(gray, 3, 2), SIGMA, model=network)[:, :, :1], expected)


def test_gray_is_averaged_before_it_is_clipped(network: fastden.FusedDenoiser) -> None:
    image = np.random.default_rng(0).choice([0, 255], (16, 20)).astype(np.uint8)
    expected = reference(network, np.repeat(image[:, :, None] / 255, 3, 2)).mean(2) * 255
    assert (expected < -1).any()
    found = fastden.denoise(image, SIGMA, model=network, dtype="auto")
    np.testing.assert_array_equal(found, np.rint(np.clip(expected, 0, 255)))


def test_gray_network() -> None:
    network = fastden.fuse(fastden.Denoiser(image_channels=1).eval())
    gray = pixels(channels=1, dtype=np.float32)
    np.testing.assert_allclose(fastden.denoise(gray, SIGMA, model=network), reference(network, gray), atol=1e-6)
    with pytest.raises(ValueError, match="model is for gray images"):
        fastden.denoise(pixels(), SIGMA, model=network)


def test_alpha_is_untouched(network: fastden.FusedDenoiser) -> None:
    image = pixels(channels=4)
    result = fastden.denoise(image, SIGMA, model=network)
    np.testing.assert_array_equal(result[:, :, 3], image[:, :, 3])
    np.testing.assert_array_equal(result[:, :, :3], fastden.denoise(image[:, :, :3], SIGMA, model=network))


@pytest.mark.parametrize(
    "view",
    [
        lambda image: image[::-1, ::-1],
        lambda image: image[:, :, ::-1],
        lambda image: image.swapaxes(0, 1),
        lambda image: image.astype(">u2"),
        lambda image: np.broadcast_to(image[:1], image.shape),
    ],
)
def test_any_memory_layout(network: fastden.FusedDenoiser, view: Any) -> None:
    image = view(pixels(dtype=np.uint16))
    result = fastden.denoise(image, SIGMA, model=network)
    assert result.dtype == image.dtype
    np.testing.assert_array_equal(result, fastden.denoise(np.array(image, np.uint16, order="C"), SIGMA, model=network))


@pytest.mark.parametrize(
    ("dtype", "shape"),
    [
        (torch.float32, (3, 16, 20)),
        (torch.float64, (2, 3, 16, 20)),
        (torch.bfloat16, (1, 16, 20)),
        (torch.uint8, (2, 1, 16, 20)),
        (torch.uint16, (3, 16, 20)),
    ],
)
def test_tensors_keep_dtype_and_shape(
    network: fastden.FusedDenoiser, dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    values = np.random.default_rng(0).random(shape)
    full = {torch.uint8: 255, torch.uint16: 65535}.get(dtype, 1)
    image = torch.from_numpy(values * full).to(dtype)
    result = fastden.denoise(image, SIGMA, model=network)
    assert (result.dtype, result.shape, result.device) == (dtype, image.shape, image.device)
    batch = image.double().numpy().reshape(-1, *shape[-3:]) / full
    for one, found in zip(batch, result.double().numpy().reshape(-1, *shape[-3:]) / full, strict=True):
        planes = np.repeat(one, 3, 0) if shape[-3] == 1 else one
        expected = reference(network, planes.transpose(1, 2, 0)).transpose(2, 0, 1)
        expected = expected.mean(0, keepdims=True) if shape[-3] == 1 else expected
        if full > 1:
            expected = np.clip(expected, 0, 1)
        tolerance = {torch.uint8: 0.51 / 255, torch.bfloat16: 5e-3}.get(dtype, 2e-5)
        assert np.abs(found - expected).max() < tolerance


def test_a_tensor_with_gradient_gives_one_without(network: fastden.FusedDenoiser) -> None:
    image = torch.rand(3, 16, 16, requires_grad=True)
    result = fastden.denoise(image, SIGMA, model=network)
    assert not result.requires_grad
    assert not result.is_inference()


@pytest.mark.parametrize("mode", ["L", "LA", "RGB", "RGBA", "I;16", "F", "1", "P"])
def test_pil_images_keep_mode_and_info(network: fastden.FusedDenoiser, mode: str) -> None:
    if mode == "I;16":
        image = Image.fromarray(pixels(channels=0, dtype=np.uint16))
    elif mode == "F":
        image = Image.fromarray(pixels(channels=0, dtype=np.float32))
    elif mode == "LA":
        image = Image.merge("LA", [Image.fromarray(pixels(channels=0, seed=seed)) for seed in (0, 1)])
    elif mode == "RGBA":
        image = Image.fromarray(pixels(channels=4))
    else:
        image = Image.fromarray(pixels()).convert(mode)
    image.info["icc_profile"] = b"profile"
    result = fastden.denoise(image, SIGMA, model=network)
    assert isinstance(result, Image.Image)
    assert result.mode == {"1": "L", "P": "RGB"}.get(mode, mode)
    assert result.size == image.size
    assert result.info["icc_profile"] == b"profile"
    if mode in ("LA", "RGBA"):
        np.testing.assert_array_equal(np.asarray(result.getchannel("A")), np.asarray(image.getchannel("A")))
    plain = image.convert({"1": "L", "P": "RGB"}[mode]) if mode in ("1", "P") else image
    expected = fastden.denoise(np.array(plain)[:, :, :1] if mode == "LA" else np.array(plain), SIGMA, model=network)
    found = np.asarray(result)
    np.testing.assert_array_equal(found[:, :, :1] if mode == "LA" else found, expected)


def test_transparent_palette(network: fastden.FusedDenoiser) -> None:
    image = Image.fromarray(pixels()).quantize(16)
    image.info["transparency"] = 3
    result = fastden.denoise(image, SIGMA, model=network)
    assert result.mode == "RGBA"
    assert "transparency" not in result.info


@pytest.mark.parametrize(("mode", "key"), [("L", 128), ("RGB", (1, 2, 3)), ("1", 0), ("I;16", 7)])
def test_a_transparent_colour_becomes_alpha(network: fastden.FusedDenoiser, mode: str, key: Any) -> None:
    sixteen = mode == "I;16"
    image = Image.fromarray(pixels(channels=0, dtype=np.uint16)) if sixteen else Image.fromarray(pixels()).convert(mode)
    if not sixteen:
        image.paste(key, (0, 0, 10, 32))
    image.info["transparency"] = key
    result = fastden.denoise(image, 50, model=network)
    assert "transparency" not in result.info
    assert result.mode == {"RGB": "RGBA", "I;16": "I;16"}.get(mode, "LA")
    if not sixteen:
        alpha = np.asarray(image.convert("RGBA" if mode == "RGB" else "LA").getchannel("A"))
        assert (alpha[:, :10] == 0).all()
        assert alpha.max() == 255
        np.testing.assert_array_equal(np.asarray(result.getchannel("A")), alpha)


def test_paths_give_upright_arrays(network: fastden.FusedDenoiser, tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(encoded(pixels(), "PNG", exif=exif(6), icc_profile=icc_profile()))
    result = fastden.denoise(path, SIGMA, model=network)
    assert result.shape == (40, 32, 3)
    np.testing.assert_array_equal(result, fastden.denoise(np.rot90(pixels(), -1), SIGMA, model=network))
    np.testing.assert_array_equal(fastden.denoise(str(path), SIGMA, model=network), result)


@pytest.mark.parametrize(
    ("channels", "alpha", "shape"), [(1, False, (32, 40)), (1, True, (32, 40, 2)), (3, True, (32, 40, 4))]
)
def test_paths_of_gray_and_alpha(
    network: fastden.FusedDenoiser, tmp_path: Path, channels: int, alpha: bool, shape: tuple[int, ...]
) -> None:
    path = tmp_path / "a.png"
    transparency = pixels(channels=0, dtype=np.uint16, seed=1) if alpha else None
    write_image(path, ImageFile(pixels(channels=channels, dtype=np.uint16), transparency, bits=16))
    result = fastden.denoise(path, SIGMA, model=network)
    assert (result.shape, result.dtype) == (shape, np.uint16)
    if alpha:
        np.testing.assert_array_equal(result[:, :, -1], transparency)


def test_tiles_give_the_same_result_and_report_progress(network: fastden.FusedDenoiser) -> None:
    image = pixels(70, 90, dtype=np.float32)
    calls: list[tuple[int, int]] = []
    tiled = fastden.denoise(
        image, SIGMA, model=network, tile=32, progress=lambda done, total: calls.append((done, total))
    )
    np.testing.assert_allclose(tiled, fastden.denoise(image, SIGMA, model=network, tile=None), atol=1e-5)
    assert calls[-1] == (6300, 6300)
    assert len(calls) == 9
    small = fastden.denoise(image, SIGMA, model=network, max_memory="8MiB")
    np.testing.assert_allclose(small, tiled, atol=1e-5)
    for number in (np.int64(32), np.uint8(32)):
        np.testing.assert_array_equal(fastden.denoise(image, SIGMA, model=network, tile=number), tiled)
    np.testing.assert_array_equal(fastden.denoise(image, SIGMA, model=network, max_memory=np.int64(8 << 20)), small)
    # Images that are denoised one by one are parts of one whole.
    calls.clear()
    batch = torch.from_numpy(image).permute(2, 0, 1)
    batch = torch.stack([batch, 0.01 * batch])
    fastden.denoise(batch, SIGMA, model=network, progress=lambda done, total: calls.append((done, total)))
    assert calls == [(6300, 12600), (12600, 12600)]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=15)
@given(
    height=st.integers(1, 21),
    width=st.integers(1, 21),
    channels=st.sampled_from([0, 1, 3, 4]),
    dtype=st.sampled_from([np.uint8, np.uint16, np.float32]),
)
def test_any_size(network: fastden.FusedDenoiser, height: int, width: int, channels: int, dtype: Any) -> None:
    image = pixels(height, width, channels, dtype)
    result = fastden.denoise(image, model=network)
    assert (result.shape, result.dtype) == (image.shape, image.dtype)
    assert np.isfinite(result).all()


@pytest.mark.gpu
def test_cuda_matches_the_cpu() -> None:
    model = random_network()
    image = pixels(70, 90, dtype=np.float32)
    expected = fastden.denoise(image, SIGMA, model=model, dtype="float32", device="cpu")
    found = fastden.denoise(image, SIGMA, model=model, dtype="float32", device="cuda", tile=32)
    assert np.abs(found - expected).max() < 1e-3
    tensor = torch.from_numpy(image).permute(2, 0, 1).cuda()
    assert fastden.denoise(tensor, SIGMA, model=model, device="cuda").device == tensor.device


def test_the_file_tag_is_not_lost_from_pil(network: fastden.FusedDenoiser, tmp_path: Path) -> None:
    path = tmp_path / "a.jpg"
    path.write_bytes(encoded(pixels(), "JPEG", exif=exif(6)))
    result = fastden.denoise(Image.open(path), SIGMA, model=network)
    assert result.getexif()[ORIENTATION] == 6
    assert result.size == (40, 32)
