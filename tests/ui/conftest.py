"""A browser for the pages' tests."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.browser import browser


@pytest.fixture(scope="module")
def window(url: str) -> Iterator[Any]:
    """A browser, once the module's ``url`` is served."""
    with browser() as started:
        yield started
