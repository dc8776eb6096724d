"""Which backend an operator runs on: argument, context, environment, automatic."""

from __future__ import annotations

import copy
import json
import sysconfig
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from fastden import Denoiser, fuse, ops
from fastden.bench.operators import weight_shapes
from fastden.cuda import extension
from fastden.ops import backends
from fastden.ops.backends import choose, requested, use_backend, why_not
from tests.helpers import noted_choices, relative_l2
from tests.scripts import load

X_OF_UP2, WEIGHT_OF_UP2 = (1, 128, 4, 5), (128, 32, 4, 4)


@pytest.fixture
def x() -> torch.Tensor:
    return torch.rand(1, 2, 4, 4)


@pytest.fixture(autouse=True)
def no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(backends.ENVIRONMENT, raising=False)


@pytest.fixture
def anything_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    """All backends accept everything."""
    monkeypatch.setattr(backends, "why_not", lambda operator, backend, **tensors: [])


def starts_triton(monkeypatch: pytest.MonkeyPatch, reason: str = "") -> None:
    """As on a GPU where Triton is not interpreted, and starts unless there is a reason."""
    monkeypatch.setattr(backends, "interpreted", lambda: False)
    monkeypatch.setattr(backends, "_has_compiler", lambda: True)
    monkeypatch.setattr(backends, "why_not_started", lambda device: reason)


def on_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on an H100 with a Triton that starts."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(backends, "runs_as_written", lambda *tensors: True)
    starts_triton(monkeypatch)


class OnGpu:
    """What the choice asks of a tensor; on a device without a number nothing is remembered for other tests."""

    device = torch.device("cuda")
    requires_grad = False

    def __init__(self, *shape: int, dtype: torch.dtype = torch.float32) -> None:
        self.shape, self.dtype = shape, dtype


@pytest.mark.usefixtures("anything_goes")
class TestPrecedence:
    def test_the_reference_by_itself(self, x: torch.Tensor) -> None:
        assert choose("upsample", None, x=x) == "torch"

    def test_environment(self, x: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv(backends.ENVIRONMENT, "triton")
        assert choose("upsample", None, x=x) == "triton"

    def test_context_before_environment(self, x: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv(backends.ENVIRONMENT, "triton")
        with use_backend("torch"):
            assert choose("upsample", None, x=x) == "torch"
        assert choose("upsample", None, x=x) == "triton"

    def test_argument_before_context(self, x: torch.Tensor) -> None:
        with use_backend("triton"):
            assert choose("upsample", "torch", x=x) == "torch"

    def test_innermost_context(self, x: torch.Tensor) -> None:
        with use_backend("triton"):
            with use_backend("torch"):
                assert requested() == "torch"
            assert requested() == "triton"
        assert requested() is None

    def test_context_ends_with_an_exception(self) -> None:
        with pytest.raises(KeyError), use_backend("triton"):
            raise KeyError
        assert requested() is None

    def test_backward_passes_stay_in_this_thread(self) -> None:
        """Another thread would not see the context, and recompute checkpointed activations on another backend."""
        with use_backend("triton"):
            with use_backend("torch"):
                assert not torch.autograd.is_multithreading_enabled()
            assert not torch.autograd.is_multithreading_enabled()
        with pytest.raises(KeyError), use_backend("triton"):
            raise KeyError
        assert torch.autograd.is_multithreading_enabled()

    @pytest.mark.gpu
    def test_what_a_backward_pass_on_a_gpu_recomputes(self) -> None:
        seen: list[tuple[int, str | None]] = []

        def double(x: torch.Tensor) -> torch.Tensor:
            seen.append((threading.get_ident(), requested()))
            return (x * x).exp()

        x = torch.ones(2, device="cuda", requires_grad=True)
        with use_backend("triton"):
            checkpoint(double, x, use_reentrant=False).sum().backward()
        assert seen == [(threading.get_ident(), "triton")] * 2

    def test_other_threads_are_left_alone(self) -> None:
        seen = []
        with use_backend("triton"):
            thread = threading.Thread(target=lambda: seen.append(requested()))
            thread.start()
            thread.join()
        assert seen == [None]


class TestMistakes:
    def test_argument(self, x: torch.Tensor) -> None:
        with pytest.raises(ValueError, match=r"backend: 'fast'; accepted: torch, triton"):
            ops.conv_bn_relu(x, torch.rand(3, 2, 1, 1), backend="fast")

    def test_context(self) -> None:
        with pytest.raises(ValueError, match=r"backend: 'fast'; accepted: torch, triton"), use_backend("fast"):
            pass

    def test_environment(self, x: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv(backends.ENVIRONMENT, "fast")
        with pytest.raises(ValueError, match=r"FASTDEN_BACKEND: 'fast'; accepted: torch, triton"):
            choose("upsample", None, x=x)

    def test_missing_package(self, x: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(backends, "_installed", lambda module: module != "triton")
        assert why_not("upsample", "triton", x=x) == ["triton is not installed (pip install 'fastden[gpu]')"]
        with pytest.raises(RuntimeError, match=r"cannot run upsample on x: \(1, 2, 4, 4\) torch.float32 cpu") as caught:
            choose("upsample", "triton", x=x)
        assert isinstance(caught.value, ops.BackendError)
        assert "torch: can run" in str(caught.value)

    def test_missing_package_under_compile(self, x: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(backends, "_installed", lambda module: module != "triton")
        run = torch.compile(partial(ops.conv_bn_relu, backend="triton"), fullgraph=True, backend="eager")
        with pytest.raises(RuntimeError, match=r"cannot run conv_bn_relu on x: \(1, 2, 4.*triton is not installed"):
            run(x, torch.rand(3, 2, 1, 1))

    def test_uninstalled_checkout(self, x: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(backends, "_installed", lambda module: module == "triton")
        (reason,) = why_not("upsample", "triton", x=x)
        assert "pip install -e ." in reason


class TestAutomatic:
    def test_a_proven_kernel_is_chosen(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """It is chosen only where its results are committed, on that GPU, for these weights, and it can run."""
        proven = {("triton", "stem", (9, 0), "bfloat16"): "a.json", ("cuda", "upsample", (9, 0), "bfloat16"): "b.json"}
        monkeypatch.setattr(backends, "PROVEN", proven)
        monkeypatch.setattr(backends, "SHAPES", {name: [((4, 5),)] for name in ("stem", "upsample", "head")})
        monkeypatch.setattr(extension, "_reasons", [])  # another test may have looked for it
        on_gpu(monkeypatch)
        monkeypatch.setattr(backends, "why_not", lambda operator, backend, **tensors: [])

        def chosen(operator: str, dtype: torch.dtype = torch.bfloat16, **changes: Any) -> str:
            tensors = {"x": OnGpu(1, 5, dtype=dtype), "weight": OnGpu(4, 5, dtype=dtype), "bias": OnGpu(4)}
            settings = {"as_measured": changes.pop("as_measured", True)}
            return choose(operator, None, **settings, **tensors | changes)  # type: ignore[arg-type]

        assert chosen("stem") == "triton"
        assert chosen("upsample") == "cuda"
        assert chosen("head") == "torch"
        assert chosen("stem", torch.float32) == "torch"
        assert choose("stem", None, x=torch.rand(1)) == "torch"
        assert chosen("stem", as_measured=False) == "torch"
        for changes in (
            {"weight": OnGpu(4, 6, dtype=torch.bfloat16)},  # another network's
            {"weight": OnGpu(4, 5)},  # which autocast would convert
            {"reduce": OnGpu(4, 5, dtype=torch.bfloat16)},  # one weight more
            {"bias": OnGpu(4, dtype=torch.bfloat16)},  # of a network that is not fused
            {"bias": None},
        ):
            assert chosen("stem", **changes) == "torch", changes
        assert chosen("stem", residual=OnGpu(7, dtype=torch.bfloat16)) == "triton"  # a picture may have any size
        monkeypatch.setattr(backends, "why_not", lambda operator, backend, **tensors: ["no"])
        assert chosen("stem") == "torch"

    @pytest.mark.usefixtures("anything_goes")
    def test_triton_that_cannot_build_its_launcher(self, x: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
        """It is left out; one that is asked for is not, so that Triton tells what it lacks."""
        monkeypatch.setattr(backends, "proven_backends", lambda operator, device, dtype: ["triton"])
        monkeypatch.setattr(backends, "SHAPES", {"stem": [()]})
        for interpreted, compiler, wanted in (
            (False, True, "triton"),
            (False, False, "torch"),
            (True, False, "triton"),  # nothing is built
        ):
            monkeypatch.setattr(backends, "interpreted", lambda interpreted=interpreted: interpreted)
            monkeypatch.setattr(backends, "_has_compiler", lambda compiler=compiler: compiler)
            assert choose("stem", None, x=x) == wanted
            assert choose("stem", "triton", x=x) == "triton"

    def test_triton_that_does_not_start(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """It is left out on that GPU, where it would end the call."""
        cuda = torch.device("cuda", 0)
        starts_triton(monkeypatch, "PermissionError: [Errno 13] ~/.triton")
        assert backends.why_left_out("triton", cuda) == ["Triton cannot start (PermissionError: [Errno 13] ~/.triton)"]
        assert backends.left_out("triton", cuda)
        assert not backends.left_out("triton", torch.device("cpu"))
        starts_triton(monkeypatch)
        assert not backends.left_out("triton", cuda)
        monkeypatch.setattr(backends, "interpreted", lambda: True)
        assert backends.why_left_out("triton", cuda) == ["TRITON_INTERPRET=1 is set"]
        assert not backends.left_out("triton", torch.device("cpu"))

    @pytest.mark.parametrize(
        ("programs", "cc", "header", "wanted"),
        [
            (["gcc"], None, True, True),
            (["clang"], None, True, True),
            (["cc", "g++"], None, True, False),  # Triton looks for none of these
            ([], None, True, False),
            (["gcc"], None, False, False),
            (["mycc"], "mycc", True, True),
            (["gcc"], "mycc", True, False),  # it takes what CC names, and no other
            (["gcc"], "", True, False),
        ],
    )
    def test_what_triton_compiles_with(
        self,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        programs: list[str],
        cc: str | None,
        header: bool,
        wanted: bool,
    ) -> None:
        for name in programs:
            (tmp_path / name).write_text("#!/bin/sh\n")
            (tmp_path / name).chmod(0o755)
        if header:
            (tmp_path / "Python.h").touch()
        monkeypatch.setenv("PATH", str(tmp_path))
        monkeypatch.delenv("CC", raising=False)
        if cc is not None:
            monkeypatch.setenv("CC", cc)
        monkeypatch.setattr(sysconfig, "get_paths", lambda scheme: {"include": str(tmp_path)})
        assert backends._has_compiler.__wrapped__() is wanted  # type: ignore[attr-defined]

    def test_the_fastest_of_two_is_chosen(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """The table has it first."""
        on_gpu(monkeypatch)
        for order in (["triton", "cuda"], ["cuda", "triton"]):
            proven = {(name, "stem", (9, 0), "bfloat16"): "a.json" for name in order}
            monkeypatch.setattr(backends, "PROVEN", proven)
            assert backends.proven_backends("stem", torch.device("cuda"), torch.bfloat16) == order

    def test_nothing_is_proven_of_gpus_by_amd(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """PyTorch calls them "cuda", and an MI200 has the capability of an H100."""
        monkeypatch.setattr(backends, "PROVEN", {("triton", "stem", (9, 0), "bfloat16"): "a.json"})
        on_gpu(monkeypatch)
        for hip, proven in ((None, ["triton"]), ("6.4.43482", [])):
            monkeypatch.setattr(torch.version, "hip", hip)
            assert backends.proven_backends("stem", torch.device("cuda"), torch.bfloat16) == proven

    def test_a_gpu_is_asked_once(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """A call of the network asks eight times, and the host's time is that of small pictures."""
        monkeypatch.setattr(backends, "PROVEN", {("triton", "stem", (9, 0), "bfloat16"): "a.json"})
        on_gpu(monkeypatch)
        asked: list[int] = []
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: asked.append(device) or (9, device))
        backends._proven_on_index.cache_clear()
        try:
            for _ in range(3):
                for index, wanted in ((0, ["triton"]), (1, [])):
                    device = torch.device("cuda", index)
                    assert backends.proven_backends("stem", device, torch.bfloat16) == wanted
            assert asked == [0, 1]
        finally:
            backends._proven_on_index.cache_clear()

    def test_fake_tensors_of_a_gpu_that_is_not_there(self) -> None:
        """They need no driver."""
        if torch.cuda.is_available():
            pytest.skip("a GPU is here")
        with FakeTensorMode():
            x, weight = (torch.empty(size, device="cuda", dtype=torch.bfloat16) for size in (X_OF_UP2, WEIGHT_OF_UP2))
            y = ops.upsample(x, weight, torch.empty(32, device="cuda"))
        assert (y.shape, y.device.type) == ((1, 32, 8, 10), "cuda")
        assert backends.proven_backends("upsample", torch.device("cuda"), torch.bfloat16) == []

    def test_the_shapes_are_those_of_the_fused_network(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Each of its operators, but those that nothing is proven of; no operator of a network that is not fused."""
        seen: dict[str, list[bool]] = {}
        monkeypatch.setattr(backends, "_automatic", self.recorder(seen))
        x, sigma = torch.rand(1, 3, 8, 8, dtype=torch.bfloat16), 0.1
        model = Denoiser().eval().to(torch.bfloat16)
        with torch.no_grad():
            fused = fuse(model)
            monkeypatch.setattr(fused, "_onednn_network", lambda: None)
            fused(x, sigma)
            calls = {"stem": 1, "bottleneck": 3, "upsample": 1, "concat_conv_bn_relu": 1, "head": 1}
            assert {name: found for name, found in seen.items() if name != "conv_bn_relu" or True in found} == {
                name: [True] * count for name, count in calls.items()
            }
            for network in (model, Denoiser(composed=True).eval().to(torch.bfloat16)):
                seen.clear()
                network(x, sigma)
                assert seen
                assert not [name for name, found in seen.items() if True in found]
            for other in (Denoiser(noise_level_input=False), Denoiser(image_channels=1)):
                seen.clear()
                fused = fuse(other, torch.bfloat16)
                monkeypatch.setattr(fused, "_onednn_network", lambda: None)
                fused(torch.rand(1, other.image_channels, 8, 8), sigma if other.noise_level_input else None)
                assert (seen["stem"], seen["head"], seen["upsample"]) == ([False], [False], [True])

    @staticmethod
    def recorder(seen: dict[str, list[bool]]) -> Callable[..., str]:
        def automatic(operator: str, as_measured: bool, tensors: dict[str, torch.Tensor | None]) -> str:
            seen.setdefault(operator, []).append(as_measured and backends._measured(operator, tensors))
            return "torch"

        return automatic

    @pytest.mark.gpu
    def test_what_users_get(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """The network as users call it, on what this GPU's table and this installation choose."""
        device = torch.device("cuda", 0)
        chosen = noted_choices(monkeypatch)
        backends._proven_on_index.cache_clear()
        model = Denoiser.from_pretrained("color").to(device)
        fused = fuse(model, torch.bfloat16)
        x = torch.rand(1, 3, 250, 301, device=device)
        with torch.no_grad():
            y = fused(x, 0.1)
            with use_backend("torch"):
                eager, exact = fused(x, 0.1), copy.deepcopy(model).double()(x.double(), 0.1)
        expected = backends.expected(chosen, device, torch.bfloat16)
        assert chosen == {operator: {name} for operator, name in expected.items()}
        if torch.cuda.get_device_capability(0) == (9, 0):
            assert expected["stem"] != "torch"
            assert expected["upsample"] == "triton"
            assert expected["conv_bn_relu"] == "torch"
        assert len(chosen) == 6
        assert relative_l2(y, exact) <= 2 * relative_l2(eager, exact)

    def test_what_is_proven_has_its_shapes(self) -> None:
        operators = {operator for _, operator, _, _ in backends.PROVEN}
        assert {operator: weight_shapes(operator) for operator in operators} == backends.SHAPES

    def test_what_is_proven_has_its_results(self, root: Path) -> None:
        for (backend, operator, _, _), (file, _) in backends.PROVEN.items():
            names = {result["name"].split()[0] for result in json.loads((root / file).read_text())["results"]}
            assert operator in names, (backend, file)

    def test_what_is_proven_has_not_changed(self, root: Path) -> None:
        """Results are those of the sources that were measured."""
        changed = load(root / "benchmarks" / "prove.py").changed(backends.PROVEN)
        assert not changed, (
            "these kernels are not those that fastden/ops/proven.py has results of. Run benchmarks/gpu_check.sh on such"
            " a GPU and benchmarks/prove.py on its results, or let the automatic choice leave them out:"
            " python benchmarks/prove.py --drop"
        )
