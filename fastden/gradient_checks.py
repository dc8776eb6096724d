"""Checks that gradients pass through what a frozen network is made of: its preprocessing, and the network itself.

A loss behind one that stops them still has a value, and the denoiser before it learns nothing from it
(:mod:`fastden.joint`).
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

#: Values in which no tensor can be.
_PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device)


def check_preprocess(preprocess: Callable[[Tensor], Any], images: Tensor, name: str = "task") -> None:
    """Raise unless gradients pass through ``preprocess`` at ``images`` (N, C, H, W), or at random ones.

    Rounding, comparing, converting to integers or to NumPy, and ``detach`` all stop the gradient, some of them without
    an error. The denoiser would then learn nothing from the task.

    Nothing is said of gradients that reentrant checkpoints give to a whole backward pass alone (:func:`check_network`).

    Raises:
        ValueError: no gradient, one that is zero everywhere, or one that is not finite.
    """
    accepted = (
        "accepted: differentiable torch functions (no rounding, no comparison, no detach, no NumPy, nothing in place)"
    )
    # Where images are beyond white, the gradient of one that cuts them off is zero.
    for values in (images, _random_like(images)):
        try:
            gradient = _gradient_of_preprocess(preprocess, values, name, accepted)
        except RuntimeError as error:
            if _needs_backward(error):
                return
            raise
        if gradient is not None and not bool(gradient.isfinite().all()):
            raise ValueError(f"preprocess of {name}: its gradient is not finite; {accepted}")
        if gradient is not None and bool(gradient.any()):
            return
    raise ValueError(f"preprocess of {name}: its gradient is zero everywhere; {accepted}")


def _gradient_of_preprocess(
    preprocess: Callable[[Tensor], Any], images: Tensor, name: str, accepted: str
) -> Tensor | None:
    with torch.enable_grad():
        probe = images.detach().clone().requires_grad_()
        try:
            result = preprocess(probe)
        except RuntimeError as error:
            if "requires grad" in str(error):  # the messages of Tensor.numpy and of operations in place
                raise ValueError(f"preprocess of {name}: {error}; {accepted}") from error
            raise
        if not isinstance(result, Tensor):
            raise TypeError(f"preprocess of {name}: returned {type(result).__name__}; accepted: a tensor")
        if not result.requires_grad:
            raise ValueError(f"preprocess of {name}: no gradient passes through it; {accepted}")
        (gradient,) = torch.autograd.grad(_weighed(result), probe, allow_unused=True)
    return gradient


def _needs_backward(error: RuntimeError) -> bool:
    """Whether it is that of checkpoints that ``torch.autograd.grad`` cannot pass, and ``backward`` can."""
    return "compatible with .grad()" in str(error)


def _random_like(images: Tensor) -> Tensor:
    """Images of the same size, uniform in [0, 1]; at least one."""
    return torch.rand((max(len(images), 1), *images.shape[1:]), dtype=images.dtype, device=images.device)


def check_network(predict: Callable[[Tensor], Any], images: Tensor, name: str) -> Any:
    """Raise unless gradients pass to ``images`` from what a network predicts for them, and return that.

    What it predicts may be tensors in lists, mappings and objects. Where a part of it cannot be looked into, such as a
    nested tensor, nothing is said. Nor is it of the gradient itself where ``torch.utils.checkpoint`` with
    ``use_reentrant=True`` gives it to a whole backward pass alone, which would fill the gradients of what is trained.

    Without a gradient the loss still has a value, and the denoiser learns from its own part alone. So it does behind a
    forward pass under ``torch.no_grad``, a network in integers, or one that TorchScript has optimised for inference.

    Raises:
        ValueError: no gradient, or one that is zero everywhere, for random images too.
    """
    accepted = "accepted: a network whose prediction can be differentiated by its input"
    predictions: list[Any] = []
    with torch.enable_grad():
        # Of dark images every unit of a network may be off, by chance.
        for values in (images, _random_like(images)):
            probe = values.detach().clone().requires_grad_()
            prediction = predict(probe.clone())  # a leaf could not be changed in place; forward says more of that
            predictions.append(prediction)
            parts = list(_parts(prediction, set()))
            tensors = [part for part in parts if part is not None]
            differentiable = [tensor for tensor in tensors if tensor.requires_grad]
            sums = [total for tensor in differentiable if (total := _weighed_or_none(tensor)) is not None]
            # A gradient may pass by what cannot be looked into or weighed.
            is_whole = bool(tensors) and len(tensors) == len(parts) and len(sums) == len(differentiable)
            if not sums and is_whole:
                raise ValueError(f"{name}: no gradient passes through the network; {accepted}")
            if not sums:
                return predictions[0]
            try:
                # As a loss is scaled for float16, in which small gradients are 0.
                scales = [torch.full_like(value, 1024) for value in sums]
                (gradient,) = torch.autograd.grad(sums, probe, scales, allow_unused=True)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                if _needs_backward(error):
                    return predictions[0]
                raise ValueError(f"{name}: no gradient passes through the network: {error}; {accepted}") from error
            if not is_whole or (gradient is not None and bool(gradient.any())):
                return predictions[0]
    raise ValueError(
        f"{name}: the gradient through the network is zero everywhere; {accepted} and depends on it (an untrained last"
        " layer may be all zeros)"
    )


@contextmanager
def random_numbers_apart(device: torch.device) -> Iterator[None]:
    """A context whose random numbers leave those behind it as they were: PyTorch's, NumPy's and Python's."""
    own, numpy_own = random.getstate(), np.random.get_state()  # noqa: NPY002 -- a function may draw from it
    kind = device.type if device.type in ("cuda", "xpu") else "cuda"
    with torch.random.fork_rng([device] if device.type == kind else [], device_type=kind):
        try:
            yield
        finally:
            random.setstate(own)
            np.random.set_state(numpy_own)  # noqa: NPY002


def _weighed(x: Tensor) -> Tensor:
    """A sum with unequal weights: with equal ones the gradients would cancel where a mean is subtracted."""
    x = torch.view_as_real(x) if x.is_complex() else x
    weights = torch.linspace(0.5, 1.5, x.numel(), device=x.device).view_as(x).to(x.dtype)
    return (x * weights).sum()


def _weighed_or_none(x: Tensor) -> Tensor | None:
    """:func:`_weighed`; None of a tensor whose kind has no such sum: nested, or of a class of its own."""
    try:
        return _weighed(x)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, TypeError):
        return None


def _parts(value: Any, seen: set[int], depth: int = 0) -> Iterator[Tensor | None]:
    """The tensors of a prediction, in lists, mappings and attributes too; None for what cannot be looked into.

    Args:
        value: the prediction, or a part of it.
        seen: ids of the objects that were met.
        depth: how many of them hold the value.
    """
    if isinstance(value, Tensor):
        yield value
    elif not isinstance(value, _PLAIN) and id(value) not in seen:
        seen.add(id(value))
        items = _items(value)
        if items is None or depth == 16:
            yield None
        else:
            for item in items:
                yield from _parts(item, seen, depth + 1)


def _items(value: Any) -> list[Any] | None:
    """What an object holds; None where it may hold more than can be seen, as a module or a function."""
    if isinstance(value, Mapping):
        return list(value.values())
    if isinstance(value, list | tuple | set | frozenset):
        return list(value)
    slots = [name for kind in type(value).__mro__ for name in getattr(kind, "__slots__", ())]
    if isinstance(value, nn.Module) or callable(value) or not (slots or getattr(value, "__dict__", None)):
        return None
    own = [getattr(value, name, None) for name in slots if name not in ("__dict__", "__weakref__")]
    return [*own, *getattr(value, "__dict__", {}).values()]
