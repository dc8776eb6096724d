"""Parts of model cards."""

from __future__ import annotations

import re


def body(card: str) -> str:
    """A card without its YAML header."""
    return card.split("---", 2)[-1].lstrip("\n") if card.startswith("---") else card


def section(card: str, title: str) -> str:
    """The text below the heading ``title``, up to the next of its rank; empty where there is none."""
    match = re.search(rf"^## {re.escape(title)}\n(.*?)(?=^## |\Z)", card, re.MULTILINE | re.DOTALL)
    return match[1].strip() if match else ""


def summary(card: str) -> str:
    """The first paragraph that is no heading, table or picture, in one line; empty where there is none."""
    paragraphs = (" ".join(part.split()) for part in body(card).split("\n\n"))
    return next((part for part in paragraphs if part and part[0] not in "#|!<["), "")


def license_of(card: str) -> str | None:
    """The licence in a card's header, as an SPDX name where it is one; None where none is stated."""
    header = card.split("---", 2)[1] if card.startswith("---") and card.count("---") > 1 else ""
    stated = re.search(r"^license: *(\S+)", header, re.MULTILINE)
    return _SPDX.get(stated[1], stated[1]) if stated else None


#: The Hub writes licences in lower case.
_SPDX = {"apache-2.0": "Apache-2.0", "mit": "MIT", "gpl-3.0": "GPL-3.0", "cc-by-4.0": "CC-BY-4.0"}
