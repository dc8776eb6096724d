"""Uploads: many files in a request, many requests of a visitor, and what is no upload of the page's."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fastden.ui.server import application
from fastden.ui.session import Limits
from fastden.ui.uploads import Uploads

pytest.importorskip("gradio", reason="gradio is not installed")


def part(name: str | None, data: bytes) -> bytes:
    """One file of a form, or a field without a file's name."""
    file = b"" if name is None else b"; filename=" + name.encode()
    return b"--X\r\nContent-Disposition: form-data; name=files" + file + b"\r\n\r\n" + data + b"\r\n"


def form(*names: str, size: int = 100) -> bytes:
    return b"".join(part(name, name.encode() * size) for name in names) + b"--X--\r\n"


class Visitor:
    """Sends uploads from an address."""

    def __init__(self, client: Any, address: str = "192.0.2.1") -> None:
        from starlette.testclient import TestClient

        self.client = TestClient(client.app, client=(address, 1))

    def send(self, body: bytes, path: str = "/gradio_api/upload") -> tuple[int, str]:
        answer = self.client.post(path, content=body, headers={"content-type": "multipart/form-data; boundary=X"})
        return answer.status_code, answer.text


@pytest.fixture
def client(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    from starlette.testclient import TestClient

    from fastden.ui.page import Page

    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    limits = Limits(files=3, upload=10_000)
    page = Page(tmp_path, limits)
    yield TestClient(application(page, limits, names=None))
    page.close()


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*") if path.is_file())


def test_as_many_as_there_may_be(client: Any, tmp_path: Path) -> None:
    status, text = Visitor(client).send(form("a", "b", "c"))
    assert status == 200
    assert [Path(path).name for path in json.loads(text)] == ["a", "b", "c"]
    assert files(tmp_path) == ["a", "b", "c"]


@pytest.mark.parametrize("size", [1, 5000])
def test_more_in_one_request(client: Any, tmp_path: Path, size: int) -> None:
    names = [chr(ord("a") + index) for index in range(20)]
    assert Visitor(client).send(form(*names, size=size)) == (413, "20 pictures at a time; accepted: at most 3")
    assert files(tmp_path) == []
    assert Visitor(client).send(form("a"))[0] == 200  # it is over


def test_more_than_a_file_may_have(client: Any, tmp_path: Path) -> None:
    assert Visitor(client).send(form("a", "b", size=10_001))[0] == 413
    assert files(tmp_path) == []


def test_one_after_the_other(client: Any, tmp_path: Path) -> None:
    """What no session has taken makes room for the visitor's next; another visitor's stays."""
    one, other = Visitor(client), Visitor(client, "192.0.2.2")
    assert other.send(form("x", "y"))[0] == 200
    for names in ("ab", "c", "d", "efg"):
        assert one.send(form(*names))[0] == 200
    assert files(tmp_path) == ["e", "f", "g", "x", "y"]
    assert one.send(form("e"))[0] == 200  # the same file once more
    assert files(tmp_path) == ["e", "f", "g", "x", "y"]


@pytest.mark.parametrize(
    "body", [part(None, b"1" * 1000) + form("a"), part("a", b"b") + part(None, b"") + b"--X--\r\n"]
)
def test_a_field_that_is_no_file(client: Any, tmp_path: Path, body: bytes) -> None:
    assert Visitor(client).send(body) == (400, "no upload: a field that is no file")
    assert files(tmp_path) == []


@pytest.mark.parametrize(
    "body", [b"no form", b"--X\r\n" + b"a" * 9000 + b": b\r\n\r\n", b"--X\r\na: " + b"b" * 9000 + b"\r\n\r\n"]
)
def test_what_is_no_form(client: Any, tmp_path: Path, body: bytes) -> None:
    assert Visitor(client).send(body)[0] == 400
    assert files(tmp_path) == []


@pytest.mark.parametrize("path", ["/gradio_api/component_server", "/gradio_api/process_recording"])
def test_forms_are_taken_nowhere_else(client: Any, path: str) -> None:
    assert Visitor(client).send(form("a"), path)[0] == 403


def test_requests_at_the_same_time() -> None:
    """The one that is too much is refused, the other goes on."""
    limits, read = Limits(files=3), []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        from starlette.formparsers import MultiPartException

        status = 200
        try:
            while (message := await receive()).get("more_body"):
                read.append(message["body"])
        except MultiPartException:
            status = 400
        await send({"type": "http.response.start", "status": status, "headers": []})
        await send({"type": "http.response.body", "body": b"[]"})

    uploads = Uploads(app, limits)
    scope = {"client": ("192.0.2.1", 1), "headers": [(b"content-type", b"multipart/form-data; boundary=X")]}

    async def sent(first: bytes, then: bytes, begun: asyncio.Event, go: asyncio.Event) -> list[Any]:
        messages = iter([(first, True), (then, False)])
        answers = []

        async def receive() -> Any:
            body, more = next(messages)
            if not more:
                begun.set()
                await go.wait()
            return {"type": "http.request", "body": body, "more_body": more}

        async def send(message: Any) -> None:
            answers.append(message)

        await uploads(scope, receive, send)
        return [answers[0]["status"], answers[1]["body"]]

    async def both() -> tuple[list[Any], list[Any]]:
        begun, go, now = asyncio.Event(), asyncio.Event(), asyncio.Event()
        now.set()
        slow = asyncio.create_task(sent(part("a", b"a") + part("b", b"b"), b"--X--\r\n", begun, go))
        await begun.wait()
        quick = await sent(part("c", b"c") + part("d", b"d"), b"--X--\r\n", asyncio.Event(), now)
        go.set()
        return quick, await slow

    quick, slow = asyncio.run(both())
    assert quick == [413, b"4 pictures at a time; accepted: at most 3"]
    assert slow == [200, b"[]"]
    assert not uploads._coming
