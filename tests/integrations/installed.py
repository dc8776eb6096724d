"""Imports the adapters' packages, or skips the tests."""

from __future__ import annotations

import importlib
import re
import sys
from typing import Any

import pytest
import torch

_library: Any = None


def torchvision() -> None:
    """Import torchvision, or skip.

    A torchvision that was built for another PyTorch (a CUDA build beside a CPU one) cannot load its compiled operators.
    Its transforms are Python and need none of them, but its import fails where their names do not exist: they are named
    here, and nothing calls them.
    """
    global _library  # noqa: PLW0603
    for _ in range(8):
        try:
            importlib.import_module("torchvision")
            return
        except ModuleNotFoundError:
            pytest.skip("torchvision is not installed", allow_module_level=True)
        except RuntimeError as error:
            missing = re.search(r"operator torchvision::(\w+) does not exist", str(error))
            if missing is None:
                raise
        for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
            del sys.modules[name]
        if _library is None:
            _library = torch.library.Library("torchvision", "FRAGMENT")
        _library.define(f"{missing[1]}(Tensor boxes, Tensor scores, float threshold) -> Tensor")
    raise RuntimeError("torchvision cannot be imported")


def package(name: str, *, needs_torchvision: bool = False) -> Any:
    """Import a package, or skip the module with the reason."""
    if needs_torchvision:
        torchvision()
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name.split(".", maxsplit=1)[0]:
            raise
        pytest.skip(f"{name} is not installed", allow_module_level=True)
