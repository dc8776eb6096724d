"""Importing fastden loads no compiler; the compiler learns the same as from its own decorators."""

from __future__ import annotations

import subprocess
import sys

import torch
from torch import Tensor, nn

from fastden.ops.tracing import constant_result, exporting, has_autocast


def test_the_mark_is_that_of_the_decorator() -> None:
    def function() -> int:
        return 1

    def other() -> int:
        return 1

    assert vars(constant_result(function)) == vars(torch.compiler.assume_constant_result(other)) != {}


class Answer(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + 1 if exporting() else x


def test_exporting_is_told_from_compiling() -> None:
    x = torch.zeros(2)
    for _ in range(2):
        assert torch.equal(torch.compile(Answer(), backend="eager", fullgraph=True)(x), x)
        for strict in (False, True):
            assert torch.equal(torch.export.export(Answer(), (x,), strict=strict).module()(x), x + 1)
    assert torch.equal(Answer()(x), x)


def test_devices_with_autocast_are_known_to_compiled_code() -> None:
    def answer(x: Tensor) -> Tensor:
        return x + has_autocast("cpu") + 2 * has_autocast("meta")

    assert torch.compile(answer, backend="eager", fullgraph=True)(torch.zeros(())) == answer(torch.zeros(())) == 1


def test_denoising_loads_no_compiler_and_no_scientific_packages() -> None:
    """Each costs a command up to a second: Dynamo as much as PyTorch itself."""
    code = """
import sys
import numpy as np
import fastden
fastden.denoise(np.random.default_rng(0).integers(0, 256, (24, 32, 3), np.uint8))
print([name for name in ("torch._dynamo", "skimage", "scipy", "sympy", "triton", "lightning") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
