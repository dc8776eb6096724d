"""A model's own noise estimator: saved and loaded with it, and asked wherever its noise level is to be estimated."""

from __future__ import annotations

import copy
import json
import math
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import fastden
from fastden.batch.plan import Job
from fastden.inference.estimate import load_estimator
from fastden.network.loading import load_network
from fastden.network.own_estimator import ESTIMATOR_FILE, OwnEstimator
from tests.cli.run import works
from tests.helpers import random_network


def noisy(seed: int = 0) -> Any:
    noise = np.random.default_rng(seed).normal(0, 10, (128, 128, 3))
    return np.rint(np.linspace(90, 160, 128)[:, None] + noise).astype(np.uint8)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model whose estimator says twice what the bundled one says."""
    model = random_network().eval()
    own = OwnEstimator.of(load_estimator())
    own.weights["trunk.6.bias"][0] += math.log(2)
    model.estimator = own
    model.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_it_is_asked_everywhere(folder: Path, tmp_path: Path) -> None:
    image = noisy()
    bundled = fastden.estimate_noise(image)
    own = fastden.estimate_noise(image, folder)
    assert own.sigma == pytest.approx(2 * bundled.sigma, rel=1e-4)
    model = fastden.Denoiser.from_pretrained(folder)
    for carrier in (str(folder), model, fastden.fuse(model)):
        assert fastden.estimate_noise(image, carrier) == own
    with pytest.raises(TypeError, match="model: int; accepted: a name, folder"):
        fastden.estimate_noise(image, 3)  # type: ignore[arg-type]
    assert fastden.estimate_noise(image, "photo") == bundled == fastden.estimate_noise(image, "color")

    wanted = fastden.denoise(image, own, model=folder)
    assert not np.array_equal(wanted, fastden.denoise(image, bundled, model=folder))
    np.testing.assert_array_equal(fastden.denoise(image, model=folder), wanted)
    tensor = torch.from_numpy(image).permute(2, 0, 1)[None]
    np.testing.assert_array_equal(fastden.denoise(tensor, model=folder)[0].permute(1, 2, 0).numpy(), wanted)
    np.testing.assert_array_equal(fastden.denoise_array(image, model=str(folder), channel_axis=-1), wanted)

    Image.fromarray(image).save(tmp_path / "a.png")
    batch = fastden.BatchDenoiser(folder)
    (record,) = batch.run(tmp_path / "a.png", tmp_path / "out.png").records
    assert record.sigma == pytest.approx(own.sigma, rel=1e-4)
    assert "estimator" in record.options
    job = Job(tmp_path / "a.png", tmp_path / "b.png")
    assert "estimator" not in fastden.BatchDenoiser("photo").settings.options(job)
    row = json.loads(works("noise", tmp_path / "a.png", "--json", "--model", folder))
    assert row["sigma"] == pytest.approx(own.sigma, rel=1e-4)
    assert f"--model {folder}" in works("noise", tmp_path / "a.png", "--model", folder)


def test_dask_workers_ask_it(folder: Path) -> None:
    da = pytest.importorskip("dask.array")
    image = noisy()
    options: dict[str, Any] = {"model": str(folder), "dtype": "float32"}  # tiles of bfloat16 round differently
    lazy = fastden.denoise_array(da.from_array(image, chunks=64), channel_axis=-1, **options)
    wanted = fastden.denoise(image, **options)
    assert (wanted != fastden.denoise(image, fastden.estimate_noise(image), **options)).mean() > 0.01
    assert np.abs(lazy.compute().astype(int) - wanted).max() <= 1


def test_another_estimator_is_another_run(folder: Path, tmp_path: Path) -> None:
    """``resume`` does not take results of an earlier estimator for done, and a loaded network is not kept."""
    Image.fromarray(noisy()).save(tmp_path / "a.png")
    first = fastden.BatchDenoiser(folder).run([tmp_path / "a.png"], tmp_path / "out")
    weights = load_file(folder / ESTIMATOR_FILE)
    weights["trunk.6.bias"][0] -= math.log(4)
    save_file(weights, folder / ESTIMATOR_FILE)
    again = fastden.BatchDenoiser(folder, overwrite=True).run([tmp_path / "a.png"], tmp_path / "out", resume=True)
    assert [record.status for record in again.records] == ["done"]
    assert again.records[0].sigma == pytest.approx(first.records[0].sigma / 4, rel=1e-3)
    assert not fastden.BatchDenoiser(folder).run([tmp_path / "a.png"], tmp_path / "out", resume=True).records


def test_it_is_recorded_where_it_is_asked(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder of the user's may have a bundled model's name."""
    monkeypatch.chdir(tmp_path)
    folder.rename("color")
    Image.fromarray(noisy()).save("a.png")
    Image.fromarray(np.full((128, 128), 10, np.uint8)).save("map.png")
    job = Job(Path("a.png"), Path("b.png"))
    for model in (Path("color"), "./color"):
        assert "estimator" in fastden.BatchDenoiser(model).settings.options(job)
        for given in ({"sigma": 10}, {"sigma_map": "map.png"}):
            assert "estimator" not in fastden.BatchDenoiser(model, **given).settings.options(job)
    assert "estimator" not in fastden.BatchDenoiser("color").settings.options(job)
    assert works("noise", "a.png", "--model", "./color").rstrip().endswith("--model ./color")


def test_a_copy_makes_its_network_from_its_weights() -> None:
    own = OwnEstimator.of(load_estimator())
    assert own.network is own.network
    for other in (copy.deepcopy(own), pickle.loads(pickle.dumps(own))):
        assert list(vars(other)) == ["weights"]
        other.weights["trunk.6.bias"][0] += 1
        assert other.network.trunk[6].bias[0] == own.network.trunk[6].bias[0] + 1


def test_it_is_no_part_of_the_network(folder: Path) -> None:
    model = fastden.Denoiser.from_pretrained(folder)
    plain = random_network()
    assert list(model.state_dict()) == list(plain.state_dict())
    assert len(list(model.modules())) == len(list(plain.modules()))
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), load_network(folder)):
        assert other.estimator is not None
        assert torch.equal(other.estimator.weights["trunk.6.bias"], model.estimator.weights["trunk.6.bias"])
    with torch.device("meta"):
        assert fastden.estimate_noise(noisy(), model).sigma > 0


def test_a_broken_file_is_named(folder: Path) -> None:
    (folder / ESTIMATOR_FILE).write_bytes(b"junk")
    with pytest.raises(ValueError, match=r"noise\.safetensors cannot be read"):
        fastden.denoise(noisy(), model=folder)
    save_file({"trunk.6.bias": torch.zeros(3)}, folder / ESTIMATOR_FILE)
    with pytest.raises(RuntimeError, match=r"noise\.safetensors: (?s:.*)Missing key"):
        fastden.Denoiser.from_pretrained(folder)


def test_saved_files_have_the_mode_of_others(tmp_path: Path, folder: Path) -> None:
    """safetensors writes files that their owner alone may read."""
    (tmp_path / "other").write_bytes(b"")
    usual = (tmp_path / "other").stat().st_mode
    assert {file.stat().st_mode for file in folder.iterdir()} == {usual}
    (folder / "model.safetensors").chmod(0o640)
    fastden.Denoiser.from_pretrained(folder).save_pretrained(folder)
    modes = {file.name: file.stat().st_mode & 0o777 for file in folder.iterdir()}
    assert modes["model.safetensors"] == 0o640
    assert modes["config.json"] == usual & 0o777


def test_no_estimator_of_another_model_stays(folder: Path) -> None:
    random_network(seed=3).save_pretrained(folder)
    assert fastden.Denoiser.from_pretrained(folder).estimator is None


def test_map_location_may_be_a_device() -> None:
    model = fastden.Denoiser.from_pretrained("color", map_location=torch.device("cpu"))
    assert model.conv0.weight.device == torch.device("cpu")
