"""Kernels that results of a GPU show right and faster, which the automatic choice takes.

Written by ``benchmarks/prove.py``, not by hand.
"""

from __future__ import annotations

#: (backend, operator, compute capability, dtype): the file of results, from the repository's root. If an operator has
#: two backends, the faster one comes first.
PROVEN: dict[tuple[str, str, tuple[int, int], str], str] = {}
