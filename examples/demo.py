"""Denoise three noisy photographs with the fastden command and show what it did.

The first is a real one, as it came (``examples/photographs/``). The others are a photograph that scikit-image ships,
made noisy twice: as a camera would at a high ISO number (:mod:`fastden.training.camera`: noise in the sensor,
demosaicing, tone curve, JPEG), and by white Gaussian noise of a known level. The command gets no parameter for the
first two, and the level for the third, unless the model is blind. Writes the noisy and the denoised files, and
``real.png``, ``camera.png`` and ``white.png``, which compare them.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import skimage.data
import torch
from PIL import Image, ImageDraw, ImageFont
from skimage.metrics import peak_signal_noise_ratio

import fastden
from fastden.training.camera import CameraNoise, CameraRanges

Pixels = npt.NDArray[np.uint8]

#: Photographs inside the scikit-image package (no download), each with the left and top of the detail to enlarge.
PHOTOGRAPHS = {"chelsea": (112, 80), "coffee": (250, 220), "astronaut": (170, 60), "rocket": (250, 300)}
#: A portrait on film; nobody has it without noise.
REAL, REAL_CORNER = Path(__file__).resolve().parent / "photographs" / "hopper.jpg", (290, 104)
ZOOM = 4
MARGIN, HEADER = 12, 40
#: Shot noise of the camera: that of a phone in a dim room.
SHOT = 0.006
TEXT, BACKGROUND, FRAME = (20, 20, 20), (255, 255, 255), (255, 220, 0)


def add_noise(clean: Pixels, sigma: float, seed: int) -> Pixels:
    """``clean`` (H, W, 3) with Gaussian noise of standard deviation ``sigma`` (0-255 scale), clipped and rounded."""
    noise = np.random.default_rng(seed).normal(0, sigma, clean.shape)
    return np.rint(np.clip(clean + noise, 0, 255)).astype(np.uint8)


def shoot(clean: Pixels, file: Path, seed: int) -> Pixels:
    """Write ``clean`` (H, W, 3) to a JPEG as a camera would have shot it; returns what it would be without noise."""
    picture = torch.from_numpy(clean).permute(2, 0, 1).float() / 255
    camera = CameraNoise(CameraRanges(shot=(SHOT, SHOT)))
    target, noisy = (
        (image.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
        for image in camera(picture, np.random.default_rng(seed))
    )
    Image.fromarray(noisy).save(file, quality=92)
    return target


def run_command(noisy: Path, denoised: Path, options: list[str]) -> float:
    """Run ``fastden denoise`` as a user would. Returns its wall time in seconds."""
    beside = Path(sys.executable).with_name("fastden")
    command = str(beside) if beside.exists() else shutil.which("fastden")
    if command is None:
        raise SystemExit("fastden: the command is not installed; run: pip install -e .")
    arguments = ["denoise", str(noisy), "-o", str(denoised), "--overwrite", *options]
    print("$ fastden", " ".join(arguments), flush=True)
    start = time.perf_counter()
    done = subprocess.run([command, *arguments], check=False)
    if done.returncode != 0:
        raise SystemExit(done.returncode)
    return time.perf_counter() - start


def time_denoising(noisy: Pixels, options: dict[str, Any]) -> float:
    """Seconds of one call from Python: the fastest of three behind one that loads and packs the weights."""
    seconds = []
    for _ in range(4):
        start = time.perf_counter()
        fastden.denoise(noisy, **options)
        seconds.append(time.perf_counter() - start)
    return min(seconds[1:])


def compare(pictures: dict[str, Pixels], corner: tuple[int, int]) -> Image.Image:
    """Labelled pictures of one size side by side, each above an enlarged detail of it.

    Args:
        pictures: (H, W, 3), by label.
        corner: left and top of the detail, which is 1 / ``ZOOM`` of the picture.
    """
    height, width = next(iter(pictures.values())).shape[:2]
    left, top = corner
    right, bottom = left + width // ZOOM, top + height // ZOOM
    sheet = Image.new("RGB", (len(pictures) * (width + MARGIN) + MARGIN, HEADER + 2 * (height + MARGIN)), BACKGROUND)
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(22)
    for column, (label, pixels) in enumerate(pictures.items()):
        x = MARGIN + column * (width + MARGIN)
        picture = Image.fromarray(pixels)
        detail = picture.crop((left, top, right, bottom)).resize((width, height), Image.Resampling.NEAREST)
        ImageDraw.Draw(picture).rectangle((left - 1, top - 1, right, bottom), outline=FRAME, width=2)
        draw.text((x + width / 2, HEADER / 2), label, TEXT, font, anchor="mm")
        sheet.paste(picture, (x, HEADER))
        sheet.paste(detail, (x, HEADER + height + MARGIN))
    return sheet


def main() -> None:
    """Run the demonstration."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photograph", choices=PHOTOGRAPHS, default="chelsea")
    parser.add_argument("--sigma", type=float, default=25.0, help="level of the white noise, 0-255 scale (default: 25)")
    parser.add_argument("--seed", type=int, default=0, help="of the noise (default: 0)")
    parser.add_argument("--model", help="bundled name, folder or Hub id (default: the command's)")
    parser.add_argument("--output", type=Path, default=Path("demo"), help="folder of the pictures (default: demo)")
    arguments = parser.parse_args()

    folder: Path = arguments.output
    folder.mkdir(parents=True, exist_ok=True)
    photograph: Pixels = getattr(skimage.data, arguments.photograph)()
    corner = PHOTOGRAPHS[arguments.photograph]
    model = [] if arguments.model is None else ["--model", arguments.model]

    noisy = np.asarray(Image.open(REAL).convert("RGB"))
    print(f"A real photograph: {fastden.estimate_noise(noisy).describe()}")
    show(folder / "real.png", REAL, None, noisy, [], model, REAL_CORNER)

    shot = folder / "camera-noisy.jpg"
    target = shoot(photograph, shot, arguments.seed)
    noisy = np.asarray(Image.open(shot))
    print(f"As a camera makes noise: {fastden.estimate_noise(noisy).describe()}")
    show(folder / "camera.png", shot, target, noisy, [], model, corner)

    scan = folder / "white-noisy.png"
    noisy = add_noise(photograph, arguments.sigma, arguments.seed)
    Image.fromarray(noisy).save(scan)
    print(f"White Gaussian noise of sigma {arguments.sigma:g} of 255, clipped to 8 bits")
    # A blind model takes no level.
    takes_level = not model or fastden.Denoiser.from_pretrained(arguments.model).noise_level_input
    level = ["--sigma", f"{arguments.sigma:g}"] if takes_level else []
    show(folder / "white.png", scan, photograph, noisy, level, model, corner)


def show(
    sheet: Path,
    noisy_file: Path,
    clean: Pixels | None,
    noisy: Pixels,
    options: list[str],
    model: list[str],
    corner: tuple[int, int],
) -> None:
    """Denoise a file by the command, show the result on a sheet, compare it with the truth if known, time the call."""
    denoised_file = sheet.with_name(f"{sheet.stem}-denoised.png")
    command_seconds = run_command(noisy_file, denoised_file, [*options, *model])
    arguments: dict[str, Any] = {"sigma": float(options[1])} if options else {}
    seconds = time_denoising(noisy, arguments | ({"model": model[1]} if model else {}))
    denoised = np.asarray(Image.open(denoised_file).convert("RGB"))
    if clean is None:
        pictures = {"noisy": noisy, "denoised": denoised}
    else:
        before, after = peak_signal_noise_ratio(clean, noisy), peak_signal_noise_ratio(clean, denoised)
        pictures = {f"noisy, {before:.1f} dB": noisy, f"denoised, {after:.1f} dB": denoised, "without noise": clean}
        print(f"PSNR      {before:.2f} dB noisy, {after:.2f} dB denoised")
    compare(pictures, corner).save(sheet, optimize=True)
    height, width = noisy.shape[:2]
    print(f"command   {command_seconds:.2f} s, with the start of Python and loading")
    print(f"denoising {seconds:.3f} s, {height * width / 1e6 / seconds:.2f} megapixels a second (from Python, warm)")
    print(f"pictures  {noisy_file}, {denoised_file}, {sheet}", flush=True)


if __name__ == "__main__":
    main()
