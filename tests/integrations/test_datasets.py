"""The map function of datasets."""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest

import fastden
from fastden.integrations.datasets import DenoiseColumn
from fastden.network.model import Denoiser
from tests.helpers import random_network
from tests.integrations.installed import package

datasets = package("datasets")


def picture(seed: int) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).integers(0, 256, (18, 24, 3), np.uint8)


@pytest.fixture
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    images = [PIL.Image.fromarray(picture(seed)) for seed in range(3)]
    features = datasets.Features({"image": datasets.Image(), "level": datasets.Value("float32")})
    return datasets.Dataset.from_dict({"image": images, "level": [10.0, 25.0, 50.0]}, features=features)


def test_map(table: Any) -> None:
    for options in ({}, {"batched": True, "batch_size": 2}, {"num_proc": 2}):
        result = table.map(DenoiseColumn(sigma=25), **options)
        for seed, row in enumerate(result):
            assert np.array_equal(np.array(row["image"]), fastden.denoise(picture(seed), 25))


@pytest.mark.parametrize("shapes", [((18, 24, 3),) * 3, ((18, 24),) * 3, ((18, 24, 3), (20, 24, 3), (18, 25, 3))])
def test_batches_of_arrays(
    shapes: tuple[tuple[int, ...], ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the format numpy images of one shape come stacked, others as an array of objects."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    arrays = [np.random.default_rng(0).integers(0, 256, shape, np.uint8) for shape in shapes]
    columns = {"image": [PIL.Image.fromarray(array) for array in arrays], "level": [10.0, 25.0, 50.0]}
    table = datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image()).with_format("numpy")
    for options in ({}, {"batched": True}):
        result = table.map(DenoiseColumn(sigma="level"), **options).with_format(None)
        for array, row, sigma in zip(arrays, result, (10, 25, 50), strict=True):
            assert np.array_equal(np.array(row["image"]), fastden.denoise(array, sigma))


def test_levels_from_a_column_into_another(table: Any) -> None:
    features = datasets.Features({**table.features, "clean": datasets.Image()})
    result = table.map(DenoiseColumn(sigma="level", into="clean"), features=features)
    for seed, (row, sigma) in enumerate(zip(result, (10, 25, 50), strict=True)):
        assert np.array_equal(np.array(row["image"]), picture(seed))
        assert np.array_equal(np.array(row["clean"]), fastden.denoise(picture(seed), sigma))


@pytest.mark.parametrize("options", [{}, {"batched": True}])
def test_other_columns_keep_their_bytes(options: dict[str, Any]) -> None:
    """JPEG loses with each encoding."""
    buffer = io.BytesIO()
    PIL.Image.fromarray(picture(0)).save(buffer, "JPEG", quality=98)
    stored = {"bytes": buffer.getvalue(), "path": None}
    features = datasets.Features({"image": datasets.Image(), "other": datasets.Image()})
    table = datasets.Dataset.from_dict({"image": [stored], "other": [stored]}, features=features)
    into = datasets.Features({**features, "clean": datasets.Image()})
    result = table.map(DenoiseColumn(sigma=25, into="clean"), features=into, **options)
    assert set(result.column_names) == {"image", "other", "clean"}
    raw = result.cast_column("image", datasets.Image(decode=False)).cast_column("other", datasets.Image(decode=False))
    assert raw[0]["image"]["bytes"] == raw[0]["other"]["bytes"] == stored["bytes"]


def test_with_transform(table: Any) -> None:
    rows = table.with_transform(DenoiseColumn(sigma=25))[:2]
    assert np.array_equal(np.array(rows["image"][1]), fastden.denoise(picture(1), 25))


def test_the_fingerprint_follows_settings_and_model(
    table: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fingerprint = datasets.fingerprint.Hasher.hash
    assert fingerprint(DenoiseColumn(sigma=25)) == fingerprint(DenoiseColumn(sigma=25))
    assert fingerprint(DenoiseColumn(sigma=25)) != fingerprint(DenoiseColumn(sigma=26))
    folder = tmp_path / "model"
    random_network().save_pretrained(folder)
    column = DenoiseColumn(sigma=25, model=str(folder))
    first, pictures = fingerprint(column), [np.array(row["image"]) for row in table.map(column)]
    assert fingerprint(column) == first == fingerprint(DenoiseColumn(sigma=25, model=str(folder)))
    Denoiser.from_pretrained("color").save_pretrained(folder)  # trained again
    assert fingerprint(column) != first
    again = [np.array(row["image"]) for row in table.map(column)]
    assert not any(np.array_equal(*pair) for pair in zip(pictures, again, strict=True))
    second = fingerprint(column)
    (folder / "model.safetensors").touch()
    assert fingerprint(column) == second
    monkeypatch.setattr(fastden, "__version__", "0")
    assert fingerprint(column) != second
    copied = pickle.loads(pickle.dumps(column))
    assert copied == column
    assert vars(copied) == vars(column)


@pytest.mark.parametrize("width", [3, 4])
def test_batches_of_narrow_gray_arrays(width: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stacked, they look like one image with colours."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    arrays = np.random.default_rng(0).integers(0, 256, (6, 16, width), np.uint8)
    columns = {"image": [PIL.Image.fromarray(array) for array in arrays]}
    table = datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image()).with_format("numpy")
    result = table.map(DenoiseColumn(sigma=25, batched=True), batched=True).with_format(None)
    for array, row in zip(arrays, result, strict=True):
        assert np.array_equal(np.array(row["image"]), fastden.denoise(array, 25))


def test_mistakes(table: Any) -> None:
    with pytest.raises(KeyError, match=r"column: 'photo'; accepted: image, level"):
        table.map(DenoiseColumn("photo"))
    with pytest.raises(KeyError, match=r"sigma: 'noise'; accepted: image, level"):
        table.map(DenoiseColumn(sigma="noise"))
    with pytest.raises(ValueError, match="strength: 3"):
        DenoiseColumn(strength=3)
