"""Training: the photographs of a run, and those held out of it."""

from __future__ import annotations

import logging
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("lightning")
pytest.importorskip("pydantic")

from fastden.errors import UserError
from fastden.training import denoise
from fastden.training.data import find_photographs, load_rgb
from tests.training.conftest import Run, configuration

pytestmark = pytest.mark.usefixtures("quiet")


class TestData:
    def test_photographs_smaller_than_the_crop(self, run: Run, tmp_path: Path) -> None:
        with pytest.raises(UserError, match=r"data: no photograph of at least 64 x 64 pixels \(crop: 64\)"):
            run(tmp_path, crop=64)

    @pytest.mark.parametrize("rank", [0, 1])
    def test_each_process_resumes_within_an_epoch(self, photographs: Path, rank: int) -> None:
        settings = configuration(data=[photographs], validation=0, crop=16, batch=4, epoch_steps=3)

        def batches(done: int) -> list[torch.Tensor]:
            data = denoise.DenoiserData(settings)
            data.trainer = SimpleNamespace(  # type: ignore[assignment]
                world_size=2, global_rank=rank, current_epoch=2, global_step=2 * 3 + done
            )
            data.setup("fit")
            return [batch["noisy"] for batch in data.train_dataloader()]

        whole = batches(0)
        assert [len(batch) for batch in whole] == [2, 2, 2]
        for done in (1, 2):
            rest = batches(done)
            assert len(rest) == 3 - done
            assert all(torch.equal(one, other) for one, other in zip(rest, whole[done:], strict=True))

    def test_small_photographs_are_named(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        """An icon among them neither ends the run nor makes the crops of the validation small."""
        random = np.random.default_rng(0)
        for name, side in (("a", 40), ("b", 12), ("c", 36), ("d", 2)):
            image = random.integers(0, 256, (side, side, 3), dtype=np.uint8)
            Image.fromarray(image).save(tmp_path / f"{name}.png")
        for validation, most in ((2, 1), (3, 1)):
            data = denoise.DenoiserData(configuration(data=[tmp_path], validation=validation, crop=30))
            with pytest.raises(
                UserError, match=f"validation: {validation}; accepted: up to {most}, for .* has 2 photo"
            ):
                data.setup("fit")
        data = denoise.DenoiserData(configuration(data=[tmp_path], validation=1, crop=30))
        with caplog.at_level(logging.WARNING):
            data.setup("fit")
        assert "2 left out, smaller than 30 x 30 pixels (crop: 30)" in caplog.text
        assert all(str(tmp_path / name) in caplog.text for name in ("b.png", "d.png"))
        assert [image.shape[0] for image in data.train_images + data.validation_images] == [40, 36]
        (batch,) = data.val_dataloader()
        assert batch["clean"].shape == (1, 3, 36, 36)

    def test_links_to_what_is_held_out(self, tmp_path: Path) -> None:
        Image.new("RGB", (20, 20)).save(tmp_path / "a.png")
        (tmp_path / "b.png").symlink_to("a.png")
        data = denoise.DenoiserData(configuration(data=[tmp_path], validation=1, crop=16))
        with pytest.raises(UserError, match=r"validation: 1 leaves no other photograph to train on; accepted: fewer"):
            data.setup("fit")

    def test_more_validation_than_photographs(self, run: Run, tmp_path: Path) -> None:
        with pytest.raises(UserError, match=r"validation: 6; accepted: up to the 5 photographs in"):
            run(tmp_path, validation=6)

    def test_missing_folder(self, run: Run, tmp_path: Path) -> None:
        with pytest.raises(UserError, match=r"data: .*none is not a folder"):
            run(tmp_path, data=[tmp_path / "none"])

    def test_validation_photographs_are_held_out(self, photographs: Path) -> None:
        data = denoise.DenoiserData(configuration(data=[photographs], validation=2, crop=30))
        data.setup("fit")
        held = [load_rgb(path) for path in find_photographs(photographs)[-2:]]
        assert len(data.train_images) == 3
        assert all(np.array_equal(one, other) for one, other in zip(data.validation_images, held, strict=True))
        assert not any(np.array_equal(image, other) for image in data.train_images for other in held)

    @pytest.mark.parametrize("again", ["", "sub"])
    def test_what_is_held_out_of_one_folder_is_in_no_other(self, tmp_path: Path, again: str) -> None:
        (tmp_path / "sub").mkdir()
        random = np.random.default_rng(0)
        for name in ("a.png", "sub/y.png", "sub/z.png"):
            Image.fromarray(random.integers(0, 255, (40, 40, 3)).astype(np.uint8)).save(tmp_path / name)
        data = denoise.DenoiserData(configuration(data=[tmp_path, tmp_path / again], validation=1, crop=30))
        data.setup("fit")
        (held,) = data.validation_images
        assert np.array_equal(held, load_rgb(tmp_path / "sub" / "z.png"))
        assert len(data.train_images) == (4 if again == "" else 3)  # given twice, the others count twice
        assert not any(np.array_equal(held, image) for image in data.train_images)

    def test_pictures_of_the_validation_are_of_a_bounded_size(self) -> None:
        data = denoise.DenoiserData(configuration(crop=30))
        data.validation_images = [np.zeros((900, 700, 3), np.uint8), np.zeros((600, 1000, 3), np.uint8)]
        (batch,) = data.val_dataloader()
        assert batch["clean"].shape == (2, 3, 512, 512)
