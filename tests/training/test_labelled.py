"""Pictures with classes or masks for joint training: how they are read, cropped and held out."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image as PIL

pytest.importorskip("lightning")

from fastden.errors import UserError
from fastden.training import labelled
from fastden.training.config import JointConfig
from fastden.training.joint_training import JointData
from fastden.training.labelled import (
    LabelledCrops,
    LabelledImages,
    load_classified,
    load_mask,
    load_segmented,
    read_classes,
    read_masks,
)
from tests.image_files import png_claiming

pytestmark = pytest.mark.usefixtures("quiet")


def bits_of(values: np.ndarray[Any, np.dtype[np.uint8]], bits: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """The last ``bits`` bits of each of ``values`` (N,), the highest first, padded to whole bytes."""
    each = (values[:, None] >> np.arange(bits - 1, -1, -1, dtype=np.uint8)) & 1
    return np.pad(each.reshape(-1), (0, -each.size % 8)).astype(np.uint8)


class TestLabels:
    def test_classes(self, classified: Path) -> None:
        assert read_classes(classified) == [(classified / f"{i}.png", i % 3) for i in range(6)]
        images = load_classified(classified, 36)
        assert images[0][0].shape == (40, 44, 3)
        assert images[5][0].shape == (36, 47, 3)  # scaled up to the crop

    def test_large_pictures_are_scaled_down(self, tmp_path: Path) -> None:
        """So that a crop shows what the label names; for crops of 224 the shorter side becomes 256."""
        folder = tmp_path / "labelled"
        folder.mkdir()
        whole = PIL.fromarray(np.random.default_rng(0).integers(0, 256, (300, 420, 3), np.uint8))
        whole.save(folder / "a.png")
        whole.resize((260, 256)).save(folder / "b.png")
        (folder / "labels.csv").write_text("file,index\na.png,0\nb.png,0\n")
        (large, _), (small, _) = load_classified(folder, 224)
        assert large.shape == (256, 358, 3)
        assert np.array_equal(large, np.asarray(whole.resize((358, 256), PIL.Resampling.BICUBIC)))
        assert small.shape == (256, 260, 3)
        data = JointData(self.config(folder, folder, validation=1))
        data.setup("fit")
        assert [image.shape for image, _ in data.labelled + data.held_out] == [(23, 23, 3), (23, 32, 3)]

    def test_crops_have_the_size_of_a_network_that_ships(self) -> None:
        settings = {"objective": "joint-classify", "data": ["x"], "output": "run"}
        for number, side in enumerate((224, 240, 260)):
            network = {"network": f"efficientnet-lite{number}"}
            assert JointConfig.model_validate({**settings, **network}).crop == side
            assert JointConfig.model_validate({**settings, **network, "crop": 96}).crop == 96
        assert JointConfig.model_validate({**settings, "network": "x:y"}).crop == 224

    def test_a_table_that_excel_wrote(self, tmp_path: Path) -> None:
        (tmp_path / "a.png").touch()
        (tmp_path / "labels.csv").write_text("file,index\na.png,1\n", encoding="utf-8-sig")
        assert read_classes(tmp_path) == [(tmp_path / "a.png", 1)]

    def test_masks(self, segmented: Path) -> None:
        pairs = read_masks(segmented)
        assert [image.name for image, _ in pairs] == [label.name for _, label in pairs]
        mask = load_mask(pairs[0][1])
        assert set(np.unique(mask)) <= {0, 1, 2, 9}
        assert (mask[:3] == 9).all()

    @pytest.mark.parametrize(("bits", "palette"), [(2, False), (4, False), (8, False), (2, True), (4, True)])
    def test_masks_of_few_bits(self, tmp_path: Path, bits: int, palette: bool) -> None:
        """Pillow spreads gray values of few bits over 8 bits: class 3 of 2 bits would be 255."""
        classes = np.arange(4, dtype=np.uint8).reshape(2, 2)
        rows = b"".join(b"\0" + np.packbits(bits_of(row, bits)).tobytes() for row in classes)
        header = struct.pack(">IIBBBBB", 2, 2, bits, 3 if palette else 0, 0, 0, 0)
        chunks = [(b"IHDR", header), *([(b"PLTE", bytes(range(12)))] if palette else [])]
        chunks += [(b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
        made = b"".join(
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
            for kind, data in chunks
        )
        (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n" + made)
        assert np.array_equal(load_mask(tmp_path / "a.png"), classes)

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("file,class\na.png,1\n", r"has no column index"),
            ("", r"has no column file and no column index"),
            ("file,index\n", r"has no rows"),
            ("file,index\na.png,x\n", r"line 2: index 'x'; accepted: a number from 0 on"),
            ("file,index\na.png,-1\n", r"line 2: index '-1'"),
            ("file,index\na.png,1\nb.png,1\n", r"line 3: .*b\.png does not exist"),
        ],
    )
    def test_bad_table(self, tmp_path: Path, text: str, message: str) -> None:
        (tmp_path / "a.png").touch()
        (tmp_path / "labels.csv").write_text(text)
        with pytest.raises(UserError, match=message):
            read_classes(tmp_path)

    @pytest.mark.parametrize(
        ("text", "encoding", "message"),
        [
            ("file,index\nMäuse.png,1\n", "cp1252", r"is no text in UTF-8; accepted: comma-separated values in UTF-8"),
            ("file,index\na.png,1\n", "utf-16", r"is no text in UTF-8; accepted: .*columns file and index"),
            ('file,index\n"a.png,1\na.png,1\n', "utf-8", r", line 2: unexpected end of data; accepted: comma-"),
            ('file,index\n"' + "a.png,1\n" * 20000, "utf-8", r", line 2: field larger than .*; accepted: comma-"),
        ],
    )
    def test_a_table_that_cannot_be_read(self, tmp_path: Path, text: str, encoding: str, message: str) -> None:
        (tmp_path / "a.png").touch()
        (tmp_path / "labels.csv").write_text(text, encoding=encoding)
        with pytest.raises(UserError, match=rf"data: .*labels\.csv ?{message}"):
            read_classes(tmp_path)

    def test_masks_in_folders(self, tmp_path: Path) -> None:
        """A picture's label has its path; without one its name, if only one picture has it."""
        for name in (
            "images/a/x.png",
            "images/b/x.png",
            "images/b/y.png",
            "labels/x.png",
            "labels/a/x.png",
            "labels/y.png",
        ):
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).touch()
        names = {
            str(image.relative_to(tmp_path)): str(label.relative_to(tmp_path)) for image, label in read_masks(tmp_path)
        }
        assert names == {
            "images/a/x.png": "labels/a/x.png",
            "images/b/x.png": "labels/x.png",
            "images/b/y.png": "labels/y.png",
        }
        (tmp_path / "labels/a/x.png").unlink()
        with pytest.raises(UserError, match=r"images/a/x\.png and .*images/b/x\.png have one label, .*labels/x\.png"):
            read_masks(tmp_path)

    def test_bad_masks(self, segmented: Path, tmp_path: Path) -> None:
        for name in ("images", "labels"):
            (tmp_path / name).mkdir()
        PIL.new("RGB", (32, 30)).save(tmp_path / "images" / "a.png")
        with pytest.raises(UserError, match=r"a\.png has no label .*labels/a\.png"):
            read_masks(tmp_path)
        PIL.new("RGB", (32, 30)).save(tmp_path / "labels" / "a.png")
        with pytest.raises(UserError, match=r"uint8 \(30, 32, 3\); accepted: 8 bits, one channel or a palette"):
            load_segmented(tmp_path, 16)
        PIL.new("L", (30, 32)).save(tmp_path / "labels" / "a.png")
        with pytest.raises(UserError, match=r"is \(30, 32\), its label \(32, 30\); accepted: the same size"):
            load_segmented(tmp_path, 16)
        (tmp_path / "labels" / "a.png").write_bytes(b"no picture")
        with pytest.raises(UserError, match=r"cannot read .*labels/a\.png"):
            load_segmented(tmp_path, 16)
        with pytest.raises(UserError, match=r"accepted: at least crop \(50\) pixels a side"):
            load_segmented(segmented, 50)

    def test_masks_that_cannot_be_read(self, tmp_path: Path) -> None:
        file = tmp_path / "a.png"
        PIL.fromarray(np.random.default_rng(0).integers(0, 9, (30, 32), np.uint8)).save(file)
        whole = file.read_bytes()
        start = whole.index(b"IDAT")
        shorter = whole[: start - 4] + struct.pack(">I", 100) + whole[start:]  # what follows is no chunk
        for damaged in (shorter, whole.replace(b"\0\rIHDR", b"\0\x0cIHDR"), png_claiming(20_000, 20_000)):
            file.write_bytes(damaged)
            with pytest.raises(UserError, match=r"^data: cannot read .*a\.png: "):
                load_mask(file)

    def test_crops_keep_label_and_pixels_together(self, segmented: Path) -> None:
        images = load_segmented(segmented, 30)
        crops = LabelledCrops(images, 30, 30, 0, seed=0, epoch=0)
        flipped = 0
        for i in range(30):
            item = crops[i]
            clean = (item["clean"] * 255).round().byte().numpy().transpose(1, 2, 0)
            assert item["label"].dtype == torch.int64
            matches = []
            for image, label in images:
                assert isinstance(label, np.ndarray)
                for step in (1, -1):
                    for top in range(image.shape[0] - 29):
                        for left in range(image.shape[1] - 29):
                            window = (slice(top, top + 30), slice(left, left + 30))
                            if np.array_equal(image[window][:, ::step], clean):
                                matches.append(np.array_equal(label[window][:, ::step], item["label"].numpy()))
                                flipped += step == -1
            assert matches == [True]
        assert 5 < flipped < 25

    def test_crops_are_a_function_of_seed_epoch_and_index(self, classified: Path) -> None:
        images = load_classified(classified, 30)
        first, second = (LabelledCrops(images, 10, 30, 0.5, seed=3, epoch=1) for _ in range(2))
        for i in reversed(range(10)):
            assert all(torch.equal(first[i][name], second[i][name]) for name in ("clean", "gray", "label"))
        other = LabelledCrops(images, 10, 30, 0.5, seed=3, epoch=2)
        assert not any(torch.equal(first[i]["clean"], other[i]["clean"]) for i in range(10))

    def test_validation_images(self, classified: Path, segmented: Path) -> None:
        item = LabelledImages(load_classified(classified, 36), 30)[2]
        assert (tuple(item["clean"].shape), int(item["label"])) == ((3, 30, 30), 2)
        image, _ = load_classified(classified, 36)[2]
        assert image.shape == (40, 44, 3)
        centre = torch.from_numpy(image[5:35, 7:37].copy()).permute(2, 0, 1).float() / 255
        torch.testing.assert_close(item["clean"], centre)
        item = LabelledImages(load_segmented(segmented, 30), None)[1]
        assert (tuple(item["clean"].shape), tuple(item["label"].shape)) == ((3, 40, 44), (40, 44))

    def test_validation_is_evenly_spaced(self, classified: Path) -> None:
        data = JointData(self.config(classified, classified))
        data.setup("fit")
        assert [label for _, label in data.held_out] == [0, 2, 1]  # images 0, 2 and 4 of 6

    def test_only_what_is_validated_with_is_decoded(
        self, classified: Path, segmented: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        read: list[Path] = []
        load = labelled.load_rgb
        monkeypatch.setattr(labelled, "load_rgb", lambda path: (read.append(path), load(path))[1])
        for kind, folder, names in (("classify", classified, "024"), ("segment", segmented / "images", "012")):
            root = folder if kind == "classify" else folder.parent
            config = self.config(root, root)
            JointData(config.model_copy(update={"objective": f"joint-{kind}"})).setup("fit")
            count = len(list(folder.glob("*.png")))
            assert read[count:] == [folder / f"{name}.png" for name in names]
            read.clear()

    def test_validation_is_not_trained_on(
        self, classified: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        linked = tmp_path / "linked"
        linked.mkdir()
        (linked / "1.png").symlink_to(classified / "1.png")
        (linked / "labels.csv").write_text("file,index\n1.png,1\n")
        for folder, validation, kept in ((classified, 3, [1, 0, 2]), (linked, 3, [0, 2, 0, 1, 2])):
            data = JointData(self.config(classified, folder, validation=validation))
            data.setup("fit")
            assert [label for _, label in data.labelled] == kept
            assert not any(np.array_equal(image, other) for image, _ in data.labelled for other, _ in data.held_out)
        assert caplog.text == ""
        data = JointData(self.config(classified, classified, validation=6))
        data.setup("fit")
        assert (len(data.labelled), len(data.held_out)) == (6, 6)
        assert "note: validation: all 6 images to train on are held out too" in caplog.text

    def config(self, data: Path, validation_data: Path, validation: int = 3) -> JointConfig:
        settings: dict[str, Any] = {"objective": "joint-classify", "data": [data], "output": "run", "crop": 20}
        settings |= {"validation_data": validation_data, "validation": validation, "network": "efficientnet-lite0"}
        return JointConfig.model_validate(settings)
