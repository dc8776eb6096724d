"""A decoded image file, and what a file says before its pixels are decoded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np

from fastden.errors import UserError
from fastden.images.extras import Extras
from fastden.images.pixels import Array
from fastden.images.ranges import ValueRange, find_range


@dataclass(frozen=True)
class ImageFile:
    """A decoded image file.

    Attributes:
        pixels: (H, W, C), C 1 (gray) or 3 (RGB); uint8, uint16, or float32 on the scale [0, 1]. As stored: where
            ``metadata["orientation"]`` is not 1, the picture is shown turned (:meth:`upright`). The pages of a file of
            several lie one below the other (:meth:`split`).
        alpha: (H, W) in the dtype of ``pixels``, or None.
        format: ``jpeg``, ``png``, ``tiff``, ``webp``, ``avif``, ``heic``, ``jxl``, ``raw``, or libvips' name.
        bits: significant bits of a channel: 8, 10, 12, 16 or 32; 0 means all bits of the dtype.
        lossless: whether the file stores its pixels without loss.
        metadata: header fields by libvips' names (:data:`fastden.images.codec.METADATA`): EXIF, ICC profile, XMP, IPTC,
            resolution, orientation.
        notes: what a user should know about the reading, such as a conversion.
        pages: of the file, all of one size.
        extras: what else the file holds.
        stated: the highest value that the file says there is; 0 where it says nothing.
    """

    pixels: Array
    alpha: Array | None = None
    format: str = "png"
    bits: int = 0
    lossless: bool = True
    metadata: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    pages: int = 1
    extras: Extras = field(default_factory=Extras)
    stated: int = 0

    def __post_init__(self) -> None:
        if not self.bits:
            object.__setattr__(self, "bits", 8 * self.pixels.dtype.itemsize)

    def split(self) -> list[Array]:
        """The pixels of each page, (H, W, C)."""
        return np.split(self.pixels, self.pages)

    @cached_property
    def ranges(self) -> tuple[ValueRange, ...]:
        """What the values of each page span.

        Raises:
            UserError: values on another scale than [0, 1].
        """
        try:
            return tuple(find_range(page, self.stated) for page in self.split())
        except ValueError as error:
            raise UserError(f"floating image: {error}") from error

    def upright(self) -> ImageFile:
        """The same picture with its orientation applied to the pixels, and the tag set to say so."""
        orientation = int(self.metadata.get("orientation", 1))
        if orientation in (0, 1):
            return self
        alpha = None if self.alpha is None else _turned(self.alpha, orientation, self.pages)
        metadata = {**self.metadata, "orientation": 1}
        if orientation >= 5 and {"xres", "yres"} <= metadata.keys():
            metadata["xres"], metadata["yres"] = metadata["yres"], metadata["xres"]
        return replace(self, pixels=_turned(self.pixels, orientation, self.pages), alpha=alpha, metadata=metadata)


@dataclass(frozen=True)
class Header:
    """What an image file says before its pixels are decoded.

    Attributes:
        width, height: pixels, of a page.
        channels: 1 or 3.
        has_alpha: whether an alpha channel follows them.
        dtype: of the decoded values.
        format, bits, lossless, metadata, notes, pages, stated: as of :class:`ImageFile`.
        interlaced: whether rows come in several passes, as in a progressive JPEG: its decoder holds the whole image.
    """

    width: int
    height: int
    channels: int
    has_alpha: bool
    dtype: np.dtype[Any]
    format: str
    bits: int
    lossless: bool
    metadata: Mapping[str, Any]
    notes: tuple[str, ...]
    pages: int = 1
    stated: int = 0
    interlaced: bool = False

    @property
    def bands(self) -> int:
        """Channels, alpha included."""
        return self.channels + self.has_alpha

    @property
    def nbytes(self) -> int:
        """Bytes of the decoded values, alpha included."""
        return self.pages * self.width * self.height * self.bands * self.dtype.itemsize


def _turned(array: Array, orientation: int, pages: int = 1) -> Array:
    """(H, W, ...) with EXIF orientation 2 to 8 undone, page by page."""
    if pages > 1:
        return np.concatenate([_turned(page, orientation) for page in np.split(array, pages)])
    mirrored = {2: array[:, ::-1], 4: array[::-1], 5: array.swapaxes(0, 1), 7: array[::-1, ::-1].swapaxes(0, 1)}
    turns = {3: 2, 6: -1, 8: 1}
    turned = np.rot90(array, turns[orientation]) if orientation in turns else mirrored.get(orientation, array)
    return np.ascontiguousarray(turned)
