"""The sources that a kernel is made of, and a digest of them: are they still those that were measured?

For CUDA they are the operator's file in ``csrc/``, the headers there that it includes, and the compiler's flags; for
Triton its file in ``kernels/``, with the default tiles, and the files there that it imports. What those include and
import is among them. A file counts as a whole, whatever part of it the kernel uses. Comments, docstrings and white
space do not count; nor does what runs for other shapes than the measured ones alone (:data:`OTHER_SHAPES`). So the
digest is the same on each version of Python, and no compiler is needed.

The digest of ``kernels/_tuned.py`` is coarser, of the text of all kernels. It is made while a program runs, and has to
be quick; a change that matters to no kernel costs no more than a search there.

    python benchmarks/kernel_sources.py                               # digests and files of this checkout
    python benchmarks/kernel_sources.py CHECKOUT --capability 8.0     # of another one, for another GPU
"""

from __future__ import annotations

import argparse
import ast
import re
import sys
from collections.abc import Callable, Iterator
from hashlib import sha256
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
BUILD = "fastden/cuda/build.py"
#: All that digests are made of.
PATHS = ("csrc", "kernels", BUILD)
#: What an operator's file includes for shapes that are not measured: conv3, which is the only one, runs the kernel of
#: concat_hopper.cuh on 9.0, which includes nothing of it (two tests of tests/bench/test_prove.py).
OTHER_SHAPES = {("concat_conv_bn_relu", (9, 0)): ("convolution.cuh",)}
_LITERAL = r""""(?:\\.|[^"\\\n])*"|'(?:\\.|[^'\\\n])+'"""
#: A word or a number; digits may be separated, as in 1'000.
_WORD = r"\w(?:\w|'(?=\w))*"
_COMMENT_OR_TEXT = re.compile(rf"//[^\n]*|/\*.*?\*/|({_LITERAL}|{_WORD})", re.DOTALL)
_OPERATOR = r"<<=|>>=|\.\.\.|\+\+|--|->|<<|>>|&&|\|\||::|[-+*/%&|^<>=!]=|\S"
_TOKEN = re.compile(rf"{_LITERAL}|{_WORD}|{_OPERATOR}")


def digest(root: Path, backend: str, operator: str, capability: tuple[int, int]) -> str:
    """12 hexadecimal digits that change with what a kernel is made of in the checkout ``root``.

    Args:
        root: the checkout.
        backend: ``cuda`` or ``triton``.
        operator: of :data:`fastden.bench.operators.OPERATORS`, for example.
        capability: of the GPU, for which the compiler has flags.
    """
    digits = sha256(" ".join(flags(root, capability) if backend == "cuda" else ()).encode())
    for path in files(root, backend, operator, capability):
        text = path.read_text(encoding="utf-8")
        plain = plain_cuda(text) if backend == "cuda" else plain_python(text)
        digits.update(f"\0{path.name}\0{plain}".encode())
    return digits.hexdigest()[:12]


def files(root: Path, backend: str, operator: str, capability: tuple[int, int]) -> list[Path]:
    """The files that a kernel is made of, in the order of their names."""
    cuda = backend == "cuda"
    others = OTHER_SHAPES.get((operator, capability), ()) if cuda else ()
    used: Callable[[Path], Iterator[Path]] = included if cuda else imported
    found: set[Path] = set()
    left = [root / "csrc" / f"{operator}.cu" if cuda else root / "kernels" / f"{operator}.py"]
    while left:
        path = left.pop()
        # emulator.h lies with the tests.
        if path not in found and path.is_file() and path.name not in others:
            found.add(path)
            left += used(path)
    return sorted(found)


def included(path: Path) -> Iterator[Path]:
    for name in re.findall(r'^\s*#\s*include\s*"(.+)"', path.read_text(encoding="utf-8"), re.MULTILINE):
        yield path.parent / name


def imported(path: Path) -> Iterator[Path]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            package = "fastden.kernels" if node.level else ""
            module = ".".join(filter(None, (package, node.module)))
            names = [module, *(f"{module}.{alias.name}" for alias in node.names)]
        for name in names:
            if re.fullmatch(r"fastden\.kernels\.\w+", name):
                yield path.with_name(f"{name.rpartition('.')[2]}.py")


def flags(root: Path, capability: tuple[int, int]) -> tuple[str, ...]:
    """The flags with which the checkout ``root`` compiles its CUDA sources for a GPU."""
    # By its path, as setup.py does: it may be another one's.
    spec = spec_from_file_location("measured_build", root / BUILD)
    assert spec is not None
    assert spec.loader is not None
    build = module_from_spec(spec)
    sys.modules[spec.name] = build
    spec.loader.exec_module(build)
    # Any folder: the toolkit is no part of the flags, and need not be there.
    return tuple(build.plan(root / "csrc", [build.name_of(capability)], toolkit=root).nvcc_flags)


def plain_cuda(text: str) -> str:
    """The tokens, one a line. A preprocessor directive, which ends with its line, stays one."""
    text = _COMMENT_OR_TEXT.sub(lambda found: found[1] or " ", text.replace("\\\n", ""))
    tokens: list[str] = []
    for line in text.splitlines():
        tokens += [" ".join(line.split())] if line.lstrip().startswith("#") else _TOKEN.findall(line)
    return "\n".join(tokens)


def plain_python(text: str) -> str:
    """The syntax tree without docstrings."""
    return repr(_plain(ast.parse(text)))


def _plain(node: Any) -> Any:
    # Not ast.dump: from version to version, Python adds fields that are empty or None.
    if isinstance(node, ast.AST):
        fields = ((name, value) for name, value in ast.iter_fields(node) if value not in (None, []))
        return type(node).__name__, *((name, _plain(value)) for name, value in fields)
    if isinstance(node, list):
        return [_plain(one) for one in node if not _is_text(one)]
    return node


def _is_text(node: Any) -> bool:
    """Whether it is a docstring: a statement that is nothing but a string."""
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


def main() -> int:
    parser = argparse.ArgumentParser(description="Print each kernel's digest, and the files that it is made of.")
    parser.add_argument("checkout", type=Path, nargs="?", default=ROOT)
    parser.add_argument("--capability", default="9.0", help="compute capability of the GPU (default 9.0)")
    arguments = parser.parse_args()
    root = arguments.checkout.resolve()
    major, minor = map(int, arguments.capability.split("."))
    for backend, pattern in (("cuda", "csrc/*.cu"), ("triton", "kernels/[!_]*.py")):
        for path in sorted(root.glob(pattern)):
            kernel = root, backend, path.stem, (major, minor)
            names = " ".join(file.name for file in files(*kernel))
            print(f"{backend:6} {path.stem:19} {digest(*kernel)}  {names}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
