"""Pictures whose values leave [0, 1] or fill a part of it: denoised on their range, ordinary ones on [0, 1]."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
import torch
from skimage import data
from typer.testing import CliRunner

import fastden
from fastden.batch.manifest import Record
from fastden.cli.main import app
from fastden.errors import ScaleWarning, UserError
from fastden.images.codec import ImageFile, read_image, write_image
from fastden.images.pixels import Array
from fastden.images.ranges import ORDINARY, ValueRange, count_range, find_range, joined, range_of
from fastden.images.strips import read_samples
from fastden.inference.run import denoise_batch
from fastden.network.loading import load_network
from tests.helpers import streaming


@pytest.fixture(scope="module")
def clean() -> Array:
    """A photograph of 192 x 256."""
    picture: Array = data.astronaut()[:192, 60:316] / 255
    return picture


def noise(shape: tuple[int, ...], sigma: float, seed: int = 0) -> Array:
    """White, ``sigma`` on the scale 0-255."""
    return np.random.default_rng(seed).normal(0, sigma / 255, shape)


def succeed(*arguments: str) -> Any:
    """Run a command that succeeds; returns its output."""
    done = CliRunner().invoke(app, list(arguments))
    assert done.exit_code == 0, (done.output, done.exception)
    return done


def rmse(a: Array, b: Array) -> float:
    return float(np.sqrt(np.mean((np.asarray(a, np.float64) - b) ** 2)))


def as_it_is(picture: Array, sigma: float) -> Array:
    """The network's result without a change of range."""
    (result,) = denoise_batch([picture], sigma / 255, load_network("color", "cpu", "float32"))
    return result


def test_a_photograph_times_anything_is_denoised_as_well(clean: Array) -> None:
    """Before the rule, pictures times 2.5 and 4 stayed as noisy as they were (0.043 and 0.080 against 0.039)."""
    for factor, most in ((2.5, 0.0242), (4.0, 0.032)):
        noisy = (clean * factor + noise(clean.shape, 10)).astype(np.float32)
        result = fastden.denoise(noisy, 10)
        divided = fastden.denoise(noisy / np.float32(factor), 10 / factor) * np.float32(factor)
        assert rmse(result, clean * factor) < most
        assert rmse(result, clean * factor) < 1.02 * rmse(divided, clean * factor)
        bright = clean * factor > 1.2
        assert rmse(result[bright], (clean * factor)[bright]) < 0.8 * rmse(noisy[bright], (clean * factor)[bright])
        assert result.max() > 0.9 * factor


@pytest.mark.parametrize("value", [1.5, 3.0, 4.5])
def test_neutral_highlights_stay_neutral(value: float) -> None:
    noisy = (value + noise((96, 96, 3), 10)).astype(np.float32)
    result = fastden.denoise(noisy, 10)
    assert np.abs(result.mean((0, 1)) - value).max() < 0.012 * value
    assert result.std((0, 1)).max() < 0.3 * 10 / 255


@pytest.mark.parametrize(("top", "counts"), [(4095, 120), (700, 20), (16383, 500)])
@pytest.mark.parametrize("given", [True, False])
def test_twelve_bits_in_sixteen(clean: Array, top: int, counts: int, given: bool) -> None:
    """They gain as much as the same picture stretched to the whole range; a given sigma is on the file's own scale."""
    gray = clean[..., 1]
    stored = np.rint(np.clip(gray * top + noise(gray.shape, 255) * counts, 0, 65535)).astype(np.uint16)
    factor = 65535 // top
    stretched = np.minimum(stored.astype(np.uint32) * factor, 65535).astype(np.uint16)
    sigma: Any = 255 * counts / 65535 if given else "auto"
    result = fastden.denoise(stored, sigma)
    whole = fastden.denoise(stretched, sigma * factor if given else "auto") / factor
    assert result.dtype == np.uint16
    before, after, best = (rmse(image, gray * top) for image in (stored, result, whole))
    assert 20 * np.log10(before / best) > 4
    assert 20 * np.log10(before / after) > 0.9 * 20 * np.log10(before / best)


@pytest.mark.parametrize("sigma", [0, 10, 75])
def test_ordinary_pictures_keep_every_bit(clean: Array, sigma: float) -> None:
    """Unclipped noise of the strongest kind goes far beyond [0, 1] and is no highlight."""
    for offset in (-0.2, 0.0, 0.2):
        noisy = (clean + offset + noise(clean.shape, sigma)).astype(np.float32)
        assert find_range(noisy).ordinary
        np.testing.assert_array_equal(fastden.denoise(noisy, sigma), as_it_is(noisy, sigma))
    deep = np.rint((clean * 0.3) * 65535).astype(np.uint16)
    np.testing.assert_array_equal(fastden.denoise(deep, sigma), as_it_is(deep, sigma))
    low_key = np.rint(clean * 60).astype(np.uint8)
    assert find_range(low_key) == ORDINARY


def test_no_noise_and_no_strength_leave_a_star(clean: Array) -> None:
    stored = np.rint(np.clip(clean[..., 1] * 4095, 0, 4095)).astype(np.uint16)
    stored[50, 50] = 65535
    floating = (clean + noise(clean.shape, 10)).astype(np.float32)
    floating[60, 60] = 40.0
    for picture in (stored, floating):
        for sigma in (5, "auto", np.full(picture.shape[:2], 5.0, np.float32)):
            np.testing.assert_array_equal(fastden.denoise(picture, sigma, strength=0), picture)
    assert fastden.denoise(stored, 0)[50, 50] > 64000
    assert fastden.denoise(floating, 0)[60, 60] == pytest.approx([40.0] * 3, abs=0.5)


@pytest.mark.parametrize("hot", [40.0, -30.0, 5000.0])
def test_a_hot_pixel_changes_nothing_around_it_and_goes(clean: Array, hot: float) -> None:
    noisy = (clean + noise(clean.shape, 10)).astype(np.float32)
    spoilt = noisy.copy()
    spoilt[100, 100] = hot
    assert find_range(spoilt).ordinary
    result, expected = fastden.denoise(spoilt, 10), fastden.denoise(noisy, 10)
    around = np.ones(clean.shape[:2], bool)
    around[95:106, 95:106] = False
    assert np.abs(result - expected)[around].max() < 0.05
    assert rmse(result[around], clean[around]) < 1.02 * rmse(expected[around], clean[around])
    assert np.abs(result[100, 100] - clean[100, 100]).max() < 2
    spoilt[100, 101] = hot  # two are a highlight
    assert np.abs(fastden.denoise(spoilt, 10)[100, 100:102] - hot).max() < 1.5
    # In a picture of 12 bits too.
    stored = np.rint(np.clip(clean[..., 1] * 4095, 0, 4095)).astype(np.uint16)
    before = find_range(stored[:, :, None])
    stored[50, 50] = 65535
    assert find_range(stored[:, :, None]).white == before.white == 4095 / 65535


def test_highlights_of_a_part_are_kept(clean: Array) -> None:
    """A bright corner, below 1 % of the picture: the rest is denoised as if it were not there, and it stays."""
    noisy = (clean + noise(clean.shape, 10)).astype(np.float32)
    lit = noisy.copy()
    lit[4:20, 4:20] *= 12
    assert find_range(lit).white == 1
    result = fastden.denoise(lit, 10)
    far = (slice(64, None), slice(64, None))
    np.testing.assert_array_equal(result[far], fastden.denoise(noisy, 10)[far])
    assert rmse(result[4:20, 4:20], clean[4:20, 4:20] * 12) < 12 * 12 / 255


@pytest.mark.parametrize(
    ("image", "black", "white"),
    [
        (np.zeros((40, 40, 3), np.float32), 0, 1),
        (np.zeros((40, 40, 3), np.uint16), 0, 1),
        (np.ones((3, 5, 1), np.uint16), 0, 1 / 65535),
        (np.full((3, 5, 1), 3.0, np.float32), 0, 3.0625),
        (np.full((40, 40, 3), 0.3, np.float16), 0, 1),
        (np.repeat([-1.0, 1.0], 2400).reshape(40, 40, 3), -1, 1),
        (np.linspace(0, 300, 4800).reshape(40, 40, 3).astype(np.uint16), 0, 511 / 65535),
        (np.linspace(0, 60000, 4800).reshape(40, 40, 3).astype(">u2"), 0, 1),
    ],
)
def test_ranges(image: Array, black: float, white: float) -> None:
    found = find_range(image)
    assert (found.black, found.white) == pytest.approx((black, white), abs=0.03 * (white - black), rel=0)
    assert found.ordinary == ((black, white) == (0, 1))


def test_another_scale_is_refused(clean: Array) -> None:
    for factor in (255, 65535):
        with pytest.raises(ValueError, match=rf"image: values from 0 to {factor}; accepted: the scale \[0, 1\]"):
            fastden.denoise((clean * factor).astype(np.float32), 10)
    with pytest.raises(ValueError, match="NaN or infinity"):
        find_range(np.full((8, 8, 1), np.nan, np.float32))


@pytest.mark.parametrize("factor", [0.02, 1.0, 3.0])
@pytest.mark.parametrize("kind", ["numpy", "dask", "zarr", "tensor", "double"])
def test_every_way_finds_the_same(clean: Array, tmp_path: Path, kind: str, factor: float) -> None:
    noisy = ((clean[:100, :110] + noise((100, 110, 3), 10)) * factor).astype(np.float32)
    for sigma in ("auto", 10 * factor):
        whole = fastden.denoise(noisy, sigma, model="photo", dtype="float32")
        options: dict[str, Any] = {"model": "photo", "dtype": "float32"}
        if kind == "numpy":
            other = fastden.denoise_array(noisy, sigma, **options)
        elif kind == "dask":
            da = pytest.importorskip("dask.array")
            other = fastden.denoise_array(da.from_array(noisy, chunks=(37, 52, 3)), sigma, **options).compute()
        elif kind == "zarr":
            zarr = pytest.importorskip("zarr", reason="zarr is not installed")
            pytest.importorskip("dask.array")
            source = zarr.create_array(str(tmp_path / str(sigma)), shape=noisy.shape, chunks=(30, 40, 3), dtype="f4")
            source[:] = noisy
            other = fastden.denoise_array(source, sigma, **options).compute()
        else:
            batch = torch.from_numpy(noisy).permute(2, 0, 1)[None].double()
            batch = torch.cat([batch, batch * 0.5 / factor])  # each image has its own range
            level = sigma if sigma == "auto" else np.array([sigma, 5.0])
            result = fastden.denoise(batch if kind == "double" else batch.float(), level, **options)
            other = result[0].permute(1, 2, 0).numpy()
        np.testing.assert_allclose(other, whole, atol=3e-6 * factor, rtol=0)


def test_counts_of_parts_sum(clean: Array) -> None:
    image = (clean * 2.5 - 0.7).astype(np.float32)
    parts = np.array(
        [
            count_range(image[top : top + 72, left : left + 104], image.shape)
            for top in (0, 72, 144)
            for left in (0, 104, 208)
        ]
    )
    assert range_of(joined(parts), image.dtype) == find_range(image)


def test_given_ranges_and_large_dask_arrays(clean: Array, monkeypatch: pytest.MonkeyPatch) -> None:
    da = pytest.importorskip("dask.array")
    noisy = np.rint(np.clip(clean[:64, :72] * 700 + noise((64, 72, 3), 255) * 20, 0, 65535)).astype(np.uint16)
    given = fastden.denoise_array(noisy, 255 * 20 / 65535, value_range=(0, 1023))
    np.testing.assert_array_equal(given, fastden.denoise(noisy, 255 * 20 / 65535))
    monkeypatch.setattr("fastden.inference.arrays.LARGEST_KEPT", 1000)
    with pytest.warns(UserWarning, match="value_range=") as told:
        plain = fastden.denoise_array(da.from_array(noisy), 10).compute()
    assert [warning.filename for warning in told] == [__file__]  # it points at the call of denoise_array
    np.testing.assert_array_equal(plain, as_it_is(noisy, 10))
    with pytest.raises(ValueError, match="value_range"):
        fastden.denoise_array(noisy, 10, value_range=(5, 5))


@pytest.mark.parametrize("lazy", [False, True])
@pytest.mark.parametrize("black", [0.0, -300.0])
def test_levels_are_of_the_range_that_floats_are_given(clean: Array, lazy: bool, black: float) -> None:
    """Sigma 25 of values on 0-255 would have had to be 25 * 255, which is refused."""
    da = pytest.importorskip("dask.array")
    noisy = (clean[:64, :72] + noise((64, 72, 3), 25)).astype(np.float32)
    span = 4095.0 - black
    array = noisy * np.float32(span) + np.float32(black)
    for sigma in (25, np.full((64, 72), 25.0)):
        wanted = fastden.denoise(noisy, sigma)
        done = fastden.denoise_array(da.from_array(array) if lazy else array, sigma, value_range=(black, 4095))
        np.testing.assert_allclose((np.asarray(done) - black) / span, wanted, atol=1e-5)


def test_levels_of_integers_stay_on_their_scale(clean: Array) -> None:
    noisy = np.rint(np.clip(clean[:64, :72] * 700 + noise((64, 72, 3), 255) * 20, 0, 65535)).astype(np.uint16)
    with pytest.warns(ScaleWarning, match=r"sigma: 20, .*5140 counts, more than the 1023 .* sigma = 0\.312") as told:
        fastden.denoise_array(noisy, 20, value_range=(0, 1023))
    assert [warning.filename for warning in told] == [__file__]


def test_an_estimate_goes_to_a_picture_of_another_range(clean: Array) -> None:
    """Levels are on the dtype's scale, so that an estimate means the same for every picture."""
    noisy = (clean + noise(clean.shape, 10)).astype(np.float32)
    estimate = fastden.estimate_noise(noisy)
    dark = fastden.estimate_noise(noisy * np.float32(0.02))
    assert dark.sigma == pytest.approx(0.02 * estimate.sigma, rel=0.05)
    assert (dark.kind, estimate.white) == (estimate.kind, 1)
    assert dark.white == pytest.approx(0.02, rel=0.1)
    np.testing.assert_allclose(dark.at(0.5), 0.02 * estimate.at(0.5), rtol=0.05)
    # Both pictures lie on [0, 1] for the estimate of the other.
    assert dark.curve.shape == (1, 8)
    result = fastden.denoise(noisy * np.float32(0.02), dark)
    np.testing.assert_array_equal(result, fastden.denoise(noisy * np.float32(0.02)))
    assert rmse(fastden.denoise(noisy * 2, fastden.estimate_noise(noisy * 2)), clean * 2) < 0.6 * rmse(
        noisy * 2, clean * 2
    )


def test_files_by_strips_and_whole(clean: Array, tmp_path: Path) -> None:
    """Both find the range before anything is computed, and write the same; note and manifest tell it."""
    noisy = clean[:120, :140] * 2.5 + noise((120, 140, 3), 10)
    noisy[7, 7:9] = 40
    noisy[47:49, 63:65] = 40  # where tiles meet
    noisy[80, 64] = 40
    write_image(tmp_path / "hdr.tif", ImageFile(noisy.astype(np.float32)))
    counts = np.rint(clean[:120, :140] * 700 + noise((120, 140, 3), 255) * 20).clip(0).astype(np.uint16)
    write_image(tmp_path / "cam.tif", ImageFile(counts))
    for name in ("hdr", "cam"):
        source = tmp_path / f"{name}.tif"
        for sigma in ("auto", 2):
            batch = fastden.BatchDenoiser("photo", sigma=sigma, dtype="float64", tile=64)
            (whole,) = batch.run(source, tmp_path / f"{name}{sigma}.tif").done
            (strips,) = streaming(batch).run(source, tmp_path / f"{name}{sigma}strips.tif").done
            a, b = (read_image(record.output).pixels for record in (whole, strips))
            np.testing.assert_array_equal(a, b)
            assert (whole.streamed, strips.streamed) == (False, True)
            assert (whole.values, whole.noise, whole.notes) == (strips.values, strips.noise, strips.notes)
            assert Record.from_json(whole.as_json()) == whole
            assert "denoised on the range 0 to" in whole.notes[0]
            assert read_samples(source)[1] == find_range(read_image(source).pixels)
    assert read_image(tmp_path / "hdr2.tif").pixels.max() > 38
    told = succeed("denoise", str(tmp_path / "cam.tif"), "-o", str(tmp_path / "told.tif"))
    assert "note: " in told.stderr
    assert "values fill 10 of 16 bits: denoised on the range 0 to 1023 of 65535" in told.stderr
    said = succeed("noise", str(tmp_path / "cam.tif")).stdout
    assert "values fill 10 of 16 bits: denoised on the range 0 to 1023 of 65535" in said


def test_a_map_of_noise_levels_is_divided_too(clean: Array, tmp_path: Path) -> None:
    counts = np.rint(clean[:80, :96] * 700 + noise((80, 96, 3), 255) * 20).clip(0).astype(np.uint16)
    write_image(tmp_path / "cam.tif", ImageFile(counts))
    succeed("noise", str(tmp_path / "cam.tif"), "--map", str(tmp_path / "map.png"))
    levels = read_image(tmp_path / "map.png").pixels
    assert levels.dtype == np.uint16
    factor = fastden.estimate_noise(counts).factor
    assert 15 < levels.mean() / factor < 25  # in counts; the noise has 20
    batch = fastden.BatchDenoiser(sigma_map=tmp_path / "map.png", dtype="float64", tile=48)
    assert not batch.run(tmp_path / "cam.tif", tmp_path / "whole.tif").failed
    assert not streaming(batch).run(tmp_path / "cam.tif", tmp_path / "strips.tif").failed
    whole = read_image(tmp_path / "whole.tif").pixels
    np.testing.assert_array_equal(whole, read_image(tmp_path / "strips.tif").pixels)
    assert rmse(whole, clean[:80, :96] * 700) < 0.5 * rmse(counts, clean[:80, :96] * 700)


@pytest.mark.parametrize(
    ("tags", "description", "white"),
    [([(281, 3, 3, (4095,) * 3, True)], None, 4095), ([], '<Pixels SignificantBits="12">', 4095), ([], None, 2047)],
)
def test_the_depth_that_a_file_states(tmp_path: Path, tags: Any, description: Any, white: int) -> None:
    values = np.random.default_rng(0).integers(0, 1900, (64, 64, 3)).astype(np.uint16)
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, values, photometric="rgb", extratags=tags, description=description, metadata=None)
    image = read_image(path)
    assert image.ranges[0].white == white / 65535
    assert read_samples(path)[1] == image.ranges[0]
    # A statement that the values contradict does not count.
    tifffile.imwrite(path, values * 30, photometric="rgb", extratags=tags, description=description, metadata=None)
    assert read_image(path).ranges[0].ordinary


def test_pages_have_ranges_of_their_own(clean: Array, tmp_path: Path) -> None:
    pages = [np.rint(clean[:64, :64, 1] * top).astype(np.uint16) for top in (65535, 700)]
    tifffile.imwrite(tmp_path / "pages.tif", np.stack(pages), photometric="minisblack")
    told = succeed("denoise", str(tmp_path / "pages.tif"), "-o", str(tmp_path / "out.tif"), "--sigma", "3")
    assert "page 2: values fill 10 of 16 bits" in told.stderr
    for page, result in zip(pages, tifffile.imread(tmp_path / "out.tif"), strict=True):
        np.testing.assert_allclose(result, fastden.denoise(page, 3), atol=1)


def test_a_file_on_another_scale_is_an_error_before_anything_is_written(clean: Array, tmp_path: Path) -> None:
    tifffile.imwrite(tmp_path / "a.tif", (clean * 255).astype(np.float32), photometric="rgb")
    batch = fastden.BatchDenoiser(sigma=10)
    for engine in (batch, streaming(batch)):
        report = engine.run(tmp_path / "a.tif", tmp_path / "b.tif")
        assert "a.tif: floating image: values from 0 to 255; accepted: the scale [0, 1]" in str(report.failed[0].error)
        assert not (tmp_path / "b.tif").exists()
    with pytest.raises(UserError, match="divide by the maximum"):
        read_image(tmp_path / "a.tif")


def test_limits() -> None:
    """A level lets values pass up to six of its standard deviations beyond the range."""
    assert ORDINARY.limits(0.1) is None
    assert ValueRange(high=1.6).limits(0.1) is None
    assert ValueRange(high=40.0).limits(0.1) == pytest.approx((-0.85, 1.85))
    assert ValueRange(0.0, 2.0, 0.0, 2.4).limits(0.0) is None
