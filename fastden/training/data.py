"""Training crops of photographs in memory; each crop depends on (seed, epoch, index) alone."""

from __future__ import annotations

import logging
import os
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import Dataset

from fastden.errors import UserError
from fastden.images.codec import SUFFIXES, read_image
from fastden.images.encoding import described
from fastden.images.finder import find_images, left_out_note
from fastden.images.image_file import ImageFile
from fastden.images.libvips import VIPS_FORMATS, load_vips
from fastden.images.pixels import to_dtype
from fastden.inference.tiling import LUMA

Image = npt.NDArray[np.uint8]
T = TypeVar("T")


def tell(note: str) -> None:
    """Show a note on standard error, once where several processes of a machine train."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        logging.getLogger(__name__).warning("note: %s", note)


def names_of(files: list[Path]) -> str:
    """The names of at most ten files, for a note."""
    more = f" and {len(files) - 10} more" if len(files) > 10 else ""
    return ", ".join(map(str, files[:10])) + more


def find_photographs(folder: Path) -> list[Path]:
    """Image files below ``folder``, sorted; see :func:`fastden.images.finder.find_images`.

    A note says how many image files are of a kind that is not read here.

    Raises:
        UserError: no such folder, or no image in it.
    """
    if not folder.is_dir():
        raise UserError(f"data: {folder} is not a folder; accepted: folders of photographs")
    left_out: list[Path] = []
    files = find_images(folder, recursive=True, left_out=left_out)
    if not files:
        others = f" ({left_out_note(left_out)})" if left_out else ""
        raise UserError(f"data: no images in {folder}{others}; accepted suffixes: {', '.join(SUFFIXES)}")
    if left_out:
        tell(f"data: {folder}: {left_out_note(left_out)}")
    return files


def load_rgb(path: Path) -> Image:
    """(H, W, 3) uint8 pixels of an image file, upright, in sRGB: an embedded colour profile is applied.

    Every kind is read that ``fastden denoise`` reads; of several pages, the first. Values on another range than that of
    their dtype, such as 12 bits in 16, are brought to their own range, as they are before they are denoised
    (:mod:`fastden.images.ranges`); what lies beyond it is cut off.

    Raises:
        UserError: the file cannot be read.
    """
    try:
        return _in_srgb(read_image(path, several=True).upright())
    except UserError as error:
        raise UserError(f"data: cannot read {error}") from error
    except load_vips().Error as error:  # libvips computes late: what a profile cannot convert shows at the end
        raise UserError(f"data: cannot read {path}: {str(error).splitlines()[0]}") from error


def _in_srgb(image: ImageFile) -> Image:
    """The first page in sRGB. A profile that does not fit (of colours, in a gray file) is passed over."""
    vips = load_vips()
    pixels = image.split()[0]
    if pixels.dtype != np.uint8:
        pixels = to_dtype(image.ranges[0].own_scale(pixels), np.uint16)
    height, width, channels = pixels.shape
    picture = vips.Image.new_from_memory(
        np.ascontiguousarray(pixels).data, width, height, channels, VIPS_FORMATS[pixels.dtype]
    )
    profile = {name: value for name, value in image.metadata.items() if name == "icc-profile-data"}
    picture = described(picture, profile, strip_metadata=True)
    if profile:
        with suppress(vips.Error):
            picture = picture.icc_transform("srgb", embedded=True, depth=8)
    # numpy() of pyvips would drop the dimensions of one-pixel images.
    return np.ndarray((height, width, 3), np.uint8, picture.colourspace("srgb").write_to_memory())


def sent(numbers: Tensor, device: torch.device) -> Tensor:
    """A copy of a few ``numbers`` on ``device``, for which the processor does not wait.

    CUDA has read memory that is not pinned when its call returns. A step that waits for the GPU starts no kernel ahead.
    """
    return numbers.to(device, non_blocking=device.type == "cuda")


def evenly_spaced(items: list[T], count: int) -> list[T]:
    """``count`` of the items, or all if there are fewer: a folder or a table may be sorted by what it shows."""
    count = min(count, len(items))
    return [items[index * len(items) // count] for index in range(count)]


def central_crops(folders: list[Path], count: int, side: int = 256) -> list[Tensor]:
    """Crops (1, 3, H, W) from the centres of at most ``count`` photographs, evenly spaced over the folders' files.

    Float32 in [0, 1], at most ``side`` pixels high and wide.

    Raises:
        UserError: a folder without photographs, or a file that cannot be read.
    """
    files = [file for folder in folders for file in find_photographs(folder)]
    crops = []
    for file in evenly_spaced(files, count):
        pixels = torch.from_numpy(load_rgb(file).copy()).permute(2, 0, 1)[None].float().div_(255)
        top, left = (max(length - side, 0) // 2 for length in pixels.shape[2:])
        crops.append(pixels[:, :, top : top + side, left : left + side].contiguous())
    return crops


def to_gray(image: Tensor) -> Tensor:
    """(3, H, W) with its luma (BT.601) in every channel."""
    weights = image.new_tensor(LUMA).view(3, 1, 1)
    return (image * weights).sum(0, keepdim=True).expand(3, -1, -1).contiguous()


class Pictures:
    """Photographs to draw from, each with a probability proportional to the square root of its area.

    Large photographs hold more texture, but not in proportion.

    Args:
        images: (H, W, 3) uint8.
    """

    def __init__(self, images: list[Image]) -> None:
        self.images = images
        weight = np.sqrt([float(image.shape[0] * image.shape[1]) for image in images])
        self.cumulative = np.cumsum(weight / weight.sum())

    def draw(self, random: np.random.Generator) -> Image:
        """One of them."""
        chosen = int(np.searchsorted(self.cumulative, random.random()))
        return self.images[min(chosen, len(self.images) - 1)]  # a rounded sum may lie below 1


class CropDataset(Dataset[dict[str, Tensor]]):
    """Random square crops, flipped and turned, some made gray.

    Item ``index`` depends on the seed, the epoch and the index alone, so a resumed run sees the crops that the
    uninterrupted one would have seen. Large photographs are drawn more often, see :class:`Pictures`.

    Args:
        images: (H, W, 3) uint8, both sides at least ``crop``.
        length: items an epoch.
        crop: side in pixels.
        gray: probability that a crop is made gray.
        seed, epoch: see above.
    """

    def __init__(self, images: list[Image], length: int, crop: int, gray: float, seed: int, epoch: int) -> None:
        self.pictures = Pictures(images)
        self.length = length
        self.crop = crop
        self.gray = gray
        self.key = (seed, epoch)

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, Any]:
        random = np.random.default_rng((*self.key, index))
        image = self.pictures.draw(random)
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
