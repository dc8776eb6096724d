"""Small networks to train in front of, loaded by file name."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastden.training.tasks import Task

#: All networks that were made here; tests look at them afterwards.
made: list[nn.Module] = []


def classifier(classes: int = 3) -> Task:
    torch.manual_seed(5)
    network = nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Dropout(0.5),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, classes),
    )
    made.append(network)
    return Task(network, classes, "classification", centre)


class Indexed(nn.Module):
    """A network that looks channels up by a buffer of integers, and leaves out its last class by -inf, as Swin does."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.conv = nn.Conv2d(3, 64, 3, stride=2)
        self.linear = nn.Linear(64, 4)
        self.register_buffer("index", torch.arange(64))
        self.register_buffer("mask", torch.tensor([0.0, 0.0, 0.0, -torch.inf]))

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.conv(x).mean((2, 3))[:, self.index]) + self.mask


class Other(nn.Module):
    """A classifier of three classes that is wrong in one way, named by ``fault``."""

    def __init__(self, fault: str) -> None:
        super().__init__()
        self.network = classifier().network
        self.fault = fault

    def forward(self, x: Tensor) -> Any:
        with torch.set_grad_enabled(self.fault != "no gradient" and torch.is_grad_enabled()):
            result = self.network(x)
        return {"logits": result} if self.fault == "dictionary" else result


def half(dtype: str) -> Task:
    """A network whose weights have 16 bits."""
    return Task(Indexed().to(getattr(torch, dtype)), 4, "classification")


class Accelerated(nn.Module):
    """A network that has kernels for one kind of device alone."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.network = classifier().network
        self.kind = kind

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type != self.kind:
            raise RuntimeError(f"selective_scan: expected a tensor on {self.kind}")
        return self.network(x)


def accelerated(kind: str) -> Task:
    return Task(Accelerated(kind), 3, "classification")


def other(fault: str) -> Task:
    return Task(Other(fault), 5 if fault == "classes" else 3, "classification")


def indexed() -> Task:
    return Task(Indexed(), 4, "classification")


def segmenter() -> Task:
    torch.manual_seed(6)
    network = nn.Sequential(nn.Conv2d(3, 3, 3, stride=2, padding=1), nn.BatchNorm2d(3))
    made.append(network)
    return Task(network, 3, "segmentation", centre, ignore_index=9)


def rounding() -> Task:
    return Task(classifier().network, 3, "classification", lambda images: (images * 255).round())


def drawing() -> Task:
    def preprocess(images: Tensor) -> Tensor:
        images = images * random.uniform(0.8, 1.2) + float(np.random.uniform(-0.1, 0.1))  # noqa: NPY002
        return centre(images + 0.2 * torch.rand_like(images))

    return Task(classifier().network, 3, "classification", preprocess)


def program() -> Task:
    network = torch.export.export(nn.Conv2d(3, 3, 30).eval(), (torch.rand(2, 3, 30, 30),)).module()
    return Task(network, 3, "classification")


def nothing() -> None:
    """Returns no task."""


def centre(images: Tensor) -> Tensor:
    return images * 2 - 1
