"""Joint denoising: the sum of the losses, and its errors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastden.joint import JointLoss, JointOutput
from tests.helpers import labelled_batch


class TestJointLoss:
    def test_value(self) -> None:
        _, clean, labels = labelled_batch()
        output = JointOutput(clean + 0.1, {"task": torch.zeros(4, 5)})
        terms = JointLoss(0.25, "classification")(output, clean, labels)
        assert terms.denoise.item() == pytest.approx(0.01, rel=1e-4)
        assert terms.tasks["task"].item() == pytest.approx(1.609438, rel=1e-5)
        assert terms.total.item() == pytest.approx(0.01 + 0.25 * 1.609438, rel=1e-5)

    def test_several_tasks(self) -> None:
        _, clean, labels = labelled_batch()
        output = JointOutput(clean, {"a": torch.zeros(4, 5), "b": torch.full((4, 2), 3.0)})
        loss = JointLoss({"a": 0.5, "b": 2.0}, {"a": "classification", "b": lambda p, t: (p - t).abs().mean()})
        terms = loss(output, clean, {"a": labels, "b": torch.ones(4, 2)})
        assert terms.total.item() == pytest.approx(0.5 * 1.609438 + 2 * 2, rel=1e-5)
        assert set(terms.tasks) == {"a", "b"}

    def test_a_weight_of_0_leaves_a_task_out(self) -> None:
        """Zero times an infinite loss would be NaN, and so would its gradient."""
        denoised, clean = torch.rand(1, 3, 4, 4, requires_grad=True), torch.rand(1, 3, 4, 4)
        output = JointOutput(denoised, {"a": denoised.mean(), "b": denoised.sum() * torch.inf})
        loss = JointLoss({"a": 0.5, "b": 0.0}, dict.fromkeys("ab", lambda prediction, _: prediction))
        terms = loss(output, clean, {"a": None, "b": None})
        torch.testing.assert_close(terms.total, terms.denoise + 0.5 * terms.tasks["a"])
        assert terms.tasks["b"].item() == torch.inf
        (gradient,) = torch.autograd.grad(terms.total, denoised)
        assert bool(gradient.isfinite().all())

    def test_one_weight_for_all(self) -> None:
        assert JointLoss(0.1, {"a": "classification", "b": "segmentation"}).weights == {"a": 0.1, "b": 0.1}

    def test_own_denoise_loss(self) -> None:
        _, clean, labels = labelled_batch()
        loss = JointLoss(0, "classification", F.l1_loss)
        assert loss(JointOutput(clean + 0.1, {"task": torch.zeros(4, 5)}), clean, labels).total.item() == pytest.approx(
            0.1, rel=1e-4
        )

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ((-1, "classification"), r"weight: -1 for task; accepted: a finite number of at least 0"),
            ((float("nan"), "classification"), r"weight: nan for task"),
            (("1", "classification"), r"weight: '1' for task"),
            ((1, "detection"), r"task_loss: 'detection' for task; accepted: 'classification', 'segmentation' or a"),
            ((1, 7), r"task_loss: 7 for task"),
            (({"a": 1}, "classification"), r"weight: for a; accepted: the tasks of task_loss, task"),
        ],
    )
    def test_bad_arguments(self, arguments: tuple[Any, ...], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            JointLoss(*arguments)

    def test_other_size(self) -> None:
        _, clean, labels = labelled_batch()
        output = JointOutput(clean[:, :, :-1], {"task": torch.zeros(4, 5)})
        with pytest.raises(ValueError, match=r"clean: shape \(4, 3, 20, 24\); accepted: denoised's \(4, 3, 19, 24\)"):
            JointLoss(1, "classification")(output, clean, labels)

    def test_names_that_differ(self) -> None:
        _, clean, labels = labelled_batch()
        output = JointOutput(clean, {"a": torch.zeros(4, 5)})
        with pytest.raises(ValueError, match=r"output: tasks a; accepted: task"):
            JointLoss(1, "classification")(output, clean, labels)
        with pytest.raises(ValueError, match=r"target: tasks task; accepted: a"):
            JointLoss({"a": 1}, {"a": "classification"})(output, clean, labels)

    def test_a_single_target_may_be_a_mapping(self) -> None:
        clean = labelled_batch()[1]
        output = JointOutput(clean, {"task": torch.full((2, 2), 3.0)})
        loss = JointLoss(1.0, lambda p, t: (p - t["boxes"]).mean() * t["count"])
        target = {"boxes": torch.ones(2, 2), "count": 4}
        assert loss(output, clean, target).total.item() == loss(output, clean, {"task": target}).total.item() == 8

    def test_losses_in_a_module_dict(self) -> None:
        clean = labelled_batch()[1]
        loss = JointLoss({"a": 2.0}, nn.ModuleDict({"a": nn.L1Loss()}))
        output = JointOutput(clean, {"a": torch.ones(2, 2)})
        assert loss(output, clean, {"a": torch.zeros(2, 2)}).total.item() == 2

    @pytest.mark.parametrize(
        ("loss", "message"),
        [
            (lambda p, t: p, r"task_loss of task: returned shape \(4, 5\); accepted: a scalar tensor"),
            (lambda p, t: 0.5, r"task_loss of task: returned float"),
        ],
    )
    def test_loss_that_is_no_scalar(self, loss: Any, message: str) -> None:
        _, clean, labels = labelled_batch()
        with pytest.raises(ValueError, match=message):
            JointLoss(1, loss)(JointOutput(clean, {"task": torch.zeros(4, 5)}), clean, labels)

    @pytest.mark.parametrize(
        ("loss", "message"),
        [
            (nn.L1Loss(reduction="none"), r"denoise_loss: returned shape \(4, .*\); accepted: a scalar tensor"),
            (lambda denoised, clean: 0.0, "denoise_loss: returned float"),
        ],
    )
    def test_denoise_loss_that_is_no_scalar(self, loss: Any, message: str) -> None:
        _, clean, labels = labelled_batch()
        with pytest.raises(ValueError, match=message):
            JointLoss(1, "classification", loss)(JointOutput(clean, {"task": torch.zeros(4, 5)}), clean, labels)
