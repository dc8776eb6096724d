"""What pyproject.toml cannot express: the CUDA extension, which ``FASTDEN_BUILD`` asks for, and its sources.

``auto`` (default, also where the variable is empty) builds it where nvcc and a CUDA build of PyTorch are found; if it
does not compile, the package is pure Python. ``none`` never builds it, and imports no PyTorch. ``cuda`` fails, with the
reasons, where it cannot be built.
"""

import importlib.util
import os
import shutil
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
SOURCES = ROOT / "csrc"
CHOICE = os.environ.get("FASTDEN_BUILD") or "auto"

# By its path: fastden is not installed yet, and importing the checkout would import what it needs.
_spec = importlib.util.spec_from_file_location("fastden_build", ROOT / "fastden" / "cuda" / "build.py")
assert _spec is not None
assert _spec.loader is not None
build = importlib.util.module_from_spec(_spec)
sys.modules[_spec.name] = build
_spec.loader.exec_module(build)


class BuildPython(build_py):
    """Puts the CUDA sources into the package, where ``fastden build`` finds them."""

    def run(self) -> None:
        super().run()
        if lacking and CHOICE == "auto":
            print(f"fastden: pure Python, without the CUDA extension: {'; '.join(lacking)}{ADVICE}")
        if self.editable_mode:  # a checkout has them beside the package
            return
        target = Path(self.build_lib) / "fastden" / "_csrc"
        shutil.rmtree(target, ignore_errors=True)
        target.mkdir(parents=True)
        for path in SOURCES.iterdir():
            if path.suffix in build.SUFFIXES:
                shutil.copy(path, target)


class BuildExtension(build_ext):
    """Builds as ``fastden build`` does, for all GPUs, and puts the library's description beside it."""

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name))
        try:
            built = build.build(ahead_of_time(), Path(self.build_temp).resolve())
        except build.BuildError as error:
            if CHOICE == "auto":  # nobody asked for it
                print(f"{error.output}\nfastden: pure Python, without the CUDA extension: {error}", file=sys.stderr)
                return
            raise SystemExit(f"{error.output}\nerror: {error}; FASTDEN_BUILD=none installs without it") from error
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(built.parent / build.DESCRIPTION, target.parent)
        shutil.copy(built, target)

    def copy_extensions_to_source(self) -> None:
        super().copy_extensions_to_source()
        for ext in self.extensions:
            in_place, regular = map(Path, self._get_inplace_equivalent(self.get_finalized_command("build_py"), ext))
            description = regular.with_name(build.DESCRIPTION)
            if description.exists():
                shutil.copy(description, in_place.parent)


def ahead_of_time() -> "build.Plan":  # type: ignore[name-defined]
    """What a build ahead of time compiles."""
    toolkit = build.find_toolkit()
    listed = build.ask_nvcc(toolkit, "--list-gpu-arch")
    architectures = build.choose_architectures(os.environ, listed, say=lambda text: print(text, file=sys.stderr))
    return build.plan(SOURCES, architectures, toolkit=toolkit)


if CHOICE not in build.CHOICES:
    raise SystemExit(f"FASTDEN_BUILD: {CHOICE!r}; accepted: {', '.join(build.CHOICES)}")
# An isolated build sees no PyTorch, whatever is installed.
ADVICE = "" if importlib.util.find_spec("torch") else " (pip install --no-build-isolation lets a build see PyTorch)"
lacking = [] if CHOICE == "none" else build.missing(build.find_toolkit())
if lacking and CHOICE == "cuda":
    raise SystemExit(f"FASTDEN_BUILD: 'cuda', but the CUDA extension cannot be built: {'; '.join(lacking)}{ADVICE}")
extension = Extension(f"fastden.{build.NAME}", [], optional=CHOICE == "auto")
setup(
    ext_modules=[] if lacking or CHOICE == "none" else [extension],
    cmdclass={"build_py": BuildPython, "build_ext": BuildExtension},
)
