"""Operators refuse arguments with an error that names argument, value and what is accepted; and empty batches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from fastden import ops

Case = tuple[Callable[..., Any], dict[str, Any]]


def case(name: str) -> Case:
    """An operator with arguments that fit."""
    r = torch.randn
    arguments: dict[str, dict[str, Any]] = {
        "conv_bn_relu": {"x": r(2, 3, 6, 5), "weight": r(4, 3, 3, 3), "bias": r(4), "residual": r(2, 4, 6, 5)}
        | {"padding": 1},
        "concat_conv_bn_relu": {"a": r(2, 3, 6, 5), "b": r(2, 2, 6, 5), "weight": r(4, 5, 3, 3), "bias": r(4)},
        "upsample": {"x": r(2, 3, 6, 5), "weight": r(3, 4, 4, 4), "bias": r(4)},
        "bottleneck": {"x": r(2, 6, 5, 5), "reduce": r(2, 6, 1, 1), "conv": r(2, 2, 3, 3), "expand": r(6, 2, 1, 1)},
        "stem": {"x": r(2, 4, 10, 12), "weight": r(4, 5, 4, 7, 7), "bias": r(4, 5)},
        "head": {
            "features": r(2, 5, 3, 4),
            "x": r(2, 4, 10, 12),
            "weight": r(12, 5, 4, 4),
            "image_weight": r(3, 4, 7, 7),
            "bias": r(3),
        },
    }  # fmt: skip
    return getattr(ops, name), arguments[name]


OPERATORS = ("conv_bn_relu", "concat_conv_bn_relu", "upsample", "bottleneck", "stem", "head")
#: Operator, argument, its change, and the error.
WRONG = [
    ("conv_bn_relu", "x", lambda t: t[0], r"x: shape \(3, 6, 5\); accepted: \(N, C, H, W\)"),
    ("conv_bn_relu", "weight", lambda t: t[:, :2], r"weight: shape \(4, 2, 3, 3\); accepted: \(O, 3, k, k\)"),
    ("conv_bn_relu", "weight", lambda t: t[..., :2], r"weight: shape \(4, 3, 3, 2\); accepted: \(O, 3, k, k\)"),
    ("conv_bn_relu", "bias", lambda t: t[:3], r"bias: shape \(3,\); accepted: \(4,\)"),
    ("conv_bn_relu", "residual", lambda t: t[:1], r"residual: shape \(1, 4, 6, 5\); accepted: \(2, 4, 6, 5\)"),
    ("conv_bn_relu", "padding", lambda _: -1, r"padding: -1; accepted: a whole number of at least 0"),
    ("conv_bn_relu", "x", lambda t: t[:, :, :0], r"x: shape \(2, 3, 0, 5\); accepted: height and width of at least 1"),
    ("concat_conv_bn_relu", "b", lambda t: t[..., :4], r"b: shape \(2, 2, 6, 4\); accepted: \(2, C, 6, 5\)"),
    ("concat_conv_bn_relu", "weight", lambda t: t[:, :4], r"weight: shape \(4, 4, 3, 3\); accepted: \(O, 5, k, k\)"),
    ("upsample", "weight", lambda t: t[:2], r"weight: shape \(2, 4, 4, 4\); accepted: \(3, O, 4, 4\)"),
    ("bottleneck", "conv", lambda t: t[:1], r"conv: shape \(1, 2, 3, 3\); accepted: \(2, 2, 3, 3\)"),
    ("bottleneck", "expand", lambda t: t[:5], r"expand: shape \(5, 2, 1, 1\); accepted: \(6, 2, 1, 1\)"),
    ("stem", "x", lambda t: t[:, :, 1:], r"x: shape \(2, 4, 9, 12\); accepted: .* H and W even and at least 8"),
    ("stem", "weight", lambda t: t[:3], r"weight: shape \(3, 5, 4, 7, 7\); accepted: \(4, O, 4, 7, 7\)"),
    ("head", "features", lambda t: t[..., 1:], r"features: shape \(2, 5, 3, 3\); accepted: \(2, M, 3, 4\)"),
    ("head", "image_weight", lambda t: t[:2], r"weight: shape \(12, 5, 4, 4\); accepted: \(8, 5, 4, 4\)"),
]


@pytest.mark.parametrize(("name", "argument", "change", "message"), WRONG)
def test_shapes(name: str, argument: str, change: Callable[[Any], Any], message: str) -> None:
    function, arguments = case(name)
    arguments[argument] = change(arguments[argument])
    with pytest.raises(ValueError, match=message):
        function(**arguments)


@pytest.mark.parametrize("name", OPERATORS)
def test_dtypes_and_types(name: str) -> None:
    function, arguments = case(name)
    first, second = list(arguments)[:2]
    refusal = rf"{second}: dtype torch.float64; accepted: torch.float32, that of {first}"
    for device in ("cpu", "meta"):  # which has no autocast to ask for
        there = {name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in arguments.items()}
        with pytest.raises(TypeError, match=refusal):
            function(**{**there, second: there[second].double()})
    with pytest.raises(TypeError, match=rf"{first}: dtype torch.int64; accepted: a floating dtype"):
        function(**{**arguments, first: arguments[first].long()})
    with pytest.raises(TypeError, match=rf"{first}: ndarray; accepted: a torch.Tensor"):
        function(**{**arguments, first: arguments[first].numpy()})


@pytest.mark.parametrize("name", OPERATORS)
def test_devices(name: str) -> None:
    function, arguments = case(name)
    second = list(arguments)[1]
    with pytest.raises(ValueError, match=rf"{second}: on meta; accepted: cpu, that of"):
        function(**{**arguments, second: arguments[second].to("meta")})


@pytest.mark.parametrize("name", OPERATORS)
def test_an_empty_batch_gives_an_empty_result(name: str) -> None:
    function, arguments = case(name)
    whole = function(**arguments)
    batched = ("x", "a", "b", "features", "residual")
    empty = function(**{key: value[:0] if key in batched else value for key, value in arguments.items()})
    assert empty.shape == (0, *whole.shape[1:])


def test_batch_norm() -> None:
    function, arguments = case("conv_bn_relu")
    with pytest.raises(TypeError, match=r"bn: BatchNorm2d; accepted: fastden.ops.BatchNorm \(BatchNorm.of\(module\)\)"):
        function(**arguments, bn=nn.BatchNorm2d(4))
    with pytest.raises(ValueError, match=r"bn.weight: shape \(5,\); accepted: \(4,\)"):
        function(**arguments, bn=ops.BatchNorm.of(nn.BatchNorm2d(5).eval()))
    function, arguments = case("bottleneck")
    bns = tuple(ops.BatchNorm.of(nn.BatchNorm2d(channels).eval()) for channels in (2, 2, 5))
    with pytest.raises(ValueError, match=r"bns\[2\].weight: shape \(5,\); accepted: \(6,\)"):
        function(**arguments, bns=bns)


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (nn.BatchNorm2d(4, momentum=None), r"bn: momentum=None .*; accepted: a number"),
        (nn.BatchNorm2d(4, affine=False), "bn: affine=False; accepted: True"),
        (nn.BatchNorm2d(4, track_running_stats=False), "bn: track_running_stats=False; accepted: True"),
        (nn.SyncBatchNorm(4), "bn: SyncBatchNorm in training; accepted: BatchNorm2d, or SyncBatchNorm in evaluation"),
    ],
)
def test_normalisation_that_operators_do_not_have(module: nn.BatchNorm2d, message: str) -> None:
    before = module.num_batches_tracked
    with pytest.raises(ValueError, match=message):
        ops.BatchNorm.of(module)
    assert module.num_batches_tracked is before
    assert before is None or before == 0


def test_synchronised_normalisation_in_evaluation() -> None:
    module = nn.SyncBatchNorm(4).eval()
    function, arguments = case("conv_bn_relu")
    state = ops.BatchNorm.of(module)  # type: ignore[arg-type]
    plain = ops.BatchNorm.of(nn.BatchNorm2d(4).eval())
    assert torch.equal(function(**arguments, bn=state), function(**arguments, bn=plain))


@pytest.mark.parametrize("name", OPERATORS)
def test_biases_may_be_float32(name: str) -> None:
    """They may, beside half precision; PyTorch's own operations then round them."""
    function, arguments = case(name)
    halves = {key: value if key == "padding" else value.bfloat16() for key, value in arguments.items()}
    wide = {key: value.float() if key == "bias" else value for key, value in halves.items()}
    assert torch.equal(function(**wide), function(**halves))


def test_image_of_the_head() -> None:
    function, arguments = case("head")
    image = torch.rand(2, 3, 10, 12)
    with pytest.raises(ValueError, match=r"image: shape \(2, 3, 10, 11\); accepted: \(2, K, 10, 12\)"):
        function(**arguments, image=image[..., 1:])
    with pytest.raises(
        ValueError, match=r"image: shape \(2, 2, 10, 12\) on cpu; accepted: at least 3 channels, on cpu"
    ):
        function(**arguments, image=image[:, 1:])


def test_autocast_takes_mixed_dtypes() -> None:
    function, arguments = case("conv_bn_relu")
    with torch.autocast("cpu", torch.bfloat16):
        assert function(**{**arguments, "x": arguments["x"].bfloat16()}).dtype in (torch.bfloat16, torch.float32)


@pytest.mark.parametrize("name", OPERATORS)
def test_required_tensors(name: str) -> None:
    function, arguments = case(name)
    optional = {"bias", "residual"} if name not in ("stem", "head") else set()
    for argument, value in arguments.items():
        if isinstance(value, torch.Tensor) and argument not in optional:
            with pytest.raises(TypeError, match=rf"^{argument}: NoneType; accepted: a torch.Tensor"):
                function(**{**arguments, argument: None})
        elif argument in optional:
            function(**{**arguments, argument: None})


@pytest.mark.parametrize(
    ("name", "argument"),
    [
        ("conv_bn_relu", "relu"),
        ("concat_conv_bn_relu", "relu"),
        ("stem", "relu"),
        ("head", "add_input"),
        ("head", "clamp"),
        ("head", "composed"),
    ],
)
def test_flags(name: str, argument: str) -> None:
    function, arguments = case(name)
    with pytest.raises(ValueError, match=rf"{argument}: 'no'; accepted: True or False"):
        function(**arguments, **{argument: "no"})


def test_numbers_are_no_truth_values() -> None:
    function, arguments = case("conv_bn_relu")
    for argument in ("stride", "padding"):
        with pytest.raises(ValueError, match=rf"{argument}: True; accepted: a whole number"):
            function(**{**arguments, argument: True})


#: Operator, its arguments that change, and the one that the error names.
EMPTY: list[tuple[str, dict[str, Callable[[torch.Tensor], torch.Tensor]], str]] = [
    ("conv_bn_relu", {"x": lambda t: t[:, :0], "weight": lambda t: t[:, :0]}, "weight"),
    ("conv_bn_relu", {"weight": lambda t: t[:0], "bias": lambda t: t[:0], "residual": lambda t: t[:, :0]}, "weight"),
    ("conv_bn_relu", {"weight": lambda t: t[..., :0, :0]}, "weight"),
    ("concat_conv_bn_relu", {"weight": lambda t: t[:0], "bias": lambda t: t[:0]}, "weight"),
    ("upsample", {"x": lambda t: t[:, :0], "weight": lambda t: t[:0]}, "weight"),
    ("upsample", {"weight": lambda t: t[:, :0], "bias": lambda t: t[:0]}, "weight"),
    ("bottleneck", {"reduce": lambda t: t[:0], "conv": lambda t: t[:0, :0], "expand": lambda t: t[:, :0]}, "reduce"),
    ("stem", {"weight": lambda t: t[:, :0], "bias": lambda t: t[:, :0]}, "weight"),
    ("head", {"weight": lambda t: t[:0], "image_weight": lambda t: t[:0], "bias": lambda t: t[:0]}, "weight"),
]


@pytest.mark.parametrize(("name", "changes", "named"), EMPTY)
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_empty_dimensions(
    backend: str, name: str, changes: dict[str, Callable[[torch.Tensor], torch.Tensor]], named: str
) -> None:
    function, arguments = case(name)
    arguments |= {argument: change(arguments[argument]) for argument, change in changes.items()}
    with pytest.raises(ValueError, match=rf"{named}: shape \(.*\b0\b.*\); accepted: no empty dimension"):
        function(**arguments, backend=backend)


def test_shape_functions_refuse_empty_dimensions() -> None:
    x, weight = torch.empty(1, 3, 4, 4, device="meta"), torch.empty(0, 3, 3, 3, device="meta")
    with pytest.raises(RuntimeError, match=r"weight: shape \(0, 3, 3, 3\); accepted: no empty dimension"):
        torch.ops.fastden.conv_bn_relu(x, weight, None, None, True, 1, 1)


def test_three_biases_and_normalisations() -> None:
    function, arguments = case("bottleneck")
    with pytest.raises(TypeError, match="biases: tuple of 1; accepted: a tuple of three"):
        function(**arguments, biases=(None,))
    with pytest.raises(TypeError, match="bns: NoneType; accepted: a tuple of three"):
        function(**arguments, bns=None)
