"""The parts of JPEG, PNG and WebP files: read without the pixels, and put into a file that is written.

No well-kept library copies these parts between files without encoding the pixels again; the formats are a few lines.
"""

from __future__ import annotations

import os
import shutil
import struct
import zlib
from collections.abc import Iterable, Iterator
from typing import BinaryIO

from fastden.errors import UserError

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
#: Markers of a JPEG's segments that carry metadata: APP0 to APP15, and the comment.
_APP, COMMENT = range(0xE0, 0xF0), 0xFE
APP0, APP1, APP2, APP11, APP13, APP14 = (_APP[number] for number in (0, 1, 2, 11, 13, 14))
#: What an APP1 segment with EXIF begins with.
EXIF = b"Exif\0\0"
_START_OF_SCAN, _END = 0xDA, b"\xff\xd9"
#: Bytes that a segment holds.
SEGMENT = 65533
# A profile of 16 MB takes 255. Two million empty ones take 8 to 17 s.
_MOST_SEGMENTS = 10_000
_STANDALONE = (0x01, *range(0xD0, 0xD9))


def jpeg_segments(file: BinaryIO) -> list[tuple[int, bytes]]:
    """APP segments and comments before the first scan, each with its marker; the file is then behind its header.

    Where the file ends, or stops being a JPEG, the segments until there are returned.

    Raises:
        UserError: there are more segments than a sound file has.
    """
    found: list[tuple[int, bytes]] = []
    file.seek(2)
    for _ in range(_MOST_SEGMENTS):
        byte = file.read(1)
        if byte == b"\xff":
            byte = _behind_fill(file)
        if not byte:
            return found
        marker = byte[0]
        if marker in _STANDALONE:
            continue
        length = file.read(2)
        if len(length) < 2 or marker == _END[1]:
            return found
        size = int.from_bytes(length, "big") - 2
        if marker not in _APP and marker != COMMENT:
            file.seek(max(size, 0), os.SEEK_CUR)
            if marker == _START_OF_SCAN:
                return found
            continue
        payload = file.read(max(size, 0))
        if len(payload) == size:
            found.append((marker, payload))
    raise UserError(
        f"a JPEG with more than {_MOST_SEGMENTS} segments in front of its picture; accepted: at most as many"
    )


def _behind_fill(file: BinaryIO) -> bytes:
    """The first byte that is not 0xFF, behind which the file then is; empty at its end."""
    byte = file.read(1)
    while byte == b"\xff":  # any number of them may stand in front of a marker; by ones 50 MB take 16 s
        block = file.read(1 << 16)
        rest = block.lstrip(b"\xff")
        if rest or not block:
            file.seek(-max(len(rest) - 1, 0), os.SEEK_CUR)
            byte = rest[:1]
    return byte


def behind_jpeg(file: BinaryIO) -> tuple[int, bytes] | None:
    """How many bytes follow the picture, and the first of them; the file is behind :func:`jpeg_segments`.

    In coded pixels every 0xFF is followed by 0 or a restart marker, so that the first end marker is the picture's.

    Returns:
        None where there is no end marker.
    """
    last = b""
    while block := file.read(1 << 20):
        at = (last + block).find(_END)
        if at >= 0:
            start = file.tell() - len(last + block) + at + 2
            size = file.seek(0, os.SEEK_END) - start
            file.seek(start)
            return size, file.read(4096)
        last = block[-1:]
    return None


def with_jpeg_segments(source: BinaryIO, target: BinaryIO, segments: Iterable[tuple[int, bytes]]) -> None:
    """Copy a JPEG with segments in front of its own."""
    target.write(source.read(2))
    for marker, payload in segments:
        target.write(struct.pack(">BBH", 0xFF, marker, len(payload) + 2) + payload)
    shutil.copyfileobj(source, target, 1 << 20)


def png_chunks(file: BinaryIO) -> Iterator[tuple[bytes, bytes]]:
    """Names and contents of a PNG's chunks; the pixels' are empty. At the end the file is behind them."""
    file.seek(len(PNG_SIGNATURE))
    while len(head := file.read(8)) == 8:
        size, name = struct.unpack(">I4s", head)
        data = b""
        if name in (b"IDAT", b"fdAT"):
            file.seek(size, os.SEEK_CUR)
        else:
            data = file.read(size)
        if len(file.read(4)) < 4:
            return
        yield name, data
        if name == b"IEND":
            return


def with_png_chunks(
    source: BinaryIO, target: BinaryIO, chunks: Iterable[tuple[bytes, bytes]], without: Iterable[bytes] = ()
) -> None:
    """Copy a PNG with chunks in front of its palette and pixels, and without some of its own."""
    # Small ones before the pixels: behind them few readers look.
    target.write(source.read(8))
    wanted: list[tuple[bytes, bytes]] | None = list(chunks)
    leave = tuple(without)
    while len(head := source.read(8)) == 8:
        size, name = struct.unpack(">I4s", head)
        if wanted is not None and name in (b"PLTE", b"IDAT"):
            for kind, data in wanted:
                target.write(struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)))
            wanted = None
        body = source.read(size + 4)
        if name not in leave:
            target.write(head + body)


def riff_chunks(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """Names of a WebP's chunks, where their contents begin, and how long they are."""
    position = 12
    while position + 8 <= len(data):
        name, size = struct.unpack("<4sI", data[position : position + 8])
        yield name, position + 8, size
        position += 8 + size + size % 2


def with_riff_chunk(data: bytes, name: bytes, content: bytes) -> bytes:
    """A WebP whose chunk of that name, which is there, has another content."""
    for chunk_name, start, size in riff_chunks(data):
        if chunk_name == name:
            chunk = struct.pack("<4sI", name, len(content)) + content + b"\0" * (len(content) % 2)
            data = data[: start - 8] + chunk + data[start + size + size % 2 :]
            return data[:4] + struct.pack("<I", len(data) - 8) + data[8:]
    return data


def boxes(file: BinaryIO) -> Iterator[tuple[bytes, int]]:
    """Names of the outer boxes of an AVIF or HEIF file, and their sizes; the file is at each one's content."""
    end = file.seek(0, os.SEEK_END)
    position = 0
    while position + 8 <= end:
        file.seek(position)
        size, name = struct.unpack(">I4s", file.read(8))
        header = 8
        if size == 1:
            size, header = int.from_bytes(file.read(8), "big"), 16
        size = end - position if size == 0 else size
        if size < header:
            return
        yield name, size - header
        position += size
