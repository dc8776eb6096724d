"""Marks functions for torch.compile without importing it.

``torch.compiler``'s own decorators import Dynamo, which takes about as long to import as PyTorch itself.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

F = TypeVar("F", bound=Callable[..., Any])


def constant_result(function: F) -> F:
    """Mark a function whose result is a constant in traced code, like ``torch.compiler.assume_constant_result``.

    That decorator only sets this attribute; a test compares the two.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function
