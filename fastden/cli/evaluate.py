"""``fastden eval``: PSNR and SSIM of a model. Heavy imports wait inside the command."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from fastden.cli.options import DeviceOption, Dtype, check_json_target, check_model, naming, parse_number
from fastden.errors import FAILURES, UserError


def evaluate(
    folders: Annotated[
        list[Path],
        typer.Argument(metavar="FOLDER...", help="Folders of 8-bit photographs, each a set.", readable=False),
    ],
    sigma: Annotated[
        list[str] | None,
        typer.Option("--sigma", help="Noise levels, 0-255 scale: --sigma 15 25 50 or --sigma 15,25,50."),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option("--model", help="Default: as of fastden denoise.", show_default=False),
    ] = None,
    device: DeviceOption = None,
    dtype: Annotated[Dtype, typer.Option(help="auto is float32 here.")] = "float32",
    gray: Annotated[bool, typer.Option("--gray", help="Make the photographs gray first.")] = False,
    real: Annotated[
        bool, typer.Option("--real", help="Real pairs name_real.*, name_mean.*; sigma is estimated unless given.")
    ] = False,
    estimate: Annotated[
        bool, typer.Option("--estimate", help="Give the network the level estimated from the noisy picture.")
    ] = False,
    dists: Annotated[
        bool, typer.Option("--dists", help="Also DISTS, how different people find two pictures (extra: perceptual).")
    ] = False,
    seed: Annotated[
        int | None,
        typer.Option(min=0, help="Seed of the noise, default 0; the image's index is added.", show_default=False),
    ] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write the results, image by image, to a file.", readable=False)
    ] = None,
) -> None:
    """Print PSNR and SSIM of a model on folders of photographs.

    Gaussian noise, not clipped; results clipped and rounded to 8 bits; PSNR over RGB, mean over the images.
    """
    from rich.console import Console
    from rich.table import Table

    from fastden import evaluation
    from fastden.network.loading import default_model
    from fastden.whole_files import write_bytes

    accepted = "numbers from 0 to 255"
    sigmas = [parse_number(part, accepted) for word in sigma or [] for part in word.split(",")]
    if gray and real:
        raise UserError("gray: given with --real; accepted: one of them")
    if seed is not None and real:
        raise UserError("seed: given with --real, which adds no noise; accepted: one of them")
    if estimate and real and sigmas:
        raise UserError("estimate: given with --real and --sigma; accepted: --sigma, or the estimate of real noise")
    estimated = estimate or (real and not sigmas)
    by_noise = model is None and estimated
    model = model or default_model("auto" if by_noise else 0.0)
    if json_file is not None:  # before the long computation
        check_json_target(json_file)
    settings = {"device": device, "dtype": dtype}
    network = check_model({"model": model, **settings}, eight_bit=False)
    white = check_model({"model": default_model(0.0), **settings}, eight_bit=False) if by_noise else None
    names = evaluation.set_names(folders)
    with naming():
        evaluation.check_levels(network, sigmas if real and sigmas else None, estimate=estimate)
    remedy = "smaller photographs need less"
    for folder in folders:
        with naming(str(folder), FAILURES, remedy=remedy):
            if real:
                evaluation.check_pairs(folder, network)
            else:
                evaluation.check_photographs(folder, network, gray=gray)
    measures = {"dists": evaluation.dists()} if dists else {}
    noise_seed = seed or 0
    options: dict[str, Any] = {
        "seed": None if real else noise_seed,
        "gray": gray,
        "real": real,
        "estimate": estimated and network.noise_level_input,
    }
    options |= {"white": default_model(0.0)} if by_noise else {}
    sets: dict[str, Any] = {}
    more = [f"{before}{name.upper()}" for name in measures for before in ("noisy ", "")]
    table = Table("set", "images", "sigma", "noisy PSNR", "PSNR", "noisy SSIM", "SSIM", *more)
    console = Console(stderr=True)
    try:
        with console.status("evaluating") as status:
            for name, folder in zip(names, folders, strict=True):
                started = _shower(status, folder)
                with naming(str(folder), FAILURES, remedy=remedy):
                    if real:
                        results = evaluation.evaluate_pairs(
                            folder, network, sigmas or None, white=white, measures=measures, started=started
                        )
                    else:
                        results = evaluation.evaluate_folder(
                            folder,
                            network,
                            sigmas or [15.0, 25.0, 50.0],
                            gray=gray,
                            estimate=estimate,
                            white=white,
                            seed=noise_seed,
                            measures=measures,
                            started=started,
                        )
                sets[name] = results
                for row in results:
                    table.add_row(name, *_cells(row, list(measures)))
                if json_file is not None:  # after each set: a set that fails loses no earlier one
                    complete = len(sets) == len(folders)
                    document = evaluation.results_document(model, network, options, sets, complete=complete)
                    write_bytes(json_file, (json.dumps(document, indent=1) + "\n").encode())
    finally:
        if sets:
            Console(width=None if sys.stdout.isatty() else 120).print(table)


def _cells(row: dict[str, Any], measures: list[str]) -> list[str]:
    """A row of the table that ``eval`` prints, without the set's name."""
    sigma = row["sigma"] if isinstance(row["sigma"], str) else f"{row['sigma']:g}"
    decibels = [f"{row[key]:.2f}" for key in ("psnr_noisy", "psnr")]
    names = ["ssim", *measures]
    similarities = [f"{row[key]:.4f}" for name in names for key in (f"{name}_noisy", name)]
    return [str(len(row["images"])), sigma, *decibels, *similarities]


def _shower(status: Any, folder: Path) -> Callable[[str], None]:
    return lambda name: status.update(f"{folder.name}: {name}")
