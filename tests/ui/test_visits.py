"""What the page does for its visitors, without a browser: what is told, what is kept, and for how long."""

from __future__ import annotations

import errno
import os
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fastden.ui.session import Limits, Session
from tests.ui.serving import photo

pytest.importorskip("gradio", reason="gradio is not installed")


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
    (tmp_path / "a.jpg").write_bytes(photo())
    take(page, [tmp_path / "a.jpg"], SimpleNamespace(session_hash="program"))
    (tmp_path / "half").write_bytes(b"half")
    page.blocks()
    deadline = time.monotonic() + 30
    while ((tmp_path / "half").exists() or list(tmp_path.glob("session-*"))) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not (tmp_path / "half").exists()
    assert not list(tmp_path.glob("session-*"))
    page.close()


def test_a_session_that_is_silent_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A program tells nobody that it is gone; a window whose connection is open keeps its pictures."""
    from fastden.ui.page import Page

    page, clock = Page(tmp_path, Limits(), keep=1000), [0.0]
    monkeypatch.setattr("fastden.ui.page.time", SimpleNamespace(monotonic=lambda: clock[0], time=time.time))
    monkeypatch.setattr("fastden.ui.session.time", SimpleNamespace(monotonic=lambda: clock[0]))
    requests = {name: SimpleNamespace(session_hash=name) for name in ("program", "another", "working", "window")}
    for request in requests.values():
        (tmp_path / "a.jpg").write_bytes(photo())
        take(page, [tmp_path / "a.jpg"], request)
    with page.present("window"), page.present("window"):
        pass
    window = page.present("window")
    window.__enter__()
    clock[0] = 500
    page._show(0, True, requests["another"])
    clock[0] = 1100
    with page._sessions["working"]._running:
        page.remove_silent_sessions()
    assert set(page._sessions) == {"another", "working", "window"}
    assert len(list(tmp_path.glob("session-*"))) == 3
    clock[0] = 1600
    page.remove_silent_sessions()
    assert set(page._sessions) == {"window"}
    window.__exit__(None, None, None)
    page.remove_silent_sessions()
    assert not list(tmp_path.glob("session-*"))
    assert not page._present
    # It may come again.
    (tmp_path / "a.jpg").write_bytes(photo())
    assert "noise of fine grain" in take(page, [tmp_path / "a.jpg"], requests["program"])[3]
    page.close()


def test_what_a_long_run_has_made_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fastden.ui.page import Page

    page, request = Page(tmp_path, Limits(), keep=1000), SimpleNamespace(session_hash="program")
    (tmp_path / "a.jpg").write_bytes(photo())
    take(page, [tmp_path / "a.jpg"], request)
    run = Session.run

    def long(session: Session, *given: Any) -> None:
        run(session, *given)
        session.used -= 2000

    monkeypatch.setattr(Session, "run", long)
    list(page._run(True, 0.0, 1.0, "automatic", request))
    page.remove_silent_sessions()
    assert page._sessions["program"].pictures[0].done
    page.close()


def test_windows_that_left_are_not_remembered_for_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fastden.ui import page as module

    page = module.Page(tmp_path, Limits())
    monkeypatch.setattr(module, "MOST_GONE", 3)
    for name in "abcdc":
        page._leave(SimpleNamespace(session_hash=name))
    assert list(page._gone) == ["b", "c", "d"]
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
