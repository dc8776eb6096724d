"""``fastden denoise`` of a video: whether it is one, progress, and the summary."""

from __future__ import annotations

import glob
import os
import time
from collections.abc import Callable
from contextlib import nullcontext, suppress
from itertools import takewhile
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from fastden.batch.denoiser import BatchDenoiser
from fastden.batch.plan import check_no_url, expand, is_folder
from fastden.batch.threads import check_folder
from fastden.cli.console import INTERRUPTED, clean_termination, say
from fastden.cli.options import Request, check_model, naming
from fastden.errors import FAILURES, UserError
from fastden.images.kinds import OTHER_SUFFIXES, VIDEO
from fastden.inference.arguments import parse_memory
from fastden.video.copy import denoise_video, is_output, is_video


def find_videos(request: Request) -> list[str]:
    """The videos among the inputs of the command; a folder is none, whatever its name.

    Raises:
        UserError: a pattern that names videos matches nothing.
    """
    return _videos(_expanded(request))


def _videos(names: list[str]) -> list[str]:
    return [name for name in names if is_video(name) and not Path(name).is_dir()]


def _expanded(request: Request) -> list[str]:
    """The inputs; in the place of a pattern that names videos, the files that it matches."""
    names: list[str] = []
    for name in request.inputs:
        is_pattern = is_video(name) and glob.has_magic(name) and "://" not in name and not Path(name).exists()
        names += map(str, expand(name, Path(request.output))) if is_pattern else [name]
    return names


def find_one_video(request: Request, crf: int | None, others: list[str]) -> Path | None:
    """The video file that is the input, or None. Videos inside folders are skipped, like all files that are not images.

    Args:
        request: what the user asked for.
        crf: the option; it is for videos only.
        others: options that were given and are for images.

    Raises:
        UserError: a video together with other inputs, or options that do not belong together.
    """
    inputs = _expanded(request)
    videos = _videos(inputs)
    if videos and len(inputs) > 1:
        raise UserError(f"input: {videos[0]} with {len(inputs) - 1} more; accepted: a video alone, or images")
    if crf is not None and not videos:
        raise UserError(f"crf: {crf}, but the input is no video; accepted: with a video")
    if videos and others:
        raise UserError(f"{others[0]}: given with a video; accepted: with images")
    if not videos and is_output(request.output) and not is_folder(request.output):
        named = ", ".join(OTHER_SUFFIXES[VIDEO])
        for name in inputs:
            if os.path.isfile(name):
                raise UserError(f"input: {name} is no video, and the output {request.output} is one; accepted: {named}")
    return Path(videos[0]) if videos else None


def denoise_one_video(request: Request, source: Path, *, crf: int | None) -> int:
    """Denoise a video into a file or folder with a progress bar, and print what was done; the exit code."""
    settings = request.settings
    check_model(settings)
    with naming():  # checks the options that images have too, and loads the networks
        batch = BatchDenoiser(**settings)
    request.note_sigma()
    options = {"tile": settings["tile"], "max_memory": parse_memory(settings["max_memory"])}
    try:
        with clean_termination():
            _run(
                source,
                request.output,
                settings["sigma"],
                batch.network,
                crf=crf,
                overwrite=settings["overwrite"],
                max_pixels=settings["max_pixels"],
                options={**options, "wishes": batch.settings.wishes},
            )
    except KeyboardInterrupt:
        say("error: interrupted; nothing was written", error=True)
        return INTERRUPTED
    return 0


def _run(
    source: Path,
    output: str,
    sigma: float | Literal["auto"],
    load: Callable[[bool, bool], Any],
    *,
    crf: int | None,
    overwrite: bool,
    max_pixels: int,
    options: dict[str, Any],
) -> None:
    check_no_url(output, "output")
    named = Path(output)
    # What is read and cannot be written becomes Matroska, which takes nearly every stream.
    name = source.name if is_output(source) else f"{source.stem}.mkv"
    target = named if named.suffix and not is_folder(output) else named / name
    check_folder(target.parent)
    new_folders = list(takewhile(lambda folder: not folder.exists(), target.absolute().parents))
    target.parent.mkdir(parents=True, exist_ok=True)
    console = Console(stderr=True)
    columns = (TextColumn("frame"), MofNCompleteColumn(), BarColumn(), TimeRemainingColumn())
    bar = Progress(*columns, console=console, disable=not console.is_terminal, transient=True, redirect_stdout=False)
    start = time.perf_counter()
    try:
        with bar if console.is_terminal else nullcontext():  # rich 13 would print an empty line
            task = bar.add_task("denoising", total=None)
            with naming("", FAILURES):
                result = denoise_video(
                    source,
                    target,
                    sigma,
                    load,
                    crf=crf,
                    overwrite=overwrite,
                    max_pixels=max_pixels,
                    progress=lambda done, total: bar.update(task, completed=done, total=max(total, done) or None),
                    **options,
                )
    except BaseException:
        for folder in new_folders:
            with suppress(OSError):
                folder.rmdir()
        raise
    seconds = time.perf_counter() - start
    held = " (estimated)" if sigma == "auto" else ""
    shown = "" if result.sigma is None else f", sigma {result.sigma:.1f}{held}"
    say(f"{source} -> {target}, {result.frames} frames of {result.width} x {result.height}{shown}")
    for note in result.notes:
        say(f"note: {target}: {note}", error=True)
    say(f"{seconds:.2f} s ({result.frames / seconds:.2f} frames/s, decoded and encoded)")
