"""Hooks of MkDocs: links from the pages into the repository, and names in docstrings.

A page says ``[results](../benchmarks/results/cpu.json)``, which is right in the repository, and points outside of
``docs/``, where MkDocs finds nothing. The hooks copy such files into the site, below ``repository/``, and point the
links there. A link to a file that does not exist stays as it is: the strict build then fails on it.

A docstring says ``:func:`fastden.fuse```, which Markdown does not know. It becomes a link to that entry of the
reference, or plain code where there is none.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files, InclusionLevel

ROLE = re.compile(r":(?:attr|class|data|func|meth|mod):<code>~?(?P<name>[\w.]+)</code>")
LINK = re.compile(r"(?<=\]\()(?P<path>(?:\.\./)+[^)#\s]+)")
ROOT = Path(__file__).resolve().parent.parent
FOLDER = "repository"


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
    return files


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
