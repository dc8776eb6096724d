"""Fast, exact image denoising with PyTorch: one network, its composed form, trained weights, one command.

    >>> import fastden
    >>> clean = fastden.denoise("noisy.jpg")  # a NumPy array

Names are imported on first use: ``import fastden`` alone loads no PyTorch and starts no CUDA.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastden import joint, nn, ops
    from fastden.api import denoise
    from fastden.batch.denoiser import BatchDenoiser
    from fastden.batch.report import Interrupted, Listener, Report
    from fastden.errors import ScaleWarning, UserError
    from fastden.exports.exporter import export
    from fastden.inference.arrays import denoise_array
    from fastden.inference.estimate import NoiseEstimate, estimate_noise, estimate_sigma
    from fastden.network.calibration import calibrate
    from fastden.network.fused import FusedDenoiser, fuse
    from fastden.network.hub import models
    from fastden.network.model import Denoiser

    __version__: str

__all__ = [
    "BatchDenoiser",
    "Denoiser",
    "FusedDenoiser",
    "Interrupted",
    "Listener",
    "NoiseEstimate",
    "Report",
    "ScaleWarning",
    "UserError",
    "__version__",
    "calibrate",
    "denoise",
    "denoise_array",
    "estimate_noise",
    "estimate_sigma",
    "export",
    "fuse",
    "joint",
    "models",
    "nn",
    "ops",
]

_MODULES = {
    "BatchDenoiser": "fastden.batch.denoiser",
    "Denoiser": "fastden.network.model",
    "FusedDenoiser": "fastden.network.fused",
    "Interrupted": "fastden.batch.report",
    "Listener": "fastden.batch.report",
    "NoiseEstimate": "fastden.inference.estimate",
    "Report": "fastden.batch.report",
    "ScaleWarning": "fastden.errors",
    "UserError": "fastden.errors",
    "calibrate": "fastden.network.calibration",
    "denoise": "fastden.api",
    "denoise_array": "fastden.inference.arrays",
    "estimate_noise": "fastden.inference.estimate",
    "estimate_sigma": "fastden.inference.estimate",
    "export": "fastden.exports.exporter",
    "fuse": "fastden.network.fused",
    "models": "fastden.network.hub",
}


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("fastden")
    except PackageNotFoundError:
        return "0+source"


if not TYPE_CHECKING:  # a type checker would take every name for one of this module

    def __getattr__(name: str) -> Any:
        if name == "__version__":
            value: Any = _version()
        elif name in ("inference", "joint", "nn", "ops"):
            value = import_module(f"fastden.{name}")
        elif name in _MODULES:
            value = getattr(import_module(_MODULES[name]), name)
        else:
            raise AttributeError(f"module 'fastden' has no attribute {name!r}")
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
