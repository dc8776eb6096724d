"""Marks on functions for torch.compile, made without loading it.

``torch.compiler``'s own decorators import Dynamo, which takes about as long to import as PyTorch itself.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

F = TypeVar("F", bound=Callable[..., Any])


def constant_result(function: F) -> F:
    """Mark a function whose result is a constant of traced code: ``torch.compiler.assume_constant_result``.

    That decorator sets this attribute and nothing else; a test compares them.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function
