"""A real browser without a window, where Playwright and Chromium are installed."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

#: The browser requests only what the pages ask for.
QUIET = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-default-apps",
    "--disable-sync",
    "--no-first-run",
]


def chromium() -> str:
    """The path of Chromium, or skip."""
    pytest.importorskip("playwright", reason="playwright is not installed")
    path = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if path is None:
        pytest.skip("Chromium is not installed")
    return path


@contextmanager
def browser() -> Iterator[Any]:
    """A browser of Playwright."""
    path = chromium()
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=path, headless=True, args=QUIET)
        try:
            yield started
        finally:
            started.close()


@contextmanager
def opened(window: Any, url: str, seconds: float) -> Iterator[Any]:
    """A page of a browser; its ``asked`` collects the addresses that it requests.

    Args:
        window: of :func:`browser`.
        url: of the page.
        seconds: that each wait may take.
    """
    context = window.new_context(accept_downloads=True)
    page = context.new_page()
    page.set_default_timeout(1000 * seconds)
    page.asked = []
    page.on("request", lambda request: page.asked.append(request.url))
    page.goto(url)
    yield page
    context.close()


def drop(page: Any, target: str, files: dict[str, bytes]) -> None:
    """Drop files on an element, as a hand does."""
    data = page.evaluate_handle(
        """files => {
            const data = new DataTransfer();
            for (const [name, bytes] of Object.entries(files)) {
                data.items.add(new File([Uint8Array.from(bytes)], name, {type: "image/" + name.split(".").pop()}));
            }
            return data;
        }""",
        {name: list(data) for name, data in files.items()},
    )
    for event in ("dragenter", "dragover", "drop"):
        page.dispatch_event(target, event, {"dataTransfer": data})
