"""The whole network on Triton: the same result, gradients and statistics as on PyTorch's own operations."""

from __future__ import annotations

import copy

import pytest
import torch

import fastden
from fastden import ops
from tests.helpers import image_without_kinks, max_error, random_network, relative_l2


@pytest.mark.parametrize("backward", ["kernels", None])
@pytest.mark.parametrize("training", [False, True])
def test_composed_network(device: str, monkeypatch: pytest.MonkeyPatch, training: bool, backward: str | None) -> None:
    """Against float64 on the CPU, and without cuDNN, which would compose the weights: kernels alone are judged.

    Without ``backward``, PyTorch computes the gradients that it computes by default.

    On an H200, with cuDNN, the gradients of conv0.weight on PyTorch and on Triton differed by 7e-4 (relative L2) in
    training, and both from float64's in the same digits.
    """
    if backward is None:
        monkeypatch.delenv("FASTDEN_BACKWARD")
    model = random_network(composed=True).train(training)
    x = image_without_kinks(model, 2, 3, 14, 10)
    other = copy.deepcopy(model).to(device)
    model.double()
    y = model(x.double(), 0.1)
    y.square().mean().backward()
    with ops.use_backend("triton"), torch.backends.cudnn.flags(enabled=False, allow_tf32=False):
        result = other(x.to(device), 0.1)
        result.square().mean().backward()
    assert max_error(result.detach().cpu(), y.detach()) < 1e-5
    # With batch statistics the gradient of biases in front of BN is only rounding noise.
    silent = {"conv1.conv.bias", "conv2.conv.bias", "conv3.conv.bias"} if training else set()
    for (name, one), two in zip(model.named_parameters(), other.parameters(), strict=True):
        assert one.grad is not None
        assert two.grad is not None
        if name not in silent:
            assert relative_l2(two.grad.cpu(), one.grad) < 1e-4, name
    for (name, one), two in zip(model.named_buffers(), other.named_buffers(), strict=True):
        torch.testing.assert_close(two[1].cpu().to(one.dtype), one, rtol=1e-5, atol=1e-5, msg=name)


def test_fused_network(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fused = fastden.fuse(random_network().to(device))
    x = torch.rand(1, 3, 13, 18, device=device)
    with torch.no_grad():
        expected = fused(x, 0.1)
        # If asked for, the kernels run even where oneDNN could.
        monkeypatch.setattr(fused, "_onednn_network", lambda: pytest.fail("oneDNN was taken"))
        with ops.use_backend("triton"):
            assert max_error(fused(x, 0.1), expected) < 1e-5
