"""The one build option that pyproject.toml cannot express.

``FASTDEN_BUILD`` is ``auto`` (default: build what this release and this machine can), ``none`` (pure Python) or
``cuda`` (fail where the CUDA extension cannot be built). It never imports torch, so isolated builds work.
"""

import os

from setuptools import setup

CHOICES = ("auto", "cuda", "none")

choice = os.environ.get("FASTDEN_BUILD", "auto")
if choice not in CHOICES:
    raise SystemExit(f"FASTDEN_BUILD: {choice!r}; accepted: {', '.join(CHOICES)}")
if choice == "cuda":
    raise SystemExit("FASTDEN_BUILD: 'cuda', but this release ships no CUDA sources; accepted: auto or none")
setup()
