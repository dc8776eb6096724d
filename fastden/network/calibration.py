"""Prepare a network for 8-bit integers: measure the ranges of its activations, and round its weights."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from fastden.network import int8, onednn
from fastden.network.fused import FusedDenoiser
from fastden.network.inputs import check_input
from fastden.network.model import Denoiser
from fastden.network.padding import pad_image
from fastden.network.weight_rounding import second_order_rounding
from fastden.ops.modes import without_autocast

#: Noise levels on the 0-255 scale. The pictures get them in turn.
SIGMAS = (5.0, 15.0, 25.0, 50.0, 75.0)
#: The same for a model of photographs, whose noise is weaker. But the strongest must be among them: with 40 as the
#: highest, activations clip and white noise of level 60 loses 1.0 dB, with 75 it loses 0.02
#: (``benchmarks/results/int8-parts.json``).
PHOTO_SIGMAS = (2.0, 5.0, 15.0, 40.0, 75.0)
#: Values of clean pictures may lie this far beyond [0, 1], as those of sharpened ones do. Those of 0-255 do not.
BOUNDS = (-1.0, 2.0)
#: Shares of the activations' ranges that are tried. Codes that hold less of a range are finer, and clip more.
SHARES = (1.0, 0.85, 0.7, 0.6, 0.5)


class _Example(NamedTuple):
    """A padded input (1, C, H, W), and the clean picture (1, K, h, w)."""

    x: Tensor
    clean: Tensor


@torch.inference_mode(mode=False)
@torch.no_grad()
def calibrate(model: Denoiser, images: Iterable[Tensor]) -> None:
    """Prepare a network for ``fuse(model, quality="fast")``: measure its activations' ranges, and round its weights.

    ``save_pretrained`` writes both beside the weights. They belong to these weights: calibrate again after training. 32
    pictures of 256 pixels take a minute or less of two CPU cores.

    Args:
        model: a network of any device and dtype. The calibration runs on the CPU in float32. On a CPU that cannot run
            8-bit integers (``fastden info`` tells) weights are rounded to the nearest codes, which costs more.
        images: clean pictures (N, C, H, W), floating, in [0, 1]; 30 varied pictures of 256 pixels a side are enough.
            Each picture gets noise of level 5, 15, 25, 50 or 75 (0-255 scale) with a fixed seed. White noise and noise
            that 2x2 pixels share take turns. For a model of photographs, one with an estimator of its own, the levels
            are 2, 5, 15, 40 and 75, and noisy pictures are clipped and rounded to 8 bits, as files hold them. All are
            held in memory, 40 bytes a pixel, and each runs some twenty times.

    Raises:
        TypeError: ``model`` is no :class:`fastden.Denoiser`, ``images`` is a single batch or not iterable, or an image
            is not a floating tensor.
        ValueError: there are no images, or an image has another shape, or values on another scale or not finite.
        RuntimeError: this PyTorch has no oneDNN.
    """
    if not isinstance(model, Denoiser):
        from_fused = "the network that it was made from" if isinstance(model, FusedDenoiser) else "fastden.Denoiser"
        raise TypeError(f"model: {type(model).__name__}; accepted: {from_fused}")
    one_batch = isinstance(images, Tensor) and images.dim() < 5  # with five dimensions it is several
    if one_batch or not (hasattr(images, "__iter__") or hasattr(images, "__getitem__")):  # as map-style data sets have
        accepted = "a list, or another iterable, of batches (N, C, H, W)"
        raise TypeError(f"images: {type(images).__name__}; accepted: {accepted}, such as [batch]")
    if not torch.backends.mkldnn.is_available():
        raise RuntimeError("calibrate: this PyTorch has no oneDNN; accepted: one that has it, as those for x86-64 do")
    with without_autocast(torch.device("cpu")):
        model.int8_ranges = _found(model, images), int8.fingerprint(model)


def _found(model: Denoiser, images: Iterable[Tensor]) -> int8.Ranges:
    """What :func:`calibrate` finds for a model."""
    fused = FusedDenoiser(model)
    weights = {name: buffer.detach().float().cpu() for name, buffer in fused.named_buffers()}
    folded = onednn.FoldedWeights.of(weights)
    examples = list(_examples(model, images))
    if not examples:
        raise ValueError("images: none; accepted: at least one batch (N, C, H, W)")
    ranges = int8.observed_ranges(folded, (example.x for example in examples))
    if model.estimator is not None:
        ranges["image"] = torch.tensor(int8.CLIPPED_RANGE, **int8.FLOAT)
    if folded.finite() and not int8.why_not():
        ranges["share"] = torch.tensor([_best_share(folded, ranges, examples)], **int8.FLOAT)
        ranges |= second_order_rounding(int8.Int8Network(folded, ranges), [example.x for example in examples])
    return ranges


def _best_share(weights: onednn.FoldedWeights, ranges: int8.Ranges, examples: list[_Example]) -> float:
    """The share of the ranges with which the pictures lose the least PSNR in the mean, in dB.

    An error counts by what it adds to the error that the network makes anyway. So it counts most where noise is weak.
    """
    exact = onednn.OneDnnNetwork(weights)
    wanted = [exact(example.x) for example in examples]
    errors = [_mean_square(y, example.clean) for y, example in zip(wanted, examples, strict=True)]
    lost = {}
    for share in SHARES:
        network = int8.Int8Network(weights, {**ranges, "share": torch.tensor([share], **int8.FLOAT)})
        added = [
            _mean_square(network(example.x), y[..., : example.clean.shape[2], : example.clean.shape[3]])
            for example, y in zip(examples, wanted, strict=True)
        ]
        lost[share] = float((1 + torch.stack(added) / torch.stack(errors).clamp(min=1e-12)).log10().mean())
    return min(lost, key=lost.__getitem__)


def _mean_square(y: Tensor, wanted: Tensor) -> Tensor:
    """Of the difference, without the padding of ``y``."""
    return (y[..., : wanted.shape[2], : wanted.shape[3]] - wanted).square().mean()


def _examples(model: Denoiser, images: Iterable[Tensor]) -> Iterator[_Example]:
    """Each picture with noise, its level as a channel where the network takes one, and padding."""
    generator = torch.Generator().manual_seed(0)
    photographs = model.estimator is not None
    sigmas = PHOTO_SIGMAS if photographs else SIGMAS
    for index, image in enumerate(images):
        try:
            check_input(image, model.image_channels)
        except (TypeError, ValueError) as error:
            raise type(error)(f"images: number {index}, {str(error).removeprefix('x: ')}") from error
        if not image.numel():
            raise ValueError(f"images: number {index}, shape {tuple(image.shape)}; accepted: at least one picture")
        low, high = map(float, image.detach().aminmax())
        if not BOUNDS[0] <= low <= high <= BOUNDS[1]:
            raise ValueError(f"images: values from {low:g} to {high:g}; accepted: finite ones in [0, 1]")
        clean = image.detach().float().cpu()
        coarse = bool(index % 2)
        level = sigmas[index // 2 % len(sigmas)] / 255
        noise = torch.randn(clean.shape, generator=generator, device="cpu")
        if coarse:
            noise = F.interpolate(noise, scale_factor=2.0)[:, :, : clean.shape[2], : clean.shape[3]]
        noisy = clean + level * noise
        if photographs:
            noisy = (noisy.clamp(0, 1) * 255).round() / 255
            # A model of photographs is told a higher level of coarse noise.
            level = min(2 * level, max(SIGMAS) / 255) if coarse else level
        if model.noise_level_input:
            noisy = torch.cat([noisy, torch.full_like(noisy[:, :1], level)], 1)
        for x, target in zip(pad_image(noisy).split(1), clean.split(1), strict=True):
            yield _Example(x, target)
