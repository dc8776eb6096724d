"""The whole network on Triton: the same result, gradients and statistics as on PyTorch's own operations."""

from __future__ import annotations

import copy

import pytest
import torch

import fastden
from fastden import ops
from tests.helpers import image_without_kinks, max_error, random_network, relative_l2


@pytest.mark.parametrize("training", [False, True])
def test_composed_network(device: str, training: bool) -> None:
    model = random_network(composed=True).to(device).train(training)
    other = copy.deepcopy(model)
    x = image_without_kinks(model, 2, 3, 14, 10)
    y = model(x, 0.1)
    y.square().mean().backward()
    with ops.use_backend("triton"):
        result = other(x, 0.1)
        result.square().mean().backward()
    assert max_error(result.detach(), y.detach()) < 1e-5
    # With batch statistics the gradient of biases in front of BN is only rounding noise.
    silent = {"conv1.conv.bias", "conv2.conv.bias", "conv3.conv.bias"} if training else set()
    for (name, one), two in zip(model.named_parameters(), other.parameters(), strict=True):
        assert one.grad is not None
        assert two.grad is not None
        if name not in silent:
            assert relative_l2(two.grad, one.grad) < 1e-4, name
    for (name, one), two in zip(model.named_buffers(), other.named_buffers(), strict=True):
        torch.testing.assert_close(two[1], one, rtol=1e-5, atol=1e-5, msg=name)


def test_fused_network(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fused = fastden.fuse(random_network().to(device))
    x = torch.rand(1, 3, 13, 18, device=device)
    with torch.no_grad():
        expected = fused(x, 0.1)
        # If asked for, the kernels run even where oneDNN could.
        monkeypatch.setattr(fused, "_onednn_network", lambda: pytest.fail("oneDNN was taken"))
        with ops.use_backend("triton"):
            assert max_error(fused(x, 0.1), expected) < 1e-5
