"""The command ``fastden``. Heavy imports wait inside the commands: ``fastden --help`` answers at once."""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fastden.choices import OTHER_NAMES, FormatName, Quality
from fastden.cli.bench import app as bench
from fastden.cli.console import say
from fastden.cli.early import without_garbage_collection
from fastden.cli.evaluate import evaluate
from fastden.cli.export import export, write_cards
from fastden.cli.noise import noise
from fastden.cli.options import (
    MAX_MEGAPIXELS,
    DeviceOption,
    Dtype,
    Engine,
    OneLineErrors,
    Request,
    check_output_name,
    is_number_list,
    naming,
    parse_megapixels,
    parse_sigma,
    parse_tile,
    takes_several,
)
from fastden.cli.ui import ui
from fastden.errors import FAILURES, UserError

if TYPE_CHECKING:
    from fastden.network.model import Denoiser

app = typer.Typer(
    cls=OneLineErrors,
    help="Fast, exact image denoising.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.add_typer(bench, name="bench")
app.command()(export)
app.command()(noise)
app.command()(ui)


def _version(wanted: bool) -> None:
    if wanted:
        import fastden

        typer.echo(f"fastden {fastden.__version__}")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


@app.command()
def denoise(
    inputs: Annotated[list[str], typer.Argument(metavar="INPUT...", help="Files, folders or glob patterns.")],
    output_name: Annotated[str, typer.Option("--output", "-o", help="A file for one input file, else a folder.")],
    sigma: Annotated[
        str,
        typer.Option(
            help="Level of white noise, white of the file's type being 255: 0 to 75 for color, 0 to 60 for photo; auto"
            " estimates it, which photographs need: their noise is not white."
        ),
    ] = "auto",
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            help="Bundled name, folder or Hugging Face Hub id; default: photo; color for white noise, or with --sigma"
            " or --sigma-map.",
            show_default=False,
        ),
    ] = None,
    device: DeviceOption = None,
    dtype: Annotated[
        Dtype, typer.Option(help="auto: bfloat16 for 8-bit images where the machine has it natively, else float32.")
    ] = "auto",
    tile: Annotated[
        str, typer.Option(help="Side of the tiles in pixels, auto, or none. The result is the same, up to rounding.")
    ] = "auto",
    max_memory: Annotated[
        str | None,
        typer.Option(help="Such as 2GiB, the default: half for the network's tensors, half for images in hand."),
    ] = None,
    strength: Annotated[float, typer.Option(help="0 (nothing) to 2: factor of the noise level.")] = 1.0,
    chroma: Annotated[
        float | None, typer.Option(help="The same for colour noise alone, at twice the work; default: as --strength.")
    ] = None,
    quality: Annotated[
        Quality,
        typer.Option(
            help="fast: 8-bit numbers, on CPUs with VNNI and on H100 or H200; best: the mean of the results of all"
            " flips and turns, at eight times the work."
        ),
    ] = "normal",
    format: Annotated[
        FormatName | None,
        typer.Option(case_sensitive=False, help="Format of the results; the input's otherwise."),
    ] = None,
    recursive: Annotated[
        bool, typer.Option("--recursive", "-r", help="Descend into folders, keeping their structure.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace existing files.")] = False,
    strip_metadata: Annotated[
        bool, typer.Option("--strip-metadata", help="Drop EXIF, XMP, IPTC and comments (the ICC profile stays).")
    ] = False,
    max_megapixels: Annotated[float, typer.Option(help="Refuse larger images.")] = MAX_MEGAPIXELS,
    sigma_map: Annotated[
        Path | None,
        typer.Option(
            help="Gray image of the input's size, its values the noise level; white is 255 at any depth.",
            readable=False,
        ),
    ] = None,
    manifest: Annotated[
        str,
        typer.Option(help="Record of the run, JSON lines; auto: .fastden-manifest.jsonl in an output folder; none."),
    ] = "auto",
    resume: Annotated[
        bool, typer.Option("--resume", help="Leave out what the manifest says is done and has not changed since.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would be done, in what time and memory, and do nothing.")
    ] = False,
    crf: Annotated[int | None, typer.Option(min=0, max=63, help="Quality of a video: lower is better.")] = None,
    engine: Annotated[Engine, typer.Option(help="ray: on all devices of a Ray cluster; URLs are accepted.")] = "local",
    workers: Annotated[
        int | None, typer.Option(min=1, help="With ray: workers in all; default one for each device.")
    ] = None,
    workers_per_device: Annotated[int, typer.Option(min=1, help="With ray: workers that share a GPU.")] = 1,
) -> None:
    """Denoise image files. EXIF, ICC profile, alpha and bit depth are kept.

    Images larger than --max-memory are streamed. A file that fails is reported and skipped; the exit code is then 1. A
    single video is denoised frame by frame, its sound and subtitles copied (needs pip install 'fastden[video]').
    """
    with without_garbage_collection():
        import_module("fastden.cli.display")  # first: rich is imported while PyTorch's library is loaded
        from fastden.network.onednn import keep_freed_memory

    asked = parse_sigma(sigma)
    check_output_name(output_name)
    settings = {
        "model": model,
        "sigma": asked,
        "sigma_map": sigma_map,
        "strength": strength,
        "chroma": chroma,
        "quality": quality,
        "device": device,
        "dtype": dtype,
        "tile": parse_tile(tile),
        "max_memory": max_memory,
        "overwrite": overwrite,
        "strip_metadata": strip_metadata,
        "max_pixels": parse_megapixels(max_megapixels),
    }
    request = Request(
        inputs,
        output_name,
        settings,
        recursive=recursive,
        format_name=None if format is None else OTHER_NAMES.get(format, format),
        manifest=None if manifest == "none" else manifest,
        resume=resume,
    )
    keep_freed_memory()
    if engine == "ray":
        if crf is not None:
            raise UserError(f"crf: {crf} with --engine ray, which takes no videos; accepted: with --engine local")
        raise typer.Exit(_on_cluster(request, workers, workers_per_device, dry_run=dry_run))
    if workers is not None or workers_per_device != 1:
        raise UserError("workers: given with --engine local; accepted: with --engine ray")
    raise typer.Exit(_on_this_machine(request, crf, dry_run=dry_run))


def _on_cluster(request: Request, workers: int | None, workers_per_device: int, *, dry_run: bool) -> int:
    from fastden.cli.cluster import denoise_on_cluster
    from fastden.cli.video import find_videos

    if dry_run:
        raise UserError("dry_run: given with --engine ray; accepted: with --engine local")
    videos = find_videos(request)
    if videos:
        raise UserError(f"input: {videos[0]} is a video, with --engine ray; accepted: images, or --engine local")
    return denoise_on_cluster(request, workers=workers, workers_per_device=workers_per_device)


def _on_this_machine(request: Request, crf: int | None, *, dry_run: bool) -> int:
    """Denoise a video where the input is one, else images; returns the exit code."""
    from fastden.cli.local import denoise_here
    from fastden.cli.video import denoise_one_video, find_one_video

    for_images = {
        "format": request.format_name,
        "recursive": request.recursive,
        "strip_metadata": request.settings["strip_metadata"],
        "resume": request.resume,
        "sigma_map": request.settings["sigma_map"],
        "manifest": request.manifest not in (None, "auto"),
        "dry_run": dry_run,
    }
    video = find_one_video(request, crf, [name for name, value in for_images.items() if value])
    if video is not None:
        return denoise_one_video(request, video, crf=crf)
    return denoise_here(request, dry_run=dry_run)


app.command("eval", cls=takes_several("--sigma", is_number_list))(evaluate)


@app.command()
def info(as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """Print versions, devices, CPU features, and which backends can run and why the others cannot."""
    from fastden.info import as_text, collect

    report = collect()
    typer.echo(json.dumps(report, indent=2) if as_json else as_text(report))


@app.command("build")
def build_extension(
    force: Annotated[bool, typer.Option("--force", help="Build even what is built already.")] = False,
) -> None:
    """Build the CUDA C++ kernels for the PyTorch and the GPUs that are here; TORCH_CUDA_ARCH_LIST names others."""
    from fastden.cuda.build import BuildError
    from fastden.cuda.extension import build_here

    try:
        build_here(typer.echo, force)
    except BuildError as error:
        typer.echo(error.output, err=True, nl=bool(error.output))
        raise UserError(f"build: {error}") from error


@app.command()
def models(
    export_cards: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="Write a folder for each model there, ready for the Hugging Face Hub.",
            readable=False,
        ),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="With --export-cards: replace existing files.")
    ] = False,
) -> None:
    """List the models that come with the package, or write them with their cards for the Hugging Face Hub."""
    if export_cards is not None:
        write_cards(export_cards, overwrite=overwrite)
        return
    if overwrite:
        raise UserError("overwrite: given without --export-cards; accepted: with it")
    from fastden.network import hub

    bundled = hub.models()
    width = max(map(len, bundled), default=0)
    for name, folder in bundled.items():
        typer.echo(f"{name:<{width}}  {_summary(folder / 'README.md')}")
    if not bundled:
        typer.echo("no models are bundled with this installation; --model takes a folder or a Hugging Face Hub id")


def _summary(card: Path) -> str:
    """The first sentence of a model card's text, after its header and titles."""
    from fastden.exports.cards import summary

    try:
        text = summary(card.read_text(encoding="utf-8"))
    except OSError:
        return "(no model card)"
    return text.split(". ")[0].rstrip(".") or "(empty model card)"


@app.command(cls=takes_several("--set", lambda word: "=" in word and not word.startswith("-")))
def train(
    config: Annotated[Path, typer.Argument(metavar="CONFIG.yaml", help="Settings of the run.", readable=False)],
    changes: Annotated[
        list[str] | None, typer.Option("--set", help="key=value, overrides the file; several may follow.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint.")] = False,
    minutes: Annotated[
        float | None,
        typer.Option(min=0, help="Stop after the first epoch that ends later than this; --resume goes on."),
    ] = None,
    fit: Annotated[
        bool, typer.Option("--fit", help="Set steps so that the run is complete after --minutes, its decay included.")
    ] = False,
    accelerator: Annotated[str, typer.Option(help="As Lightning's: auto, cpu, gpu, ...")] = "auto",
    devices: Annotated[str, typer.Option(help="As Lightning's: auto, a count, a list.")] = "auto",
) -> None:
    """Train a denoiser, alone or jointly with a frozen network (needs pip install 'fastden[train]')."""
    try:
        from lightning.fabric.utilities.exceptions import MisconfigurationException
        from lightning.pytorch.utilities import rank_zero_only

        from fastden.training.config import load_config
        from fastden.training.trainer import train as run
    except ModuleNotFoundError as error:
        raise UserError(f"train: the package {error.name} is missing; install: pip install 'fastden[train]'") from error
    settings = load_config(config, changes or [])
    errors = (ValueError, TypeError, OSError, MisconfigurationException)
    with naming("train", errors, remedy="a smaller batch or crop needs less"):
        folder = run(settings, resume=resume, minutes=minutes, fit=fit, accelerator=accelerator, devices=devices)
    rank_zero_only(say)(f"model written to {folder}")


@app.command("calibrate")
def calibrate_model(
    model: Annotated[str, typer.Argument(help="A folder with a model, a bundled name or a Hugging Face Hub id.")],
    pictures: Annotated[
        list[Path], typer.Argument(metavar="FOLDER...", help="Folders of clean photographs.", readable=False)
    ],
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", help="Where to save the model; default: the folder that it is in.", readable=False
        ),
    ] = None,
    count: Annotated[int, typer.Option(min=1, help="Pictures that are used, evenly spaced.")] = 32,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a model with other weights in the output folder.")
    ] = False,
) -> None:
    """Prepare a model for --quality fast, with photographs: the result is saved beside it."""
    from fastden.network.calibration import calibrate
    from fastden.network.hub import models
    from fastden.network.int8 import save_ranges
    from fastden.network.model import Denoiser
    from fastden.training.data import central_crops, to_gray

    if overwrite and output is None:
        raise UserError("overwrite: given without --output; accepted: with it")
    if output is None and not Path(model).is_dir():
        raise UserError(f"output: none, and {model!r} is not a folder; accepted: a folder for the calibrated model")
    if output is None and model in models():  # the name is the bundled model's, whose folder is not the user's
        raise UserError(f"output: none, and {model!r} is a bundled model; accepted: a folder, or ./{model} for yours")
    with naming("model"):
        network = Denoiser.from_pretrained(model)
    if output is not None and not overwrite and _holds_other_model(output, network):
        raise UserError(
            f"output: {output} holds a model with other weights, or another estimator; accepted: another folder, or"
            " overwrite (--overwrite)"
        )
    crops = [
        to_gray(crop[0])[None, :1] if network.image_channels == 1 else crop for crop in central_crops(pictures, count)
    ]
    with naming("calibrate", FAILURES):
        calibrate(network, crops)
        if output is not None:
            network.save_pretrained(output)
        else:
            assert network.int8_ranges is not None
            save_ranges(Path(model), *network.int8_ranges)
    say(f"ranges of {len(crops)} pictures written to {output or model}")


def _holds_other_model(folder: Path, network: Denoiser) -> bool:
    """Whether a folder holds a model whose weights or estimator are not those of ``network``, or cannot be read."""
    from fastden.network.hub import WEIGHTS_FILE
    from fastden.network.int8 import fingerprint

    if not (folder / WEIGHTS_FILE).exists():
        return False
    try:
        other = type(network).from_pretrained(folder)
    except FAILURES:
        return True
    estimators = [None if one.estimator is None else fingerprint(one.estimator.network) for one in (other, network)]
    return fingerprint(other) != fingerprint(network) or estimators[0] != estimators[1]
