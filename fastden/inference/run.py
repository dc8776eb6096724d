"""A loaded network over images: in tiles, gray images and partial strengths too, with the noise level that it takes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import torch
from torch import Tensor

from fastden.algebra import BORDER
from fastden.choices import Quality
from fastden.images.pixels import Array, check_plain
from fastden.images.ranges import ORDINARY, STRONGEST, ValueRange, find_range
from fastden.inference.arguments import check_strength
from fastden.inference.estimate import NoiseEstimate, check_dense, estimate_of
from fastden.inference.tiling import LUMA, Gray, OwnScale, TiledNetwork, denoise_tiled
from fastden.network.fused import FusedDenoiser
from fastden.network.inputs import as_tensor
from fastden.network.level import KNOTS, interpolated

#: What the argument ``sigma`` takes, for messages.
_SIGMAS = "'auto', a NoiseEstimate, a number from 0 to 255, a map (H, W), or numbers for a batch"
#: The highest level of a map, on the scale 0-1. By strips its highest level is not known, so that :func:`own_scale`
#: cannot divide the picture; and from sigma 120 on ``color`` puts out values far outside of a picture's range.
HIGHEST_OF_MAPS = 100 / 255
Progress = Callable[[int, int], None]


def part_of(progress: Progress | None, index: int, count: int) -> Progress | None:
    """``progress`` for number ``index`` of ``count`` equal parts of the work."""
    if progress is None:
        return None
    return lambda done, total: progress(index * total + done, count * total)


@dataclass(frozen=True)
class Wishes:
    """How a network is applied.

    Attributes:
        strength: 0 to 2, factor of the noise level; 0 gives the image back. A blind network takes no noise level: with
            0 to 1 its result is blended with the image.
        chroma: the same for colour alone; None follows ``strength``. Where they differ the network runs twice, and luma
            and chroma (BT.601) come from one result each.
        quality: ``"best"`` averages the results of the eight flips and quarter turns, at eight times the work.
            ``"fast"`` is a matter of the network (:func:`fastden.fuse`).
    """

    strength: float = 1.0
    chroma: float | None = None
    quality: Quality = "normal"

    def __post_init__(self) -> None:
        check_strength(self.strength)
        if self.chroma is not None:
            check_strength(self.chroma, "chroma")
        if self.quality not in get_args(Quality):
            raise ValueError(f"quality: {self.quality!r}; accepted: {', '.join(map(repr, get_args(Quality)))}")

    @property
    def fast(self) -> bool:
        """Whether the network computes in 8-bit integers."""
        return self.quality == "fast"

    @property
    def plain(self) -> bool:
        """Whether the network is applied as it is."""
        return self.strength == 1 and self.chroma in (None, 1) and self.quality != "best"

    @property
    def idle(self) -> bool:
        """Whether pictures stay as they are."""
        return self.strength == 0 and self.chroma in (None, 0)


#: The network as it is.
PLAIN = Wishes()


class Adapted:
    """A fused network for gray images, other strengths and ensembles: tile by tile, before anything is rounded.

    Args:
        network: it gives the weights.
        channels: of the images, 1 or the network's.
        wishes: see :class:`Wishes`.
    """

    def __init__(self, network: FusedDenoiser, channels: int, wishes: Wishes) -> None:
        self.network = network
        self.noise_level_input = network.noise_level_input
        self.image_channels = channels
        self.wishes = wishes

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of weights and activations."""
        return self.network.dtype

    @property
    def device(self) -> torch.device:
        """The device that it runs on."""
        return self.network.device

    def forward_padded(self, x: Tensor) -> Tensor:
        """As :meth:`fastden.FusedDenoiser.forward_padded`."""
        image, level = x[:, : self.image_channels], x[:, self.image_channels :]
        wishes = self.wishes
        y = self._of_strength(image, level, wishes.strength)
        if wishes.chroma in (None, wishes.strength) or self.image_channels == 1:
            return y
        assert wishes.chroma is not None
        other = self._of_strength(image, level, wishes.chroma)
        # The same amount on all channels changes luma alone.
        weights = torch.tensor(LUMA, device=y.device, dtype=y.dtype).view(1, -1, 1, 1)
        return other + ((y - other) * weights).sum(1, keepdim=True)

    def _of_strength(self, image: Tensor, level: Tensor, strength: float) -> Tensor:
        inside = image[:, :, BORDER:-BORDER, BORDER:-BORDER]
        if strength == 0:
            return inside
        colours = self.network.image_channels
        equal = image if colours == self.image_channels else image.expand(-1, colours, -1, -1)
        y = self._ensemble(torch.cat([equal, (level * strength).clamp(max=HIGHEST_OF_MAPS)], 1))
        if colours != self.image_channels:
            y = y.mean(1, keepdim=True)
        return y if self.noise_level_input else torch.lerp(inside, y, strength)

    def _ensemble(self, x: Tensor) -> Tensor:
        if self.wishes.quality != "best":
            return self.network.forward_padded(x)
        total: Tensor | None = None
        for turns in range(4):
            for flip in (False, True):
                moved = torch.rot90(x, turns, (2, 3))
                y = self.network.forward_padded((moved.flip(3) if flip else moved).contiguous())
                back = torch.rot90(y.flip(3) if flip else y, -turns, (2, 3))
                total = back.clone() if total is None else total.add_(back)
        assert total is not None
        return total.div_(8)


def run_network(
    network: FusedDenoiser,
    batch: Tensor,
    level: float | Tensor | None,
    *,
    tile: int | Literal["auto"] | None = "auto",
    max_memory: int | None = None,
    wishes: Wishes = PLAIN,
    progress: Progress | None = None,
    values: ValueRange = ORDINARY,
) -> Tensor:
    """Denoise a batch in tiles.

    Args:
        network: any fused network; gray input to a colour network is repeated and averaged back.
        batch: (N, C, H, W) on the CPU, C 1 or 3, float in [0, 1], torch.uint8 or torch.uint16.
        level: on the scale 0-1: a number, (N,), (N, 1, H, W), or curves (N, 8) over the brightness from black to white
            of ``values``; None for a blind network.
        wishes: how it is applied.
        tile, max_memory, progress: as in :func:`fastden.denoise`.
        values: what the images' values span; ``level`` is divided with them.

    Returns:
        As ``batch``.
    """
    level, scale = own_scale(level, values, wishes)
    options: dict[str, Any] = {"tile": tile, "max_memory": max_memory, "progress": progress, "scale": scale}
    options["keep_gray"] = kept_gray(wishes)
    return denoise_tiled(adapted(network, batch.shape[1], wishes), batch, level, **options)


def kept_gray(wishes: Wishes) -> Gray:
    """What gray pixels of colour pictures become: their luma, where it comes from a result of its own."""
    return "mean" if wishes.chroma in (None, wishes.strength) else "luma"


def own_level(level: float | Tensor, values: ValueRange) -> float | Tensor:
    """A noise level on a picture's own scale, at most 1; of a map at most :data:`HIGHEST_OF_MAPS`."""
    if isinstance(level, Tensor) and level.dim() == 4:
        return (level / values.span).clamp(max=HIGHEST_OF_MAPS)
    is_curve = isinstance(level, Tensor) and level.dim() == 2  # perhaps another picture's, which may be above 1
    if values.ordinary and not is_curve:
        return level
    return (level / values.span).clamp(max=1) if isinstance(level, Tensor) else min(level / values.span, 1.0)


def own_scale(
    level: float | Tensor | None, values: ValueRange, wishes: Wishes
) -> tuple[float | Tensor | None, OwnScale | None]:
    """A noise level as the network takes it, and the scale on which it sees a picture; None for the picture as it is.

    Args:
        level: as in :func:`run_network`; None also for a map that is not in memory.
        values: of the picture.
        wishes: how the network is applied.
    """
    own = None if level is None else own_level(level, values)
    # A map's highest level is not used: strips know only their own.
    known = own if isinstance(own, float) else None
    if isinstance(own, Tensor) and own.dim() < 4 and own.numel():
        known = float(own.max())
    limits = values.limits(known)
    smaller = _smaller(known, wishes)
    if wishes.idle or (values.ordinary and limits is None and smaller == 1):
        return own, None
    # Where there is no noise, or brightness stays, a lone bright pixel is no hot one: a star keeps its light.
    lone = known == 0 or wishes.strength == 0
    if smaller == 1:
        return own, OwnScale(values.black, values.span, limits, lone)
    assert own is not None
    if isinstance(own, Tensor) and own.dim() == 2:
        own = _curves_of_smaller(own, smaller)
    if limits is not None:
        limits = limits[0] / smaller, limits[1] / smaller
    return own / smaller, OwnScale(values.black, values.span * smaller, limits, lone)


def _smaller(known: float | None, wishes: Wishes) -> float:
    """What a picture is divided by for its noise to be as strong as networks know it; 1 where it is weaker.

    Of white noise of sigma 150 ``color`` leaves 23.3 dB so, and 15.0 if it is told 150; from 120 on it puts out
    values far outside of the picture's, whatever the noise (crop of a photograph, 128 x 128, which has 4.6 dB).
    """
    most = 0.0 if known is None else known * max(wishes.strength, wishes.chroma or 0.0)
    # A level in single precision that is the highest may be rounded up.
    return most / STRONGEST if most > STRONGEST * (1 + 1e-6) else 1.0


def _curves_of_smaller(curves: Tensor, smaller: float) -> Tensor:
    """Curves (N, KNOTS) over the brightness of pictures that are divided by ``smaller``."""
    brightness = (torch.linspace(0, 1, KNOTS, device=curves.device, dtype=curves.dtype) * smaller).view(1, 1, 1, -1)
    return interpolated(curves, brightness.expand(len(curves), -1, -1, -1)).reshape(len(curves), KNOTS)


def adapted(network: FusedDenoiser, channels: int, wishes: Wishes) -> TiledNetwork:
    """``network`` for images of ``channels``, 1 or 3, applied as wished; see :func:`run_network`.

    Raises:
        ValueError: a colour image for a gray network; a strength above 1 for a blind one.
    """
    if channels == 3 and network.image_channels == 1:
        raise ValueError("image: 3 channels, but the model is for gray images; accepted: 1 channel, or a colour model")
    check_strengths(network, wishes)
    if channels == network.image_channels and wishes.plain:
        return network
    return Adapted(network, channels, wishes)


def check_strengths(network: FusedDenoiser, wishes: Wishes) -> None:
    """Raise ValueError for a strength above 1 and a blind network, whose result is blended with the image."""
    for name, strength in (("strength", wishes.strength), ("chroma", wishes.chroma or 0.0)):
        if strength > 1 and not network.noise_level_input:
            blind = "but this model is blind (it takes no noise level)"
            raise ValueError(f"{name}: {strength:g}, {blind}; accepted: 0 to 1")


class Level(NamedTuple):
    """The noise level as a network takes it (0-1; None if it is blind), and its mean on the scale 0-255."""

    value: float | Tensor | None
    sigma: float | None
    estimate: NoiseEstimate | None = None


def noise_level_of(
    sigma: Any,
    network: FusedDenoiser,
    images: list[Array],
    shape: tuple[int, int],
    values: Sequence[ValueRange] = (),
) -> Level:
    """What to give to the network for the ``sigma`` of :func:`fastden.denoise`.

    Args:
        sigma: ``"auto"``, a :class:`fastden.NoiseEstimate`, or on the scale 0-255 a number, (H, W), (N, 1, H, W), (N,),
            (N, 1) or (N, 1, 1, 1); arrays may be lists.
        network: it takes a noise level or is blind.
        images: N arrays (H, W, C), for the estimate.
        shape: (H, W).
        values: of the images; ordinary where none are given.

    Returns:
        The value is a number, or float32: curves (N, 8) where estimated, (N,), (N, 1, H, W) or (1, 1, H, W).

    Raises:
        ValueError: a level outside [0, 255] or of another shape; any level for a blind network.
        TypeError: another type of ``sigma``.
    """
    if isinstance(sigma, str) and sigma == "auto":
        if not network.noise_level_input:
            return Level(None, None)
        ranges = values or [ORDINARY] * len(images)
        pairs = zip(images, ranges, strict=True)
        return estimated_level([estimate_of(image, own, network.estimator) for image, own in pairs])
    if not network.noise_level_input:
        raise ValueError(f"sigma: {_shown(sigma)}, but this model is blind (it takes no noise level); accepted: 'auto'")
    if isinstance(sigma, NoiseEstimate):
        curves = [sigma.curve_on(own.black, own.white) for own in values or [ORDINARY]]
        return Level(torch.cat(curves).expand(max(len(images), 1), -1), sigma.sigma, sigma)
    if isinstance(sigma, Real) and not isinstance(sigma, bool):
        value = float(sigma)
        if not 0 <= value <= 255:  # refuses NaN too
            raise ValueError(f"sigma: {value:g}; accepted: 'auto', or 0 to 255 (the scale of 8-bit values)")
        return Level(value / 255, value)
    if isinstance(sigma, list | tuple):
        sigma = as_tensor(sigma)
    if isinstance(sigma, np.ndarray):
        check_plain(sigma, "sigma")
    elif isinstance(sigma, Tensor):
        check_dense(sigma, "sigma")
    if not isinstance(sigma, np.ndarray | Tensor):
        raise TypeError(f"sigma: {_shown(sigma)}; accepted: {_SIGMAS}")
    real = sigma.dtype.kind in "fiu" if isinstance(sigma, np.ndarray) else not sigma.is_complex()
    if not real or sigma.dtype == torch.bool:
        raise TypeError(f"sigma: an array of dtype {sigma.dtype}; accepted: {_SIGMAS}")
    host = sigma.detach().cpu() if isinstance(sigma, Tensor) else torch.from_numpy(np.array(sigma, np.float32))
    level = host.float()
    n = len(images)
    if level.dim() == 0:
        return noise_level_of(float(level), network, images, shape, values)
    if tuple(level.shape) == shape:
        level = level[None, None]
    elif level.dim() <= 4 and level.shape[0] in (1, n) and level.numel() == level.shape[0]:
        level = level.reshape(-1)
    elif tuple(level.shape) not in ((n, 1, *shape), (1, 1, *shape)):
        raise ValueError(f"sigma: shape {tuple(level.shape)}; accepted: a number, {shape}, ({n},) or {(n, 1, *shape)}")
    low, high = float(level.min()), float(level.max())
    if not 0 <= low <= high <= 255:
        raise ValueError(f"sigma: values from {low:g} to {high:g}; accepted: 0 to 255")
    # In double precision and without a copy, so that a map that is read by strips has the same mean.
    return Level(level / 255, float(level.numpy().mean(dtype=np.float64)))


def check_sigma(sigma: Any, *, estimates: bool = True) -> None:
    """Raise unless ``sigma`` is one level for pictures that are not there yet.

    Args:
        sigma: accepted are ``"auto"`` and numbers from 0 to 255.
        estimates: accept a :class:`fastden.NoiseEstimate` too.

    Raises:
        TypeError: another type.
        ValueError: another text, or a number outside of 0 to 255.
    """
    accepted = (
        "'auto', a number from 0 to 255, or a NoiseEstimate" if estimates else "'auto', or a number from 0 to 255"
    )
    if estimates and isinstance(sigma, NoiseEstimate):
        return
    # The type first: an array has no single answer to a comparison.
    if isinstance(sigma, bool) or not isinstance(sigma, str | Real):
        shown = repr(sigma) if sigma is None or isinstance(sigma, bool | list | tuple) else type(sigma).__name__
        raise TypeError(f"sigma: {shown}; accepted: {accepted}")
    wrong = sigma != "auto" if isinstance(sigma, str) else not 0 <= float(sigma) <= 255  # refuses NaN too
    if wrong:
        raise ValueError(f"sigma: {sigma!r}; accepted: {accepted}")


def estimated_level(estimates: list[NoiseEstimate]) -> Level:
    """The level of pictures that go together, from their estimates."""
    curves = torch.cat([estimate.curve_on(estimate.black, estimate.white) for estimate in estimates])
    sigma = sum(estimate.sigma for estimate in estimates) / len(estimates)
    return Level(curves, sigma, estimates[0] if len(estimates) == 1 else None)


def _shown(value: Any) -> str:
    return repr(value) if isinstance(value, str | Real) else type(value).__name__


def denoise_pixels(
    pixels: Array,
    sigma: Any,
    network: FusedDenoiser,
    *,
    values: ValueRange | None = None,
    of_range: bool = False,
    **options: Any,
) -> tuple[Array, float | None]:
    """Denoise (H, W, C), C 1 or 3, with a network that is loaded already.

    Args:
        pixels: uint8, uint16 or floating in [0, 1].
        sigma: as in :func:`denoise`.
        network: from :func:`load_network`.
        values: what they span; None finds it.
        of_range: white of a number or a map is white of ``values``, not of the dtype.
        **options: of :func:`run_network`.

    Returns:
        The denoised pixels, and the noise level on the scale 0-255 (of a map its mean; None for a blind network).
    """
    if values is None:
        values = range_of_image(pixels)
    level = noise_level_of(sigma, network, [pixels], (pixels.shape[0], pixels.shape[1]), [values])
    value = level.value
    if of_range and value is not None and level.estimate is None:
        value = value * values.span
    (result,) = denoise_batch([pixels], value, network, values=values, **options)
    return result, level.sigma


def range_of_image(pixels: Array, stated: int = 0) -> ValueRange:
    """:func:`fastden.images.ranges.find_range`, whose errors name the argument ``image``."""
    try:
        return find_range(pixels, stated)
    except ValueError as error:
        raise ValueError(f"image: {error}") from error


def denoise_batch(
    images: list[Array], level: float | Tensor | None, network: FusedDenoiser, **options: Any
) -> list[Array]:
    """Denoise images (H, W, C) of one shape and dtype together.

    Args:
        images: uint8, uint16 or floating in [0, 1].
        level: as in :func:`run_network`.
        network: from :func:`load_network`.
        **options: of :func:`run_network`.
    """
    result = from_batch(run_network(network, to_batch(images, network), level, **options), images[0].dtype)
    # A network of single precision rounds double ones.
    return [image.copy() for image in images] if options.get("wishes", PLAIN).idle else result


def to_batch(images: list[Array], network: FusedDenoiser) -> Tensor:
    """Images (H, W, C) of one shape and dtype -> (N, C, H, W) on the CPU, in a dtype that the network's tiles take."""
    dtype = images[0].dtype
    # from_numpy takes neither negative strides nor foreign byte orders, and warns about read-only memory.
    native = dtype.newbyteorder("=")
    if dtype.kind == "f":
        native = np.dtype(np.float64 if network.dtype == torch.float64 else np.float32)
    plain = images[0][None] if len(images) == 1 else np.stack(images)
    return torch.from_numpy(np.require(plain, native, ["C", "W"])).permute(0, 3, 1, 2)


def from_batch(batch: Tensor, dtype: np.dtype[Any]) -> list[Array]:
    """The inverse of :func:`to_batch`."""
    return [item.permute(1, 2, 0).contiguous().numpy().astype(dtype, copy=False) for item in batch]
