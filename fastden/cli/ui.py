"""``fastden ui``: a page in the browser to drop pictures on."""

from __future__ import annotations

import threading
from importlib.util import find_spec
from typing import Annotated

import typer

from fastden.cli.console import clean_termination, say
from fastden.cli.options import DeviceOption, naming, parse_megapixels
from fastden.errors import UserError


def ui(
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 lets other machines in.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any that is free.")] = 7860,
    browser: Annotated[bool, typer.Option("--browser/--no-browser", help="Open the page in a browser.")] = True,
    device: DeviceOption = None,
    max_files: Annotated[int, typer.Option(min=1, help="Pictures at a time.")] = 100,
    max_megapixels: Annotated[float, typer.Option(help="Refuse larger pictures.")] = 100.0,
    max_upload: Annotated[int, typer.Option(min=1, help="Refuse larger files, MB.")] = 500,
) -> None:
    """Open a page to drop pictures on (needs pip install 'fastden[ui]').

    Results are those of fastden denoise. Pictures go to this machine alone, and are removed when the page is left.
    """
    if find_spec("gradio") is None:
        raise UserError("ui: needs the package gradio; install: pip install 'fastden[ui]'")
    from fastden.network.devices import parse_device
    from fastden.network.onednn import keep_freed_memory
    from fastden.ui.server import serve
    from fastden.ui.session import Limits

    limits = Limits(max_files, parse_megapixels(max_megapixels), max_upload * 1_000_000)
    with naming("device"):
        parse_device(device)
    keep_freed_memory()

    def ready(url: str, local: bool) -> None:
        if not local:
            say(f"note: everybody who can reach this machine at {host} can use the page", error=True)
        say(f"{url}  (Ctrl-C ends it)")
        if browser:
            import webbrowser

            # Browsers of the terminal (lynx, w3m) and of BROWSER are waited for until they are closed: not here, or
            # they would wait for the page, and the page for them.
            threading.Thread(target=webbrowser.open, args=[_of_this_machine(url)], daemon=True).start()

    with clean_termination():
        serve(host, port, limits, device=device, ready=ready)


def _of_this_machine(url: str) -> str:
    """The address at which a browser here finds the page: 0.0.0.0 and [::] are no place to go to."""
    return url.replace("//0.0.0.0:", "//127.0.0.1:").replace("//[::]:", "//[::1]:")
