"""The page, made with Gradio: a place to drop pictures on, settings, a slider between before and after, a download."""

from __future__ import annotations

import contextlib
import html
import os
import shutil
import threading
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any, Literal
from urllib.parse import quote

import gradio as gr

from fastden.errors import FAILURES, in_one_line
from fastden.images.samples import MAX_SIGMA
from fastden.network.hub import models
from fastden.ui.session import Cancelled, Choice, Limits, Picture, Session, Superseded, Turns, in_words, remove_uploads
from fastden.whole_files import reason

#: The model that fastden chooses.
AUTOMATIC = "automatic"
#: Polling interval of a run, seconds.
POLL = 0.2
#: Windows that are remembered after they were left.
MOST_GONE = 1000

TITLE = "<h1>Denoise photographs</h1><p>They stay on the computer that runs this page.</p>"
#: As of ``--sigma``: see docs/noise.md.
BY_HAND = (
    "<p>A level set by hand is one of white noise: automatic takes the model color for it. For coarse grain move"
    " Strength instead, or choose the model photo and 1.4 to 2 times the level (docs/noise.md).</p>"
)
LOST = "The connection was lost, and the pictures with it: reload the page, and drop them again."
WAITING = "<p>Waiting for another visitor's pictures ...</p>"
#: An encoder of a large picture cannot be interrupted.
ENDING = "<p>Ending ...</p>"
CSS = """
.gradio-container { max-width: 1080px !important; margin: 0 auto !important; }
footer { display: none !important; }
#title h1 { margin: 0; } #title p { margin: 2px 0 0; }
#drop { height: 150px !important; }
#status { padding: 2px 4px; min-height: 24px; }
#by-hand { background: var(--block-background-fill); } #by-hand p { margin: 0; }
#bar progress { width: 100%; height: 10px; accent-color: #2563eb; }
#status .wrong { color: #c2410c; } .dark #status .wrong { color: #fdba74; }
"""
#: Screen readers tell what changes below it. Gradio keeps this element, and makes what is in it anew.
ANNOUNCED = """() => document.querySelector("#status").setAttribute("role", "status")"""


class Page:
    """The page and what it does.

    Args:
        root: folder of the sessions, below the folder of Gradio's uploads.
        limits: what it takes.
        device: as in :func:`fastden.denoise`.
        keep: seconds after which an upload that no session has taken is removed, and after which a session ends that
            no window has open and that nobody uses: programs tell nobody that they are gone.
    """

    def __init__(self, root: Path, limits: Limits, device: str | None = None, keep: float = 3600) -> None:
        self.root, self.limits, self.device, self.keep = root, limits, device, keep
        self._turns = Turns()
        self._sessions: dict[str, Session] = {}
        # Windows that are open, as far as each holds its connection.
        self._present: Counter[str] = Counter()
        # Gradio tells once that a window is gone: a second session of that window would end by its age alone.
        self._gone: dict[str, None] = {}
        self._lock = threading.Lock()
        self._closed = threading.Event()

    def close(self) -> None:
        """End all that is going on."""
        self._closed.set()
        for name in list(self._sessions):
            self._sessions.pop(name).close()

    def _session(self, request: gr.Request) -> Session | None:
        """The visitor's session; None before the first drop, and after the connection was lost."""
        with self._lock:
            return self._found(request.session_hash or "")

    def _found(self, name: str) -> Session | None:
        session = self._sessions.get(name)
        if session is not None:
            session.used = time.monotonic()
        return session

    @contextlib.contextmanager
    def present(self, name: str) -> Iterator[None]:
        """While a window holds its connection; its session stays, however long it is silent."""
        self._present[name] += 1  # in the server's own thread alone
        try:
            yield
        finally:
            self._present[name] -= 1
            if not self._present[name]:
                del self._present[name]

    def _session_of_a_drop(self, request: gr.Request) -> Session | None:
        """The visitor's session, a new one at the first drop; None after the connection was lost."""
        name = request.session_hash or ""
        with self._lock:
            if name not in self._sessions and name not in self._gone:
                self._sessions[name] = Session(self.root, self.limits, self.device, self._turns)
            return self._found(name)

    def _leave(self, request: gr.Request) -> None:
        name = request.session_hash or ""
        with self._lock:
            self._gone[name] = None
            if len(self._gone) > MOST_GONE:
                del self._gone[next(iter(self._gone))]
            session = self._sessions.pop(name, None)
        if session is not None:
            session.close()
        self.remove_old_uploads()

    def remove_old_uploads(self) -> None:
        """Remove what no session has taken: the visitor went away during the upload, or before it was looked at."""
        with self._lock:
            sessions = {session.folder.name for session in self._sessions.values()}
            oldest = time.time() - self.keep
            for path in list(self.root.iterdir()):
                with contextlib.suppress(OSError):  # a session takes it at this moment
                    if path.name not in sessions and path.stat().st_mtime < oldest:
                        shutil.rmtree(path) if path.is_dir() else path.unlink()

    def remove_silent_sessions(self) -> None:
        """End the sessions that nobody has used for ``keep`` seconds, unless their window is open."""
        oldest = time.monotonic() - self.keep
        with self._lock:
            silent = [
                name
                for name, session in self._sessions.items()
                if session.used < oldest and not session.busy and name not in self._present
            ]
            ended = [self._sessions.pop(name) for name in silent]
        for session in ended:
            session.close()

    def _remove_now_and_then(self) -> None:
        while not self._closed.wait(self.keep / 4):
            self.remove_silent_sessions()
            self.remove_old_uploads()

    def blocks(self) -> gr.Blocks:
        """The page."""
        threading.Thread(target=self._remove_now_and_then, name="fastden-ui-uploads", daemon=True).start()
        # Gradio's own removal is no help sooner than in a day: it counts the download of a window that is open, too.
        # Analytics and the search for newer versions are off: the page talks to this machine alone.
        with gr.Blocks(title="fastden", analytics_enabled=False, delete_cache=(3600, 86400)) as page:
            gr.HTML(TITLE, elem_id="title")
            drop = gr.File(file_count="multiple", label="Photographs", elem_id="drop", height=150)
            status = gr.HTML(elem_id="status")
            bar = gr.HTML(visible=False, elem_id="bar")
            cancel = gr.Button("Cancel", visible=False, elem_id="cancel")
            save = gr.DownloadButton("Download", visible=False, variant="primary", elem_id="save")
            which = gr.Dropdown([], label="Picture", visible=False, elem_id="which")
            compare = gr.HTML(elem_id="compare")
            with gr.Group():
                strength = gr.Slider(
                    0, 2, 1, step=0.05, label="Strength", info="0 leaves the noise, 1 removes it, 2 smooths more"
                )
                with gr.Row():
                    automatic = gr.Checkbox(True, label="Find the noise level by itself", min_width=200)
                    sigma = gr.Slider(0, MAX_SIGMA, 0, step=0.1, label="Noise level (sigma)", interactive=False)
                    model = gr.Dropdown([AUTOMATIC, *models()], value=AUTOMATIC, label="Model", min_width=160)
                gr.HTML(BY_HAND, elem_id="by-hand", padding=True)
            again = gr.Button("Denoise again", interactive=False, elem_id="again")

            shown = [which, compare, status, sigma]
            buttons = [bar, again, cancel, save]
            private: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
            page.load(None, None, None, js=ANNOUNCED)
            page.unload(self._leave)
            # Sessions wait for their turn themselves: in Gradio's queue a visitor would see nothing of it.
            running: dict[str, Any] = {"concurrency_limit": None, **private}
            settings = [automatic, sigma, strength, model]
            # A drop ends what is done for an earlier one of the visitor: none waits for the other.
            at_once: dict[str, Any] = {"concurrency_limit": None, "trigger_mode": "multiple", **private}
            dropped = drop.upload(self._take, [drop, automatic], [drop, *shown, *buttons], **at_once)
            dropped.success(self._first_run, settings, [*shown, *buttons], trigger_mode="multiple", **running)
            again.click(self._again, settings, [*shown, *buttons], **running)
            cancel.click(self._cancel, None, None, queue=False, **private)
            which.input(self._show, [which, automatic], [compare, status, sigma], **private)
            automatic.change(self._automatic, [which, automatic], sigma, **private)
        return page

    def _take(self, uploads: list[str] | None, automatic: bool, request: gr.Request) -> Iterator[tuple[Any, ...]]:
        """Take the dropped files, and tell the noise of each."""
        session = self._session_of_a_drop(request)
        nothing = (None, gr.Dropdown(visible=False), "")
        if session is None:
            remove_uploads(self.root, uploads or [])
            yield *nothing, _wrong(LOST), gr.skip(), *_buttons(None)
            return
        yield None, *(gr.skip(),) * 8  # the next drop has room
        at = [0]

        def work() -> None:
            session.take(uploads or [], lambda index: at.__setitem__(0, index))

        def told() -> tuple[str, float]:
            return _at_work("Looking at", session.pictures, at[0]), at[0] / max(len(session.pictures), 1)

        error = yield from _in_a_thread(session, work, told, gr.skip())
        if isinstance(error, Superseded):
            yield (gr.skip(),) * 9
        elif isinstance(error, Cancelled):
            yield *nothing, "<p>Cancelled.</p>", gr.skip(), *_buttons(session)
        elif error is not None:
            yield *nothing, _wrong(_why(session, error)), gr.skip(), *_buttons(session)
        else:
            choices = [(picture.name, index) for index, picture in enumerate(session.pictures)]
            first = next((index for index, picture in enumerate(session.pictures) if picture.estimate is not None), 0)
            which = gr.Dropdown(choices, value=first, visible=len(choices) > 1)
            level = gr.Slider(**_level(session, first, automatic))
            # A run follows at once.
            buttons = _buttons(session, 0.0 if _readable(session) else None)
            yield None, which, "", _told(session.pictures[first]), level, *buttons

    def _first_run(
        self, automatic: bool, sigma: float, strength: float, model: str, request: gr.Request
    ) -> Iterator[tuple[Any, ...]]:
        """Denoise what was dropped, unless other pictures were dropped meanwhile: they have a run of their own."""
        session = self._session(request)
        if session is not None and session.fresh and not session.busy:
            yield from self._run(automatic, sigma, strength, model, request)
        else:
            yield (gr.skip(),) * 8

    def _run(
        self, automatic: bool, sigma: float, strength: float, model: str, request: gr.Request
    ) -> Iterator[tuple[Any, ...]]:
        """Denoise in a thread, and report its progress; leaving the page ends it."""
        session = self._session(request)
        if session is None or not _readable(session):
            yield *[gr.skip()] * 4, *_buttons(session)
            return
        level: Literal["auto"] | float = "auto" if automatic else float(sigma)
        choice = Choice(None if model == AUTOMATIC else model, level, float(strength))
        at: list[tuple[int, float]] = [(0, 0.0)]

        def work() -> None:
            session.run(choice, lambda index, part: at.__setitem__(0, (index, part)))

        def told() -> tuple[str, float]:
            index, part = at[0]
            return _at_work("Denoising", _readable(session), index), part

        error = yield from _in_a_thread(session, work, told)
        if isinstance(error, Superseded):
            yield (gr.skip(),) * 8
        elif isinstance(error, Cancelled):
            yield gr.skip(), "", "<p>Cancelled.</p>", gr.skip(), *_buttons(session)
        elif error is not None:
            yield gr.skip(), "", _wrong(in_one_line(error)), gr.skip(), *_buttons(session)
        else:
            first = next((index for index, picture in enumerate(session.pictures) if picture.done), 0)
            compare, text, level_shown = self._view(session, first, automatic)
            path, wrong = _download(session)
            buttons = _buttons(session, path=path)
            yield gr.Dropdown(value=first), compare, _summary(session) + text + wrong, level_shown, *buttons

    def _again(
        self, automatic: bool, sigma: float, strength: float, model: str, request: gr.Request
    ) -> Iterator[tuple[Any, ...]]:
        """Denoise the pictures that the window shows, if they are still here."""
        session = self._session(request)
        if session is not None and session.busy:
            yield (gr.skip(),) * 8  # pressed twice
        elif session is not None and session.pictures:
            yield from self._run(automatic, sigma, strength, model, request)
        else:
            yield gr.Dropdown(visible=False), "", _wrong(LOST), gr.skip(), *_buttons(session)

    def _show(self, index: int, automatic: bool, request: gr.Request) -> tuple[Any, ...]:
        return self._view(self._session(request), index, automatic)

    def _view(self, session: Session | None, index: int, automatic: bool) -> tuple[Any, ...]:
        """One picture before and after, the text about it, and its level on the slider."""
        picture = _picture(session, index)
        compare, text = "", _wrong(LOST) if picture is None else _told(picture)
        if session is not None and picture is not None and picture.done:
            try:
                before, after = (f"gradio_api/file={quote(str(path))}" for path in session.previews(picture))
                compare = f'<fastden-compare before="{before}" after="{after}"></fastden-compare>'
            except FAILURES as error:
                text += _wrong(f"The picture cannot be shown: {_why(session, error)}.")
        return compare, text, gr.Slider(**_level(session, index, automatic))

    def _cancel(self, request: gr.Request) -> None:
        session = self._session(request)
        if session is not None:
            session.cancel()

    def _automatic(self, index: int | None, automatic: bool, request: gr.Request) -> Any:
        """The slider of the noise level: shows what is estimated, or is set by hand."""
        return gr.Slider(interactive=not automatic, **_level(self._session(request), index or 0, automatic))


def _in_a_thread(
    session: Session, work: Callable[[], None], told: Callable[[], tuple[str, float]], *first: Any
) -> Generator[tuple[Any, ...], None, BaseException | None]:
    """Work in a thread, and report its progress; leaving the page ends it.

    Args:
        session: the visitor's.
        work: is called in the thread.
        told: the status, and the part that is done, 0 to 1.
        first: goes in front of what is reported: the picture shown, the comparison, the status, the level, the buttons.

    Returns:
        The error with which it ended, or None.
    """
    ended: list[BaseException | None] = []

    def run() -> None:
        try:
            work()
            ended.append(None)
        except BaseException as error:
            ended.append(error)

    thread = threading.Thread(target=run, name="fastden-ui", daemon=True)
    thread.start()
    said = None
    try:
        while thread.is_alive():
            text, part = told()
            if session.ending:
                text = ENDING
            elif session.waiting:
                text = WAITING
            # Text that stays is not sent again, or a screen reader would read it again.
            status = gr.skip() if text == said else text
            yield *first, gr.skip(), gr.skip(), status, gr.skip(), *_buttons(session, part)
            said = text
            thread.join(POLL)
    finally:
        session.used = time.monotonic()
        if thread.is_alive():
            session.cancel()
    return ended[0]


def _readable(session: Session) -> list[Picture]:
    """The pictures that can be denoised."""
    return [picture for picture in session.pictures if picture.estimate is not None]


def _picture(session: Session | None, index: int) -> Picture | None:
    return session.pictures[index] if session is not None and index < len(session.pictures) else None


def _level(session: Session | None, index: int, automatic: bool) -> dict[str, Any]:
    """What the slider of the noise level shows: what is estimated, unless it is set by hand."""
    picture = _picture(session, index)
    if not automatic or picture is None or picture.estimate is None:
        return {}
    return {"value": round(picture.estimate.sigma, 1)}


def _download(session: Session) -> tuple[Path | None, str]:
    """What the visitor downloads, and a text where it cannot be made, as on a full disk."""
    try:
        return session.download(), ""
    except FAILURES as error:
        return None, _wrong(f"The download cannot be made: {_why(session, error)}.")


def _why(session: Session, error: BaseException) -> str:
    """The message of an error, without the paths of this machine."""
    text = reason(error) if isinstance(error, OSError) else in_one_line(error)
    return text.replace(f"{session.folder}{os.sep}", "")


def _buttons(session: Session | None, part: float | None = None, path: Path | None = None) -> tuple[Any, ...]:
    """The bar of progress, and the buttons *Denoise*, *Cancel* and *Download*.

    Args:
        session: the visitor's.
        part: of a run that is done, 0 to 1; None where none is going on.
        path: what is downloaded.
    """
    running = part is not None
    pictures = [] if session is None else session.pictures
    some = any(picture.estimate is not None for picture in pictures)
    count = sum(picture.done for picture in pictures)
    text = "Download" if count < 2 else f"Download all {count} (zip)"
    save = gr.DownloadButton(text, visible=path is not None, value=None if path is None else str(path))
    bar = gr.HTML(f'<progress aria-label="Progress" value="{part or 0:.3f}"></progress>', visible=running)
    return bar, gr.Button(interactive=some and not running), gr.Button(visible=running), save


def _wrong(text: str) -> str:
    return f'<p class="wrong">{html.escape(text)}</p>'


def _told(picture: Picture) -> str:
    """The text about a picture: its noise, its model, its error and its notes."""
    parts = []
    if picture.estimate is not None:
        parts.append(f"<p><b>{html.escape(picture.name)}</b>: {html.escape(in_words(picture.estimate))}</p>")
    if picture.model is not None:
        parts.append(f"<p>Denoised by the model {html.escape(picture.model)}.</p>")
    if picture.error is not None:
        parts.append(_wrong(picture.error))
    parts += [f"<p>{html.escape(note)}</p>" for note in picture.notes]
    return "".join(parts)


def _summary(session: Session) -> str:
    """A line on several pictures: how many are done, and the errors of the others."""
    if len(session.pictures) < 2:
        return ""
    done = sum(picture.done for picture in session.pictures)
    wrong = [picture.error for picture in session.pictures if picture.error is not None]
    return f"<p>{done} of {len(session.pictures)} pictures denoised.</p>" + "".join(map(_wrong, wrong))


def _at_work(doing: str, pictures: list[Picture], index: int) -> str:
    """Which picture is at work."""
    if not pictures:
        return ""
    name = html.escape(pictures[min(index, len(pictures) - 1)].name)
    count = f" ({index + 1} of {len(pictures)})" if len(pictures) > 1 else ""
    return f"<p>{doing} {name}{count} ...</p>"


def theme() -> Any:
    """Colours and shapes; fonts of the system, where Gradio would load Google's."""
    return gr.themes.Default(
        primary_hue="blue", font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]
    )


def head() -> str:
    """The slider's script."""
    return f"<script>{Path(__file__).with_name('compare.js').read_text(encoding='utf-8')}</script>"
