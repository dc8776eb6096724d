"""The CUDA kernels through PyTorch's dispatcher: results, gradients, layouts, refusals, and what PyTorch asks."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fastden import algebra, ops
from fastden.ops import backends
from tests.cuda import compare
from tests.cuda.compare import DTYPES, Tensors, assert_as_exact_as_eager, random
from tests.helpers import relative_l2

sizes = st.tuples(st.integers(1, 13), st.integers(1, 13))
dtypes = st.sampled_from(DTYPES)
#: An operator with small inputs for it, by name.
CASES: dict[str, Callable[[str, torch.dtype], tuple[Callable[..., Tensor], Tensors, dict[str, Any]]]] = {
    "conv_bn_relu": lambda device, dtype: (
        ops.conv_bn_relu,
        compare.convolution(device, dtype, 2, 16, 8, (5, 7), stride=2, residual=True),
        {"stride": 2, "padding": 1},
    ),
    "concat_conv_bn_relu": lambda device, dtype: (
        ops.concat_conv_bn_relu,
        compare.concatenation(device, dtype, 2, 16, 8, 8, (5, 3)),
        {},
    ),
    "upsample": lambda device, dtype: (ops.upsample, compare.upsampling(device, dtype, 2, 16, 8, (3, 5)), {}),
    "bottleneck": lambda device, dtype: (compare.bottleneck, compare.block(device, dtype, 1, 32, 32, (3, 5)), {}),
    "stem": lambda device, dtype: (ops.stem, compare.first_layer(device, dtype, 1, 3, 8, (3, 5)), {}),
    "head": lambda device, dtype: (ops.head, compare.last_layer(device, dtype, 1, 16, (4, 3), (3, 5)), {}),
}


@settings(max_examples=12)
@given(
    size=sizes, batch=st.integers(0, 3), channels=st.integers(1, 40), outputs=st.integers(1, 40),
    kernel=st.sampled_from([1, 3, 5]), stride=st.sampled_from([1, 2]), bias=st.booleans(), residual=st.booleans(),
    relu=st.booleans(), dtype=dtypes,
)  # fmt: skip
@example((1, 1), 1, 8, 8, 3, 2, True, True, True, torch.bfloat16)
@example((11, 13), 2, 32, 24, 3, 1, True, True, True, torch.float16)
@example((11, 5), 2, 3, 5, 5, 1, True, True, True, torch.float16)
def test_conv_bn_relu(
    device: str, size: tuple[int, int], batch: int, channels: int, outputs: int, kernel: int, stride: int, bias: bool,
    residual: bool, relu: bool, dtype: torch.dtype,
) -> None:  # fmt: skip
    tensors = compare.convolution(device, dtype, batch, channels, outputs, size, kernel, stride, bias, residual)
    assert_as_exact_as_eager(ops.conv_bn_relu, tensors, relu=relu, stride=stride, padding=kernel // 2)


@settings(max_examples=8)
@given(
    size=sizes, batch=st.integers(0, 2), a=st.integers(1, 40), b=st.integers(1, 40), outputs=st.integers(1, 40),
    dtype=dtypes,
)  # fmt: skip
@example((7, 11), 2, 16, 8, 24, torch.bfloat16)
def test_concat_conv_bn_relu(
    device: str, size: tuple[int, int], batch: int, a: int, b: int, outputs: int, dtype: torch.dtype
) -> None:
    assert_as_exact_as_eager(ops.concat_conv_bn_relu, compare.concatenation(device, dtype, batch, a, b, outputs, size))


@pytest.mark.parametrize(("size", "batch"), [((1, 1), 1), ((11, 17), 1), ((5, 18), 2)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.usefixtures("capability")
def test_concat_conv_bn_relu_of_the_network(device: str, size: tuple[int, int], batch: int, dtype: torch.dtype) -> None:
    """conv3's channels, for which compute capability 9.0 has a kernel of its own."""
    tensors = compare.concatenation(device, dtype, batch, 64, 32, 256, size)
    assert_as_exact_as_eager(ops.concat_conv_bn_relu, tensors)


@pytest.fixture
def emulated_hopper(device: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """An emulated GPU of compute capability 9.0 with as many multiprocessors as the test's parameter says."""
    if device == "cpu":
        monkeypatch.setenv("FASTDEN_EMULATED_MULTIPROCESSORS", str(request.param))
        monkeypatch.setenv("FASTDEN_EMULATED_MAJOR", "9")


@pytest.mark.slow
@pytest.mark.parametrize("size", [(133, 265)])
@pytest.mark.parametrize("emulated_hopper", [7], indirect=True)
@pytest.mark.usefixtures("emulated_hopper")
def test_more_tiles_than_blocks(device: str, size: tuple[int, int]) -> None:
    """289 tiles: an emulated GPU does them in 3 clusters of conv3 and 7 blocks of res3, a GPU in at most 144 blocks.

    Each block goes round its ring of stages many times, and through its barriers' phases.
    """
    tensors = compare.concatenation(device, torch.bfloat16, 1, 128, 32, 256, size)
    assert_as_exact_as_eager(ops.concat_conv_bn_relu, tensors)
    assert_as_exact_as_eager(compare.bottleneck, compare.block(device, torch.bfloat16, 1, 256, 64, size))


@pytest.mark.parametrize("emulated_hopper", [5], indirect=True)
@pytest.mark.usefixtures("emulated_hopper")
def test_several_tiles_a_block(device: str) -> None:
    """The same with 18 tiles of narrow channels for two clusters, quick enough for every run and for a sanitizer."""
    tensors = compare.concatenation(device, torch.bfloat16, 2, 64, 32, 256, (18, 37))
    assert_as_exact_as_eager(ops.concat_conv_bn_relu, tensors)


@pytest.mark.parametrize("channels", [64, 192])  # two and six steps, in a ring of three stages
@pytest.mark.parametrize("emulated_hopper", [1, 2, 5], indirect=True)
@pytest.mark.usefixtures("emulated_hopper")
def test_several_tiles_a_block_of_the_bottleneck(device: str, channels: int) -> None:
    """12 tiles for one, two and five blocks, so that the two groups of a block do as many as or one more or less."""
    tensors = compare.block(device, torch.bfloat16, 2, channels, 64, (9, 37))
    assert_as_exact_as_eager(compare.bottleneck, tensors)


@pytest.mark.parametrize("emulated_hopper", [2], indirect=True)
@pytest.mark.parametrize("name", ["concat_conv_bn_relu", "bottleneck"])
@pytest.mark.usefixtures("emulated_hopper")
def test_first_in_its_thread(device: str, name: str) -> None:
    """Hopper's kernels ask the driver, which wants a context, and a fresh thread has none."""
    function, tensors = {
        "concat_conv_bn_relu": (
            ops.concat_conv_bn_relu,
            compare.concatenation(device, torch.float16, 1, 64, 32, 256, (3, 5)),
        ),
        "bottleneck": (compare.bottleneck, compare.block(device, torch.float16, 1, 64, 64, (3, 5))),
    }[name]
    with ThreadPoolExecutor(1) as pool:
        y = pool.submit(function, **tensors, backend="cuda").result()  # type: ignore[arg-type]
    assert torch.equal(y, function(**tensors, backend="cuda"))  # type: ignore[arg-type]


@settings(max_examples=8)
@given(
    size=sizes, batch=st.integers(0, 2), channels=st.integers(1, 40), outputs=st.integers(1, 40), bias=st.booleans(),
    dtype=dtypes,
)  # fmt: skip
@example((1, 1), 1, 8, 8, True, torch.float16)
def test_upsample(
    device: str, size: tuple[int, int], batch: int, channels: int, outputs: int, bias: bool, dtype: torch.dtype
) -> None:
    assert_as_exact_as_eager(ops.upsample, compare.upsampling(device, dtype, batch, channels, outputs, size, bias))


@settings(max_examples=6)
@given(
    size=sizes, batch=st.integers(0, 2), channels=st.sampled_from([32, 64]), middle=st.sampled_from([32, 64]),
    dtype=dtypes, biases=st.booleans(),
)  # fmt: skip
@example((1, 1), 1, 32, 32, torch.float16, True)
@example((7, 11), 2, 96, 64, torch.bfloat16, True)
def test_bottleneck(
    device: str, size: tuple[int, int], batch: int, channels: int, middle: int, dtype: torch.dtype, biases: bool
) -> None:
    tensors = compare.block(device, dtype, batch, channels, middle, size)
    if not biases:
        tensors |= dict.fromkeys(("reduce_bias", "conv_bias", "expand_bias"))
    assert_as_exact_as_eager(compare.bottleneck, tensors)


@pytest.mark.parametrize(("size", "batch", "biases"), [((1, 1), 1, True), ((11, 17), 1, False), ((5, 18), 2, True)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.usefixtures("capability")
def test_bottleneck_of_the_network(
    device: str, size: tuple[int, int], batch: int, biases: bool, dtype: torch.dtype
) -> None:
    """res3's channels, for which compute capability 9.0 has a kernel of its own."""
    tensors = compare.block(device, dtype, batch, 256, 64, size)
    if not biases:
        tensors |= dict.fromkeys(("reduce_bias", "conv_bias", "expand_bias"))
    assert_as_exact_as_eager(compare.bottleneck, tensors)


@pytest.mark.parametrize("channels", [96, 320])
def test_bottleneck_that_hopper_leaves_to_the_other_kernel(
    device: str, channels: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Channels that are no multiple of 64, or more than its shared memory holds weights of."""
    if device == "cpu":
        monkeypatch.setenv("FASTDEN_EMULATED_MAJOR", "9")
    assert_as_exact_as_eager(compare.bottleneck, compare.block(device, torch.float16, 1, channels, 64, (3, 5)))


@settings(max_examples=8)
@given(
    size=st.tuples(st.integers(2, 9), st.integers(2, 9)), batch=st.integers(0, 2), channels=st.integers(1, 4),
    outputs=st.sampled_from([8, 24, 128]), relu=st.booleans(), dtype=dtypes,
)  # fmt: skip
@example((2, 2), 1, 1, 8, True, torch.bfloat16)
@example((7, 5), 2, 4, 128, False, torch.float16)
def test_stem(
    device: str, size: tuple[int, int], batch: int, channels: int, outputs: int, relu: bool, dtype: torch.dtype
) -> None:
    tensors = compare.first_layer(device, dtype, batch, channels, outputs, size)
    assert_as_exact_as_eager(ops.stem, tensors, relu=relu)


@settings(max_examples=8)
@given(
    size=st.tuples(st.integers(2, 9), st.integers(2, 9)), batch=st.integers(0, 2), maps=st.sampled_from([16, 48, 64]),
    channels=st.sampled_from([(1, 1), (2, 1), (3, 3), (4, 3), (4, 4)]), add_input=st.booleans(), dtype=dtypes,
)  # fmt: skip
@example((2, 2), 1, 32, (4, 3), True, torch.bfloat16)
@example((7, 5), 2, 64, (4, 4), True, torch.float16)
def test_head(
    device: str, size: tuple[int, int], batch: int, maps: int, channels: tuple[int, int], add_input: bool,
    dtype: torch.dtype,
) -> None:  # fmt: skip
    tensors = compare.last_layer(device, dtype, batch, maps, channels, size)
    assert_as_exact_as_eager(ops.head, tensors, add_input=add_input)


@pytest.mark.parametrize(("size", "channels"), [((4, 5), (4, 3)), ((2, 2), (3, 3)), ((3, 7), (1, 1))])
def test_head_of_composed_weights(device: str, size: tuple[int, int], channels: tuple[int, int]) -> None:
    tensors = compare.last_layer(device, torch.float16, 1, 16, channels, size)
    c, k = channels
    shapes = (3, c, 5, 5), (3,), (16, 2, 4, 4), (2,), (k, 5, 3, 3), (k,)
    weights = algebra.compose_head(*(torch.randn(s) / max(1, torch.Size(s[1:]).numel()) ** 0.5 for s in shapes))
    for name, weight in zip(("weight", "image_weight", "bias"), weights, strict=True):
        tensors[name] = weight.to(device, torch.float16)
    assert_as_exact_as_eager(ops.head, tensors, composed=True)


@pytest.mark.parametrize("image_dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("clamp", [False, True])
def test_head_adds_an_image_at_its_own_precision(device: str, image_dtype: torch.dtype, clamp: bool) -> None:
    tensors = compare.last_layer(device, torch.float16, 2, 16, (4, 3), (4, 3))
    image = torch.rand(2, 12, 10, 5).permute(0, 3, 1, 2).to(device, image_dtype)
    y = ops.head(**tensors, image=image, clamp=clamp, backend="cuda")  # type: ignore[arg-type]
    assert y.dtype == image_dtype
    doubles = {name: x.double() for name, x in tensors.items() if x is not None}
    exact = ops.head(**doubles, image=image.double(), clamp=clamp, backend="torch")
    assert (y.double() - exact).abs().max() <= 2 * max(1e-6, torch.finfo(image_dtype).eps) * exact.abs().max()
    zero = {name: torch.zeros_like(x) if "weight" in name or name == "bias" else x for name, x in tensors.items()}  # type: ignore[arg-type]
    if image_dtype != torch.float64 and not clamp:  # sums are float32
        kept = ops.head(**zero, image=image, backend="cuda")  # type: ignore[arg-type]
        assert torch.equal(kept, image[:, :3, 3:-3, 3:-3])


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced", "expanded", "misaligned"])
@pytest.mark.parametrize("name", CASES)
def test_any_layout(device: str, name: str, layout: str) -> None:
    """All inputs, weights too, may have any layout that PyTorch's own operations take."""
    function, tensors, options = CASES[name](device, torch.float16)

    def laid_out(x: Tensor | None) -> Tensor | None:
        if x is None:
            return None
        if layout == "channels_last" and x.dim() == 4:
            return x.contiguous(memory_format=torch.channels_last)
        if layout == "sliced":
            wide = x.new_full([2 * size + 1 for size in x.shape], float("nan"))
            wide[tuple(slice(1, None, 2) for _ in x.shape)] = x
            return wide[tuple(slice(1, None, 2) for _ in x.shape)]
        if layout == "misaligned":
            flat = torch.cat([x.new_full((1,), float("nan")), x.flatten()])[1:].view(x.shape)
            assert flat.data_ptr() % 16
            return flat
        return x

    changed = {key: laid_out(x) for key, x in tensors.items()}
    first = next(iter(tensors))
    if layout == "expanded":
        x = tensors[first]
        assert x is not None
        changed[first] = x[:, :, :1].expand_as(x)
        tensors = tensors | {first: changed[first].contiguous()}  # type: ignore[union-attr]
    expected = function(**tensors, **options, backend="cuda")
    assert torch.equal(function(**changed, **options, backend="cuda"), expected)


@pytest.mark.parametrize("name", CASES)
def test_nan_is_not_hidden(device: str, name: str) -> None:
    function, tensors, options = CASES[name](device, torch.float16)
    first = next(iter(tensors.values()))
    assert first is not None
    first[0, 0, 1, 1] = float("nan")
    # In float32 on the CPU: cuDNN's ReLU in float16 makes zeros of the NaN (seen on an H200 with PyTorch 2.11).
    on_cpu = {key: None if x is None else x.float().cpu() for key, x in tensors.items()}
    expected = compare.eager(function, on_cpu, **options).isnan().to(device)
    assert expected.any()
    assert function(**tensors, **options, backend="cuda").isnan()[expected].all()


def gradients(
    function: Callable[..., Tensor], tensors: Tensors, backend: str, layout: str, options: dict[str, Any]
) -> dict[str, Tensor]:
    leaves = {name: None if x is None else x.detach().clone().requires_grad_() for name, x in tensors.items()}
    y = function(**leaves, **options, backend=backend)
    grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(3)).to(y)
    if layout == "expanded":
        grad = grad[:, :, :1, :1].expand_as(y)
    elif layout == "sliced":
        grad = torch.stack([grad, grad], -1)[..., 0]
    wanted = {name: leaf for name, leaf in leaves.items() if leaf is not None}
    return dict(zip(wanted, torch.autograd.grad(y, list(wanted.values()), grad), strict=True))


@pytest.mark.parametrize("layout", ["contiguous", "sliced", "expanded"])
@pytest.mark.parametrize("name", CASES)
def test_gradients(device: str, name: str, layout: str) -> None:
    """At most twice eager's error, and little more if rounding opens or closes a ReLU."""
    function, tensors, options = CASES[name](device, torch.bfloat16)
    doubles = {key: None if x is None else x.double() for key, x in tensors.items()}
    exact = gradients(function, doubles, "torch", layout, options)
    eager = gradients(function, tensors, "torch", layout, options)
    kernel = gradients(function, tensors, "cuda", layout, options)
    for key, gradient in exact.items():
        assert kernel[key].dtype == torch.bfloat16
        assert relative_l2(kernel[key], gradient) <= 2 * relative_l2(eager[key], gradient) + 1e-2, key


@pytest.mark.parametrize("name", ["conv_bn_relu", "concat_conv_bn_relu", "stem"])
def test_frozen_normalisation(device: str, name: str) -> None:
    bn = nn.BatchNorm2d(8).eval().to(device)
    with torch.no_grad():
        for part in (bn.weight, bn.bias, bn.running_mean):
            part.normal_()  # type: ignore[union-attr]
    function, tensors, options = CASES[name](device, torch.float16)
    y = function(**tensors, **options, bn=ops.BatchNorm.of(bn), backend="cuda")
    doubles = {key: x.double() for key, x in tensors.items() if x is not None}
    exact = function(**doubles, **options, bn=ops.BatchNorm.of(bn.double()), backend="torch")
    assert relative_l2(y, exact) < 2e-3


@pytest.mark.parametrize("name", CASES)
def test_biases_in_float32(device: str, name: str) -> None:
    """Kernels add them to float32 sums unrounded: float16 would round this bias to 1, and the sums would show it."""
    function, tensors, options = CASES[name](device, torch.float16)
    halves = {key: x if x is None or not key.endswith("bias") else torch.ones_like(x) for key, x in tensors.items()}
    expected = function(**halves, **options, backend="cuda")
    wide = {key: x if x is None or not key.endswith("bias") else x.float() for key, x in halves.items()}
    assert torch.equal(function(**wide, **options, backend="cuda"), expected)
    more = {key: x if x is None or not key.endswith("bias") else x + 4e-4 for key, x in wide.items()}
    assert not torch.equal(function(**more, **options, backend="cuda"), expected)
    rounded = {key: x if x is None or not key.endswith("bias") else x.half() for key, x in more.items()}
    assert torch.equal(function(**rounded, **options, backend="cuda"), expected)


@pytest.mark.parametrize("name", CASES)
def test_dispatcher_operator(device: str, name: str) -> None:
    _, tensors, _ = CASES[name](device, torch.float16)
    settings: dict[str, tuple[Any, ...]] = {
        "conv_bn_relu": (True, 2, 1),
        "concat_conv_bn_relu": (True, 1),
        "stem": (True,),
        "head": (None, True, False, False),
    }
    values = (*tensors.values(), *settings.get(name, ()))
    checks = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(getattr(torch.ops.fastden_cuda, name).default, values, test_utils=checks)
    schema = str(getattr(torch.ops.fastden_cuda, name).default._schema)
    assert schema == str(getattr(torch.ops.fastden, name).default._schema).replace("fastden::", "fastden_cuda::")


@pytest.mark.parametrize("name", ["conv_bn_relu", "head"])
def test_compiles_without_a_break(device: str, name: str) -> None:
    function, tensors, options = CASES[name](device, torch.bfloat16)
    leaves = {key: None if x is None else x.requires_grad_() for key, x in tensors.items()}

    def step(**tensors: Tensor | None) -> Tensor:
        return function(**tensors, **options, backend="cuda").float().square().sum()

    wanted = [x for x in leaves.values() if x is not None]
    expected = torch.autograd.grad(step(**leaves), wanted)
    found = torch.autograd.grad(torch.compile(step, fullgraph=True, backend="aot_eager")(**leaves), wanted)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


def test_autocast(device: str) -> None:
    function, tensors, options = CASES["conv_bn_relu"](device, torch.float32)
    assert backends.why_not("conv_bn_relu", "cuda", **tensors) == ["dtype float32; accepted: bfloat16, float16"]
    with torch.autocast(device, torch.bfloat16):
        y = function(**tensors, **options, backend="cuda")
    assert y.dtype == torch.bfloat16
    # The bias stays as it is: kernels add it to float32 sums.
    halves = {key: x if x is None or key == "bias" else x.bfloat16() for key, x in tensors.items()}
    assert torch.equal(y, function(**halves, **options, backend="cuda"))


@pytest.mark.gpu
@pytest.mark.parametrize("name", CASES)
def test_captured_in_a_graph(device: str, name: str) -> None:
    """It runs on another stream than the default one, and without a wait for the device."""
    function, tensors, options = CASES[name](device, torch.float16)
    expected = function(**tensors, **options, backend="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = function(**tensors, **options, backend="cuda")
    y.fill_(float("nan"))
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(y, expected)


class TestRefusals:
    @pytest.mark.parametrize(
        ("name", "argument", "shape", "reason"),
        [
            ("bottleneck", "reduce", (16, 32, 1, 1), "reduce's outputs: 16; accepted: 32, 64"),
            ("bottleneck", "x", (1, 48, 3, 5), "x's channels: 48; accepted: a multiple of 32"),
            ("stem", "x", (1, 5, 10, 14), "x's channels: 5; accepted: up to 4"),
            ("stem", "weight", (4, 12, 3, 7, 7), "weight's outputs: 12; accepted: a multiple of 8 up to 128"),
            ("stem", "weight", (4, 136, 3, 7, 7), "weight's outputs: 136; accepted: a multiple of 8 up to 128"),
            ("head", "features", (1, 24, 3, 5), "features' channels: 24; accepted: a multiple of 16"),
            ("conv_bn_relu", "weight", (8, 16, 7, 7), "weight: kernel of 7; accepted: up to 5"),
            ("concat_conv_bn_relu", "weight", (8, 24, 6, 6), "weight: kernel of 6; accepted: up to 5"),
        ],
    )
    def test_shapes(self, device: str, name: str, argument: str, shape: tuple[int, ...], reason: str) -> None:
        _, tensors, _ = CASES[name](device, torch.float16)
        assert backends.why_not(name, "cuda", **tensors) == []
        assert backends.why_not(name, "cuda", **tensors | {argument: random(device, torch.float16, *shape)}) == [reason]

    def test_places_of_pixels_are_32_bits_wide(self, device: str) -> None:
        x = torch.empty(1, 16, 1, 1, device=device, dtype=torch.float16).expand(1, 16, 40_000, 60_000)
        weight = random(device, torch.float16, 8, 16, 3, 3)
        reason = "x: (1, 16, 40000, 60000); accepted: less than 2^31 pixels, 3 rows and columns more each"
        assert backends.why_not("conv_bn_relu", "cuda", x=x, weight=weight) == [reason]
        assert backends.why_not("conv_bn_relu", "cuda", x=x[:, :, :30_000], weight=weight) == []

    def test_batch_statistics(self, device: str) -> None:
        bn = nn.BatchNorm2d(8).to(device)
        function, tensors, options = CASES["conv_bn_relu"](device, torch.float16)
        message = r"cuda: batch statistics; accepted: folded or frozen batch normalisation; the triton backend makes"
        with pytest.raises(RuntimeError, match=message):
            function(**tensors, **options, bn=ops.BatchNorm.of(bn), backend="cuda")
        state = ops.BatchNorm.of(bn)
        compiled = torch.compile(function, fullgraph=True, backend="eager")
        with pytest.raises(Exception, match="batch statistics; accepted: folded or frozen"):
            compiled(**tensors, **options, bn=state, backend="cuda")

    @pytest.mark.parametrize(
        ("operator", "change", "error", "message"),
        [
            ("conv_bn_relu", {0: torch.float32}, TypeError, "x: dtype Float; accepted: Half, BFloat16"),
            ("conv_bn_relu", {1: torch.bfloat16}, TypeError, "weight: dtype BFloat16; accepted: Half"),
            (
                "conv_bn_relu",
                {1: (8, 24, 3, 3)},
                ValueError,
                r"weight: shape \[8, 24, 3, 3\]; accepted: \[8, 16, 3, 3\]",
            ),
            ("conv_bn_relu", {2: (9,)}, ValueError, r"bias: shape \[9\]; accepted: \[8\]"),
            (
                "conv_bn_relu",
                {3: (2, 8, 3, 3)},
                ValueError,
                r"residual: shape \[2, 8, 3, 3\]; accepted: \[2, 8, 3, 4\]",
            ),
            ("conv_bn_relu", {0: (2, 16, 5)}, ValueError, r"x: shape \[2, 16, 5\]; accepted: 4 dimensions"),
            ("conv_bn_relu", {1: (8, 16, 7, 7)}, ValueError, "weight: kernel of 7; accepted: up to 5"),
            ("conv_bn_relu", {2: torch.bfloat16}, TypeError, "bias: dtype BFloat16; accepted: Half, Float"),
            ("conv_bn_relu", {5: 0}, ValueError, "stride: 0; accepted: at least 1"),
            ("conv_bn_relu", {6: -1}, ValueError, "padding: -1; accepted: at least 0"),
            ("concat_conv_bn_relu", {0: (2, 16, 5)}, ValueError, r"a: shape \[2, 16, 5\]; accepted: 4 dimensions"),
            (
                "concat_conv_bn_relu",
                {1: (2, 8, 5, 4)},
                ValueError,
                r"b: shape \[2, 8, 5, 4\]; accepted: \[2, 8, 5, 3\]",
            ),
            ("upsample", {1: (16, 8, 3, 3)}, ValueError, r"accepted: \[16, 8, 4, 4\]"),
            ("bottleneck", {2: (32, 32, 1, 1)}, ValueError, r"conv: shape \[32, 32, 1, 1\]; accepted"),
            ("bottleneck", {1: (48, 32, 1, 1)}, ValueError, "reduce's outputs: 48; accepted: 32, 64"),
            ("stem", {0: (1, 3, 9, 14)}, ValueError, "accepted: height and width even and at least 8"),
            ("stem", {0: (1, 5, 10, 14)}, ValueError, "x's channels: 5; accepted: 1 to 4"),
            ("stem", {1: (4, 4, 3, 7, 7), 2: (4, 4)}, ValueError, "4; accepted: a multiple of 8 up to 128"),
            ("head", {0: (1, 16, 4, 5)}, ValueError, r"features: shape \[1, 16, 4, 5\]; accepted: \[1, 16, 3, 5\]"),
            ("head", {3: (5, 4, 7, 7)}, ValueError, "image_weight's outputs: 5; accepted: 1 to 4"),
            ("head", {5: (1, 2, 10, 14)}, ValueError, r"image: shape \[1, 2, 10, 14\]; accepted: \[1, 3, 10, 14\]"),
            ("head", {5: torch.int32}, TypeError, "image: dtype Int; accepted: a floating dtype"),
        ],
    )
    def test_of_the_dispatcher_operators(
        self, device: str, operator: str, change: dict[int, Any], error: type[Exception], message: str
    ) -> None:
        tensors = list(CASES[operator](device, torch.float16)[1].values())
        values: list[Any] = {
            "conv_bn_relu": [*tensors, True, 2, 1],
            "concat_conv_bn_relu": [*tensors, True, 1],
            "upsample": tensors,
            "bottleneck": tensors,
            "stem": [*tensors, True],
            "head": [*tensors, random(device, torch.float16, 1, 3, 10, 14), True, False, False],
        }[operator]
        for index, new in change.items():
            if isinstance(new, torch.dtype):
                values[index] = values[index].to(new)
            else:
                values[index] = random(device, torch.float16, *new) if isinstance(new, tuple) else new
        with pytest.raises(error, match=message):
            getattr(torch.ops.fastden_cuda, operator)(*values)
