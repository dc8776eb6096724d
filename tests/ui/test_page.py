"""The page in a real browser: drop, wait, slider, download."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import pytest

from tests.browser import drop, opened
from tests.cli.run import works
from tests.image_files import encoded, pixels, png_claiming
from tests.ui.serving import photo

pytest.importorskip("gradio", reason="gradio is not installed")
ZONE = "#drop button"


@pytest.fixture
def page(window: Any, url: str) -> Iterator[Any]:
    with opened(window, url, seconds=120) as page:
        page.wait_for_selector(ZONE)
        yield page


def saved(page: Any) -> Any:
    with page.expect_download() as download:
        page.click("#save")
    return download.value


def test_drop_wait_slider_download(page: Any, url: str, tmp_path: Path) -> None:
    # Screen readers tell what changes in an element that stays.
    page.wait_for_selector("#status[role=status]", state="attached")  # set when the page has loaded
    page.evaluate("window.kept = document.querySelector('#status')")
    drop(page, ZONE, {"photo.jpg": photo()})
    page.wait_for_selector("fastden-compare")
    assert page.evaluate("window.kept === document.querySelector('#status[role=status]')")
    assert "noise of fine grain" in page.inner_text("#status")
    # The slider moves the border between the two pictures, which are at 100 %.
    look = "element => element.shadowRoot.querySelector('.after').style.clipPath"
    page.wait_for_function("document.querySelector('fastden-compare').before.naturalWidth > 0")
    half = page.eval_on_selector("fastden-compare", look)
    page.locator("fastden-compare input").fill("20")
    assert page.eval_on_selector("fastden-compare", look) != half
    shown = "element => element.before.getBoundingClientRect().width * devicePixelRatio - element.before.naturalWidth"
    assert abs(page.eval_on_selector("fastden-compare", shown)) < 1
    assert page.eval_on_selector("fastden-compare", "element => element.before.naturalWidth") == 64  # upright

    download = saved(page)
    assert download.suggested_filename == "photo-clean.jpg"
    (tmp_path / "photo.jpg").write_bytes(photo())
    works("denoise", tmp_path / "photo.jpg", "-o", tmp_path / "wanted.jpg")
    assert Path(download.path()).read_bytes() == (tmp_path / "wanted.jpg").read_bytes()

    # A level set by hand and another strength give the command's bytes too.
    assert page.get_by_text("A level set by hand is one of white noise").is_visible()
    page.get_by_label("Find the noise level by itself").uncheck()
    page.get_by_label("number input for Noise level (sigma)").fill("30")
    page.get_by_label("number input for Strength").fill("0.5")
    page.get_by_label("number input for Strength").press("Tab")
    first = page.get_attribute("fastden-compare", "after")
    page.click("#again")
    # The bar and Cancel may be gone before anybody looks: a small picture takes no time.
    page.wait_for_selector(f"fastden-compare:not([after='{first}'])")
    page.wait_for_selector("#save")
    assert "Denoised by the model color." in page.inner_text("#status")
    options = ("--sigma", "30", "--strength", "0.5", "--overwrite")
    works("denoise", tmp_path / "photo.jpg", "-o", tmp_path / "wanted.jpg", *options)
    assert Path(saved(page).path()).read_bytes() == (tmp_path / "wanted.jpg").read_bytes()
    # The page requested nothing from any other server.
    assert [asked for asked in page.asked if not asked.startswith((url, "data:", "blob:"))] == []


def test_several_pictures_one_broken(page: Any, tmp_path: Path) -> None:
    drop(page, ZONE, {"a.jpg": photo(1), "b.jpg": photo(2)[:400]})
    page.wait_for_selector("fastden-compare")
    assert "1 of 2 pictures denoised." in page.inner_text("#status")
    assert "b.jpg: corrupt or truncated" in page.inner_text("#status")
    with ZipFile(saved(page).path()) as archive:
        assert archive.namelist() == ["a-clean.jpg"]
    drop(page, ZONE, {name: photo() for name in ("a.jpg", "b.jpg", "c.jpg")})
    page.wait_for_selector("text=3 pictures at a time; accepted: at most 2")
    assert page.is_visible("#save")  # what was denoised before stays: the upload is refused before the page has it


def test_beyond_the_limits(page: Any) -> None:
    drop(page, ZONE, {"large.png": png_claiming(1500, 1500)})
    page.wait_for_selector("text=large.png: 1500 x 1500")
    assert not page.is_visible("#save")


def test_cancel(page: Any, files: Path) -> None:
    drop(page, ZONE, {"photo.jpg": encoded(pixels(700, 1000), "JPEG")})
    page.click("#cancel")
    page.wait_for_selector("text=Cancelled.")
    assert not page.is_visible("#save")
    (folder,) = files.glob("fastden-ui-*")
    assert not list(folder.glob("session-*/*/out*"))


def test_leaving_the_page_removes_its_files(window: Any, url: str, files: Path) -> None:
    (folder,) = files.glob("fastden-ui-*")
    before = set(folder.glob("session-*"))
    context = window.new_context()
    page = context.new_page()
    page.goto(url)
    page.wait_for_selector(ZONE)
    drop(page, ZONE, {"photo.jpg": photo(3)})
    page.wait_for_selector("fastden-compare", timeout=120_000)
    (mine,) = set(folder.glob("session-*")) - before
    context.close()
    deadline = time.monotonic() + 60
    while mine.exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not mine.exists()


def test_a_drop_ends_what_is_done_for_an_earlier_one(window: Any, url: str) -> None:
    with opened(window, url, seconds=120) as page:
        page.wait_for_selector(ZONE)
        drop(page, ZONE, {"large.jpg": encoded(pixels(1000, 1500), "JPEG")})
        page.wait_for_selector("#cancel")
        page.wait_for_selector("#drop >> text=Drop")
        drop(page, ZONE, {"small.jpg": photo()})
        page.wait_for_selector("fastden-compare")
        page.wait_for_selector("#cancel", state="hidden")
        assert "small.jpg" in page.inner_text("#status")
        assert saved(page).suggested_filename == "small-clean.jpg"
