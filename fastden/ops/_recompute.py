"""Inputs that the backward pass makes again instead of storing them.

``relu(batch_norm(raw))`` is made from ``raw`` in one pass over memory, and the gradient of the normalisation stores
``raw`` anyway. So an operator that takes this result as its input does not save the result. It saves its recipe: the
tensors from which the result is made. A table keeps the recipe of each result, by the identity of the tensor. A tensor
that was changed in place, copied, or stored and loaded has no valid recipe, so the operator saves the tensor itself.
The operator also saves the tensor itself if saved tensors go through hooks (activation checkpointing,
``save_on_cpu``). Such hooks decide what is stored, and need the same number of tensors every time.

A change in place is known by PyTorch's version counter. Writes that it does not count leave the recipe valid, and the
gradient is then that of the unchanged result: ``y.data.clamp_()``, ``y.detach().numpy()[...] = 0``, and kernels of
others that write through the pointer. No cheap check finds them. Autograd does not find them either, but a tensor that
it saved holds what was written.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary


class Recipe(NamedTuple):
    """How ``relu(batch_norm(raw))`` is made again. ``raw`` is (N, C, H, W); the others are (C,)."""

    raw: Tensor
    mean: Tensor
    rstd: Tensor
    bn_weight: Tensor
    bn_bias: Tensor

    def make(self) -> Tensor:
        """Make the result again: (N, C, H, W), channels-last."""
        return torch.ops.fastden.batch_norm_affine(*self, None, True)


#: Number of tensors that :func:`save` returns: the input, what leads to it, and its recipe.
SAVED = 2 + len(Recipe._fields)

# The version of each result when it was made, and its recipe.
_recipes = WeakTensorKeyDictionary()


def remember(y: Tensor, recipe: Recipe) -> None:
    """Let an operator that takes exactly this tensor ``y`` save the recipe instead of ``y``."""
    if not (torch.compiler.is_compiling() or y.is_inference()):  # an inference tensor has no version counter
        _recipes[y] = (y._version, recipe)


def forget(y: Tensor) -> None:
    """Drop the recipe of a result that needs no gradient: the recipe would keep ``raw`` in memory for nothing.

    Call this after ``forward``. Inside ``forward`` gradients are always off, so it is not yet known if ``y`` needs one.
    """
    if not torch.compiler.is_compiling() and not y.requires_grad:
        _recipes.pop(y, None)


def save(x: Tensor) -> tuple[Tensor | None, ...]:
    """Tensors to save for an operator's input: the input or its recipe. Always :data:`SAVED` entries, some None."""
    version, recipe = (None, None) if torch.compiler.is_compiling() else _recipes.get(x, (None, None))
    if recipe is None or version != x._version or _hooked():
        return (x, None, *(None,) * len(Recipe._fields))
    with torch.enable_grad():
        # No tensor of the recipe leads autograd to what x was made from. An empty one does, and keeps no memory.
        path = x[:0].clone()
    return (None, path, *recipe)


def restore(saved: Sequence[Tensor | None]) -> Tensor:
    """The input that was passed to :func:`save`."""
    x, _path, *recipe = saved
    return Recipe(*recipe).make() if x is None else x  # type: ignore[arg-type]


def _hooked() -> bool:
    """Whether saved tensors now go through hooks."""
    return torch._C._autograd._top_saved_tensors_default_hooks(True) is not None
