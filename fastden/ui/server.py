"""The page's web server: it serves no file but the visitor's, and nothing is loaded from elsewhere."""

from __future__ import annotations

import errno
import json
import logging
import os
import re
import socket
import tempfile
from collections.abc import Callable, Collection
from contextlib import AbstractContextManager, nullcontext
from ipaddress import ip_address
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from fastden.errors import UserError
from fastden.ui.session import Limits
from fastden.ui.uploads import Uploads
from fastden.whole_files import reason

LOOPBACK = ("127.0.0.1", "localhost", "::1")
#: A browser loads nothing from elsewhere, whatever Gradio's page asks for.
POLICY = "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; frame-ancestors 'self'"

#: Bytes of a request that is no upload; the page's own have some thousand.
LONGEST = 1_000_000


def serve(
    host: str,
    port: int,
    limits: Limits,
    *,
    device: str | None = None,
    ready: Callable[[str, bool], None] = lambda *_: None,
) -> None:
    """Serve the page until the process is told to end; then remove all its files.

    Args:
        host, port: to listen on; port 0 is any that is free.
        limits: of the page.
        device: as in :func:`fastden.denoise`.
        ready: called with the page's address, and whether this machine alone can reach it, when it is about to answer.

    Raises:
        ModuleNotFoundError: Gradio is missing.
        UserError: the address cannot be used.
    """
    bound = _bind(host, port)
    local = ip_address(bound.getsockname()[0].split("%")[0]).is_loopback
    # Gradio reads these when it is imported or used.
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    with bound, tempfile.TemporaryDirectory(prefix="fastden-ui-", ignore_cleanup_errors=True) as folder:
        os.environ["GRADIO_TEMP_DIR"] = folder
        import uvicorn

        from fastden.ui.page import Page

        page = Page(Path(folder), limits, device)
        try:
            app = application(page, limits, names={*LOOPBACK, host.lower()} if local else None)
            name = f"[{host}]" if ":" in host else host
            ready(f"http://{name}:{bound.getsockname()[1]}", local)
            # An open page keeps a connection: the server does not wait for it.
            config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=1)
            server = uvicorn.Server(config)
            # At the end uvicorn tells a traceback for each connection that a page keeps open.
            logging.getLogger("uvicorn.error").addFilter(lambda record: not server.should_exit)
            server.run(sockets=[bound])
        finally:
            page.close()


def application(page: Any, limits: Limits, *, names: Collection[str] | None) -> Any:
    """The page as an application for a web server.

    Args:
        page: what it shows.
        limits: of the page.
        names: answer only to these names of this machine, so that no page of another name can talk to it; None: to all.
    """
    import gradio
    from fastapi import FastAPI

    from fastden.ui.page import CSS, head, theme

    blocks = page.blocks()
    # Without it Gradio 6.31 takes any file's path for an upload's: it checks only pages that it has launched.
    blocks.has_launched = True
    app = FastAPI(openapi_url=None)
    gradio.mount_gradio_app(
        app,
        blocks,
        path="",
        footer_links=[],
        show_error=False,
        max_file_size=limits.upload,
        ssr_mode=False,
        enable_monitoring=False,
        pwa=False,
        mcp_server=False,
        theme=theme(),
        css=CSS,
        head=head(),
    )
    app.add_middleware(Gate, names=names, limits=limits, present=page.present)
    return app


class Gate:
    """Closes Gradio's endpoints beyond the page: for a visitor they would fetch files from other servers.

    Args:
        app: behind the gate.
        names, limits: as of :func:`application`.
        present: entered while a window holds its connection, with the window's name.
    """

    def __init__(
        self,
        app: Any,
        names: Collection[str] | None,
        limits: Limits,
        present: Callable[[str], AbstractContextManager[None]],
    ) -> None:
        self.app, self.names, self.present = app, names, present
        self.uploads = Uploads(app, limits)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        host = urlsplit(f"//{headers.get(b'host', b'').decode('latin-1')}").hostname
        refused = self.names is not None and host not in self.names
        # Any site can make a visitor's browser send a form or an upload: the browser tells the site.
        origins = [value for name, value in scope["headers"] if name == b"origin"]
        refused = refused or any(_netloc(origin) != headers.get(b"host", b"").lower() for origin in origins)
        refused = refused or re.search(r"(file[=/]https?:|/proxy=)", unquote(scope["path"])) is not None
        # Uploads alone need no look: a framework takes many types for JSON, a missing one too, and of two types either.
        kinds = [value.strip().lower() for name, value in scope["headers"] if name == b"content-type"]
        upload = len(kinds) == 1 and kinds[0].startswith(b"multipart/form-data")
        # Elsewhere Gradio holds the files of a form in memory.
        refused = refused or (upload and not scope["path"].endswith("/upload"))
        if not refused and scope["method"] not in ("GET", "HEAD") and not upload:
            body, receive = await _whole_body(receive)
            refused = _names_a_url(body)
        if refused:
            await send({"type": "http.response.start", "status": 403, "headers": []})
            await send({"type": "http.response.body", "body": b"not offered"})
            return

        async def with_policy(message: Any) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (b"content-security-policy", POLICY.encode())]
            await send(message)

        window = re.search(r"/heartbeat/([^/]+)$", scope["path"])
        with self.present(window[1]) if window else nullcontext():
            await (self.uploads if upload else self.app)(scope, receive, with_policy)


def _netloc(origin: bytes) -> bytes | None:
    """Host and port of an ``Origin`` header, or None where it has none, as ``null``."""
    found = re.fullmatch(rb"https?://([^/]+)", origin.strip().lower())
    return found[1] if found else None


async def _whole_body(receive: Any) -> tuple[bytes, Any]:
    """The body of a request, up to :data:`LONGEST`, and a ``receive`` that gives it again."""
    body, more = b"", True
    while more and len(body) <= LONGEST:
        message = await receive()
        body += message.get("body", b"")
        more = message.get("more_body", False)
    delivered = False

    async def again() -> Any:
        nonlocal delivered
        if delivered:
            return await receive()
        delivered = True
        return {"type": "http.request", "body": body, "more_body": more}

    return body, again


def _names_a_url(body: bytes) -> bool:
    """Whether a request names an address for a file, which Gradio would load; or is longer than any request."""
    if len(body) > LONGEST:
        return True
    found = False

    def look(pairs: list[tuple[str, Any]]) -> None:
        nonlocal found
        found = found or any(
            name == "path" and str(value).strip().lower().startswith(("http:", "https:")) for name, value in pairs
        )

    try:
        json.loads(body, object_pairs_hook=look)
    except ValueError:
        return False  # Gradio refuses it
    return found


def _bind(host: str, port: int) -> socket.socket:
    accepted = "accepted: a name or an address of this machine, 0.0.0.0 for all"
    if not host.strip():  # the system takes it for all addresses
        raise UserError(f"host: {host!r}; {accepted}")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    bound = socket.socket(family)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind((host, port))
        bound.listen()
    except (OSError, OverflowError, UnicodeError) as error:
        bound.close()
        why = reason(error) if isinstance(error, OSError) else str(error)
        if isinstance(error, (socket.gaierror, UnicodeError)) or getattr(error, "errno", None) == errno.EADDRNOTAVAIL:
            raise UserError(f"host: {host} cannot be used: {why}; {accepted}") from error
        raise UserError(f"port: {host}:{port} cannot be used: {why}; accepted: another --port, 0 for any") from error
    return bound
