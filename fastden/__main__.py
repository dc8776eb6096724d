"""``fastden`` and ``python -m fastden``: the command line."""

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def _quiet_interruption() -> Iterator[None]:
    """A context in which Ctrl-C ends the process at once, with exit code 130.

    It is for imports, which write no file. An exception would be printed with its trace, and a library that is half
    imported makes others of it.
    """

    def stop(_number: int, _frame: Any) -> None:
        os._exit(130)

    # A shell's background job ignores the signal; only the main thread sets a handler.
    default = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if not default or threading.current_thread() is not threading.main_thread():
        yield
        return
    signal.signal(signal.SIGINT, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def main() -> None:
    """Run the command that the arguments name."""
    with _quiet_interruption():
        from fastden.cli.early import start_loading, without_garbage_collection

        start_loading(sys.argv[1:])
        with without_garbage_collection():
            from fastden.cli.main import app

    try:
        app(prog_name="fastden")
    except KeyboardInterrupt:  # before the command begins: typer looks at the functions' arguments for 0.1 s
        sys.exit(130)


if __name__ == "__main__":
    main()
