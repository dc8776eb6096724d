"""``fastden noise``: the noise estimate of pictures, in words, as JSON, and as a map."""

from __future__ import annotations

import json
import os
import shlex
import unicodedata
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from fastden.cli.console import say
from fastden.cli.early import without_garbage_collection
from fastden.cli.options import MAX_MEGAPIXELS, naming, parse_megapixels
from fastden.errors import FAILURES, UserError, in_one_line

#: Of maps: formats that hold gray values of 16 bits as they are.
MAP_SUFFIXES = (".png", ".tif", ".tiff")


def noise(
    files: Annotated[
        list[Path], typer.Argument(metavar="FILE...", help="Image files, and folders of them.", readable=False)
    ],
    map_file: Annotated[
        Path | None,
        typer.Option(
            "--map",
            help="Write the levels that one picture is denoised with as a gray PNG or TIFF, for --sigma-map.",
            readable=False,
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option("--model", help="Judge as fastden denoise --model does: with this model's own estimator."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, a line for each file.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing map.")] = False,
    max_megapixels: Annotated[float, typer.Option(help="Refuse larger images.")] = MAX_MEGAPIXELS,
) -> None:
    """Print how noisy pictures are, by brightness, and what to do about it; nothing is denoised.

    The level is the standard deviation of the noise on the scale 0-255, white of the file's type being 255. Coarse
    noise is shared by neighbouring pixels, as cameras leave it; fine noise is not.
    """
    with without_garbage_collection():
        from fastden.images.strips import read_header, read_samples
        from fastden.inference.estimate import estimator_of, noise_of_samples
        from fastden.whole_files import check_target

    max_pixels = parse_megapixels(max_megapixels)
    if overwrite and map_file is None:
        raise UserError("overwrite: given without --map; accepted: with --map")
    if map_file is not None:
        if len(files) != 1 or os.path.isdir(files[0]):
            what = f"{len(files)} pictures" if len(files) != 1 else "a folder"
            raise UserError(f"map: {map_file} with {what}; accepted: with one picture")
        if map_file.suffix.lower() not in MAP_SUFFIXES:
            raise UserError(f"map: {map_file}; accepted: a name with {', '.join(MAP_SUFFIXES)}, which keep its levels")
        if os.path.exists(map_file) and os.path.exists(files[0]) and os.path.samefile(map_file, files[0]):
            raise UserError(f"map: {map_file} is the picture itself; accepted: another file")
        check_target(map_file, overwrite)
    with naming("model"):
        estimator = estimator_of(model)
    pictures, errors = _pictures(files)
    for one in errors:
        say(f"error: {in_one_line(one)}", error=True)
    failed = bool(errors)
    for file in pictures:
        try:
            pages = read_header(file, max_pixels=max_pixels, several=True).pages
            crops, values = read_samples(file, max_pixels=max_pixels, several=True)
            estimate = noise_of_samples(crops, values, estimator)
            if map_file is not None:
                _write_map(file, map_file, estimate, overwrite, max_pixels)
        except FAILURES as error:
            failed = True
            say(f"error: {in_one_line(error)}", error=True)
            continue
        if pages > 1:
            say(f"note: {file}: of {pages} pages the first is judged", error=True)
        if as_json:
            row: dict[str, Any] = {
                "file": str(file),
                "kind": estimate.kind,
                "is_white": estimate.is_white,
                **asdict(estimate),
            }
            typer.echo(json.dumps(row))
        else:
            say(f"{file}: {estimate.describe()}")
            if not values.ordinary:
                say(f"    {values.describe(crops[0].dtype)}")
            for line in _advice(file, estimate.kind, model, max_megapixels):
                say(f"    {line}")
    raise typer.Exit(1 if failed else 0)


def _pictures(files: list[Path]) -> tuple[list[Path], list[Exception]]:
    """The files, and in the place of each folder its pictures; and the errors of what cannot be looked at."""
    from fastden.images.finder import find_images, left_out_note

    pictures: list[Path] = []
    errors: list[Exception] = []
    for file in files:
        if not os.path.isdir(file):  # False where it cannot be looked at: reading it says why
            pictures.append(file)
            continue
        left_out: list[Path] = []
        unreadable: list[OSError] = []
        try:
            inside = find_images(file, unreadable=unreadable, left_out=left_out)
        except OSError as error:
            errors.append(error)
            continue
        errors += unreadable
        told = left_out_note(left_out) if left_out else ""
        if not inside:
            why = f" ({told})" if told else ""
            errors.append(UserError(f"file: no images in the folder {file}{why}; accepted: image files"))
        elif told:
            say(f"note: {told}", error=True)
        pictures += inside
    return pictures, errors


def _advice(file: Path, kind: str, model: str | None, max_megapixels: float) -> list[str]:
    """What to do, and the command for it, which a shell can run."""
    from fastden.images.codec import format_of_suffix
    from fastden.images.formats import result_suffix

    if kind == "clean":
        return ["nothing to do: fastden denoise would leave it nearly as it is"]
    suffix = result_suffix(file.suffix)
    suffix = suffix if format_of_suffix(suffix) else ".png"
    command = f"fastden denoise {_quoted(file)} -o {_quoted(file.with_name(f'{file.stem}-clean{suffix}'))}"
    command += f" --model {_quoted(model)}" if model is not None else ""
    command += f" --max-megapixels {max_megapixels:.15g}" if max_megapixels != MAX_MEGAPIXELS else ""
    if kind == "unknown":
        return ["nothing would be removed; if you see noise, give its level:", f"{command} --sigma N"]
    return [command]


def _quoted(path: str | Path) -> str:
    """A path as a word of a shell: also one with a line's end in it, or that begins like an option.

    Text stays as it is: ``./color`` is a folder, ``color`` a bundled model.
    """
    name = f"./{path}" if str(path).startswith("-") else str(path)
    if any(unicodedata.category(character) in ("Cc", "Cs") for character in name):
        escaped = (_escaped(byte) for byte in os.fsencode(name))
        return f"$'{''.join(escaped)}'"
    return shlex.quote(name)


def _escaped(byte: int) -> str:
    character = chr(byte)
    return character if 32 <= byte < 127 and character not in "'\\" else f"\\x{byte:02x}"


def _write_map(file: Path, target: Path, estimate: Any, overwrite: bool, max_pixels: int) -> None:
    """The level of each pixel that a network takes, as a gray image of 16 bits; of several pages, of the first.

    It is rounded up by at most 0.004 on the scale 0-255, so that weak noise does not become 0. In 8 bits the levels
    were half a step of that scale too high in the mean, as much as noise of sigma 0.5.
    """
    import numpy as np
    import torch

    from fastden.images.codec import ImageFile, read_image, write_image
    from fastden.images.pixels import to_dtype
    from fastden.network.level import level_map

    pixels = read_image(file, max_pixels=max_pixels, several=True).split()[0]
    black, white = estimate.black, estimate.white
    x = torch.from_numpy(to_dtype(pixels, np.float32)).permute(2, 0, 1)[None]
    levels = level_map(estimate.curve_on(black, white), (x - black) / (white - black))[0, 0]
    most = int(np.iinfo(np.uint16).max)
    values = levels.mul(most).ceil().clamp(0, most).numpy().astype(np.uint16)
    write_image(target, ImageFile(values[:, :, None]), overwrite=overwrite)
