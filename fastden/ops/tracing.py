"""Marks functions for torch.compile without importing it.

``torch.compiler``'s own decorators import Dynamo, which takes about as long to import as PyTorch itself.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch.autograd import forward_ad

F = TypeVar("F", bound=Callable[..., Any])


def constant_result(function: F) -> F:
    """Mark a function whose result is a constant in traced code, like ``torch.compiler.assume_constant_result``.

    That decorator only sets this attribute; a test compares the two.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


@constant_result
def exporting() -> bool:
    """Whether ``torch.export`` traces this code; False under ``torch.compile``.

    There PyTorch 2.11 takes ``torch.compiler.is_exporting()`` for the constant True; PyTorch 2.13 does not.
    """
    return torch.compiler.is_exporting()


@constant_result
def transform_active() -> bool:
    """Whether a transform of ``torch.func``, ``torch.vmap`` or forward-mode differentiation is active."""
    return bool(torch._C._are_functorch_transforms_active()) or forward_ad._current_level >= 0


@constant_result
def has_autocast(kind: str) -> bool:
    """Whether devices of a kind, such as ``cuda``, have autocast; ``meta`` has none.

    PyTorch 2.11 cannot trace its own function: each operator would end the compiled graph.
    """
    return torch.amp.is_autocast_available(kind)


def autocast_enabled(kind: str) -> bool:
    """Whether autocast is on for devices of a kind; PyTorch's function raises where they have none."""
    return has_autocast(kind) and torch.is_autocast_enabled(kind)
