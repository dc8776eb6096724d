"""Fixtures of all tests: fixed seeds, poisoned memory, no network, and the folder of real photographs."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Before anything imports huggingface_hub, which reads it once: no test may reach the network.
os.environ["HF_HUB_OFFLINE"] = "1"

# Before CUDA starts: without it cuBLAS warns under deterministic algorithms, which the fixture below turns on.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

# Before anything imports Triton, which reads it when kernels are defined: without a GPU they are interpreted.
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# The cache of torch.compile does not tell a limited instruction set from the processor's own: with kernels of a run
# without the limit, a compiled network gave NaN under AVX2. Importing torch._inductor sets the variable.
if "TORCHINDUCTOR_CACHE_DIR" not in os.environ:
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir

    capability = torch.backends.cpu.get_cpu_capability().replace(" ", "_").lower()
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = f"{default_cache_dir()}_{capability}"

import hypothesis
import pytest

ROOT = Path(__file__).resolve().parent.parent
SHARED_DATA = ROOT.parent / "shared" / "data"

hypothesis.settings.register_profile("fastden", deadline=None, print_blob=True, derandomize="CI" in os.environ)
hypothesis.settings.load_profile("fastden")


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("no CUDA device")


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """Uninitialised tensors hold NaN (integers their maximum), so that an output which nothing wrote shows."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository's root."""
    return ROOT


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real photographs; skips the test where it is absent. Mark such tests ``shared``."""
    if not SHARED_DATA.is_dir():
        pytest.skip(f"no photographs in {SHARED_DATA}")
    return SHARED_DATA


@pytest.fixture
def unreadable_inner(monkeypatch: pytest.MonkeyPatch) -> None:
    """Folders named ``inner`` cannot be listed. Permissions would not do: root ignores them."""
    scandir = os.scandir

    def refused(path: Any = ".") -> Any:
        if not isinstance(path, int) and Path(path).name == "inner":  # shutil lists folders by their descriptors
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refused)
