"""Feed the reader mutated image files: bits flipped, bytes cut, spliced, repeated, and headers edited.

    python tests/soak/fuzz_reader.py                 # 20,000 files; benchmarks/results/batch/fuzz.json
    python tests/soak/fuzz_reader.py --inputs 500    # prints, and writes nothing

Workers are processes of their own: a crash or a hang (10 seconds) of one is counted and its file kept. Each file is
read as a whole and strip by strip; the outcome has to be an image, which is then written, or the user's error, and
never a partial output. Files are numbered: the same number and seed give the same bytes.
"""

from __future__ import annotations

import argparse
import io
import json
import multiprocessing
import random
import struct
import tempfile
import time
from collections import Counter
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from fastden import whole_files

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results" / "batch"
LIMIT = 10.0
#: With this limit a header that claims a large image costs no time.
MAX_PIXELS = 4_000_000
INTERESTING = (0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0x8000, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF)


def corpus() -> dict[str, bytes]:
    """Small valid files of every format, depth and layout that is read."""
    from fastden.images.codec import ImageFile, encode_image

    generator = np.random.default_rng(0)
    files = {}
    for channels in (1, 3):
        for dtype in (np.uint8, np.uint16, np.float32):
            values = generator.random((23, 29, channels))
            pixels = values.astype(np.float32) if dtype == np.float32 else (values * np.iinfo(dtype).max).astype(dtype)
            name = f"{channels}-{np.dtype(dtype).name}"
            files[f"{name}.tif"] = encode_image(ImageFile(pixels), "tiff")[0]
            if dtype != np.float32:
                files[f"{name}.png"] = encode_image(ImageFile(pixels, pixels[:, :, 0].copy()), "png")[0]
            if dtype == np.uint8:
                for suffix, format_name in ((".jpg", "jpeg"), (".webp", "webp"), (".avif", "avif")):
                    files[f"{name}{suffix}"] = encode_image(ImageFile(pixels), format_name)[0]
    picture = Image.fromarray((generator.random((23, 29, 3)) * 255).astype(np.uint8))
    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = 6, "Camera"
    for name, kind, options in (
        ("progressive.jpg", "JPEG", {"progressive": True, "exif": exif}),
        ("palette.png", "PNG", {}),
        ("lossy.webp", "WEBP", {"quality": 80, "exif": exif}),
        ("lzw.tif", "TIFF", {"compression": "tiff_lzw"}),
        ("packbits.tif", "TIFF", {"compression": "packbits"}),
    ):
        buffer = io.BytesIO()
        (picture.quantize(16) if name == "palette.png" else picture).save(buffer, kind, **options)
        files[name] = buffer.getvalue()
    return files


def mutate(data: bytes, others: list[bytes], generator: random.Random) -> bytes:
    """One to four random changes."""
    changed = bytearray(data)
    for _ in range(generator.randint(1, 4)):
        if not changed:
            break
        # Headers decide what a decoder does: half of the changes go there.
        place = generator.randrange(min(len(changed), 128) if generator.random() < 0.5 else len(changed))
        kind = generator.randrange(7)
        if kind == 0:
            changed[place] ^= 1 << generator.randrange(8)
        elif kind == 1:
            changed[place] = generator.randrange(256)
        elif kind == 2:
            value, size = generator.choice(INTERESTING), generator.choice((1, 2, 4))
            order = generator.choice("<>")
            changed[place : place + size] = struct.pack(f"{order}Q", value)[8 - size if order == ">" else 0 :][:size]
        elif kind == 3:
            del changed[place:]
        elif kind == 4:
            del changed[place : place + generator.randint(1, 64)]
        elif kind == 5:
            changed[place:place] = changed[place : place + generator.randint(1, 256)]
        else:
            other = generator.choice(others)
            start = generator.randrange(len(other))
            changed[place : place + generator.randint(1, 256)] = other[start : start + generator.randint(1, 256)]
    return bytes(changed)


def numbered(number: int, seed: int, files: dict[str, bytes]) -> tuple[str, bytes]:
    """The name of a file's origin, and its bytes."""
    generator = random.Random(seed * 1_000_003 + number)
    name = generator.choice(sorted(files))
    return name, mutate(files[name], list(files.values()), generator)


def examine(path: Path, output: Path) -> str:
    """Read a file in both ways and write the image; returns the outcome, or raises on a defect."""
    from fastden.errors import UserError
    from fastden.images.codec import read_image, write_image
    from fastden.images.strips import StripReader

    rows = None
    try:
        reader = StripReader(path, max_pixels=MAX_PIXELS)
        rows = reader.read(reader.header.height)
    except UserError as error:
        check_named(error, path)
    try:
        image = read_image(path, max_pixels=MAX_PIXELS)
    except UserError as error:
        check_named(error, path)
        return "refused"
    if rows is not None:
        assert np.array_equal(rows[:, :, : image.pixels.shape[2]], image.pixels, equal_nan=True), "strips differ"
    try:
        write_image(output / f"out{path.suffix}", image)
        read_image(output / f"out{path.suffix}")
    except UserError:
        assert not list(output.iterdir()), "a refused output is there"
        return "read, not written"
    (output / f"out{path.suffix}").unlink()
    assert not list(output.iterdir()), "something is left behind"
    return "read"


def check_named(error: Exception, path: Path) -> None:
    if not str(error).startswith(str(path)):
        raise AssertionError(f"the error does not name the file: {error}")


def serve(connection: Connection, seed: int) -> None:
    """Examine, in a worker, the files whose numbers come in."""
    files = corpus()
    with tempfile.TemporaryDirectory() as name:
        folder, output = Path(name), Path(name) / "out"
        output.mkdir()
        while (number := connection.recv()) is not None:
            origin, data = numbered(number, seed, files)
            path = folder / f"input{Path(origin).suffix}"
            path.write_bytes(data)
            try:
                result = examine(path, output)
            except BaseException as error:
                result = f"defect: {type(error).__name__}: {error}"
                for left in output.iterdir():
                    left.unlink()
            connection.send((Path(origin).suffix, result))


class Worker:
    """A process that examines files, replaced where it crashes or hangs."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self._start()

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=serve, args=(theirs, self.seed), daemon=True)
        self.process.start()
        theirs.close()
        self.ready = False

    def examine(self, number: int) -> tuple[str, str]:
        """Suffix and outcome."""
        self.connection.send(number)
        limit = LIMIT if self.ready else 120.0  # the first file waits for the imports
        try:
            if self.connection.poll(limit):
                self.ready = True
                return self.connection.recv()
            outcome = "hang"
        except EOFError:
            outcome = "crash"
        self.process.kill()
        self.process.join()
        code = self.process.exitcode
        self._start()
        return "", f"{outcome} (exit code {code})"

    def close(self) -> None:
        self.connection.send(None)
        self.process.join()


def fuzz(inputs: int, seed: int) -> dict[str, Any]:
    """Examine files and count what became of them."""
    began = time.perf_counter()
    counts: Counter[str] = Counter()
    by_suffix: Counter[str] = Counter()
    defects = []
    worker = Worker(seed)
    for number in range(inputs):
        suffix, outcome = worker.examine(number)
        by_suffix[suffix] += 1
        kind = outcome.split(" ")[0].rstrip(":") if outcome.startswith(("hang", "crash", "defect")) else outcome
        counts[kind] += 1
        if kind in ("hang", "crash", "defect"):
            defects.append({"number": number, "outcome": outcome})
            print(number, outcome, flush=True)
    worker.close()
    return {
        "inputs": inputs,
        "seed": seed,
        "crashes": counts["crash"],
        "hangs": counts["hang"],
        "defects": counts["defect"],
        "refused": counts["refused"],
        "read": counts["read"],
        "read_not_written": counts["read, not written"],
        "by_suffix": dict(sorted(by_suffix.items())),
        "problems": defects,
        "seconds": round(time.perf_counter() - began, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, default=None, help="where to write; default by --inputs")
    arguments = parser.parse_args()
    figures = fuzz(arguments.inputs, arguments.seed)
    text = json.dumps(figures, indent=1) + "\n"
    print(text)
    target = arguments.json or (RESULTS / "fuzz.json" if arguments.inputs >= 20_000 else None)
    if target is not None:
        target.parent.mkdir(parents=True, exist_ok=True)
        whole_files.write_bytes(target, text.encode())
    if figures["problems"]:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
