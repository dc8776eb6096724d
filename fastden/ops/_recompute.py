"""Inputs that the backward pass makes again instead of storing them.

``relu(batch_norm(raw))`` is made from ``raw`` in one pass over memory, and the gradient of the normalisation keeps
``raw`` anyway. So the operator that takes this result as its input saves its recipe, the tensors that it is made from,
in its place. From the normalisation to that operator the recipe travels beside the result, in a table by identity: a
tensor that was written to since, copied, or stored and loaded has none, and is saved itself. So it is, too, where
saved tensors go through hooks (activation checkpointing, ``save_on_cpu``): they decide themselves what is stored, and
need as many tensors each time, whatever became of the result in between.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary


class Recipe(NamedTuple):
    """How ``relu(batch_norm(raw))`` is made again; (C,) each but ``raw``, (N, C, H, W)."""

    raw: Tensor
    mean: Tensor
    rstd: Tensor
    bn_weight: Tensor
    bn_bias: Tensor

    def make(self) -> Tensor:
        """The result again: (N, C, H, W), channels-last."""
        return torch.ops.fastden.affine(*self, None, True)


#: Tensors that :func:`save` returns.
SAVED = 1 + len(Recipe._fields)

# A result's version, and its recipe.
_recipes = WeakTensorKeyDictionary()


def remember(y: Tensor, recipe: Recipe) -> None:
    """Let an operator that takes ``y``, this very tensor, save the recipe instead of ``y``."""
    if not (torch.compiler.is_compiling() or y.is_inference()):  # an inference tensor counts no versions
        _recipes[y] = (y._version, recipe)


def forget(y: Tensor) -> None:
    """Drop the recipe of a result that no gradient is asked of: it would keep ``raw`` alive for nothing.

    Inside ``forward`` gradients are always off, and parameters always want them: only behind it is that known.
    """
    if not torch.compiler.is_compiling() and not y.requires_grad:
        _recipes.pop(y, None)


def has_recipe(y: Tensor) -> bool:
    """Whether ``y`` can be made again."""
    return y in _recipes


def save(x: Tensor) -> tuple[Tensor | None, ...]:
    """Tensors to save for an operator's input: itself, or its recipe; always :data:`SAVED` tensors or None."""
    version, recipe = (None, None) if torch.compiler.is_compiling() else _recipes.get(x, (None, None))
    if recipe is None or version != x._version or _hooked():
        return (x, *(None,) * len(Recipe._fields))
    return (None, *recipe)


def restore(saved: Sequence[Tensor | None]) -> Tensor:
    """The input that :func:`save` was given."""
    x, *recipe = saved
    return Recipe(*recipe).make() if x is None else x  # type: ignore[arg-type]


def _hooked() -> bool:
    """Whether saved tensors go through hooks here."""
    return torch._C._autograd._top_saved_tensors_default_hooks(True) is not None
