"""Makes image files for the tests of reading, denoising and the command line."""

from __future__ import annotations

import errno
import io
import os
import struct
import zlib
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageCms

from fastden import Denoiser

ORIENTATION, MAKE, DATE, EXIF_IFD, GPS_IFD = 0x0112, 0x010F, 0x9003, 0x8769, 0x8825


def pixels(height: int = 32, width: int = 40, channels: int = 3, dtype: Any = np.uint8, seed: int = 0) -> Any:
    """(H, W, channels), or (H, W) for 0 channels: a smooth picture with noise, full range of the dtype."""
    random = np.random.default_rng(seed)
    shape = (height, width, channels) if channels else (height, width)
    ramp = np.linspace(0.2, 0.8, width)[None, :, None] if channels else np.linspace(0.2, 0.8, width)[None, :]
    values = np.clip(ramp + random.normal(0, 0.1, shape), 0, 1)
    dtype = np.dtype(dtype)
    return values.astype(dtype) if dtype.kind == "f" else np.rint(values * np.iinfo(dtype).max).astype(dtype)


def encoded(array: Any, format_name: str, **options: Any) -> bytes:
    """The bytes of a file that Pillow writes."""
    buffer = io.BytesIO()
    image = array if isinstance(array, Image.Image) else Image.fromarray(array)
    image.save(buffer, format_name, **options)
    return buffer.getvalue()


@cache
def icc_profile() -> bytes:
    """A profile of sRGB; made once, because it holds the time at which it was made."""
    return ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def exif(orientation: int = 6) -> Image.Exif:
    """A camera's name, a date, a position and an orientation."""
    tags = Image.Exif()
    tags[ORIENTATION], tags[MAKE] = orientation, "Camera"
    tags.get_ifd(EXIF_IFD)[DATE] = "2020:01:02 03:04:05"
    tags.get_ifd(GPS_IFD)[1] = "N"
    return tags


def png_claiming(width: int, height: int) -> bytes:
    """A small PNG file whose header claims any size."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")


def bad_files() -> dict[str, bytes]:
    """Unusable image files, by name."""
    noise = pixels(96, 96)
    return {
        "empty.png": b"",
        "text.png": b"this is a text, not an image\n" * 20,
        "truncated.jpg": encoded(noise, "JPEG")[:-2000],
        "truncated.png": encoded(noise, "PNG")[:-2000],
        "truncated.tif": encoded(noise, "TIFF")[:-2000],
        "truncated.webp": encoded(noise, "WEBP")[:-1000],
        "header.jpg": encoded(noise, "JPEG")[:20],
        "flipped.png": bytes(byte ^ (255 if index == 9000 else 0) for index, byte in enumerate(encoded(noise, "PNG"))),
        "animated.gif": encoded(
            Image.fromarray(noise), "GIF", save_all=True, append_images=[Image.new("RGB", (96, 96))]
        ),
    }


def save_model(folder: Path, *, noise_level_input: bool = True, image_channels: int = 3) -> Path:
    """A network with random weights in a folder; the same for the same arguments."""
    import torch

    torch.manual_seed(1)
    model = Denoiser(noise_level_input, image_channels).eval()
    model.save_pretrained(folder)
    return folder


def cannot_be_looked_at(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on the system refuses to look at ``file``."""
    system = os.stat

    def refused(path: Any, *arguments: Any, **options: Any) -> os.stat_result:
        if str(path) == str(file):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return system(path, *arguments, **options)

    monkeypatch.setattr(os, "stat", refused)
