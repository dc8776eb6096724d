"""``fastden.denoise``: every kind of image in, the same kind out, all with the same values."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

import fastden
from fastden import UserError
from fastden.images.codec import ImageFile, write_image
from tests.helpers import random_network
from tests.image_files import ORIENTATION, encoded, exif, icc_profile, pixels

SIGMA = 20.0


@pytest.fixture(scope="module")
def network() -> fastden.FusedDenoiser:
    return fastden.fuse(fastden.Denoiser().eval())


@pytest.fixture(scope="module")
def blind() -> fastden.FusedDenoiser:
    return fastden.fuse(fastden.Denoiser(noise_level_input=False).eval())


def reference(network: fastden.FusedDenoiser, values: Any, sigma: Any = SIGMA / 255) -> Any:
    """The network on float values (H, W, 3), all at once."""
    x = torch.from_numpy(np.ascontiguousarray(values, np.float32)).permute(2, 0, 1)[None]
    with torch.no_grad():
        return network(x, sigma)[0].permute(1, 2, 0).numpy()


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


def test_larger_files_are_refused(network: fastden.FusedDenoiser, tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(encoded(pixels(), "PNG"))
    with pytest.raises(UserError, match=r"a\.png: 40 x 32 pixels; accepted: at most .* \(max_pixels; "):
        fastden.denoise(path, SIGMA, model=network, max_pixels=32 * 40 - 1)
    assert fastden.denoise(path, SIGMA, model=network, max_pixels=32 * 40).shape == (32, 40, 3)


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


def test_sigma_forms_agree(network: fastden.FusedDenoiser) -> None:
    image = pixels(dtype=np.float32)
    expected = reference(network, image)
    level_map = np.full(image.shape[:2], SIGMA)
    for sigma in (
        SIGMA,
        int(SIGMA),
        np.float32(SIGMA),
        np.array(SIGMA),
        torch.tensor(SIGMA),
        level_map,
        torch.from_numpy(level_map),
    ):
        np.testing.assert_allclose(fastden.denoise(image, sigma, model=network), expected, atol=1e-6)


def test_sigma_maps_and_batches(network: fastden.FusedDenoiser) -> None:
    batch = torch.rand(2, 3, 16, 20)
    levels = torch.tensor([5.0, 60.0])
    result = fastden.denoise(batch, levels, model=network)
    for index in (0, 1):
        alone = fastden.denoise(batch[index], float(levels[index]), model=network)
        torch.testing.assert_close(result[index], alone, rtol=0, atol=1e-5)
    maps = levels.view(2, 1, 1, 1).expand(2, 1, 16, 20)
    torch.testing.assert_close(fastden.denoise(batch, maps, model=network), result, rtol=0, atol=1e-5)
    for form in ([5, 60], (5.0, 60.0), levels[:, None], levels.view(2, 1, 1, 1).numpy()):
        assert torch.equal(fastden.denoise(batch, form, model=network), result)
    for form in ([60], [[60]], torch.full((1, 1, 1, 1), 60.0)):  # one for all
        assert torch.equal(fastden.denoise(batch, form, model=network)[1], result[1])
    half = np.zeros((16, 20), np.float32)
    half[:, 10:] = 50
    image = batch[0].permute(1, 2, 0).numpy()
    with torch.no_grad():
        expected = network(batch[:1], torch.from_numpy(half / 255)[None, None])[0].permute(1, 2, 0).numpy()
    np.testing.assert_allclose(fastden.denoise(image, half, model=network), expected, atol=1e-6)


def test_auto_sigma_is_the_estimate(network: fastden.FusedDenoiser) -> None:
    image = pixels(64, 64, dtype=np.uint8)
    estimate = fastden.estimate_noise(image)
    assert estimate.decided
    np.testing.assert_array_equal(
        fastden.denoise(image, model=network), fastden.denoise(image, estimate, model=network)
    )
    batch = torch.from_numpy(np.stack([image, image // 2])).permute(0, 3, 1, 2)
    found = fastden.denoise(batch, model=network)
    for index in (0, 1):
        assert (found[index].int() - fastden.denoise(batch[index], model=network).int()).abs().max() <= 1


def test_blind_models_estimate_nothing_and_take_no_number(blind: fastden.FusedDenoiser) -> None:
    image = pixels(dtype=np.float32)
    np.testing.assert_allclose(fastden.denoise(image, model=blind), reference(blind, image, None), atol=1e-6)
    for sigma in (25, np.full(image.shape[:2], 25.0)):
        with pytest.raises(ValueError, match=r"sigma: .*blind"):
            fastden.denoise(image, sigma, model=blind)


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
@pytest.mark.parametrize("channels", [1, 3])
def test_strength_scales_the_level(network: fastden.FusedDenoiser, dtype: Any, channels: int) -> None:
    image = pixels(channels=channels, dtype=dtype)
    np.testing.assert_array_equal(fastden.denoise(image, SIGMA, model=network, strength=0), image)
    for strength in (0.5, 1.5, 2.0):
        scaled = fastden.denoise(image, SIGMA, model=network, strength=strength)
        expected = fastden.denoise(image, SIGMA * strength, model=network)
        np.testing.assert_allclose(scaled, expected, atol=1e-6 if dtype == np.float32 else 1)
    curve = fastden.NoiseEstimate(tuple(10.0 + index for index in range(8)), 13.5, 0.5)
    twice = fastden.NoiseEstimate(tuple(2 * level for level in curve.sigmas), 27.0, 0.5)
    scaled = fastden.denoise(image, curve, model=network, strength=2)
    expected = fastden.denoise(image, twice, model=network)
    np.testing.assert_allclose(scaled, expected, atol=1e-5 if dtype == np.float32 else 1)


@pytest.mark.parametrize("kind", ["array", "path", "PIL", "tensor"])
def test_a_level_of_the_scale_0_to_1_for_8_bits(network: fastden.FusedDenoiser, kind: str, tmp_path: Path) -> None:
    array = pixels(dtype=np.uint8)
    Image.fromarray(array).save(tmp_path / "a.png")
    image = {
        "array": array,
        "path": tmp_path / "a.png",
        "PIL": Image.fromarray(array),
        "tensor": torch.from_numpy(array).permute(2, 0, 1),
    }[kind]
    with pytest.warns(fastden.ScaleWarning, match=r"sigma: 0\.098, .* less than the rounding of 8 bits") as told:
        fastden.denoise(image, 25 / 255, model=network)
    assert [one.filename for one in told] == [__file__]


def test_small_levels_that_are_meant(network: fastden.FusedDenoiser, monkeypatch: pytest.MonkeyPatch) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fastden.denoise(pixels(dtype=np.float32), 0.1, model=network)
        fastden.denoise(pixels(dtype=np.uint16), 0.1, model=network)
        for sigma in (0, 0.5, 25, np.full((20, 30), 0.1)):
            fastden.denoise(np.zeros((20, 30, 3), np.uint8), sigma, model=network)
        monkeypatch.setenv("FASTDEN_SCALE_WARNING", "0")
        fastden.denoise(pixels(dtype=np.uint8), 0.1, model=network)


def test_a_blind_model_blends(blind: fastden.FusedDenoiser) -> None:
    image = pixels(dtype=np.float32)
    full = fastden.denoise(image, model=blind)
    half = fastden.denoise(image, model=blind, strength=0.5)
    np.testing.assert_allclose(half, (image + full) / 2, atol=1e-6)
    with pytest.raises(ValueError, match=r"strength: 1.5, but this model is blind .*; accepted: 0 to 1"):
        fastden.denoise(image, model=blind, strength=1.5)


def test_chroma_has_a_strength_of_its_own(network: fastden.FusedDenoiser) -> None:
    """Luma comes from one result, the colour differences from the other."""
    image = pixels(dtype=np.float32)
    weights = np.array([0.299, 0.587, 0.114], np.float32)
    both = fastden.denoise(image, SIGMA, model=network, strength=0.5, chroma=2.0)
    fine = fastden.denoise(image, SIGMA, model=network, strength=0.5)
    strong = fastden.denoise(image, SIGMA, model=network, strength=2.0)
    np.testing.assert_allclose(both @ weights, fine @ weights, atol=1e-5)
    np.testing.assert_allclose(both - both[..., :1], strong - strong[..., :1], atol=1e-5)
    same = fastden.denoise(image, SIGMA, model=network, strength=0.5, chroma=0.5)
    np.testing.assert_array_equal(same, fine)
    tiled = fastden.denoise(image, SIGMA, model=network, strength=0.5, chroma=2.0, tile=16)
    np.testing.assert_allclose(tiled, both, atol=1e-5)


def test_best_is_the_mean_of_eight(network: fastden.FusedDenoiser) -> None:
    """The sides are 2 above a multiple of 4, so padding is equal on all sides; tiles change nothing."""
    image = pixels(38, 46, dtype=np.float32)
    best = fastden.denoise(image, SIGMA, model=network, quality="best")
    total = np.zeros_like(image)
    for turns in range(4):
        for flip in (False, True):
            moved = np.rot90(image, turns)
            done = fastden.denoise(np.ascontiguousarray(moved[:, ::-1] if flip else moved), SIGMA, model=network)
            total += np.rot90(done[:, ::-1] if flip else done, -turns)
    np.testing.assert_allclose(best, total / 8, atol=1e-5)
    large = pixels(70, 90, dtype=np.float32)
    whole = fastden.denoise(large, SIGMA, model=network, quality="best", tile=None)
    np.testing.assert_allclose(fastden.denoise(large, SIGMA, model=network, quality="best", tile=32), whole, atol=1e-5)


def test_the_default_model_for_a_given_sigma() -> None:
    """Where none is given, the noise chooses: ``test_chosen_model.py``."""
    image = pixels(20, 20, dtype=np.uint8)
    for sigma in (20, [20], np.array([20])):
        np.testing.assert_array_equal(fastden.denoise(image, sigma), fastden.denoise(image, 20, model="color"))


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


@pytest.mark.parametrize(
    ("image", "error", "message"),
    [
        (pixels(channels=2), ValueError, r"image: shape \(32, 40, 2\); accepted"),
        (pixels(channels=5), ValueError, r"image: shape \(32, 40, 5\)"),
        (np.zeros((3, 0, 3), np.uint8), ValueError, "at least 1"),
        (np.zeros((2, 3, 4, 3), np.uint8), ValueError, "image: shape"),
        (np.zeros((8, 8, 3), np.int64), TypeError, "image: dtype int64; accepted"),
        (np.zeros((8, 8, 3), bool), TypeError, "image: dtype bool"),
        (np.zeros((8, 8, 3), np.complex64), TypeError, "image: dtype complex64"),
        (np.full((8, 8, 3), np.nan, np.float32), ValueError, "NaN or infinity"),
        (np.full((8, 8, 3), -np.inf), ValueError, "NaN or infinity"),
        (np.full((8, 8, 3), 128.0), ValueError, r"128 to 128; accepted: the scale \[0, 1\]"),
        (torch.zeros(8, 8, 3), ValueError, "image: shape"),
        (torch.zeros(0, 3, 8, 8), ValueError, "image: shape"),
        (torch.zeros(3, 8, 8, dtype=torch.int32), TypeError, "image: dtype torch.int32"),
        (torch.full((3, 8, 8), torch.nan), ValueError, "NaN or infinity"),
        (Image.new("CMYK", (8, 8)), TypeError, "PIL mode CMYK; accepted"),
        ([[1, 2], [3, 4]], TypeError, "image: list; accepted: a path"),
        (np.full((8, 8), 1e300), ValueError, r"values from 1e\+300 to 1e\+300; accepted: the scale"),
        (torch.zeros(3, 8, 8).to_sparse(), TypeError, "image: a tensor of another kind .*accepted: a dense tensor"),
        (torch.zeros(3, 8, 8, device="meta"), TypeError, "image: a tensor of another kind .meta"),
        ("name\0.png", UserError, "cannot be read: embedded null"),
        (np.ma.array([1.0, 2.0], mask=[0, 1]), ValueError, r"image: shape \(2,\); accepted"),
        (None, TypeError, "image: NoneType"),
    ],
)
def test_wrong_images(network: fastden.FusedDenoiser, image: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        fastden.denoise(image, SIGMA, model=network)


def test_missing_path(network: fastden.FusedDenoiser, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"missing.png: cannot be read: No such file"):
        fastden.denoise(tmp_path / "missing.png", model=network)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"sigma": -1}, ValueError, "sigma: -1; accepted"),
        ({"sigma": 256}, ValueError, "sigma: 256; accepted"),
        ({"sigma": float("nan")}, ValueError, "sigma: nan"),
        ({"sigma": "high"}, TypeError, "sigma: 'high'; accepted"),
        ({"sigma": None}, TypeError, "sigma: NoneType"),
        ({"sigma": True}, TypeError, "sigma: True; accepted"),
        ({"sigma": np.array("a")}, TypeError, "sigma: an array of dtype <U1; accepted"),
        ({"sigma": np.full((32, 40), 3 + 4j)}, TypeError, "sigma: an array of dtype complex128"),
        ({"sigma": np.ones((32, 40), bool)}, TypeError, "sigma: an array of dtype bool"),
        ({"sigma": [1, 2, 3]}, ValueError, r"sigma: shape \(3,\); accepted: a number, \(32, 40\), \(1,\)"),
        ({"sigma": []}, ValueError, r"sigma: shape \(0,\)"),
        ({"sigma": ["a"]}, TypeError, "sigma: list holds values that are not numbers"),
        ({"sigma": [300]}, ValueError, "sigma: values from 300 to 300; accepted: 0 to 255"),
        ({"progress": 3}, TypeError, "progress: int; accepted"),
        ({"sigma": np.zeros((3, 3))}, ValueError, r"sigma: shape \(3, 3\)"),
        ({"sigma": np.full((32, 40), -1.0)}, ValueError, "sigma: values from -1 to -1"),
        ({"sigma": np.full((32, 40), np.nan)}, ValueError, "sigma: values from nan"),
        ({"strength": 2.5}, ValueError, "strength: 2.5; accepted: a number from 0 to 2"),
        ({"chroma": -1}, ValueError, "chroma: -1; accepted: a number from 0 to 2"),
        ({"quality": "high"}, ValueError, "quality: 'high'; accepted: 'fast', 'normal', 'best'"),
        ({"strength": "all"}, ValueError, "strength: 'all'"),
        ({"tile": "big"}, ValueError, "tile: 'big'"),
        ({"max_memory": "much"}, ValueError, "max_memory: 'much'; accepted"),
        ({"max_memory": 0}, ValueError, "max_memory: 0"),
        ({"max_pixels": 0}, ValueError, "max_pixels: 0; accepted"),
        ({"max_pixels": float("nan")}, ValueError, "max_pixels: nan"),
    ],
)
def test_wrong_options(
    network: fastden.FusedDenoiser, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        fastden.denoise(pixels(), **{"sigma": SIGMA, "model": network, **options})


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


def test_the_warning_reaches_code_without_a_module() -> None:
    with pytest.warns(fastden.ScaleWarning, match=r"sigma: 0\.1,"):
        exec("denoise(image, 0.1, model='color')", {"denoise": fastden.denoise, "image": pixels(dtype=np.uint8)})
