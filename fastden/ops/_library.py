"""Registers the dispatcher's operators: ``torch.ops.fastden`` on Triton's kernels, and ``torch.ops.fastden_cuda``.

An operator takes only tensors and numbers. It knows the shape of its result without running, so that ``torch.compile``
and ``torch.export`` can trace it. It has no gradient of its own: an autograd function in the same file gives that. Its
schema comes from the function that runs it on Triton. The CUDA operators have the same schemas. They are registered
when :mod:`fastden.cuda.extension` loads the library (``csrc/bindings.cpp``).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastden.cuda import extension

LIBRARY = torch.library.Library("fastden", "DEF")
#: The operators of each backend that has kernels.
OPERATORS = {"triton": torch.ops.fastden, "cuda": torch.ops.fastden_cuda}
#: The devices of Triton's implementations; on the CPU, Triton interprets them.
KEYS = ("CUDA", "CPU")

_shapes: dict[str, Callable[..., Any]] = {}


class Operator:
    """An operator of ``torch.ops.fastden``.

    Args:
        function: runs the operator on Triton; its type hints give the operator's schema.
        name: name of the operator; None for that of the function.
    """

    def __init__(self, function: Callable[..., Any], name: str | None = None) -> None:
        self.name = function.__name__ if name is None else name
        self.signature = inspect.signature(function)
        LIBRARY.define(torch.library.infer_schema(function, op_name=self.name, mutates_args=()))
        for key in KEYS:
            LIBRARY.impl(self.name, function, key)

    def shape(self, function: Callable[..., Any]) -> None:
        """Register ``function``, which makes an empty result; with ``torch._check`` it refuses shapes that do not fit.

        It names the arguments that it uses, and takes the others as ``**_``.
        """

        def empty(*args: Any, **kwargs: Any) -> Any:
            bound = self.signature.bind(*args, **kwargs)
            bound.apply_defaults()
            return function(**bound.arguments)

        _keep_shape(self.name, empty)
        torch.library.register_fake(f"fastden::{self.name}", empty)


def names() -> tuple[str, ...]:
    """The dispatcher's operators, of any backend, that the modules loaded so far have registered."""
    return tuple(_shapes)


def shape_of_cuda(name: str) -> Callable[[Callable[..., Any]], None]:
    """Register the decorated function as the shape of an operator that only ``torch.ops.fastden_cuda`` has.

    Its arguments are the operator's.
    """

    def register(function: Callable[..., Any]) -> None:
        _keep_shape(name, function)

    return register


def _keep_shape(name: str, function: Callable[..., Any]) -> None:
    _shapes[name] = function
    if extension.loaded():  # before the operators' modules were imported
        _register_cuda_shape(name)


def _register_cuda_shape(name: str) -> None:
    if hasattr(torch.ops.fastden_cuda, name):
        torch.library.register_fake(f"fastden_cuda::{name}", _shapes[name])


def _register_cuda_shapes() -> None:
    for name in _shapes:
        _register_cuda_shape(name)


extension.after_loading(_register_cuda_shapes)


def empty_like(x: Tensor, shape: tuple[Any, ...], dtype: torch.dtype | None = None) -> Tensor:
    """An empty channels-last result of ``shape`` (4-D) on the device of ``x``, in its dtype or another."""
    return x.new_empty(shape, dtype=dtype or x.dtype).to(memory_format=torch.channels_last)


def check(fits: bool, name: str, tensor: Tensor, accepted: str) -> None:
    """Refuse a tensor whose shape does not fit; for shape functions, where sizes may be symbols."""
    torch._check(fits, lambda: f"{name}: shape {tuple(tensor.shape)}; accepted: {accepted}")


def check_not_empty(**weights: Tensor) -> None:
    """Refuse weights with an empty dimension, as the CUDA operators do; for shape functions."""
    for name, weight in weights.items():
        check(all(size != 0 for size in weight.shape), name, weight, "no empty dimension")
