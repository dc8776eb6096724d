"""What the commands of ``benchmarks/`` share."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import TypeVar

from fastden.errors import UserError

Result = TypeVar("Result")


def command(main: Callable[[], Result]) -> Callable[[], Result]:
    """A command that a :class:`fastden.errors.UserError` ends with its one line, without a trace, and exit code 1."""

    @wraps(main)
    def run() -> Result:
        try:
            return main()
        except UserError as error:
            raise SystemExit(f"error: {error}") from None

    return run
