"""A rehearsal of a batch run: the outcome of each image, the time, the memory."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from fastden.batch.denoiser import BatchDenoiser
from fastden.batch.manifest import Manifest, open_for_run
from fastden.batch.plan import Job
from fastden.batch.settings import Settings
from fastden.batch.threads import check_folder
from fastden.errors import FAILURES, UserError, in_one_line
from fastden.images.attachments import check_colour
from fastden.images.extras import read_extras
from fastden.images.strips import read_header
from fastden.inference.estimate import NoiseEstimate
from fastden.inference.run import denoise_batch, noise_level_of
from fastden.inference.tiling import HALO, automatic_tile, bytes_per_pixel
from fastden.network.fused import FusedDenoiser
from fastden.whole_files import check_target

#: Side of the image that the speed is measured on, pixels.
SAMPLE = 384


@dataclass(frozen=True)
class Step:
    """The expected outcome of one image.

    Attributes:
        job: what would be read and written.
        width, height: pixels, of a page; 0 where the file says nothing.
        pages: of the file.
        sigma: where the noise level would come from.
        deep: more than 8 bits, for which the network may compute in another dtype.
        streamed: strip by strip, because it does not fit into memory.
        done: an earlier run has denoised it.
        error: why it would fail, where that can be seen without decoding it.
    """

    job: Job
    width: int = 0
    height: int = 0
    pages: int = 1
    sigma: str = ""
    deep: bool = False
    streamed: bool = False
    done: bool = False
    error: str | None = None

    @property
    def megapixels(self) -> float:
        """Of all pages."""
        return self.width * self.height * self.pages / 1e6


@dataclass(frozen=True)
class Rehearsal:
    """A plan of a run, with its time and memory.

    Attributes:
        steps: of each image.
        rate: measured megapixels a second of the network alone; 0 where nothing would be computed.
        memory: bytes that the network and the images would take at most, beside Python and PyTorch.
    """

    steps: list[Step]
    rate: float
    memory: int

    @property
    def megapixels(self) -> float:
        """Of the images that would be denoised."""
        return sum(step.megapixels for step in self.steps if not (step.done or step.error))

    @property
    def seconds(self) -> float:
        """Expected seconds of the network."""
        return self.megapixels / self.rate if self.rate else 0.0


def rehearse(
    batch: BatchDenoiser,
    jobs: Sequence[Job],
    output: Path,
    *,
    manifest: str | Path | None = "auto",
    resume: bool = False,
) -> Rehearsal:
    """Look at the files' headers and measure the network's speed; write nothing.

    Args:
        batch: what would run.
        jobs, output, manifest, resume: as in :meth:`fastden.BatchDenoiser.run_jobs`.

    Raises:
        UserError: the manifest cannot be read, or there is none to resume from.
    """
    opened = open_for_run(manifest, jobs, output, resume=resume)
    steps = [_step(batch, job, opened if resume else None) for job in jobs]
    todo = [step for step in steps if not (step.done or step.error)]
    if not todo:
        return Rehearsal(steps, 0.0, 0)
    rates = {deep: _rate(batch.settings, deep) for deep in {step.deep for step in todo}}
    amounts = {deep: sum(step.megapixels for step in todo if step.deep == deep) for deep in rates}
    seconds = sum(amount / rates[deep] for deep, amount in amounts.items())
    network = batch.network(eight_bit=not any(rates))
    return Rehearsal(steps, sum(amounts.values()) / seconds, _memory(batch.settings, network, todo))


def _step(batch: BatchDenoiser, job: Job, manifest: Manifest | None) -> Step:
    settings = batch.settings
    try:
        if manifest is not None and manifest.finished(job, settings.known_weights, settings.options(job)):
            return Step(job, done=True)
        replaces = manifest is not None and manifest.may_replace(job, overwrite=settings.overwrite)
        check_folder(job.target.parent)
        if job.target.parent.exists():  # else the run makes it
            check_target(job.target, replaces or settings.overwrite)
        picture = batch.stages.reading.look(job)
        if picture.header is None:
            if not job.source.is_file():
                raise UserError(f"{job.source}: no regular file; only a run reads it")
            read_header(job.source, max_pixels=settings.max_pixels, several=True)  # raises what looking passed over
        else:
            if picture.streamed:
                batch.stages.check_streamable(picture, picture.header)
            header = picture.header
            with job.source.open("rb") as file:
                extras, metadata = read_extras(file, header.format, header.metadata, has_alpha=header.has_alpha)
            check_colour(extras, picture.format_name, has_profile="icc-profile-data" in metadata)
    except FAILURES as error:
        return Step(job, error=in_one_line(error))
    if picture.header is None:
        return Step(job, error="changed while it was looked at")
    if settings.sigma_map is not None:
        sigma = f"sigma from {settings.sigma_map}"
    elif not settings.network(eight_bit=True).noise_level_input:
        sigma = "no sigma (blind model)"
    elif isinstance(settings.sigma, NoiseEstimate):
        sigma = f"sigma {settings.sigma.sigma:.3g} (the mean of an estimate)"
    else:
        sigma = "sigma to be estimated" if settings.sigma == "auto" else f"sigma {settings.sigma:g}"
    header = picture.header
    deep = header.dtype.itemsize > 1
    return Step(job, header.width, header.height, header.pages, sigma, deep, picture.streamed)


def _rate(settings: Settings, deep: bool) -> float:
    """Megapixels a second of images of 8 bits or more, as the run would denoise them."""
    network = settings.network(eight_bit=not deep)
    image = torch.rand(
        SAMPLE, SAMPLE, network.image_channels, generator=torch.Generator().manual_seed(0), device="cpu"
    ).numpy()
    level = noise_level_of(25 if network.noise_level_input else "auto", network, [image], (SAMPLE, SAMPLE))
    seconds = 0.0
    for _ in range(2):  # the first call packs weights
        start = time.perf_counter()
        denoise_batch([image], level.value, network, wishes=settings.wishes)
        seconds = time.perf_counter() - start
    return SAMPLE * SAMPLE / 1e6 / seconds


def _memory(settings: Settings, network: FusedDenoiser, steps: list[Step]) -> int:
    """Peak bytes of the largest tile and of the images that are in memory at once."""
    largest = max(steps, key=lambda step: step.width * step.height)
    side = settings.tile
    if side == "auto":
        side = automatic_tile(network, largest.height, largest.width, 1, settings.budget.network)[0]
    height, width = (min(size, side or size) + 2 * HALO for size in (largest.height, largest.width))
    return int(bytes_per_pixel(network) * height * width) + settings.budget.images
