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


def stated(card: str, key: str) -> str | None:
    """The word behind ``key`` in a card's header; None where there is none."""
    header = card.split("---", 2)[1] if card.startswith("---") and card.count("---") > 1 else ""
    match = re.search(rf"^{re.escape(key)}: *(\S+)", header, re.MULTILINE)
    return match[1] if match else None


def license_of(card: str) -> str | None:
    """The licence in a card's header, as an SPDX name where it is one, or the card's own name of another licence.

    None where none is stated.
    """
    found = stated(card, "license")
    if found == "other":  # the Hub's word for licences that it does not know
        found = stated(card, "license_name") or found
    return None if found is None else _SPDX.get(found, found)


#: The Hub writes licences in lower case.
_SPDX = {"apache-2.0": "Apache-2.0", "mit": "MIT", "gpl-3.0": "GPL-3.0", "cc-by-4.0": "CC-BY-4.0"}
