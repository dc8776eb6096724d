"""Exact tiling: tiled and untiled results are equal."""

from __future__ import annotations

import copy
import re
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fastden.inference.tiling import denoise_rows, denoise_tiled, plan_tiles, rows_needed
from fastden.network.fused import fuse
from fastden.network.model import Denoiser
from tests.helpers import level, max_error, random_network


@settings(max_examples=60)
@given(size=st.tuples(st.integers(1, 200), st.integers(1, 200)), side=st.integers(4, 60).map(lambda n: 4 * n))
def test_tiles_cover_every_pixel_once(size: tuple[int, int], side: int) -> None:
    seen = torch.zeros(size, dtype=torch.int32)
    for top, bottom, left, right in plan_tiles(*size, side):
        seen[top:bottom, left:right] += 1
        assert 0 < bottom - top <= side
        assert 0 < right - left <= side
        assert top % 4 == left % 4 == 0
        assert bottom % 4 == 0 or bottom == size[0]
        assert right % 4 == 0 or right == size[1]
    assert bool((seen == 1).all())


@settings(max_examples=15)
@given(
    size=st.tuples(st.integers(1, 90), st.integers(1, 90)),
    tile=st.sampled_from([16, 17, 20, 32, 48]),
    blind=st.booleans(),
    batch=st.integers(1, 2),
)
@example(size=(1, 1), tile=16, blind=False, batch=1)
@example(size=(1, 89), tile=16, blind=False, batch=1)
@example(size=(17, 65), tile=16, blind=True, batch=2)
@example(size=(64, 64), tile=32, blind=False, batch=1)
def test_equal_to_the_untiled_result(size: tuple[int, int], tile: int, blind: bool, batch: int) -> None:
    """In float64 only the order of sums could differ."""
    model = random_network(not blind, dtype=torch.float64)
    x = torch.rand(batch, 3, *size, dtype=torch.float64)
    sigma = level(model)
    with torch.no_grad():
        untiled = model(x, sigma)
    assert max_error(denoise_tiled(model, x, sigma, tile=tile), untiled) < 1e-13


@pytest.mark.parametrize("tile", [16, 36, None])
@pytest.mark.parametrize("size", [(61, 83), (40, 64), (23, 7)], ids=str)
def test_float32(size: tuple[int, int], tile: int | None) -> None:
    model = random_network()
    x = torch.rand(1, 3, *size)
    for network in (model, fuse(model)):
        with torch.no_grad():
            untiled = network(x, 0.1)
        assert max_error(denoise_tiled(network, x, 0.1, tile=tile), untiled) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float64, torch.uint8, torch.uint16])
def test_gray_amid_gray_stays_gray(dtype: torch.dtype) -> None:
    """Where all channels within 3 pixels are equal the result is its mean, and elsewhere the network's own."""
    model = random_network().double()
    image = torch.rand(1, 3, 60, 72, generator=torch.Generator().manual_seed(1)).double()
    image[:, :, 20:48, 24:] = image[:, :1, 20:48, 24:]
    if not dtype.is_floating_point:
        image = (image * torch.iinfo(torch.int16).max).to(dtype) if dtype == torch.uint16 else (image * 255).to(dtype)
    own = denoise_tiled(model, image, 0.1, tile=None)
    kept = denoise_tiled(model, image, 0.1, tile=None, keep_gray="mean")
    inside = torch.zeros(1, 1, 60, 72, dtype=torch.bool)
    inside[:, :, 23:45, 27:] = True  # the picture is mirrored beyond its edge
    assert torch.equal(kept.to(torch.int32)[~inside.expand_as(kept)], own.to(torch.int32)[~inside.expand_as(own)])
    if dtype.is_floating_point:  # others are cut off behind the mean
        mean = own.mean(1, keepdim=True).expand_as(own)
        assert (kept - mean).abs()[inside.expand_as(kept)].max() < 1e-6
    assert torch.equal(kept[:, 0].to(torch.int32)[inside[:, 0]], kept[:, 2].to(torch.int32)[inside[:, 0]])
    assert not torch.equal(own[:, 0].to(torch.int32)[inside[:, 0]], own[:, 2].to(torch.int32)[inside[:, 0]])
    tiled = denoise_tiled(model, image, 0.1, tile=16, keep_gray="mean")
    assert (tiled.double() - kept.double()).abs().max() <= (1e-9 if dtype.is_floating_point else 0)
    first, last = rows_needed(24, 60, 60)
    rows = denoise_rows(model, image[:, :, first:last], 0.1, (24, 60), first, 60, 16, keep_gray="mean")
    assert torch.equal(
        rows.to(torch.int32), denoise_tiled(model, image, 0.1, tile=16, keep_gray="mean")[:, :, 24:].to(torch.int32)
    )


def test_a_wrong_halo_would_show(monkeypatch: pytest.MonkeyPatch) -> None:
    """The equality above can fail: a halo that is four pixels smaller changes the result."""
    model = random_network(dtype=torch.float64)
    x = torch.rand(1, 3, 70, 70, dtype=torch.float64)
    with torch.no_grad():
        untiled = model(x, 0.1)
    monkeypatch.setattr("fastden.inference.tiling.HALO", 16)
    assert max_error(denoise_tiled(model, x, 0.1, tile=32), untiled) > 1e-9


@pytest.mark.parametrize("sigma", ["number", "per image", "map", "one map"])
def test_noise_level_in_every_form(sigma: str) -> None:
    model = random_network(dtype=torch.float64)
    x = torch.rand(2, 3, 45, 38, dtype=torch.float64)
    value = {
        "number": 0.2,
        "per image": torch.tensor([0.1, 0.3]),
        "map": torch.rand(2, 1, 45, 38, dtype=torch.float64),
        "one map": torch.rand(1, 1, 45, 38, dtype=torch.float64),
    }[sigma]
    with torch.no_grad():
        assert max_error(denoise_tiled(model, x, value, tile=16), model(x, value)) < 1e-13


CURVE = [0.1 + 0.02 * knot for knot in range(8)]
#: Noise levels for images (2, 3, 45, 38).
LEVELS: dict[str, Any] = {
    "a tensor without dimensions": torch.tensor(0.2),
    "(N, 1)": torch.tensor([[0.1], [0.3]]),
    "(N, 1, 1, 1)": torch.tensor([0.1, 0.3]).view(2, 1, 1, 1),
    "(1, 1, 1, 1)": torch.full((1, 1, 1, 1), 0.2),
    "a list": [0.1, 0.3],
    "an array (N,)": np.array([0.1, 0.3]),
    "an array as a map": np.linspace(0, 0.5, 2 * 45 * 38).reshape(2, 1, 45, 38),
    "one curve": torch.tensor([CURVE]),
    "curves": torch.tensor([CURVE, CURVE[::-1]]),
    "a curve as an array": np.array([CURVE]),
    "five knots": torch.full((1, 5), 0.1),
    "nine knots below zero": torch.full((1, 9), -0.1),
    "a curve below zero": torch.full((1, 8), -0.1),
    "a curve with NaN": torch.full((1, 8), torch.nan),
    "three curves": torch.full((3, 8), 0.1),
    "a map without batch": torch.full((45, 38), 0.1),
    "a map without channel": torch.full((2, 45, 38), 0.1),
    "a map of another size": np.full((1, 1, 45, 39), 0.1),
    "a map above one": np.full((1, 1, 45, 38), 1.5),
    "three numbers": np.array([0.1, 0.2, 0.3]),
    "none": None,
    "a truth value": True,
    "text": "0.1",
}


@pytest.mark.parametrize("case", LEVELS)
def test_levels_are_those_that_the_network_takes(case: str) -> None:
    model, sigma = random_network(dtype=torch.float64), LEVELS[case]
    x = torch.rand(2, 3, 45, 38, dtype=torch.float64)
    try:
        with torch.no_grad():
            untiled = model(x, sigma)
    except (TypeError, ValueError) as error:
        with pytest.raises(type(error), match=re.escape(str(error))):
            denoise_tiled(model, x, sigma, tile=16)
    else:
        # The network keeps a curve's brightness in float32.
        assert max_error(denoise_tiled(model, x, sigma, tile=16), untiled) < (1e-6 if "curve" in case else 1e-13)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16], ids=str)
@pytest.mark.parametrize("tile", [16, None])
def test_integers(dtype: torch.dtype, tile: int | None) -> None:
    """Scaled to [0, 1], denoised, clipped and rounded back."""
    largest = 255 if dtype == torch.uint8 else 65535
    image = (torch.rand(1, 3, 33, 42) * largest).round().to(dtype)
    before = image.clone()
    model = random_network()
    with torch.no_grad():
        exact = model(image.float() / largest, 0.1) * largest
    result = denoise_tiled(model, image, 0.1, tile=tile)
    assert result.dtype == dtype
    assert torch.equal(image, before)
    assert exact.min() < 0
    assert exact.max() > largest  # so that clipping is tested
    expected = exact.round().clamp(0, largest)
    difference = (result.to(torch.int32) - expected.to(torch.int32)).abs()
    assert difference.max() <= 1
    assert (difference > 0).float().mean() < 0.01


def test_float_results_are_not_clipped() -> None:
    y = denoise_tiled(random_network(), torch.rand(1, 3, 40, 40), 0.1, tile=16)
    assert y.min() < 0
    assert y.max() > 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_image_of_another_dtype(dtype: torch.dtype) -> None:
    model = random_network()
    x = torch.rand(1, 3, 37, 30).to(dtype)
    for network in (model, fuse(model)):
        y = denoise_tiled(network, x, 0.1, tile=16)
        assert y.dtype == dtype
        with torch.no_grad():
            assert max_error(y, model(x.float(), 0.1)) < 4 * torch.finfo(dtype).eps + 1e-5


def test_layout_of_the_image() -> None:
    model = random_network()
    rows = torch.randint(0, 256, (40, 51, 3), dtype=torch.uint8)
    image = rows.permute(2, 0, 1)[None]
    assert torch.equal(
        denoise_tiled(model, image, 0.1, tile=16), denoise_tiled(model, image.contiguous(), 0.1, tile=16)
    )


def test_progress() -> None:
    calls: list[tuple[int, int]] = []
    denoise_tiled(random_network(), torch.rand(1, 3, 40, 50), 0.1, tile=16, progress=lambda *call: calls.append(call))
    assert calls[-1] == (2000, 2000)
    assert len(calls) > 4
    assert [done for done, _ in calls] == sorted({done for done, _ in calls})
    assert {total for _, total in calls} == {2000}


def test_progress_may_cancel() -> None:
    class CancelledError(Exception):
        pass

    def cancel(done: int, total: int) -> None:
        raise CancelledError

    with pytest.raises(CancelledError):
        denoise_tiled(random_network(), torch.rand(1, 3, 40, 50), 0.1, tile=16, progress=cancel)


def test_network_keeps_its_mode_and_no_graph_is_built() -> None:
    model = random_network()
    y = denoise_tiled(model, torch.rand(1, 3, 20, 20), 0.1, tile=16)
    assert not y.requires_grad
    assert not model.training


def test_no_images() -> None:
    assert denoise_tiled(random_network(), torch.empty(0, 3, 9, 12), 0.1).shape == (0, 3, 9, 12)


def test_a_network_in_training_is_refused_and_left_alone() -> None:
    model = Denoiser()
    with pytest.raises(ValueError, match=r"model: in training mode; accepted: evaluation mode"):
        denoise_tiled(model, torch.rand(1, 3, 40, 50), 0.1, tile=16)
    assert int(model.conv1.bn.num_batches_tracked) == 0


@pytest.mark.parametrize("blind", [False, True])
def test_bfloat16(blind: bool) -> None:
    """Equal up to rounding: oneDNN orders the sums of a tile of another shape differently."""
    model = random_network(not blind)
    x = torch.rand(1, 3, 90, 131)
    with torch.no_grad():
        exact = copy.deepcopy(model).double()(x.double(), level(model))
    fast = fuse(model, dtype=torch.bfloat16)
    whole, tiled = (denoise_tiled(fast, x, level(model), tile=tile) for tile in (None, 32))
    assert max_error(tiled, exact) < 1.5 * max_error(whole, exact)


class Clamped(Denoiser):
    def forward(self, x: torch.Tensor, sigma: Any = None) -> torch.Tensor:
        return super().forward(x, sigma).clamp(0, 1)


class Halved(Denoiser):
    def forward_padded(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward_padded(x) / 2


def hooked(change: float) -> Denoiser:
    model = Denoiser().eval()
    model.register_forward_hook(lambda module, arguments, result: result + change)
    return model


@pytest.mark.parametrize(
    ("model", "kind", "message"),
    [
        ("color", TypeError, r"model: str; accepted: fastden\.Denoiser or FusedDenoiser"),
        (torch.nn.Conv2d(3, 3, 3), TypeError, r"model: Conv2d; accepted: fastden\.Denoiser"),
        (torch.compile(Denoiser().eval()), TypeError, r"model: OptimizedModule; accepted: fastden\.Denoiser"),
        (torch.compile(fuse(Denoiser())), TypeError, r"model: OptimizedModule; accepted: fastden\.Denoiser"),
        (Clamped().eval(), ValueError, r"model: Clamped has a forward of its own, .*; accepted: fastden\.Denoiser as"),
        (hooked(0.1), ValueError, r"model: Denoiser has .* hooks that change its result"),
    ],
)
def test_networks_that_tiles_would_change(model: Any, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        denoise_tiled(model, torch.zeros(1, 3, 8, 8), 0.1)


@pytest.mark.parametrize("change", ["a wrapped layer", "forward_padded", "hooks that only look"])
def test_changed_networks(change: str) -> None:
    model = {"forward_padded": Halved().eval(), "hooks that only look": hooked(0)}.get(
        change, random_network()
    ).double()
    if change == "a wrapped layer":
        model.conv0 = torch.nn.Sequential(model.conv0)  # type: ignore[assignment]
    x = torch.rand(1, 3, 41, 50, dtype=torch.float64)
    with torch.no_grad():
        assert max_error(denoise_tiled(model, x, 0.1, tile=16), model(x, 0.1)) < 1e-13


WRONG = {
    "array": ({"image": [[1]]}, TypeError, r"image: list; accepted: a torch\.Tensor"),
    "int32": ({"image": torch.zeros(1, 3, 8, 8, dtype=torch.int32)}, TypeError, r"image: dtype torch\.int32; accepted"),
    "three axes": ({"image": torch.zeros(3, 8, 8)}, ValueError, r"image: shape \(3, 8, 8\); accepted"),
    "gray": ({"image": torch.zeros(1, 1, 8, 8)}, ValueError, r"image: shape \(1, 1, 8, 8\); accepted"),
    "no pixels": ({"image": torch.zeros(1, 3, 0, 8)}, ValueError, r"image: shape .*H, W >= 1"),
    "small tile": ({"tile": 8}, ValueError, r"tile: 8; accepted: a whole number of at least 16"),
    "negative tile": ({"tile": -32}, ValueError, r"tile: -32; accepted"),
    "fractional tile": ({"tile": 32.5}, ValueError, r"tile: 32\.5; accepted"),
    "word for a tile": ({"tile": "large"}, ValueError, r"tile: 'large'; accepted"),
    "both limits": ({"tile": 32, "max_memory": 1 << 30}, ValueError, r"max_memory: given together with tile=32"),
    "no memory": (
        {"max_memory": 1000},
        ValueError,
        r"max_memory: 1000 bytes; accepted: at least \d+(\.\d+)? MiB for this model",
    ),
    "negative memory": (
        {"max_memory": -1},
        ValueError,
        r"max_memory: -1 bytes; accepted: at least \d+(\.\d+)? MiB for this model",
    ),
    "memory in words": ({"max_memory": "much"}, ValueError, r"max_memory: 'much'; accepted: bytes, or a size such as"),
    "no sigma": ({"sigma": None}, ValueError, r"sigma: None.*accepted"),
    "sigma on the scale of bytes": ({"sigma": 25}, ValueError, r"sigma: 25; accepted: 0 to 1"),
    "map of another size": ({"sigma": torch.zeros(1, 1, 9, 8)}, ValueError, r"sigma: shape \(1, 1, 9, 8\); accepted"),
    "three levels": ({"sigma": torch.zeros(3)}, ValueError, r"sigma: shape \(3,\); accepted"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_arguments(case: str) -> None:
    changes, kind, message = WRONG[case]
    arguments = {"image": torch.zeros(1, 3, 8, 8), "sigma": 0.1, **changes}
    with pytest.raises(kind, match=message):
        denoise_tiled(Denoiser().eval(), **arguments)


def test_the_package_leads_to_it() -> None:
    code = "import fastden; print(fastden.inference.denoise_tiled.__name__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "denoise_tiled"
