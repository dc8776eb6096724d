"""Sizes of memory as users write them."""

from __future__ import annotations

from typing import Any

import pytest

from fastden.inference.arguments import parse_memory


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("2GiB", 2 << 30),
        ("2G", 2 << 30),
        ("1.5 GiB", 3 << 29),
        ("500MB", 500_000_000),
        ("64k", 65536),
        ("1tb", 10**12),
        ("123", 123),
        ("7B", 7),
        (5, 5),
        (None, None),
    ],
)
def test_memory_sizes(text: Any, expected: int | None) -> None:
    assert parse_memory(text) == expected


@pytest.mark.parametrize("text", ["", "GiB", "-1", "1XB", "1 2", "0", 0, -5, True, 1.5])
def test_wrong_memory_sizes(text: Any) -> None:
    with pytest.raises(ValueError, match="max_memory"):
        parse_memory(text)
