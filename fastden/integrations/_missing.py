"""The error of this folder's modules if their package is not installed."""

from __future__ import annotations


def missing_package(error: ModuleNotFoundError, package: str) -> ModuleNotFoundError:
    """The error to raise where importing ``package``, which has an extra of its name, failed."""
    if error.name is None or error.name.split(".")[0] != package:
        return error
    text = f"fastden.integrations needs the package {package}; install: pip install 'fastden[{package}]'"
    return ModuleNotFoundError(text, name=package)
