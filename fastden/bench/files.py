"""A folder of images as a job: files read, denoised and written."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

import fastden
from fastden.bench import forms
from fastden.bench.compare import Contender, Job, bounds
from fastden.bench.images import SIGMA, photograph
from fastden.bench.network import level
from fastden.bench.processes import run_module
from fastden.bench.timing import Call, seconds
from fastden.images.codec import ImageFile, read_image, write_image
from fastden.images.pixels import Array
from fastden.inference import denoise_tiled
from fastden.network.loading import load_network
from fastden.network.model import Denoiser

#: The program's start is timed at least so often, for the difference between the slowest and the fastest.
STARTS = 5
#: A folder's time, without the start, has to be more than this many times that difference. Of folders that take no time
#: at all, 1 in 800 would pass (one round, normally distributed times).
CLEAR = 3.0


class Command:
    """``fastden denoise`` of a folder, in a process of its own.

    Args:
        images: the folder.
        single: a folder with one tiny image; its time is the time that the command takes to start.
        output: where the results go.
        options: of the command.
        compute: denoises the same images, read already.
    """

    def __init__(self, images: Path, single: Path, output: Path, options: Sequence[str], compute: Call) -> None:
        self._images, self._single, self._output = images, single, output
        self._options, self._compute = options, compute
        #: Measurements so far, in seconds; the first of each belong together.
        self.whole: list[float] = []
        self.start: list[float] = []
        self.computing: list[float] = []
        #: Starts beyond those of the measurements, for their spread.
        self.further_starts: list[float] = []

    def __call__(self) -> Path:
        return self._run(self._images, self._output)

    def measure(self) -> float:
        """Milliseconds for the folder, the start of the program left out."""
        self.start.append(self._start())
        self.whole.append(seconds(self))
        self.computing.append(seconds(self._compute))
        return 1e3 * (self.whole[-1] - self.start[-1])

    def why_not_timed(self) -> str:
        """Why the measurements say nothing; empty where each is well above what the start varies by."""
        while len(self.start) + len(self.further_starts) < STARTS:
            self.further_starts.append(self._start())
        least = min(whole - start for whole, start in zip(self.whole, self.start, strict=True))
        starts = self.start + self.further_starts
        spread = max(starts) - min(starts)
        if least > CLEAR * spread:
            return ""
        times = f"{least:.3f} s without the start, which varies by {spread:.3f} s"
        return f"folder too small to time: {times}; accepted: more images or larger ones"

    def _start(self) -> float:
        return seconds(lambda: self._run(self._single, self._output.with_name("single")))

    def _run(self, images: Path, output: Path) -> Path:
        done = run_module("fastden", "denoise", str(images), "-o", str(output), "--overwrite", *self._options)
        if done.returncode:
            raise RuntimeError(f"fastden denoise: exit code {done.returncode}: {done.stderr.strip()[-300:]}")
        return output


def folder_job(
    model: Denoiser,
    name: str,
    size: tuple[int, int],
    count: int,
    dtype: torch.dtype,
    peers: Sequence[str],
    folder: Path,
) -> tuple[Job, list[Contender], Command]:
    """Denoising ``count`` generated noisy PNG files of ``size`` (height, width).

    Args:
        model: the network, on the device to use.
        name: by which the command finds it.
        size, count: of the images.
        dtype: to compute in.
        peers: of :data:`fastden.bench.forms.PLAIN`: a plain loop over the files in this process, with the same reader
            and writer.
        folder: for all files.
    """
    device = model.device
    inputs, single = folder / "images", folder / "one"
    for path in (inputs, single, folder / "plain"):
        path.mkdir()
    noisy = [_to_pixels(photograph(*size, seed=seed, channels=model.image_channels)) for seed in range(count)]
    for index, pixels in enumerate(noisy):
        write_image(inputs / f"{index:04}.png", ImageFile(pixels))
    write_image(single / "0000.png", ImageFile(noisy[0][:16, :16]))

    exact = model.double()
    reference = torch.cat([denoise_tiled(exact, _to_batch(pixels, device).double(), level(model)) for pixels in noisy])
    model.float()
    shown = str(dtype).removeprefix("torch.")
    options = ["--model", name, "--device", str(device), "--dtype", shown]
    sigma: float | None = None
    if model.noise_level_input:
        sigma = 255 * SIGMA
        options += ["--sigma", str(sigma)]

    def compute() -> None:
        network = load_network(name, device, dtype)
        for pixels in noisy:
            fastden.denoise(pixels, sigma="auto" if sigma is None else sigma, model=network)

    command = Command(inputs, single, folder / "command", options, compute)
    loop = _loop(model, "channels_last", dtype, inputs, folder / "plain")
    bound = bounds(results(loop())[0], (reference.clamp(0, 1),), dtype)
    contenders = [Contender("fastden", lambda: command, own=True, graphs=False, why_not_timed=command.why_not_timed)]
    for form in peers:
        output = folder / form
        output.mkdir()
        contenders.append(Contender(form, partial(_loop, model, form, dtype, inputs, output), graphs=False))
    return Job("batch", count, count * size[0] * size[1], 0.0, (reference.clamp(0, 1),), bound), contenders, command


def results(folder: Path) -> tuple[Tensor]:
    """All images of a folder, (N, C, H, W) on the scale [0, 1]."""
    pictures = [_to_batch(read_image(path).pixels, torch.device("cpu")) for path in sorted(folder.glob("*.png"))]
    return (torch.cat(pictures),)


def _loop(model: Denoiser, form: str, dtype: torch.dtype, inputs: Path, output: Path) -> Callable[[], Path]:
    network = forms.prepared(form, forms.WithLevel(model, level(model)), dtype)
    device = model.device

    def run() -> Path:
        for path in sorted(inputs.glob("*.png")):
            image = forms.laid_out((_to_batch(read_image(path).pixels, device),), dtype, form)
            write_image(output / path.name, ImageFile(_to_pixels(network(*image))), overwrite=True)
        return output

    return run


def _to_batch(pixels: Array, device: torch.device) -> Tensor:
    return torch.from_numpy(pixels).to(device).permute(2, 0, 1)[None].float() / 255


def _to_pixels(image: Tensor) -> Array:
    values = image[0].float().clamp(0, 1).mul(255).round().to(torch.uint8)
    return values.permute(1, 2, 0).contiguous().cpu().numpy()
