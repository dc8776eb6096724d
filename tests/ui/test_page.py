"""The page in a real browser: drop, wait, slider, download; and what it must not do."""

from __future__ import annotations

import errno
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from zipfile import ZipFile

import pytest

from fastden.errors import UserError
from fastden.ui.server import serve
from fastden.ui.session import Limits, Session
from tests.browser import chromium, drop, opened
from tests.cli.run import works
from tests.image_files import encoded, exif, pixels, png_claiming

pytest.importorskip("gradio", reason="gradio is not installed")
ROOT = Path(__file__).resolve().parents[2]
ZONE = "#drop button"


def start(folder: Path, *options: str, errors: Any = None) -> tuple[subprocess.Popen[str], str]:
    """The command, and the address that it tells; its temporary files lie below ``folder``."""
    command = [sys.executable, "-m", "fastden", "ui", "--no-browser", "--port", "0", *options]
    environment = {**os.environ, "TMPDIR": str(folder), "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment)
    assert process.stdout is not None
    return process, process.stdout.readline().split()[0]


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


@pytest.fixture
def page(window: Any, url: str) -> Iterator[Any]:
    with opened(window, url, seconds=120) as page:
        page.wait_for_selector(ZONE)
        yield page


def photo(seed: int = 0) -> bytes:
    return encoded(pixels(64, 96, seed=seed), "JPEG", exif=exif(6), quality=90)


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
    assert not page.is_visible("#save")


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


def take(page: Any, uploads: list[Path], request: Any) -> Any:
    """What the page shows after a drop."""
    return list(page._take([str(upload) for upload in uploads], True, request))[-1]


def test_looking_at_pictures_is_told_and_can_be_cancelled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fastden.ui.page import Page

    page, request = Page(tmp_path, Limits()), SimpleNamespace(session_hash="mine")
    uploads = [tmp_path / f"{name}.jpg" for name in "abc"]
    for upload in uploads:
        upload.write_bytes(photo())
    looked = []
    look = Session._look

    def slow(session: Session, picture: Any) -> None:
        looked.append(picture.name)
        if len(looked) == 2:
            assert released.wait(60)
        look(session, picture)

    released = threading.Event()
    monkeypatch.setattr(Session, "_look", slow)
    told, deadline = [], time.monotonic() + 60
    for shown in page._take([str(upload) for upload in uploads], True, request):
        assert time.monotonic() < deadline
        if isinstance(shown[3], str):
            told.append(shown[3])
        if "<p>Looking at b.jpg (2 of 3) ...</p>" in told and "<p>Ending ...</p>" not in told:
            assert shown[-2].visible  # Cancel
            page._cancel(request)
        if "<p>Ending ...</p>" in told:  # before the picture ends
            released.set()
    assert looked == ["a.jpg", "b.jpg"]
    assert told[-1] == "<p>Cancelled.</p>"
    assert not any(button.visible for button in (shown[-4], shown[-2], shown[-1]))
    # The run that follows a drop finds nothing to do, and leaves the text.
    ((_, _, text, *_),) = page._first_run(True, 0.0, 1.0, "automatic", request)
    assert not isinstance(text, str)
    page.close()


def test_waiting_for_another_visitor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is told, can be cancelled, and what is pressed meanwhile starts no second run."""
    from fastden.ui.page import Page

    page, released, runs = Page(tmp_path, Limits()), threading.Event(), []
    denoise = Session._denoise

    def slow(session: Session, *given: Any) -> None:
        runs.append(session)
        assert released.wait(60)
        denoise(session, *given)

    monkeypatch.setattr(Session, "_denoise", slow)
    requests = [SimpleNamespace(session_hash=name) for name in ("first", "second")]
    for request in requests:
        (tmp_path / "a.jpg").write_bytes(photo())
        take(page, [tmp_path / "a.jpg"], request)
    settings: Any = (True, 0.0, 1.0, "automatic")
    first, second = (page._first_run(*settings, request) for request in requests)
    assert next(first)[2] == "<p>Denoising a.jpg ...</p>"
    waiting = "<p>Waiting for another visitor's pictures ...</p>"
    while (shown := next(second))[2] != waiting:
        pass
    assert shown[-2].visible  # Cancel
    assert len(list(page._again(*settings, requests[1]))) == 1
    page._cancel(requests[1])
    assert list(second)[-1][2] == "<p>Cancelled.</p>"
    released.set()
    assert list(first)[-1][-1].visible  # Download
    assert len(runs) == 1
    page.close()


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


def test_progress_for_screen_readers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The line is sent once, while the bar moves on, and the bar has a name."""
    from fastden.ui.page import POLL, Page

    run = Session.run

    def slow(session: Session, *given: Any) -> None:
        time.sleep(3 * POLL)
        run(session, *given)

    monkeypatch.setattr(Session, "run", slow)
    page, request = Page(tmp_path, Limits()), SimpleNamespace(session_hash="mine")
    (tmp_path / "a.jpg").write_bytes(photo())
    take(page, [tmp_path / "a.jpg"], request)
    *working, ended = list(page._run(True, 0.0, 1.0, "automatic", request))
    assert len(working) > 1
    assert [text for _, _, text, *_ in working if isinstance(text, str)] == ["<p>Denoising a.jpg ...</p>"]
    assert all(bar.visible and 'aria-label="Progress"' in bar.value for *_, bar, _, _, _ in working)
    assert all(cancel.visible for *_, cancel, _ in working)
    assert not ended[-4].visible
    page.close()


def test_pictures_that_went_with_the_connection_are_told(tmp_path: Path) -> None:
    """Gradio ends a session whose connection is lost; the window still shows its pictures and buttons."""
    from fastden.ui.page import Page

    page, request = Page(tmp_path, Limits(files=2)), SimpleNamespace(session_hash="mine")
    settings: Any = (True, 0.0, 1.0, "automatic", request)
    uploads = [tmp_path / f"{name}.jpg" for name in "abc"]
    for upload in uploads:
        upload.write_bytes(photo())
    take(page, uploads[:1], request)
    assert "noise of fine grain" in list(page._again(*settings))[-1][2]
    page._leave(request)
    lost = "The connection was lost, and the pictures with it: reload the page, and drop them again."
    _, compare, told, *_, again, cancel, save = list(page._again(*settings))[-1]
    assert (compare, lost in told, again.interactive, cancel.visible, save.visible) == ("", True, False, False, False)
    assert lost in page._show(0, True, request)[1]
    assert page._automatic(0, False, request).interactive
    page._cancel(request)
    # Gradio does not tell a second time that this window is gone: nothing is kept for it.
    assert lost in take(page, uploads[1:2], request)[3]
    assert not uploads[1].exists()
    assert lost not in str(list(page._run(*settings))[-1])  # and what the drop was told stands
    assert not list(tmp_path.glob("session-*"))
    page.close()


def test_uploads_that_no_session_takes_are_removed(tmp_path: Path) -> None:
    from fastden.ui.page import Page

    page, request = Page(tmp_path, Limits(), keep=1000), SimpleNamespace(session_hash="mine")
    (tmp_path / "a.jpg").write_bytes(photo())
    take(page, [tmp_path / "a.jpg"], request)
    (mine,) = tmp_path.iterdir()
    for name in ("old", "new"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "photo.jpg").write_bytes(photo())
    for name in ("tmp-old", "tmp-new"):  # of an upload that was broken off
        (tmp_path / name).write_bytes(b"half")
    for path in (mine, tmp_path / "old", tmp_path / "tmp-old"):
        os.utime(path, (time.time() - 1100,) * 2)
    page._leave(SimpleNamespace(session_hash="another"))
    assert set(tmp_path.iterdir()) == {mine, tmp_path / "new", tmp_path / "tmp-new"}
    page.close()


def test_uploads_are_removed_now_and_then(tmp_path: Path) -> None:
    from fastden.ui.page import Page

    page = Page(tmp_path, Limits(), keep=0.1)
    (tmp_path / "half").write_bytes(b"half")
    page.blocks()
    deadline = time.monotonic() + 30
    while (tmp_path / "half").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not (tmp_path / "half").exists()
    page.close()


def full(*_: Any, **__: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device", "/secret/path")


def test_a_disk_that_fills_up_after_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The page says so, its buttons work, and what can still be had is offered."""
    from fastden.ui.page import Page

    page, request = Page(tmp_path, Limits()), SimpleNamespace(session_hash="mine")
    settings: Any = (True, 0.0, 1.0, "automatic", request)
    uploads = [tmp_path / f"{name}.jpg" for name in "ab"]
    for seed, upload in enumerate(uploads):
        upload.write_bytes(photo(seed))
    take(page, uploads, request)

    monkeypatch.setattr("fastden.ui.session.ZipFile", full)
    with monkeypatch.context() as context:
        context.setattr("fastden.ui.session._write_preview", full)
        _, compare, told, _, bar, again, cancel, save = list(page._run(*settings))[-1]
        shown = page._show(0, True, request)
    assert "The picture cannot be shown: No space left on device." in told
    assert "The download cannot be made: No space left on device." in told
    assert (compare, bar.visible, again.interactive, cancel.visible, save.visible) == ("", False, True, False, False)
    assert shown[0] == ""
    assert "The picture cannot be shown" in shown[1]
    assert not list(tmp_path.glob("session-*/save-*"))

    monkeypatch.undo()
    assert "fastden-compare" in page._show(0, True, request)[0]
    page.close()


def test_after_a_drop_that_was_refused_its_error_stands(tmp_path: Path) -> None:
    from fastden.ui.page import Page

    page, request = Page(tmp_path, Limits(files=2)), SimpleNamespace(session_hash="mine")
    uploads = [tmp_path / f"{name}.jpg" for name in "abc"]
    for upload in uploads:
        upload.write_bytes(photo())
    assert "3 pictures at a time" in take(page, uploads, request)[3]
    _, _, told, *_ = list(page._run(True, 0.0, 1.0, "automatic", request))[-1]
    assert not isinstance(told, str)
    page.close()


def answer(url: str, data: bytes | None = None, **headers: str) -> int:
    names = {name.replace("_", "-"): value for name, value in headers.items()}
    try:
        with urllib.request.urlopen(urllib.request.Request(url, data, names), timeout=60) as response:
            return int(response.status)
    except urllib.error.HTTPError as error:
        return error.code


def test_no_path_of_the_server_is_reachable(url: str, files: Path) -> None:
    assert answer(url) == 200
    secret = files.parent / "secret.txt"
    secret.write_text("secret")
    for path in ("/etc/passwd", str(secret), str(ROOT / "README.md"), f"{files}/../secret.txt", "README.md"):
        for prefix in ("/gradio_api/file=", "/file=", "/file/", "/"):
            assert answer(f"{url}{prefix}{path}") in (403, 404), (prefix, path)
    # It reaches no other server through this one, nor this one under another name.
    for path in (f"/gradio_api/file={url}/config", f"/file={url}", f"/gradio_api/proxy={url}"):
        assert answer(url + path) == 403
    assert answer(url, Host="example.com") == 403


def call(url: str, file: dict[str, Any], kind: str = "application/json") -> int:
    """Send the request of a drop, with a file of the caller's choice."""
    with urllib.request.urlopen(f"{url}/config", timeout=60) as response:
        config = json.load(response)
    drop_event = next(item for item in config["dependencies"] if item["targets"][0][1] == "upload")
    body = {"data": [[file], True], "fn_index": drop_event["id"], "session_hash": "mine", "event_data": None}
    return answer(f"{url}/gradio_api/queue/join", json.dumps(body).encode(), Content_Type=kind)


def test_a_request_cannot_name_a_file_of_the_server(url: str, files: Path) -> None:
    meta = {"_type": "gradio.FileData"}
    assert call(url, {"path": "http://127.0.0.1/", "meta": meta}) == 403
    assert call(url, {"path": "HTTPS://example.com/a.jpg", "meta": meta}) == 403
    for kind in ("Application/JSON", "application/x+json", "text/plain", " application/json"):
        assert call(url, {"path": "http://127.0.0.1/", "meta": meta}, kind) == 403
    secret = files.parent / "secret.jpg"
    secret.write_bytes(photo())
    for path in (str(secret), "/etc/passwd"):
        assert call(url, {"path": path, "meta": meta}) == 200
        with urllib.request.urlopen(f"{url}/gradio_api/queue/data?session_hash=mine", timeout=60) as stream:
            text = stream.read().decode()
        assert '"success":false' in text.replace(" ", "")
    assert secret.exists()
    (folder,) = files.glob("fastden-ui-*")
    assert not [*folder.rglob("secret.jpg"), *folder.rglob("passwd")]  # nor was it copied


def test_a_file_that_is_too_large(url: str) -> None:
    body = (
        b"--x\r\nContent-Disposition: form-data; name=files; filename=a.jpg\r\n\r\n"
        + bytes(9_000_000)
        + b"\r\n--x--\r\n"
    )
    assert answer(f"{url}/gradio_api/upload", body, Content_Type="multipart/form-data; boundary=x") == 413


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGINT to send")
def test_ctrl_c_is_quiet_while_a_page_is_open(tmp_path: Path) -> None:
    with (tmp_path / "errors.txt").open("w") as errors:
        process, url = start(tmp_path, errors=errors)
    # As a window does: a stream that stays open.
    with urllib.request.urlopen(f"{url}/gradio_api/heartbeat/mine", timeout=60) as stream:
        stream.readline()
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 128 + signal.SIGINT
    assert (tmp_path / "errors.txt").read_text() == ""


def test_another_site_cannot_upload(url: str, files: Path) -> None:
    name = url.removeprefix("http://")

    def sent(origin: str) -> int:
        part = b"Content-Disposition: form-data; name=files; filename=other-site.jpg"
        body = b"--x\r\n" + part + b"\r\n\r\nother site\r\n--x--\r\n"
        kind = "multipart/form-data; boundary=x"
        return answer(f"{url}/gradio_api/upload", body, Content_Type=kind, Origin=origin)

    port = int(name.split(":")[1])
    for origin in (
        "http://evil.example",
        "null",
        f"http://127.0.0.1:{port + 1}",
        f"http://127.0.0.1:{port}.evil.example",
    ):
        assert sent(origin) == 403, origin
    (folder,) = files.glob("fastden-ui-*")
    assert not list(folder.rglob("other-site.jpg"))
    assert sent(url) == 200
    assert list(folder.rglob("other-site.jpg"))


def test_a_port_that_is_taken() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        done = subprocess.run(
            [sys.executable, "-m", "fastden", "ui", "--no-browser", "--port", str(port)],
            capture_output=True,
            text=True,
            check=False,
            env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])},
        )
    assert done.returncode == 1
    assert f"error: port: 127.0.0.1:{port} cannot be used" in done.stderr
    assert "accepted: another --port" in done.stderr


@pytest.mark.parametrize("host", ["", " ", "nosuchhost.invalid", "192.0.2.1", "a" * 70])
def test_a_host_that_cannot_be(host: str) -> None:
    with pytest.raises(UserError, match=r"^host: .*; accepted: a name or an address of this machine"):
        serve(host, 0, Limits())


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere 127.0.0.1 is the only address of its kind")
@pytest.mark.parametrize("host", ["127.0.0.2", "LOCALHOST"])
def test_other_names_of_this_machine(host: str, tmp_path: Path) -> None:
    with (tmp_path / "errors.txt").open("w") as errors:
        process, url = start(tmp_path, "--host", host, errors=errors)
    try:
        assert answer(url) == 200
        assert answer(url, Host="example.com") == 403
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)
    assert "everybody" not in (tmp_path / "errors.txt").read_text()
