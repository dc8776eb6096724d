"""Small networks to train in front of, loaded by file name."""

from __future__ import annotations

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


def segmenter() -> Task:
    torch.manual_seed(6)
    network = nn.Sequential(nn.Conv2d(3, 3, 3, stride=2, padding=1), nn.BatchNorm2d(3))
    made.append(network)
    return Task(network, 3, "segmentation", centre, ignore_index=9)


def rounding() -> Task:
    return Task(classifier().network, 3, "classification", lambda images: (images * 255).round())


def nothing() -> None:
    """Returns no task."""


def centre(images: Tensor) -> Tensor:
    return images * 2 - 1
