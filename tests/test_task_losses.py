"""Joint denoising: the losses of classification and segmentation, and their errors."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastden.joint import ClassificationLoss, SegmentationLoss


class TestTaskLosses:
    def test_classification(self) -> None:
        prediction, labels = torch.randn(6, 5), torch.tensor([0, 4, 2, 9, 1, 9])
        expected = F.cross_entropy(prediction[labels != 9], labels[labels != 9])
        assert ClassificationLoss(9)(prediction, labels).item() == pytest.approx(expected.item(), rel=1e-6)
        smooth = F.cross_entropy(prediction[labels != 9], labels[labels != 9], label_smoothing=0.1)
        assert ClassificationLoss(9, 0.1)(prediction, labels).item() == pytest.approx(smooth.item(), rel=1e-6)

    def test_segmentation(self) -> None:
        prediction, labels = torch.randn(2, 4, 6, 5), torch.randint(4, (2, 6, 5))
        labels[0, :3] = 255
        expected = F.cross_entropy(prediction, labels, ignore_index=255)
        assert SegmentationLoss(255)(prediction, labels).item() == pytest.approx(expected.item(), rel=1e-6)

    @pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.uint16, torch.int32])
    def test_labels_of_other_integers(self, dtype: torch.dtype) -> None:
        prediction, labels = torch.randn(6, 5), torch.tensor([0, 4, 2, 9, 1, 9])
        expected = ClassificationLoss(9)(prediction, labels)
        assert torch.equal(ClassificationLoss(9)(prediction, labels.to(dtype)), expected)

    def test_small_prediction_is_scaled(self) -> None:
        prediction, labels = torch.randn(2, 4, 3, 5), torch.randint(4, (2, 12, 20))
        large = F.interpolate(prediction, size=(12, 20), mode="bilinear", align_corners=False)
        assert SegmentationLoss()(prediction, labels).item() == pytest.approx(F.cross_entropy(large, labels).item())

    def test_nothing_counts(self) -> None:
        prediction = torch.randn(2, 4, 3, 5, requires_grad=True)
        loss = SegmentationLoss(7)(prediction, torch.full((2, 3, 5), 7))
        loss.backward()
        assert loss.item() == 0
        assert prediction.grad is not None
        assert not prediction.grad.any()

    def test_half_precision_prediction(self) -> None:
        loss = ClassificationLoss()(torch.randn(3, 5).bfloat16(), torch.tensor([0, 1, 2]))
        assert loss.dtype == torch.float32

    @pytest.mark.parametrize(
        ("loss", "prediction", "labels", "error", "message"),
        [
            (
                ClassificationLoss(),
                [1],
                torch.zeros(1),
                TypeError,
                r"prediction: list; accepted: a tensor \(N, ",
            ),
            (
                ClassificationLoss(),
                torch.zeros(2, 5, 1, 1),
                torch.zeros(2).long(),
                ValueError,
                r"prediction: shape \(2, 5, 1, 1\); accepted: \(N, classes\)",
            ),
            (ClassificationLoss(), torch.zeros(2, 5), torch.zeros(2), TypeError, r"labels: dtype torch\.float32"),
            (ClassificationLoss(), torch.zeros(2, 5), [0, 1], TypeError, r"labels: list"),
            (
                ClassificationLoss(),
                torch.zeros(2, 5),
                torch.zeros(3).long(),
                ValueError,
                r"labels: shape \(3,\); accepted: \(2,\)",
            ),
            (
                ClassificationLoss(),
                torch.zeros(2, 5),
                torch.tensor([0, 5]),
                ValueError,
                r"labels: from 0 to 5; accepted: 0 to 4, and -100 to be ignored",
            ),
            (ClassificationLoss(), torch.zeros(2, 5), torch.tensor([-1, 2]), ValueError, r"labels: from -1 to 2"),
            (
                SegmentationLoss(),
                torch.zeros(2, 5),
                torch.zeros(2, 4, 4).long(),
                ValueError,
                r"prediction: shape \(2, 5\); accepted: \(N, classes, h, w\)",
            ),
            (
                SegmentationLoss(),
                torch.zeros(2, 5, 4, 4),
                torch.zeros(2).long(),
                ValueError,
                r"labels: shape \(2,\); accepted: \(2, any, any\)",
            ),
            (
                SegmentationLoss(),
                torch.zeros(1, 5, 2, 2),
                np.zeros((1, 2, 2), np.int64),
                TypeError,
                r"labels: ndarray; accepted: a tensor of integers",
            ),
            (ClassificationLoss(), torch.zeros(2, 5), torch.tensor([156, 1]).byte(), ValueError, r"from 1 to 156"),
            (ClassificationLoss(255), torch.zeros(2, 5), torch.tensor([-1, 1]).char(), ValueError, r"from -1 to 1"),
            (
                SegmentationLoss(11),
                torch.zeros(1, 5, 2, 2),
                torch.tensor([[[0, 11], [4, 12]]]),
                ValueError,
                r"labels: from 0 to 12; accepted: 0 to 4, and 11 to be ignored",
            ),
        ],
    )
    def test_bad_input(
        self, loss: nn.Module, prediction: Any, labels: Any, error: type[Exception], message: str
    ) -> None:
        with pytest.raises(error, match=message):
            loss(prediction, labels)
