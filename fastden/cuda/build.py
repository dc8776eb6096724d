"""Building the CUDA extension: its sources, flags and GPUs, and the tools that a machine lacks.

:func:`plan` gives sources and flags: to ``setup.py`` (a wheel or an editable installation), to ``fastden build`` (for
the PyTorch that is there, into the user's cache) and to the tests (an emulated build, for the CPU). Importing this
takes the standard library alone: ``setup.py`` loads it by its path, where neither PyTorch nor fastden is installed.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

#: Compute capabilities to build for: those of the data centre and the desktop since 2020; 9.0a has the matrix
#: instructions that 9.0 lacks; the last also as PTX, which later GPUs compile for themselves.
ARCHITECTURES = ("8.0", "8.6", "8.9", "9.0a", "10.0+PTX")
CHOICES = ("auto", "cuda", "none")
#: The extension's name inside the package, and the file name of its description.
NAME = "_cuda"
DESCRIPTION = f"{NAME}.json"
#: Bytes that a compiler takes for one source, all architectures one after the other.
BYTES_A_JOB = 2.5 * 2**30
SUFFIXES = (".cpp", ".cu", ".cuh", ".h")
#: PyTorch turns operators of half-precision numbers off, for its own sources.
ALLOW_HALF = tuple(
    f"-U__CUDA_NO_{what}__"
    for what in ("HALF_OPERATORS", "HALF_CONVERSIONS", "HALF2_OPERATORS", "BFLOAT16_CONVERSIONS")
)


class BuildError(RuntimeError):
    """The extension cannot be built; ``output`` is the compilers' output, empty if none ran."""

    def __init__(self, message: str, output: str = "") -> None:
        super().__init__(message)
        self.output = output


@dataclass(frozen=True)
class Plan:
    """Sources, flags and architectures of a build.

    Args:
        sources: each a translation unit.
        include: folders of headers.
        cxx_flags, nvcc_flags: of C++ and of CUDA sources; an emulated build compiles all as C++.
        architectures: compute capabilities, such as ``9.0a`` and ``10.0+PTX``; none in an emulated build.
        digest: of all files that go into the build.
        emulated: whether the kernels run on the CPU.
        commit: of the sources, ``unknown`` outside a checkout.
        toolkit: folder of the CUDA toolkit.
    """

    sources: tuple[Path, ...]
    include: tuple[Path, ...]
    cxx_flags: tuple[str, ...]
    nvcc_flags: tuple[str, ...]
    architectures: tuple[str, ...]
    digest: str
    emulated: bool = False
    commit: str = "unknown"
    toolkit: Path | None = None

    def description(self, here: Mapping[str, str]) -> dict[str, Any]:
        """The library's own description; ``here`` is the result of :func:`environment`."""
        return {
            **here,
            "architectures": list(self.architectures),
            "flags": " ".join(self.cxx_flags if self.emulated else self.nvcc_flags),
            "commit": self.commit,
            "sources": self.digest,
        }

    def key(self, here: Mapping[str, str]) -> str:
        """A key that tells builds apart: 16 hexadecimal digits. The commit is not part of it."""
        described = {**self.description(here), "commit": "", "cxx": self.cxx_flags}
        return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()[:16]


def plan(
    csrc: Path,
    architectures: Iterable[str] = ARCHITECTURES,
    *,
    emulator: Path | None = None,
    toolkit: Path | None = None,
) -> Plan:
    """The build of the sources in ``csrc``.

    Args:
        csrc: the folder of sources.
        architectures: compute capabilities.
        emulator: folder of what runs kernels on the CPU; None for a GPU.
        toolkit: folder of the CUDA toolkit; None looks for it. An emulated build needs its headers alone.

    Raises:
        BuildError: no sources there.
    """
    csrc, emulator = csrc.resolve(), emulator.resolve() if emulator else None
    kernels = sorted(csrc.glob("*.cu"))
    bindings = csrc / "bindings.cpp"
    if not kernels or not bindings.is_file():
        raise BuildError(f"{csrc} holds no CUDA sources")
    toolkit = find_toolkit() if toolkit is None else toolkit
    include, sources = [csrc], [bindings, *kernels]
    if emulator is None:
        chosen = tuple(architectures)
        # The kernels set the standard of C++; bindings.cpp takes the standard that PyTorch's headers need.
        hopper = ("-DFASTDEN_HOPPER",) if has_wgmma(chosen) else ()
        general = ("-O3", "-std=c++17", "--expt-relaxed-constexpr", "-lineinfo", *ALLOW_HALF)
        nvcc_flags = (*general, *hopper, *gencode(chosen))
        cxx_flags: tuple[str, ...] = ("-O2",)
    else:
        chosen, nvcc_flags = (), ()
        sources += sorted(emulator.glob("*.cpp"))
        include += [emulator, *([toolkit / "include"] if toolkit else [])]
        cxx_flags = ("-x", "c++", "-O1", "-DFASTDEN_EMULATED", "-DFASTDEN_HOPPER")
    folders = [csrc] if emulator is None else [csrc, emulator]
    return Plan(
        tuple(sources), tuple(include), cxx_flags, nvcc_flags, chosen, digest(folders), emulator is not None,
        _commit(csrc), toolkit,
    )  # fmt: skip


def name_of(capability: tuple[int, int]) -> str:
    """The architecture to build for a GPU: (8, 6) is ``8.6``, (9, 0) is ``9.0a``."""
    return f"{capability[0]}.{capability[1]}" + ("a" if capability == (9, 0) else "")


def gencode(architectures: Iterable[str]) -> tuple[str, ...]:
    """nvcc's flags for compute capabilities: ``9.0a`` to ``-gencode=arch=compute_90a,code=sm_90a``."""
    flags = []
    architectures = tuple(architectures)
    for architecture in architectures:
        number = architecture.removesuffix("+PTX").replace(".", "")
        # Code for 9.0 would conflict with that for 9.0a on the same GPU; as PTX it serves later GPUs.
        if not (architecture == "9.0+PTX" and "9.0a" in architectures):
            flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if architecture.endswith("+PTX"):
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return tuple(flags)


def parse_architectures(text: str, say: Callable[[str], None] = lambda text: None) -> tuple[str, ...]:
    """The compute capabilities of a text such as ``8.0 8.6;9.0+PTX``, as TORCH_CUDA_ARCH_LIST has them.

    Containers set that variable for other packages. Capabilities below 8.0 have no kernels here and are left out; 9.0
    becomes 9.0a, which alone has Hopper's matrix instruction.

    Args:
        text: the variable's value.
        say: told what is left out.

    Raises:
        BuildError: something else, or nothing from 8.0 on.
    """
    found: list[str] = []
    dropped: list[str] = []
    for part in filter(None, re.split(r"[;,\s]+", text)):
        if not re.fullmatch(r"\d+\.\d[af]?(\+PTX)?", part):
            raise BuildError(
                f"TORCH_CUDA_ARCH_LIST: {part!r}; accepted: compute capabilities from 8.0 on, such as 8.6 or 9.0a, with"
                " or without +PTX, separated by ; or spaces"
            )
        if float(part.removesuffix("+PTX").rstrip("af")) < 8:
            dropped.append(part)
        elif part == "9.0":
            found.append("9.0a")
        elif part == "9.0+PTX":
            found += ["9.0a", part]  # later GPUs compile the PTX for themselves; it has no such instruction
        else:
            found.append(part)
    if not found:
        text_problem = f"{text!r}; accepted: compute capabilities from 8.0 on" if dropped else "empty; accepted: some"
        raise BuildError(f"TORCH_CUDA_ARCH_LIST: {text_problem}, such as 8.6;9.0a")
    if dropped:
        say(f"TORCH_CUDA_ARCH_LIST: {', '.join(dropped)} left out; there are kernels from 8.0 on")
    return tuple(dict.fromkeys(found))


def known_architectures(wanted: Iterable[str], listed: str) -> tuple[str, ...]:
    """Those of ``wanted`` that a compiler knows; if one was to be PTX too, then the last one that later GPUs can use.

    Args:
        wanted: compute capabilities.
        listed: what ``nvcc --list-gpu-arch`` prints.
    """
    known = set(re.findall(r"compute_(\d+)", listed))
    wanted = tuple(wanted)
    found = [one for one in wanted if re.sub(r"\D", "", one) in known]
    if any(one.endswith("+PTX") for one in wanted) and not any(one.endswith("+PTX") for one in found):
        # Code for 9.0a runs on no other GPU, nor does its PTX.
        general = [index for index, one in enumerate(found) if one[-1].isdigit()]
        if general:
            found[general[-1]] += "+PTX"
    return tuple(found)


def choose_architectures(
    environ: Mapping[str, str],
    listed: str,
    capabilities: Iterable[tuple[int, int]] = (),
    say: Callable[[str], None] = lambda text: None,
) -> tuple[str, ...]:
    """TORCH_CUDA_ARCH_LIST, or the GPUs that are here, or :data:`ARCHITECTURES` as far as the compiler has them.

    A GPU here that is newer than the compiler takes the last, whose PTX it compiles for itself.

    Args:
        environ: environment variables.
        listed: what ``nvcc --list-gpu-arch`` prints.
        capabilities: of the GPUs that the build is for; none for any.
        say: told what of TORCH_CUDA_ARCH_LIST is left out.

    Raises:
        BuildError: TORCH_CUDA_ARCH_LIST is malformed; the compiler has none of the defaults.
    """
    if environ.get("TORCH_CUDA_ARCH_LIST"):
        return parse_architectures(environ["TORCH_CUDA_ARCH_LIST"], say)
    present = tuple(map(name_of, sorted({capability for capability in capabilities if capability >= (8, 0)})))
    if present and (not listed or known_architectures(present, listed) == present):
        return present
    found = known_architectures(ARCHITECTURES, listed)
    if not found:
        raise BuildError(f"nvcc compiles for none of {', '.join(ARCHITECTURES)}; set TORCH_CUDA_ARCH_LIST")
    return found


def covers(architectures: Iterable[str], capability: tuple[int, int]) -> bool:
    """Whether code for ``architectures`` runs on a GPU of a compute capability."""
    for architecture in architectures:
        major, minor = map(int, re.findall(r"\d+", architecture)[:2])
        exact = architecture.removesuffix("+PTX")[-1] == "a"
        if capability == (major, minor) or (not exact and capability[0] == major and capability[1] >= minor):
            return True
        if architecture.endswith("+PTX") and not exact and capability >= (major, minor):
            return True
    return False


def has_wgmma(architectures: Iterable[str]) -> bool:
    """Whether code for ``architectures`` has Hopper's matrix instruction."""
    return any(one.startswith("9.0a") for one in architectures)


def jobs(environ: Mapping[str, str], cores: int, memory: float | None) -> int:
    """Compilers to run at once: MAX_JOBS, or as many as the cores and ``memory`` (bytes that are free) allow."""
    asked = environ.get("MAX_JOBS", "")
    if asked.isdigit() and int(asked) > 0:
        return int(asked)
    fit = cores if memory is None else int(memory // BYTES_A_JOB)
    return max(1, min(cores, fit))


def free_memory(meminfo: Path = Path("/proc/meminfo"), group: Path = Path("/sys/fs/cgroup")) -> float | None:
    """Free bytes of the machine, or of the container that this runs in; None where the system does not tell."""
    found = []
    try:
        available = re.search(r"MemAvailable:\s+(\d+) kB", meminfo.read_text(encoding="utf-8"))
        if available:
            found.append(1024.0 * int(available[1]))
        limit = (group / "memory.max").read_text(encoding="utf-8").strip()
        if limit.isdigit():
            found.append(float(limit) - int((group / "memory.current").read_text(encoding="utf-8")))
    except (OSError, ValueError):
        pass
    return max(0.0, min(found)) if found else None


def find_toolkit(environ: Mapping[str, str] | None = None) -> Path | None:
    """Folder of the CUDA toolkit, from CUDA_HOME, CUDA_PATH, the nvcc on the PATH, or /usr/local/cuda."""
    environ = os.environ if environ is None else environ
    named = [Path(environ[name]) for name in ("CUDA_HOME", "CUDA_PATH") if environ.get(name)]
    nvcc = shutil.which("nvcc", path=environ.get("PATH"))
    folders = [*named, *([Path(nvcc).resolve().parent.parent] if nvcc else []), Path("/usr/local/cuda")]
    # A folder with nvcc alone may hold a script that calls it.
    whole = (folder for folder in folders if (folder / "include" / "cuda_runtime_api.h").is_file())
    return next((folder for folder in whole if (folder / "bin" / "nvcc").is_file()), None)


def ask_nvcc(toolkit: Path, *options: str) -> str:
    """nvcc's output; empty where nvcc fails."""
    command = [str(toolkit / "bin" / "nvcc"), *options]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return ""


def environment() -> dict[str, str]:
    """Versions that a library is built for and needs again: PyTorch, its CUDA, and Python's ABI.

    Raises:
        ImportError: there is no PyTorch.
    """
    import torch

    return {
        "torch": str(torch.__version__),
        "cuda": str(torch.version.cuda or "none"),
        "python": str(sysconfig.get_config_var("SOABI")),
    }


def missing(toolkit: Path | None) -> list[str]:
    """Missing parts of a build for a GPU; empty where all are here.

    Args:
        toolkit: what :func:`find_toolkit` found.
    """
    reasons = [] if toolkit else ["nvcc is not found (CUDA_HOME, PATH, /usr/local/cuda)"]
    try:
        torch_cuda = environment()["cuda"]
    # A broken native library can raise anything on import.
    except Exception as error:
        return [*reasons, f"PyTorch cannot be imported ({type(error).__name__}: {error})"]
    if torch_cuda == "none":
        reasons.append("this PyTorch is not a CUDA build")
    elif toolkit:
        release = re.search(r"release (\d+)\.(\d+)", ask_nvcc(toolkit, "--version"))
        if release and release[1] != torch_cuda.split(".")[0]:
            reasons.append(
                f"nvcc is of CUDA {release[1]}.{release[2]}, PyTorch of CUDA {torch_cuda}; "
                "accepted: the same major version"
            )
    if shutil.which("ninja", path=_path()) is None:
        reasons.append("ninja is not found (pip install ninja)")
    return reasons


def build(wanted: Plan, folder: Path) -> Path:
    """Compile and link; the library and its description appear in ``folder`` whole or not at all.

    A process of its own builds and then loads the library: its description is the library's own.

    Args:
        wanted: the build.
        folder: of the results; made if it does not exist. An existing library is replaced.

    Returns:
        The library's path.

    Raises:
        BuildError: a compiler, or loading the library, failed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    number = jobs(os.environ, os.cpu_count() or 1, free_memory())
    variables = {**os.environ, "MAX_JOBS": str(number), "PATH": _path()}
    if wanted.toolkit:
        variables["CUDA_HOME"] = str(wanted.toolkit)
    code = "import runpy, sys; runpy.run_path(sys.argv[1])['_build_here'](sys.argv[2])"
    with tempfile.TemporaryDirectory(dir=folder, prefix=".build-") as directory:
        request = json.dumps(
            {**asdict(wanted), "description": wanted.description({}), "directory": directory}, default=str
        )
        command = [sys.executable, "-c", code, str(Path(__file__).resolve()), request]
        done = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", env=variables,
            cwd=directory, check=False,
        )  # fmt: skip
        library = Path(directory) / f"{NAME}.so"
        if done.returncode or not (Path(directory) / DESCRIPTION).is_file():
            raise BuildError(f"building the CUDA extension failed (exit code {done.returncode})", done.stdout)
        for path in (Path(directory) / DESCRIPTION, library):  # the library last: it needs its description
            os.replace(path, folder / path.name)
    return folder / library.name


def _build_here(request: str) -> None:
    """The part of :func:`build` that runs in its own process."""
    from torch.utils.cpp_extension import load

    asked = json.loads(request)
    described = json.dumps({**environment(), **asked["description"]}).replace('"', '\\"')
    module = load(
        NAME,
        asked["sources"],
        extra_cflags=[*asked["cxx_flags"], shlex.quote(f'-DFASTDEN_BUILD="{described}"')],
        extra_cuda_cflags=asked["nvcc_flags"],
        extra_include_paths=asked["include"],
        build_directory=asked["directory"],
        with_cuda=not asked["emulated"],
    )
    (Path(asked["directory"]) / DESCRIPTION).write_text(
        json.dumps(module.build_config(), indent=1) + "\n", encoding="utf-8"
    )


def _path() -> str:
    """The PATH, with the programs of this Python's packages."""
    return os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", os.defpath)])


def digest(folders: Iterable[Path]) -> str:
    """16 hexadecimal digits that tell the sources in folders apart."""
    digits = hashlib.sha256()
    for folder in folders:
        for path in sorted(folder.rglob("*")):
            if path.suffix in SUFFIXES:
                digits.update(f"{path.relative_to(folder).as_posix()}\0{path.stat().st_size}\0".encode())
                digits.update(path.read_bytes())
    return digits.hexdigest()[:16]


def _commit(csrc: Path) -> str:
    if not (csrc.parent / ".git").exists():  # a repository around an installation belongs to another project
        return "unknown"
    # A copy of a checkout may lose the modes of its files: they are no change.
    git = ["git", "-C", str(csrc), "-c", "core.fileMode=false"]
    command = [*git, "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"
