"""The chain of a TIFF's directories: each names the next one. It is walked here without what their tags point at.

tifffile and tifftools go on in a circle where a damaged file leads in one, and read all tags: 4 s for 20,000 pages, not
0.2 s.
"""

from __future__ import annotations

import io
import struct
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

from fastden.errors import UserError

_KIND, _OLD_KIND = 254, 255
#: Types of whole numbers, and their struct codes.
_NUMBERS = {1: "B", 3: "H", 4: "I", 16: "Q"}


class Directory(NamedTuple):
    """One directory.

    Attributes:
        kind: its tag NewSubfileType, bits for a reduced copy, a page and a mask; 0 where there is none.
        next_at: where in the file it names the next one.
        width: bytes of that name, 4 or 8.
    """

    kind: int
    next_at: int
    width: int


def directories(file: BinaryIO) -> Iterator[Directory]:
    """The directories of a TIFF, in order.

    Raises:
        UserError: they lead in a circle.
        ValueError: the file is no TIFF or ends too early, or directories lie in each other.
    """
    size = file.seek(0, io.SEEK_END)
    file.seek(0)
    head = file.read(16)
    order = {b"II": "<", b"MM": ">"}.get(head[:2])
    if order is None or len(head) < 14:  # a header, and a directory without tags
        raise ValueError("no TIFF")
    big = struct.unpack(order + "H", head[2:4]) == (43,)
    count, entry, width, word = ("Q", "HHQ8s", 8, "Q") if big else ("H", "HHI4s", 4, "I")
    entries, length = struct.Struct(order + entry), struct.calcsize(order + count)
    (offset,) = struct.unpack(order + word, head[8:16] if big else head[4:8])
    seen: set[int] = set()
    left = size
    while offset:
        if offset >= size:  # of 64 bits: no file takes the largest as a place
            raise ValueError("a directory behind the end")
        if offset in seen:
            raise UserError("a TIFF whose directories lead in a circle; accepted: each directory once")
        seen.add(offset)
        file.seek(offset)
        (tags,) = struct.unpack(order + count, _exactly(file, length))
        left -= length + tags * entries.size + width
        if left < 0:  # together they take more than the file: they lie in each other, or end behind it
            raise ValueError("directories overlap or are cut off")
        block = _exactly(file, tags * entries.size + width)
        kind = 0
        for tag, datatype, number, value in entries.iter_unpack(block[:-width]):
            code = order + _NUMBERS.get(datatype, "")
            length_of_one = struct.calcsize(code)
            if tag in (_KIND, _OLD_KIND) and number == 1 and 0 < length_of_one <= len(value):
                (found,) = struct.unpack(code, value[:length_of_one])
                # The old tag counts: 2 is a reduced copy, 3 a page.
                kind = kind or (found if tag == _KIND else {2: 1, 3: 2}.get(found, 0))
        yield Directory(kind, file.tell() - width, width)
        (offset,) = struct.unpack(order + word, block[-width:])


def _exactly(file: BinaryIO, size: int) -> bytes:
    data = file.read(size)
    if len(data) < size:
        raise ValueError("the file ends in a directory")
    return data
