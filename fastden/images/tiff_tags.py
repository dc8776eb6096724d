"""TIFF tags, and EXIF, which consists of them: reading, selecting, and adding them to a written file."""

from __future__ import annotations

import io
import math
import struct
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from typing import Any, BinaryIO

from fastden.errors import UserError
from fastden.images.tiff_chain import directories

#: Tags of an EXIF block, by the numbers that the TIFF and EXIF standards give them.
ORIENTATION, EXIF_IFD, GPS_IFD, MAKER_NOTE = 274, 34665, 34853, 37500
XMP, IPTC, PHOTOSHOP, ICC, EXTRA_SAMPLES, DESCRIPTION, RESOLUTION = 700, 33723, 34377, 34675, 338, 270, (282, 283, 296)
_SUB_IFDS, _LAYERS = 330, 37724
#: ImageJ's own metadata: bytes of its items, and the items.
IMAGEJ_COUNTS, IMAGEJ = 50838, 50839
#: Bytes of the numbers in ImageJ's items: text in UTF-16, and floating values. The others are bytes.
_IMAGEJ_WIDTHS = {b"info": 2, b"labl": 2, b"prop": 2, b"rang": 8}
#: Parts that a file may hold beside its picture, by their tags.
PARTS = {_SUB_IFDS: "the smaller copies of the picture (SubIFD)", _LAYERS: "Photoshop's layers"}
#: Tags on the storage of pixels: the written file has its own.
_STORAGE = {
    *(254, 255, 256, 257, 258, 259, 262, 263, 264, 265, 266, 273, 277, 278, 279, 284, 288, 289, 290, 291, 292, 293),
    *(297, 317, 320, 321, 322, 323, 324, 325, 326, 327, 328, 332, 333, 334, 336, 337, 338, 339, 340, 341, 342, 343),
    *(344, 347, 512, 513, 514, 515, 517, 518, 519, 520, 521, 529, 530, 531, 532, 32997, 32998, 34677, 34925, 50674),
}
#: Tags of the first directory that an EXIF block holds too.
_OF_EXIF = {
    *(269, 270, 271, 272, 274, 282, 283, 296, 301, 305, 306, 315, 316, 318, 319, 18246, 18249, 33432),
    *(EXIF_IFD, GPS_IFD, 40091, 40092, 40093, 40094, 40095),
}
# Larger directories are damaged, or hold layers of the old picture.
_LIMIT, _READS = 1 << 26, 200_000
# Of a small file: 40 ms.
_LEAST = 1000

#: EXIF's 72 dots an inch for a resolution that is not known, in pixels per millimetre.
UNKNOWN = (72 / 25.4, 72 / 25.4)

Tags = Mapping[int, Any]


class _FirstOnly(io.RawIOBase):
    """A TIFF that seems to end with its first directory, with a limit on what is read: directories below may repeat.

    tifftools reads each entry and each value once: a directory that refers to itself, or ten times to the next one,
    would be read until the limit. Sound directories lie beside each other, so that a file's size limits both.
    """

    def __init__(self, file: BinaryIO) -> None:
        size = file.seek(0, io.SEEK_END)
        self._file, self._left, self._reads = file, min(_LIMIT, 2 * size + _LEAST), min(_LEAST + size // 6, _READS)
        self._first = next(directories(file))

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def writable(self) -> bool:
        return False

    def seek(self, offset: int, whence: int = 0) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()

    def read(self, size: int = -1) -> bytes:
        self._left, self._reads = self._left - max(size, 0), self._reads - 1
        if self._left < 0 or self._reads < 0 or size < 0:
            raise ValueError("more than a directory takes")
        # The name of the next directory. A longer value that lies there, because its writer left out the name, is read.
        if size == self._first.width and self._file.tell() == self._first.next_at:
            return bytes(size)
        return self._file.read(size)


def _tifftools() -> Any:
    import tifftools

    return tifftools


def first_directory(file: BinaryIO) -> dict[int, Any] | None:
    """Tags of a TIFF's first directory in tifftools' form, or None where they cannot be read."""
    module = _tifftools()
    try:
        info = module.read_tiff(_FirstOnly(file))
        tags: dict[int, Any] = info["ifds"][0]["tags"]
    except (
        module.TifftoolsError,
        UserError,
        StopIteration,
        ValueError,
        KeyError,
        IndexError,
        TypeError,
        struct.error,
        OSError,
        RecursionError,
    ):
        return None
    return _whole(tags)


def _whole(tags: Tags) -> dict[int, Any]:
    """The tags whose content could be read, in directories below them too."""
    whole = {}
    for tag, value in tags.items():
        if "ifds" in value:
            chains = [
                [{**directory, "tags": _whole(directory["tags"])} for directory in chain] for chain in value["ifds"]
            ]
            if chains and all(chains):
                whole[tag] = {**value, "ifds": chains}
        elif "data" in value:
            whole[tag] = value
    return whole


def exif_directory(block: bytes) -> dict[int, Any] | None:
    """Tags of the first directory of an EXIF block, which begins with a TIFF header."""
    return first_directory(io.BytesIO(block))


def has_thumbnail(block: bytes) -> bool:
    """Whether an EXIF block that can be read holds a second directory: a thumbnail's."""
    try:
        return any(index for index, _ in enumerate(directories(io.BytesIO(block))))
    except (UserError, ValueError):  # such as a name that other programs left there when they took the thumbnail out
        return False


def descriptive(tags: Tags) -> dict[int, Any]:
    """The tags that do not describe the storage of pixels."""
    return {tag: value for tag, value in tags.items() if tag not in _STORAGE and tag not in (_SUB_IFDS, _LAYERS)}


def names(tags: Iterable[int]) -> list[str]:
    """The standard's names of tags."""
    known = _tifftools().constants.Tag
    return [str(known[tag].name) if tag in known else str(tag) for tag in sorted(tags)]


def exif_block(tags: Tags) -> tuple[bytes, list[int]]:
    """An EXIF block of a TIFF's tags, empty where there are none, and the tags that it does not hold."""
    kept = {tag: value for tag, value in tags.items() if tag in _OF_EXIF}
    left = [tag for tag in tags if tag not in _OF_EXIF and tag not in (XMP, IPTC, PHOTOSHOP, ICC)]
    if not kept:
        return b"", left
    block = io.BytesIO()
    _write([{"tags": kept}], block)
    return block.getvalue(), left


def has_maker_note(tags: Tags) -> bool:
    """Whether a camera's own notes are among them, whose offsets may count from the beginning of their file."""
    return any(
        MAKER_NOTE in directory["tags"] for chain in tags.get(EXIF_IFD, {}).get("ifds", []) for directory in chain
    )


def with_tags(source: BinaryIO, target: BinaryIO, tags: Tags) -> None:
    """Copy a TIFF with tags added to its first directory; those that it has are replaced."""
    info = _tifftools().read_tiff(source)
    first, *others = info["ifds"]
    first["tags"].update(tags)
    if ORIENTATION in tags:
        for page in others:  # they are shown alike, and libvips reads pages only that agree
            page["tags"][ORIENTATION] = tags[ORIENTATION]
    _write(info, target)


def _write(info: Any, target: BinaryIO) -> None:
    module = _tifftools()
    target.seek(0)
    if isinstance(info, list):
        module.write_tiff(info, target, bigEndian=False, bigtiff=False)
    else:
        module.write_tiff(info, target)
    # EXIF asks for pointers of type LONG, where tifftools writes IFD, which some readers do not know.
    written = module.read_tiff(target)
    wide = written["bigtiff"]
    for tag in (EXIF_IFD, GPS_IFD):
        if tag in written["ifds"][0]["tags"]:
            target.seek(written["ifds"][0]["tags"][tag]["datapos"] - (10 if wide else 6))
            target.write(struct.pack(written["endianPack"] + "H", 16 if wide else 4))


def with_orientation(block: bytes, orientation: int) -> bytes:
    """An EXIF block with this orientation, the same byte for byte otherwise."""
    tags = exif_directory(block)
    if tags is None or ORIENTATION not in tags or tags[ORIENTATION]["datatype"] != 3:
        return block
    if tags[ORIENTATION]["data"] == [orientation]:
        return block
    position = tags[ORIENTATION]["datapos"]
    packed = struct.pack(">H" if block[:2] == b"MM" else "<H", orientation)
    return block[:position] + packed + block[position + 2 :]


def orientation(block: bytes) -> int:
    """The orientation that an EXIF block states, 1 to 8; 1 where it states none."""
    found = _value(exif_directory(block) or {}, ORIENTATION, 1)
    return int(found) if found in range(1, 9) else 1


def imagej_in_little_endian(data: bytes, counts: Sequence[int]) -> bytes | None:
    """ImageJ's own metadata of a big-endian TIFF, whose content is in the file's order of bytes; None if damaged.

    A header names kinds of items and their numbers; ``counts`` are the bytes of the header and of each item.
    """
    header, sizes, at = data[: counts[0]], iter(counts[1:]), counts[0]
    if header[:4] != b"IJIJ" or sum(counts) != len(data):
        return None
    parts = [_swapped(header, 4)]
    for place in range(4, len(header) - 7, 8):
        width = _IMAGEJ_WIDTHS.get(header[place : place + 4], 1)
        for size in islice(sizes, int.from_bytes(header[place + 4 : place + 8], "big")):
            parts.append(_swapped(data[at : at + size], width))
            at += size
    return b"".join(parts) if at == len(data) else None


def _swapped(data: bytes, width: int) -> bytes:
    """``data`` with the bytes of each of its numbers in the other order."""
    return b"".join(data[place : place + width][::-1] for place in range(0, len(data), width))


def short(value: int) -> dict[str, Any]:
    """A tag of one 16-bit number."""
    return {"datatype": 3, "data": [value]}


def raw(data: bytes, datatype: int = 1) -> dict[str, Any]:
    """A tag of bytes (datatype 1), or of undefined content (7)."""
    return {"datatype": datatype, "data": list(data) if datatype == 1 else data}


def resolution(tags: Tags) -> tuple[float, float] | None:
    """Horizontal and vertical pixels per millimetre that the tags state; None where they state none."""
    unit = _value(tags, 296, 2)  # inches where there is no such tag
    across, down = _value(tags, 282), _value(tags, 283)
    millimetres = 25.4 if unit == 2 else 10.0 if unit == 3 else None
    if millimetres is None or not (0 < across < math.inf and 0 < down < math.inf):
        return None
    return across / millimetres, down / millimetres


def _value(tags: Tags, tag: int, default: float = 0.0) -> float:
    """The first number of a tag, a fraction's value; ``default`` where there is none."""
    found = tags.get(tag, {})
    data = found.get("data")
    if not isinstance(data, list) or not data or not isinstance(data[0], int | float):
        return default
    if found.get("datatype") in (5, 10):
        return data[0] / data[1] if len(data) > 1 and data[1] else default
    return float(data[0])


def unknown_resolution() -> dict[int, Any]:
    """The tags of a picture whose resolution is not known: TIFF asks for numbers, without a unit."""
    return {282: {"datatype": 5, "data": [1, 1]}, 283: {"datatype": 5, "data": [1, 1]}, 296: short(1)}


def _fraction(value: float) -> list[int]:
    """A number as EXIF holds it: two whole numbers of 32 bits. An electron microscope has 25 million pixels an inch."""
    for denominator in (1000, 1, 1_000_000):
        numerator = round(value * denominator)
        if 0 < numerator < 2**32:
            return [numerator, denominator]
    return [round(25.4 * UNKNOWN[0]), 1]


def resolution_block(density: tuple[float, float] | None, orientation: int) -> bytes:
    """An EXIF block that holds pixels per millimetre and an orientation alone."""
    # EXIF asks for a resolution, and for 72 dots an inch where it is not known.
    pairs = [_fraction(25.4 * value) for value in density or UNKNOWN]
    tags = {282: {"datatype": 5, "data": pairs[0]}, 283: {"datatype": 5, "data": pairs[1]}, 296: short(2)}
    block, _ = exif_block({ORIENTATION: short(orientation), **tags})
    return block
