"""Exact tiling: an image of any size in bounded memory, equal to the untiled result.

Tiles start at multiples of 4 pixels of the padded image, so that every stage of stride 2 keeps its phase, and carry a
halo of 24 pixels: nothing beyond 22 reaches a pixel, hence what the network's zero padding does at a tile's edge never
reaches the part that is kept. At the image's own border a tile ends where the padded image ends.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from fastden.fused import FusedDenoiser
from fastden.model import ALIGNMENT, BORDER, Denoiser, noise_level, padding_for, reflected_index

#: Pixels that a tile reads around its own: the smallest multiple of 4 beyond the network's reach.
HALO = 24
#: Bytes that a forward pass takes for each pixel of a tile, all tensors alive at the peak, in float32; half of it in
#: 16 bits. Measured as the growth of peak resident memory from 1 to 4 megapixels: see tests/test_tiling.py.
BYTES_PER_PIXEL = {"fused": 560, "plain": 1900}
#: What ``tile="auto"`` allows itself where no ``max_memory`` is given, bytes.
DEFAULT_MEMORY = 1 << 30
#: No larger tiles are chosen automatically: by then the halo costs 5 %.
LARGEST_AUTOMATIC = 2048
SMALLEST = 16

Model = Denoiser | FusedDenoiser


class Tile(NamedTuple):
    """Half-open pixel ranges of the image that a tile makes."""

    top: int
    bottom: int
    left: int
    right: int


@torch.no_grad()
def denoise_tiled(
    model: Model,
    image: Tensor,
    sigma: float | Tensor | None = None,
    *,
    tile: int | Literal["auto"] | None = "auto",
    max_memory: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Tensor:
    """Denoise images tile by tile.

    Args:
        model: a network, on any device; tiles travel there one at a time.
        image: (N, 3, H, W) in the host's memory, or on the model's device: float in [0, 1], or torch.uint8 or
            torch.uint16, scaled tile by tile so that no float copy of the whole image exists.
        sigma: noise level on the 0-1 scale: a number, (N,) or a map (N, 1, H, W); None for a blind network.
        tile: side of the tiles in pixels (rounded up to a multiple of 4), ``"auto"`` to choose it from ``max_memory``, or
            None for the whole image at once.
        max_memory: bytes that the network's tensors may take; with ``tile="auto"`` alone. Default 1 GiB.
        progress: called after each tile with the pixels done and the pixels in all.

    Returns:
        Tensor of the shape, dtype and device of ``image``: float results are not clipped, integer ones are clipped and
        rounded.

    Raises:
        ValueError, TypeError: naming the argument, its value and what is accepted.
    """
    _check(image, model.image_channels)
    height, width = image.shape[2:]
    side = _tile_side(model, image, tile, max_memory)
    result = torch.empty_like(image)
    done = 0
    for part in plan_tiles(height, width, side):
        result[:, :, part.top : part.bottom, part.left : part.right] = _run(model, image, sigma, part)
        done += (part.bottom - part.top) * (part.right - part.left)
        if progress is not None:
            progress(done, height * width)
    return result


def plan_tiles(height: int, width: int, side: int | None) -> Iterator[Tile]:
    """Tiles of nearly equal sizes, row by row; all but the last of each axis start and end at multiples of 4.

    Args:
        height, width: of the image, pixels.
        side: largest side of a tile, pixels; None for one tile.
    """
    for top, bottom in _spans(height, side):
        for left, right in _spans(width, side):
            yield Tile(top, bottom, left, right)


def _spans(length: int, side: int | None) -> list[tuple[int, int]]:
    if side is None or length <= side:
        return [(0, length)]
    count = math.ceil(length / side)
    # Equal tiles rather than full ones and a sliver: the halo is paid once more for a sliver.
    step = _round_up(math.ceil(length / count))
    return [(start, min(start + step, length)) for start in range(0, length, step)]


def _round_up(value: int) -> int:
    return -(-value // ALIGNMENT) * ALIGNMENT


def _check(image: Tensor, channels: int) -> None:
    if not isinstance(image, Tensor):
        raise TypeError(f"image: {type(image).__name__}; accepted: a torch.Tensor (N, {channels}, H, W)")
    if not image.is_floating_point() and image.dtype not in (torch.uint8, torch.uint16):
        raise TypeError(f"image: dtype {image.dtype}; accepted: floating dtypes, torch.uint8, torch.uint16")
    if image.dim() != 4 or image.shape[1] != channels or min(image.shape[2:]) < 1:
        raise ValueError(f"image: shape {tuple(image.shape)}; accepted: (N, {channels}, H, W) with H, W >= 1")


def _tile_side(
    model: Model, image: Tensor, tile: int | Literal["auto"] | None, max_memory: int | None
) -> int | None:
    if max_memory is not None and tile != "auto":
        raise ValueError(f"max_memory: given together with tile={tile!r}; accepted: with tile='auto' alone")
    if tile is None:
        return None
    if tile != "auto":
        if not isinstance(tile, int) or isinstance(tile, bool) or tile < SMALLEST:
            raise ValueError(f"tile: {tile!r}; accepted: a whole number of at least {SMALLEST}, 'auto' or None")
        return _round_up(tile)
    return automatic_tile(model, image.shape[0], DEFAULT_MEMORY if max_memory is None else max_memory)


def automatic_tile(model: Model, batch: int, max_memory: int) -> int:
    """Largest tile side whose forward pass stays within ``max_memory`` bytes.

    Raises:
        ValueError: even the smallest tile takes more.
    """
    dtype = model.dtype if isinstance(model, FusedDenoiser) else model.conv0.weight.dtype
    form = "fused" if isinstance(model, FusedDenoiser) else "plain"
    per_pixel = BYTES_PER_PIXEL[form] * dtype.itemsize / 4 * max(batch, 1)
    side = int(math.sqrt(max(max_memory, 0) / per_pixel)) - 2 * HALO
    side = min(side, LARGEST_AUTOMATIC) // ALIGNMENT * ALIGNMENT
    if side < SMALLEST:
        least = math.ceil(per_pixel * (SMALLEST + 2 * HALO) ** 2)
        raise ValueError(f"max_memory: {max_memory} bytes; accepted: at least {least} for a batch of {batch}")
    return side


def _run(model: Model, image: Tensor, sigma: float | Tensor | None, part: Tile) -> Tensor:
    """The pixels of ``part``, in the dtype of ``image``, on the model's device."""
    rows, top = _window(part.top, part.bottom, image.shape[2])
    columns, left = _window(part.left, part.right, image.shape[3])
    weight = next(model.buffers())
    level = sigma
    if isinstance(sigma, Tensor) and sigma.dim() == 4:
        _check_map(sigma, image)
        level = _cut(sigma, rows, columns)
    x = _to_float(_cut(image, rows, columns).to(weight.device))
    if isinstance(model, Denoiser):
        x = x.to(model.conv0.weight.dtype)
    levels = noise_level(x, level, model.noise_level_input)
    y = model.forward_padded(x if levels is None else torch.cat([x, levels], 1))
    y = y[:, :, top : top + part.bottom - part.top, left : left + part.right - part.left]
    return _from_float(y, image.dtype)


def _check_map(sigma: Tensor, image: Tensor) -> None:
    n, _, height, width = image.shape
    if sigma.shape[0] not in (1, n) or tuple(sigma.shape[1:]) != (1, height, width):
        raise ValueError(f"sigma: shape {tuple(sigma.shape)}; accepted: a number, ({n},) or ({n}, 1, {height}, {width})")


def _window(start: int, stop: int, size: int) -> tuple[tuple[int, int], int]:
    """Range of image positions that a tile reads on one axis (padding is outside [0, size)), and where its own begin.

    The padded image starts 3 pixels before the image; its length is a multiple of 4.
    """
    before, after = padding_for(size)
    length = before + size + after
    first = max(start - HALO, 0)
    # The network takes 3 pixels on each side; one more pair keeps the length a multiple of 4.
    last = min(_round_up(stop + 2 * BORDER + HALO), length)
    return (first - BORDER, last - BORDER), start - first


def _cut(image: Tensor, rows: tuple[int, int], columns: tuple[int, int]) -> Tensor:
    """A window of ``image`` that continues by reflection beyond its edges."""
    for dim, (start, stop) in ((2, rows), (3, columns)):
        size = image.shape[dim]
        if start >= 0 and stop <= size:
            image = image.narrow(dim, start, stop - start)
        else:
            index = reflected_index(start, stop, size, image.device)
            # index_select has no uint16; the bits are the same.
            kind = image.dtype
            image = (image.view(torch.int16) if kind == torch.uint16 else image).index_select(dim, index)
            image = image.view(torch.uint16) if kind == torch.uint16 else image
    return image


def _to_float(x: Tensor) -> Tensor:
    if x.is_floating_point():
        return x
    return x.to(torch.float32) / (255 if x.dtype == torch.uint8 else 65535)


def _from_float(y: Tensor, dtype: torch.dtype) -> Tensor:
    if dtype.is_floating_point:
        return y.to(dtype)
    largest = 255 if dtype == torch.uint8 else 65535
    return y.float().mul(largest).round_().clamp_(0, largest).to(dtype)
