"""Under autocast an operator gives the same dtype on every backend, and the head adds the image unrounded."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastden import ops
from tests.helpers import relative_l2
from tests.ops.test_checks import OPERATORS, case


def moved(value: Any, device: str) -> Any:
    return value.to(device) if isinstance(value, Tensor) else value


@pytest.mark.parametrize("normalise", [False, True])
@pytest.mark.parametrize("name", OPERATORS)
def test_dtypes(device: str, name: str, normalise: bool) -> None:
    function, arguments = case(name)
    arguments = {key: moved(value, device) for key, value in arguments.items()}
    channels = {"conv_bn_relu": 4, "concat_conv_bn_relu": 4, "stem": 5}.get(name)
    if normalise and channels is None:
        pytest.skip(f"{name} has no normalisation of its own")
    found = {}
    for backend in ("torch", "triton"):
        extra = {}
        if channels is not None and normalise:
            extra["bn"] = ops.BatchNorm.of(nn.BatchNorm2d(channels).to(device))
        with torch.autocast(device, torch.bfloat16):
            found[backend] = function(**arguments, **extra, backend=backend)
    assert found["torch"].dtype == found["triton"].dtype
    assert found["torch"].dtype == (torch.float32 if name == "head" else torch.bfloat16)
    assert relative_l2(found["triton"], found["torch"]) < 2e-2


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_the_head_does_not_round_what_it_adds(device: str, backend: str) -> None:
    function, arguments = case("head")
    x = torch.rand(2, 4, 10, 12).to(device)
    silent = {key: torch.zeros_like(value).to(device) for key, value in arguments.items()} | {"x": x}
    with torch.autocast(device, torch.bfloat16):
        assert torch.equal(function(**silent, backend=backend), x[:, :3, 3:-3, 3:-3])
        corrections = function(**silent, add_input=False, backend=backend)
    assert corrections.dtype == torch.bfloat16


@pytest.mark.parametrize("name", ["conv_bn_relu", "upsample", "stem", "head"])
def test_biases_are_not_rounded(device: str, name: str) -> None:
    """Kernels add them to float32 sums. Here those are 1, and the bias is half a unit of float16 and a little more.

    The little is lost where the bias is rounded; the sum then lies between two numbers, and goes down instead of up.
    bfloat16 is left out: Triton's interpreter truncates float32 to it instead of rounding.
    """
    function, arguments = case(name)
    tensors = {
        key: torch.zeros_like(value).to(device).half() if isinstance(value, Tensor) else value
        for key, value in arguments.items()
    }
    tensors["x"] += 1
    if name == "conv_bn_relu":
        tensors["residual"] += 1
    elif name == "upsample":
        tensors["weight"][0, :, 1:3, 1:3] = 1  # one of these taps reaches each pixel
    elif name == "stem":
        tensors["weight"][:, :, 0, 3, 3] = 1
    tensors["bias"] = torch.full(tensors["bias"].shape, 2**-11 + 2**-22, device=device)
    assert (function(**tensors, backend="triton") == 1 + 2**-10).all()
    tensors["bias"] = tensors["bias"].half()
    assert (function(**tensors, backend="triton") == 1).all()
