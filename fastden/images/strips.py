"""Image files read and written from top to bottom, a strip of rows at a time, in memory that does not grow."""

from __future__ import annotations

import os
import queue
import struct
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from fastden.errors import UserError
from fastden.images.attachments import for_libvips, has_exif, plan_attachment, png_kind
from fastden.images.codec import MAX_PIXELS, header_of, open_image
from fastden.images.encoding import described, for_shift, plan_saving, stored_bits
from fastden.images.extras import Extras, read_extras
from fastden.images.formats import Opened, open_file
from fastden.images.image_file import Header
from fastden.images.kinds import check_supported
from fastden.images.libvips import detail, load_vips, vips_errors
from fastden.images.pixels import Array, check_finite
from fastden.images.ranges import RangeFinder, ValueRange
from fastden.images.samples import sample_windows
from fastden.images.tiff_directories import fail_on
from fastden.whole_files import check_readable, reason

#: Rows that libvips decodes at a time.
CHUNK = 64
#: Side of the tiles of a TIFF that is written strip by strip.
TIFF_TILE = 256
#: Rows of a strip of the uncompressed TIFF through which rows travel to libvips.
_ROWS = 16


class StripReader:
    """An image file whose rows are read once, in order.

    Values and errors are those of :func:`fastden.images.codec.read_image`.

    Args:
        path: of the file.
        max_pixels: as in :func:`fastden.images.codec.read_image`.
        several: take TIFFs of several pages, of which the first is read.

    Attributes:
        header: what the file says before its pixels are decoded.
    """

    header: Header

    def __init__(self, path: str | Path, *, max_pixels: int = MAX_PIXELS, several: bool = False) -> None:
        self.path = path
        self._whole: Array | None = None
        self._opened: Opened | None = None
        self._region: Any = None
        try:
            check_readable(path)
            with open(path, "rb") as file:
                if not file.seekable():
                    raise UserError("is a pipe, which can be read once only; accepted: a file")
                self._opened = open_file(file)
                if self._opened is not None:
                    self.header = header_of(self._opened, max_pixels)
                    self._dtype = self.header.dtype
                else:
                    self._open_in_libvips(file, max_pixels, several)
        except OSError as error:
            raise UserError(f"{path}: cannot be read: {reason(error)}") from error
        except UserError as error:
            raise UserError(f"{path}: {error}") from error
        self.position = 0

    def _open_in_libvips(self, file: BinaryIO, max_pixels: int, several: bool) -> None:
        vips = load_vips()
        file.seek(0)
        head = file.read(12)
        # Their decoders hold the whole image in any case. libvips would map the file, and a file that shrinks while it
        # is mapped ends the process.
        whole = head[8:] == b"WEBP" or head[4:8] == b"ftyp"
        if not head:
            raise UserError("the file is empty")
        data = head + file.read() if whole else b""
        with vips_errors(file):
            check_supported(file)
            options = {"access": "sequential", "fail_on": fail_on(file)}
            if whole:
                image = vips.Image.new_from_buffer(data, "", **options)
            else:
                # libvips gets a source: in a file's name it would read text in brackets at the end as options.
                image = vips.Image.new_from_source(vips.Source.new_from_file(os.fsencode(self.path)), "", **options)
            image, self.header = open_image(image, file, max_pixels, several)
        self._region = vips.Region.new(image)
        self._dtype = {"double": np.dtype(np.float64)}.get(image.format, self.header.dtype)

    def extras(self) -> tuple[Extras, dict[str, Any]]:
        """What the file holds beside its pixels, and the header's metadata mended by it.

        Raises:
            UserError: the file cannot be read.
        """
        try:
            with open(self.path, "rb") as file:
                return read_extras(file, self.header.format, self.header.metadata, has_alpha=self.header.has_alpha)
        except OSError as error:
            raise UserError(f"{self.path}: cannot be read: {reason(error)}") from error

    def read_into(self, rows: Array) -> None:
        """Fill ``rows`` (n, W, bands, of the header's dtype) with the next rows of the file.

        Raises:
            UserError: the file is damaged, or holds NaN or infinity.
        """
        for start in range(0, len(rows), CHUNK):
            part = rows[start : start + CHUNK]
            try:
                if self._opened is not None:
                    self._whole = self._opened.decode() if self._whole is None else self._whole
                    part[:] = self._whole[self.position : self.position + len(part)]
                else:
                    with vips_errors():
                        data = self._region.fetch(0, self.position, self.header.width, len(part))
                    part[:] = np.frombuffer(data, self._dtype).reshape(part.shape)
                if part.dtype.kind == "f":
                    check_finite(part, UserError)
            except UserError as error:
                raise UserError(f"{self.path}: {error}") from error
            self.position += len(part)

    def read(self, count: int) -> Array:
        """The next rows: (count, W, bands)."""
        rows = np.empty((count, self.header.width, self.header.bands), self.header.dtype)
        self.read_into(rows)
        return rows


def read_header(path: str | Path, *, max_pixels: int = MAX_PIXELS, several: bool = False) -> Header:
    """What an image file says before its pixels are decoded; errors as of :func:`fastden.images.codec.read_image`."""
    return StripReader(path, max_pixels=max_pixels, several=several).header


def read_samples(
    path: str | Path, *, max_pixels: int = MAX_PIXELS, several: bool = False, for_noise: bool = True
) -> tuple[list[Array], ValueRange]:
    """The parts of an image file that are needed before it is denoised by strips, read in little memory.

    Args:
        path: of the file.
        max_pixels: as in :func:`fastden.images.codec.read_image`.
        several: take TIFFs of several pages, of which the first is judged.
        for_noise: read the crops too.

    Returns:
        The crops (H, W, C) by which its noise is judged, without alpha, and the range of its values.

    Raises:
        UserError: as of :func:`fastden.images.codec.read_image`.
    """
    reader = StripReader(path, max_pixels=max_pixels, several=several)
    header = reader.header
    finder = RangeFinder((header.height, header.width, header.channels), header.dtype, header.stated)
    windows = sample_windows(header.height, header.width) if for_noise else []
    crops = [
        np.empty((rows.stop - rows.start, columns.stop - columns.start, header.channels), header.dtype)
        for rows, columns in windows
    ]
    last = max((rows.stop for rows, _ in windows), default=0)
    while reader.position < (last if finder.settled else header.height):
        top = reader.position
        chunk = reader.read(min(CHUNK, header.height - top))[:, :, : header.channels]
        finder.add(chunk)
        for crop, (rows, columns) in zip(crops, windows, strict=True):
            first, stop = max(rows.start, top), min(rows.stop, reader.position)
            if first < stop:
                crop[first - rows.start : stop - rows.start] = chunk[first - top : stop - top, columns]
    try:
        return crops, finder.result()
    except ValueError as error:
        raise UserError(f"{path}: floating image: {error}") from error


class StripWriter:
    """An image file that is encoded while its rows arrive; libvips runs in a thread of its own.

    Rows reach libvips as a TIFF without compression that exists only as a stream: the one format that it reads from a
    stream in order at every depth, with alpha.

    Args:
        path: of the file, whatever its suffix.
        shape: (H, W, bands).
        dtype: of the rows.
        format_name: to write in. WebP and AVIF encoders hold the whole image.
        bits, lossless, metadata: as in :class:`fastden.images.image_file.Header`.
        strip_metadata: leave out metadata, as in :func:`fastden.images.codec.write_image`.
        extras: of the source.

    Attributes:
        note: what the file does not hold of the source; empty for nothing.
    """

    def __init__(
        self,
        path: Path,
        shape: tuple[int, int, int],
        dtype: np.dtype[Any],
        format_name: str,
        *,
        bits: int,
        lossless: bool,
        metadata: Mapping[str, Any],
        strip_metadata: bool,
        extras: Extras | None = None,
    ) -> None:
        self._path, self._format_name, self._dtype = path, format_name, dtype
        height, width, bands = shape
        extras = extras or Extras()
        kind = png_kind(bands, dtype.itemsize)
        self._attachment = plan_attachment(extras, metadata, format_name, kind=kind, strip_metadata=strip_metadata)
        self.note = self._attachment.note
        self._metadata, self._strip_metadata = for_libvips(metadata, self._attachment, extras), strip_metadata
        self._saver, self._options = plan_saving(
            format_name,
            dtype,
            height * width * bands * dtype.itemsize,
            bits,
            lossless,
            exif=has_exif(self._metadata, self._attachment),
            strip_metadata=strip_metadata,
        )
        self._bits = stored_bits(format_name, dtype, bits)
        if format_name == "tiff":
            self._options |= {"tile": True, "tile_width": TIFF_TILE, "tile_height": TIFF_TILE}
        if format_name == "jpeg":
            # Its second pass would hold the whole image's coefficients in memory.
            self._options["optimize_coding"] = False
        self._stream = _Stream(_tiff_header(height, width, bands, dtype), height * width * bands * dtype.itemsize)
        self._error: Exception | None = None
        self._output = _Output(path)
        self._thread = threading.Thread(target=self._save, name="fastden-strip-writer", daemon=True)
        self._thread.start()

    def _save(self) -> None:
        vips = load_vips()
        try:
            source = vips.SourceCustom()
            source.on_read(self._stream.read)
            source.on_seek(self._stream.seek)
            target = vips.TargetCustom()
            target.on_write(self._output.write)
            target.on_read(self._output.read)
            target.on_seek(self._output.seek)
            image = vips.Image.new_from_source(source, "", access="sequential", fail_on="error")
            image = described(image, self._metadata, strip_metadata=self._strip_metadata)
            with self._output:
                getattr(image, f"{self._saver}_target")(target, **self._options)
        except vips.Error as error:
            self._error = UserError(f"cannot be written as {self._format_name} ({detail(error)})")
        except Exception as error:  # shown in the thread that waits for this one
            self._error = error
        finally:
            # Of what the system said, such as that the disk is full, libvips' encoders tell little or nothing.
            self._error = self._output.error or self._error
            self._stream.closed = True

    def write(self, rows: Array) -> None:
        """Hand over the next rows, (n, W, bands) of the writer's dtype; waits while the encoder is behind.

        Raises:
            UserError: the file cannot be encoded.
            OSError: the system refuses to write it.
        """
        if not self._stream.put(for_shift(np.ascontiguousarray(rows, self._dtype), self._bits)):
            self._thread.join()
            raise self._error or UserError(f"cannot be written as {self._format_name}")

    def close(self) -> None:
        """Wait until the file is complete; errors as of :meth:`write`."""
        self._thread.join()
        if self._error is not None:
            raise self._error
        if not self._attachment.empty:
            # A name that :func:`remove_leftovers` would remove after a kill.
            attached = self._path.with_name(f"{self._path.name}.attached")
            try:
                with self._path.open("rb") as source, attached.open("x+b") as target:
                    self._attachment.put(source, target)
                os.replace(attached, self._path)
            finally:
                attached.unlink(missing_ok=True)

    def abort(self) -> None:
        """Give up; the file stays incomplete."""
        self._stream.closed = True
        self._thread.join()


class _Output:
    """A file that libvips writes; a context in which it is open.

    Attributes:
        error: what the system refused.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: Any = None
        self.error: OSError | None = None

    def __enter__(self) -> None:
        self._file = self._path.open("w+b", buffering=0)

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def write(self, data: Any) -> int:
        """How many bytes the system took; -1 where it refuses."""
        try:
            return int(self._file.write(data))
        except OSError as error:
            self.error = error
            return -1

    def read(self, size: int) -> bytes | None:
        return self._file.read(size) or None

    def seek(self, offset: int, whence: int) -> int:
        return int(self._file.seek(offset, whence))


class _Stream:
    """A file that libvips reads while it is made: a header, then rows, of which only the present block exists."""

    def __init__(self, header: bytes, size: int) -> None:
        self._header = header
        self._length = len(header) + size
        self._position = 0
        self._block = memoryview(b"")
        self._start = len(header)
        self._blocks: queue.Queue[Array] = queue.Queue(maxsize=1)
        self.closed = False

    def put(self, rows: Array) -> bool:
        """Hand rows over; False if libvips has stopped reading."""
        while not self.closed:
            try:
                self._blocks.put(rows, timeout=0.1)
            except queue.Full:
                continue
            return True
        return False

    def seek(self, offset: int, whence: int) -> int:
        self._position = offset + (0, self._position, self._length)[whence]
        return self._position

    def read(self, size: int) -> bytes | None:
        """Up to ``size`` bytes; None at the end, where rows are gone, and after an abort.

        It loops, because libtiff takes fewer bytes than it asked for as an error.
        """
        parts = []
        wanted = min(size, self._length - self._position)
        while wanted > 0:
            part = self._available()[:wanted]
            if not part:
                return None
            parts.append(bytes(part))
            self._position += len(part)
            wanted -= len(part)
        return b"".join(parts) or None

    def _available(self) -> bytes | memoryview:
        if self._position < len(self._header):
            return self._header[self._position :]
        while self._position >= self._start + len(self._block):
            if self.closed:
                return b""
            try:
                rows = self._blocks.get(timeout=0.1)
            except queue.Empty:
                continue
            self._start += len(self._block)
            self._block = rows.reshape(-1).view(np.uint8).data
        return self._block[self._position - self._start :] if self._position >= self._start else b""


def _tiff_header(height: int, width: int, bands: int, dtype: np.dtype[Any]) -> bytes:
    """Everything but the pixels of an uncompressed BigTIFF, little-endian, whose strips follow in order."""
    row = width * bands * dtype.itemsize
    counts = [min(_ROWS, height - top) * row for top in range(0, height, _ROWS)]
    short, long, long8 = (3, "H"), (4, "I"), (16, "Q")
    tags: list[tuple[int, tuple[int, str], list[int]]] = [
        (256, long, [width]),
        (257, long, [height]),
        (258, short, [8 * dtype.itemsize] * bands),
        (259, short, [1]),  # no compression
        (262, short, [2 if bands > 2 else 1]),  # RGB, or gray with 0 for black
        (273, long8, counts),  # offsets of the strips: filled in below, when the header's length is known
        (277, short, [bands]),
        (278, long, [_ROWS]),
        (279, long8, counts),
        (284, short, [1]),  # channels side by side
        *([(338, short, [2])] if bands in (2, 4) else []),  # alpha, not multiplied in
        (339, short, [3 if dtype.kind == "f" else 1] * bands),
    ]
    behind = 16 + 8 + 20 * len(tags) + 8
    size = behind + sum(len(_packed(kind, values)) for _, kind, values in tags if len(_packed(kind, values)) > 8)
    offsets = [size + _ROWS * row * index for index in range(len(counts))]
    directory, extra = struct.pack("<2sHHHQQ", b"II", 43, 8, 0, 16, len(tags)), b""
    for tag, kind, values in tags:
        data = _packed(kind, offsets if tag == 273 else values)
        field = data.ljust(8, b"\0") if len(data) <= 8 else struct.pack("<Q", behind + len(extra))
        extra += data if len(data) > 8 else b""
        directory += struct.pack("<HHQ", tag, kind[0], len(values)) + field
    return directory + struct.pack("<Q", 0) + extra


def _packed(kind: tuple[int, str], values: list[int]) -> bytes:
    return struct.pack(f"<{len(values)}{kind[1]}", *values)
