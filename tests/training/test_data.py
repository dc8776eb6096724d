"""Parts of a training: configuration, photographs, crops and noise."""

from __future__ import annotations

import io
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pyvips
import tifffile
import torch
import yaml
from PIL import Image as PIL
from PIL import ImageCms

pytest.importorskip("lightning")
pytest.importorskip("pydantic")

from fastden.errors import UserError
from fastden.training.config import TrainConfig, load_config
from fastden.training.data import CropDataset, central_crops, evenly_spaced, find_photographs, load_rgb
from fastden.training.denoise import white_noise
from fastden.training.synthetic_noise import NoiseModel, NoisyDataset, compress
from tests.images.test_formats import dng, heic, jxl

REQUIRED = ["data=[photographs]", "output=run"]


def configuration(**changes: Any) -> TrainConfig:
    return TrainConfig.model_validate({"data": ["photographs"], "output": "run", **changes})


class TestConfiguration:
    def test_defaults_need_data_and_output_alone(self) -> None:
        config = load_config(None, REQUIRED)
        assert config.data == [Path("photographs")]
        assert config.noise_level_input
        assert config.sigma == (0, 75)

    def test_file_and_overrides(self, tmp_path: Path) -> None:
        path = tmp_path / "train.yaml"
        path.write_text("data: [a, b]\noutput: run\nsteps: 7\nsigma: [5, 50]\n")
        config = load_config(path, ["steps=9", "lr=1e-4", "init=color"])
        assert (config.steps, config.lr, config.sigma, config.init) == (9, 1e-4, (5, 50), "color")
        assert config.data == [Path("a"), Path("b")]

    def test_what_is_written_reads_back(self, tmp_path: Path) -> None:
        config = configuration(sigma=[3, 30], loss="l1")
        path = tmp_path / "train.yaml"
        path.write_text(yaml.safe_dump(config.model_dump(mode="json")))
        assert load_config(path, []) == config

    @pytest.mark.parametrize(
        ("override", "sigma"),
        [
            ("sigma=25", (25, 25)),
            ("sigma=[5, 9.5]", (5, 9.5)),
            ("sigma=1e1", (10, 10)),
            ("sigma=[1e0, 2e1]", (1, 20)),
        ],
    )
    def test_number_or_range(self, override: str, sigma: tuple[float, float]) -> None:
        assert load_config(None, [*REQUIRED, override]).sigma == sigma

    def test_qualities_may_be_spelled_so_too(self) -> None:
        assert load_config(None, [*REQUIRED, "jpeg=[5e1, 9e1]"]).jpeg == (50, 90)

    @pytest.mark.parametrize(
        ("override", "message"),
        [
            ("stesp=3", r"stesp: 3: .*accepted keys: data, output.*steps"),
            ("steps=0", r"steps: 0: .*greater than or equal to 1"),
            ("steps=many", r"steps: 'many': .*integer"),
            ("crop=8", r"crop: 8: .*16"),
            ("batch=-1", r"batch: -1"),
            ("lr=0", r"lr: 0: .*greater than 0"),
            ("lr=.nan", r"lr: nan"),
            ("ema=1", r"ema: 1: .*less than 1"),
            ("loss=l3", r"loss: 'l3': .*'mse', 'l1', 'relative-mse' or 'psnr'"),
            ("precision=64", r"precision: 64"),
            ("sigma=[50, 15]", r"sigma: \[50, 15\]: .*0 <= low <= high <= 255"),
            ("sigma=[0, 300]", r"sigma: \[0, 300\]: .*0 <= low <= high <= 255"),
            ("sigma=[.nan, 3]", r"sigma: \[nan, 3\]: .*0 <= low <= high <= 255"),
            ("sigma=many", r"sigma: 'many': .*tuple"),
            ("sigma=many", r"sigma: 'many': .*; accepted: a number or \[low, high\]"),
            ("sigma=[1, 2, 3]", r"sigma: \[1, 2, 3\]: .*; accepted: a number or \[low, high\]"),
            ("jpeg=[5e1, 9.5e1, 9]", r"; accepted: a number or \[low, high\], whole numbers"),
            ("sigma=-1", r"sigma: -1: .*0 <= low <= high <= 255"),
            ("gain=[0.1, 2]", r"gain: \[0\.1, 2\]: .*0 <= low <= high <= 1"),
            ("jpeg=0", r"jpeg: 0: .*1 <= low <= high <= 100"),
            ("jpeg=[50, 101]", r"jpeg: \[50, 101\]: .*1 <= low <= high <= 100"),
            ("jpeg_share=2", r"jpeg_share: 2"),
            ("objective=joint", r"objective: 'joint'; accepted: denoise, photo, joint-classify, joint-segment"),
            ("gray=1.5", r"gray: 1\.5"),
            ("data=[]", r"data: \[\]: .*at least 1"),
            ("data=photographs", r"data: 'photographs': .*list"),
            ("seed=-1", r"seed: -1"),
            ("seed=4294967296", r"seed: 4294967296"),
        ],
    )
    def test_impossible_value(self, override: str, message: str) -> None:
        with pytest.raises(UserError, match=message) as caught:
            load_config(None, [*REQUIRED, override])
        assert "\n" not in str(caught.value)

    def test_every_mistake_is_named(self) -> None:
        with pytest.raises(UserError, match=r"crop: 1: .*; batch: 0: "):
            load_config(None, [*REQUIRED, "crop=1", "batch=0"])

    def test_missing_keys(self) -> None:
        with pytest.raises(UserError, match=r"data: .*required; output: .*required"):
            load_config(None, [])

    @pytest.mark.parametrize(
        ("text", "message"),
        [("a: [1", "is not YAML"), ("- 1\n- 2", "holds list"), ("", "holds NoneType"), ("\x00", "is not YAML")],
    )
    def test_bad_file(self, tmp_path: Path, text: str, message: str) -> None:
        path = tmp_path / "train.yaml"
        path.write_text(text)
        with pytest.raises(UserError, match=f"config: .*{message}"):
            load_config(path, REQUIRED)

    def test_binary_file(self, tmp_path: Path) -> None:
        path = tmp_path / "train.yaml"
        path.write_bytes(b"\xff\xfe\x80 1")
        with pytest.raises(UserError, match=r"config: .*train\.yaml is no text in UTF-8; accepted: a YAML file"):
            load_config(path, REQUIRED)

    def test_missing_file(self, tmp_path: Path) -> None:
        with pytest.raises(UserError, match=r"config: cannot read .*none\.yaml: No such file or directory$"):
            load_config(tmp_path / "none.yaml", [])

    @pytest.mark.parametrize("override", ["steps", "steps=[1"])
    def test_bad_override(self, override: str) -> None:
        with pytest.raises(UserError, match="set: 'steps"):
            load_config(None, [*REQUIRED, override])


class TestCrops:
    @pytest.fixture
    def images(self) -> list[np.ndarray]:
        random = np.random.default_rng(0)
        return [random.integers(0, 256, (h, w, 3), dtype=np.uint8) for h, w in ((20, 31), (16, 16), (40, 24))]

    def test_function_of_seed_epoch_and_index(self, images: list[np.ndarray]) -> None:
        first = CropDataset(images, 20, 16, 0.3, seed=1, epoch=2)
        second = CropDataset(images, 20, 16, 0.3, seed=1, epoch=2)
        expected = [first[i] for i in range(20)]
        for i in reversed(range(20)):
            assert torch.equal(second[i]["clean"], expected[i]["clean"])
            assert torch.equal(second[i]["gray"], expected[i]["gray"])
        for other in (
            CropDataset(images, 20, 16, 0.3, seed=1, epoch=3),
            CropDataset(images, 20, 16, 0.3, seed=2, epoch=2),
        ):
            assert not any(torch.equal(other[i]["clean"], expected[i]["clean"]) for i in range(20))
        assert len({item["clean"].sum().item() for item in expected}) > 10

    def test_crops_are_turned_parts_of_the_images(self, images: list[np.ndarray]) -> None:
        crops = CropDataset(images[1:2], 60, 16, 0, seed=0, epoch=0)
        turned = set()
        for i in range(60):
            pixels = (crops[i]["clean"] * 255).round().byte().numpy().transpose(1, 2, 0)
            ways = [np.rot90(flip, k) for flip in (images[1], images[1][:, ::-1]) for k in range(4)]
            matches = [way for way, image in enumerate(ways) if np.array_equal(image, pixels)]
            assert len(matches) == 1
            turned.add(matches[0])
        assert turned == set(range(8))

    def test_range_and_shape(self, images: list[np.ndarray]) -> None:
        item = CropDataset(images, 4, 13, 0, seed=0, epoch=0)[3]
        assert item["clean"].shape == (3, 13, 13)
        assert item["clean"].dtype == torch.float32
        assert 0 <= item["clean"].min() < item["clean"].max() <= 1

    @pytest.mark.parametrize(("share", "count"), [(0.0, 0), (1.0, 30)])
    def test_gray_crops(self, images: list[np.ndarray], share: float, count: int) -> None:
        items = [CropDataset(images, 30, 16, share, seed=0, epoch=0)[i] for i in range(30)]
        assert sum(bool(item["gray"]) for item in items) == count
        for item in items:
            channels_equal = torch.equal(item["clean"][0], item["clean"][1])
            assert channels_equal == bool(item["gray"])

    def test_large_photographs_come_oftener(self) -> None:
        images = [np.zeros((16, 16, 3), np.uint8), np.full((48, 48, 3), 255, np.uint8)]
        crops = CropDataset(images, 400, 16, 0, seed=0, epoch=0)
        assert sum(crops[i]["clean"].mean().item() for i in range(400)) / 400 == pytest.approx(0.75, abs=0.07)


class TestFiles:
    def test_find_photographs(self, tmp_path: Path) -> None:
        for name in ("b.PNG", "a.jpg", "sub/c.webp", "notes.txt"):
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).touch()
        assert [path.name for path in find_photographs(tmp_path)] == ["a.jpg", "b.PNG", "c.webp"]

    def test_no_images(self, tmp_path: Path) -> None:
        with pytest.raises(UserError, match=r"data: no images in .*accepted suffixes: \.jpg, .*\.avif"):
            find_photographs(tmp_path)

    def test_no_folder(self, tmp_path: Path) -> None:
        with pytest.raises(UserError, match=r"data: .*none is not a folder"):
            find_photographs(tmp_path / "none")

    @pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "I;16"])
    def test_any_image_becomes_rgb(self, tmp_path: Path, mode: str) -> None:
        path = tmp_path / "image.png"
        shape = {"RGB": (6, 5, 3), "RGBA": (6, 5, 4)}.get(mode, (6, 5))
        high, kind = (65535, np.uint16) if mode == "I;16" else (255, np.uint8)
        pixels = np.random.default_rng(0).integers(0, high + 1, shape).astype(kind)
        PIL.fromarray(pixels).save(path)
        image = load_rgb(path)
        assert (image.shape, image.dtype) == ((6, 5, 3), np.uint8)
        expected = (pixels // 256 if mode == "I;16" else pixels).reshape(6, 5, -1)[..., :3]
        assert np.abs(image.astype(int) - expected).max() <= 1

    @pytest.mark.parametrize("content", [b"", b"not an image"])
    def test_unreadable_file(self, tmp_path: Path, content: bytes) -> None:
        path = tmp_path / "image.png"
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"data: cannot read .*image\.png"):
            load_rgb(path)

    def test_truncated_file(self, tmp_path: Path) -> None:
        path = tmp_path / "image.png"
        PIL.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(path)
        path.write_bytes(path.read_bytes()[:3000])
        with pytest.raises(UserError, match=r"data: cannot read .*image\.png"):
            load_rgb(path)


class TestNoise:
    def test_noise_of_a_validation_is_that_of_the_picture(self) -> None:
        clean = torch.full((3, 3, 64, 64), 0.5)
        noise = white_noise(clean, torch.tensor([4, 2, 4]))
        assert torch.equal(noise[0], noise[2])
        assert torch.equal(noise[1], white_noise(clean[:1], torch.tensor([2]))[0])
        assert not torch.equal(noise[0], noise[1])
        assert torch.allclose(noise.flatten(1).std(1), torch.ones(3), rtol=0.05)
        assert noise.mean().abs() < 0.05

    def test_gaussian(self) -> None:
        clean = torch.full((3, 80, 80), 0.5)
        random = np.random.default_rng(0)
        levels = []
        for _ in range(20):
            noisy, level = NoiseModel((10, 50))(clean, random)
            assert (level.shape, level.dtype, noisy.dtype) == ((), torch.float32, torch.float32)
            assert float((noisy - clean).std()) == pytest.approx(float(level), rel=0.03)
            levels.append(float(level) * 255)
        assert 10 <= min(levels) < 20
        assert 40 < max(levels) <= 50

    def test_channels(self) -> None:
        clean = torch.zeros(3, 40, 40)
        gray, _ = NoiseModel((255, 255))(clean, np.random.default_rng(0), gray=True)
        assert torch.equal(gray[0], gray[1])
        assert gray.is_contiguous()
        color, _ = NoiseModel((255, 255))(clean, np.random.default_rng(0))
        assert (torch.corrcoef(color.flatten(1)) - torch.eye(3)).abs().max() < 0.1

    def test_photon_noise(self) -> None:
        """Its variance grows with the value, and the map says so."""
        clean = torch.cat([torch.full((3, 80, 80), 0.1), torch.full((3, 80, 80), 0.9)], 2)
        noisy, level = NoiseModel((5, 5), gain=(0.02, 0.02))(clean, np.random.default_rng(0))
        assert level.shape == (1, 80, 160)
        for half, value in ((slice(0, 80), 0.1), (slice(80, 160), 0.9)):
            expected = (0.02 * value + (5 / 255) ** 2) ** 0.5
            part = noisy[:, :, half]
            assert float(part.std()) == pytest.approx(expected, rel=0.03)
            assert float(part.mean()) == pytest.approx(value, abs=0.003)
            assert float(level[:, :, half].square().mean().sqrt()) == pytest.approx(expected, rel=0.08)

    def test_jpeg_comes_behind_the_noise(self) -> None:
        clean = torch.from_numpy(np.random.default_rng(1).random((3, 1, 1), dtype=np.float32)).expand(3, 48, 48)
        plain, _ = NoiseModel((40, 40))(clean, np.random.default_rng(0))
        noisy, level = NoiseModel((40, 40), jpeg=(30, 30))(clean, np.random.default_rng(0))
        assert torch.equal(noisy, compress(plain, 30))
        assert float(level) == pytest.approx(40 / 255)
        assert torch.allclose(noisy * 255, (noisy * 255).round(), atol=1e-4)
        assert 0 <= noisy.min() < noisy.max() <= 1

    @pytest.mark.parametrize("quality", [1, 30, 90, 100])
    def test_compression_is_jpegs_own(self, quality: int) -> None:
        """Without a choice of chroma it is Pillow's default: recipes of one noise model came from it."""
        pixels = np.random.default_rng(0).integers(0, 256, (21, 34, 3), dtype=np.uint8)
        image = torch.from_numpy(pixels).permute(2, 0, 1).float() / 255
        for chosen, options in (((), {}), ((2,), {}), ((0,), {"subsampling": 0}), ((1,), {"subsampling": 1})):
            buffer = io.BytesIO()
            PIL.fromarray(pixels).save(buffer, "JPEG", quality=quality, **options)
            expected = torch.from_numpy(np.array(PIL.open(buffer))).permute(2, 0, 1).float() / 255
            assert torch.equal(compress(image, quality, *chosen), expected)

    def test_share_of_compressed_images(self) -> None:
        clean, random = torch.rand(3, 16, 16), np.random.default_rng(0)
        model = NoiseModel((20, 20), jpeg=(20, 90), jpeg_share=0.25)
        images = [model(clean, random)[0] for _ in range(200)]
        compressed = sum(bool(((image * 255).round() - image * 255).abs().max() < 1e-4) for image in images)
        assert 30 <= compressed <= 70

    def test_quality_decides_the_error(self) -> None:
        image = torch.rand(3, 32, 32)
        errors = [float((compress(image, quality) - image).abs().mean()) for quality in (95, 50, 10)]
        assert errors == sorted(errors)

    def test_function_of_seed_epoch_and_index(self) -> None:
        images = [np.random.default_rng(0).integers(0, 256, (20, 20, 3), dtype=np.uint8)]

        def items(seed: int, epoch: int, order: range) -> dict[int, torch.Tensor]:
            crops = CropDataset(images, 12, 16, 0, seed, epoch)
            dataset = NoisyDataset(crops, NoiseModel((20, 60)), seed, epoch)
            assert len(dataset) == 12
            return {i: dataset[i]["noisy"] - dataset[i]["clean"] for i in order}

        first, second = items(1, 2, range(12)), items(1, 2, range(11, -1, -1))
        assert all(torch.equal(first[i], second[i]) for i in range(12))
        for other in (items(2, 2, range(12)), items(1, 3, range(12))):
            assert not any(torch.equal(first[i], other[i]) for i in range(12))
        assert len({float(noise.std()) for noise in first.values()}) == 12


def test_pictures_are_upright_and_in_srgb(tmp_path: Path) -> None:
    """A phone's orientation and its colour profile count, as they do in ``fastden denoise``."""
    pixels = np.zeros((20, 40, 3), np.uint8)
    pixels[:, :20] = (200, 60, 30)
    PIL.fromarray(pixels).save(tmp_path / "plain.png")
    tags = PIL.Exif()
    tags[0x0112] = 6
    PIL.fromarray(pixels).save(tmp_path / "turned.png", exif=tags)
    np.testing.assert_array_equal(load_rgb(tmp_path / "turned.png"), np.rot90(load_rgb(tmp_path / "plain.png"), -1))
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    PIL.fromarray(pixels).save(tmp_path / "srgb.png", icc_profile=profile)
    np.testing.assert_allclose(load_rgb(tmp_path / "srgb.png"), pixels, rtol=0, atol=1)
    stored = pyvips.Image.new_from_array(pixels).copy(interpretation="srgb")
    stored.icc_transform("p3", input_profile="srgb").write_to_file(str(tmp_path / "p3.png"))
    with PIL.open(tmp_path / "p3.png") as picture:
        assert "icc_profile" in picture.info
        assert np.abs(np.asarray(picture).astype(int) - pixels).max() > 10
    np.testing.assert_allclose(load_rgb(tmp_path / "p3.png"), pixels, rtol=0, atol=3)
    # A profile of colours in a gray file does not fit.
    PIL.fromarray(pixels[..., 0]).save(tmp_path / "gray.jpg", icc_profile=profile, quality=100)
    gray = load_rgb(tmp_path / "gray.jpg")
    np.testing.assert_allclose(gray, np.repeat(pixels[..., :1], 3, 2), rtol=0, atol=3)


class TestKindsOfFiles:
    @pytest.fixture
    def pixels(self) -> np.ndarray:
        coarse = PIL.fromarray(np.random.default_rng(3).integers(30, 226, (4, 5, 3), dtype=np.uint8))
        return np.asarray(coarse.resize((80, 64), PIL.Resampling.BICUBIC))

    @pytest.mark.parametrize(("suffix", "write"), [(".heic", heic), (".jxl", jxl)])
    def test_formats_of_packages(self, tmp_path: Path, pixels: np.ndarray, suffix: str, write: Any) -> None:
        """What a folder's search finds is read, with its colour profile."""
        path = tmp_path / f"a{suffix}"
        path.write_bytes(write(pixels))
        assert find_photographs(tmp_path) == [path]
        assert np.abs(load_rgb(path).astype(int) - pixels).mean() < 4

    def test_camera_raw_is_developed(self, tmp_path: Path) -> None:
        """The picture is read, not the thumbnail in the file; it grows brighter from left to right."""
        path = tmp_path / "a.dng"
        path.write_bytes(dng())
        image = load_rgb(path)
        assert image.shape == (48, 64, 3)
        assert image[:, :16].mean() < image[:, 24:40].mean() < image[:, 48:].mean()

    def test_the_rest_is_told(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        (tmp_path / "a.exr").touch()
        with pytest.raises(UserError, match=r"no images in .* \(1 image file left out, .*: 1 OpenEXR\); accepted"):
            find_photographs(tmp_path)
        PIL.new("RGB", (8, 8)).save(tmp_path / "b.png")
        with caplog.at_level(logging.WARNING):
            assert find_photographs(tmp_path) == [tmp_path / "b.png"]
        assert "1 image file left out, not read here: 1 OpenEXR" in caplog.text

    @pytest.mark.parametrize("channels", [1, 3])
    def test_floating_values(self, tmp_path: Path, pixels: np.ndarray, channels: int) -> None:
        """The scale is [0, 1], for gray as for colours."""
        expected = pixels[..., :channels]
        photometric = "rgb" if channels == 3 else "minisblack"
        tifffile.imwrite(tmp_path / "a.tif", np.squeeze(expected / np.float32(255)), photometric=photometric)
        assert np.abs(load_rgb(tmp_path / "a.tif").astype(int) - expected).max() <= 1

    @pytest.mark.parametrize("bits", [10, 12])
    def test_few_bits_in_sixteen(self, tmp_path: Path, pixels: np.ndarray, bits: int) -> None:
        values = np.rint(pixels / 255 * (2**bits - 1)).astype(np.uint16)
        tifffile.imwrite(tmp_path / "a.tif", values, photometric="rgb")
        assert np.abs(load_rgb(tmp_path / "a.tif").astype(int) - pixels).max() <= 1
        (crop,) = central_crops([tmp_path], 1)
        assert np.abs(crop[0].permute(1, 2, 0).numpy() * 255 - pixels).max() < 1.5

    def test_another_scale_is_refused(self, tmp_path: Path, pixels: np.ndarray) -> None:
        tifffile.imwrite(tmp_path / "a.tif", pixels.astype(np.float32), photometric="rgb")
        with pytest.raises(UserError, match=r"data: cannot read .*a\.tif: floating image: .*accepted: the scale"):
            load_rgb(tmp_path / "a.tif")

    def test_the_first_of_several_pages(self, tmp_path: Path, pixels: np.ndarray) -> None:
        tifffile.imwrite(tmp_path / "a.tif", np.stack([pixels, 255 - pixels]), photometric="rgb")
        np.testing.assert_array_equal(load_rgb(tmp_path / "a.tif"), pixels)


@pytest.mark.parametrize(("length", "count"), [(33, 32), (5, 9), (64, 32)])
def test_evenly_spaced(length: int, count: int) -> None:
    chosen = evenly_spaced(list(range(length)), count)
    assert len(chosen) == len(set(chosen)) == min(length, count)
    assert max(np.diff(chosen), default=1) <= -(-length // count)


def test_as_many_crops_as_asked_for(tmp_path: Path) -> None:
    for index in range(5):
        PIL.new("RGB", (8, 8)).save(tmp_path / f"{index}.png")
    assert len(central_crops([tmp_path], 4)) == 4
