"""oneDNN's post-operations in the operators: where they run, and that they err no more than PyTorch's operations."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from unittest.mock import patch

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from fastden import ops
from fastden.algebra import compose_head, separated_head
from fastden.ops import post_operations
from tests.helpers import max_error
from tests.rounding import assert_as_exact, slack

CPU = torch.device("cpu")
DTYPES = [dtype for dtype in (torch.float32, torch.bfloat16) if not post_operations.why_not(CPU, dtype)]
pytestmark = pytest.mark.skipif(not DTYPES, reason="no oneDNN")
Operator = Callable[..., Tensor]


def arguments(operator: str, size: tuple[int, int], batch: int) -> tuple[Operator, list[Tensor]]:
    """A folded operator, called with its tensors, and the tensors; float64."""

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64)

    (h, w), channels = size, 32
    x = random(batch, channels, h, w)
    if operator == "conv_bn_relu":
        return lambda x, w, b: ops.conv_bn_relu(x, w, b, padding=1), [x, random(5, channels, 3, 3), random(5)]
    if operator == "residual":
        weights = [random(5, channels, 3, 3), random(5), random(batch, 5, h, w)]
        return lambda x, w, b, r: ops.conv_bn_relu(x, w, b, residual=r, relu=h % 2 == 0, padding=1), [x, *weights]
    if operator == "concat_conv_bn_relu":
        weights = [random(7, channels + 3, 3, 3), random(7)]
        return ops.concat_conv_bn_relu, [x, random(batch, 3, h, w), *weights]
    if operator == "bottleneck":
        weights = [random(channels, channels, 1, 1), random(channels, channels, 3, 3), random(channels, channels, 1, 1)]

        def run(x: Tensor, reduce: Tensor, conv: Tensor, expand: Tensor, *biases: Tensor) -> Tensor:
            return ops.bottleneck(x, reduce, conv, expand, biases=biases)  # type: ignore[arg-type]

        return run, [x, *weights, *(random(channels) for _ in range(3))]
    if operator == "stem":
        return ops.stem, [random(batch, 3, 4 * h + 6, 4 * w + 6), random(4, 5, 3, 7, 7), random(4, 5)]
    image = random(batch, 3, 2 * h + 6, 2 * w + 6)
    factors = [(8, 3, 5, 5), (8,), (channels, 8, 4, 4), (8,), (3, 16, 3, 3), (3,)]
    weights = list(compose_head(*(random(*shape) for shape in factors)))
    return lambda *tensors: ops.head(*tensors, composed=True), [random(batch, channels, h + 1, w + 1), image, *weights]


OPERATORS = ["conv_bn_relu", "residual", "concat_conv_bn_relu", "bottleneck", "stem", "head"]


@contextmanager
def fused() -> Iterator[list[bool]]:
    """Whether operators used post-operations, call by call; small images do so too here."""
    answers: list[bool] = []
    serves = post_operations.serves

    def recorded(*tensors: Tensor | None) -> bool:
        answers.append(serves(*tensors))
        return answers[-1]

    with patch.object(post_operations, "FEW_VALUES", 20480), patch.object(post_operations, "serves", recorded):
        yield answers


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize(("size", "batch"), [((29, 26), 1), ((27, 31), 2)])
def test_as_exact_as_eager(
    operator: str, size: tuple[int, int], batch: int, layout: torch.memory_format, dtype: torch.dtype
) -> None:
    run, tensors = arguments(operator, size, batch)
    cast = [(t.contiguous(memory_format=layout) if t.dim() == 4 else t).to(dtype) for t in tensors]
    before = [t.clone() for t in cast]
    wide = [t.double() for t in cast]
    exact = run(*wide)
    with fused() as answers:
        found = run(*cast)
    with patch.object(post_operations, "serves", lambda *tensors: False):
        eager = run(*cast)
    assert answers
    assert all(answers)
    assert_as_exact(found, eager, exact, slack(run, *wide, exact=exact, dtype=dtype), borders=False)
    assert found.shape == eager.shape
    assert all(torch.equal(t, old) for t, old in zip(cast, before, strict=True))


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_in_a_weight_is_not_hidden(operator: str, dtype: torch.dtype) -> None:
    """Neither by this operator's ReLU, nor by that of the operator behind it."""
    run, tensors = arguments(operator, (29, 26), 1)
    cast = [t.to(dtype) for t in tensors]
    middle = {"concat_conv_bn_relu": 2, "head": 2}.get(operator, 1)  # the first weight
    cast[middle].view(-1)[0] = torch.nan
    with fused() as answers:
        y = run(*cast)
        shown = y.isnan()
        again = ops.conv_bn_relu(y.repeat(1, 8, 1, 1), torch.ones(4, 8 * y.shape[1], 1, 1, dtype=dtype))
    assert all(answers)
    with patch.object(post_operations, "serves", lambda *tensors: False):
        expected = run(*cast).isnan()
    assert expected[:, :, 2:-2, 2:-2].any()
    # Whether a NaN meets the zeros around the image is up to the convolution.
    assert (shown | ~expected)[:, :, 2:-2, 2:-2].all()
    if operator != "head":  # the head's first tap is one of four phases
        assert again[:, :, 2:-2, 2:-2].isnan().all()


@pytest.mark.parametrize("operator", OPERATORS)
def test_only_where_nothing_watches(operator: str) -> None:
    """Gradients, transforms, recordings and autocast meet PyTorch's own operations."""
    run, tensors = arguments(operator, (29, 26), 1)
    cast = [t.float() for t in tensors]
    with fused() as answers:
        expected = run(*cast)
        assert all(answers)
        answers.clear()
        run(*(t.clone().requires_grad_() for t in cast)).sum().backward()
        torch.func.jvp(lambda x: run(x, *cast[1:]), (cast[0],), (cast[0],))
        mapped = torch.vmap(lambda x: run(x, *cast[1:]))(cast[0][None])
        meta = run(*(t.to("meta") for t in cast))
        with torch.autocast("cpu", torch.bfloat16):
            run(*cast)
        run(*tensors)
        # It counts the arguments of the function, also those that have defaults.
        traced = make_fx(lambda *tensors: run(*tensors))(*cast)  # noqa: PLW0108
        compiled = torch.compile(run, fullgraph=True, backend="eager")(*cast)
        with torch.backends.mkldnn.flags(enabled=False):
            run(*cast)
        assert not any(answers)
    assert meta.shape == expected.shape
    for other in (mapped[0], traced(*cast), compiled):
        assert max_error(other, expected) < 1e-5
    # A module's parameters are no reason against it where no gradient is recorded.
    with fused() as answers, torch.no_grad():
        run(*(torch.nn.Parameter(t) for t in cast))
        assert answers
        assert all(answers)


def test_a_single_small_image_an_empty_batch_and_batch_norm() -> None:
    x, weight = torch.rand(0, 3, 5, 5), torch.rand(4, 3, 3, 3)
    bn = ops.BatchNorm.of(torch.nn.BatchNorm2d(4).eval())
    with fused() as answers, torch.no_grad():
        assert ops.conv_bn_relu(x, weight).shape == (0, 4, 3, 3)
        ops.conv_bn_relu(torch.rand(1, 3, 90, 90), weight, bn=bn)
        ops.conv_bn_relu(torch.rand(1, 3, 5, 5), weight)
        assert not any(answers)


def test_separated_head_skips_taps_of_composed_weights_alone() -> None:
    """Without the promise ``composed`` every tap counts."""
    _, tensors = arguments("head", (29, 26), 1)
    features, image, weight, image_weight, bias = (t.float() for t in tensors)
    weight = torch.rand_like(weight)
    exact = ops.head(*(t.double() for t in (features, image, weight, image_weight, bias)))
    with fused():
        assert max_error(ops.head(features, image, weight, image_weight, bias), exact) < 1e-4
    rows, merge = separated_head(weight)
    assert rows.shape == (48, 32, 1, 4)
    assert merge.shape == (12, 48, 4, 1)
