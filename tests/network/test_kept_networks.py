"""Networks by name: what surrounds the first call does not stay in what is kept."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

import fastden
from fastden.inference import estimate
from fastden.network import loading
from fastden.network.fused import FusedDenoiser
from fastden.network.model import Denoiser

IMAGE = np.random.default_rng(0).integers(0, 255, (40, 48, 3)).astype(np.uint8)


@pytest.fixture(autouse=True)
def nothing_kept() -> Iterator[None]:
    forget()
    yield
    forget()


def forget() -> None:
    loading._load_cached.cache_clear()
    estimate.load_estimator.cache_clear()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_another_default_dtype_does_not_round_the_weights(dtype: torch.dtype) -> None:
    options: dict[str, Any] = {"device": "cpu", "dtype": "float32"}
    expected = fastden.denoise(IMAGE, **options)
    forget()
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        first = fastden.denoise(IMAGE, **options)
    finally:
        torch.set_default_dtype(before)
    assert np.array_equal(first, expected)
    assert np.array_equal(fastden.denoise(IMAGE, **options), expected)


def test_from_pretrained_follows_the_default_dtype() -> None:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert Denoiser.from_pretrained("color").conv0.weight.dtype == torch.bfloat16
    finally:
        torch.set_default_dtype(before)


def test_loading_draws_no_random_numbers() -> None:
    state = torch.get_rng_state()
    fastden.denoise(IMAGE, device="cpu")
    Denoiser.from_pretrained("color")
    assert torch.equal(torch.get_rng_state(), state)


class Wider(Denoiser):
    """A class of other people, with a value that no file holds."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.register_buffer("own", torch.full((3,), 7.0), persistent=False)


def test_classes_of_others_keep_what_no_file_holds(tmp_path: Any) -> None:
    Wider().save_pretrained(tmp_path)
    loaded: Any = Wider.from_pretrained(tmp_path)
    assert loaded.own.tolist() == [7.0] * 3


def test_cuda_is_the_current_device_of_each_call(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_: True)
    monkeypatch.setattr(loading, "_load_cached", lambda name, device, *_: asked.append(device))
    for current in (0, 1):
        monkeypatch.setattr(torch.cuda, "current_device", lambda current=current: current)
        for device in ("cuda", None):
            loading.load_network("color", device, "float32")
    assert asked == [torch.device("cuda", index) for index in (0, 0, 1, 1)]


class Own(torch.Tensor):
    """A tensor that says more, as those of MONAI and fastai do."""


def test_subclasses_are_computed_as_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: set[type] = set()
    run = FusedDenoiser.forward_padded
    monkeypatch.setattr(FusedDenoiser, "forward_padded", lambda self, x: (seen.add(type(x)), run(self, x))[1])
    x = torch.rand(3, 40, 48, generator=torch.Generator().manual_seed(0))
    y = fastden.denoise(x.as_subclass(Own), 25, device="cpu")
    assert type(y) is Own
    assert seen == {torch.Tensor}
    assert torch.equal(y.as_subclass(torch.Tensor), fastden.denoise(x, 25, device="cpu"))


@pytest.mark.parametrize("tensor", [False, True])
def test_strength_0_is_the_image_in_double_precision(tensor: bool) -> None:
    image: Any = np.random.default_rng(0).random((24, 32, 3))
    image = torch.from_numpy(image).permute(2, 0, 1) if tensor else image
    same = fastden.denoise(image, 25, strength=0, device="cpu")
    assert same is not image
    assert bool((same == image).all())


@pytest.mark.parametrize("channels", [1, 3])
def test_colour_noise_alone_leaves_a_star_its_light(channels: int) -> None:
    image = np.full((64, 64, channels), 0.3, np.float32)
    image[32, 32] = 3.0
    done = fastden.denoise(image, 5, strength=0, chroma=1, device="cpu")
    weights = np.float32([0.299, 0.587, 0.114]) if channels == 3 else np.float32([1.0])
    np.testing.assert_allclose(done @ weights, image @ weights, rtol=0, atol=1e-4)


def test_views_with_the_negative_bit() -> None:
    """The imaginary part of a conjugate, as Fourier transforms give it."""
    image = torch.rand(3, 20, 24)
    view = torch.complex(image, -image).conj().imag
    assert view.is_neg()
    assert torch.equal(fastden.denoise(view, 20), fastden.denoise(image, 20))
    assert fastden.estimate_noise(view) == fastden.estimate_noise(image)


def test_transforms_are_refused() -> None:
    """Pixels are read here, which no tensor inside a transform has; a network can be transformed."""
    image, inside = torch.rand(2, 3, 20, 24), r"a tensor inside torch\.vmap .*; accepted: a plain tensor"
    for call in (
        lambda: torch.vmap(lambda one: fastden.denoise(one, 20))(image),
        lambda: torch.func.grad(lambda one: fastden.denoise(one, 20).sum())(image),
        lambda: torch.vmap(fastden.denoise)(image),
    ):
        with pytest.raises(TypeError, match=f"image: {inside}"):
            call()
    with pytest.raises(TypeError, match=f"sigma: {inside}"):
        torch.vmap(lambda sigma: fastden.denoise(image, sigma))(torch.tensor([10.0, 20.0]))
