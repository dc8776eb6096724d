"""CUDA kernels run on a GPU if the extension is built, else emulated on the CPU; a process uses one of the two."""

from __future__ import annotations

import getpass
import shutil
import tempfile
from pathlib import Path

import pytest
import torch

from fastden.cuda import build, extension
from fastden.ops import backends


def emulated(root: Path) -> Path:
    """The library whose kernels run on the CPU; built once for the same sources, flags and PyTorch."""
    toolkit = build.find_toolkit()
    if toolkit is None:
        pytest.skip("the emulated build needs the CUDA toolkit's headers: nvcc is not found")
    if shutil.which("g++") is None:
        pytest.skip("the emulated build needs g++")
    wanted = build.plan(root / "csrc", emulator=root / "tests" / "emulator", toolkit=toolkit)
    cache = Path(tempfile.gettempdir()) / f"fastden-emulated-{getpass.getuser()}"
    folder = cache / wanted.key(build.environment())
    library = folder / f"{build.NAME}.so"
    if not library.is_file():
        try:
            build.build(wanted, folder)
        except build.BuildError as error:
            pytest.fail(f"{error}\n{error.output}", pytrace=False)
    return library


@pytest.fixture(scope="session", params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest, root: Path) -> str:
    """Where kernels run: emulated on the CPU, or on a GPU."""
    built = extension.why_not() if torch.cuda.is_available() else ["no CUDA device"]
    if request.param == "cuda":
        if built:
            pytest.skip(f"the CUDA extension: {built[0]}")
    elif not built:
        pytest.skip("the CUDA extension is tested on the GPU here")
    else:
        assert extension.load(emulated(root))["emulated"]
    return str(request.param)


@pytest.fixture(autouse=True)
def nothing_proven(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only what a test asks for runs on kernels, whatever is proven of this GPU."""
    monkeypatch.setattr(backends, "PROVEN", {})


@pytest.fixture(params=[9, 8], ids=["hopper", "portable"])
def capability(request: pytest.FixtureRequest, device: str, monkeypatch: pytest.MonkeyPatch) -> int:
    """Major compute capability: the emulated GPU's, which decides the choice of a kernel, or the real GPU's own."""
    if device == "cuda":
        own = torch.cuda.get_device_capability()[0]
        if (own == 9) != (request.param == 9):
            pytest.skip(f"this GPU's compute capability begins with {own}")
        return own
    monkeypatch.setenv("FASTDEN_EMULATED_MAJOR", str(request.param))
    return int(request.param)
