"""``fastden.denoise``: one function for paths, PIL images, NumPy arrays and tensors."""

from __future__ import annotations

import sys
from collections.abc import Callable
from numbers import Real
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from fastden.fused import FusedDenoiser
from fastden.inference.tiling import denoise_tiled
from fastden.io import MAX_PIXELS, read_image
from fastden.loading import Model, check_max_pixels, check_strength, load_network, parse_memory
from fastden.model import BORDER
from fastden.noise import estimate_sigma
from fastden.values import Array, check_floats, check_pixels

Progress = Callable[[int, int], None]


def denoise(
    image: Any,
    sigma: Any = "auto",
    *,
    model: Model = "color",
    device: str | torch.device | None = None,
    dtype: str | torch.dtype = "auto",
    tile: int | Literal["auto"] | None = "auto",
    max_memory: int | str | None = None,
    strength: float = 1.0,
    progress: Progress | None = None,
    max_pixels: int = MAX_PIXELS,
) -> Any:
    """Denoise an image and return the same kind of thing.

    Args:
        image: one of

            - a path (str or Path) of an image file: the result is a NumPy array of the file's depth (uint8, uint16 or
              float32), (H, W) if gray, else (H, W, 3), with alpha as one more channel. The EXIF orientation is applied,
              because an array cannot carry it;
            - a PIL image of mode 1, L, LA, P, RGB, RGBA, I;16 or F (values in [0, 1]): a PIL image of the same mode (a
              palette becomes RGB or RGBA, mode 1 becomes L) with the same ``info``. A transparent colour, which
              denoised pixels would no longer meet, becomes an alpha channel (LA, RGBA); with I;16, which has none, it
              is dropped;
            - a NumPy array (H, W), (H, W, 1), (H, W, 3) RGB or (H, W, 4) RGB and alpha; uint8, uint16, or floating in
              [0, 1]: an array of the same shape and dtype;
            - a tensor (C, H, W) or (N, C, H, W), C 1 or 3; torch.uint8, torch.uint16, or floating in [0, 1]: a tensor
              of the same shape, dtype and device, without gradient.

            Gray is denoised as a colour image with equal channels, and averaged back. Alpha is not touched. Integer
            results are rounded and clipped, floating ones are not clipped.
        sigma: the noise's standard deviation **on the scale 0-255, whatever the image's dtype** (the habit of the
            field; ``model(x, sigma)`` by contrast takes the scale of ``x``). ``"auto"`` estimates it from each image
            (:func:`fastden.estimate_sigma`, at most 75). Else a number, a map (H, W), or for a batch of tensors also
            (N,) or (N, 1, H, W). The shipped models know 0 to 75. A blind model takes only ``"auto"``, and ignores it.
        model: a bundled name (:func:`fastden.models`), a folder, a Hugging Face Hub id, or a network. Networks loaded
            by name are kept for the next call; a :class:`fastden.Denoiser` is fused anew by each: for several images
            call :func:`fastden.fuse` once and pass what it returns.
        device: where to compute, ``"cpu"``, ``"cuda"``, ...; None is CUDA where there is a device, else the CPU (of a
            network: where it is).
        dtype: of the computation, ``"float32"``, ``"bfloat16"``, ``"float16"``, ``"float64"`` or a torch dtype.
            ``"auto"`` takes bfloat16 for 8-bit images on machines with native bfloat16 matrix units, else float32.
        tile: ``"auto"`` (tiles that fit ``max_memory``), a side in pixels, or None for the whole image at once. The
            result is the same, up to rounding.
        max_memory: with ``tile="auto"``, what the network's tensors may take: bytes or such as ``"2GiB"``; None is
            1 GiB.
        strength: 0 returns the image, 1 the denoised one, between them a blend.
        progress: called with (pixels done, pixels in all) as tiles are finished.
        max_pixels: an image file of more pixels is refused before it is decoded; other kinds of images are not.

    Raises:
        UserError: a file that cannot be read (see :func:`fastden.io.read_image`).
        ValueError, TypeError: naming the argument, what it was and what is accepted.
    """
    options = _Options(model, device, dtype, tile, max_memory, strength, progress, max_pixels)
    if isinstance(image, str | Path):
        return _denoise_path(image, sigma, options)
    if isinstance(image, Tensor):
        return _denoise_tensor(image, sigma, options)
    if isinstance(image, np.ndarray):
        return _denoise_array(image, sigma, options)
    # An instance can exist only where the module is loaded: no need to import it otherwise.
    pil = sys.modules.get("PIL.Image")
    if pil is not None and isinstance(image, pil.Image):
        return _denoise_pil(image, sigma, options)
    raise TypeError(f"image: {type(image).__name__}; accepted: a path, a PIL image, a NumPy array or a torch tensor")


class _Options:
    """The keyword arguments of :func:`denoise`, checked."""

    def __init__(
        self,
        model: Model,
        device: str | torch.device | None,
        dtype: str | torch.dtype,
        tile: int | Literal["auto"] | None,
        max_memory: int | str | None,
        strength: float,
        progress: Progress | None,
        max_pixels: int,
    ) -> None:
        check_strength(strength)
        check_max_pixels(max_pixels)
        self.model, self.device, self.dtype = model, device, dtype
        self.tile, self.max_memory = tile, parse_memory(max_memory)
        self.strength, self.progress, self.max_pixels = float(strength), progress, max_pixels

    def network(self, eight_bit: bool) -> FusedDenoiser:
        return load_network(self.model, self.device, self.dtype, eight_bit=eight_bit)

    def run(self, network: FusedDenoiser, batch: Tensor, level: float | Tensor | None) -> Tensor:
        return run_network(
            network,
            batch,
            level,
            tile=self.tile,
            max_memory=self.max_memory,
            strength=self.strength,
            progress=self.progress,
        )


class _Adapted(FusedDenoiser):
    """A fused network for gray images, or of partial strength: tile by tile, before anything is rounded or clipped.

    Args:
        network: whose weights serve.
        channels: of the images, 1 or the network's.
        strength: 0 to 1.
    """

    def __init__(self, network: FusedDenoiser, channels: int, strength: float) -> None:
        # Not the parent's constructor, which would fuse another network.
        nn.Module.__init__(self)
        self.network = network
        self.noise_level_input = network.noise_level_input
        self.image_channels = channels
        self.strength = strength

    @property
    def dtype(self) -> torch.dtype:
        return self.network.dtype

    @property
    def device(self) -> torch.device:
        return self.network.device

    def forward_padded(self, x: Tensor) -> Tensor:
        image, level = x[:, : self.image_channels], x[:, self.image_channels :]
        colours = self.network.image_channels
        equal = image if colours == self.image_channels else image.expand(-1, colours, -1, -1)
        y = self.network.forward_padded(torch.cat([equal, level], 1))
        if colours != self.image_channels:
            y = y.mean(1, keepdim=True)
        return torch.lerp(image[:, :, BORDER:-BORDER, BORDER:-BORDER], y, self.strength)


def run_network(
    network: FusedDenoiser,
    batch: Tensor,
    level: float | Tensor | None,
    *,
    tile: int | Literal["auto"] | None = "auto",
    max_memory: int | None = None,
    strength: float = 1.0,
    progress: Progress | None = None,
) -> Tensor:
    """Denoise a batch in tiles.

    Args:
        network: any fused network; gray input to a colour network is repeated and averaged back.
        batch: (N, C, H, W) on the CPU, C 1 or 3, float in [0, 1], torch.uint8 or torch.uint16.
        level: on the scale 0-1: a number, (N,) or (N, 1, H, W); None for a blind network.
        tile, max_memory, strength, progress: as in :func:`denoise`.

    Returns:
        As ``batch``.
    """
    network = adapted(network, batch.shape[1], strength)
    return denoise_tiled(network, batch, level, tile=tile, max_memory=max_memory, progress=progress)


def adapted(network: FusedDenoiser, channels: int, strength: float) -> FusedDenoiser:
    """``network`` for images of ``channels``, 1 or 3, and of a strength; see :func:`run_network`."""
    if channels == 3 and network.image_channels == 1:
        raise ValueError("image: 3 channels, but the model is for gray images; accepted: 1 channel, or a colour model")
    if channels == network.image_channels and strength == 1:
        return network
    return _Adapted(network, channels, strength)


def noise_level_of(
    sigma: Any, network: FusedDenoiser, images: list[Array], shape: tuple[int, int]
) -> float | Tensor | None:
    """What to give to the network for the ``sigma`` of :func:`denoise`.

    Args:
        sigma: ``"auto"``, or on the scale 0-255 a number, (H, W), (N,) or (N, 1, H, W).
        network: whether it takes a level at all.
        images: N arrays (H, W, C), for the estimate.
        shape: (H, W).

    Returns:
        On the scale 0-1: a number, or float32 (N,) or (N, 1, H, W) or (1, 1, H, W); None for a blind network.
    """
    if isinstance(sigma, str) and sigma == "auto":
        if not network.noise_level_input:
            return None
        found = [estimate_sigma(image) for image in images]
        return found[0] / 255 if len(found) == 1 else torch.tensor(found) / 255
    if not network.noise_level_input:
        raise ValueError(f"sigma: {_shown(sigma)}, but this model is blind (it takes no noise level); accepted: 'auto'")
    if isinstance(sigma, Real):
        value = float(sigma)
        if not 0 <= value <= 255:  # refuses NaN too
            raise ValueError(f"sigma: {value:g}; accepted: 'auto', or 0 to 255 (the scale of 8-bit values)")
        return value / 255
    if not isinstance(sigma, np.ndarray | Tensor):
        raise TypeError(f"sigma: {_shown(sigma)}; accepted: 'auto', a number from 0 to 255, or a map (H, W)")
    host = sigma.detach().cpu() if isinstance(sigma, Tensor) else torch.from_numpy(np.array(sigma, np.float32))
    level = host.float()
    n = len(images)
    if level.dim() == 0:
        return noise_level_of(float(level), network, images, shape)
    if tuple(level.shape) == shape:
        level = level[None, None]
    elif tuple(level.shape) not in ((n,), (n, 1, *shape), (1, 1, *shape)):
        raise ValueError(f"sigma: shape {tuple(level.shape)}; accepted: a number, {shape}, ({n},) or {(n, 1, *shape)}")
    low, high = float(level.min()), float(level.max())
    if not 0 <= low <= high <= 255:
        raise ValueError(f"sigma: values from {low:g} to {high:g}; accepted: 0 to 255")
    return level / 255


def _shown(value: Any) -> str:
    return repr(value) if isinstance(value, str | Real) else type(value).__name__


def denoise_pixels(pixels: Array, sigma: Any, network: FusedDenoiser, **options: Any) -> tuple[Array, float | None]:
    """Denoise (H, W, C), C 1 or 3, with a network that is loaded already.

    Args:
        pixels: uint8, uint16 or floating in [0, 1].
        sigma: as in :func:`denoise`.
        network: from :func:`load_network`.
        **options: of :func:`run_network`.

    Returns:
        The denoised pixels, and the noise level on the scale 0-255 (of a map its mean; None for a blind network).
    """
    if pixels.dtype.kind == "f":
        check_floats(pixels, ValueError, "image")
    level = noise_level_of(sigma, network, [pixels], (pixels.shape[0], pixels.shape[1]))
    (result,) = denoise_batch([pixels], level, network, **options)
    return result, shown_level(level)


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
    return from_batch(run_network(network, to_batch(images, network), level, **options), images[0].dtype)


def shown_level(level: float | Tensor | None) -> float | None:
    """A noise level on the scale 0-255, of a map its mean; None for a blind network."""
    return None if level is None else 255 * (float(level.mean()) if isinstance(level, Tensor) else level)


def to_batch(images: list[Array], network: FusedDenoiser) -> Tensor:
    """Images (H, W, C) of one shape and dtype -> (N, C, H, W) on the CPU, in a dtype that the network's tiles take."""
    dtype = images[0].dtype
    # from_numpy takes neither negative strides nor foreign byte orders, and warns about read-only memory.
    work = dtype.newbyteorder("=")
    if dtype.kind == "f":
        work = np.dtype(np.float64 if network.dtype == torch.float64 else np.float32)
    plain = images[0][None] if len(images) == 1 else np.stack(images)
    return torch.from_numpy(np.require(plain, work, ["C", "W"])).permute(0, 3, 1, 2)


def from_batch(batch: Tensor, dtype: np.dtype[Any]) -> list[Array]:
    """The inverse of :func:`to_batch`."""
    return [item.permute(1, 2, 0).contiguous().numpy().astype(dtype, copy=False) for item in batch]


def _denoise_array(array: Array, sigma: Any, options: _Options) -> Array:
    check_pixels(array)
    planes = array.reshape(array.shape[0], array.shape[1], -1)
    alpha = planes[:, :, 3:]
    network = options.network(eight_bit=array.dtype == np.uint8)
    pixels, _ = denoise_pixels(
        planes[:, :, :3],
        sigma,
        network,
        tile=options.tile,
        max_memory=options.max_memory,
        strength=options.strength,
        progress=options.progress,
    )
    if alpha.shape[2]:
        pixels = np.concatenate([pixels, alpha], 2)
    return pixels.reshape(array.shape)


def _denoise_path(path: str | Path, sigma: Any, options: _Options) -> Array:
    image = read_image(path, max_pixels=options.max_pixels).upright()
    gray = image.pixels.shape[2] == 1
    pixels = _denoise_array(image.pixels[:, :, 0] if gray else image.pixels, sigma, options)
    if image.alpha is None:
        return pixels
    return np.dstack([pixels, image.alpha])


def _denoise_pil(image: Any, sigma: Any, options: _Options) -> Any:
    from PIL import Image

    mode = {"1": "L", "P": "RGB", "PA": "RGBA"}.get(image.mode, image.mode)
    if "transparency" in image.info:
        mode = {"L": "LA", "RGB": "RGBA"}.get(mode, mode)
    if mode not in ("L", "LA", "RGB", "RGBA", "F") and not mode.startswith("I;16"):
        raise TypeError(f"image: PIL mode {image.mode}; accepted: 1, L, LA, P, RGB, RGBA, I;16, F (or convert('RGB'))")
    array = np.array(image if mode == image.mode else image.convert(mode))
    if mode == "LA":
        array = np.dstack([_denoise_array(array[:, :, 0], sigma, options), array[:, :, 1]])
    else:
        array = _denoise_array(array, sigma, options)
    result = Image.fromarray(array)
    result.info = {key: value for key, value in image.info.items() if key != "transparency"}
    return result


def _denoise_tensor(tensor: Tensor, sigma: Any, options: _Options) -> Tensor:
    if not tensor.is_floating_point() and tensor.dtype not in (torch.uint8, torch.uint16):
        raise TypeError(f"image: dtype {tensor.dtype}; accepted: torch.uint8, torch.uint16, or floating in [0, 1]")
    if tensor.dim() not in (3, 4) or tensor.shape[-3] not in (1, 3):
        raise ValueError(f"image: shape {tuple(tensor.shape)}; accepted: (C, H, W) or (N, C, H, W) with C 1 or 3")
    if 0 in tensor.shape:
        raise ValueError(f"image: shape {tuple(tensor.shape)}; accepted: no empty dimension")
    batch = tensor.detach().cpu().reshape(-1, *tensor.shape[-3:])
    network = options.network(eight_bit=tensor.dtype == torch.uint8)
    if batch.is_floating_point():
        batch = batch.to(torch.float64 if network.dtype == torch.float64 else torch.float32)
        check_floats(batch.numpy(), ValueError, "image")
    images = [item.permute(1, 2, 0).numpy() for item in batch]
    level = noise_level_of(sigma, network, images, (int(tensor.shape[-2]), int(tensor.shape[-1])))
    result = options.run(network, batch, level)
    return result.reshape(tensor.shape).to(tensor)
