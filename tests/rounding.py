"""The largest difference that the order of sums explains, and the judge of kernels' results."""

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


#: From this number of values on, the maximum of eager PyTorch's errors is statistically stable.
MANY = 64


def slack(
    function: Callable[..., Tensor], *arguments: Any, exact: Tensor, dtype: torch.dtype, **options: Any
) -> Tensor:
    """A unit in the last place of the largest result; if few results are not 0, a unit of float32 sums in addition.

    Sums round by units of their terms, many of a small result of large terms. Of few such results eager PyTorch errs by
    chance: by 1.4e-8 on a single 0.094 of a few hundred terms, say, where another order of the terms errs by 4.3e-8.

    Args:
        function: the operator's reference.
        arguments, options: its inputs; of the options those that are tensors too.
        exact: its result in float64, not empty.
        dtype: of the results that are compared.
    """
    unit = torch.finfo(dtype).eps * exact.abs().max()
    if exact.count_nonzero() >= MANY:
        return unit
    terms = function(*magnitudes(arguments), **{name: magnitudes(value) for name, value in options.items()})
    return unit + torch.finfo(torch.float32).eps * terms.abs().max()


def assert_as_exact(found: Tensor, eager: Tensor, exact: Tensor, unit: Tensor | float, borders: bool = True) -> None:
    """The one judge of kernels: ``found`` errs at most twice as much as eager PyTorch, apart from rounding.

    Args:
        found: a kernel's result, (N, C, H, W).
        eager: PyTorch's own in the same dtype.
        exact: the result in float64.
        unit: what rounding explains, see :func:`slack`; 0 where the result is empty.
        borders: compare the first and last rows and columns apart, too. Their few values may err by chance.
    """
    assert found.dtype == eager.dtype
    assert found.shape == eager.shape
    if not found.numel():
        return
    error, allowed = (found.double() - exact).abs(), (eager.double() - exact).abs()
    whole = slice(None)
    sides = (0, -1, whole) if borders else (whole,)
    for rows in sides:
        for columns in sides:
            part = (whole, whole, rows, columns)
            # A NaN of the kernel fails too.
            assert error[part].max() <= 2 * allowed[part].max() + unit, (rows, columns)
