"""concat_conv_fp8 on Hopper's products of e4m3, emulated or on a GPU, against the reference with the same rounding."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import fastden
from fastden import ops
from fastden.bench.timing import Replay, Stopwatch
from fastden.network import int8
from fastden.network.model import Denoiser
from fastden.ops import backends
from fastden.ops.concat_conv_fp8 import rounded_factors
from tests.cuda.compare import random
from tests.helpers import random_network, relative_l2
from tests.rounding import assert_as_exact, slack
from tests.scripts import load

A, B, OUTPUTS = 128, 32, 256
TAPS = 9


@pytest.fixture(autouse=True)
def hopper(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if device == "cuda" and torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("this GPU's compute capability is not 9.0")
    monkeypatch.setenv("FASTDEN_EMULATED_MAJOR", "9")


def inputs(device: str, dtype: torch.dtype, batch: int, size: tuple[int, int]) -> dict[str, Any]:
    a, b = random(device, dtype, batch, A, *size), random(device, dtype, batch, B, *size)
    return {
        "a": a.abs(),
        "b": b,
        "weight": random(device, dtype, OUTPUTS, A + B, 3, 3, fan_in=TAPS * (A + B)),
        "bias": random(device, torch.float32, OUTPUTS),
        "ranges": torch.cat([a, b], 1).float().abs().amax((0, 2, 3)) if batch else torch.ones(A + B, device=device),
    }


def run(backend: str, given: dict[str, Any], dtype: torch.dtype | None = None, **options: Any) -> Tensor:
    tensors = {name: x if name == "ranges" or dtype is None else x.to(dtype) for name, x in given.items()}
    return ops.concat_conv_fp8(**tensors, **options, backend=backend)


def assert_right(given: dict[str, Any], **options: Any) -> None:
    found, exact = run("cuda", given, **options), run("torch", given, torch.float64, **options)
    assert found.is_contiguous(memory_format=torch.channels_last)
    if not found.numel():
        return
    reference = lambda **tensors: ops.concat_conv_fp8(**tensors, backend="torch")  # noqa: E731
    # Hopper's cuts of addends: a standard deviation of 2^-16 of the largest result, see benchmarks/first_checks.py.
    unit = slack(reference, **given, **options, exact=exact, dtype=found.dtype) + 2.0**-13 * exact.abs().max()
    assert_as_exact(found, run("torch", given, **options), exact, unit)


@pytest.mark.parametrize(
    ("size", "batch", "dtype"),
    [
        ((1, 1), 1, torch.bfloat16),
        ((11, 17), 1, torch.float16),
        ((5, 18), 2, torch.bfloat16),
        ((3, 3), 0, torch.float16),
    ],
)
def test_results(device: str, size: tuple[int, int], batch: int, dtype: torch.dtype) -> None:
    assert_right(inputs(device, dtype, batch, size), relu=size != (5, 18))


def test_each_tap_of_each_channel(device: str) -> None:
    """Weights that are zero but for one tap of one channel: copies of a channel, moved, bit for bit."""
    size = 8, 16
    a, b = (torch.randint(0, 16, (1, channels, *size)).to(device, torch.bfloat16) for channels in (A, B))
    padded = F.pad(torch.cat([a, b], 1), (1, 1, 1, 1))[0]
    ranges = torch.full((A + B,), 448.0, device=device)  # steps of 1: integers up to 16 are not rounded
    for first in range(0, TAPS * (A + B), OUTPUTS):
        taps = [(first + output) % (TAPS * (A + B)) for output in range(OUTPUTS)]
        chosen = [(tap % (A + B), tap // (A + B) // 3, tap // (A + B) % 3) for tap in taps]
        weight = torch.zeros(OUTPUTS, A + B, 3, 3, dtype=a.dtype)
        for output, place in enumerate(chosen):
            weight[output][place] = 1
        y = ops.concat_conv_fp8(a, b, weight.to(device), ranges=ranges, relu=False, backend="cuda")
        wanted = torch.stack([padded[c, row : row + size[0], column : column + size[1]] for c, row, column in chosen])
        wrong = [place for place, one, two in zip(chosen, y[0], wanted, strict=True) if not torch.equal(one, two)]
        assert not wrong


def several_tiles(device: str, multiprocessors: int, size: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    if device == "cpu":
        monkeypatch.setenv("FASTDEN_EMULATED_MULTIPROCESSORS", str(multiprocessors))
    assert_right(inputs(device, torch.bfloat16, 1, size))


def test_several_tiles_a_block(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nine tiles for one cluster of two blocks."""
    several_tiles(device, 3, (18, 37), monkeypatch)


@pytest.mark.slow
def test_more_tiles_than_blocks(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """289 tiles for three clusters, or for a GPU's 144 blocks at most."""
    several_tiles(device, 7, (133, 265), monkeypatch)


def test_codes_are_those_of_the_reference(device: str) -> None:
    """The reference has the same codes on a GPU and on a CPU; on an H200 it had others at ties."""
    given = inputs("cpu", torch.float16, 1, (11, 17))
    factors = torch.cat([given["a"], given["b"]], 1), given["weight"], given["ranges"]
    for found, expected in zip(
        rounded_factors(*(x.to(device) for x in factors)), rounded_factors(*factors), strict=True
    ):
        assert torch.equal(found.cpu(), expected)


def test_values_of_an_h200(device: str) -> None:
    """The values that a failing test printed on an H200, each to four digits.

    Of the last row, the second is 0.1276 where products are normalised before they are cut, and the last 0.9346 where
    nothing is cut.
    """
    y = run("cuda", inputs(device, torch.float16, 1, (11, 17)))[0].float().cpu()
    nan = float("nan")  # what pytest shortened
    printed = {
        (0, 0): (0.5820, 0.0, 0.1531, 0.0, 0.0, 0.9839),
        (0, 1): (1.7764, 0.7935, 0.5376, 2.0508, nan, nan),
        (255, 10): (0.5640, 0.1274, 1.1172, 1.4873, 0.8262, 0.9341),
    }
    for (channel, row), values in printed.items():
        found, wanted = y[channel, row][[0, 1, 2, -3, -2, -1]], torch.tensor(values)
        assert ((found - wanted).abs() < 0.51e-4)[wanted.isfinite()].all()


@pytest.mark.parametrize(
    ("products", "expected"),
    [
        # 1.75 * 1.75 is more than 2, but its exponent is 0: two products of 2^-13 stay, four of 2^-14 are cut.
        ({0: (1.75, 1.75), 1: (2**-6, 2**-7), 2: (2**-6, 2**-7)}, 2**-12),
        ({0: (1.75, 1.75), **dict.fromkeys(range(1, 5), (2**-7, 2**-7))}, 0),
        # 2 * 1.5 has an exponent of 1.
        ({0: (2, 1.5), 1: (2**-6, 2**-7), 2: (2**-6, 2**-7)}, 0),
        # Of a negative product, the magnitude is cut.
        ({0: (1.75, 1.75), 1: (1.5 * 2**-6, -(2**-7)), 2: (1.5 * 2**-6, -(2**-7))}, -(2**-12)),
        # The result is cut behind its own exponent, 1.
        ({0: (1.75, 1.75), 1: (2**-6, 2**-7)}, 0),
        # The next instruction, of channels 32 to 63, adds to a sum whose exponent is 1.
        ({0: (1.75, 1.75), 32: (2**-6, 2**-7), 33: (2**-6, 2**-7)}, 0),
        ({0: (1.75, 1.75), 32: (2**-6, 2**-6)}, 2**-12),
        # The next sum, of the other source, is added in float32.
        ({0: (1.75, 1.75), A: (2**-7, 2**-7)}, 2**-14),
    ],
)
def test_hopper_cuts_addends(device: str, products: dict[int, tuple[float, float]], expected: float) -> None:
    """To 13 bits behind the largest exponent. The first product is taken away again by the bias."""
    x, weight = torch.zeros(1, A + B, 1, 1), torch.zeros(OUTPUTS, A + B, 3, 3)
    weight[:, 0, 0, 0] = 448  # makes the weights' steps 1, and meets the padding
    for channel, (value, factor) in products.items():
        x[:, channel], weight[:, channel, 1, 1] = value, factor
    bias, ranges = torch.full((OUTPUTS,), -products[0][0] * products[0][1]), torch.full((A + B,), 448.0)
    given = {"a": x[:, :A], "b": x[:, A:], "weight": weight, "bias": bias, "ranges": ranges}
    given = {name: x.to(device) if x.dim() == 1 else x.to(device, torch.float16) for name, x in given.items()}
    assert (run("cuda", given, relu=False) == expected).all()


def test_sums_are_added_up_in_float32(device: str) -> None:
    """A first sum of 57344 leaves no bit of the rest in Hopper's 13 bits: it must not be there when the rest is added.

    The rest of each later stage is 2 or 1.5; behind the sum's exponent, 15, a bit is 4.
    """
    a, b = torch.ones(1, A, 5, 6), torch.ones(1, B, 5, 6)
    weight = torch.full((OUTPUTS, A + B, 3, 3), 2.0**-6)
    weight[:, :A, 0, 0] = 448
    bias, ranges = torch.full((OUTPUTS,), -448.0 * A), torch.full((A + B,), 448.0)
    given = {"a": a, "b": b, "weight": weight, "bias": bias, "ranges": ranges}
    given = {name: x.to(device) if x.dim() == 1 else x.to(device, torch.bfloat16) for name, x in given.items()}
    y = run("cuda", given)
    assert (y[:, :, 1:-1, 1:-1] == (8 * A + 9 * B) * 2.0**-6).all()


def test_what_lies_beyond_the_range_is_limited(device: str) -> None:
    given = inputs(device, torch.bfloat16, 1, (4, 5))
    given["ranges"] = given["ranges"] / 2
    given["a"][0, 3, 1, 2] = float("inf")
    assert_right(given)
    assert run("cuda", given).isfinite().all()


@pytest.mark.parametrize("name", ["a", "b", "weight"])
def test_nan_is_not_hidden(device: str, name: str) -> None:
    given = inputs(device, torch.float16, 1, (4, 5))
    given[name][0, 1, 1, 1] = float("nan")
    expected = run("torch", given).isnan()
    assert expected.any()
    assert run("cuda", given).isnan()[expected].all()


@pytest.mark.parametrize("layout", ["channels_last", "sliced"])
def test_any_layout(device: str, layout: str) -> None:
    given = inputs(device, torch.float16, 1, (4, 5))
    expected = run("cuda", given)

    def laid_out(x: Tensor) -> Tensor:
        if layout == "sliced":
            return torch.stack([x, x], -1)[..., 0]
        return x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x

    assert torch.equal(run("cuda", {name: laid_out(x) for name, x in given.items()}), expected)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"a": (1, 64, 4, 5)}, "a's and b's channels: (64, 32); accepted: (128, 32)"),
        ({"weight": (128, 160, 3, 3)}, "weight's outputs: 128; accepted: a multiple of 256"),
    ],
)
def test_limits(device: str, change: dict[str, tuple[int, ...]], reason: str) -> None:
    given = inputs(device, torch.float16, 1, (4, 5))
    assert backends.why_not("concat_conv_fp8", "cuda", **given) == []
    given |= {name: random(device, torch.float16, *shape) for name, shape in change.items()}
    assert backends.why_not("concat_conv_fp8", "cuda", **given) == [reason]
    given["ranges"] = torch.ones(160, device=device)
    with pytest.raises(ValueError, match=r"accepted: (\[1, 128, 4, 5\]|a multiple of 256)"):
        torch.ops.fastden_cuda.concat_conv_fp8(*given.values(), True)


def test_needs_hopper(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if device == "cuda":
        pytest.skip("this GPU is one")
    monkeypatch.setenv("FASTDEN_EMULATED_MAJOR", "8")
    with pytest.raises(RuntimeError, match=r"concat_conv_fp8: CUDA error: .* \(needs compute capability 9.0, and a b"):
        run("cuda", inputs(device, torch.float16, 1, (4, 5)))


def test_dispatcher_operator(device: str) -> None:
    given = inputs(device, torch.float16, 1, (1, 2))
    checks = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    operator = torch.ops.fastden_cuda.concat_conv_fp8.default
    torch.library.opcheck(operator, (*given.values(), True), test_utils=checks)
    compiled = torch.compile(lambda: run("cuda", given), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(), run("cuda", given))


def test_first_check(device: str, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """That of benchmarks/first_checks.py passes, and fails where a tap of one channel is missing."""
    script = load(root / "benchmarks" / "first_checks.py")
    if device == "cpu":
        monkeypatch.setattr(script, "FP8_SIZES", ((1, 2),))
        monkeypatch.setattr(script, "FP8_REPEATS", 2)
    script.fp8(device, "cuda")
    original = ops.concat_conv_fp8

    def wrong(a: Tensor, b: Tensor, weight: Tensor, *bias: Tensor, backend: str, **options: Any) -> Tensor:
        weight = weight.clone()
        weight[3, 6, 1, 1] *= backend != "cuda"
        return original(a, b, weight, *bias, backend=backend, **options)

    monkeypatch.setattr(ops, "concat_conv_fp8", wrong)
    monkeypatch.setattr(script, "FP8_SIZES", ((1, 2),))  # of the output's two pixels one is 0 behind the ReLU
    with pytest.raises(SystemExit, match=r"1 wrong, first at \[\[0, 3, 0, 1\]\]"):
        script.fp8(device, "cuda")


def test_wrong_results_are_timed_too(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = load(root / "benchmarks" / "first_checks.py")
    timed: list[tuple[str, str]] = []

    def fails(*_: str) -> None:
        raise SystemExit("fp8: 1 wrong")

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(script, "check_fp8", fails)
    monkeypatch.setattr(script, "time_fp8", lambda *given: timed.append(given))
    with pytest.raises(SystemExit, match="1 wrong"):
        script.fp8("cuda", "cuda")
    assert timed == [("cuda", "cuda")]


def test_its_time_is_that_of_other_operators(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Replays of graphs, and a GPU's L2 cache holds other data: both are :mod:`fastden.bench.timing`'s."""
    script = load(root / "benchmarks" / "first_checks.py")
    timed: list[object] = []

    class Replayed:
        def __init__(self, call: Callable[[], Tensor]) -> None:
            self.call = call

        def __call__(self) -> Tensor:
            return self.call()

    class Watch(Stopwatch):
        def __call__(self, call: object) -> float:
            timed.append(call)
            return 2.5

    assert (script.Replay, script.Stopwatch) == (Replay, Stopwatch)
    monkeypatch.setattr(script, "FP8_SIZES", ((3, 4),))
    monkeypatch.setattr(script, "Replay", Replayed)
    monkeypatch.setattr(script, "Stopwatch", Watch)
    script.time_fp8("cpu", "torch")
    assert len(timed) == 2 * 2 * script.FP8_ROUNDS
    assert {type(call) for call in timed} == {Replayed}
    assert capsys.readouterr().out == "conv3 in fp8: 2.500 ms\nconv3 in bfloat16: 2.500 ms\n"


def test_what_is_not_checked_is_not_right(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script = load(root / "benchmarks" / "first_checks.py")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    monkeypatch.setattr("sys.argv", ["first_checks.py", "fp8", "--backend", "cuda"])
    assert script.main() == 0
    assert capsys.readouterr().out == "fp8: cuda is not checked: this GPU's compute capability is not 9.0\n"


@pytest.mark.gpu
def test_captured_in_a_graph(device: str) -> None:
    given = inputs(device, torch.bfloat16, 1, (33, 65))
    expected = run("cuda", given)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = run("cuda", given)
    y.fill_(float("nan"))
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(y, expected)


class TestNetwork:
    @pytest.fixture(scope="class")
    @staticmethod
    def model() -> Denoiser:
        model = random_network()
        torch.manual_seed(1)
        fastden.calibrate(model, [torch.rand(1, 3, 32, 32) for _ in range(4)])
        return model

    @pytest.fixture
    def network(self, model: Denoiser, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], fastden.FusedDenoiser]:
        # The CPU here may have no VNNI; then quality="fast" is refused there.
        monkeypatch.setattr(int8, "why_not", list)
        return lambda device: fastden.fuse(model, torch.bfloat16, device, quality="fast")

    def test_conv3_runs_in_fp8(
        self, device: str, network: Callable[[str], fastden.FusedDenoiser], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        fused = network(device)
        assert fused.quality == "fast"
        assert fused.conv3_ranges.dtype == torch.float32
        assert "conv3_ranges" not in fused.state_dict()
        asked: list[tuple[str, str]] = []
        original = backends.why_not

        def why_not(operator: str, backend: str, **options: Any) -> list[str]:
            asked.append((operator, backend))
            return original(operator, backend, **options)

        monkeypatch.setattr(backends, "why_not", why_not)
        torch.manual_seed(0)
        x = torch.rand(1, 3, 13, 18, device=device)
        found = {}
        with torch.no_grad():
            for backend in ("torch", "cuda") if device == "cuda" else ("cuda",):
                with ops.use_backend(backend):
                    found[backend] = fused(x, 0.1) - x
            assert ("concat_conv_fp8", "cuda") in asked
            assert ("concat_conv_bn_relu", "cuda") not in asked
            plain = fastden.fuse(random_network(), torch.float64, device)(x.double(), 0.1) - x
        for y in found.values():
            assert 1e-3 < relative_l2(y, plain) < 0.05

    def test_compiles_without_a_break(self, device: str, network: Callable[[str], fastden.FusedDenoiser]) -> None:
        fused = network(device)
        x = torch.rand(1, 3, 8, 8, device=device)
        compiled = torch.compile(fused, fullgraph=True, backend="aot_eager")
        with torch.no_grad(), ops.use_backend("cuda"):
            assert torch.equal(compiled(x, 0.1), fused(x, 0.1))

    def test_gradients_are_not_of_fp8(self, device: str, network: Callable[[str], fastden.FusedDenoiser]) -> None:
        fused = network(device)
        x = torch.rand(1, 3, 8, 8, device=device, requires_grad=True)
        with ops.use_backend("cuda"):
            fused(x, 0.1).sum().backward()
        assert x.grad is not None
        assert copy.deepcopy(fused).to(torch.float16).conv3_ranges.dtype == torch.float32

    def test_another_backend_is_refused(self, device: str, network: Callable[[str], fastden.FusedDenoiser]) -> None:
        """On a GPU nothing else runs in its place; quality="fast" on a CPU is oneDNN's."""
        if device == "cpu":
            pytest.skip("needs a GPU")
        x = torch.rand(1, 3, 8, 8, device=device)
        with torch.no_grad(), pytest.raises(backends.BackendError), ops.use_backend("triton"):
            network(device)(x, 0.1)
