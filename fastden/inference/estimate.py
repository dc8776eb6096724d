"""How noisy a picture is: the estimate behind ``sigma="auto"`` and ``fastden noise``."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from functools import lru_cache
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastden.images.pixels import Array, check_pixels, without_mask
from fastden.images.ranges import ORDINARY, ValueRange, find_range
from fastden.images.samples import MAX_SIGMA, sample_windows
from fastden.images.strips import read_samples
from fastden.network.fused import FusedDenoiser
from fastden.network.hub import WEIGHTS
from fastden.network.level import (
    CELL,
    CERTAIN_UNTIL,
    KNOTS,
    WHITE_UNTIL,
    Cells,
    NoiseEstimator,
    levels_of,
    picture_coarseness,
    picture_uncertainty,
    robust_curve,
    weights_of,
    white_factor,
)
from fastden.network.loading import Model, load_network
from fastden.network.model import Denoiser
from fastden.network.own_estimator import OwnEstimator
from fastden.ops.modes import without_autocast

#: The model whose estimator judges for all models that have none of their own.
WITH_ESTIMATOR = WEIGHTS / "photo"
#: With fewer usable cells of 8 x 8 pixels (not flat, not clipped) a picture is not judged.
LEAST_CELLS = 4
#: A picture with a smaller sigma counts as clean: rounding to 8 bits and JPEG leave about this much.
CLEAN = 1.0
#: Noise counts as coarse where averaging 2 x 2 pixels leaves more than this share of it; white noise leaves 0.5.
COARSE = 0.65


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


@dataclass(frozen=True)
class NoiseEstimate:
    """The noise of one picture.

    ``fastden.denoise(picture, sigma=estimate)`` takes it, so that several pictures of one camera can share one.

    Attributes:
        sigmas: standard deviation of the noise on the scale 0-255 at eight values of brightness, evenly spaced from
            black to white; at most 75 of the range between them, the highest that the shipped models know.
        sigma: its mean over the picture.
        coarseness: share of the noise's deviation that averaging 2 x 2 pixels leaves: 0.5 for white noise, towards 1
            for coarse noise.
        decided: False where the picture gives nothing to judge by (flat, clipped or tiny); the sigmas are 0 then.
        uncertainty: standard deviation of the logarithm of a cell's level, as the estimator states it: 0.1 where noise
            is plain to see, 0.6 and more where it may be texture.
        black, white: the picture's own range, where white of its dtype is 1 (:mod:`fastden.images.ranges`). ``sigmas``
            and ``sigma`` are on the dtype's scale all the same, as ``denoise(sigma=)`` takes them.

    Raises:
        TypeError: a field has another type.
        ValueError: ``sigmas`` are not eight finite numbers of at least 0, another number is not finite, ``sigma``,
            ``coarseness`` or ``uncertainty`` is negative, or ``black`` is not below ``white``.
    """

    sigmas: tuple[float, ...]
    sigma: float
    coarseness: float
    decided: bool = True
    uncertainty: float = 0.0
    black: float = 0.0
    white: float = 1.0

    def __post_init__(self) -> None:
        sigmas: Any = self.sigmas
        if not isinstance(sigmas, tuple | list | np.ndarray) or not all(_is_number(sigma) for sigma in sigmas):
            raise TypeError(f"sigmas: {sigmas!r}; accepted: {KNOTS} finite numbers of at least 0")
        if len(sigmas) != KNOTS or not all(0 <= sigma < math.inf for sigma in sigmas):  # refuses NaN too
            raise ValueError(f"sigmas: {sigmas}; accepted: {KNOTS} finite numbers of at least 0")
        object.__setattr__(self, "sigmas", tuple(map(float, sigmas)))  # of a list or an array, so that it can be hashed
        for name in ("sigma", "coarseness", "uncertainty", "black", "white"):
            value, least = getattr(self, name), -math.inf if name in ("black", "white") else 0
            if not _is_number(value):
                raise TypeError(f"{name}: {value!r}; accepted: a finite number")
            if not (least <= value and math.isfinite(value)):
                raise ValueError(f"{name}: {value}; accepted: a finite number{' of at least 0' if least == 0 else ''}")
        if not self.black < self.white:
            raise ValueError(f"black, white: {self.black}, {self.white}; accepted: black below white")

    @property
    def factor(self) -> float:
        """By what a network's level exceeds the deviation: 1 for white noise, up to 2 for noise that neighbours share.

        It is twice the coarseness, less where it is uncertain whether it is noise or texture.
        """
        both = torch.tensor([self.coarseness, self.uncertainty], dtype=torch.float32, device="cpu")
        return float(white_factor(*both))

    @property
    def curve(self) -> Tensor:
        """What a network takes: levels on the scale 0-1 over brightness from 0 to 1, (1, 8).

        They are :attr:`factor` times the deviations, and at most 75 / 255.
        """
        return self.curve_on(0.0, 1.0)

    def curve_on(self, black: float, white: float) -> Tensor:
        """:attr:`curve` over brightness from ``black`` to ``white``; the levels stay on the dtype's scale."""
        highest = MAX_SIGMA / 255 * (self.white - self.black)
        return (self.factor * self.deviations_on(black, white)).clamp(max=highest)

    def deviations_on(self, black: float, white: float) -> Tensor:
        """Standard deviations of the noise over brightness from ``black`` to ``white``, (1, 8), on the scale 0-1."""
        sigmas: Any = self.sigmas
        if (black, white) != (self.black, self.white):
            shares = (np.linspace(black, white, KNOTS) - self.black) / (self.white - self.black)
            sigmas = [self.at(float(share)) for share in shares]
        return torch.tensor([sigmas], dtype=torch.float32, device="cpu") / 255

    def at(self, brightness: float) -> float:
        """Sigma, on the scale 0-255, at a brightness from 0 (:attr:`black`) to 1 (:attr:`white`)."""
        return float(np.interp(brightness * (KNOTS - 1), range(KNOTS), self.sigmas))

    @property
    def kind(self) -> str:
        """``"unknown"``, ``"clean"``, ``"coarse"`` or ``"fine"``."""
        if not self.decided:
            return "unknown"
        if self.sigma < CLEAN * (self.white - self.black):
            return "clean"
        return "coarse" if self.coarseness > COARSE else "fine"

    @property
    def is_white(self) -> bool:
        """Whether each pixel plainly has noise of its own: ``color``, which knows white noise best, then removes it."""
        return max(self.sigmas) > 0 and self.coarseness < WHITE_UNTIL and self.uncertainty < CERTAIN_UNTIL

    def as_record(self) -> dict[str, Any]:
        """Rounded, for JSON."""
        digits = 2 if self.white - self.black >= 1 else 6
        sigmas = [round(sigma, digits) for sigma in self.sigmas]
        others = {name: round(getattr(self, name), 3) for name in ("coarseness", "uncertainty")}
        return {"sigmas": sigmas, **others, "kind": self.kind, "is_white": self.is_white}

    def describe(self) -> str:
        """One line for a person."""
        if not self.decided:
            return "too little to judge by (flat, clipped or tiny): taken as clean"
        level = f"level {self._shown(self.sigma)}"
        if self.kind == "clean":
            return f"{level}, clean"
        tones = (("shadows", 0.15), ("mid-tones", 0.45), ("lights", 0.8))
        parts = ", ".join(f"{self._shown(self.at(brightness))} in the {name}" for name, brightness in tones)
        grain = "white noise" if self.is_white else f"{self.kind} grain"
        return f"{level} ({parts}), {grain}"

    def _shown(self, sigma: float) -> str:
        return f"{sigma:.1f}" if self.white - self.black >= 1 else f"{sigma:.2g}"


#: The estimate of a picture that cannot be judged.
UNDECIDED = NoiseEstimate((0.0,) * KNOTS, 0.0, 0.5, decided=False)


def estimate_noise(image: Any, model: Model | None = None) -> NoiseEstimate:
    """The noise of a picture, from the picture alone.

    A small network judges cells of 8 x 8 pixels. A curve of noise level over brightness is fitted through them. Cells
    that look like texture count little; cells that are flat or clipped do not count. Pictures of more than a megapixel
    are judged by crops, so the cost does not grow with the picture.

    Args:
        image: one picture, as :func:`fastden.denoise` takes it: the path of a file, a PIL image, a tensor (C, H, W), or
            an array (H, W), (H, W, 1), (H, W, 3) RGB or (H, W, 4) RGB and alpha, which is left out; uint8, uint16, or
            floating in [0, 1]. In a masked array the valid pixels are judged, as :func:`fastden.denoise` does.
        model: as in :func:`fastden.denoise`: an estimator that was trained with it, if it has one, judges the picture.
            Else the bundled one does.

    Raises:
        UserError: a file that cannot be read.
        TypeError: ``image`` has another type or dtype, or ``model`` another type.
        ValueError: another shape, or floating values that are not finite or on another scale; no such model.
    """
    estimator = estimator_of(model)
    if isinstance(image, str | Path):
        return noise_of_samples(*read_samples(image), estimator)
    image = _as_array(image)
    check_pixels(image)
    planes = image.reshape(*image.shape[:2], -1)[:, :, :3]
    try:
        return estimate_of(planes, find_range(planes), estimator)
    except ValueError as error:
        raise ValueError(f"image: {error}") from error


def _as_array(image: Any) -> Any:
    """The pixels of a PIL image or a tensor, (H, W) or (H, W, C); an array as it is, without its mask."""
    pil = sys.modules.get("PIL.Image")  # an image can exist only where its module is loaded
    if pil is not None and isinstance(image, pil.Image):
        modes = {"1": "L", "P": "RGB", "LA": "L", "PA": "RGB"}
        mode = modes.get(image.mode, image.mode)
        if mode not in ("L", "RGB", "RGBA", "F") and not mode.startswith("I;16"):
            raise TypeError(f"image: PIL mode {image.mode}; accepted: 1, L, LA, P, RGB, RGBA, I;16, F")
        return np.array(image if mode == image.mode else image.convert(mode))
    if isinstance(image, Tensor):
        check_dense(image)
        if image.dim() != 3 or image.shape[0] not in (1, 3):
            raise ValueError(f"image: shape {tuple(image.shape)}; accepted: (C, H, W) with C 1 or 3")
        image = image.detach().cpu().resolve_neg()
        return (image.float() if image.dtype == torch.bfloat16 else image).permute(1, 2, 0).numpy()
    if not isinstance(image, np.ndarray):
        accepted = "a path, a PIL image, a NumPy array or a tensor"
        raise TypeError(f"image: {type(image).__name__}; accepted: {accepted}")
    return without_mask(image) if isinstance(image, np.ma.MaskedArray) else image


def check_dense(tensor: Tensor, name: str = "image") -> None:
    """Raise TypeError unless a tensor has its values in memory, one for each place."""
    if type(tensor).__name__ == "MaskedTensor":
        raise TypeError(f"{name}: a masked tensor; accepted: a plain tensor, or a NumPy masked array")
    if torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        inside = "a tensor inside torch.vmap or a transform of torch.func, where it has no values to read"
        raise TypeError(f"{name}: {inside}; accepted: a plain tensor (a network, model(x, sigma), can be transformed)")
    if tensor.is_nested or tensor.is_meta or tensor.layout != torch.strided:
        kind = "nested" if tensor.is_nested else "meta, without values" if tensor.is_meta else str(tensor.layout)
        raise TypeError(f"{name}: a tensor of another kind ({kind}); accepted: a dense tensor")


def estimator_of(model: Model | None) -> OwnEstimator | None:
    """The estimator that a model carries with it; None stands for the bundled one."""
    if model is None:
        return None
    if isinstance(model, Denoiser | FusedDenoiser):
        return model.estimator
    return load_network(model, "cpu", "float32").estimator  # networks loaded by name are kept


def estimate_of(planes: Array, values: ValueRange, estimator: OwnEstimator | None = None) -> NoiseEstimate:
    """The noise of a picture (H, W, C) without alpha, whose range of values is known; see :func:`noise_of_samples`."""
    windows = sample_windows(planes.shape[0], planes.shape[1])
    return noise_of_samples([planes[rows, columns] for rows, columns in windows], values, estimator)


def estimate_sigma(image: Any) -> float:
    """The mean of :func:`estimate_noise`, on the scale 0-255.

    To denoise, pass what :func:`estimate_noise` returns: of a camera's noise a number tells too little.
    ``denoise(sigma=)`` takes a number for the level of white noise, whose model ``color`` removes less of coarse noise.

    Args:
        image: as of :func:`estimate_noise`.

    Returns:
        The level; 0 where the picture cannot be judged.

    Raises:
        UserError, TypeError, ValueError: as :func:`estimate_noise`.
    """
    return estimate_noise(image).sigma


def median_estimate(estimates: list[NoiseEstimate]) -> NoiseEstimate:
    """One estimate for pictures of one camera: the medians of those that could be judged."""
    decided = [estimate for estimate in estimates if estimate.decided]
    if not decided:
        return UNDECIDED
    sigmas = np.median([estimate.sigmas for estimate in decided], 0)
    sigma, coarseness, uncertainty = (
        float(np.median([getattr(one, name) for one in decided])) for name in ("sigma", "coarseness", "uncertainty")
    )
    return NoiseEstimate(tuple(sigmas.tolist()), sigma, coarseness, uncertainty=uncertainty)


@torch.no_grad()
def noise_of_samples(
    crops: list[Array], values: ValueRange = ORDINARY, estimator: OwnEstimator | None = None
) -> NoiseEstimate:
    """The estimate from a picture's crops (H, W, C), which :func:`fastden.images.samples.sample_windows` chose.

    Args:
        crops: of any dtype that can be denoised.
        values: what the whole picture spans.
        estimator: a model's own; None is the bundled one.
    """
    network = load_estimator() if estimator is None else estimator.network
    with without_autocast(torch.device("cpu")):
        return _estimated(crops, values, network)


def _estimated(crops: list[Array], values: ValueRange, estimator: NoiseEstimator) -> NoiseEstimate:
    if min(min(crop.shape[:2]) for crop in crops) < CELL:
        return UNDECIDED
    judged: list[Cells] = []
    for crop in crops:
        x = torch.from_numpy(values.own_scale(crop)).permute(2, 0, 1)[None]
        judged.append(estimator(x.expand(-1, 3, -1, -1)))
    cells = Cells(*(torch.cat([field.flatten(1) for field in fields], 1) for fields in zip(*judged, strict=True)))
    weights = weights_of(cells)
    if int(cells.usable.sum()) < LEAST_CELLS:
        return UNDECIDED
    levels = levels_of(robust_curve(cells))[0].clamp(max=MAX_SIGMA / 255)
    brightness = cells.brightness[cells.usable].numpy()
    sigma = float(np.interp(brightness * (KNOTS - 1), range(KNOTS), levels.numpy()).mean())
    span = values.span
    return NoiseEstimate(
        tuple(min(255 * level, MAX_SIGMA) * span for level in levels.tolist()),
        255 * sigma * span,
        float(picture_coarseness(cells, weights)),
        uncertainty=float(picture_uncertainty(cells, weights)),
        black=values.black,
        white=values.white,
    )


@lru_cache(maxsize=1)
def load_estimator() -> NoiseEstimator:
    """The bundled network that judges noise, with its weights; it is kept."""
    own = OwnEstimator.load(WITH_ESTIMATOR)
    assert own is not None
    return own.network
