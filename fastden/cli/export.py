"""``fastden export``: a model as a file for other programs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from fastden.choices import FileFormat, Layout, Precision
from fastden.cli.console import say
from fastden.cli.options import naming, parse_number
from fastden.errors import FAILURES, UserError


def export(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL", help="Bundled name, folder or Hugging Face Hub id; noise: what estimates the level."
        ),
    ],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="The file; its ending tells the format.", readable=False)
    ],
    format: Annotated[
        FileFormat | None,
        typer.Option(help="aoti: compiled for this machine's CPU. dtmodel: for darktable. Default: by the ending."),
    ] = None,
    precision: Annotated[
        Precision,
        typer.Option(
            help="Precision of weights and activations; images stay float32. fp16-weights, int8: ONNX; bf16: pt2, aoti."
        ),
    ] = "fp32",
    layout: Annotated[
        Layout, typer.Option(help="For ONNX; dpir: the noise level is the fourth channel, for VapourSynth's vs-mlrt.")
    ] = "separate",
    composed: Annotated[
        bool, typer.Option("--composed/--plain", help="Linear chains as single convolutions, or the layers as trained.")
    ] = True,
    sigma: Annotated[
        str | None, typer.Option(help="Noise level to build in, 0-255 scale; the file then takes the image alone.")
    ] = None,
    opset: Annotated[int | None, typer.Option(help="For ONNX and darktable, 13 to 23; default 17.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing file.")] = False,
) -> None:
    """Write a model to a file for other programs: ONNX, torch.export, AOTInductor, darktable.

    Any batch, height and width. ONNX and darktable need pip install 'fastden[export]'.
    """
    from fastden.exports.exporter import export as run

    options: dict[str, Any] = {
        "format": format,
        "precision": precision,
        "layout": layout,
        "composed": composed,
        "sigma": None if sigma is None else parse_number(sigma, "a number from 0 to 255"),
        "opset": opset,
        "overwrite": overwrite,
    }
    try:
        with naming("export", FAILURES):
            written = run(model, output, **options)
    except ModuleNotFoundError as error:
        raise UserError(f"export: {error}") from error
    say(f"{model} -> {written}, {written.stat().st_size / 1e6:.1f} MB")


def write_cards(folder: Path, *, overwrite: bool) -> None:
    """``fastden models --export-cards``."""
    from fastden.exports.hub_cards import export_cards

    for made in export_cards(folder, overwrite=overwrite):
        say(f"{made.name} -> {made}")
