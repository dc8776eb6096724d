"""Files with chunks, segments and tags of the caller's choice, for tests of what an image carries beside its pixels."""

from __future__ import annotations

import io
import struct
import zlib
from typing import Any

import numpy as np
from PIL import Image

from fastden.images.codec import ImageFile, decode_image, encode_image
from fastden.images.containers import png_chunks
from fastden.images.pixels import Array

MAKE, ARTIST, EXIF, GPS, MAKER_NOTE, ORIENTATION = 271, 315, 0x8769, 0x8825, 0x927C, 274
RDF = 'xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#"'


def pixels(height: int = 24, width: int = 20, dtype: Any = np.uint8) -> Array:
    top = np.iinfo(dtype).max
    return np.random.default_rng(0).integers(0, top, (height, width, 3)).astype(dtype)


def exif(orientation: int = 1) -> Image.Exif:
    block = Image.Exif()
    block[MAKE], block[ARTIST], block[ORIENTATION] = "Maker", "Jane Doe", orientation
    block.get_ifd(EXIF)[34855] = 640
    block.get_ifd(EXIF)[MAKER_NOTE] = b"MAKER\0NOTE" + bytes(range(60))
    block.get_ifd(GPS)[1] = "N"
    return block


def packet(body: str, spaces: str = "") -> bytes:
    inside = (
        f'<rdf:Description rdf:about="" xmlns:dc="http://purl.org/dc/elements/1.1/" {spaces}>{body}</rdf:Description>'
    )
    return f'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF {RDF}>{inside}</rdf:RDF></x:xmpmeta>'.encode()


def png_with(*chunks: tuple[bytes, bytes], dtype: Any = np.uint8) -> bytes:
    data, _ = encode_image(ImageFile(pixels(dtype=dtype)), "png")
    at = data.index(b"IDAT") - 4
    raw = b"".join(struct.pack(">I", len(d)) + n + d + struct.pack(">I", zlib.crc32(n + d)) for n, d in chunks)
    return data[:at] + raw + data[at:]


def chunks_of(data: bytes) -> dict[bytes, bytes]:
    return dict(png_chunks(io.BytesIO(data)))


def jpeg_with(*segments: tuple[int, bytes], behind: bytes = b"", **options: Any) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels()).save(file, "JPEG", quality=95, **options)
    data = file.getvalue()
    raw = b"".join(struct.pack(">BBH", 0xFF, marker, len(payload) + 2) + payload for marker, payload in segments)
    return data[:2] + raw + data[2:] + behind


def again(data: bytes, format_name: str, **options: Any) -> tuple[bytes, list[str]]:
    image = decode_image(data)
    written, notes = encode_image(image, format_name, **options)
    return written, [*image.notes, *notes]


def tiff_with_tags(**options: Any) -> bytes:
    block = exif()
    file = io.BytesIO()
    Image.fromarray(pixels()).save(file, "TIFF", exif=block.tobytes(), **options)
    return file.getvalue()
