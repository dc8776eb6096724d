"""Joint denoising: the denoiser in front of frozen networks, preprocessing, transforms and the errors of each."""

from __future__ import annotations

import copy
import pickle
import random
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fastden.joint import FrozenTask, JointDenoiser, JointLoss, JointOutput, check_preprocess
from fastden.network.model import Denoiser
from fastden.ops.backends import requested, use_backend
from tests.helpers import labelled_batch, random_network


def classifier(classes: int = 5, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, stride=2),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Dropout(0.5),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(6, classes),
    )


def segmenter(classes: int = 4) -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Conv2d(3, classes, 3, stride=2, padding=1), nn.BatchNorm2d(classes))


def normalise(images: Tensor) -> Tensor:
    return F.interpolate((images - 0.5) / 0.25, size=16, mode="bilinear", align_corners=False)


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


class TestPreprocess:
    @pytest.mark.parametrize(
        ("preprocess", "message"),
        [
            (lambda x: x.detach(), "no gradient passes through it"),
            (lambda x: torch.from_numpy(x.detach().numpy()), "no gradient passes through it"),
            (lambda x: torch.from_numpy(x.numpy()), "Can't call numpy"),
            (lambda x: (x * 255).round(), "its gradient is zero everywhere"),
            (lambda x: (x > 0.5).float() + 0 * x, "its gradient is zero everywhere"),
            (lambda x: x * 0 + torch.rand(1, requires_grad=True), "its gradient is zero everywhere"),
            (lambda x: (x - x).sqrt() + x, "its gradient is not finite"),
        ],
    )
    def test_broken_chain(self, preprocess: Any, message: str) -> None:
        joint = JointDenoiser(Denoiser(), classifier(), preprocess)
        with pytest.raises(ValueError, match=rf"preprocess of task: {message}.*accepted: differentiable"):
            joint(labelled_batch()[0], 0.1)

    def test_not_a_tensor(self) -> None:
        with pytest.raises(TypeError, match=r"preprocess of task: returned list; accepted: a tensor"):
            check_preprocess(lambda x: [x], torch.rand(1, 3, 8, 8))  # type: ignore[arg-type, return-value]

    def test_failure_of_its_own_is_not_hidden(self) -> None:
        def failing(images: Tensor) -> Tensor:
            raise RuntimeError("my own mistake")

        with pytest.raises(RuntimeError, match="my own mistake"):
            check_preprocess(failing, torch.rand(1, 3, 8, 8))

    def test_subtracted_mean_is_accepted(self) -> None:
        check_preprocess(lambda x: x - x.mean(), torch.rand(2, 3, 8, 8))

    @pytest.mark.parametrize(
        "preprocess", [lambda x: (x.clamp(0, 1) - 0.5) / 0.25, lambda x: x - x.mean(0, keepdim=True)]
    )
    @pytest.mark.parametrize("count", [0, 4])
    def test_what_stops_the_gradient_of_some_images_is_accepted(self, preprocess: Any, count: int) -> None:
        """The first one, or all, may be beyond white; an empty batch has no gradient."""
        for images in (torch.full((count, 3, 8, 8), 1.02), torch.rand(count, 3, 8, 8)):
            images[:1] = 1.02
            JointDenoiser(nn.Identity(), classifier(), preprocess)(images)

    def test_one_for_each_task_in_a_module_dict(self) -> None:
        noisy = labelled_batch()[0]
        tasks = {"a": classifier(), "b": segmenter()}
        norm = nn.InstanceNorm2d(3)
        joint = JointDenoiser(nn.Identity(), tasks, nn.ModuleDict({"b": norm}))
        predictions = joint(noisy).predictions
        assert torch.equal(predictions["a"], tasks["a"](noisy))
        assert torch.equal(predictions["b"], tasks["b"](norm(noisy)))
        with pytest.raises(ValueError, match="preprocess: c; accepted names: a, b"):
            JointDenoiser(nn.Identity(), tasks, nn.ModuleDict({"c": norm}))

    def test_is_checked_once(self) -> None:
        calls = []

        def counting(images: Tensor) -> Tensor:
            calls.append(len(images))
            return images

        joint = JointDenoiser(Denoiser(), classifier(), counting)
        with torch.no_grad():
            joint(labelled_batch()[0], 0.1)
        assert calls == [4]
        joint(labelled_batch()[0], 0.1)
        joint(labelled_batch()[0], 0.1)
        assert calls == [4, 4, 4, 4, 4]  # in front of the first training batch: alone, and with the network


class Wrapped(nn.Module):
    """A network whose prediction is what a function makes of that of another."""

    def __init__(self, function: Any, network: nn.Module) -> None:
        super().__init__()
        self.function, self.network = function, network

    def forward(self, x: Tensor) -> Any:
        return self.function(self.network, x)


class TestGradientOfTheNetwork:
    """Without one the loss has a value all the same, and the denoiser learns nothing from the task."""

    @pytest.mark.parametrize(
        ("function", "message"),
        [
            (torch.no_grad()(lambda network, x: network(x)), "no gradient passes through the network"),
            (lambda network, x: network(x).argmax(1), "no gradient passes through the network"),
            (lambda network, x: {"a": [network(x).detach()]}, "no gradient passes through the network"),
            (lambda network, x: network((x * 255).round()), "the gradient through the network is zero everywhere"),
        ],
    )
    def test_none(self, function: Any, message: str) -> None:
        joint = JointDenoiser(nn.Conv2d(3, 3, 1), {"a": classifier(), "b": Wrapped(function, classifier())})
        noisy = labelled_batch()[0]
        with torch.no_grad():
            joint(noisy)
        with pytest.raises(ValueError, match=f"^b: {message}; accepted: a network whose prediction can be diff"):
            joint(noisy)

    @pytest.mark.filterwarnings("ignore")  # both ways are deprecated
    def test_networks_made_for_inference(self) -> None:
        network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 4)).eval()
        integers = torch.ao.quantization.quantize_dynamic(network, {nn.Linear})
        optimised = torch.jit.optimize_for_inference(torch.jit.script(network))
        for task in (integers, optimised):
            with pytest.raises(ValueError, match=r"^task: .*gradient .*through the network"):
                JointDenoiser(nn.Conv2d(3, 3, 1), task)(labelled_batch()[0])

    @pytest.mark.parametrize(
        "function",
        [
            lambda network, x: {"a": [network(x)], "b": network(x).argmax(1)},
            lambda network, x: JointLoss,  # an object that holds no tensor may be anything
            lambda network, x: network(x.sub(0.3).relu()),  # of dark images all is cut off
            lambda network, x: network(x) - torch.tensor([0, 0, 0, 0, torch.inf]),
            lambda network, x: 1e-4 * (1e-4 * network(x).half()),  # float16 ends at 6e-8
        ],
    )
    def test_accepted(self, function: Any) -> None:
        joint = JointDenoiser(nn.Identity(), Wrapped(function, classifier()))
        joint(0.1 * labelled_batch()[0])

    @pytest.mark.parametrize("where", ["network", "preprocess"])
    def test_reentrant_checkpoints_are_accepted(self, where: str) -> None:
        """torch.autograd.grad refuses them at all times; what is trained beside them keeps its gradients."""
        noisy, clean, labels = labelled_batch()
        body = nn.Sequential(nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3)).eval().requires_grad_(False)
        scale = nn.Parameter(torch.ones(()))
        scale.grad = torch.tensor(7.0)

        def passed(x: Tensor, reentrant: bool) -> Tensor:
            return scale.detach() * checkpoint(body, scale * x, use_reentrant=reentrant)

        gradients = []
        for reentrant in (True, False):
            own = lambda x: passed(x, reentrant)  # noqa: B023, E731
            network = Wrapped(lambda network, x: network(own(x)), classifier()) if where == "network" else classifier()  # noqa: B023
            joint = JointDenoiser(nn.Conv2d(3, 3, 1), network, own if where == "preprocess" else None)
            joint.denoiser.load_state_dict({"weight": torch.eye(3)[..., None, None], "bias": torch.zeros(3)})
            joint.check(noisy)
            assert scale.grad == 7
            JointLoss(1, "classification")(joint(noisy), clean, labels).total.backward()
            gradients.append(joint.denoiser.weight.grad)
            scale.grad = torch.tensor(7.0)
        assert bool(gradients[0].any())
        torch.testing.assert_close(*gradients)

    @pytest.mark.parametrize(("part", "reentrant"), [("joint", False), ("task", False), ("task", True)])
    def test_inside_of_a_checkpoint(self, part: str, reentrant: bool) -> None:
        """The first batch has the gradients of the second, without an error."""
        noisy, clean, labels = labelled_batch()
        joint = JointDenoiser(nn.Conv2d(3, 3, 1), classifier(), normalise)
        gradients = []
        for _ in range(2):
            joint.zero_grad()
            if part == "joint":
                output = checkpoint(joint, noisy, use_reentrant=reentrant)
            else:
                denoised = joint.denoiser(noisy)
                output = JointOutput(
                    denoised, {"task": checkpoint(joint.tasks["task"], denoised, use_reentrant=reentrant)}
                )
            JointLoss(1, "classification")(output, clean, labels).total.backward()
            gradients.append(joint.denoiser.weight.grad)
        torch.testing.assert_close(*gradients)

    def test_check_in_front_of_a_compiled_joint(self) -> None:
        """Compiled code verifies nothing, and a checked network is not checked again."""
        noisy = labelled_batch()[0]
        joint = JointDenoiser(nn.Conv2d(3, 3, 1), {"a": classifier(), "b": classifier()}, {"b": torch.round})
        compiled = torch.compile(joint, backend="eager")
        compiled(noisy)
        for called in (joint, compiled):
            with torch.no_grad(), pytest.raises(ValueError, match="preprocess of b: its gradient is zero everywhere"):
                called.check(noisy)
        calls: list[int] = []
        counting = Wrapped(lambda network, x: calls.append(len(x)) or network(x), classifier())
        joint = JointDenoiser(nn.Conv2d(3, 3, 1), counting)
        joint.check(noisy[:2])
        joint(noisy)
        assert calls == [2, 4]

    def test_replicas_of_data_parallel_are_checked_once(self) -> None:
        """Copies go on from what they were copied of, each by itself."""
        calls: list[int] = []
        task = FrozenTask(Wrapped(lambda network, x: calls.append(len(x)) or network(x), classifier()))
        fresh, pickled = copy.deepcopy(task), pickle.loads(pickle.dumps(FrozenTask(classifier())))
        images = labelled_batch()[0].requires_grad_()
        for _ in range(2):
            replica = task._replicate_for_data_parallel()
            replica._modules = dict(task._modules)
            replica(images)
        assert len(calls) == 3
        assert [each._mark.verified for each in (task, fresh, pickled)] == [True, False, False]
        fresh(images)
        assert len(calls) == 5
        copy.deepcopy(task)(images)
        assert len(calls) == 6

    def test_the_check_draws_no_random_numbers(self) -> None:
        """Else a resumed training, which checks again, would go on with others."""

        def drawn() -> tuple[float, float, float]:
            return random.random(), float(np.random.rand()), float(torch.rand(()))  # noqa: NPY002

        function = Wrapped(lambda network, x: network(x + sum(drawn()) * torch.rand_like(x)), classifier())
        joint = JointDenoiser(nn.Conv2d(3, 3, 1), function, lambda x: x + sum(drawn()))
        found = []
        for check in (False, True):
            random.seed(0)
            np.random.seed(0)  # noqa: NPY002
            torch.manual_seed(0)
            if check:
                joint.check(labelled_batch()[0])
            found.append(drawn())
        assert found[0] == found[1]

    @pytest.mark.parametrize("nested", [False, True])
    def test_a_gradient_passes_by_one_of_several_tensors(self, nested: bool) -> None:
        """In attributes and slots of objects too; a nested tensor is not weighed."""

        class Slots:
            __slots__ = ("fields", "missing")

            def __init__(self, tensor: Tensor) -> None:
                self.fields = {"boxes": [tensor], "labels": tensor.argmax(1)}

        class Found:
            def __init__(self, tensor: Tensor) -> None:
                self.size, self.me = torch.tensor([9, 9]), self
                self.slots = Slots(tensor)

        def found(network: nn.Module, x: Tensor) -> Any:
            result = network(x)
            if nested:
                result = torch.nested.as_nested_tensor([result[0], result[1, :2]], layout=torch.jagged)
                return {"boxes": result, "size": torch.tensor([9, 9])}
            return Found(result)

        JointDenoiser(nn.Identity(), Wrapped(found, classifier()))(torch.rand(2, 3, 9, 9))
        if not nested:
            blind = Wrapped(lambda network, x: Found(network(x).detach()), classifier())
            with pytest.raises(ValueError, match="no gradient passes through the network"):
                JointDenoiser(nn.Identity(), blind)(torch.rand(2, 3, 9, 9))

    def test_want_of_memory_is_no_fault_of_the_network(self) -> None:
        class Large(torch.autograd.Function):
            @staticmethod
            def forward(context: Any, x: Tensor) -> Tensor:
                return x * 1

            @staticmethod
            def backward(context: Any, *gradients: Tensor) -> Tensor:
                raise torch.OutOfMemoryError("CUDA out of memory")

        joint = JointDenoiser(nn.Identity(), Wrapped(lambda network, x: network(Large.apply(x)), classifier()))
        with pytest.raises(torch.OutOfMemoryError):
            joint.check(torch.rand(2, 3, 9, 9))

    def test_check_looks_at_the_mode_first(self) -> None:
        joint = JointDenoiser(nn.Identity(), classifier())
        images = torch.rand(2, 3, 9, 9)
        with torch.inference_mode(), pytest.raises(RuntimeError, match=r"task: check within torch\.inference_mode"):
            joint.check(images)
        network = joint.tasks["task"].network
        network[1].train()
        before = network[1].running_mean.clone()
        with pytest.raises(ValueError, match=r"task: 1 modules are in training mode"):
            joint.check(images)
        assert torch.equal(network[1].running_mean, before)

    def test_an_empty_batch_says_nothing(self) -> None:
        joint = JointDenoiser(nn.Identity(), Wrapped(torch.no_grad()(lambda network, x: network(x)), classifier()))
        joint(torch.rand(0, 3, 8, 8))
        with pytest.raises(ValueError, match="no gradient passes"):
            joint(torch.rand(1, 3, 8, 8))


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
