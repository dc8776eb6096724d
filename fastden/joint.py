"""Joint training with high-level vision: a denoiser in front of frozen networks, and the loss over both.

Section 3.2 of Liu et al. (IJCAI 2018): the denoiser feeds a network for a high-level task, whose weights are fixed, and
is trained by ``L = L_denoise + lambda * L_task``. The gradient of the task's loss passes through the frozen network
into the denoiser, which learns to keep what the task needs.

    >>> joint = JointDenoiser(denoiser, classifier, preprocess=normalise)
    >>> loss = JointLoss(weight=1e-3, task_loss="classification")
    >>> terms = loss(joint(noisy, sigma), clean, labels)
    >>> terms.total.backward()
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from numbers import Real
from typing import Any, Literal, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastden.gradient_checks import check_network, check_preprocess, random_numbers_apart
from fastden.held_modules import FunctionModule
from fastden.ops.backends import NAMES, use_backend
from fastden.ops.modes import transforming
from fastden.task_losses import ClassificationLoss, SegmentationLoss, at_least_float32, resize_prediction

__all__ = [
    "TASK",
    "BuiltIn",
    "ClassificationLoss",
    "FrozenTask",
    "JointDenoiser",
    "JointLoss",
    "JointOutput",
    "JointTerms",
    "Preprocess",
    "SegmentationLoss",
    "TaskLoss",
    "check_preprocess",
    "resize_prediction",
]

#: Name of the only task where it was not given by a mapping.
TASK = "task"

Preprocess = Callable[[Tensor], Tensor]
#: Called with a task's prediction and its target; returns a scalar tensor.
TaskLoss = Callable[[Any, Any], Tensor]
BuiltIn = Literal["classification", "segmentation"]


class JointOutput(NamedTuple):
    """What :class:`JointDenoiser` returns.

    Attributes:
        denoised: (N, C, H, W), not clipped.
        predictions: what each frozen network returned, by the task's name.
    """

    denoised: Tensor
    predictions: dict[str, Any]

    @property
    def prediction(self) -> Any:
        """The prediction, where there is one task.

        Raises:
            ValueError: there are several.
        """
        if len(self.predictions) != 1:
            raise ValueError(
                f"prediction: there are several ({', '.join(self.predictions)}); accepted: predictions[name]"
            )
        return next(iter(self.predictions.values()))


class JointTerms(NamedTuple):
    """What :class:`JointLoss` returns, all scalars.

    Attributes:
        total: ``denoise`` plus the weighted losses of the tasks: call ``backward`` on it.
        denoise: the denoiser's own loss.
        tasks: each task's loss by its name, not weighted.
    """

    total: Tensor
    denoise: Tensor
    tasks: dict[str, Tensor]


class _Mark:
    """Whether gradients are known to pass. The replicas that ``DataParallel`` makes for each batch share it."""

    verified = False


class FrozenTask(nn.Module):
    """A network that passes gradients to its input and never changes.

    Its parameters stop requiring gradients, permanently. It stays in evaluation mode even where ``train()`` is called
    on a module that holds it: BN statistics do not change, dropout is off.

    The first batch under grad is run once more, to verify that gradients pass (:meth:`check`).

    Args:
        network: any module; it is frozen in place.
        preprocess: differentiable, from denoised images (N, C, H, W) in about [0, 1] to the network's input
            (normalisation, resizing). A module is frozen too; modules that a function uses are not.
        name: of the task, for messages.

    Raises:
        TypeError: ``network`` is not a module, or ``preprocess`` cannot be called.
        ValueError: one of them has no evaluation mode, such as a program of ``torch.export``.
    """

    def __init__(self, network: nn.Module, preprocess: Preprocess | None = None, name: str = TASK) -> None:
        super().__init__()
        if not isinstance(network, nn.Module):
            raise TypeError(f"{name}: {type(network).__name__}; accepted: a torch.nn.Module")
        if preprocess is not None and not callable(preprocess):
            raise TypeError(f"preprocess of {name}: {type(preprocess).__name__}; accepted: a function or a module")
        self.name = name
        self.network = network
        self.preprocess = preprocess
        self._mark = _Mark()
        self.requires_grad_(False)
        try:
            self.eval()
        except NotImplementedError as error:  # of a program of torch.export
            kinds = [type(part).__name__ for part in (network, preprocess) if isinstance(part, nn.Module)]
            raise ValueError(
                f"{name}: {' or '.join(kinds)} has no evaluation mode ({error}); accepted: modules with eval(), such as"
                " the one that was exported"
            ) from error

    def train(self, mode: bool = True) -> FrozenTask:
        """Stay in evaluation mode."""
        super().train(False)
        return self

    def forward(self, images: Tensor) -> Any:
        """The network's prediction for images (N, C, H, W) in about [0, 1].

        Raises:
            ValueError: a parameter requires gradients again, a module went into training mode, no gradient passes
                through ``preprocess`` or the network, or ``images`` were changed in place.
        """
        self._check_frozen()
        # Code that is compiled or transformed cannot look at gradients.
        is_batch = isinstance(images, Tensor) and images.numel() > 0
        if is_batch and torch.is_grad_enabled() and not transforming() and not self._mark.verified:
            self.check(images)
        # Tensors count their changes, but not in inference mode.
        counted = isinstance(images, Tensor) and not transforming() and not images.is_inference()
        before = images._version if counted else 0
        prediction = self._predict(images)
        if counted and images._version != before:
            raise ValueError(
                f"{self.name}: it changes its input in place, which is the denoised image of the loss and of other"
                " tasks; accepted: a network and a preprocess without operations in place, or preprocess=torch.clone"
            )
        return prediction

    def check(self, images: Tensor) -> Any:
        """Raise unless gradients pass through ``preprocess`` and the network; the first batch need not be checked then.

        Args:
            images: (N, C, H, W), as :meth:`forward` takes them.

        Returns:
            The network's prediction for them.

        Raises:
            ValueError: no gradient passes, a parameter requires gradients again, or a module went into training mode.
            RuntimeError: within ``torch.inference_mode``, where none can pass.
        """
        if torch.is_inference_mode_enabled():
            raise RuntimeError(f"{self.name}: check within torch.inference_mode(); accepted: a call outside of it")
        self._check_frozen()
        # A resumed training checks again: it must go on with the random numbers of the one that was not stopped. A
        # checkpoint around this module counts the tensors that are saved for gradients; what it runs again checks none.
        saved_apart = torch.autograd.graph.saved_tensors_hooks(Tensor.detach, lambda saved: saved)
        with random_numbers_apart(images.device), saved_apart:
            if self.preprocess is not None:
                check_preprocess(self.preprocess, images, self.name)
            prediction = check_network(self._predict, images, self.name)
        self._mark.verified = True
        return prediction

    def _predict(self, images: Tensor) -> Any:
        return self.network(images if self.preprocess is None else self.preprocess(images))

    def _check_frozen(self) -> None:
        thawed = [name for name, parameter in self.named_parameters() if parameter.requires_grad]
        if thawed:
            raise ValueError(
                f"{self.name}: {len(thawed)} parameters require gradients ({thawed[0]}, ...); accepted: a frozen"
                " network (call requires_grad_(False) on it)"
            )
        training = [name for name, module in self.named_modules() if module.training]
        if training:
            raise ValueError(
                f"{self.name}: {len(training)} modules are in training mode ({training[0]}, ...); accepted: evaluation"
                " mode (call eval() on it), so that statistics stay as they are"
            )


class JointDenoiser(nn.Module):
    """A denoiser followed by one or several frozen networks.

    The first batch under grad verifies that gradients pass through each ``preprocess`` and network. Under
    ``torch.compile`` and the transforms of ``torch.func`` no batch does: call :meth:`check` first. Call it before
    ``torch.distributed.fsdp.fully_shard``, too: where it shards a part of a network, the first batch cannot be checked.

    Args:
        denoiser: called as ``denoiser(noisy, sigma)``, without ``sigma`` where that is None.
        task: the network for the high-level task, or several by name; frozen in place (:class:`FrozenTask`).
        preprocess: as :class:`FrozenTask`'s; for several tasks a mapping by the same names, or one function for all.
        backend: of fastden's operators in the denoiser, forward and for gradients, see :mod:`fastden.ops.backends`;
            None leaves it to the context, the environment or fastden. The tasks' networks are not concerned. It cannot
            be traced by ``torch.compile(fullgraph=True)``: there keep None and call what is compiled inside of
            :func:`fastden.ops.use_backend`, or compile ``joint.denoiser`` alone.

    Raises:
        TypeError: not modules.
        ValueError: no task, names of ``preprocess`` that are no task's, no such backend, or a task with parameters of
            the denoiser.
    """

    def __init__(
        self,
        denoiser: nn.Module,
        task: nn.Module | Mapping[str, nn.Module] | nn.ModuleDict,
        preprocess: Preprocess | Mapping[str, Preprocess] | nn.ModuleDict | None = None,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        if backend is not None and backend not in NAMES:
            raise ValueError(f"backend: {backend!r}; accepted: {', '.join(NAMES)}, or None")
        self.backend = backend
        if not isinstance(denoiser, nn.Module):
            raise TypeError(f"denoiser: {type(denoiser).__name__}; accepted: a torch.nn.Module")
        tasks, _ = _by_name(task)
        if not tasks:
            raise ValueError("task: an empty mapping; accepted: a network, or networks by name")
        _check_names("task", tasks)
        own, named = _by_name(preprocess)
        functions: dict[str, Preprocess | None]
        if named:
            unknown = sorted(set(own) - set(tasks))
            if unknown:
                raise ValueError(f"preprocess: {', '.join(unknown)}; accepted names: {', '.join(tasks)}")
            functions = {name: own.get(name) for name in tasks}
        else:
            functions = dict.fromkeys(tasks, own[TASK])
        frozen = nn.ModuleList(part for part in (*tasks.values(), *functions.values()) if isinstance(part, nn.Module))
        trained = {id(parameter) for parameter in denoiser.parameters() if parameter.requires_grad}
        shared = sum(id(parameter) in trained for parameter in frozen.parameters())
        if shared:
            raise ValueError(
                f"task: shares {shared} parameters with the denoiser, which would be frozen; accepted: networks apart"
            )
        self.denoiser = denoiser
        self.tasks = nn.ModuleDict({name: FrozenTask(tasks[name], functions[name], name) for name in tasks})

    def forward(self, noisy: Tensor, sigma: float | Tensor | None = None) -> JointOutput:
        """Denoise, and run every task's network on the result.

        Args:
            noisy: (N, C, H, W) on the scale [0, 1].
            sigma: as ``denoiser`` takes it; for :class:`fastden.Denoiser` a number, (N,) or (N, 1, H, W), on the scale
                of ``noisy``, or None for a blind network.
        """
        with nullcontext() if self.backend is None else use_backend(self.backend):
            denoised = self.denoiser(noisy) if sigma is None else self.denoiser(noisy, sigma)
        return JointOutput(denoised, {name: task(denoised) for name, task in self.tasks.items()})

    def check(self, images: Tensor) -> None:
        """Raise unless gradients pass from every task's prediction to ``images``; no batch is checked afterwards.

        Args:
            images: (N, C, H, W) in about [0, 1], of a size as the networks take them.

        Raises:
            ValueError: no gradient passes through a ``preprocess`` or a network, or a network is not frozen any more.
            RuntimeError: within ``torch.inference_mode``, where none can pass.
        """
        for task in self.tasks.values():
            cast(FrozenTask, task).check(images)


class JointLoss(nn.Module):
    """``L_denoise + sum of weight * L_task`` over the tasks: equation 2 of Liu et al. for one task.

    Args:
        weight: lambda, at least 0; for several tasks a mapping by name. It balances losses on
            different scales: a squared error on [0, 1] is about 0.001, a cross entropy about 1. 0 leaves a task out
            of the sum; its loss is still among the terms.
        task_loss: "classification" (:class:`ClassificationLoss`), "segmentation" (:class:`SegmentationLoss`), or any
            callable ``(prediction, target) -> scalar tensor``; for several tasks a mapping by name.
        denoise_loss: ``(denoised, clean) -> scalar tensor``; None is the mean squared error, in at least float32.

    Losses that are modules are registered: their parameters are in ``parameters()``, their states in ``state_dict()``.
    So are the modules and parameters that a function holds: in a closure, a default argument, a ``functools.partial``,
    a bound method, or the attributes of a callable object; also behind functions, lists and mappings that these hold.
    Modules that hold this loss are left out, so ``self.loss = JointLoss(weight, self.method)`` may be written. A module
    that is registered so and frozen, with no parameter that requires gradients, is in evaluation mode while the
    function runs: the statistics of a perceptual network do not move. All others keep their mode. Of a function's
    global variables none is registered: call ``eval()`` on a frozen network there, or hand it over.

    Raises:
        ValueError: a negative or non-finite weight, an unknown loss, or names that differ.
    """

    def __init__(
        self,
        weight: float | Mapping[str, float],
        task_loss: BuiltIn | TaskLoss | Mapping[str, BuiltIn | TaskLoss] | nn.ModuleDict,
        denoise_loss: Callable[[Tensor, Tensor], Tensor] | None = None,
    ) -> None:
        super().__init__()
        losses, self._by_name = _by_name(task_loss)
        weights = dict(weight) if isinstance(weight, Mapping) else dict.fromkeys(losses, weight)
        if set(weights) != set(losses):
            raise ValueError(f"weight: for {', '.join(weights)}; accepted: the tasks of task_loss, {', '.join(losses)}")
        for name, value in weights.items():
            if not isinstance(value, Real) or not (math.isfinite(value) and value >= 0):
                raise ValueError(f"weight: {value!r} for {name}; accepted: a finite number of at least 0")
        self.weights = weights
        _check_names("task_loss", losses)
        # Losses become modules, so that their weights of classes or learned scales are trained, saved and moved.
        self.task_losses = nn.ModuleDict({name: _as_module(_task_loss(loss, name)) for name, loss in losses.items()})
        self.denoise_loss = _as_module(denoise_loss or _squared_error)

    def forward(self, output: JointOutput, clean: Tensor, target: Any) -> JointTerms:
        """The loss of a batch.

        Args:
            output: of :class:`JointDenoiser`.
            clean: (N, C, H, W), the images without noise.
            target: what the task's loss takes; a mapping by name where ``task_loss`` was one.

        Raises:
            ValueError: shapes, names or labels that do not fit, or a loss that is no scalar.
        """
        if output.denoised.shape != clean.shape:
            raise ValueError(f"clean: shape {tuple(clean.shape)}; accepted: denoised's {tuple(output.denoised.shape)}")
        # A single task's own target may be a mapping, such as boxes and labels.
        named = isinstance(target, Mapping) and (self._by_name or set(target) == {TASK})
        targets = target if named else {TASK: target}
        names = list(self.task_losses)
        for what, by_task in (("output", output.predictions), ("target", targets)):
            if set(by_task) != set(names):
                raise ValueError(f"{what}: tasks {', '.join(map(str, by_task))}; accepted: {', '.join(names)}")
        tasks = {
            name: _scalar(f"task_loss of {name}", self.task_losses[name](output.predictions[name], targets[name]))
            for name in names
        }
        denoise = _scalar("denoise_loss", self.denoise_loss(output.denoised, clean))
        total = denoise
        for name in names:
            if self.weights[name]:  # 0 times an infinite loss would be NaN
                total = total + self.weights[name] * tasks[name]
        return JointTerms(total, denoise, tasks)


def _scalar(what: str, loss: Any) -> Tensor:
    """The loss, or ValueError where it is no scalar tensor."""
    if not isinstance(loss, Tensor) or loss.dim() != 0:
        returned = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise ValueError(f"{what}: returned {returned}; accepted: a scalar tensor (take its mean)")
    return loss


def _as_module(function: Callable[..., Any]) -> nn.Module:
    return function if isinstance(function, nn.Module) else FunctionModule(function)


def _by_name(value: Any) -> tuple[dict[str, Any], bool]:
    """What is given by its names, and whether it is: a network may be a ModuleDict too, but of a class of its own."""
    if isinstance(value, Mapping) or type(value) is nn.ModuleDict:
        return dict(value.items()), True
    return {TASK: value}, False


def _check_names(what: str, names: Iterable[str]) -> None:
    """Raise ValueError unless each is a name that PyTorch can register a module by."""
    empty = nn.ModuleDict()
    for name in names:
        if not isinstance(name, str) or not name or "." in name or hasattr(empty, name):
            accepted = "text without dots that is no attribute of modules"
            raise ValueError(f"{what}: task named {name!r}; accepted: {accepted}")


def _squared_error(denoised: Tensor, clean: Tensor) -> Tensor:
    return F.mse_loss(at_least_float32(denoised), at_least_float32(clean))


def _task_loss(loss: BuiltIn | TaskLoss, name: str) -> TaskLoss:
    if isinstance(loss, str):
        if loss == "classification":
            return ClassificationLoss()
        if loss == "segmentation":
            return SegmentationLoss()
    elif callable(loss):
        return loss
    raise ValueError(f"task_loss: {loss!r} for {name}; accepted: 'classification', 'segmentation' or a callable")
