"""Noise levels in every form that is accepted, refused ones, and images on another scale."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import fastden
from fastden.network import inputs
from fastden.network.fused import fuse
from fastden.network.model import Denoiser
from tests.helpers import max_error

X = torch.rand(2, 3, 7, 9, generator=torch.Generator().manual_seed(3))


SIGMAS: dict[str, Any] = {
    "np.float32": np.float32(0.25),
    "np.float64": np.float64(0.25),
    "0-d array": np.array(0.25),
    "array (N,)": np.full(2, 0.25),
    "array map": np.full((2, 1, 7, 9), 0.25, np.float32),
    "list": [0.25, 0.25],
    "tuple": (0.25, 0.25),
    "list of tensors": [torch.tensor(0.25), torch.tensor(0.25)],
    "(1,)": torch.full((1,), 0.25),
    "(1, 1)": torch.full((1, 1), 0.25),
    "(1, 1, 1, 1)": torch.full((1, 1, 1, 1), 0.25),
    "(N, 1)": torch.full((2, 1), 0.25),
    "(N, 1, 1, 1)": torch.full((2, 1, 1, 1), 0.25),
    "parameter": nn.Parameter(torch.tensor(0.25)),
}


@pytest.mark.parametrize("form", SIGMAS)
def test_forms_of_sigma(form: str, models: tuple[Denoiser, Denoiser]) -> None:
    with torch.no_grad():
        assert torch.equal(models[0](X, SIGMAS[form]), models[0](X, 0.25))


def test_each_image_has_its_own_sigma(models: tuple[Denoiser, Denoiser]) -> None:
    sigma = torch.tensor([0.1, 0.3])
    with torch.no_grad():
        expected = models[0](X, sigma)
        for form in (sigma[:, None], sigma[:, None, None, None], sigma.numpy(), sigma.tolist()):
            assert torch.equal(models[0](X, form), expected)


def test_arrays_that_pytorch_does_not_take(models: tuple[Denoiser, Denoiser]) -> None:
    whole, level = np.array([0, 1], np.uint16), np.random.default_rng(0).random((2, 1, *X.shape[2:]), np.float32)
    for network in (models[0], fuse(models[0])):
        for form in (whole, whole.astype(">u2"), torch.from_numpy(whole), np.array([1.0, 0.0])[::-1]):
            with torch.no_grad():
                assert torch.equal(network(X, form), network(X, torch.tensor([0.0, 1.0])))
        for form in (level[:, :, ::-1], level.astype(">f4")):
            plain = torch.from_numpy(np.array(form, np.float32, order="C"))
            with torch.no_grad():
                assert torch.equal(network(X, form), network(X, plain))


def test_sigma_in_a_list_keeps_its_gradient(models: tuple[Denoiser, Denoiser]) -> None:
    sigma = torch.tensor(0.1, requires_grad=True)
    models[0](X, [sigma, sigma]).sum().backward()
    assert sigma.grad is not None


@pytest.mark.parametrize(
    ("sigma", "kind", "message"),
    [
        (np.full((7, 9), 0.1), ValueError, r"sigma: shape \(7, 9\); accepted"),
        (np.array(["a"]), TypeError, r"sigma: an array of dtype <U1; accepted"),
        (["a"], TypeError, r"sigma: list holds values that are not numbers; accepted"),
        (np.array([0.1, 3.0]), ValueError, r"sigma: values from 0\.1.* to 3\.0; accepted: 0 to 1"),
        (torch.tensor([True, False]), TypeError, r"sigma: dtype torch\.bool; accepted"),
        (torch.tensor(0.1 + 0.1j), TypeError, r"sigma: dtype torch\.complex64; accepted"),
        (np.ma.masked_array([0.1, 0.1], [0, 1]), TypeError, r"sigma: a masked array; accepted: a plain array"),
        (np.array([0, 7], np.uint16), ValueError, r"sigma: values from 0\.0 to 7\.0; accepted: 0 to 1"),
        (torch.empty(2, device="meta"), TypeError, r"sigma: a meta tensor, without values; accepted: one with values"),
        (np.bool_(True), TypeError, r"sigma: dtype torch\.bool; accepted"),
        ([], ValueError, r"sigma: shape \(0,\); accepted"),
    ],
)
def test_refused_sigma(sigma: Any, kind: type[Exception], message: str, models: tuple[Denoiser, Denoiser]) -> None:
    with pytest.raises(kind, match=message):
        models[0](X, sigma)


@pytest.mark.parametrize("sigma", [np.float32(0.25), np.float64(0.25), np.array(0.25)], ids=["f32", "f64", "array"])
def test_numpy_scalars_under_compile(sigma: Any, models: tuple[Denoiser, Denoiser]) -> None:
    for network in (models[0], fuse(models[0])):
        torch._dynamo.reset()
        compiled = torch.compile(network, fullgraph=True, backend="eager")
        with torch.no_grad():
            assert max_error(compiled(X, sigma), network(X, 0.25)) < 1e-5


@pytest.fixture
def unwarned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inputs._Scale, "warned", False)
    monkeypatch.delenv(inputs.SCALE_ENVIRONMENT, raising=False)


@pytest.mark.usefixtures("unwarned")
@pytest.mark.parametrize("white", [255, 4095, 65535])
def test_a_picture_on_another_scale_is_told_once(white: int, models: tuple[Denoiser, Denoiser]) -> None:
    with pytest.warns(fastden.ScaleWarning, match=rf"divide x by its white point \({white} for \d+ bits\)") as told:
        models[0](X * white, 25 / 255)
    assert told[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        models[0](X * white, 25 / 255)
        fuse(models[0])(X * white, 25 / 255)


@pytest.mark.usefixtures("unwarned")
def test_values_that_are_no_other_scale(models: tuple[Denoiser, Denoiser], monkeypatch: pytest.MonkeyPatch) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fuse(models[0])(8 * X - 4, 0.1)  # as an iterate of plug-and-play
        models[0](torch.full((1, 3, 4, 4), float("nan")), 0.1)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", fastden.ScaleWarning)
            models[0](X * 255, 0.1)
        inputs._Scale.warned = False
        monkeypatch.setenv(inputs.SCALE_ENVIRONMENT, "0")
        models[0](X * 255, 0.1)


def nested(*shape: int) -> torch.Tensor:
    return torch.nested.nested_tensor([torch.rand(shape), torch.rand(shape)])


OTHER_TENSORS = {
    "nested": (lambda: nested(3, 7, 9), lambda: nested(1), "a nested tensor", r"a tensor of another kind \(nested\)"),
    "sparse": (
        X.to_sparse,
        torch.full((2,), 0.1).to_sparse,
        "layout torch.sparse_coo",
        r"a tensor of another kind \(torch.sparse_coo\)",
    ),
    "float8": (
        lambda: X.to(torch.float8_e4m3fn),
        lambda: torch.full((2,), 0.1).to(torch.float8_e4m3fn),
        "dtype torch.float8_e4m3fn; accepted: float64, float32, bfloat16 or float16",
        "dtype torch.float8_e4m3fn",
    ),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", OTHER_TENSORS)
def test_tensors_of_other_kinds_are_named(kind: str, models: tuple[Denoiser, Denoiser]) -> None:
    image, level, of_image, of_level = OTHER_TENSORS[kind]
    for network in (models[0], fuse(models[0])):
        with pytest.raises(TypeError, match=f"x: {of_image}"):
            network(image(), 0.1)
        with pytest.raises(TypeError, match=f"sigma: {of_level}"):
            network(X, level())
