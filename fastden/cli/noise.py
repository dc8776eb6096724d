"""``fastden noise``: the noise estimate of pictures, in words, as JSON, and as a map."""

from __future__ import annotations

import json
import shlex
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from fastden.cli.console import say
from fastden.cli.early import without_garbage_collection
from fastden.errors import FAILURES, UserError, in_one_line


def noise(
    files: Annotated[list[Path], typer.Argument(metavar="FILE...", help="Image files.")],
    map_file: Annotated[
        Path | None,
        typer.Option(
            "--map", help="Write the levels that one picture is denoised with as a gray image, for --sigma-map."
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, a line for each file.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing map.")] = False,
) -> None:
    """Print how noisy pictures are, by brightness, and what to do about it; nothing is denoised.

    The level is the standard deviation of the noise on the scale 0-255, white of the file's type being 255. Coarse
    noise is shared by neighbouring pixels, as cameras leave it; fine noise is not.
    """
    with without_garbage_collection():
        from fastden.images.strips import read_samples
        from fastden.images.whole_files import check_target
        from fastden.inference.estimate import noise_of_samples

    if map_file is not None:
        if len(files) != 1:
            raise UserError(f"map: {map_file} with {len(files)} pictures; accepted: with one")
        check_target(map_file, overwrite)
    failed = False
    for file in files:
        try:
            crops, values = read_samples(file)
            estimate = noise_of_samples(crops, values)
            if map_file is not None:
                _write_map(file, map_file, estimate, overwrite)
        except FAILURES as error:
            failed = True
            say(f"error: {in_one_line(error)}", error=True)
            continue
        if as_json:
            row: dict[str, Any] = {"file": str(file), "kind": estimate.kind, **asdict(estimate)}
            typer.echo(json.dumps(row))
        else:
            say(f"{file}: {estimate.describe()}")
            if not values.ordinary:
                say(f"    {values.describe(crops[0].dtype)}")
            say(f"    {_advice(file, estimate.kind)}")
    raise typer.Exit(1 if failed else 0)


def _advice(file: Path, kind: str) -> str:
    if kind == "clean":
        return "nothing to do: fastden denoise would leave it nearly as it is"
    target = shlex.quote(str(file.with_name(f"{file.stem}-clean{file.suffix}")))
    return f"fastden denoise {shlex.quote(str(file))} -o {target}"


def _write_map(file: Path, target: Path, estimate: Any, overwrite: bool) -> None:
    """The level of each pixel that a network takes, as a gray image, rounded up so that weak noise does not become 0.

    It has 8 bits, or 16 where the picture's values take a small part of their type's range.
    """
    import numpy as np
    import torch

    from fastden.images.codec import ImageFile, read_image, write_image
    from fastden.images.pixels import to_dtype
    from fastden.network.level import level_map

    image = read_image(file)
    black, white = estimate.black, estimate.white
    x = torch.from_numpy(to_dtype(image.pixels, np.float32)).permute(2, 0, 1)[None]
    levels = level_map(estimate.curve_on(black, white), (x - black) / (white - black))[0, 0]
    kind = np.dtype(np.uint8 if white - black >= 1 else np.uint16)
    most = int(np.iinfo(kind).max)
    values = levels.mul(most).ceil().clamp(0, most).numpy().astype(kind)
    write_image(target, ImageFile(values[:, :, None]), overwrite=overwrite)
