"""Joint denoising: the denoiser in front of frozen networks, transforms, and the errors of each."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastden.joint import FrozenTask, JointDenoiser, JointLoss
from fastden.network.model import Denoiser
from fastden.ops.backends import requested, use_backend
from tests.helpers import classifier, labelled_batch, normalise, random_network, segmenter


class Asked(nn.Module):
    """Notes the backend that its operators would run on."""

    def __init__(self) -> None:
        super().__init__()
        self.backends: list[str | None] = []

    def forward(self, x: Tensor) -> Tensor:
        self.backends.append(requested())
        return x


class TestInPlace:
    """The denoised image that is returned is the one that was denoised."""

    @pytest.mark.parametrize("grad", [True, False])
    def test_a_network_that_changes_its_input(self, grad: bool) -> None:
        noisy = labelled_batch()[0]
        in_place = nn.Sequential(nn.ReLU(inplace=True), *classifier())
        with torch.set_grad_enabled(grad):
            with pytest.raises(ValueError, match=r"b: it changes its input in place, .*or preprocess=torch\.clone"):
                JointDenoiser(nn.Conv2d(3, 3, 1), {"a": classifier(), "b": in_place})(noisy)
            joint = JointDenoiser(nn.Conv2d(3, 3, 1), in_place, torch.clone)
            assert torch.equal(joint(noisy).denoised, joint.denoiser(noisy))

    def test_a_preprocess_that_changes_its_input(self) -> None:
        noisy = labelled_batch()[0]
        joint = JointDenoiser(nn.Conv2d(3, 3, 1), classifier(), lambda x: x.sub_(0.5).div_(0.25))
        with pytest.raises(ValueError, match=r"preprocess of task: .*nothing in place\)"):
            joint(noisy)
        with torch.no_grad(), pytest.raises(ValueError, match="task: it changes its input in place"):
            joint(noisy)
        with torch.inference_mode():  # where nothing counts the changes
            joint(noisy)


class TestJointDenoiser:
    def test_a_network_that_is_a_module_dict(self) -> None:
        """Such as one that gives the features of a trunk."""

        class Features(nn.ModuleDict):
            def forward(self, x: Tensor) -> Tensor:
                for layer in self.values():
                    x = layer(x)
                return x

        network = Features({"conv": nn.Conv2d(3, 8, 1), "relu": nn.ReLU()})
        joint = JointDenoiser(nn.Identity(), network)
        noisy = labelled_batch()[0]
        assert torch.equal(joint(noisy).prediction, network(noisy))
        traced = torch.fx.symbolic_trace(FrozenTask(network))
        assert torch.equal(traced(noisy), network(noisy))

    def test_networks_in_a_module_dict(self) -> None:
        noisy = labelled_batch()[0]
        joint = JointDenoiser(nn.Conv2d(3, 3, 1), nn.ModuleDict({"a": classifier(), "b": segmenter()}))
        assert set(joint(noisy).predictions) == {"a", "b"}

    def test_backend_is_that_of_the_denoiser_alone(self) -> None:
        denoiser, task = Asked(), Asked()
        noisy = labelled_batch()[0]
        for backend in (None, "torch", "triton", "cuda"):
            JointDenoiser(denoiser, task, backend=backend)(noisy)
        assert denoiser.backends == [None, "torch", "triton", "cuda"]
        assert set(task.backends) == {None}
        with pytest.raises(ValueError, match=r"backend: 'cublas'; accepted: torch, triton, cuda, or None"):
            JointDenoiser(denoiser, task, backend="cublas")

    def test_is_the_task_behind_the_denoiser(self) -> None:
        denoiser, task = random_network().eval(), classifier()
        noisy, _, _ = labelled_batch()
        output = JointDenoiser(denoiser, task, normalise)(noisy, 0.1)
        assert torch.equal(output.denoised, denoiser(noisy, 0.1))
        assert torch.equal(output.prediction, task.eval()(normalise(output.denoised)))
        assert list(output.predictions) == ["task"]

    def test_several_tasks(self) -> None:
        tasks = {"class": classifier(), "map": segmenter()}
        output = JointDenoiser(random_network(), tasks, {"class": normalise})(labelled_batch()[0], 0.1)
        assert {name: tuple(value.shape) for name, value in output.predictions.items()} == {
            "class": (4, 5),
            "map": (4, 4, 10, 12),
        }
        with pytest.raises(ValueError, match=r"prediction: there are several \(class, map\)"):
            _ = output.prediction

    def test_blind_denoiser(self) -> None:
        denoiser = random_network(noise_level_input=False)
        noisy, _, _ = labelled_batch()
        assert torch.equal(JointDenoiser(denoiser, classifier())(noisy).denoised, denoiser(noisy))

    def test_any_module_denoises(self) -> None:
        joint = JointDenoiser(nn.Conv2d(3, 3, 1), classifier())
        assert joint(labelled_batch()[0]).denoised.shape == (4, 3, 20, 24)

    def test_gradient_is_that_of_the_chain(self) -> None:
        """It equals the computation written out, in float64, from the classifier's loss to all parameters."""
        denoiser, task = random_network(dtype=torch.float64, composed=True), classifier().double()
        noisy, clean, labels = (value.double() if value.is_floating_point() else value for value in labelled_batch())
        joint = JointDenoiser(denoiser, task, normalise).train()
        terms = JointLoss(0.3, "classification", F.mse_loss)(joint(noisy, 0.1), clean, labels)
        terms.total.backward()

        other = copy.deepcopy(denoiser)
        other.zero_grad()
        y = other.train()(noisy, 0.1)
        # The built-in loss computes in float32.
        expected = (y - clean).square().mean() + 0.3 * F.cross_entropy(task.eval()(normalise(y)), labels)
        expected.backward()
        assert terms.total.item() == pytest.approx(expected.item(), rel=1e-6)
        gradients = {name: parameter.grad for name, parameter in denoiser.named_parameters()}
        wanted = {name: parameter.grad for name, parameter in other.named_parameters()}
        largest = max(float(gradient.abs().max()) for gradient in wanted.values() if gradient is not None)
        for name, gradient in wanted.items():
            torch.testing.assert_close(gradients[name], gradient, rtol=1e-5, atol=1e-6 * largest, msg=name)

    def test_task_stays_as_it_is(self) -> None:
        """Training steps and calls of train() leave its parameters, statistics and mode."""
        task = classifier()
        before = copy.deepcopy(task.state_dict())
        joint = JointDenoiser(Denoiser(), task, normalise).train()
        assert joint.denoiser.training
        loss = JointLoss(1.0, "classification")
        optimizer = torch.optim.Adam(joint.parameters(), 1e-2)
        first = copy.deepcopy(joint.denoiser.state_dict())
        for seed in range(3):
            noisy, clean, labels = labelled_batch(seed)
            optimizer.zero_grad()
            loss(joint.train()(noisy, 0.1), clean, labels).total.backward()
            optimizer.step()
        assert all(torch.equal(value, before[name]) for name, value in task.state_dict().items())
        assert all(parameter.grad is None for parameter in task.parameters())
        assert not any(module.training for module in task.modules())
        assert not torch.equal(joint.denoiser.state_dict()["out.weight"], first["out.weight"])
        assert not torch.equal(joint.denoiser.state_dict()["conv1.bn.running_mean"], first["conv1.bn.running_mean"])

    def test_frozen_preprocess(self) -> None:
        scale = nn.BatchNorm2d(3)
        joint = JointDenoiser(Denoiser(), classifier(), scale).train()
        joint(labelled_batch()[0], 0.1)
        assert not scale.training
        assert not scale.weight.requires_grad
        assert torch.equal(scale.running_mean, torch.zeros(3))

    def test_prediction_is_repeatable(self) -> None:
        joint = JointDenoiser(random_network().eval(), classifier(), normalise).train()
        joint.denoiser.eval()
        noisy = labelled_batch()[0]
        assert torch.equal(joint(noisy, 0.1).prediction, joint(noisy, 0.1).prediction)

    def test_compiles(self) -> None:
        joint = JointDenoiser(random_network().eval(), classifier(), normalise)
        noisy, clean, labels = labelled_batch()
        loss = JointLoss(0.1, "classification")

        def step(noisy: Tensor, clean: Tensor, labels: Tensor) -> Tensor:
            return loss(joint(noisy, 0.1), clean, labels).total

        compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
        assert compiled(noisy, clean, labels).item() == pytest.approx(step(noisy, clean, labels).item(), rel=1e-5)

    @pytest.mark.parametrize("way", ["block around the call", "denoiser alone"])
    def test_compiles_without_a_break_on_a_named_backend(self, way: str) -> None:
        joint = JointDenoiser(random_network().eval(), classifier(), backend=None if "block" in way else "torch")
        noisy = labelled_batch()[0]
        expected = joint(noisy, 0.1)
        called: Any = joint
        if way == "denoiser alone":
            joint.denoiser = torch.compile(joint.denoiser, fullgraph=True, backend="eager")  # type: ignore[assignment]
        else:
            called = torch.compile(joint, fullgraph=True, backend="eager")
        with use_backend("torch") if "block" in way else nullcontext():
            output = called(noisy, 0.1)
        torch.testing.assert_close(output.denoised, expected.denoised)
        torch.testing.assert_close(output.prediction, expected.prediction)

    @pytest.mark.parametrize("where", ["task", "preprocess"])
    def test_parameters_of_the_denoiser_in_a_task(self, where: str) -> None:
        """They would be frozen, and the denoiser would learn nothing."""
        denoiser = nn.Conv2d(3, 3, 3)
        parts: Any = (
            {"task": nn.Sequential(denoiser, classifier())}
            if where == "task"
            else {"task": {"a": classifier(), "b": classifier()}, "preprocess": {"b": nn.Sequential(denoiser)}}
        )
        message = r"task: shares 2 parameters with the denoiser, which would be frozen; accepted: networks apart"
        with pytest.raises(ValueError, match=message):
            JointDenoiser(denoiser, **parts)
        assert all(parameter.requires_grad for parameter in denoiser.parameters())
        denoiser.requires_grad_(False)  # then nothing is lost
        JointDenoiser(denoiser, **parts)

    @pytest.mark.parametrize(
        ("arguments", "error", "message"),
        [
            ((abs, classifier()), TypeError, r"denoiser: builtin_function_or_method; accepted: a torch\.nn\.Module"),
            ((nn.Identity(), abs), TypeError, r"task: builtin_function_or_method; accepted: a torch\.nn\.Module"),
            ((nn.Identity(), {"a": abs}), TypeError, r"a: builtin_function_or_method"),
            ((nn.Identity(), {}), ValueError, r"task: an empty mapping"),
            ((nn.Identity(), classifier(), 3), TypeError, r"preprocess of task: int"),
            ((nn.Identity(), {"a": classifier()}, {"b": normalise}), ValueError, r"preprocess: b; accepted names: a"),
        ],
    )
    def test_bad_arguments(self, arguments: tuple[Any, ...], error: type[Exception], message: str) -> None:
        with pytest.raises(error, match=message):
            JointDenoiser(*arguments)


class TestFrozenTask:
    def test_thawed_parameter(self) -> None:
        task = classifier()
        joint = JointDenoiser(Denoiser(), task)
        task[6].weight.requires_grad_(True)
        with pytest.raises(ValueError, match=r"task: 1 parameters require gradients \(network\.6\.weight, \.\.\.\)"):
            joint(labelled_batch()[0], 0.1)

    def test_task_in_training_mode(self) -> None:
        task = classifier()
        joint = JointDenoiser(Denoiser(), task)
        task[1].train()
        with pytest.raises(ValueError, match=r"task: 1 modules are in training mode \(network\.1, \.\.\.\)"):
            joint(labelled_batch()[0], 0.1)

    def test_a_program_of_torch_export(self) -> None:
        program = torch.export.export(nn.Conv2d(3, 4, 3).eval(), (torch.rand(2, 3, 8, 8),)).module()
        with pytest.raises(
            ValueError, match=r"^a: \w+ has no evaluation mode .*; accepted: modules with eval\(\), such"
        ):
            JointDenoiser(nn.Conv2d(3, 3, 1), {"a": program})

    def test_train_has_no_effect(self) -> None:
        task = FrozenTask(classifier())
        assert task.train() is task
        assert not any(module.training for module in task.modules())

    @pytest.mark.parametrize("name", ["a.b", "", "keys", "training"])
    def test_names_that_cannot_be_registered(self, name: str) -> None:
        with pytest.raises(ValueError, match=r"task: task named .*; accepted: text without dots"):
            JointDenoiser(nn.Identity(), {name: classifier()})

    def test_preprocess_is_registered_and_frozen(self) -> None:
        class Scale(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.factor = nn.Parameter(torch.ones(()))

            def forward(self, x: Tensor) -> Tensor:
                return x * self.factor

        joint = JointDenoiser(random_network(), classifier(), Scale())
        assert "tasks.task.preprocess.factor" in joint.state_dict()
        assert not joint.tasks["task"].preprocess.factor.requires_grad


class TestTransforms:
    def test_first_call_under_grad(self) -> None:
        joint = JointDenoiser(random_network(), classifier(), normalise)
        loss = JointLoss(0.1, "classification")
        noisy, clean, labels = labelled_batch()
        parameters = {name: value.detach() for name, value in joint.named_parameters() if "denoiser" in name}

        def total(parameters: dict[str, Tensor]) -> Tensor:
            return loss(torch.func.functional_call(joint, parameters, (noisy, 0.1)), clean, labels).total

        gradients = torch.func.grad(total)(parameters)
        assert bool(gradients["denoiser.out.weight"].any())

    def test_gradients_of_each_sample(self) -> None:
        joint = JointDenoiser(random_network().eval(), classifier())
        loss = JointLoss(0.1, "classification")
        noisy, clean, labels = labelled_batch()
        parameters = {name: value.detach() for name, value in joint.named_parameters() if "denoiser" in name}

        def total(parameters: dict[str, Tensor], x: Tensor, y: Tensor, label: Tensor) -> Tensor:
            output = torch.func.functional_call(joint, parameters, (x[None], 0.1))
            return loss(output, y[None], label[None]).total

        each = torch.func.vmap(torch.func.grad(total), (None, 0, 0, 0))(parameters, noisy, clean, labels)
        one = torch.func.grad(total)(parameters, noisy[1], clean[1], labels[1])
        for name, value in one.items():
            torch.testing.assert_close(each[name][1], value, rtol=1e-3, atol=1e-4, msg=name)
