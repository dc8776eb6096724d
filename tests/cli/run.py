"""Running commands, in this process or in one of their own."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from typer.testing import CliRunner

from fastden.batch.manifest import NAME as MANIFEST
from fastden.cli.main import app


def fails(*arguments: Any, saying: str, code: int = 1) -> str:
    """Run a command that fails in one line; returns its error output."""
    done = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert done.exit_code == code, (done.output, done.exception)
    assert re.search(saying, done.stderr), done.stderr
    assert "Traceback" not in done.output
    return done.stderr


def works(*arguments: Any) -> str:
    """Run a command that succeeds; returns its standard output."""
    done = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert done.exit_code == 0, (done.output, done.exception)
    return done.stdout


def outputs(folder: Path) -> list[str]:
    """Names of the files in an output folder, sorted, without the run's record."""
    return sorted(name for name in os.listdir(folder) if name != MANIFEST)


def process(*arguments: Any, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run the command as a user does."""
    return _python("-m", "fastden", *map(str, arguments), **options)


def in_fresh_python(code: str) -> str:
    """Run code that succeeds, in a process that has imported nothing; returns its standard output."""
    done = _python("-c", code)
    assert done.returncode == 0, done.stderr
    return done.stdout


def _python(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    root = Path(__file__).resolve().parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root), **options.pop("env", {})}
    command = [sys.executable, *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False, **options)
