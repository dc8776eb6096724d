"""Labelled images for joint training: classes from a table, segmentation from label images."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import Dataset

from fastden.errors import UserError
from fastden.training.data import Image, find_photographs, load_rgb, to_gray

#: A class, or a class for every pixel (H, W).
Label = int | npt.NDArray[np.uint8]


def read_classes(folder: Path) -> list[tuple[Path, int]]:
    """Files and classes of ``labels.csv``, whose columns ``file`` and ``index`` (from 0) count.

    Raises:
        UserError: no such folder or table, one that cannot be read, a missing column, a row without a class or with a
            file that is not there.
    """
    table = folder / "labels.csv"
    if not table.is_file():
        raise UserError(f"data: {table} does not exist; accepted: a folder with labels.csv (columns file and index)")
    accepted = "accepted: comma-separated values in UTF-8, columns file and index"
    with table.open(newline="", encoding="utf-8-sig") as file:  # Excel begins a file with a mark
        reader = csv.DictReader(file, strict=True)  # else an open quote would swallow the lines behind it
        try:
            columns, table_rows = reader.fieldnames or [], list(reader)
        except UnicodeDecodeError as error:
            raise UserError(f"data: {table} is no text in UTF-8; {accepted}") from error
        except csv.Error as error:  # in the row behind the last one that is whole: a quote may be open from there on
            raise UserError(f"data: {table}, line {reader.line_num + 1}: {error}; {accepted}") from error
    missing = {"file", "index"} - set(columns)
    if missing:
        raise UserError(f"data: {table} has no column {' and no column '.join(sorted(missing))}")
    rows = []
    for number, row in enumerate(table_rows, 2):
        path = folder / str(row["file"])
        if not str(row["index"]).isdecimal():
            raise UserError(f"data: {table}, line {number}: index {row['index']!r}; accepted: a number from 0 on")
        if not path.is_file():
            raise UserError(f"data: {table}, line {number}: {path} does not exist")
        rows.append((path, int(row["index"])))
    if not rows:
        raise UserError(f"data: {table} has no rows")
    return rows


def read_masks(folder: Path) -> list[tuple[Path, Path]]:
    """Images of ``images/``, each with the PNG of the same name in ``labels/`` whose values are classes.

    The label of ``images/a/x.jpg`` is ``labels/a/x.png``, or else ``labels/x.png`` if no other image takes that one.

    Raises:
        UserError: no such folders, an image without a label, or a label of two images.
    """
    root, labels = folder / "images", folder / "labels"
    pairs: dict[Path, Path] = {}
    for image in find_photographs(root):
        beside = labels / image.relative_to(root).with_suffix(".png")
        label = beside if beside.is_file() else labels / f"{image.stem}.png"
        if not label.is_file():
            raise UserError(f"data: {image} has no label {beside}")
        if label in pairs:
            raise UserError(f"data: {pairs[label]} and {image} have one label, {label}; accepted: a label each")
        pairs[label] = image
    return [(image, label) for label, image in pairs.items()]


def load_mask(path: Path) -> npt.NDArray[np.uint8]:
    """(H, W) uint8 classes of a PNG: its stored values, not the colours of its palette.

    Raises:
        UserError: the file cannot be read, or has several channels or other than 8 bits.
    """
    from PIL import Image as PIL

    try:
        with PIL.open(path) as image:
            # Pillow spreads gray of 2 and 4 bits over 8; the raw mode, known before it decodes, tells it.
            raw = image.tile[0][3] if image.tile and image.mode == "L" else ""
            spread = {"L;2": 85, "L;4": 17}.get(raw if isinstance(raw, str) else str(raw[0]))
            pixels = np.array(image)
            pixels = pixels // spread if spread else pixels
    except (OSError, SyntaxError, ValueError, PIL.DecompressionBombError) as error:  # Pillow's errors of damaged PNGs
        raise UserError(f"data: cannot read {path}: {error}") from error
    if pixels.ndim != 2 or pixels.dtype != np.uint8:
        raise UserError(f"data: {path}: {pixels.dtype} {pixels.shape}; accepted: 8 bits, one channel or a palette")
    return pixels


def load_classified(folder: Path, crop: int) -> list[tuple[Image, Label]]:
    """Images of :func:`read_classes` in memory, scaled so that a crop holds most of what the label names.

    Where the shorter side is above 8/7 of ``crop`` it is scaled down to that, antialiased: 256 for crops of 224, as
    classifiers of ImageNet are tested. 224 pixels square of a photograph of 4000 x 3000 would be 0.4 % of it. Where it
    is below ``crop`` it is scaled up to that.
    """
    return [load_one_classified(path, label, crop) for path, label in read_classes(folder)]


def load_one_classified(path: Path, label: int, crop: int) -> tuple[Image, Label]:
    """One of :func:`load_classified`."""
    return _for_crops(load_rgb(path), crop), label


def load_segmented(folder: Path, crop: int) -> list[tuple[Image, Label]]:
    """Images and label images of :func:`read_masks` in memory.

    Raises:
        UserError: an image and its label of different sizes, or smaller than ``crop``.
    """
    return [load_one_segmented(path, label, crop) for path, label in read_masks(folder)]


def load_one_segmented(path: Path, label_path: Path, crop: int) -> tuple[Image, Label]:
    """One of :func:`load_segmented`."""
    image, label = load_rgb(path), load_mask(label_path)
    if image.shape[:2] != label.shape:
        raise UserError(f"data: {path} is {image.shape[:2]}, its label {label.shape}; accepted: the same size")
    if min(label.shape) < crop:
        raise UserError(f"data: {path} is {label.shape}; accepted: at least crop ({crop}) pixels a side")
    return image, label


def _for_crops(image: Image, crop: int) -> Image:
    """An image whose shorter side is from ``crop`` to 8/7 of it, as :func:`load_classified` says."""
    height, width = image.shape[:2]
    shorter = min(height, width)
    wanted = min(max(shorter, crop), round(crop * 8 / 7))
    if wanted == shorter:
        return image
    from PIL import Image as PIL

    scale = wanted / shorter
    size = (max(round(width * scale), wanted), max(round(height * scale), wanted))
    return np.asarray(PIL.fromarray(image).resize(size, PIL.Resampling.BICUBIC))


class LabelledCrops(Dataset[dict[str, Tensor]]):
    """Random square crops with their labels, flipped left to right half of the time.

    Item ``index`` depends on the seed, the epoch and the index alone.

    Args:
        images: (H, W, 3) uint8 with their labels, both sides at least ``crop``.
        length: items an epoch.
        crop: side in pixels.
        gray: probability that a crop is made gray.
        seed, epoch: see above.
    """

    def __init__(
        self, images: list[tuple[Image, Label]], length: int, crop: int, gray: float, seed: int, epoch: int
    ) -> None:
        self.images = images
        self.length = length
        self.crop = crop
        self.gray = gray
        self.key = (seed, epoch)

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        random = np.random.default_rng((*self.key, index))
        image, label = self.images[int(random.integers(len(self.images)))]
        top = int(random.integers(image.shape[0] - self.crop + 1))
        left = int(random.integers(image.shape[1] - self.crop + 1))
        flip = bool(random.random() < 0.5)
        return _item(image, label, top, left, (self.crop, self.crop), flip, bool(random.random() < self.gray))


class LabelledImages(Dataset[dict[str, Tensor]]):
    """The images as they are for validation: the central ``crop`` x ``crop`` pixels, or all of them.

    Args:
        images: as :class:`LabelledCrops`'.
        crop: side in pixels; None for the whole image.
    """

    def __init__(self, images: list[tuple[Image, Label]], crop: int | None) -> None:
        self.images = images
        self.crop = crop

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        image, label = self.images[index]
        height, width = image.shape[:2] if self.crop is None else (self.crop, self.crop)
        top, left = (image.shape[0] - height) // 2, (image.shape[1] - width) // 2
        return _item(image, label, top, left, (height, width), flip=False, gray=False)


def _item(
    image: Image, label: Label, top: int, left: int, size: tuple[int, int], flip: bool, gray: bool
) -> dict[str, Tensor]:
    window = (slice(top, top + size[0]), slice(left, left + size[1]))
    step = -1 if flip else 1
    pixels = np.ascontiguousarray(image[window][:, ::step].transpose(2, 0, 1))
    clean = torch.from_numpy(pixels).float().div_(255)
    clean = to_gray(clean) if gray else clean
    target = label if isinstance(label, int) else np.ascontiguousarray(label[window][:, ::step], dtype=np.int64)
    return {"clean": clean, "gray": torch.tensor(gray), "label": torch.as_tensor(target)}
