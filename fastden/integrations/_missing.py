"""The errors of this folder's modules if their package is not installed, or cannot be imported."""

from __future__ import annotations


def import_failure(error: ImportError | RuntimeError, package: str) -> Exception:
    """The error to raise where importing ``package``, which has an extra of its name, failed."""
    if isinstance(error, ModuleNotFoundError) and error.name is not None and error.name.split(".")[0] == package:
        text = f"fastden.integrations needs the package {package}; install: pip install 'fastden[{package}]'"
        return ModuleNotFoundError(text, name=package)
    # "operator torchvision::nms does not exist", or other versions of CUDA.
    if isinstance(error, RuntimeError) and "torchvision" in str(error):
        why = "torchvision was built for another PyTorch; install the one of your PyTorch's index"
        return ImportError(f"fastden.integrations cannot import {package}: {why} ({error})", name="torchvision")
    return error
