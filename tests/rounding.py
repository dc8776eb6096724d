"""How far apart the results of two right ways to add the same numbers may be."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def magnitudes(value: Any) -> Any:
    """``value`` with all floating tensors in it, of tuples too, as their absolute values in float64."""
    if isinstance(value, Tensor):
        return value.double().abs() if value.is_floating_point() else value
    if isinstance(value, tuple):
        return tuple(map(magnitudes, value))
    return value


def slack(
    function: Callable[..., Tensor], *arguments: Any, exact: Tensor, dtype: torch.dtype, **options: Any
) -> Tensor:
    """A unit in the last place of the largest result, and of the largest sum of magnitudes in float32.

    Against the latter the sums round, and of a small result of large terms that is many units: what eager PyTorch errs
    by there is chance.

    Args:
        function: the operator's reference.
        arguments, options: its inputs; of the options those that are tensors too.
        exact: its result in float64, not empty.
        dtype: of the results that are compared.
    """
    terms = function(*magnitudes(arguments), **{name: magnitudes(value) for name, value in options.items()})
    return torch.finfo(dtype).eps * exact.abs().max() + torch.finfo(torch.float32).eps * terms.abs().max()
