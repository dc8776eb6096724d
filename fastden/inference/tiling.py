"""Exact tiling: an image of any size in bounded memory, equal to the untiled result.

Tiles start at multiples of 4 pixels of the padded image, so that every stage of stride 2 keeps its phase, and carry a
halo of 24 pixels: a pixel depends on 22 pixels around it. So the network's zero padding at a tile's edge does not
reach the tile's own pixels. At the image's own border a tile ends where the padded image ends.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from numbers import Integral, Real
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastden.algebra import BORDER
from fastden.errors import shown_bytes
from fastden.inference.arguments import parse_memory
from fastden.network.folding import check_call
from fastden.network.fused import FusedDenoiser
from fastden.network.inputs import Sigma, as_tensor, map_or_curve, noise_level
from fastden.network.level import BRIGHTNESS_RADIUS, KNOTS, level_inside
from fastden.network.model import Denoiser
from fastden.network.padding import ALIGNMENT, padding_for, reflected_index
from fastden.ops.post_operations import why_not

#: Pixels that a tile reads around its own: the smallest multiple of 4 beyond the network's reach.
HALO = 24
#: Peak memory of a forward pass in float32, bytes for each pixel of a tile; 16-bit dtypes need half. ``onednn`` and
#: ``operators`` are the fused network on oneDNN and on the plain operators, ``plain`` the network that is not fused.
#: ``operators`` includes the buffer into which PyTorch unfolds conv3's input where no library does the convolution. A
#: test compares these numbers with the growth of a process's peak resident memory. Weights that are packed for the
#: tiles' shapes need up to 80 MiB more.
BYTES_PER_PIXEL = {"onednn": 560, "operators": 4800, "plain": 3800}
#: The same on CUDA devices in 16 bits, where no library unfolds an input. An H200 took, in bfloat16, at most 445 in the
#: fused network on any backend, and 833 in the plain one (``benchmarks/results/h200``, ``peak_mib``); a tile's window,
#: its level and what a picture's own scale keeps come on top, up to 60 in float32. In float32 nothing was measured:
#: cuDNN may unfold the input of the head's convolution, which takes as much as the operators on a CPU.
CUDA_BYTES_PER_PIXEL = {"operators": 600, "plain": 1100}
#: Bytes that ``tile="auto"`` may use without ``max_memory``.
DEFAULT_MEMORY = 1 << 30
#: The largest side that is chosen automatically: there the halo costs 5 %.
LARGEST_AUTOMATIC = 2048
SMALLEST = 16
#: Images of a batch go together only if tiles of this side, or the whole images, fit.
WHOLE = 512


#: Luma of BT.601, the gray of the field's test sets.
LUMA = (0.299, 0.587, 0.114)
#: What pixels become that stay gray.
Gray = Literal["mean", "luma"]


class TiledNetwork(Protocol):
    """A network that tiles go through; it may be adapted to the image and to the user's wishes."""

    noise_level_input: bool
    image_channels: int

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def device(self) -> torch.device: ...

    def forward_padded(self, x: Tensor) -> Tensor: ...


class OwnScale(NamedTuple):
    """A picture's own scale: what the network sees is ``(x - black) / span``, within ``limits`` if there are any.

    Values beyond the limits are added to the result, except for lone pixels, unless ``lone``. The result is on the
    scale of ``x`` again; white of integers is 1.
    """

    black: float
    span: float
    limits: tuple[float, float] | None
    lone: bool = False


class Tile(NamedTuple):
    """Half-open pixel ranges of the result that a tile covers."""

    top: int
    bottom: int
    left: int
    right: int


@torch.no_grad()
def denoise_tiled(
    model: TiledNetwork,
    image: Tensor,
    sigma: Sigma = None,
    *,
    tile: int | Literal["auto"] | None = "auto",
    max_memory: int | str | None = None,
    progress: Callable[[int, int], None] | None = None,
    scale: OwnScale | None = None,
    keep_gray: Gray | None = None,
) -> Tensor:
    """Denoise images tile by tile.

    Args:
        model: a :class:`fastden.Denoiser` in evaluation mode or a :class:`fastden.FusedDenoiser`, on any device; tiles
            are copied there one at a time.
        image: (N, 3, H, W) in the host's memory, or on the model's device: float in [0, 1], or torch.uint8 or
            torch.uint16, scaled tile by tile so that no float copy of the whole image exists.
        sigma: noise level on the 0-1 scale, in each form that :meth:`fastden.Denoiser.forward` takes: a number, (N,), a
            map (N, 1, H, W), or a curve of levels over brightness (N, 8) (:mod:`fastden.network.level`), as tensor,
            array or list; None for a blind network.
        tile: side of the tiles in pixels (rounded up to a multiple of 4), ``"auto"`` to choose it from ``max_memory``,
            or None for the whole image at once.
        max_memory: what the network's tensors may take, bytes or such as ``"2GiB"``; with ``tile="auto"`` alone.
            Default 1 GiB.
        progress: called after each tile with the pixels done and the pixels in all.
        scale: of the images, which ``sigma`` is on too; None takes them as they are.
        keep_gray: give a pixel the ``"mean"`` of its channels, or their ``"luma"`` (BT.601), where the channels of all
            pixels around it, 7 x 7, are equal: a gray picture with three channels gets no colour. None leaves the
            result as the network gives it.

    Returns:
        Tensor of the shape, dtype and device of ``image``: float results are not clipped, integer ones are clipped and
        rounded.

    Raises:
        ValueError, TypeError: naming the argument, its value and what is accepted.
    """
    _check_model(model)
    _check(image, model.image_channels)
    memory = parse_memory(max_memory) if isinstance(max_memory, str) else max_memory
    check_tile(tile, memory)
    n, _, height, width = image.shape
    # A small integer of NumPy would overflow below.
    side, together = (int(tile) if isinstance(tile, Integral) else tile), max(n, 1)
    if side == "auto":
        budget = DEFAULT_MEMORY if memory is None else memory
        side, together = automatic_tile(model, height, width, n, budget)
    levels = _levels(sigma, image, model.noise_level_input)
    result = torch.empty_like(image)
    done = 0
    for first in range(0, n, together):
        images = slice(first, first + together)
        level = levels[images] if isinstance(levels, Tensor) and len(levels) == n else levels
        for part in plan_tiles(height, width, side):
            target = result[images, :, part.top : part.bottom, part.left : part.right]
            target.copy_(_run(model, image[images], level, part, scale=scale, keep_gray=keep_gray))
            done += len(target) * (part.bottom - part.top) * (part.right - part.left)
            if progress is not None:
                progress(done, n * height * width)
    return result


@torch.no_grad()
def denoise_rows(
    model: TiledNetwork,
    strip: Tensor,
    sigma: float | Tensor | None,
    rows: tuple[int, int],
    first_row: int,
    height: int,
    side: int,
    scale: OwnScale | None = None,
    keep_gray: Gray | None = None,
) -> Tensor:
    """Denoise some rows of an image of which only a strip is in memory; bit for bit as :func:`denoise_tiled`.

    Args:
        model: as in :func:`denoise_tiled`.
        strip: (1, C, h, W), the image's rows from ``first_row`` on; it holds :func:`rows_needed` for ``rows``.
        sigma: a number, a map (1, 1, h, W) of the same rows as ``strip``, or a curve (1, 8); None for a blind network.
        rows: half-open; they start, and unless the image ends there end, at multiples of 4.
        first_row: of the strip, in the image.
        height: of the image.
        side: of the tiles, pixels.
        scale, keep_gray: as in :func:`denoise_tiled`.

    Returns:
        (1, C, rows, W) in the dtype and on the device of ``strip``.
    """
    top, bottom = rows
    result = strip.new_empty(1, strip.shape[1], bottom - top, strip.shape[3])
    for tile in plan_tiles(bottom - top, strip.shape[3], side):
        part = Tile(top + tile.top, top + tile.bottom, tile.left, tile.right)
        target = result[:, :, tile.top : tile.bottom, tile.left : tile.right]
        target.copy_(_run(model, strip, sigma, part, first_row, height, scale=scale, keep_gray=keep_gray))
    return result


def rows_needed(top: int, bottom: int, height: int) -> tuple[int, int]:
    """Half-open range of the image rows that tiles of the rows ``top`` to ``bottom`` read."""
    (first, last), _ = _window(top, bottom, height)
    first, last = _grown((first, last))
    return max(first, 0), min(last, height)


def check_tile(tile: object, max_memory: int | None) -> None:
    """Raise ValueError unless ``tile`` and ``max_memory`` are what :func:`denoise_tiled` accepts."""
    if max_memory is not None and tile != "auto":
        raise ValueError(f"max_memory: given together with tile={tile!r}; accepted: with tile='auto' alone")
    if tile is None or tile == "auto":
        return
    if not isinstance(tile, Integral) or isinstance(tile, bool) or tile < SMALLEST:
        raise ValueError(f"tile: {tile!r}; accepted: a whole number of at least {SMALLEST}, 'auto' or None")


def plan_tiles(height: int, width: int, side: int | None) -> Iterator[Tile]:
    """Tiles of nearly equal sizes, row by row; all but the last of each axis start and end at multiples of 4.

    Args:
        height, width: of the image, pixels.
        side: largest side of a tile, pixels; None for one tile.
    """
    for top, bottom in spans(height, side):
        for left, right in spans(width, side):
            yield Tile(top, bottom, left, right)


def spans(length: int, side: int | None) -> list[tuple[int, int]]:
    """The tiles' half-open ranges on an axis of ``length`` pixels; see :func:`plan_tiles`."""
    if side is None or length <= side:
        return [(0, length)]
    count = math.ceil(length / _round_up(side))
    # Tiles of equal size: a narrow last tile would cost one more halo.
    step = _round_up(math.ceil(length / count))
    return [(start, min(start + step, length)) for start in range(0, length, step)]


def _round_up(value: int) -> int:
    return -(-value // ALIGNMENT) * ALIGNMENT


def _check_model(model: object) -> None:
    """Raise for what is no network, and for a ``Denoiser`` of whose call tiles would leave something out."""
    if isinstance(model, Denoiser):
        if model.training:
            accepted = "evaluation mode (model.eval()), or fastden.fuse(model)"
            raise ValueError(f"model: in training mode; accepted: {accepted}")
        try:
            check_call(model)
        except ValueError as error:
            changed = "has a forward of its own, or hooks that change its result, which tiles would leave out"
            raise ValueError(
                f"model: {type(model).__name__} {changed}; accepted: fastden.Denoiser as it is, or a subclass with a"
                " forward_padded of its own"
            ) from error
    # A wrapper, such as torch.compile's, has what it wraps as attributes of its own.
    elif not isinstance(model, FusedDenoiser) and (
        isinstance(model, nn.Module) or not hasattr(model, "forward_padded")
    ):
        raise TypeError(f"model: {type(model).__name__}; accepted: fastden.Denoiser or FusedDenoiser")


def _check(image: Tensor, channels: int) -> None:
    if not isinstance(image, Tensor):
        raise TypeError(f"image: {type(image).__name__}; accepted: a torch.Tensor (N, {channels}, H, W)")
    if not image.is_floating_point() and image.dtype not in (torch.uint8, torch.uint16):
        raise TypeError(f"image: dtype {image.dtype}; accepted: floating dtypes, torch.uint8, torch.uint16")
    if image.dim() != 4 or image.shape[1] != channels or min(image.shape[2:]) < 1:
        raise ValueError(f"image: shape {tuple(image.shape)}; accepted: (N, {channels}, H, W) with H, W >= 1")


def _levels(sigma: Sigma, image: Tensor, wanted: bool) -> float | Tensor | None:
    """``sigma`` as tiles take it: a number, (N,), a map, or a curve; checked as the network does for a whole image."""
    # Checked here, where the image is known: a tile would take a map's or a curve's shape for another one's.
    map_or_curve(torch.empty(image.shape, device="meta"), sigma, wanted)
    if sigma is None or isinstance(sigma, Real):
        return None if sigma is None else float(sigma)
    tensor = as_tensor(sigma)
    if tensor.dim() == 4 and tuple(tensor.shape[2:]) == tuple(image.shape[2:]):
        return tensor
    return tensor if tensor.dim() == 2 and tensor.shape[1] == KNOTS else tensor.reshape(-1)


def bytes_per_pixel(model: TiledNetwork) -> float:
    """Peak memory of a forward pass, bytes for each pixel of a tile and its halo."""
    fused = "operators" if why_not(model.device, model.dtype) else "onednn"
    form = "plain" if isinstance(model, Denoiser) else fused
    # MIOpen's algorithms, on AMD's GPUs, were not measured.
    if model.device.type == "cuda" and model.dtype.itemsize == 2 and not torch.version.hip:
        return CUDA_BYTES_PER_PIXEL[form]
    return BYTES_PER_PIXEL[form] * model.dtype.itemsize / 4


def least_memory(model: TiledNetwork) -> int:
    """Peak memory of the smallest tile, bytes."""
    return math.ceil(bytes_per_pixel(model) * (SMALLEST + 2 * HALO) ** 2)


def automatic_tile(model: TiledNetwork, height: int, width: int, batch: int, max_memory: int) -> tuple[int, int]:
    """Size of the tiles, and number of images at a time, with which a forward pass stays within ``max_memory``.

    Several small images go together if they fit. Large images go one at a time, in the largest tiles that fit.

    Args:
        model: any network.
        height, width, batch: of the images.
        max_memory: bytes.

    Returns:
        The side of the tiles, pixels, and the number of images.

    Raises:
        ValueError: even the smallest tile of one image takes more.
    """
    per_pixel = bytes_per_pixel(model)
    whole = (min(height, WHOLE) + 2 * HALO) * (min(width, WHOLE) + 2 * HALO)
    together = max(min(batch, int(max_memory / (per_pixel * whole))), 1)
    side = int(math.sqrt(max(max_memory, 0) / (per_pixel * together))) - 2 * HALO
    side = min(side, LARGEST_AUTOMATIC) // ALIGNMENT * ALIGNMENT
    if together > 1:  # whole images fit, however small
        side = max(side, SMALLEST)
    if side < SMALLEST:
        least = shown_bytes(least_memory(model))
        raise ValueError(f"max_memory: {shown_bytes(max_memory)}; accepted: at least {least} for this model")
    return side, together


def _run(
    model: TiledNetwork,
    image: Tensor,
    sigma: float | Tensor | None,
    part: Tile,
    first_row: int = 0,
    height: int | None = None,
    *,
    scale: OwnScale | None = None,
    keep_gray: Gray | None = None,
) -> Tensor:
    """The pixels of ``part``, in the dtype of ``image``, on the model's device.

    ``image`` and a map hold the rows from ``first_row`` on of an image of ``height`` rows; None: all of it.
    """
    height = image.shape[2] if height is None else height
    rows, top = _window(part.top, part.bottom, height)
    columns, left = _window(part.left, part.right, image.shape[3])
    device, level = model.device, sigma
    if isinstance(sigma, Tensor) and sigma.dim() == 4:
        level = _cut(sigma, rows, columns, first_row, height)
    margin = 0
    if isinstance(sigma, Tensor) and sigma.dim() == 2 and model.noise_level_input:
        # The curve needs the brightness of the pixels around, so that the level is the same in every tile.
        margin, level = BRIGHTNESS_RADIUS, sigma.to(device)
    window = _cut(image, _grown(rows, margin), _grown(columns, margin), first_row, height)
    x, excess = _inward(_to_float(window.to(device)), scale)
    y = _forward(model, x, level, margin)
    y = y[:, :, top : top + part.bottom - part.top, left : left + part.right - part.left]
    above, before = margin + part.top - rows[0], margin + part.left - columns[0]
    if scale is not None:
        y = y.to(torch.promote_types(y.dtype, torch.float32))
        if excess is not None:
            y = y + excess[:, :, above : above + y.shape[2], before : before + y.shape[3]]
        y = y * scale.span + scale.black
    if keep_gray is not None:
        # A window begins at least BORDER pixels before its part, and ends as many behind it.
        around = window[:, :, above - BORDER :, before - BORDER :]
        gray = _gray_inside(around[:, :, : y.shape[2] + 2 * BORDER, : y.shape[3] + 2 * BORDER])
        if gray is not None:
            wide = y.to(torch.promote_types(y.dtype, torch.float32))
            weights = wide.new_tensor(LUMA).view(1, -1, 1, 1)
            one = wide.mean(1, keepdim=True) if keep_gray == "mean" else (wide * weights).sum(1, keepdim=True)
            y = torch.where(gray.to(y.device), one.to(y.dtype), y)
    return _from_float(y, image.dtype)


def _gray_inside(window: Tensor) -> Tensor | None:
    """Where all pixels within :data:`BORDER` have equal channels: (N, 1, H - 6, W - 6); None if that is nowhere."""
    if window.shape[1] != 3:
        return None
    # Squares of 7 x 7 hold 2 x 2 of every third pixel: colour pictures are done with a ninth of the work.
    if not bool(_all_in_squares(_gray(window[:, :, ::3, ::3]), 2).any()):
        return None
    return _all_in_squares(_gray(window), 2 * BORDER + 1)


def _gray(x: Tensor) -> Tensor:
    x = x.view(torch.int16) if x.dtype == torch.uint16 else x  # few operations take uint16
    return (x[:, :1] == x[:, 1:2]) & (x[:, 1:2] == x[:, 2:])


def _all_in_squares(true: Tensor, side: int) -> Tensor:
    """Whether all of the ``side`` x ``side`` elements from each one on are true: (N, 1, H - side + 1, W - side + 1)."""
    for dim in (2, 3):
        reach = 1
        while reach < side:
            step = min(reach, side - reach)
            length = true.shape[dim] - step
            true = true.narrow(dim, 0, length) & true.narrow(dim, step, length)
            reach += step
    return true


def _forward(model: TiledNetwork, x: Tensor, level: float | Tensor | None, margin: int) -> Tensor:
    """Run a network on a window; ``margin`` pixels on each side only give a curve the brightness around the others."""
    if isinstance(model, FusedDenoiser) and model.prepares(x, None):
        inside = (-margin, -margin)
        return model.forward_prepared(x, map_or_curve(x, level, model.noise_level_input), inside, inside)
    if margin:
        assert isinstance(level, Tensor)
        level = level_inside(level, x)
        x = x[:, :, margin:-margin, margin:-margin]
    if isinstance(model, Denoiser):
        x = x.to(model.dtype)
    levels = noise_level(x, level, model.noise_level_input)
    return model.forward_padded(x if levels is None else torch.cat([x, levels], 1))


def _inward(x: Tensor, scale: OwnScale | None) -> tuple[Tensor, Tensor | None]:
    """``x`` as the network sees it, and what is beyond its limits."""
    if scale is None:
        return x, None
    x = (x.to(torch.promote_types(x.dtype, torch.float32)) - scale.black) / scale.span
    if scale.limits is None:
        return x, None
    limited = x.clamp(*scale.limits)
    if scale.lone:
        return limited, x - limited
    beyond = (x != limited).any(1, keepdim=True).float()
    # A lone pixel beyond all noise is hot, and loses its excess; a highlight of two pixels or more keeps it.
    several = F.avg_pool2d(beyond, 3, stride=1, padding=1) > 1.5 / 9
    return limited, (x - limited) * several


def _grown(span: tuple[int, int], margin: int = BRIGHTNESS_RADIUS) -> tuple[int, int]:
    return span[0] - margin, span[1] + margin


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


def _cut(image: Tensor, rows: tuple[int, int], columns: tuple[int, int], first_row: int, height: int) -> Tensor:
    """A window of an image of ``height`` rows, of which those from ``first_row`` on are given.

    It continues by reflection beyond the image's edges.
    """
    for dim, (start, stop), first, size in ((2, rows, first_row, height), (3, columns, 0, image.shape[3])):
        if start >= 0 and stop <= size:
            image = image.narrow(dim, start - first, stop - start)
        else:
            index = reflected_index(start, stop, size, image.device) - first
            # index_select has no uint16; int16 has the same bits.
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
    values = y.float()
    # As integers they would be black. The sum of 24 megapixels takes 25 ms, the conversion 280; on a GPU the host would
    # have to wait for it, and compiled code would break off.
    if values.device.type == "cpu" and not torch.compiler.is_compiling() and not math.isfinite(float(values.sum())):
        raise ValueError(
            "result: NaN or infinity, which integers cannot hold; accepted: a model whose weights are sound"
        )
    return values.mul(largest).round_().clamp_(0, largest).to(dtype)
