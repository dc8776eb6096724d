"""The server of the page: what requests must not do, addresses that cannot be, the end."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from fastden.errors import UserError
from fastden.ui.server import serve
from fastden.ui.session import Limits
from tests.ui.serving import ROOT, answer, photo, start

pytest.importorskip("gradio", reason="gradio is not installed")


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


def test_a_window_is_present_while_it_holds_its_connection() -> None:
    from starlette.testclient import TestClient

    from fastden.ui.server import Gate

    present: list[str] = []

    @contextmanager
    def entered(name: str) -> Iterator[None]:
        present.append(name)
        yield
        present.remove(name)

    seen = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        seen.append(list(present))
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    client = TestClient(Gate(app, None, Limits(), entered))
    for path in ("/gradio_api/heartbeat/mine", "/gradio_api/queue/data?session_hash=mine", "/"):
        client.get(path)
    assert seen == [["mine"], [], []]
    assert present == []


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
