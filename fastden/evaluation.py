"""Quality on folders of photographs: PSNR and SSIM with synthetic noise, or on real noisy shots with a reference.

The protocol: Gaussian noise that is not clipped, drawn by ``numpy.random.default_rng(seed + index)`` in float32 for the
image of that index in the sorted folder (the same draw, scaled, at every sigma); the noisy image goes to the network as
it is; the result is clipped and rounded to 8 bits; PSNR is of all channels together, and the mean over the images
counts. SSIM is scikit-image's with its defaults (7x7 windows, channels averaged).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from skimage.metrics import structural_similarity

from fastden.errors import UserError
from fastden.images.codec import read_image
from fastden.images.finder import find_images
from fastden.images.image_file import Header
from fastden.images.pixels import to_dtype
from fastden.images.ranges import ORDINARY
from fastden.images.strips import read_header
from fastden.inference.estimate import estimate_of
from fastden.inference.run import PLAIN, adapted, denoise_pixels
from fastden.inference.tiling import LUMA
from fastden.network.fused import FusedDenoiser

Bytes = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]
#: Called with the name of each image before its work starts.
Started = Callable[[str], None]
#: A measure of (clean, other), both (H, W, 3) uint8, beside PSNR and SSIM.
Measure = Callable[[Bytes, Bytes], float]


def check_levels(network: FusedDenoiser, sigmas: Sequence[float] | None = None, *, estimate: bool = False) -> None:
    """Raise ValueError where a blind network would be given noise levels, or their estimate: it would ignore them."""
    if network.noise_level_input:
        return
    blind = "but this model is blind (it takes no noise level)"
    if estimate:
        raise ValueError(f"estimate: given, {blind}; accepted: a model that takes one")
    if sigmas is not None:
        raise ValueError(f"sigma: {', '.join(f'{sigma:g}' for sigma in sigmas)}, {blind}; accepted: none")


def check_photographs(folder: Path, network: FusedDenoiser, *, gray: bool = False) -> list[Path]:
    """The photographs of a folder, sorted. Headers are read and no pixels, so that a mistake shows at once.

    Args:
        folder, network, gray: as for :func:`evaluate_folder`.

    Raises:
        UserError: no such folder, no image in it, an image that cannot be read or is not of 8 bits.
        ValueError: a colour image for a gray network.
    """
    files = find_pictures(folder)
    for file in files:
        channels = _eight_bit(file).channels
        adapted(network, 1 if gray else channels, PLAIN)
    return files


def check_pairs(folder: Path, network: FusedDenoiser) -> list[tuple[Path, Path]]:
    """The noisy shots ``*_real.*`` of a folder, each with its reference; as :func:`check_photographs`.

    Args:
        folder, network: as for :func:`evaluate_pairs`.

    Raises:
        UserError: no such folder, no pair in it, a shot without reference, a pair of two sizes, an image that cannot be
            read or is not of 8 bits.
        ValueError: a colour image for a gray network.
    """
    pairs = find_pairs(folder)
    for pair in pairs:
        headers = [_eight_bit(file) for file in pair]
        noisy, clean = map(_upright_shape, headers)
        if clean != noisy:
            raise UserError(f"pairs: {pair[0]} is {noisy}, its reference {clean}; accepted: the same size")
        adapted(network, headers[0].channels, PLAIN)
    return pairs


def set_names(folders: Sequence[Path]) -> list[str]:
    """A name for each set: that of its folder, and of folders above it where several would have the same.

    Raises:
        UserError: a folder that is given twice.
    """
    parts = [folder.resolve().parts for folder in folders]
    names = []
    for folder, own in zip(folders, parts, strict=True):
        if parts.count(own) > 1:
            raise UserError(f"folder: {folder} is given more than once; accepted: each folder once")
        count = 1
        while sum(other[-count:] == own[-count:] for other in parts) > 1:
            count += 1
        names.append(Path(*own[-count:]).as_posix())
    return names


def evaluate_folder(
    folder: Path,
    network: FusedDenoiser,
    sigmas: list[float],
    *,
    gray: bool = False,
    estimate: bool = False,
    white: FusedDenoiser | None = None,
    seed: int = 0,
    measures: Mapping[str, Measure] | None = None,
    started: Started | None = None,
) -> list[dict[str, Any]]:
    """Denoise every photograph of a folder at every noise level.

    Args:
        folder: 8-bit photographs.
        network: a fused network.
        sigmas: noise levels on the scale 0-255.
        gray: make the photographs gray first (luma, rounded); noise and PSNR are of one channel.
        estimate: the network gets the sigma that is estimated from the noisy image, not the one that was added.
        white: with ``estimate``, the network for images whose noise the estimate finds white; None is ``network``.
        seed: of the noise.
        measures: further measures by name, such as :func:`dists`.
        started: progress.

    Returns:
        For each sigma ``{"sigma", "psnr_noisy", "psnr", "ssim_noisy", "ssim", "images": {name: the same four}}``, and
        for each further measure its name and ``name_noisy``.

    Raises:
        UserError: see :func:`check_photographs`, before anything is computed; or pixels that cannot be read.
        ValueError: ``estimate`` with a blind network, or colour images for a gray one.
    """
    check_levels(network, estimate=estimate)
    files = check_photographs(folder, network, gray=gray)
    scores: list[dict[str, dict[str, float]]] = [{} for _ in sigmas]
    for index, file in enumerate(files):
        if started is not None:
            started(file.name)
        clean = read_image(file).pixels
        if gray and clean.shape[2] == 3:
            clean = np.rint(clean.astype(np.float32) @ np.array(LUMA, np.float32)).astype(np.uint8)[:, :, None]
        noise = np.random.default_rng(seed + index).standard_normal(clean.shape, dtype=np.float32)
        for sigma, by_name in zip(sigmas, scores, strict=True):
            noisy = to_dtype(clean, np.float32) + np.float32(sigma / 255) * noise
            asked: float | str = sigma if network.noise_level_input and not estimate else "auto"
            denoised, used = denoise_pixels(noisy, *_chosen(noisy, asked, network, white), values=ORDINARY)
            by_name[file.name] = _scores(clean, noisy, denoised, measures)
            if estimate and used is not None:
                by_name[file.name]["sigma"] = round(used, 3)
    return [
        {"sigma": sigma, **_means(by_name), "images": by_name} for sigma, by_name in zip(sigmas, scores, strict=True)
    ]


def evaluate_pairs(
    folder: Path,
    network: FusedDenoiser,
    sigmas: list[float] | None = None,
    *,
    white: FusedDenoiser | None = None,
    measures: Mapping[str, Measure] | None = None,
    started: Started | None = None,
) -> list[dict[str, Any]]:
    """Denoise the noisy shots ``*_real.*`` of a folder and compare with their references ``*_mean.*``.

    Args:
        folder: pairs of files whose names differ in ``_real`` and ``_mean`` alone.
        network: a fused network.
        sigmas: noise levels to try, scale 0-255; None estimates each image's own.
        white: as for :func:`evaluate_folder`.
        measures: as for :func:`evaluate_folder`.
        started: progress.

    Returns:
        As :func:`evaluate_folder`; where estimated, ``sigma`` is ``"auto"``, and each image's own estimate stands with
        its scores.

    Raises:
        UserError: see :func:`check_pairs`, before anything is computed; or pixels that cannot be read.
        ValueError: ``sigmas`` for a blind network, or colour images for a gray one.
    """
    check_levels(network, sigmas)
    pairs = check_pairs(folder, network)
    asked: list[Any] = ["auto"] if sigmas is None else list(sigmas)
    scores: list[dict[str, dict[str, float]]] = [{} for _ in asked]
    for file, reference in pairs:
        if started is not None:
            started(file.name)
        clean, noisy = read_image(reference).upright().pixels, read_image(file)
        # 8 bits span 0 to 255, however dark; of floating values the range would be looked for.
        floats = to_dtype(noisy.pixels, np.float32)
        for sigma, by_name in zip(asked, scores, strict=True):
            denoised, used = denoise_pixels(floats, *_chosen(floats, sigma, network, white), values=ORDINARY)
            # Denoised as stored, as fastden denoise does it; compared as shown.
            shown = [replace(noisy, pixels=pixels).upright().pixels for pixels in (floats, denoised)]
            by_name[file.name] = _scores(clean, shown[0], shown[1], measures)
            if used is not None:
                by_name[file.name]["sigma"] = round(used, 3)
    return [
        {"sigma": sigma, **_means(by_name), "images": by_name} for sigma, by_name in zip(asked, scores, strict=True)
    ]


def _chosen(
    image: Floats, sigma: Any, network: FusedDenoiser, white: FusedDenoiser | None
) -> tuple[Any, FusedDenoiser]:
    """The noise level for an image, estimated if two networks are to choose from, and the network for it."""
    if white is None or sigma != "auto":
        return sigma, network
    estimate = estimate_of(image, ORDINARY)
    return estimate, white if estimate.is_white else network


def find_pictures(folder: Path) -> list[Path]:
    """The image files of a folder, sorted.

    Raises:
        UserError: no such folder, or no image in it.
    """
    if not folder.is_dir():
        raise UserError(f"folder: {folder} is not a folder; accepted: folders of photographs")
    files = find_images(folder)
    if not files:
        raise UserError(f"folder: no images in {folder}")
    return files


def find_pairs(folder: Path) -> list[tuple[Path, Path]]:
    """The noisy shots ``*_real.*`` of a folder, sorted, each with its reference ``*_mean.*``. No file is read.

    Raises:
        UserError: no such folder, no pair in it, a shot without reference.
    """
    noisy_files = [file for file in find_pictures(folder) if file.stem.endswith("_real")]
    if not noisy_files:
        raise UserError(f"pairs: no file *_real.* in {folder}; accepted: pairs name_real.* and name_mean.*")
    return [(file, _reference(file)) for file in noisy_files]


def _reference(noisy: Path) -> Path:
    stem = noisy.stem.removesuffix("_real") + "_mean"
    references = [path for path in find_images(noisy.parent) if path.stem == stem]
    if not references:
        raise UserError(f"pairs: {noisy} has no reference {stem}.*")
    # A preview beside the reference, such as a JPEG beside PNGs, would lower every score.
    alike = [path for path in references if path.suffix == noisy.suffix] or references
    if len(alike) > 1:
        names = ", ".join(path.name for path in alike)
        raise UserError(f"pairs: {noisy} has references {names}; accepted: one, or one of suffix {noisy.suffix}")
    return alike[0]


def _eight_bit(file: Path) -> Header:
    header = read_header(file)
    if header.dtype != np.uint8:
        raise UserError(f"{file}: {header.bits} bits; accepted for an evaluation: 8 bits")
    return header


def _upright_shape(header: Header) -> tuple[int, int, int]:
    """(H, W, C) of an image as it is shown."""
    turned = int(header.metadata.get("orientation", 1)) >= 5
    height, width = (header.width, header.height) if turned else (header.height, header.width)
    return height, width, header.channels


def _scores(clean: Bytes, noisy: Floats, denoised: Floats, measures: Mapping[str, Measure] | None) -> dict[str, float]:
    """Scores of a result. The noisy image's PSNR is of the network's input, not clipped; the others are of 8 bits."""
    before, after = to_dtype(noisy, np.uint8), to_dtype(denoised, np.uint8)
    scores = {
        "psnr_noisy": psnr(clean, noisy * 255),
        "psnr": psnr(clean, after),
        "ssim_noisy": ssim(clean, before),
        "ssim": ssim(clean, after),
    }
    for name, measure in (measures or {}).items():
        scores |= {f"{name}_noisy": measure(clean, before), name: measure(clean, after)}
    return scores


def psnr(clean: Bytes, other: npt.NDArray[Any]) -> float:
    """Peak signal-to-noise ratio in dB, both on the scale 0-255, all channels together; infinite if equal."""
    error = np.square(clean.astype(np.float64) - other.astype(np.float64)).mean()
    return float(10 * np.log10(255**2 / error)) if error > 0 else float("inf")


def ssim(clean: Bytes, other: Bytes) -> float:
    """Structural similarity of (H, W, C) uint8 images; NaN for images smaller than its 7x7 window."""
    if min(clean.shape[:2]) < 7:
        return float("nan")
    return float(structural_similarity(clean, other, channel_axis=2, data_range=255))


def dists() -> Measure:
    """DISTS, a distance of structure and texture: 0 for equal pictures. It agrees with people better than SSIM does.

    Ding et al., "Image Quality Assessment: Unifying Structure and Texture Similarity" (2020). The package piq computes
    it; its first use downloads the weights of a VGG-16 network.

    Raises:
        UserError: piq is not installed, or the weights cannot be had.
    """
    try:
        from piq import DISTS
    except ModuleNotFoundError as error:
        text = f"dists: the package {error.name} is missing; install: pip install 'fastden[perceptual]'"
        raise UserError(text) from error
    try:
        distance = DISTS()
    except OSError as error:
        raise UserError(f"dists: its weights cannot be had ({error}); accepted: a network that reaches them") from error

    @torch.no_grad()
    def measure(clean: Bytes, other: Bytes) -> float:
        both = [torch.from_numpy(image).permute(2, 0, 1)[None].float().div(255) for image in (clean, other)]
        return float(distance(*(image.expand(-1, 3, -1, -1) for image in both)))

    return measure


def _means(by_name: dict[str, dict[str, float]]) -> dict[str, float]:
    names = [name for name in next(iter(by_name.values())) if name != "sigma"]
    return {name: round(fmean(scores[name] for scores in by_name.values()), 4) for name in names}


def results_document(
    model: str, network: FusedDenoiser, settings: dict[str, Any], sets: dict[str, Any], *, complete: bool = True
) -> dict[str, Any]:
    """What ``fastden eval --json`` writes: results with all that is needed to repeat them.

    Args:
        model: as it was named.
        network: the fused network.
        settings: further arguments (seed, gray, pairs).
        sets: results by the sets' names, see :func:`set_names`.
        complete: whether these are all sets that were asked for.
    """
    packages = ("fastden", "torch", "numpy", "scikit-image", "pyvips")
    document = {
        "command": "fastden eval",
        "model": model,
        "noise_level_input": network.noise_level_input,
        "dtype": str(network.dtype).removeprefix("torch."),
        "device": network.device.type,
        "protocol": " ".join((__doc__ or "").split("\n\n")[1].split()),
        "settings": settings,
        "versions": {name: _installed(name) for name in packages},
        "torch_build": torch.__version__,
        "complete": complete,
        "sets": sets,
    }
    return _plain(document)


def _plain(value: Any) -> Any:
    """JSON has no infinity (PSNR of equal images) and no NaN (SSIM of tiny ones): null."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _installed(name: str) -> str:
    if name == "fastden":
        import fastden

        return fastden.__version__
    return metadata.version(name)
