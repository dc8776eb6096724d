"""network_input: where the kernel is chosen. Its results: tests/kernels/test_network_input.py."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fastden import ops
from fastden.ops import backends
from fastden.ops import network_input as operator


def test_automatic_where_it_is_proven(monkeypatch: pytest.MonkeyPatch) -> None:
    class OnGpu:
        device = torch.device("cuda")

        def __init__(self, *shape: int) -> None:
            self.shape = shape

        def dim(self) -> int:
            return len(self.shape)

    image: Any = OnGpu(1, 3, 8, 8)
    curve: Any = OnGpu(1, 8)
    level_map: Any = OnGpu(1, 1, 8, 8)
    monkeypatch.setattr(backends, "PROVEN", {("triton", "network_input", (9, 0), "bfloat16"): "a.json"})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(operator, "why_not", lambda operator, backend, **tensors: [])
    monkeypatch.setattr(operator, "wants_gradient", lambda *tensors: False)
    monkeypatch.setattr(backends, "interpreted", lambda: False)
    monkeypatch.setattr(backends, "_has_compiler", lambda: True)
    monkeypatch.setattr(backends, "why_not_started", lambda device: "")
    assert operator.can_prepare(image, curve, torch.bfloat16)
    assert not operator.can_prepare(image, curve, torch.float16)
    assert not operator.can_prepare(torch.rand(1, 3, 8, 8), torch.rand(1, 8), torch.bfloat16)
    # Times are of curves: PyTorch takes fewer steps for a map, or for none.
    assert not operator.can_prepare(image, None, torch.bfloat16)
    assert not operator.can_prepare(image, level_map, torch.bfloat16)
    with ops.use_backend("torch"):
        assert not operator.can_prepare(image, curve, torch.bfloat16)
    with ops.use_backend("triton"):
        for level in (None, curve, level_map):
            assert operator.can_prepare(image, level, torch.bfloat16)
    monkeypatch.setattr(backends, "why_not_started", lambda device: "OSError: read-only")
    assert not operator.can_prepare(image, curve, torch.bfloat16)


def test_where_it_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Then PyTorch's operations make the same input, with gradients and in float64."""
    monkeypatch.setattr(operator, "why_not", lambda operator, backend, **tensors: [])
    image, level = torch.rand(1, 3, 8, 8), torch.rand(1, 1, 8, 8)
    assert not operator.can_prepare(image, level, torch.float32), "nothing is proven, and nothing asks for it"
    with ops.use_backend("triton"):
        assert operator.can_prepare(image, level, torch.float32)
        assert not operator.can_prepare(image, level, torch.float64)
        assert not operator.can_prepare(image, level.to("meta"), torch.float32)
        assert not operator.can_prepare(image, level.clone().requires_grad_(), torch.float32)
        assert not operator.can_prepare(image.clone().requires_grad_(), None, torch.float32)
        monkeypatch.setattr(operator, "why_not", lambda operator, backend, **tensors: ["a reason"])
        assert not operator.can_prepare(image, level, torch.float32)


@pytest.mark.parametrize("backend", ["torch", "cuda"])
def test_other_backends_have_no_kernel(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operator, "why_not", lambda operator, backend, **tensors: [])
    with ops.use_backend(backend):
        assert not operator.can_prepare(torch.rand(1, 3, 8, 8), None, torch.float32)
