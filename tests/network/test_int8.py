"""The form in 8-bit integers: its error, exact tiles, and refusals."""

from __future__ import annotations

import copy
import os
import pickle
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from typer.testing import CliRunner

import fastden
from fastden.cli.main import app
from fastden.network import calibration, int8, onednn
from fastden.network.fused import FusedDenoiser
from fastden.network.int8 import QuantizedConvolution
from fastden.network.level import NoiseEstimator
from fastden.network.loading import load_network
from fastden.network.model import Denoiser
from fastden.network.own_estimator import OwnEstimator
from fastden.network.weight_rounding import Windows, chosen_above, rounding_of
from tests.cli.run import fails, works
from tests.helpers import random_network

pytestmark = pytest.mark.skipif(bool(int8.why_not()), reason="; ".join(int8.why_not()) or "runs")


@pytest.fixture
def picture() -> Tensor:
    """(1, 3, 90, 70): smooth ramps and an edge, in [0, 1]."""
    rows, columns = torch.meshgrid(torch.linspace(0, 1, 90), torch.linspace(0, 1, 70), indexing="ij")
    return torch.stack([rows, columns, ((rows - columns) > 0.1).float()])[None] * 0.8 + 0.1


def onednn_weights(model: Denoiser) -> onednn.FoldedWeights:
    return onednn.FoldedWeights.of(dict(FusedDenoiser(model).named_buffers()))


def calibrated(noise_level_input: bool = True, image_channels: int = 3) -> Denoiser:
    return copy.deepcopy(calibrated_once(noise_level_input, image_channels))


@cache
def calibrated_once(noise_level_input: bool = True, image_channels: int = 3) -> Denoiser:
    """Calibration takes some seconds."""
    model = random_network(noise_level_input, image_channels)
    generator = torch.Generator().manual_seed(1)
    fastden.calibrate(model, [torch.rand(1, image_channels, 48, 48, generator=generator) for _ in range(6)])
    return model


@pytest.mark.parametrize("relu", [True, False])
def test_convolution_is_exact_but_for_rounding(relu: bool) -> None:
    """Compared with the same codes in float64, a result errs by at most half a code and the weights' rounding."""
    generator = torch.Generator().manual_seed(0)
    weight, bias = torch.randn(8, 16, 3, 3, generator=generator), torch.randn(8, generator=generator)
    codes = torch.randint(0, 256, (1, 16, 9, 11), generator=generator, dtype=torch.uint8)
    codes = codes.contiguous(memory_format=torch.channels_last)
    step, zero = torch.rand(16, generator=generator) / 255 + 1e-3, torch.randint(0, 200, (16,), generator=generator)
    out_step = torch.full((8,), 0.2)
    layer = QuantizedConvolution(weight, bias, step, out_step, zero=zero.float(), relu=relu)
    values = (codes.double() - zero.view(1, -1, 1, 1)) * step.double().view(1, -1, 1, 1)
    held = (
        layer.weight.double()
        * layer.scale.double().view(-1, 1, 1, 1)
        * out_step[0].double()
        / step.double().view(1, -1, 1, 1)
    )
    exact = torch.nn.functional.conv2d(values, held, bias.double()) / out_step[0].double()
    wanted = exact.clamp(min=0) if relu else exact + int8.MIDDLE
    assert (layer(codes).double() - wanted.clamp(0, 255)).abs().max() <= 0.51


def correlated(samples: int, channels: int) -> Tensor:
    """(samples, channels), float64: inputs that rise and fall together, with a mean of their own."""
    generator = torch.Generator().manual_seed(2)
    mix = torch.randn(channels, 3, generator=generator, dtype=torch.float64)
    shared = torch.randn(samples, 3, generator=generator, dtype=torch.float64) @ mix.T
    return 20 * shared + torch.randn(samples, channels, generator=generator, dtype=torch.float64) + 90


def test_errors_of_weights_cancel() -> None:
    """Of sums of correlated inputs, weights rounded one after the other err by less than half of the nearest ones."""
    exact = 30 * torch.randn(5, 200, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    exact *= int8.HIGHEST / exact.abs().amax(1, keepdim=True)
    seen, new = correlated(2000, 200).split(1000)
    up = chosen_above(exact, seen.T.cov())
    codes = int8.below(exact) + up
    assert (codes - exact).abs().max() < 1 + 1e-5
    assert codes.abs().max() <= int8.HIGHEST

    def error(codes: Tensor) -> float:
        return float(((codes - exact) @ (new - seen.mean(0)).T).std())

    assert error(codes) < 0.5 * error(exact.round())


def test_rounding_keeps_the_mean_and_goes_through_a_file() -> None:
    """A convolution with rounded weights, from the packed bits, errs less than that with the nearest codes."""
    generator = torch.Generator().manual_seed(0)
    weight, bias = torch.randn(8, 16, 3, 3, generator=generator), torch.randn(8, generator=generator)
    pixels = torch.rand(1, 1, 40, 50, generator=generator) + 0.1 * torch.rand(1, 16, 40, 50, generator=generator)
    codes = (200 * pixels).to(torch.uint8).contiguous(memory_format=torch.channels_last)
    step, zero = torch.rand(16, generator=generator) / 255 + 1e-3, torch.randint(0, 200, (16,), generator=generator)
    layer = QuantizedConvolution(weight, bias, step, None, zero=zero.float(), relu=False)
    values = (codes.double() - zero.view(1, -1, 1, 1)) * step.double().view(1, -1, 1, 1)
    wanted = torch.nn.functional.conv2d(values, weight.double(), bias.double())
    nearest = layer(codes).double() - wanted
    windows = Windows(4000)
    windows.see(layer, codes)
    rounding = rounding_of(layer, windows)
    kept = rounding.as_tensors("conv")
    assert kept["up.conv"].nbytes == weight.numel() / 8
    loaded = int8.Rounding.of(kept, "conv", weight.shape)
    assert loaded is not None
    assert torch.equal(loaded.up, rounding.up)
    layer.round(loaded)
    error = layer(codes).double() - wanted
    assert error.std((0, 2, 3)).mean() < 0.7 * nearest.std((0, 2, 3)).mean()
    assert error.mean((0, 2, 3)).abs().max() < 0.1 * nearest.mean((0, 2, 3)).abs().max()
    assert int8.Rounding.of(kept, "other", weight.shape) is None


def test_photographs_lose_little(root: Path) -> None:
    """Weak noise of photographs: 8 bits lost 0.5 dB there with the nearest codes, on a range from -0.25 to 1.25."""
    picture = Image.open(root / "examples" / "photographs" / "hopper.jpg").convert("RGB")
    clean = torch.from_numpy(np.asarray(picture).copy())
    clean = clean.permute(2, 0, 1)[None].float()[..., :256, :256] / 255
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(0))
    model = Denoiser.from_pretrained("photo")
    # The strongest noise that the model knows must not clip activations.
    for sigma, most in ((5, 0.4), (60, 1.5)):
        x = ((clean + sigma / 255 * noise).clamp(0, 1) * 255).round() / 255
        with torch.no_grad():
            normal, fast = (fastden.fuse(model, quality=quality)(x, sigma / 255) for quality in ("normal", "fast"))
        assert 255 * (fast - normal).square().mean().sqrt() < most


def test_each_part_of_the_calibration_helps_at_weak_noise(root: Path) -> None:
    """The rounding of weights; and without it narrower ranges, and codes that hold the values of 8-bit files."""
    picture = Image.open(root / "examples" / "photographs" / "hopper.jpg").convert("RGB").crop((0, 0, 256, 256))
    clean = torch.from_numpy(np.asarray(picture).copy()).permute(2, 0, 1)[None] / 255
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(0))
    x = ((clean + 5 / 255 * noise).clamp(0, 1) * 255).round() / 255
    model = Denoiser.from_pretrained("photo")
    assert model.int8_ranges is not None
    ranges, weights = model.int8_ranges
    nearest = int8.without_rounding(ranges)

    def error(given: int8.Ranges) -> float:
        model.int8_ranges = given, weights
        with torch.no_grad():
            return float((fastden.fuse(model, quality="fast")(x, 5 / 255) - fastden.fuse(model)(x, 5 / 255)).norm())

    assert error(ranges) < 0.7 * error(nearest)
    for part in ("share", "image"):
        assert error(nearest) < error({name: value for name, value in nearest.items() if name != part})


def test_earlier_files_are_read(picture: Tensor) -> None:
    """Files of earlier versions hold ranges alone: their weights get the nearest codes."""
    model = calibrated()
    assert model.int8_ranges is not None
    ranges, weights = model.int8_ranges
    assert {"up.res1.conv", "mean.head", "share"} <= set(ranges)
    with torch.no_grad():
        wanted = model(picture, 0.1) - picture
        model.int8_ranges = {name: ranges[name] for name in (*int8.ACTIVATIONS, "level")}, weights
        found = fastden.fuse(model, quality="fast")(picture, 0.1) - picture
    assert (found - wanted).norm() < 0.08 * wanted.norm()


def test_casts_keep_the_codes() -> None:
    """A network that was cast has the codes of the weights that were measured, so its bits of rounding fit."""
    model = Denoiser.from_pretrained("color")
    networks = [fastden.fuse(model, dtype, quality="fast") for dtype in (torch.float32, torch.bfloat16)]
    exact, cast = (quantized(network).convolutions() for network in networks)
    assert all(torch.equal(exact[name].weight, cast[name].weight) for name in exact)


def test_other_weights_get_the_nearest_codes() -> None:
    """The head lies behind all activations with ranges, so it may change. Its bits of rounding are another head's."""
    network = fastden.fuse(Denoiser.from_pretrained("color"), quality="fast")
    network.head_weight[3] *= 1.3
    head = quantized(network).convolutions()["head"]
    assert torch.equal(head.weight.double(), head.exact().round())


def quantized(network: FusedDenoiser) -> int8.Int8Network:
    with torch.no_grad():
        network(torch.rand(1, 3, 32, 32).to(network.dtype), 0.1)
    assert network._onednn is not None
    assert isinstance(network._onednn[1], int8.Int8Network)
    return network._onednn[1]


def test_a_cpu_without_vnni_computes_in_more_bits(monkeypatch: pytest.MonkeyPatch, picture: Tensor) -> None:
    """A pickled network may come to another CPU, where sums of 8-bit products would saturate without a word."""
    model = Denoiser.from_pretrained("color")
    fast, normal = (fastden.fuse(model, quality=quality) for quality in ("fast", "normal"))
    monkeypatch.setattr(int8, "saturates", lambda: True)
    with torch.no_grad():
        assert torch.equal(pickle.loads(pickle.dumps(fast))(picture, 0.1), normal(picture, 0.1))


def test_dtypes_that_no_integers_serve_are_refused() -> None:
    model = Denoiser.from_pretrained("color")
    for dtype in (torch.float16, torch.float64):
        with pytest.raises(ValueError, match=rf"quality: 'fast', but dtype: {dtype}; accepted: torch\.float32"):
            fastden.fuse(model, dtype, quality="fast")
    with pytest.raises(ValueError, match=r"or were cast \(give dtype to fuse\(\) instead\)"):
        fastden.fuse(model.bfloat16(), quality="fast")


def test_calibration_takes_pictures_on_their_scale_alone(picture: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    model = random_network()
    for wrong in (255 * picture, torch.full_like(picture, torch.nan)):
        with pytest.raises(ValueError, match=r"images: values from .*; accepted: finite ones in \[0, 1\]"):
            fastden.calibrate(model, [wrong])
    with pytest.raises(ValueError, match=r"images: number 1, shape \(0, .*\); accepted: at least one picture"):
        fastden.calibrate(model, [picture, picture[:0]])
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    with pytest.raises(RuntimeError, match="calibrate: this PyTorch has no oneDNN"):
        fastden.calibrate(model, [picture])


@pytest.mark.parametrize(
    ("model", "images", "kind", "message"),
    [
        ("color", [], TypeError, r"model: str; accepted: fastden\.Denoiser"),
        (fastden.fuse(Denoiser()), [], TypeError, r"model: FusedDenoiser; accepted: the network that it was made from"),
        (Denoiser(), torch.rand(1, 3, 8, 8), TypeError, r"images: Tensor; accepted: a list, .* such as \[batch\]"),
        (Denoiser(), 5, TypeError, r"images: int; accepted: a list, .* of batches \(N, C, H, W\)"),
        (
            Denoiser(),
            [torch.rand(1, 3, 8, 8), torch.rand(3, 8, 8)],
            ValueError,
            r"images: number 1, shape \(3, 8, 8\); accepted: \(N, 3, H, W\)",
        ),
        (Denoiser(), [np.zeros((1, 3, 8, 8))], TypeError, r"images: number 0, ndarray; accepted: a torch\.Tensor"),
    ],
)
def test_wrong_arguments_of_calibrate(model: Any, images: Any, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        fastden.calibrate(model, images)


def test_calibration_on_another_default_device_and_under_autocast() -> None:
    model, generator = random_network(), torch.Generator().manual_seed(1)
    pictures = [torch.rand(1, 3, 48, 48, generator=generator) for _ in range(6)]
    with torch.device("meta"), torch.autocast("cpu"):  # products in bfloat16 would round the inputs' covariance
        fastden.calibrate(model, pictures)
    wanted = calibrated().int8_ranges
    assert model.int8_ranges is not None
    assert wanted is not None
    assert all(torch.equal(value, wanted[0][name]) for name, value in model.int8_ranges[0].items())


def test_new_ranges_reach_a_running_process(tmp_path: Path) -> None:
    calibrated().save_pretrained(tmp_path / "mine")
    first = load_network(tmp_path / "mine", "cpu", "float32", fast=True)
    file = tmp_path / "mine" / int8.RANGES_FILE
    os.utime(file, ns=(1, 1))
    assert load_network(tmp_path / "mine", "cpu", "float32", fast=True) is not first


def test_calibration_repeats() -> None:
    one, other = calibrated().int8_ranges, calibrated_once.__wrapped__().int8_ranges
    assert one is not None
    assert other is not None
    assert list(one[0]) == list(other[0])
    assert all(torch.equal(value, other[0][name]) for name, value in one[0].items())


def test_models_of_photographs_are_calibrated_on_clipped_pictures() -> None:
    model = random_network()
    model.estimator = OwnEstimator.of(NoiseEstimator())
    fastden.calibrate(model, [torch.rand(2, 3, 40, 40)])
    assert model.int8_ranges is not None
    assert model.int8_ranges[0]["image"].tolist() == [0.0, 1.0]
    # Every value of an 8-bit file has a code.
    network = int8.Int8Network(onednn_weights(model), model.int8_ranges[0])
    assert torch.allclose(network.input_step[:3] * 255, torch.ones(3))
    assert "image" not in calibrated().int8_ranges[0]  # type: ignore[index]


@pytest.mark.parametrize(("noise_level_input", "image_channels"), [(True, 3), (False, 3), (True, 1), (False, 1)])
def test_near_to_float(noise_level_input: bool, image_channels: int, picture: Tensor) -> None:
    model = calibrated(noise_level_input, image_channels)
    sigma = 0.1 if noise_level_input else None
    x = picture[:, :image_channels] + 0.1 * torch.randn(picture[:, :image_channels].shape)
    with torch.no_grad():
        wanted, found = model(x, sigma) - x, fastden.fuse(model, quality="fast")(x, sigma) - x
    # Random weights are the worst case: the bundled models' corrections err by 1 %.
    assert (found - wanted).norm() < 0.08 * wanted.norm()


def test_bundled_model_loses_little(picture: Tensor) -> None:
    x = picture + 25 / 255 * torch.randn(picture.shape, generator=torch.Generator().manual_seed(0))
    model = Denoiser.from_pretrained("color")
    with torch.no_grad():
        found = {quality: fastden.fuse(model, quality=quality)(x, 25 / 255) for quality in ("normal", "fast")}
    assert not torch.equal(found["fast"], found["normal"])
    score = {quality: -10 * float((y - picture).square().mean().log10()) for quality, y in found.items()}
    assert score["fast"] > score["normal"] - 0.3
    assert score["fast"] > 30


def test_tiles_equal_the_whole_in_every_bit(picture: Tensor) -> None:
    network = fastden.fuse(calibrated(), quality="fast")
    noisy = (picture.clamp(0, 1) * 255).to(torch.uint8)
    whole = fastden.denoise(noisy, 20, model=network, tile=None, quality="fast")
    assert torch.equal(fastden.denoise(noisy, 20, model=network, tile=32, quality="fast"), whole)
    both = torch.cat([noisy, noisy.flip(3)])
    assert torch.equal(fastden.denoise(both, 20, model=network, quality="fast")[:1], whole)


def test_follows_the_weights_and_leaves_gradients_to_float(picture: Tensor) -> None:
    network = fastden.fuse(calibrated(), quality="fast")
    with torch.no_grad():
        before = network(picture, 0.1)
        network.head_bias.data.add_(0.05)
        moved = network(picture, 0.1) - before
    assert torch.allclose(moved, torch.full_like(moved, 0.05), atol=1e-4)
    x = picture.clone().requires_grad_()
    network(x, 0.1).sum().backward()
    assert x.grad is not None
    assert copy.deepcopy(network).quality == "fast"
    assert "quality='fast'" in repr(network)


def test_other_weights_are_refused(picture: Tensor) -> None:
    """The ranges of activations belong to the weights with which they were measured. A cast changes none."""
    network = fastden.fuse(calibrated(), quality="fast")
    state = {name: value.clone() for name, value in network.state_dict().items()}
    before = network(picture, 0.1)
    network.load_state_dict({name: value.bfloat16().float() for name, value in state.items()})
    assert (network(picture, 0.1) - before).norm() < 0.05 * before.norm()
    # The same function, whose activations are 30 times as large.
    for name, factor in (("reduce_weight", 30), ("reduce_bias", 30), ("conv_weight", 1 / 30)):
        state[f"res1_{name}"] *= factor
    message = "quality: 'fast', but res1_reduce_weight has changed since the ranges of activations were measured"
    with pytest.raises(ValueError, match=message):
        network.load_state_dict(state)
    with pytest.raises(ValueError, match=message), torch.no_grad():
        network(picture, 0.1)
    network = fastden.fuse(calibrated(), quality="fast")
    network.res2_conv_weight.mul_(2)
    with pytest.raises(ValueError, match="res2_conv_weight has changed"), torch.no_grad():
        network(picture, 0.1)


def test_emptied_weights_are_loaded_again(picture: Tensor) -> None:
    """As Accelerate and Transformers do: an empty network on meta, then memory for it, then its weights."""
    network = fastden.fuse(calibrated(), "bfloat16", quality="fast")
    state, ranges = copy.deepcopy(network.state_dict()), network.conv3_ranges.clone()
    wanted = network(picture, 0.1)
    network.to("meta").to_empty(device="cpu").load_state_dict(state)
    assert torch.equal(network.conv3_ranges, ranges)
    assert network.stem_bias.dtype == torch.float32
    assert torch.equal(network(picture, 0.1), wanted)


def test_saved_beside_the_weights(tmp_path: Path) -> None:
    model = calibrated()
    model.save_pretrained(tmp_path / "saved")
    loaded = Denoiser.from_pretrained(tmp_path / "saved")
    assert model.int8_ranges is not None
    assert loaded.int8_ranges is not None
    assert loaded.int8_ranges[1] == model.int8_ranges[1]
    assert all(torch.equal(loaded.int8_ranges[0][name], value) for name, value in model.int8_ranges[0].items())
    fastden.fuse(loaded, quality="fast")
    with torch.no_grad():
        loaded.conv0.weight.mul_(1.01)
    with pytest.raises(ValueError, match="weights have changed since their ranges"):
        fastden.fuse(loaded, quality="fast")
    loaded.save_pretrained(tmp_path / "trained")
    assert not (tmp_path / "trained" / int8.RANGES_FILE).exists()
    assert Denoiser.from_pretrained(tmp_path / "trained").int8_ranges is None


def test_every_bundled_model_is_calibrated() -> None:
    for name in fastden.models():
        assert fastden.fuse(Denoiser.from_pretrained(name), quality="fast").quality == "fast"


def test_refusals(monkeypatch: pytest.MonkeyPatch, picture: Tensor) -> None:
    model = random_network()
    with pytest.raises(ValueError, match=r"does not know the ranges .* fastden\.calibrate"):
        fastden.fuse(model, quality="fast")
    with pytest.raises(ValueError, match=r"quality: 'faster'; accepted: 'normal', 'fast'"):
        fastden.fuse(model, quality="faster")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"quality: 'faster'; accepted: 'fast', 'normal', 'best'"):
        fastden.denoise(picture, 20, quality="faster")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"device: meta; accepted: cpu"):
        fastden.fuse(calibrated(), device="meta", quality="fast")
    with pytest.raises(ValueError, match=r"FusedDenoiser of quality 'normal'"):
        fastden.denoise(picture, 20, model=fastden.fuse(model), quality="fast")
    with pytest.raises(ValueError, match="images: none"):
        fastden.calibrate(model, [])
    monkeypatch.setattr(int8, "saturates", lambda: True)
    with pytest.raises(ValueError, match=r"saturate on this CPU \(VNNI is missing.*\); accepted here: 'normal'"):
        fastden.fuse(calibrated(), quality="fast")


def test_commands(tmp_path: Path, picture: Tensor) -> None:
    """``fastden calibrate``, then ``fastden denoise --quality fast``."""
    pixels = (picture[0].permute(1, 2, 0).numpy() * 255).astype(np.uint8)
    (tmp_path / "clean").mkdir()
    for index in range(3):
        Image.fromarray(np.roll(pixels, 20 * index, 0)).save(tmp_path / "clean" / f"{index}.png")
    random_network().save_pretrained(tmp_path / "model")
    run = CliRunner().invoke
    done = run(app, ["calibrate", str(tmp_path / "model"), str(tmp_path / "clean"), "--count", "2"])
    assert done.exit_code == 0, done.output
    source, target = tmp_path / "clean" / "0.png", tmp_path / "out.png"
    options = ["--model", str(tmp_path / "model"), "--sigma", "20", "--quality", "fast"]
    done = run(app, ["denoise", str(source), "-o", str(target), *options])
    assert done.exit_code == 0, done.output
    record = fastden.denoise(source, 20, model=str(tmp_path / "model"), quality="fast")
    assert np.array_equal(np.asarray(Image.open(target)), record)
    refused = run(app, ["calibrate", "color", str(tmp_path / "clean")])
    assert refused.exit_code == 1
    assert "output: none, and 'color' is not a folder" in refused.output


def test_calibrate_keeps_other_models(tmp_path: Path, picture: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder's weights are replaced on request alone, and a bundled model's ranges do not go to another one."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "clean").mkdir()
    # It takes seconds.
    monkeypatch.setattr(calibration, "second_order_rounding", lambda *_: {})
    Image.fromarray((picture[0].permute(1, 2, 0).numpy() * 255).astype(np.uint8)).save(tmp_path / "clean" / "0.png")
    weights = tmp_path / "mine" / "model.safetensors"
    random_network().save_pretrained("mine")
    before = weights.read_bytes()
    refused = fails(
        "calibrate", "color", "clean", "-o", "mine", saying="output: mine holds a model with other weights, or"
    )
    assert "--overwrite" in refused
    assert weights.read_bytes() == before
    assert not (tmp_path / "mine" / int8.RANGES_FILE).exists()
    works("calibrate", "mine", "clean", "-o", "copy")
    works("calibrate", "mine", "clean", "-o", "copy")  # the weights are the same
    other = Denoiser.from_pretrained("copy")
    other.estimator = OwnEstimator.of(NoiseEstimator())
    other.save_pretrained("copy")
    fails("calibrate", "mine", "clean", "-o", "copy", saying="or another estimator; accepted")
    works("calibrate", "mine", "clean", "-o", "copy", "--overwrite")
    assert Denoiser.from_pretrained("copy").estimator is None
    fails("calibrate", "mine", "clean", "--overwrite", saying="overwrite: given without --output")
    works("calibrate", "color", "clean", "-o", "mine", "--overwrite")
    assert fingerprint_of("mine") == fingerprint_of("color")
    weights.write_bytes(b"damaged")
    fails("calibrate", "color", "clean", "-o", "mine", saying="holds a model with other weights")
    (tmp_path / "copy").rename(tmp_path / "color")
    fails("calibrate", "color", "clean", saying="output: none, and 'color' is a bundled model; accepted: .* ./color")
    works("calibrate", "./color", "clean")


def fingerprint_of(model: str) -> str:
    return int8.fingerprint(Denoiser.from_pretrained(model))


def test_sums_of_bright_inputs_keep_their_digits() -> None:
    codes = torch.randint(249, 252, (2, 8, 64, 65), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    codes = codes.contiguous(memory_format=torch.channels_last)
    ones = torch.ones(4, 8, 1, 1)
    layer = QuantizedConvolution(ones, torch.zeros(4), torch.ones(8), None, zero=torch.zeros(8), relu=False)
    windows = Windows(64 * 65)
    for one in codes.split(1):
        windows.see(layer, one)
    wanted = codes.permute(1, 0, 2, 3).flatten(1).double()
    mean, covariance = windows.statistics()
    assert (covariance - wanted.cov(correction=0)).abs().max() < 1e-5
    assert torch.allclose(mean, wanted.mean(1), rtol=1e-6)


def test_weights_that_hold_nan_are_no_others() -> None:
    """They never run in integers, so that they need to belong to no ranges."""
    network = fastden.fuse(Denoiser.from_pretrained("color"), quality="fast")
    state = {name: value.clone() for name, value in network.state_dict().items()}
    state["res2_conv_weight"][0, 0, 0, 0] = torch.nan
    network.load_state_dict(state)
    with torch.no_grad():
        assert network(torch.rand(1, 3, 32, 32), 0.1).isnan().any()
