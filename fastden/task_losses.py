"""Losses of high-level tasks: what a prediction lacks of its labels. :mod:`fastden.joint` weighs them.

They are computed in at least float32, refuse labels out of range, and are 0 where every label is ignored.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastden.ops.modes import transforming


class ClassificationLoss(nn.Module):
    """Cross entropy of whole images, in float32.

    Args:
        ignore_index: label of images that do not count.
        label_smoothing: as ``torch.nn.functional.cross_entropy``'s.
    """

    def __init__(self, ignore_index: int = -100, label_smoothing: float = 0.0) -> None:
        super().__init__()
        self.ignore_index = ignore_index
        self.label_smoothing = label_smoothing

    def forward(self, prediction: Tensor, labels: Tensor) -> Tensor:
        """Mean over the images that count; 0 where none does.

        Args:
            prediction: (N, classes), not normalised.
            labels: (N,), integers.

        Raises:
            TypeError: not tensors, or labels that are not integers.
            ValueError: other shapes, or a label that is no class.
        """
        _check_prediction(prediction, 2, "(N, classes)")
        _check_labels(labels, tuple(prediction.shape[:1]), prediction.shape[1], self.ignore_index)
        return _cross_entropy(prediction, labels, self.ignore_index, self.label_smoothing)


class SegmentationLoss(nn.Module):
    """Cross entropy of every pixel, in float32.

    Args:
        ignore_index: label of pixels that do not count.
    """

    def __init__(self, ignore_index: int = -100) -> None:
        super().__init__()
        self.ignore_index = ignore_index

    def forward(self, prediction: Tensor, labels: Tensor) -> Tensor:
        """Mean over the pixels that count; 0 where none does.

        Args:
            prediction: (N, classes, h, w), not normalised; scaled bilinearly to the size of ``labels``.
            labels: (N, H, W), integers.

        Raises:
            TypeError: not tensors, or labels that are not integers.
            ValueError: other shapes, or a label that is no class.
        """
        _check_prediction(prediction, 4, "(N, classes, h, w)")
        image_labels = isinstance(labels, Tensor) and labels.dim() == 3
        shape = (prediction.shape[0], *(labels.shape[1:] if image_labels else (-1, -1)))
        _check_labels(labels, shape, prediction.shape[1], self.ignore_index)
        return _cross_entropy(resize_prediction(prediction, labels.shape[1:]), labels, self.ignore_index, 0.0)


def resize_prediction(prediction: Tensor, size: tuple[int, ...] | torch.Size) -> Tensor:
    """Logits (N, classes, h, w), scaled bilinearly to ``size``, in at least float32."""
    prediction = at_least_float32(prediction)
    if tuple(prediction.shape[2:]) == tuple(size):
        return prediction
    return F.interpolate(prediction, size=tuple(size), mode="bilinear", align_corners=False)


def at_least_float32(x: Tensor) -> Tensor:
    """``x`` in float64 where it is that, else in float32."""
    return x if x.dtype == torch.float64 else x.float()


def _check_prediction(prediction: Any, dimensions: int, shape: str) -> None:
    if not isinstance(prediction, Tensor):
        raise TypeError(f"prediction: {type(prediction).__name__}; accepted: a tensor {shape}")
    if prediction.dim() != dimensions:
        raise ValueError(f"prediction: shape {tuple(prediction.shape)}; accepted: {shape}")


def _check_labels(labels: Any, shape: tuple[int, ...], classes: int, ignore_index: int) -> None:
    if not isinstance(labels, Tensor) or labels.is_floating_point() or labels.is_complex():
        shown = f"dtype {labels.dtype}" if isinstance(labels, Tensor) else type(labels).__name__
        raise TypeError(f"labels: {shown}; accepted: a tensor of integers")
    if tuple(labels.shape) != shape:
        wanted = str(shape).replace("-1", "any")
        raise ValueError(f"labels: shape {tuple(labels.shape)}; accepted: {wanted}")
    if transforming() or not labels.numel():
        return
    # On a GPU this waits for the labels, tens of microseconds; a label out of range would end the process there.
    # As 64 bits: in unsigned 8 bits, 156 equals -100.
    labels = labels.long()
    counted = labels[labels != ignore_index]
    if counted.numel():
        low, high = (int(bound) for bound in counted.aminmax())
        if low < 0 or high >= classes:
            raise ValueError(
                f"labels: from {low} to {high}; accepted: 0 to {classes - 1}, and {ignore_index} to be ignored"
            )


def _cross_entropy(prediction: Tensor, labels: Tensor, ignore_index: int, smoothing: float) -> Tensor:
    labels = labels.long()
    losses = F.cross_entropy(
        at_least_float32(prediction), labels, ignore_index=ignore_index, label_smoothing=smoothing, reduction="sum"
    )
    # reduction="mean" would be NaN where every label is ignored.
    return losses / (labels != ignore_index).sum().clamp(min=1)
