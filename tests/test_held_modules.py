"""Joint denoising: modules that losses hold are trained, saved, copied and frozen with them."""

from __future__ import annotations

import copy
from collections import namedtuple
from contextlib import nullcontext
from functools import partial, wraps
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastden.joint import JointLoss, JointOutput
from tests.helpers import labelled_batch


class TestModules:
    """Modules that losses hold are trained, saved and moved with them."""

    class Learned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.log_variance = nn.Parameter(torch.zeros(()))

        def forward(self, prediction: Tensor, target: Tensor) -> Tensor:
            return F.cross_entropy(prediction, target) * (-self.log_variance).exp() + self.log_variance

    def test_modules_are_registered(self) -> None:
        weights = torch.rand(5)
        loss = JointLoss(0.1, {"a": nn.CrossEntropyLoss(weight=weights), "b": self.Learned(), "c": "classification"})
        assert [name for name, _ in loss.named_parameters()] == ["task_losses.b.log_variance"]
        assert set(loss.state_dict()) == {"task_losses.a.weight", "task_losses.b.log_variance"}
        assert loss.double().task_losses["a"].weight.dtype == torch.float64
        assert not loss.eval().task_losses["b"].training

    def test_what_a_function_holds_is_registered(self) -> None:
        class Held:
            def __init__(self) -> None:
                self.scale = nn.Parameter(torch.ones(1))
                self.layer = nn.Linear(2, 2)

            def __call__(self, prediction: Tensor, target: Tensor) -> Tensor:
                return (self.layer(prediction) * self.scale - target).mean()

        layer = nn.Linear(2, 2)

        def with_module(prediction: Tensor, target: Tensor, module: nn.Module) -> Tensor:
            return (module(prediction) - target).mean()

        assert len(list(JointLoss(1.0, Held()).parameters())) == 3
        for function in (lambda p, t: (layer(p) - t).mean(), partial(with_module, module=layer)):
            loss = JointLoss(1.0, function)
            assert set(map(id, loss.parameters())) == set(map(id, layer.parameters()))
            assert loss.double().task_losses["task"](torch.ones(1, 2).double(), 0).dtype == torch.float64
            layer.float()
        assert not list(JointLoss(1.0, F.l1_loss).children())[1].state_dict()

    @pytest.mark.parametrize("hide", [lambda module: module.forward, partial, lambda m: partial(partial(m.forward))])
    def test_modules_behind_functions_are_registered(self, hide: Any) -> None:
        loss = JointLoss(0.1, hide(self.Learned()), denoise_loss=hide(nn.L1Loss()))
        assert len(list(loss.parameters())) == len(loss.state_dict()) == 1
        assert any(isinstance(module, nn.L1Loss) for module in loss.modules())

    def test_modules_behind_decorators_and_in_lists(self) -> None:
        def logged(function: Any) -> Any:
            @wraps(function)
            def call(*arguments: Any) -> Any:
                return function(*arguments)

            return call

        learned, layers = self.Learned(), [nn.Linear(2, 2), nn.Linear(2, 2)]
        by_name = {"a": {"b": nn.Linear(2, 2)}}
        for function, count in (
            (logged(learned), 1),
            (logged(logged(learned.forward)), 1),
            (lambda p, t: sum((layer(p) - t).mean() for layer in layers), 4),
            (lambda p, t: (by_name["a"]["b"](p) - t).mean(), 2),
        ):
            loss = JointLoss(1.0, function)
            copied = copy.deepcopy(loss)
            assert len(list(loss.parameters())) == len(loss.state_dict()) == count
            clean = labelled_batch()[1]
            output, target = JointOutput(clean, {"task": torch.rand(2, 2)}), torch.tensor([[0.0, 1.0], [1.0, 0.0]])
            copied(output, clean, target).total.backward()
            assert all(parameter.grad is not None for parameter in copied.parameters())
            assert all(parameter.grad is None for parameter in loss.parameters())

    @pytest.mark.parametrize("how", ["method", "closure"])
    def test_a_method_of_the_module_that_holds_the_loss(self, how: str) -> None:
        """As training modules are often written. The loss is no ancestor of its own ancestor."""

        class Training(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.layer, beside = nn.Linear(2, 2), nn.Linear(2, 2)
                closure = lambda p, t: self.task_loss(p, t) + beside(p).mean()  # noqa: E731
                self.loss = JointLoss(1.0, self.task_loss if how == "method" else closure)

            def task_loss(self, prediction: Tensor, target: Tensor) -> Tensor:
                return (self.layer(prediction) - target).mean()

        module = Training()
        own = 0 if how == "method" else 2
        assert len(list(module.loss.parameters())) == own
        assert len(list(module.parameters())) == 2 + own
        module = Training()
        assert len(module.state_dict()) == 2 + own
        Training().load_state_dict(module.state_dict())
        assert not Training().eval().loss.training
        assert Training().double().layer.weight.dtype == torch.float64
        assert "Linear" in repr(Training())
        copied = copy.deepcopy(Training())
        clean = labelled_batch()[1]
        copied.loss(JointOutput(clean, {"task": torch.ones(2, 2)}), clean, torch.zeros(2, 2)).total.backward()
        assert copied.layer.weight.grad is not None

    @pytest.mark.parametrize("hide", [lambda f: f, partial])
    def test_copies_of_closures_have_their_own_parameters(self, hide: Any) -> None:
        scale, layer = nn.Parameter(torch.tensor(2.0)), nn.Linear(2, 2)
        loss = JointLoss(1.0, hide(lambda p, t: scale * (layer(p) - t).abs().mean()))
        clean = labelled_batch()[1]
        output = JointOutput(clean, {"task": torch.ones(2, 2)})
        copied = copy.deepcopy(loss)
        before = loss(output, clean, torch.zeros(2, 2)).total
        assert torch.equal(copied(output, clean, torch.zeros(2, 2)).total, before)
        with torch.no_grad():
            for parameter in copied.parameters():
                parameter.mul_(10)
        after = copied(output, clean, torch.zeros(2, 2)).total
        assert after > 5 * before
        after.backward()
        assert all(parameter.grad is not None for parameter in copied.parameters())
        assert all(parameter.grad is None for parameter in loss.parameters())
        assert torch.equal(loss(output, clean, torch.zeros(2, 2)).total, before)

    @pytest.mark.parametrize(
        "case",
        [
            "keyword",
            "object",
            "its list",
            "its method",
            "mapping",
            "tuple",
            "named tuple",
            "default",
            "keyword default",
        ],
    )
    def test_copies_of_functions_behind_others_have_their_own_parameters(self, case: str) -> None:
        class Held:
            def __init__(self, inner: Any) -> None:
                self.inner, self.several = inner, [inner]

            def __call__(self, prediction: Tensor, target: Tensor) -> Tensor:
                return self.inner(prediction, target)

            def first(self, prediction: Tensor, target: Tensor) -> Tensor:
                return self.several[0](prediction, target)

        class Layers(dict[str, nn.Module]):
            def __call__(self, prediction: Tensor, target: Tensor) -> Tensor:
                return (self["layer"](prediction) - target).square().mean()

        def task_loss() -> Any:  # its variables are local: the closures in it capture the layer alone
            layer = nn.Linear(2, 2)
            inner: Any = lambda p, t: (layer(p) - t).square().mean()  # noqa: E731
            return {
                "keyword": partial(lambda p, t, inner: inner(p, t), inner=inner),
                "object": Held(inner),
                "its list": partial(lambda p, t, held: held(p, t), held=Held(inner).first),
                "its method": Held(inner).first,
                "tuple": partial(lambda p, t, held: held[0](p, t), held=(inner,)),
                "named tuple": partial(lambda p, t, held: held.inner(p, t), held=namedtuple("Held", "inner")(inner)),
                "mapping": partial(lambda p, t, held: held(p, t), held=Layers(layer=layer)),
                "default": lambda p, t, layer=layer: (layer(p) - t).square().mean(),
                "keyword default": lambda p, t, *, inner=inner: inner(p, t),
            }[case]

        loss, clean = JointLoss(1.0, task_loss()), labelled_batch()[1]
        output = JointOutput(clean, {"task": torch.ones(2, 2)})
        assert len(list(loss.parameters())) == 2
        for name, own in (("original", loss), ("copy", copy.deepcopy(loss)), ("copy of it", copy.deepcopy(loss))):
            own.zero_grad()
            own(output, clean, torch.zeros(2, 2)).total.backward()
            assert all(parameter.grad is not None for parameter in own.parameters()), name
            loss.zero_grad()
        assert all(parameter.grad is None for parameter in loss.parameters())
        double = copy.deepcopy(loss).double()
        ones = torch.ones(2, 2).double()
        assert double(JointOutput(clean, {"task": ones}), clean, ones).tasks["task"].dtype == torch.float64

    def test_copies_of_objects_that_hold_themselves(self) -> None:
        class Held:
            def __init__(self) -> None:
                self.layer = nn.Linear(2, 2)
                self.again, self.function = self.loss, lambda p, t: self.loss(p, t).clone()

            def loss(self, prediction: Tensor, target: Tensor) -> Tensor:
                return (self.layer(prediction) - target).square().mean()

        loss, clean = JointLoss(1.0, Held().again), labelled_batch()[1]
        copied = copy.deepcopy(loss)
        assert (
            copied.task_losses["task"].function.__self__.again.__self__ is copied.task_losses["task"].function.__self__
        )
        copied(JointOutput(clean, {"task": torch.ones(2, 2)}), clean, torch.zeros(2, 2)).total.backward()
        assert all(parameter.grad is not None for parameter in copied.parameters())
        assert all(parameter.grad is None for parameter in loss.parameters())

    def test_a_frozen_network_that_was_never_put_into_evaluation_mode(self) -> None:
        """Its statistics stay; what is trained keeps its mode."""
        frozen = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).requires_grad_(False)
        trained = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))

        class Holder(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.frozen = nn.Conv2d(3, 3, 1).requires_grad_(False)
                self.loss = JointLoss(1, "classification", self.features)

            def features(self, denoised: Tensor, clean: Tensor) -> Tensor:
                return self.frozen(denoised - clean).square().mean()

        _, clean, labels = labelled_batch()
        before = copy.deepcopy(frozen.state_dict()), copy.deepcopy(trained.state_dict())
        loss = JointLoss(1, "classification", lambda p, t: (frozen(p) - frozen(t)).abs().mean() + trained(p).mean())
        holder = Holder()
        for each in (loss, holder.loss):
            each(JointOutput(clean, {"task": torch.zeros(4, 5)}), clean, labels)
        assert all(torch.equal(value, before[0][name]) for name, value in frozen.state_dict().items())
        assert not torch.equal(trained[1].running_mean, before[1]["1.running_mean"])
        assert holder.training

    @pytest.mark.parametrize("how", ["compiled", "transformed"])
    def test_a_frozen_network_in_code_that_is_compiled_or_transformed(self, how: str) -> None:
        """The loss is that of eager code, and the network has its mode again."""
        frozen = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).requires_grad_(False)
        loss = JointLoss(1, "classification", lambda p, t: F.mse_loss(frozen(p), frozen(t)))
        denoised, clean, labels = labelled_batch()
        prediction = torch.zeros(4, 5)

        def denoise_loss(call: Any, image: Tensor) -> Tensor:
            return call(JointOutput(image, {"task": prediction}), clean, labels).denoise

        image = denoised.clone().requires_grad_()
        wanted = denoise_loss(loss, image)
        wanted.backward()
        if how == "compiled":
            value = denoise_loss(torch.compile(loss, backend="eager", fullgraph=True), denoised)
        else:
            gradient, value = torch.func.grad_and_value(lambda x: denoise_loss(loss, x))(denoised)
            torch.testing.assert_close(gradient, image.grad)
        torch.testing.assert_close(value, wanted.detach())
        assert not bool(frozen[1].running_mean.any())
        assert all(module.training for module in frozen.modules())

    def test_what_a_script_names_is_as_the_script_has_it(self) -> None:
        """It is neither registered nor put into another mode."""
        script: dict[str, Any] = {"net": nn.BatchNorm2d(3).requires_grad_(False), "seen": []}
        exec("def loss(p, t):\n    seen.append(net.training)\n    return (net(p) - net(t)).square().mean()", script)
        _, clean, labels = labelled_batch()
        for function in (script["loss"], partial(script["loss"])):
            loss = JointLoss(1, "classification", function)
            loss.train()(JointOutput(clean, {"task": torch.zeros(4, 5)}), clean, labels)
            assert not loss.state_dict()
        script["net"].eval()
        loss.train()(JointOutput(clean, {"task": torch.zeros(4, 5)}), clean, labels)
        assert script["seen"] == [True, True, False]

    @pytest.mark.parametrize("fails", [False, True])
    def test_what_is_frozen_for_a_turn_has_its_mode_again(self, fails: bool) -> None:
        """A discriminator, frozen while the denoiser learns; what was in evaluation mode stays in it."""
        judge = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(), nn.BatchNorm2d(4).eval())
        during: list[bool] = []

        def adversarial(denoised: Tensor, clean: Tensor) -> Tensor:
            during.extend(module.training for module in judge.modules())
            if fails:
                raise RuntimeError("no more")
            return judge(denoised).mean()

        _, clean, labels = labelled_batch()
        loss = JointLoss(1, "classification", adversarial)
        judge.requires_grad_(False)
        with pytest.raises(RuntimeError, match="no more") if fails else nullcontext():
            loss(JointOutput(clean, {"task": torch.zeros(4, 5)}), clean, labels)
        assert during == [False] * 5
        assert [module.training for module in judge.modules()] == [True] * 4 + [False]
        assert not bool(judge[1].running_mean.any())

    def test_a_frozen_network_in_a_closure_keeps_its_mode(self) -> None:
        def losses() -> tuple[Any, nn.Module, nn.Module, nn.Module]:
            frozen = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout())
            frozen.eval().requires_grad_(False)
            head, dropout = nn.Linear(2, 2), nn.Dropout()
            features = lambda p, t: (frozen(p) - frozen(t)).square().mean() + dropout(head(p[..., :2])).mean()  # noqa: E731
            return features, frozen, head, dropout

        function, frozen, head, dropout = losses()
        loss, clean = JointLoss(1.0, function, denoise_loss=lambda p, t: function(p, t).clone()), labelled_batch()[1]
        frozen.train()
        outer = nn.ModuleList([loss]).eval()
        assert not frozen.training, "eval() reaches it"
        assert not any(module.training for module in (head, dropout, *outer.modules()))
        outer.train()
        assert all(module.training for module in (head, dropout, loss, *loss.task_losses.values()))
        assert not any(module.training for module in frozen.modules())
        before = frozen[1].running_mean.clone()
        loss(JointOutput(clean, {"task": clean}), clean, clean)
        assert torch.equal(frozen[1].running_mean, before)
        frozen.requires_grad_(True)
        assert all(module.training for module in loss.train().modules())

    def test_copies_of_odd_closures(self, tmp_path: Path) -> None:
        """Open files stay shared; a function may have captured itself."""
        scale = nn.Parameter(torch.tensor(2.0))
        with (tmp_path / "log").open("w") as log:

            def recursive(p: Tensor, t: Tensor, depth: int = 1) -> Tensor:
                log.write(".")
                return recursive(p, t, depth - 1) if depth else scale * (p - t).abs().mean()

            copied = copy.deepcopy(JointLoss(1.0, recursive))
            (own,) = copied.parameters()
            assert own is not scale
            clean = labelled_batch()[1]
            copied(JointOutput(clean, {"task": torch.ones(2, 2)}), clean, torch.zeros(2, 2)).total.backward()
        assert own.grad is not None
        assert scale.grad is None
        assert (tmp_path / "log").read_text() == ".."

    def test_copies_of_shared_and_unfinished_closures(self) -> None:
        """A captured list that holds itself, one that two losses share, and a variable that is assigned later."""

        def inner(x: Tensor) -> Tensor:
            return table * x

        layers: list[Any] = [nn.Linear(2, 2)]
        layers.append(layers)
        losses = {name: lambda p, t: layers[0](p).mean() + inner(p).mean() for name in "ab"}
        loss = JointLoss(1.0, losses)
        copied = copy.deepcopy(loss)
        table = 2.0
        clean = labelled_batch()[1]
        output = JointOutput(clean, dict.fromkeys("ab", torch.ones(2, 2)))
        assert len(list(copied.parameters())) == 2
        terms = JointLoss(1.0, losses)(output, clean, dict.fromkeys("ab", torch.ones(2, 2)))
        assert torch.isfinite(terms.total)

    def test_functions(self) -> None:
        loss = JointLoss(1, lambda p, t: (p - t).abs().mean(), denoise_loss=F.l1_loss)
        assert not loss.state_dict()
        copied = copy.deepcopy(loss)
        clean = labelled_batch()[1]
        terms = copied(JointOutput(clean, {"task": torch.ones(2, 2)}), clean, torch.zeros(2, 2))
        assert terms.total.item() == pytest.approx(1.0)

    def test_double_precision_stays(self) -> None:
        clean = torch.rand(2, 3, 4, 4, dtype=torch.float64)
        denoised = (clean + 1e-9).requires_grad_()
        prediction = torch.randn(2, 5, dtype=torch.float64, requires_grad=True)
        terms = JointLoss(1, "classification").double()(
            JointOutput(denoised, {"task": prediction}), clean, torch.tensor([1, 2])
        )
        assert terms.denoise.dtype == terms.tasks["task"].dtype == torch.float64
        assert terms.denoise.item() == pytest.approx(1e-18, rel=1e-3)

    @pytest.mark.parametrize("name", ["a.b", "", "keys", "training"])
    def test_names_that_cannot_be_registered(self, name: str) -> None:
        with pytest.raises(ValueError, match=r"task_loss: task named .*; accepted: text without dots"):
            JointLoss(1, {name: "classification"})
