"""Importing fastden loads no compiler; the compiler learns the same as from its own decorators."""

from __future__ import annotations

import subprocess
import sys

import torch

from fastden.ops._tracing import constant_result


def test_the_mark_is_that_of_the_decorator() -> None:
    def function() -> int:
        return 1

    def other() -> int:
        return 1

    assert vars(constant_result(function)) == vars(torch.compiler.assume_constant_result(other)) != {}


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
