"""Training crops of photographs in memory; each crop depends on (seed, epoch, index) alone."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import Dataset

from fastden.errors import UserError
from fastden.images.codec import SUFFIXES
from fastden.images.finder import find_images

Image = npt.NDArray[np.uint8]


def find_photographs(folder: Path) -> list[Path]:
    """Image files below ``folder``, sorted; see :func:`fastden.images.finder.find_images`.

    Raises:
        UserError: no such folder, or no image in it.
    """
    if not folder.is_dir():
        raise UserError(f"data: {folder} is not a folder; accepted: folders of photographs")
    files = find_images(folder, recursive=True)
    if not files:
        raise UserError(f"data: no images in {folder}; accepted suffixes: {', '.join(SUFFIXES)}")
    return files


def load_rgb(path: Path) -> Image:
    """(H, W, 3) uint8 pixels of an image file, upright, in sRGB: an embedded colour profile is applied.

    Raises:
        UserError: the file cannot be read.
    """
    import pyvips

    try:
        image = _in_srgb(pyvips.Image.new_from_file(str(path), fail_on="truncated").autorot())
        return np.asarray(image[:3].numpy(), dtype=np.uint8)
    except pyvips.Error as error:
        raise UserError(f"data: cannot read {path}: {str(error).splitlines()[0]}") from error


def _in_srgb(image: Any) -> Any:
    """An image of pyvips in sRGB. A profile that does not fit (of colours, in a gray file) is passed over."""
    import pyvips

    if image.get_typeof("icc-profile-data") and image.format in ("uchar", "ushort"):
        with suppress(pyvips.Error):
            image = image.icc_transform("srgb", embedded=True, depth=8)
    return image.colourspace("srgb")


def central_crops(folders: list[Path], count: int, side: int = 256) -> list[Tensor]:
    """Crops (1, 3, H, W) from the centres of at most ``count`` photographs, evenly spaced over the folders' files.

    Float32 in [0, 1], at most ``side`` pixels high and wide.

    Raises:
        UserError: a folder without photographs, or a file that cannot be read.
    """
    files = [file for folder in folders for file in find_photographs(folder)]
    crops = []
    for file in files[:: -(-len(files) // count)]:
        pixels = torch.from_numpy(load_rgb(file).copy()).permute(2, 0, 1)[None].float().div_(255)
        top, left = (max(length - side, 0) // 2 for length in pixels.shape[2:])
        crops.append(pixels[:, :, top : top + side, left : left + side].contiguous())
    return crops


def to_gray(image: Tensor) -> Tensor:
    """(3, H, W) with its luma (BT.601) in every channel."""
    weights = image.new_tensor([0.299, 0.587, 0.114]).view(3, 1, 1)
    return (image * weights).sum(0, keepdim=True).expand(3, -1, -1).contiguous()


class CropDataset(Dataset[dict[str, Tensor]]):
    """Random square crops, flipped and turned, some made gray.

    Item ``index`` depends on the seed, the epoch and the index alone, so a resumed run sees the crops that the
    uninterrupted one would have seen. A photograph is drawn with a probability proportional to the square root of its
    area: large photographs hold more texture, but not in proportion.

    Args:
        images: (H, W, 3) uint8, both sides at least ``crop``.
        length: items an epoch.
        crop: side in pixels.
        gray: probability that a crop is made gray.
        seed, epoch: see above.
    """

    def __init__(self, images: list[Image], length: int, crop: int, gray: float, seed: int, epoch: int) -> None:
        self.images = images
        self.length = length
        self.crop = crop
        self.gray = gray
        self.key = (seed, epoch)
        weight = np.sqrt([float(image.shape[0] * image.shape[1]) for image in images])
        self.cumulative = np.cumsum(weight / weight.sum())

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, Any]:
        random = np.random.default_rng((*self.key, index))
        chosen = min(int(np.searchsorted(self.cumulative, random.random())), len(self.images) - 1)
        image = self.images[chosen]
        top = random.integers(image.shape[0] - self.crop + 1)
        left = random.integers(image.shape[1] - self.crop + 1)
        crop = image[top : top + self.crop, left : left + self.crop]
        crop = np.rot90(crop, int(random.integers(4)))
        if random.random() < 0.5:
            crop = crop[:, ::-1]
        gray = random.random() < self.gray
        clean = torch.from_numpy(np.ascontiguousarray(crop.transpose(2, 0, 1))).float().div_(255)
        clean = to_gray(clean) if gray else clean
        return {"clean": clean, "gray": torch.tensor(gray)}
