"""Decoders that hold the whole picture: which these are, and what memory they take."""

from __future__ import annotations

from fastden.images.image_file import Header

#: Bytes that decoding takes at its peak for each byte of the decoded pixels, those pixels included and the file not.
#: Measured with pictures of 20 megapixels, each in a process of its own (maximum of its resident memory). Some decoders
#: hold the file twice, so that a claim has to count it twice.
DECODER = {
    "avif": 7.0,  # 8 bits 6.8 (4:4:4) and 5.3 (4:2:0), 12 bits 4.5
    "jxl": 3.6,  # 2.1; 3.5 where it was made of a JPEG
    "heic": 3.3,  # 8 bits 3.2 (4:4:4) and 2.0 (4:2:0), 10 bits 3.1
    "webp": 3.6,  # 3.6; without loss 3.5 and the file twice
    "raw": 2.8,  # 2.7
}
#: The same for rows that come in several passes: a progressive JPEG 2.3, an interlaced PNG 2.1 (or 2.0 and the file
#: twice).
INTERLACED = 2.4


def decoding_memory(header: Header) -> int:
    """Bytes that decoding takes at its peak beside the file, the pixels included."""
    return int(header.nbytes * DECODER.get(header.format, INTERLACED if header.interlaced else 1.0))
