"""Joint denoising: gradients have to pass through preprocessing and frozen networks, which is checked once."""

from __future__ import annotations

import copy
import pickle
import random
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fastden.joint import FrozenTask, JointDenoiser, JointLoss, JointOutput, check_preprocess
from fastden.network.model import Denoiser
from tests.helpers import classifier, labelled_batch, normalise, segmenter


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
