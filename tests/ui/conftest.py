"""The page served, and a browser, for the tests of both pages."""

from __future__ import annotations

import re
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.browser import browser, chromium
from tests.ui.serving import start


@pytest.fixture(scope="module")
def window(url: str) -> Iterator[Any]:
    """A browser, once the module's ``url`` is served."""
    with browser() as started:
        yield started


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("files")


@pytest.fixture(scope="module")
def url(files: Path) -> Iterator[str]:
    chromium()
    process, url = start(files, "--max-files", "2", "--max-megapixels", "2", "--max-upload", "8")
    assert re.fullmatch(r"http://127\.0\.0\.1:\d+", url)
    yield url
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 128 + signal.SIGTERM
    assert not list(files.iterdir())  # sessions, uploads and results are gone
