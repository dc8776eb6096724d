"""concat_conv_fp8's reference: exact where nothing is rounded, as near as e4m3 elsewhere; refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from fastden import ops
from fastden.cuda import extension, limits
from fastden.ops import backends
from fastden.ops.concat_conv_fp8 import rounded, rounded_factors
from tests.helpers import relative_l2


def expected(a: Tensor, b: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.conv2d(torch.cat([a, b], 1), weight, bias, padding=1).relu()


def inputs(dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    torch.manual_seed(0)
    a, b, weight, bias = torch.rand(2, 40, 9, 7), torch.randn(2, 8, 9, 7), torch.randn(16, 48, 3, 3), torch.randn(16)
    tensors = {"a": a, "b": b, "weight": weight, "bias": bias}
    return {name: tensor.to(dtype) for name, tensor in tensors.items()} | {
        "ranges": torch.cat([a, b], 1).abs().amax((0, 2, 3))
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_exact_where_nothing_is_rounded(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    a, b = (torch.randint(0, 8, (1, channels, 5, 6)).to(dtype) for channels in (4, 2))
    weight = torch.randint(-7, 8, (3, 6, 3, 3)).to(dtype)
    weight[:, 0, 0, 0] = 7.0  # so that each output's steps are the same power of two
    bias, ranges = torch.randint(-3, 4, (3,)).to(dtype), torch.full((6,), 224.0)
    y = ops.concat_conv_fp8(a, b, weight, bias, ranges=ranges)
    assert y.dtype == dtype
    assert torch.equal(y, expected(*(x.double() for x in (a, b, weight, bias))).to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_errs_as_e4m3_does(dtype: torch.dtype) -> None:
    given = inputs(dtype)
    exact = expected(*(given[name].double() for name in ("a", "b", "weight", "bias")))
    error = relative_l2(ops.concat_conv_fp8(**given), exact)
    assert 1e-3 < error < 2**-4  # three bits of mantissa: each factor is off by at most 1/16


def test_channels_have_their_own_steps() -> None:
    """Equal results but for rounding where a channel is small and its weights are large."""
    given = inputs()
    factors = torch.logspace(-3, 3, 48)
    a, b = given["a"] * factors[:40, None, None], given["b"] * factors[40:, None, None]
    changed = {"a": a, "b": b, "weight": given["weight"] / factors[:, None, None], "ranges": given["ranges"] * factors}
    y = ops.concat_conv_fp8(**(given | changed))
    assert relative_l2(y, expected(given["a"], given["b"], given["weight"], given["bias"])) < 2**-4
    y = ops.concat_conv_fp8(**(given | changed | {"ranges": torch.ones(48)}))
    assert relative_l2(y, expected(given["a"], given["b"], given["weight"], given["bias"])) > 2**-4


class QuotientsOfCuda(TorchDispatchMode):
    """Division by a number as PyTorch does it on CUDA: times the reciprocal (``div_true_kernel_cuda``)."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.ops.aten.div.Tensor and isinstance(args[1], float):
            return args[0] * torch.tensor(args[1], dtype=args[0].dtype).reciprocal()
        return function(*args, **(kwargs or {}))


def test_codes_do_not_depend_on_how_a_device_divides() -> None:
    """The kernel divides by 448, and its codes are compared with these."""
    torch.manual_seed(0)
    x, weight = torch.randn(1, 160, 11, 17).half(), (torch.randn(64, 160, 3, 3) / 38).half()
    ranges = x.float().abs().amax((0, 2, 3))
    with QuotientsOfCuda():
        assert not torch.equal(ranges / 448.0, ranges / ranges.new_full((), 448.0))
        found = rounded_factors(x, weight, ranges)
    for one, expected in zip(found, rounded_factors(x, weight, ranges), strict=True):
        assert torch.equal(one, expected)


def test_large_values_are_limited() -> None:
    x = torch.tensor([1e6, -1e6, 448.0, 1.0, float("nan"), float("inf")])
    assert rounded(x)[[0, 1, 2, 3, 5]].tolist() == [448.0, -448.0, 448.0, 1.0, 448.0]
    assert rounded(x)[4].isnan()
    given = inputs()
    limited = given | {"a": given["a"].clamp(max=0.5), "ranges": given["ranges"].clone()}
    limited["ranges"][:40] = 0.5
    assert torch.equal(ops.concat_conv_fp8(**limited), ops.concat_conv_fp8(**(limited | {"a": given["a"]})))


def test_channels_of_nothing() -> None:
    given = inputs()
    given["a"], given["ranges"][:40], given["weight"][3] = torch.zeros_like(given["a"]), 0, 0
    y = ops.concat_conv_fp8(**given)
    assert y.isfinite().all()
    assert (y[:, 3] == given["bias"][3].relu()).all()


def test_meta_tensors() -> None:
    """They have no autocast that could be off."""
    given = {name: tensor.to("meta") for name, tensor in inputs(torch.bfloat16).items()}
    y = ops.concat_conv_fp8(**given)
    assert (y.device.type, y.dtype, tuple(y.shape)) == ("meta", torch.bfloat16, (2, 16, 9, 7))


def test_autocast_does_not_round_again() -> None:
    given = inputs()
    with torch.autocast("cpu", torch.bfloat16):
        inside = ops.concat_conv_fp8(**given)
    assert torch.equal(inside, ops.concat_conv_fp8(**given))


def test_an_empty_batch() -> None:
    given = inputs()
    given |= {"a": given["a"][:0], "b": given["b"][:0]}
    assert ops.concat_conv_fp8(**given).shape == (0, 16, 9, 7)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"ranges": torch.ones(47)}, ValueError, r"ranges: shape \(47,\); accepted: \(48,\)"),
        (
            {"ranges": torch.ones(48, dtype=torch.float64)},
            TypeError,
            "ranges: torch.float64 on cpu; accepted: torch.f",
        ),
        ({"ranges": [1.0] * 48}, TypeError, r"ranges: list; accepted: a torch\.Tensor"),
        ({"ranges": torch.ones(48, dtype=torch.int32)}, TypeError, r"ranges: dtype torch\.int32; accepted: a floating"),
        ({"ranges": torch.ones(48, device="meta")}, TypeError, "on meta; accepted: torch.float32 on cpu"),
        ({"weight": torch.ones(16, 48, 5, 5)}, ValueError, r"weight: shape .*; accepted: \(16, 48, 3, 3\)"),
        ({"b": torch.ones(2, 8, 9, 6)}, ValueError, r"b: shape \(2, 8, 9, 6\); accepted: \(2, C, 9, 7\)"),
        ({"a": torch.ones(2, 40, 9, 7, requires_grad=True)}, RuntimeError, "has no gradient; accepted: tensors that"),
        ({"backend": "fast"}, ValueError, "backend: 'fast'; accepted: torch, triton, cuda"),
    ],
)
def test_refusals(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        ops.concat_conv_fp8(**(inputs() | change))


def test_no_derivative_in_forward_mode_is_lost() -> None:
    given = inputs()
    with pytest.raises(RuntimeError, match=r"no transform of torch\.func or forward mode"):
        torch.func.jvp(lambda a: ops.concat_conv_fp8(**{**given, "a": a}), (given["a"],), (given["a"],))


def test_operations_may_be_counted() -> None:
    given = inputs()
    with FlopCounterMode(display=False) as counter:
        counted = ops.concat_conv_fp8(**given)
    assert counter.get_total_flops() > 0
    assert torch.equal(counted, ops.concat_conv_fp8(**given))


def test_triton_has_no_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "unavailable", lambda backend: [])
    monkeypatch.setattr(backends, "_runs_on_cpu", lambda backend: True)
    given = inputs(torch.bfloat16)
    reason = "concat_conv_fp8 has no kernel in Triton; the cuda backend has one"
    assert backends.why_not("concat_conv_fp8", "triton", **given) == [reason]
    with pytest.raises(backends.BackendError, match=reason):
        ops.concat_conv_fp8(**given, backend="triton")


@pytest.mark.parametrize(
    ("capability", "built", "reason"),
    [
        ((8, 9), ["8.9"], "compute capability 8.9; accepted: 9.0"),
        ((10, 0), ["9.0a", "10.0"], "compute capability 10.0; accepted: 9.0"),
        ((9, 0), ["8.0+PTX"], "compute capability 9.0; built without wgmma, for 8.0+PTX"),
        ((9, 0), ["9.0a"], None),
    ],
)
def test_gpus(
    capability: tuple[int, int], built: list[str], reason: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(extension, "load", lambda: {"architectures": built})
    found = limits._why_not_device("concat_conv_fp8", torch.device("cuda"))
    assert [one.split(": run")[0] for one in found] == ([] if reason is None else [reason])
