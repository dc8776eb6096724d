"""What may be uploaded: pictures only, and as many at a time as the page takes."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

from fastden.ui.session import Limits

#: Characters of a part's header.
LONGEST_HEADER = 8192


class Uploads:
    """Keeps what a visitor uploads within the page's limits, before a session takes it.

    Gradio takes any number of files up to 1000 in a request, holds its other fields in memory, and keeps what no
    session takes. An upload names no window: a visitor is an address here.

    Args:
        app: Gradio's; it keeps to the limit of one file's bytes.
        limits: of the page.
    """

    def __init__(self, app: Any, limits: Limits) -> None:
        self.app, self.limits = app, limits
        self._coming: Counter[str] = Counter()
        self._kept: dict[str, list[Path]] = {}

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        from starlette.formparsers import MultiPartException

        visitor = str((scope.get("client") or ("",))[0])
        headers = dict(scope["headers"])
        parts = Parts(headers[b"content-type"])
        answer, refused, others, more = b"", False, 0, True

        async def counted() -> Any:
            nonlocal refused, others, more
            message, before = await receive(), parts.files
            more = message.get("more_body", False)
            parts.write(message.get("body", b""))
            if not refused:
                self._coming[visitor] += parts.files - before
                too_many = parts.files > before and self._coming[visitor] > self.limits.files
                refused = too_many or bool(parts.wrong)
                others = self._coming[visitor] - parts.files
            return message

        async def counted_or_refused() -> Any:
            message = await counted()
            if refused:
                raise MultiPartException("refused")  # Gradio then removes what it has of the request
            return message

        async def passed_on(message: Any) -> None:
            nonlocal answer
            if not refused:
                answer += message.get("body", b"")
                await send(message)

        try:
            await self.app(scope, counted_or_refused, passed_on)
        finally:
            self._coming[visitor] -= parts.files
            self._coming += Counter()  # without zeros
        if not refused:
            self._remove_older(visitor, answer)
            return
        # A browser reads no answer before it has sent all, of which nothing is kept.
        received = 0
        while more and not parts.wrong and received < self.limits.files * self.limits.upload:
            received += len((await counted()).get("body", b""))
        text = parts.wrong or f"{others + parts.files} pictures at a time; accepted: at most {self.limits.files}"
        kind = [(b"content-type", b"text/plain; charset=utf-8")]
        await send({"type": "http.response.start", "status": 400 if parts.wrong else 413, "headers": kind})
        await send({"type": "http.response.body", "body": text.encode()})

    def _remove_older(self, visitor: str, answer: bytes) -> None:
        """Remove what a visitor uploaded before, where it is too much beside this answer and no session took it."""
        try:
            paths = json.loads(answer)
        except ValueError:
            return  # a refusal of Gradio's
        if not isinstance(paths, list):
            return
        self._kept[visitor] = [*self._kept.get(visitor, []), *map(Path, paths)]
        for address, kept in list(self._kept.items()):
            here = [path for path in dict.fromkeys(reversed(kept)) if path.exists()]
            self._kept[address] = here[: self.limits.files][::-1]
            for path in here[self.limits.files :]:
                path.unlink(missing_ok=True)
            if not here:
                del self._kept[address]


class Parts:
    """Counts the files of a multipart request while it comes.

    Args:
        content_type: of the request.

    Attributes:
        files: how many have begun.
        wrong: why the request is none of the page's; empty if it may be one.
    """

    def __init__(self, content_type: bytes) -> None:
        from python_multipart.multipart import MultipartParser, parse_options_header

        self.files, self.wrong = 0, ""
        self._options = parse_options_header
        self._name = self._value = b""
        self._is_file = False
        boundary = parse_options_header(content_type)[1].get(b"boundary")
        self._parser = None
        if boundary:  # Gradio refuses it otherwise
            callbacks: Any = {
                "on_part_begin": self._begin,
                "on_header_field": self._header_field,
                "on_header_value": self._header_value,
                "on_header_end": self._header_end,
                "on_headers_finished": self._headers_finished,
            }
            self._parser = MultipartParser(boundary, callbacks)

    def write(self, data: bytes) -> None:
        """Count in the next bytes."""
        from python_multipart.exceptions import MultipartParseError

        if self._parser is not None and not self.wrong:
            try:
                self._parser.write(data)
            except MultipartParseError as error:
                self.wrong = f"no upload: {error}"

    def _begin(self) -> None:
        self._is_file = False

    def _header_field(self, data: bytes, start: int, end: int) -> None:
        self._name += data[start:end]
        self._check_length()

    def _header_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]
        self._check_length()

    def _check_length(self) -> None:
        if len(self._name) + len(self._value) > LONGEST_HEADER:
            self.wrong = f"no upload: a header above {LONGEST_HEADER} bytes"
            self._name = self._value = b""

    def _header_end(self) -> None:
        if self._name.lower() == b"content-disposition":
            self._is_file = b"filename" in self._options(self._value)[1]
        self._name = self._value = b""

    def _headers_finished(self) -> None:
        self.files += self._is_file
        if not self._is_file:
            self.wrong = "no upload: a field that is no file"
