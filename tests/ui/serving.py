"""The command, started and asked by the tests."""

from __future__ import annotations

import os
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from tests.image_files import encoded, exif, pixels

ROOT = Path(__file__).resolve().parents[2]


def start(folder: Path, *options: str, errors: Any = None) -> tuple[subprocess.Popen[str], str]:
    """The command, and the address that it tells; its temporary files lie below ``folder``."""
    command = [sys.executable, "-m", "fastden", "ui", "--no-browser", "--port", "0", *options]
    environment = {**os.environ, "TMPDIR": str(folder), "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment)
    assert process.stdout is not None
    return process, process.stdout.readline().split()[0]


def photo(seed: int = 0) -> bytes:
    return encoded(pixels(64, 96, seed=seed), "JPEG", exif=exif(6), quality=90)


def answer(url: str, data: bytes | None = None, **headers: str) -> int:
    names = {name.replace("_", "-"): value for name, value in headers.items()}
    try:
        with urllib.request.urlopen(urllib.request.Request(url, data, names), timeout=60) as response:
            return int(response.status)
    except urllib.error.HTTPError as error:
        return error.code
