"""Hooks of MkDocs: links from the pages into the repository, and names in docstrings.

A page says ``[results](../benchmarks/results/cpu.json)``, which is right in the repository, and points outside of
``docs/``, where MkDocs finds nothing. The hooks copy such files into the site, below ``repository/``, and point the
links there. A link to a file that does not exist stays as it is: the strict build then fails on it.

The page ``browser.md`` runs a model in the browser. The models are exported, and the runtime is fetched by npm at the
version that ``scripts/page`` pins, when the site is built; without npm the site is built without them.

A docstring says ``:func:`fastden.fuse```, which Markdown does not know. It becomes a link to that entry of the
reference, or plain code where there is none.
"""

from __future__ import annotations

import posixpath
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files, InclusionLevel

ROLE = re.compile(r":(?:attr|class|data|func|meth|mod):<code>~?(?P<name>[\w.]+)</code>")
LINK = re.compile(r"(?<=\]\()(?P<path>(?:\.\./)+[^)#\s]+)")
ROOT = Path(__file__).resolve().parent.parent
FOLDER = "repository"
PAGE = ROOT / "scripts" / "page"
#: Files of onnxruntime-web: for processors, and for WebGPU.
RUNTIME = (
    "ort.wasm.min.mjs",
    "ort-wasm-simd-threaded.mjs",
    "ort-wasm-simd-threaded.wasm",
    "ort.webgpu.min.mjs",
    "ort-wasm-simd-threaded.asyncify.mjs",
    "ort-wasm-simd-threaded.asyncify.wasm",
)
#: Models of the page, with the precision in which they are exported.
MODELS = {"photo": "fp16-weights", "color": "fp16-weights", "noise": "fp32"}


def on_files(files: Files, config: Any) -> Files:
    """Add the files that the pages link to."""
    for page in files.documentation_pages():
        for link in LINK.finditer(page.content_string):
            name = _repository_file(page.src_uri, link["path"])
            if name is not None and files.get_file_from_path(_in_site(name)) is None:
                file = File.generated(
                    config, _in_site(name), abs_src_path=str(ROOT / name), inclusion=InclusionLevel.NOT_IN_NAV
                )
                files.append(file)
    for name, path in _of_page(Path(config.config_file_path).parent / "build" / "page"):
        files.append(File.generated(config, f"page/{name}", abs_src_path=str(path)))
    return files


def _of_page(folder: Path) -> Iterator[tuple[str, Path]]:
    """Names and files that the page in the browser needs beside its sources; large ones lie in ``folder``."""
    yield "compare.js", ROOT / "fastden" / "ui" / "compare.js"
    missing = _fetch_runtime()
    if missing is not None:
        print(f"browser.md: {missing}: the page is built without its runtime", file=sys.stderr)
        return
    from fastden import export

    folder.mkdir(parents=True, exist_ok=True)
    for name, precision in MODELS.items():
        path = export(name, folder / f"{name}.onnx", precision=precision, overwrite=True)  # type: ignore[arg-type]
        yield f"models/{name}.onnx", path
    for name in RUNTIME:
        yield f"runtime/{name}", PAGE / "node_modules" / "onnxruntime-web" / "dist" / name


def _fetch_runtime() -> str | None:
    """Let npm install the packages of the lock file, unless they are there; returns why it cannot, or None."""
    lock, installed = PAGE / "package-lock.json", PAGE / "node_modules" / ".installed-lock.json"
    if installed.is_file() and installed.read_bytes() == lock.read_bytes():
        return None
    npm = shutil.which("npm")
    if npm is None:
        return "npm is not installed"
    done = subprocess.run([npm, "ci", "--silent"], cwd=PAGE, check=False, capture_output=True, text=True)
    if done.returncode:
        lines = (done.stderr or done.stdout).strip().splitlines() or ["no reason given"]
        return f"npm ci failed ({lines[0]})"
    shutil.copyfile(lock, installed)
    return None


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Point the links at the copies."""

    def replaced(link: re.Match[str]) -> str:
        name = _repository_file(page.file.src_uri, link["path"])
        if name is None:
            return link["path"]
        return posixpath.relpath(_in_site(name), posixpath.dirname(page.file.src_uri) or ".")

    return LINK.sub(replaced, markdown)


def on_page_content(html: str, page: Any, config: Any, files: Files) -> str:
    """Turn the roles of docstrings into links, which mkdocstrings resolves."""
    return ROLE.sub(r'<autoref identifier="\g<name>" optional><code>\g<name></code></autoref>', html)


def _repository_file(page: str, link: str) -> str | None:
    """The path from the repository's root of the file that ``link`` on ``page`` names, or None."""
    name = posixpath.normpath(posixpath.join("docs", posixpath.dirname(page), link))
    inside = name.startswith(("docs/", "../"))
    return None if inside or not (ROOT / name).is_file() else name


def _in_site(name: str) -> str:
    return f"{FOLDER}/{name}"
