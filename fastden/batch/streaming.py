"""Images larger than memory: read, denoised and written a strip of rows at a time, with the result of the whole image.

A strip is a row of tiles. While one is computed, the next is read and the last is encoded.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from functools import partial
from typing import Protocol

import numpy as np
import torch

from fastden.algebra import BORDER
from fastden.images.image_file import Header
from fastden.images.pixels import Array, to_dtype
from fastden.images.ranges import ORDINARY, ValueRange
from fastden.images.samples import sigma_of_gray
from fastden.inference.run import PLAIN, Wishes, adapted, from_batch, kept_gray, own_level, own_scale, to_batch
from fastden.inference.tiling import HALO, SMALLEST, denoise_rows, rows_needed, spans
from fastden.network.fused import FusedDenoiser
from fastden.network.padding import ALIGNMENT

#: Strips that exist at the same time: one being read, one computed from and one computed, and two on the way out.
STRIPS = 5


class Reader(Protocol):
    """Where rows come from: :class:`fastden.images.strips.StripReader`."""

    header: Header

    def read_into(self, rows: Array) -> None: ...


def side_for_strips(side: int, header: Header, memory: int, *, with_map: bool = False) -> int:
    """The largest side of tiles, up to ``side``, with which a whole row of tiles fits into memory.

    Args:
        side: the largest that the network's memory allows, pixels.
        header: of the image.
        memory: bytes for the strips.
        with_map: a map of noise levels is read beside the image.

    Raises:
        ValueError: not even rows of the smallest tiles fit.
    """
    per_row = header.width * (header.bands * header.dtype.itemsize + 4 * with_map) * STRIPS
    extra = 2 * (HALO + BORDER)
    rows = (memory // per_row - extra) // ALIGNMENT * ALIGNMENT
    if rows < SMALLEST:
        least = 2 * per_row * (SMALLEST + extra + ALIGNMENT)
        raise ValueError(f"max_memory: strips of {header.width} pixels do not fit; accepted: at least {least} bytes")
    return min(side, rows)


class _Window:
    """The rows of an image that a strip needs; each row is read once."""

    def __init__(self, reader: Reader, height: int) -> None:
        self._reader, self._height = reader, height
        header = reader.header
        self.rows: Array = np.empty((0, header.width, header.bands), header.dtype)
        self.first = 0

    def advanced(self, top: int, bottom: int) -> tuple[Array, int]:
        """(h, W, bands) for the tiles of the rows ``top`` to ``bottom``, and the image row at which they begin."""
        first, last = rows_needed(top, bottom, self._height)
        known = self.rows[first - self.first :]
        rows = np.empty((last - first, *known.shape[1:]), known.dtype)
        rows[: len(known)] = known
        self._reader.read_into(rows[len(known) :])
        self.rows, self.first = rows, first
        return rows, first


def denoise_strips(
    network: FusedDenoiser,
    reader: Reader,
    write: Callable[[Array], None],
    level: float | torch.Tensor | Reader | None,
    *,
    side: Callable[[], int],
    dtype: np.dtype[np.generic],
    wishes: Wishes = PLAIN,
    attempt: Callable[[Callable[[int], torch.Tensor]], torch.Tensor] | None = None,
    progress: Callable[[int, int], None] | None = None,
    values: ValueRange = ORDINARY,
) -> float:
    """Denoise an image from a reader to a writer.

    Args:
        network: as in :func:`fastden.inference.run.run_network`.
        reader: of the image.
        write: called with rows (n, W, bands), in order.
        level: on the scale 0-1, a number or a curve (1, 8); or a reader of a map, gray, white for 1; None for a blind
            network.
        side: gives the side of the tiles, pixels: of all strips, and, without ``attempt``, of each.
        dtype: of the rows that are written.
        wishes: how the network is applied.
        attempt: calls its argument with a side of tiles, at most ``side``, and may call it again with a smaller one.
        progress: called with the pixels done and in all.
        values: what the image's values span.

    Returns:
        Seconds spent computing.
    """
    header = reader.header
    height, channels = header.height, header.channels
    tiled = adapted(network, channels, wishes)
    strips = spans(height, side())
    image = _Window(reader, height)
    own, levels = None, None
    if level is None or isinstance(level, float | torch.Tensor):
        own, scale = own_scale(level, values, wishes)
    else:
        levels, (_, scale) = _Window(level, height), own_scale(None, values, wishes)
    seconds = 0.0
    with closing(_read_ahead(image, levels, strips)) as loaded:
        for (top, bottom), (strip, first, level_rows) in zip(strips, loaded, strict=True):
            start = time.perf_counter()
            batch = to_batch([strip[:, :, :channels]], network)
            sigma = own if level_rows is None else own_level(_level_tensor(level_rows), values)
            run = partial(
                denoise_rows,
                tiled,
                batch,
                sigma,
                (top, bottom),
                first,
                height,
                scale=scale,
                keep_gray=kept_gray(wishes),
            )
            (pixels,) = from_batch(run(side()) if attempt is None else attempt(run), header.dtype)
            seconds += time.perf_counter() - start
            if header.has_alpha:
                pixels = np.concatenate([pixels, strip[top - first : bottom - first, :, channels:]], 2)
            write(to_dtype(pixels, dtype))
            if progress is not None:
                progress(bottom * header.width, height * header.width)
    return seconds


def _read_ahead(
    image: _Window, levels: _Window | None, strips: list[tuple[int, int]]
) -> Generator[tuple[Array, int, Array | None], None, None]:
    """Rows for each strip, the image row at which they begin, and the map's rows; the next are read in a thread."""

    def load(rows: tuple[int, int]) -> tuple[Array, int, Array | None]:
        strip, first = image.advanced(*rows)
        return strip, first, None if levels is None else levels.advanced(*rows)[0]

    with ThreadPoolExecutor(1, thread_name_prefix="fastden-strip-reader") as pool:
        following = pool.submit(load, strips[0])
        for index in range(len(strips)):
            loaded = following.result()
            if index + 1 < len(strips):
                following = pool.submit(load, strips[index + 1])
            yield loaded


def _level_tensor(rows: Array) -> torch.Tensor:
    return torch.from_numpy(sigma_of_gray(rows)).permute(2, 0, 1)[None] / 255
