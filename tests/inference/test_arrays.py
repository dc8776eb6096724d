"""Dask, Zarr and NumPy arrays: chunks give what the whole image gives."""

from __future__ import annotations

import errno
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

import fastden
from fastden.cli.main import app
from fastden.errors import UserError
from fastden.images.ranges import ORDINARY
from fastden.inference import array_noise, arrays
from fastden.inference.arrays import denoise_array, snapped
from tests.helpers import random_network
from tests.image_files import pixels

da = pytest.importorskip("dask.array")
zarr = pytest.importorskip("zarr")

from numcodecs import Delta, GZip  # noqa: E402
from zarr.codecs import BloscCodec, BytesCodec, GzipCodec, TransposeCodec  # noqa: E402


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("model")
    random_network().save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def blind(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("blind")
    random_network(noise_level_input=False).save_pretrained(folder)
    return str(folder)


def computed(array: Any) -> Any:
    return array.compute(scheduler="synchronous")


def same(result: Any, expected: Any) -> None:
    """Equal up to the order of sums: seldom 1 in the last place of integers, and a few roundings of floats."""
    assert (result.shape, result.dtype) == (expected.shape, expected.dtype)
    if result.dtype.kind == "u":
        difference = np.abs(result.astype(int) - expected.astype(int))
        assert difference.max() <= 1
        assert (difference > 0).mean() < 0.01
    else:
        atol = (1e-13 if result.dtype == np.float64 else 1e-6) * np.abs(expected).max()
        np.testing.assert_allclose(result, expected, rtol=0, atol=atol)


@settings(max_examples=100)
@given(
    sizes=st.lists(st.integers(1, 80), min_size=1, max_size=8),
    multiple=st.sampled_from([1, 4, 7, 64]),
    least=st.integers(1, 30),
)
def test_snapped_chunks(sizes: list[int], multiple: int, least: int) -> None:
    chunks = snapped(sizes, multiple, least)
    starts = np.cumsum(chunks)[:-1]
    assert sum(chunks) == sum(sizes)
    assert all(start % multiple == 0 for start in starts)
    assert len(chunks) == 1 or min(chunks) >= least
    kept = {start for start in np.cumsum(sizes)[:-1] if start % multiple == 0}
    if least == 1:
        assert kept <= set(starts)


@st.composite
def chunked(draw: st.DrawFn) -> tuple[tuple[int, ...], tuple[tuple[int, ...], ...]]:
    """Height and width, and chunks of each."""
    chunks = []
    for _ in range(2):
        sizes = draw(st.lists(st.integers(1, 40), min_size=1, max_size=3))
        chunks.append(tuple(sizes))
    return tuple(map(sum, chunks)), tuple(chunks)


@settings(max_examples=8)
@given(plan=chunked(), channels=st.sampled_from([0, 1, 3, 4]), dtype=st.sampled_from(["u1", "u2", "f4", "f8"]))
@example(plan=((1, 1), ((1,), (1,))), channels=3, dtype="f8")
@example(plan=((97, 110), ((32, 40, 25), (24, 26, 60))), channels=3, dtype="f8")
@example(plan=((130, 51), ((64, 66), (51,))), channels=0, dtype="f4")
def test_chunks_give_what_the_whole_image_gives(plan: Any, channels: int, dtype: str, model: str) -> None:
    shape, chunks = plan
    image = pixels(*shape, channels, dtype)
    expected = fastden.denoise(image, 20, model=model, dtype="float64", tile=None)
    lazy = denoise_array(
        da.from_array(image, (*chunks, -1)[: image.ndim]),
        20,
        model=model,
        dtype="float64",
        channel_axis=-1 if channels else None,
    )
    same(computed(lazy), expected)


def test_float32_and_large_halo_free_axes(model: str) -> None:
    image = pixels(70, 200, 3, np.float32)
    lazy = denoise_array(da.from_array(image, (70, 48, 1)), 20, model=model, dtype="float32")
    assert lazy.numblocks == (1, 4, 1)
    same(computed(lazy), fastden.denoise(image, 20, model=model, dtype="float32", tile=None))


def test_a_smaller_halo_would_show(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    image = pixels(64, 96, 3, np.float64)
    expected = fastden.denoise(image, 20, model=model, dtype="float64", tile=None)
    monkeypatch.setattr(arrays, "HALO", 16)
    result = computed(denoise_array(da.from_array(image, (32, 32, 3)), 20, model=model, dtype="float64"))
    assert np.abs(result - expected).max() > 1e-9


def test_frames_and_axes(model: str) -> None:
    """(T, Z, Y, X) of gray and (T, C, Y, X) of colour: each image on its own."""
    gray = np.stack([pixels(40, 52, 0, np.uint16, seed=seed) for seed in range(6)]).reshape(2, 3, 40, 52)
    lazy = denoise_array(da.from_array(gray, (1, 2, 24, 28)), 30, model=model, dtype="float64")
    eager = denoise_array(gray, 30, model=model, dtype="float64")
    for index in np.ndindex(2, 3):
        same(eager[index], fastden.denoise(gray[index], 30, model=model, dtype="float64"))
    same(computed(lazy), eager)
    colour = np.stack([pixels(30, 60, 3, np.uint8, seed=seed).transpose(2, 0, 1) for seed in range(2)])
    lazy = denoise_array(da.from_array(colour, (1, 1, 30, 30)), 30, model=model, dtype="float64", channel_axis=1)
    for frame, result in zip(colour, computed(lazy), strict=True):
        expected = fastden.denoise(np.ascontiguousarray(frame.transpose(1, 2, 0)), 30, model=model, dtype="float64")
        same(result, expected.transpose(2, 0, 1))


def test_three_gray_channels_are_no_colour_if_told_so(model: str) -> None:
    image = pixels(40, 3, 0, np.float64)[None]
    result = denoise_array(image, 30, model=model, dtype="float64", channel_axis=None)
    same(result[0], fastden.denoise(image[0], 30, model=model, dtype="float64"))


def test_sigma_of_each_image_and_map(model: str) -> None:
    frames = np.stack([pixels(40, 60, 3, np.float64, seed=seed) for seed in range(2)])
    lazy = denoise_array(da.from_array(frames, (1, 24, 32, 3)), [10, 40], model=model, dtype="float64")
    expected = [fastden.denoise(frames[i], level, model=model, dtype="float64") for i, level in enumerate((10, 40))]
    same(computed(lazy), np.stack(expected))
    levels = np.linspace(0, 75, 40 * 60, dtype=np.float32).reshape(40, 60)
    lazy = denoise_array(da.from_array(frames, (2, 24, 32, 3)), levels, model=model, dtype="float64")
    expected = [fastden.denoise(frame, levels, model=model, dtype="float64") for frame in frames]
    same(computed(lazy), np.stack(expected))


@pytest.mark.parametrize("shape", [(40, 60), (530, 40), (1100, 33)], ids=str)
def test_estimated_sigma(shape: tuple[int, int], model: str) -> None:
    """It is that of the whole image, whatever the chunks, even if the estimate takes crops."""
    image = pixels(*shape, 4, np.uint8)
    image[: shape[0] // 3] //= 2
    ordinary = da.from_array(array_noise.as_ranges([ORDINARY]).reshape(1, 1, 1, 1))
    lazy = array_noise.estimates(da, da.from_array(image[None], (1, 100, 25, 4)), ordinary)
    np.testing.assert_allclose(computed(lazy)["sigmas"].reshape(-1), fastden.estimate_noise(image).sigmas, rtol=1e-6)
    if shape == (40, 60):
        lazy = denoise_array(da.from_array(image, (24, 24, 4)), model=model, dtype="float64")
        same(computed(lazy), fastden.denoise(image, model=model, dtype="float64"))
        same(denoise_array(image, model=model, dtype="float64"), computed(lazy))


def test_blind_model_and_strength(blind: str) -> None:
    image = pixels(50, 60, 3, np.float64)
    lazy = denoise_array(da.from_array(image, (24, 32, 3)), model=blind, dtype="float64", strength=0.3)
    same(computed(lazy), fastden.denoise(image, model=blind, dtype="float64", strength=0.3))
    with pytest.raises(ValueError, match=r"sigma: 20, but this model is blind"):
        denoise_array(da.from_array(image), 20, model=blind)
    with pytest.raises(ValueError, match=r"strength: 2, but this model is blind"):
        denoise_array(da.from_array(image), model=blind, strength=2)


def test_the_model_is_loaded_once_by_all_threads(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from fastden.network import loading

    loaded = []
    fuse = loading.fuse

    def counted(*arguments: Any, **options: Any) -> Any:
        loaded.append(arguments[1])
        return fuse(*arguments, **options)

    monkeypatch.setattr(loading, "fuse", counted)
    loading._load_cached.cache_clear()
    image = pixels(80, 80, 3, np.float32)
    lazy = denoise_array(da.from_array(image, (24, 24, 3)), 20, model=model, dtype="float64")
    assert lazy.npartitions == 9
    assert max(len(pickle.dumps(task)) for task in dict(lazy.dask).values()) < 20_000
    lazy.compute(scheduler="threads", num_workers=4)
    # The first is the check of the arguments.
    assert loaded == [torch.float32, torch.float64]


@pytest.mark.slow
def test_other_processes(model: str, tmp_path: Path, root: Path) -> None:
    """Chunks are computed in processes that know only what they are sent."""
    np.save(tmp_path / "image.npy", pixels(60, 60, 3, np.float32))
    program = f"""
import numpy as np, dask.array as da, fastden
if __name__ == "__main__":
    image = np.load({str(tmp_path / "image.npy")!r})
    lazy = fastden.denoise_array(da.from_array(image, (32, 60, 3)), 20, model={model!r}, dtype="float32")
    np.save({str(tmp_path / "result.npy")!r}, lazy.compute(scheduler="processes", num_workers=1))
"""
    (tmp_path / "program.py").write_text(program)
    subprocess.run([sys.executable, tmp_path / "program.py"], check=True, cwd=root, env={"PYTHONPATH": str(root)})
    same(
        np.load(tmp_path / "result.npy"),
        fastden.denoise(np.load(tmp_path / "image.npy"), 20, model=model, dtype="float32"),
    )


def stored(folder: Path, image: Any, chunks: tuple[int, ...], **options: Any) -> Any:
    array = zarr.create_array(str(folder), shape=image.shape, dtype=image.dtype, chunks=chunks, **options)
    array[:] = image
    return array


def test_zarr_lazily_and_written(model: str, tmp_path: Path) -> None:
    frames = np.stack([pixels(90, 70, 3, np.uint16, seed=seed) for seed in range(2)])
    names = ("t", "y", "x", "c")
    source = stored(tmp_path / "a.zarr", frames, (1, 30, 30, 3), attributes={"unit": "nm"}, dimension_names=names)
    expected = np.stack([fastden.denoise(frame, 20, model=model, dtype="float64") for frame in frames])
    lazy = denoise_array(source, 20, model=model, dtype="float64")
    assert lazy.numblocks[0] == 2
    same(computed(lazy), expected)
    written = denoise_array(source, 20, model=model, dtype="float64", out=tmp_path / "b.zarr")
    same(written[:], expected)
    assert (written.chunks, dict(written.attrs)) == (source.chunks, {"unit": "nm"})
    assert written.metadata.dimension_names == names
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.zarr", "b.zarr"]


@pytest.mark.parametrize(
    "options",
    [
        {"compressors": BloscCodec(cname="zstd", clevel=9, shuffle="bitshuffle"), "fill_value": 7},
        {"compressors": None, "filters": TransposeCodec(order=(1, 0, 2)), "serializer": BytesCodec(endian="big")},
        {"shards": (60, 60, 3), "compressors": GzipCodec(level=1), "fill_value": 3},
        {"zarr_format": 2, "compressors": GZip(level=1), "filters": [Delta("u2")], "fill_value": 9, "order": "F"},
        {"zarr_format": 2, "compressors": None, "fill_value": None},
    ],
)
def test_codecs_and_fill_value_are_those_of_the_source(model: str, tmp_path: Path, options: dict[str, Any]) -> None:
    image = pixels(40, 30, 3, np.uint16)
    source = stored(tmp_path / "a.zarr", image, (30, 30, 3), **options)
    written = denoise_array(source, 20, model=model, dtype="float64", out=tmp_path / "b.zarr")
    assert written.metadata == source.metadata
    same(written[:], fastden.denoise(image, 20, model=model, dtype="float64"))


@pytest.mark.parametrize(
    ("channel_axis", "chunks"), [(None, (2, 20, 30)), (np.int64(1), (2, 1, 20, 30)), (-1, (2, 20, 30, 1))]
)
def test_frames_stay_in_their_chunks(model: str, tmp_path: Path, channel_axis: Any, chunks: tuple[int, ...]) -> None:
    """Chunks of a few pixels are joined to larger ones; joined along the frames they would not fit in memory."""
    gray = channel_axis is None
    frames = np.stack([pixels(40, 30, 0 if gray else 3, np.uint8, seed=seed) for seed in range(6)])
    source = stored(tmp_path / "a.zarr", frames if gray else np.moveaxis(frames, -1, channel_axis), chunks)
    lazy = denoise_array(source, 20, model=model, dtype="float64", channel_axis=channel_axis)
    by_size = dict(zip(lazy.shape, lazy.chunks, strict=True))
    assert [by_size[size] for size in (6, 40, 30)] == [(2, 2, 2), (40,), (30,)]
    expected = np.stack([fastden.denoise(frame, 20, model=model, dtype="float64") for frame in frames])
    same(computed(lazy), expected if gray else np.moveaxis(expected, -1, channel_axis))


def test_written_chunks_are_never_shared(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With Zarr chunks of 25 pixels, shards of 50 and computed chunks of 32, each shard is written once, whole."""
    image = pixels(96, 100, 0, np.uint8)
    target = stored(tmp_path / "b.zarr", np.zeros_like(image), (25, 25), shards=(50, 50))
    regions = []
    store = da.store
    monkeypatch.setattr(
        da, "store", lambda result, *rest, **more: regions.append(result.chunks) or store(result, *rest, **more)
    )
    result = denoise_array(da.from_array(image, (32, 32)), 20, model=model, dtype="float64", out=target)
    assert result is target
    assert regions == [((50, 46), (50, 50))]
    same(target[:], fastden.denoise(image, 20, model=model, dtype="float64"))


def test_numpy_to_zarr(model: str, tmp_path: Path) -> None:
    image = pixels(40, 50, 3, np.float32)
    written = denoise_array(image, 20, model=model, dtype="float32", out=str(tmp_path / "a.zarr"))
    same(written[:], fastden.denoise(image, 20, model=model, dtype="float32"))


def test_nothing_half_written_is_left(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image = pixels(64, 64, 3, np.float32)
    image[60, 60] = np.nan
    with pytest.raises(ValueError, match="NaN or infinity"):
        denoise_array(da.from_array(image, (32, 32, 3)), 20, model=model, out=tmp_path / "a.zarr")
    assert list(tmp_path.iterdir()) == []

    def broken(block: Any) -> Any:
        raise OSError("the disk of the source")

    def full(*arguments: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr("fastden.inference.arrays._store", full)
        with pytest.raises(UserError, match=r"^out: .*a\.zarr: cannot be written: No space left"):
            denoise_array(pixels(8, 8), 20, model=model, out=tmp_path / "a.zarr")
    assert list(tmp_path.iterdir()) == []

    source = da.from_array(image, (32, 32, 3)).map_blocks(broken, dtype=np.float32, meta=image[:0, :0])
    with pytest.raises(OSError, match=r"^the disk of the source"):
        denoise_array(source, 20, model=model, out=tmp_path / "a.zarr", value_range=(0, 1))
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "a.zarr").mkdir()
    with pytest.raises(UserError, match=r"out: .*a\.zarr exists; accepted: a new path"):
        denoise_array(da.from_array(image), 20, model=model, out=tmp_path / "a.zarr")


IMAGE = np.zeros((8, 9, 3), np.float32)
WRONG: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "list": ({"array": [[1]]}, TypeError, r"array: list; accepted: a Dask, Zarr or NumPy array"),
    "int32": ({"array": IMAGE.astype(np.int32)}, TypeError, r"array: dtype int32; accepted: uint8"),
    "one axis": ({"array": np.zeros(5)}, ValueError, r"array: shape \(5,\); accepted: \(\.\.\., Y, X, C\)"),
    "empty": ({"array": np.zeros((0, 5))}, ValueError, r"array: shape \(0, 5\); .*not empty"),
    "five channels": ({"channel_axis": 0}, ValueError, r"channel_axis: 0, 8 channels; accepted: 1, 3 or 4, or None"),
    "no axis": ({"channel_axis": 3}, ValueError, r"channel_axis: 3; accepted: .* an axis of the shape \(8, 9, 3\)"),
    "truth": ({"channel_axis": True}, ValueError, r"channel_axis: True; accepted"),
    "fraction": ({"channel_axis": 2.0}, ValueError, r"channel_axis: 2.0; accepted"),
    "network": ({"model": random_network()}, TypeError, r"model: Denoiser, which would travel .*accepted: a bundled"),
    "sigma": ({"sigma": 300}, ValueError, r"sigma: 300; accepted: 'auto', or 0 to 255"),
    "word": ({"sigma": "high"}, TypeError, r"sigma: 'high'; accepted"),
    "map": ({"sigma": np.zeros((9, 8))}, ValueError, r"sigma: shape \(9, 8\); accepted: a number, \(8, 9\) \(a map\)"),
    "ragged": ({"sigma": [[1, 2], [3]]}, TypeError, r"sigma: list holds values that are not numbers; accepted"),
    "meta": ({"sigma": torch.empty(8, 9, device="meta")}, TypeError, r"sigma: a tensor of another kind \(meta"),
    "negative map": ({"sigma": np.full((8, 9), -1.0)}, ValueError, r"sigma: values from -1 to -1; accepted: 0 to 255"),
    "strength": ({"strength": 3}, ValueError, r"strength: 3; accepted"),
    "three numbers": ({"value_range": (0, 1, 2)}, ValueError, r"value_range: \(0, 1, 2\); accepted: None, or"),
    "one number": ({"value_range": 1}, ValueError, r"value_range: 1; accepted"),
    "out": ({"out": 5}, TypeError, r"out: int; accepted: a path, or a writable zarr\.Array"),
}


def test_levels_as_tensors(model: str) -> None:
    image = pixels(40, 40, dtype=np.float32)[None]
    wanted = denoise_array(image, 20, model=model)
    level = torch.tensor(20.0, requires_grad=True)
    for sigma in (level, level[None], [level], level.detach().bfloat16()[None], torch.tensor([20]), (20,)):
        np.testing.assert_array_equal(denoise_array(image, sigma, model=model), wanted)


@pytest.mark.gpu
def test_levels_on_a_gpu(model: str) -> None:
    image = pixels(40, 40, dtype=np.float32)[None]
    level = torch.tensor([20.0], device="cuda")
    wanted = denoise_array(image, 20, model=model, device="cpu")
    np.testing.assert_array_equal(denoise_array(image, level, model=model, device="cpu"), wanted)


@pytest.mark.parametrize("case", WRONG)
def test_wrong_arguments(case: str, model: str) -> None:
    changes, kind, message = WRONG[case]
    arguments = {"array": IMAGE, "sigma": 20, "model": model, **changes}
    with pytest.raises(kind, match=message):
        denoise_array(**arguments)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dtype": "half"}, r"dtype: 'half'; accepted: auto, float32"),
        ({"device": "gpu"}, r"device: 'gpu'; accepted: cpu, cuda, mps, or one of several such as cuda:1"),
        ({"device": "meta"}, r"device: 'meta'; accepted: cpu, cuda, mps"),
        (
            {"quality": "fast", "dtype": "float64", "model": "color"},
            r"quality: 'fast', but dtype torch\.float64; accept",
        ),
        (
            {"quality": "fast", "dtype": torch.float16, "device": "cpu", "model": "color"},
            r"quality: 'fast', but dtype torch\.float16; accepted: cpu in float32 or bfloat16, cuda in 16 bits",
        ),
        ({"quality": "fast", "device": "mps", "model": "color"}, r"quality: 'fast', but device mps; accepted: cpu in"),
        ({"quality": "fast"}, r"quality: 'fast', but this model does not know the ranges of its activations"),
    ],
    ids=str,
)
def test_settings_that_no_worker_can_have(settings: dict[str, Any], message: str, model: str) -> None:
    """They raise at once, not where the first chunk is computed."""
    with pytest.raises(ValueError, match=message):
        denoise_array(da.from_array(IMAGE), 20, **{"model": model, **settings})


def test_settings_of_other_machines(model: str) -> None:
    image = da.from_array(IMAGE)
    assert denoise_array(image, 20, model=model, device="cuda:7").shape == image.shape
    assert denoise_array(image, 20, quality="fast", dtype="float16").shape == image.shape


def test_wrong_target(model: str, tmp_path: Path) -> None:
    source = stored(tmp_path / "a.zarr", IMAGE, (8, 9, 3))
    with pytest.raises(ValueError, match=r"out: the array itself"):
        denoise_array(source, 20, model=model, out=source)
    with pytest.raises(ValueError, match=r"out: \(8, 9, 3\) uint8; accepted: \(8, 9, 3\) float32, as the array"):
        denoise_array(source, 20, model=model, out=stored(tmp_path / "b.zarr", IMAGE.astype(np.uint8), (8, 9, 3)))


def test_unknown_sizes(model: str) -> None:
    unknown = da.from_array(IMAGE, (4, 9, 3))
    unknown = unknown[unknown[:, 0, 0] >= 0]
    with pytest.raises(ValueError, match=r"array: shape \(nan, 9, 3\); accepted: known sizes"):
        denoise_array(unknown, 20, model=model)


def test_without_the_packages(model: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "dask.array", None)
    with pytest.raises(UserError, match=r"install: pip install 'fastden\[arrays\]'"):
        denoise_array(IMAGE, 20, model=model, out=tmp_path / "a.zarr")
    assert denoise_array(IMAGE, 20, model=model).shape == IMAGE.shape  # NumPy alone needs neither


@pytest.mark.parametrize("value_range", [None, (0.0, 1.0)])
@pytest.mark.parametrize("wrong", [np.nan, np.inf])
def test_values_that_are_no_numbers(model: str, value_range: Any, wrong: float) -> None:
    image = pixels(40, 40, dtype=np.float32)
    image[20, 20] = wrong
    with pytest.raises(ValueError, match="NaN or infinity"):
        computed(denoise_array(image, 10, model=model, value_range=value_range))


def test_a_url_is_no_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder named ``memory:`` would be made here, and the run would seem to have uploaded its result."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        UserError, match=r"out: memory://bucket/x\.zarr is a URL; accepted: a path, or zarr\.create_array"
    ):
        denoise_array(pixels(8, 8), 20, out="memory://bucket/x.zarr")
    for name in ("a.png", "a.mp4"):
        (tmp_path / name).write_bytes(b"")
        done = CliRunner().invoke(app, ["denoise", name, "-o", "s3://bucket/out/"])
        assert done.exit_code == 1
        assert "output: s3://bucket/out/ is a URL; accepted: a path, or URLs with --engine ray" in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.mp4", "a.png"]


@pytest.mark.parametrize("lazy", [True, False])
def test_an_estimate_for_all_images(lazy: bool) -> None:
    images = np.stack([pixels(64, 70, 3, np.uint8, seed=seed) for seed in range(2)])
    estimate = fastden.estimate_noise(images[0])
    source = da.from_array(images, (1, 32, 32, 3)) if lazy else images
    done = denoise_array(source, estimate, model="color", dtype="float64")
    expected = np.stack([fastden.denoise(one, estimate, model="color", dtype="float64") for one in images])
    same(computed(done) if lazy else done, expected)
