"""What is done to each image of a batch: opened, read, denoised, written. Each stage may run in a thread of its own."""

from __future__ import annotations

import os
import stat
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from fastden.api import denoise_batch, noise_level_of, run_network, shown_level, to_batch
from fastden.encoding import check_alpha, plan_encoding
from fastden.errors import UserError, in_one_line
from fastden.files import check_target, digest, reason, sync, whole_file, write_synced
from fastden.fused import FusedDenoiser
from fastden.hub import models
from fastden.inference.batching import together
from fastden.inference.memory import Budget, split_memory
from fastden.inference.streaming import denoise_strips, side_for_strips
from fastden.inference.tiling import SMALLEST, automatic_tile
from fastden.inference.transfer import Lane, Pending
from fastden.io import Header, ImageFile, encode_image, format_for, read_image
from fastden.jobs import Job
from fastden.loading import Model, load_network
from fastden.manifest import Manifest, Record
from fastden.model import ALIGNMENT, Denoiser
from fastden.noise import sigma_of_gray
from fastden.strips import StripReader, StripWriter, estimate_sigma_of_file, read_header
from fastden.values import Array

Progress = Callable[[int, int], None]


@dataclass
class Work:
    """An image on its way.

    Attributes:
        job: what to read and to write.
        format_name: of the output.
        stamp: size, time and number of the input when it was opened; see :func:`_stamp`.
        header: None where the file's beginning cannot be read: reading it says why.
        size: bytes in the host's memory.
        streamed: whether it is read, denoised and written strip by strip.
        image: its pixels, then the denoised ones.
        level, sigma: what the network takes, and on the scale 0-255.
        seconds: spent in each stage.
        notes: for the user.
        pinned: the image as a batch of one in pinned memory, on the way to a CUDA device.
        pending: the pass on such a device that denoises it, its number in it, and of how many.
        in_libvips: whether libvips is decoding or encoding it, which cannot be broken off.
    """

    job: Job
    format_name: str
    stamp: tuple[int, ...]
    header: Header | None
    size: int
    streamed: bool
    image: ImageFile | None = None
    level: float | Tensor | None = None
    sigma: float | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    pinned: Tensor | None = None
    pending: tuple[Pending, int, int] | None = None
    in_libvips: bool = False

    @contextmanager
    def libvips(self) -> Iterator[None]:
        """Around decoding and encoding."""
        self.in_libvips = True
        try:
            yield
        finally:
            self.in_libvips = False


class Stages:
    """The stages, and what they share: settings, networks, limits.

    Args:
        model, device, dtype, tile, strength: as in :func:`fastden.denoise`.
        sigma: ``"auto"`` or a number on the scale 0-255.
        sigma_map: an image file of noise levels.
        max_memory: bytes, halved as :func:`fastden.inference.memory.split_memory` says.
        overwrite, strip, max_pixels: as in :func:`fastden.io.write_image` and :func:`fastden.io.read_image`.
        say: takes notes that concern the whole run.
    """

    def __init__(
        self,
        model: Model,
        *,
        sigma: Literal["auto"] | float,
        sigma_map: Path | None,
        strength: float,
        device: str | torch.device | None,
        dtype: str | torch.dtype,
        tile: int | Literal["auto"] | None,
        max_memory: int | None,
        overwrite: bool,
        strip: bool,
        max_pixels: int,
        say: Callable[[str], None],
    ) -> None:
        self.model, self.device, self.dtype = model, device, dtype
        self.sigma, self.sigma_map, self.strength = sigma, sigma_map, strength
        self.tile, self.overwrite, self.strip, self.max_pixels, self.say = tile, overwrite, strip, max_pixels, say
        self._networks: dict[bool, FusedDenoiser] = {}
        self._lock = threading.Lock()
        self._map: Array | None = None
        self._map_digest = None if sigma_map is None else digest(sigma_map)
        self._smaller: int | None = None
        network = self.network(eight_bit=True)
        if (sigma != "auto" or sigma_map is not None) and not network.noise_level_input:
            given = f"{sigma}" if sigma_map is None else f"the map {sigma_map}"
            raise ValueError(f"sigma: {given}, but this model is blind (it takes no noise level); accepted: 'auto'")
        self.lane = Lane(network.device) if network.device.type == "cuda" else None
        # The network for deep images takes more where it is another one.
        self.budget: Budget = split_memory(max_memory, self.network(eight_bit=dtype != "auto"))
        self.weights = {"name": _name(model), "sha256": _weights_digest(model, network)}

    def network(self, eight_bit: bool) -> FusedDenoiser:
        """The network for images of 8 bits, or of more."""
        with self._lock:
            if eight_bit not in self._networks:
                self._networks[eight_bit] = load_network(self.model, self.device, self.dtype, eight_bit=eight_bit)
            return self._networks[eight_bit]

    def options(self, job: Job) -> dict[str, Any]:
        """What decides a result beside the input and the weights. Tiles do not, but for rounding."""
        return {
            "sigma": self.sigma,
            "sigma_map": self._map_digest,
            "strength": self.strength,
            "dtype": str(self.dtype),
            "format": format_for(job.target),
            "strip_metadata": self.strip,
        }

    def open(self, job: Job, *, replaces: bool = False) -> Work:
        """Find what cannot be done before anything is computed, and how much memory the rest takes.

        Args:
            job: whose output's folder exists.
            replaces: the output may be replaced, whatever ``overwrite`` says.
        """
        check_target(job.target, self.overwrite or replaces)
        return self.look(job)

    def look(self, job: Job) -> Work:
        """The part of :meth:`open` that looks at the input alone."""
        format_name = format_for(job.target)
        try:
            status = os.stat(job.source)
        except OSError as error:
            raise UserError(f"{job.source}: cannot be read: {reason(error)}") from error
        header = None
        if stat.S_ISREG(status.st_mode):
            # What is wrong with the file is told by reading it.
            with suppress(UserError):
                header = read_header(job.source, max_pixels=self.max_pixels)
        size = 2 * status.st_size
        if header is not None:
            check_alpha(header.has_alpha, format_name)
            # Decoded and denoised; alpha is cut off the decoded image, and joined to the denoised one.
            size += (4 if header.has_alpha else 2) * header.nbytes
            if self.lane is not None:
                size += 2 * header.nbytes
            if self.sigma_map is not None:
                size += 12 * header.width * header.height
        return Work(job, format_name, _stamp(status), header, size, header is not None and size > self.budget.images)

    def read(self, work: Work) -> None:
        """Decode an image and find its noise level; of one that is streamed the noise level alone."""
        start = time.perf_counter()
        job = work.job
        if work.streamed and work.header is not None:
            self._check_map(work.header.height, work.header.width)
            network = self.network(work.header.dtype == np.uint8)
            if self.sigma_map is None:
                sigma: Any = self.sigma
                if sigma == "auto" and network.noise_level_input:
                    with work.libvips():
                        sigma = estimate_sigma_of_file(job.source, max_pixels=self.max_pixels)
                work.level = noise_level_of(sigma, network, [], (0, 0)) if network.noise_level_input else None
                work.sigma = shown_level(work.level)
        else:
            with work.libvips():
                image = read_image(job.source, max_pixels=self.max_pixels)
            self._check_unchanged(work)
            check_alpha(image.alpha is not None, work.format_name)
            shape = (image.pixels.shape[0], image.pixels.shape[1])
            self._check_map(*shape)
            level = self.sigma if self.sigma_map is None else self._loaded_map(self.sigma_map)
            network = self.network(image.pixels.dtype == np.uint8)
            work.level = noise_level_of(level, network, [image.pixels], shape)
            work.image, work.sigma = image, shown_level(work.level)
            work.notes += image.notes
            if self.lane is not None:
                work.pinned = self.lane.pin(to_batch([image.pixels], network))
        work.seconds["read"] = time.perf_counter() - start

    def _check_map(self, height: int, width: int) -> None:
        """Compare the size of the map of noise levels with an image's."""
        if self.sigma_map is None:
            return
        header = read_header(self.sigma_map, max_pixels=self.max_pixels)
        if header.bands != 1:
            raise UserError(f"sigma_map: {self.sigma_map} has {header.bands} channels; accepted: 1 (gray)")
        if (header.height, header.width) != (height, width):
            size = f"{header.width} x {header.height}"
            raise UserError(f"sigma_map: {self.sigma_map} is {size} pixels; accepted: {width} x {height}, the image's")

    def _loaded_map(self, path: Path) -> Array:
        """(H, W) on the scale 0-255."""
        with self._lock:
            if self._map is None:
                self._map = sigma_of_gray(read_image(path, max_pixels=self.max_pixels).pixels[:, :, 0])
            return self._map

    def _check_unchanged(self, work: Work) -> None:
        try:
            now = _stamp(os.stat(work.job.source))
        except OSError as error:
            raise UserError(f"{work.job.source}: cannot be read: {reason(error)}") from error
        if now != work.stamp and stat.S_ISREG(work.stamp[3]):
            raise UserError(f"{work.job.source}: changed while it was read")

    def compute(self, works: list[Work], progress: Progress | None = None) -> None:
        """Denoise images of one size and type together; one of them may be of any size."""
        if self.lane is not None and self._compute_on_device(self.lane, works, progress):
            return
        start = time.perf_counter()
        images = [work.image for work in works]
        pixels = [image.pixels for image in images if image is not None]
        network = self.network(pixels[0].dtype == np.uint8)
        level = _levels(works)
        shape = (len(pixels), *pixels[0].shape[:2])
        results = self._attempt(
            network,
            shape,
            lambda tile, memory: denoise_batch(
                pixels, level, network, tile=tile, max_memory=memory, strength=self.strength, progress=progress
            ),
        )
        seconds = (time.perf_counter() - start) / len(works)
        for work, image, result in zip(works, images, results, strict=True):
            assert image is not None
            work.image = replace(image, pixels=result)
            work.seconds["compute"] = seconds

    def _compute_on_device(self, lane: Lane, works: list[Work], progress: Progress | None) -> bool:
        """Queue a pass over whole images on the device; False where they are too large for it."""
        pinned = [work.pinned for work in works if work.pinned is not None]
        batch = pinned[0] if len(pinned) == 1 else lane.pin(torch.cat(pinned))
        if not lane.fits(batch, self.budget.network):
            return False
        assert works[0].image is not None
        network, level = self.network(works[0].image.pixels.dtype == np.uint8), _levels(works)
        n, _, height, width = batch.shape

        def once(tile: Any, memory: int | None) -> Pending:
            options: dict[str, Any] = {"tile": tile, "max_memory": memory, "strength": self.strength}
            return lane.run(batch, lambda image: run_network(network, image, level, progress=progress, **options))

        pending = self._attempt(network, (n, height, width), once)
        for index, work in enumerate(works):
            work.pending, work.pinned = (pending, index, n), None
        return True

    def group_limit(self, work: Work) -> int:
        """How many images like this one may go through the network together; 1 for alone."""
        if work.image is None or isinstance(work.level, Tensor):
            return 1
        height, width = work.image.pixels.shape[:2]
        return together(self.network(work.image.pixels.dtype == np.uint8), height, width, self.budget.network)

    def _attempt(
        self, network: FusedDenoiser, shape: tuple[int, int, int], run: Callable[[Any, int | None], Any]
    ) -> Any:
        """Call ``run`` with tiles and memory; as long as the device's memory does not suffice, with smaller tiles."""
        n, height, width = shape
        while True:
            tile, memory = self.tile, self.budget.network if self.tile == "auto" else None
            if self._smaller is not None:
                tile, memory = self._smaller, None
            try:
                return run(tile, memory)
            except torch.OutOfMemoryError:
                side = max(height, width) if tile is None else tile
                if side == "auto":
                    side = automatic_tile(network, height, width, n, self.budget.network)[0]
                side = min(int(side), max(height, width)) // 2 // ALIGNMENT * ALIGNMENT
                if side < SMALLEST:
                    raise
                if self._smaller is None:
                    self.say(f"out of memory on {network.device}: going on in tiles of {side} pixels or less")
                self._smaller = side
            # Outside the handler, whose exception keeps the tensors of the failed pass alive.
            if network.device.type == "cuda":
                torch.cuda.empty_cache()

    def write(self, work: Work, manifest: Manifest | None = None) -> Record:
        """Encode an image and write it; on record before it gets its name, and after."""
        start = time.perf_counter()
        assert work.image is not None
        job = work.job
        if work.pending is not None:
            pending, index, count = work.pending
            dtype = work.image.pixels.dtype
            work.image = replace(work.image, pixels=pending.image(index).astype(dtype, copy=False))
            work.seconds["compute"] = pending.seconds() / count
            work.pending = None
        try:
            with work.libvips():
                data, notes = encode_image(work.image, work.format_name, strip=self.strip)
        except UserError as error:
            raise UserError(f"{job.target}: {error}") from error
        work.notes += notes
        height, width = work.image.pixels.shape[:2]
        with whole_file(job.target) as temporary:
            write_synced(temporary, data)
            work.seconds["write"] = time.perf_counter() - start
            output = {"output_size": len(data), "output_sha256": sha256(data).hexdigest()}
            record = self._record(work, manifest, "writing", width=width, height=height, **output)
            if manifest is not None:
                manifest.add(record)
        return self._finish(record, manifest)

    def stream(self, work: Work, manifest: Manifest | None = None, progress: Progress | None = None) -> Record:
        """Read, denoise and write an image strip by strip; on record as by :meth:`write`."""
        job = work.job
        start = time.perf_counter()
        reader = StripReader(job.source, max_pixels=self.max_pixels)
        header = reader.header
        network = self.network(header.dtype == np.uint8)
        turned = int(header.metadata.get("orientation", 1)) > 1
        if self.strip and turned:
            raise UserError("is larger than --max-memory and cannot be turned upright; accepted: its metadata kept")
        shape = (header.channels, header.dtype, header.bits)
        dtype, metadata, notes = plan_encoding(*shape, header.metadata, work.format_name, strip=self.strip)
        for name, coder in ((header.format, "decoder"), (work.format_name, "encoder")):
            if name in ("webp", "avif"):
                notes.append(f"the {coder} of {name} holds the whole image in memory")
        work.notes += [*header.notes, *notes]
        level: float | StripReader | None = None
        if self.sigma_map is not None:
            level = StripReader(self.sigma_map, max_pixels=self.max_pixels)
        elif work.level is not None:
            level = float(work.level)

        def side() -> int:
            largest = automatic_tile(network, header.height, header.width, 1, self.budget.network)[0]
            if isinstance(self.tile, int):
                largest = self.tile
            limit = side_for_strips(largest, header, self.budget.images, with_map=self.sigma_map is not None)
            return limit if self._smaller is None else min(limit, self._smaller)

        def attempt(run: Callable[[int], Tensor]) -> Tensor:
            limit = side()

            def once(tile: Any, _memory: int | None) -> Tensor:
                return run(min(limit, tile) if isinstance(tile, int) else limit)

            return self._attempt(network, (1, limit, limit), once)

        with whole_file(job.target) as temporary:
            writer = StripWriter(
                temporary,
                (header.height, header.width, header.bands),
                dtype,
                work.format_name,
                bits=header.bits,
                lossless=header.lossless,
                metadata=metadata,
                strip=self.strip,
            )
            try:
                work.seconds["compute"] = denoise_strips(
                    network,
                    reader,
                    writer.write,
                    level,
                    side=side,
                    dtype=dtype,
                    strength=self.strength,
                    attempt=attempt,
                    progress=progress,
                )
                writer.close()
            except BaseException:
                writer.abort()
                raise
            self._check_unchanged(work)
            sync(temporary)
            work.seconds["write"] = time.perf_counter() - start - work.seconds["compute"]
            output: dict[str, Any] = {"output_size": temporary.stat().st_size, "output_sha256": digest(temporary)}
            record = self._record(work, manifest, "writing", width=header.width, height=header.height, **output)
            if manifest is not None:
                manifest.add(record)
        return self._finish(record, manifest)

    def _finish(self, record: Record, manifest: Manifest | None) -> Record:
        record = replace(record, status="done", time=_now())
        if manifest is not None:
            manifest.add(record)
        return record

    def failure(self, job: Job, error: BaseException, manifest: Manifest | None = None) -> Record:
        """The record of an image that failed."""
        record = Record(
            input=os.path.abspath(job.source),
            output=str(job.target) if manifest is None else manifest.name_of(job.target),
            status="failed",
            time=_now(),
            model=self.weights,
            options={},
            error=in_one_line(error),
        )
        if manifest is not None:
            # Where the disk is full, the failure is told all the same.
            with suppress(UserError):
                manifest.add(record)
        return record

    def _record(
        self, work: Work, manifest: Manifest | None, status: Literal["writing", "done"], **values: Any
    ) -> Record:
        job = work.job
        source = "blind" if work.sigma is None else "estimated" if self.sigma == "auto" else "given"
        return Record(
            input=os.path.abspath(job.source),
            output=str(job.target) if manifest is None else manifest.name_of(job.target),
            status=status,
            time=_now(),
            model=self.weights,
            options=self.options(job),
            sigma=work.sigma,
            sigma_source="map" if self.sigma_map is not None else source,
            seconds={name: round(seconds, 4) for name, seconds in work.seconds.items()},
            input_size=work.stamp[0],
            input_mtime_ns=work.stamp[1],
            streamed=work.streamed,
            notes=tuple(work.notes),
            **values,
        )


def _levels(works: list[Work]) -> float | Tensor | None:
    """The noise levels of images that go together."""
    if len(works) == 1 or works[0].level is None:
        return works[0].level
    return torch.tensor([work.level for work in works], dtype=torch.float64)


def _stamp(status: os.stat_result) -> tuple[int, ...]:
    """What differs where a file was changed: size, time, number; and its kind."""
    return status.st_size, status.st_mtime_ns, status.st_ino, status.st_mode


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="milliseconds")


def _name(model: Model) -> str:
    return str(model) if isinstance(model, str | Path) else type(model).__name__


def _weights_digest(model: Model, network: FusedDenoiser) -> str:
    """Of the weights' file where there is one, else of the loaded weights."""
    if isinstance(model, str | Path):
        file = models().get(str(model), Path(model)) / "model.safetensors"
        if file.is_file():
            return digest(file)
    state = model.state_dict() if isinstance(model, Denoiser) else network.state_dict()
    sha = sha256()
    for name, tensor in sorted(state.items()):
        sha.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        sha.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()
