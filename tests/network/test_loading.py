"""Names, devices and dtypes become a network that is ready to run."""

from __future__ import annotations

import json
import math
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import fastden
from fastden.images.pixels import to_dtype
from fastden.network import loading
from fastden.network.devices import parse_device
from tests.helpers import random_network
from tests.image_files import pixels, save_model

SIGMA = 20.0


@pytest.fixture(scope="module")
def network() -> fastden.FusedDenoiser:
    return fastden.fuse(fastden.Denoiser().eval())


def test_wrong_models_devices_and_dtypes(network: fastden.FusedDenoiser, tmp_path: Path) -> None:
    model = save_model(tmp_path / "model")
    cases: list[tuple[dict[str, Any], type[Exception], str]] = [
        ({"model": "no-such-model"}, ValueError, "model: 'no-such-model'.*accepted"),
        ({"model": 3}, TypeError, "model: int"),
        ({"model": model, "device": "gpu9"}, ValueError, "^device: 'gpu9'; accepted: cpu, cuda"),
        ({"model": model, "device": "meta"}, ValueError, "^device: 'meta'; accepted: cpu, cuda"),
        ({"model": model, "device": torch.device("xla")}, ValueError, "^device: 'xla'; accepted: cpu, cuda"),
        ({"model": model, "device": 1.5}, ValueError, "^device: '1.5'; accepted: cpu, cuda"),
        ({"model": model, "dtype": "int8"}, ValueError, "dtype: 'int8'; accepted: auto, float32"),
        ({"model": model, "dtype": torch.int8}, ValueError, "dtype: torch.int8"),
        ({"model": network, "dtype": "float64"}, ValueError, "device, dtype: given with a FusedDenoiser"),
    ]
    if not torch.cuda.is_available():
        cases.append(({"model": model, "device": "cuda"}, ValueError, "no CUDA device"))
    for options, error, message in cases:
        with pytest.raises(error, match=message):
            fastden.denoise(pixels(), SIGMA, **options)


def test_models_by_folder_are_kept_until_they_change(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model")
    first = loading.load_network(folder)
    assert loading.load_network(str(folder)) is first
    assert loading.load_network(folder, dtype="float64") is not first
    random_network(seed=5).save_pretrained(folder)
    os.utime(folder / "model.safetensors", ns=(1, 1))
    assert not torch.equal(loading.load_network(folder).stem_weight, first.stem_weight)


def test_a_module_is_fused_where_it_is(network: fastden.FusedDenoiser) -> None:
    model = random_network()
    found = loading.load_network(model, dtype="float64")
    assert (found.dtype, found.device) == (torch.float64, torch.device("cpu"))
    image = pixels(dtype=np.float64)
    x = torch.from_numpy(image).permute(2, 0, 1)[None]
    with torch.no_grad():
        expected = random_network(dtype=torch.float64)(x, SIGMA / 255)[0].permute(1, 2, 0).numpy()
    np.testing.assert_allclose(fastden.denoise(image, SIGMA, model=model, dtype="float64"), expected, atol=1e-10)


@pytest.mark.parametrize("native", [True, False])
def test_automatic_dtype(monkeypatch: pytest.MonkeyPatch, native: bool) -> None:
    monkeypatch.setattr(loading, "native_bf16", lambda: native)
    cpu = torch.device("cpu")
    assert loading.choose_dtype("auto", cpu, True) == (torch.bfloat16 if native else torch.float32)
    assert loading.choose_dtype("auto", cpu, False) == torch.float32
    assert loading.choose_dtype("float32", cpu, True) == torch.float32
    assert loading.choose_dtype(torch.float16, cpu, True) == torch.float16


@pytest.mark.parametrize("available", [True, False])
def test_mps_is_a_device_where_it_is(monkeypatch: pytest.MonkeyPatch, available: bool) -> None:
    monkeypatch.setattr("torch.backends.mps.is_available", lambda: available)
    if available:
        assert parse_device("mps") == torch.device("mps")
    else:
        with pytest.raises(ValueError, match=r"^device: 'mps'; accepted: cpu, cuda, or"):
            parse_device("mps")


@pytest.mark.parametrize(
    ("key", "value", "accepted"),
    [
        *(("noise_level_input", value, "true or false") for value in ("x", math.nan, 1e9, 1.5, [])),
        *(("composed", value, "true or false") for value in (1e30, -1, None)),
        *(("image_channels", value, "1 or 3") for value in (True, 3.0, "3")),
    ],
)
def test_nonsense_in_a_configuration_is_named(tmp_path: Path, key: str, value: Any, accepted: str) -> None:
    folder = save_model(tmp_path / "model")
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), key: value}))
    with pytest.raises(ValueError, match=re.escape(f"model: {file}: {key}: {value!r}; accepted: {accepted}")):
        fastden.Denoiser.from_pretrained(folder)
    with pytest.raises(ValueError, match=f"^{key}: "):
        fastden.Denoiser(**{key: value})
    file.write_text("[" * 100_000)
    with pytest.raises(ValueError, match=re.escape(f"model: {file} is nested too deeply")):
        fastden.Denoiser.from_pretrained(folder)


def test_weights_that_are_no_numbers(tmp_path: Path) -> None:
    """Pictures of 8 bits would be black."""
    model = fastden.Denoiser.from_pretrained(save_model(tmp_path / "model"))
    with torch.no_grad():
        model.conv2.conv.weight[0, 0, 0, 0] = torch.nan
    model.save_pretrained(tmp_path / "nan")
    for dtype in (np.uint8, np.uint16):
        with pytest.raises(ValueError, match=r"nan/model\.safetensors: NaN or infinity in conv2\.conv\.weight"):
            fastden.denoise(pixels(dtype=dtype), 5, model=tmp_path / "nan")
        # Of a network in memory nobody looks at the weights.
        with pytest.raises(ValueError, match="result: NaN or infinity, which integers cannot hold"):
            fastden.denoise(pixels(dtype=dtype), 5, model=model)
    assert np.isnan(fastden.denoise(pixels(dtype=np.float32), 5, model=model)).any()
    with pytest.raises(ValueError, match="values: NaN or infinity"):
        to_dtype(np.array([0.5, np.nan], np.float32), np.uint8)
