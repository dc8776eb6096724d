"""One image file after another in this process: what a worker of a cluster does."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from fastden.batch import FAILURES, in_one_line
from fastden.errors import UserError
from fastden.io import MAX_PIXELS


class FileDenoiser:
    """Denoise files with a network that is loaded once.

    Args:
        model, sigma, device, dtype, tile, max_memory, strength, max_pixels: as in :func:`fastden.denoise`.
        overwrite: replace existing files.
        strip_metadata: drop EXIF, XMP, IPTC and comments.
    """

    def __init__(
        self,
        model: str = "color",
        *,
        sigma: Any = "auto",
        strength: float = 1.0,
        device: str | None = None,
        dtype: str = "auto",
        tile: Any = "auto",
        max_memory: int | None = None,
        overwrite: bool = False,
        strip_metadata: bool = False,
        max_pixels: int = MAX_PIXELS,
    ) -> None:
        self.model, self.device, self.dtype, self.sigma = model, device, dtype, sigma
        self.options = {"tile": tile, "max_memory": max_memory, "strength": strength}
        self.overwrite, self.strip, self.max_pixels = overwrite, strip_metadata, max_pixels

    def one(self, source: Path, target: Path) -> dict[str, Any]:
        """Denoise ``source`` into ``target``.

        Returns:
            The record: ``input``, ``output``, ``status`` (``done`` or ``failed``), ``error``, ``width``, ``height``,
            ``sigma``, ``notes``, and ``seconds`` spent on ``read``, ``compute`` and ``write``.
        """
        record: dict[str, Any] = {"input": str(source), "output": str(target), "status": "failed", "error": None}
        record |= {"width": 0, "height": 0, "sigma": None, "notes": [], "seconds": {}}
        try:
            self._denoise(source, target, record)
            record["status"] = "done"
        except FAILURES as error:
            record["error"] = in_one_line(error)
        return record

    def _denoise(self, source: Path, target: Path, record: dict[str, Any]) -> None:
        import numpy as np

        from fastden.api import denoise_pixels
        from fastden.io import check_alpha, check_target, format_for, read_image, write_image
        from fastden.loading import load_network

        format_name = format_for(target)
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"output: cannot make the folder {target.parent}: {error.strerror}") from error
        check_target(target, self.overwrite)
        times = [time.perf_counter()]
        image = read_image(source, max_pixels=self.max_pixels)
        check_alpha(image, format_name)
        times.append(time.perf_counter())
        network = load_network(self.model, self.device, self.dtype, eight_bit=image.pixels.dtype == np.uint8)
        pixels, level = denoise_pixels(image.pixels, self.sigma, network, **self.options)
        times.append(time.perf_counter())
        notes = write_image(target, replace(image, pixels=pixels), overwrite=self.overwrite, strip=self.strip)
        times.append(time.perf_counter())
        record["height"], record["width"] = pixels.shape[:2]
        record |= {"sigma": level, "notes": [*image.notes, *notes]}
        record["seconds"] = dict(zip(("read", "compute", "write"), np.diff(times).tolist(), strict=True))
