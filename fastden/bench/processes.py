"""Processes of their own for what is measured: their start, and memory that no other measurement has used."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def run_module(*words: str) -> subprocess.CompletedProcess[str]:
    """``python -m`` and these words; it works from a checkout that is not installed, too."""
    root = str(Path(__file__).parents[2])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, "-m", *words]
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
