"""Load a network from a user's settings: a model's name, a device, a dtype."""

from __future__ import annotations

from functools import lru_cache
from numbers import Real
from pathlib import Path
from typing import Literal

import torch

from fastden.network.devices import parse_device
from fastden.network.fused import DTYPES, FusedDenoiser, fuse
from fastden.network.hub import WEIGHTS_FILE, files_of, model_folder, models
from fastden.network.int8 import RANGES_FILE
from fastden.network.model import Denoiser
from fastden.network.onednn import native_bf16
from fastden.network.own_estimator import ESTIMATOR_FILE

Model = str | Path | Denoiser | FusedDenoiser


def default_model(sigma: object) -> str:
    """The bundled model for ``sigma``, if the user names none.

    ``color`` knows white noise best: it is taken where the level is given, for one number describes white noise, and
    where an estimate says that the noise is white. ``photo`` knows all kinds of noise.

    Args:
        sigma: as in :func:`fastden.denoise`; ``"auto"`` stands for an estimate that is not made yet.
    """
    white = isinstance(sigma, Real | list | tuple) or hasattr(sigma, "shape") or getattr(sigma, "is_white", False)
    return "color" if white else "photo"


def load_network(
    model: Model,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype = "auto",
    *,
    eight_bit: bool = False,
    fast: bool = False,
) -> FusedDenoiser:
    """The fused network for :func:`denoise`'s arguments; networks loaded by name are cached.

    Args:
        model, device, dtype: as in :func:`denoise`.
        eight_bit: the image has 8 bits, so ``dtype="auto"`` may reduce the precision.
        fast: compute in 8-bit numbers (:func:`fastden.fuse`). On a CPU ``dtype`` is then for the head, and for calls
            that cannot run in integers. On a GPU ``"auto"`` is then bfloat16.

    Raises:
        ValueError: the model, device or dtype does not exist; or ``device``, ``dtype`` or ``fast`` is given with a
            FusedDenoiser, which has its own settings (``fast`` is accepted where its quality is ``"fast"``).
        TypeError: ``model`` has another type.
    """
    quality: Literal["normal", "fast"] = "fast" if fast else "normal"
    if isinstance(model, FusedDenoiser):
        if fast and model.quality != "fast":
            raise ValueError("quality: 'fast', with a FusedDenoiser of quality 'normal'; fuse(model, quality='fast')")
        if device is not None or dtype != "auto":
            raise ValueError("device, dtype: given with a FusedDenoiser, which has its own; accepted: None and 'auto'")
        return model
    if isinstance(model, Denoiser):
        target = model.device if device is None else parse_device(device)
        return fuse(model, choose_dtype(dtype, target, _may_reduce(target, eight_bit, fast)), target, quality=quality)
    if not isinstance(model, str | Path):
        raise TypeError(f"model: {type(model).__name__}; accepted: a name, folder, Hub id, Denoiser or FusedDenoiser")
    target = parse_device(device)
    if target.type == "cuda" and target.index is None:
        # What is kept for one call must not decide where another one's current device is.
        target = torch.device("cuda", torch.cuda.current_device())
    folder = model_folder(model)
    # The files' times are part of the cache key: a folder that was written again has another model.
    files = [folder / name for name in (WEIGHTS_FILE, ESTIMATOR_FILE, RANGES_FILE)]
    changed = tuple(file.stat().st_mtime_ns if file.is_file() else 0 for file in files)
    chosen = choose_dtype(dtype, target, _may_reduce(target, eight_bit, fast))
    # The path of a folder and its text are one model, unless the text names a bundled one.
    name = str(model) if folder.is_dir() and str(model) not in models() else model
    return _load_cached(name, target, chosen, quality, changed)


def _may_reduce(device: torch.device, eight_bit: bool, fast: bool) -> bool:
    """Whether ``dtype="auto"`` may be bfloat16: 8-bit integers leave it to the head, and fp8 needs it around conv3."""
    return device.type == "cuda" if fast else eight_bit


@lru_cache(maxsize=32)  # two models, chosen by the noise, in two dtypes, on each of eight GPUs
def _load_cached(
    name: str | Path,
    device: torch.device,
    dtype: torch.dtype,
    quality: Literal["normal", "fast"],
    changed: tuple[int, ...],
) -> FusedDenoiser:
    exact = load_exact(files_of(name), torch.float64 if dtype == torch.float64 else torch.float32)
    return fuse(exact, dtype, device, quality=quality)


def load_exact(folder: Path, dtype: torch.dtype) -> Denoiser:
    """The network in a folder, on the CPU, in evaluation mode, with the weights of its file in ``dtype``.

    PyTorch's default dtype does not count here: one that is narrower just now would round the weights.

    Raises:
        ValueError: a weight is NaN or infinite, or as of :meth:`fastden.Denoiser.from_pretrained`.
    """
    model = Denoiser._from_folder(folder, "cpu", True, {}, dtype)
    own = {} if model.estimator is None else model.estimator.weights
    for file, weights in ((WEIGHTS_FILE, model.state_dict()), (ESTIMATOR_FILE, own)):
        for key, values in weights.items():
            if not values.isfinite().all():  # 5 ms for all weights
                raise ValueError(f"model: {folder / file}: NaN or infinity in {key}; accepted: finite weights")
    return model


def choose_dtype(dtype: str | torch.dtype, device: torch.device, eight_bit: bool) -> torch.dtype:
    """The torch dtype to compute in.

    Args:
        dtype: ``"auto"``, a name or a torch dtype of :data:`DTYPES`.
        device: device of the computation.
        eight_bit: the image has 8 bits, so ``"auto"`` may take bfloat16.

    Raises:
        ValueError: the dtype is not one of these.
    """
    if isinstance(dtype, torch.dtype) and dtype in DTYPES.values():
        return dtype
    if dtype == "auto":
        fast = native_bf16() if device.type == "cpu" else device.type == "cuda" and torch.cuda.is_bf16_supported(False)
        return torch.bfloat16 if fast and eight_bit else torch.float32
    if isinstance(dtype, str) and dtype in DTYPES:
        return DTYPES[dtype]
    raise ValueError(f"dtype: {dtype!r}; accepted: auto, {', '.join(DTYPES)}")
