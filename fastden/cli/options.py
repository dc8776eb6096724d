"""Arguments of the commands: their types, how they are read, and the messages about mistakes."""

from __future__ import annotations

import errno
import json
import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from typer.core import TyperCommand, TyperGroup

from fastden.cli.console import INTERRUPTED, say
from fastden.errors import UserError, in_one_line, is_out_of_memory

#: The commands in the order in which they are listed: what most people need comes first.
COMMANDS = ("denoise", "noise", "ui", "eval", "models", "info", "train", "calibrate", "export", "bench", "build")

#: The default of ``--max-megapixels``: that of ``fastden.images.codec.MAX_PIXELS``, which is slow to import here.
MAX_MEGAPIXELS = 500.0
#: The noise levels that the bundled models were trained for, on the scale 0-255.
TRAINED = {
    "color": (0.0, 75.0),
    "color-blind": (0.0, 75.0),
    "color-classify": (10.0, 65.0),
    "color-segment": (10.0, 65.0),
    "photo": (0.0, 60.0),
}


class OneLineErrors(TyperGroup):
    """Lists the commands in their order. The user's mistakes become one line and exit code 1, and Ctrl-C code 130."""

    def list_commands(self, ctx: Any) -> list[str]:
        return sorted(super().list_commands(ctx), key=COMMANDS.index)

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as error:
            raise typer.Exit(INTERRUPTED) from error
        except (UserError, OSError, MemoryError) as error:
            if isinstance(error, OSError) and error.errno == errno.EPIPE:  # typer ends quietly then
                raise
            say(f"error: {in_one_line(error)}", error=True)
            raise typer.Exit(1) from error


def takes_several(option: str, belongs: Callable[[str], bool]) -> type[TyperCommand]:
    """A command whose ``option`` takes all following words that are its values, as ``belongs`` tells."""

    class Several(TyperCommand):
        def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
            expanded: list[str] = []
            inside = False
            for word in args:
                if inside and expanded[-1] != option and belongs(word):
                    expanded.append(option)
                elif word == "--":
                    return super().parse_args(ctx, expanded + args[args.index("--") :])
                elif inside and expanded[-1] != option:
                    inside = False
                inside = inside or word == option or word.startswith(f"{option}=")
                expanded.append(word)
            return super().parse_args(ctx, expanded)

    return Several


@contextmanager
def naming(
    what: str = "", errors: tuple[type[Exception], ...] = (Exception,), *, remedy: str | None = None
) -> Iterator[None]:
    """Turns an argument's ValueError or TypeError, or an error of a model's files, into a UserError.

    Args:
        what: to begin the message with, unless it does so already.
        errors: those that are the user's; the others are defects and pass, except where memory is used up.
        remedy: what needs less memory, where ``--max-memory`` and ``--tile`` are no options.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if not isinstance(error, errors) and not is_out_of_memory(error):
            raise
        text = in_one_line(error) if remedy is None else in_one_line(error, remedy)
        raise UserError(text if text.startswith(what) else f"{what}: {text}") from error


def is_number_list(word: str) -> bool:
    """Whether a word is a number, or several between commas."""
    if os.path.isdir(word):  # a folder may be named 25
        return False
    try:
        return all(math.isfinite(float(part)) for part in word.split(","))
    except ValueError:
        return False


#: Engines of a run over many files.
Engine = Literal["local", "ray"]
#: Dtypes to compute in.
Dtype = Literal["auto", "float32", "bfloat16", "float16", "float64"]

ModelOption = Annotated[str, typer.Option("--model", help="Bundled name, folder or Hugging Face Hub id.")]
DeviceOption = Annotated[
    str | None, typer.Option("--device", help="cpu, cuda, cuda:1, ...; default CUDA if there is any.")
]


@dataclass(frozen=True)
class Request:
    """The request to ``fastden denoise``, on any engine.

    Attributes:
        inputs: files, folders and patterns, or one video; URLs on a cluster.
        output: file or folder, or a URL on a cluster.
        settings: keyword arguments of :class:`fastden.BatchDenoiser`.
        recursive, format_name: as of :func:`fastden.batch.plan.plan`.
        manifest, resume: as of :meth:`fastden.BatchDenoiser.run`.
    """

    inputs: list[str]
    output: str
    settings: dict[str, Any]
    recursive: bool
    format_name: str | None
    manifest: str | None
    resume: bool

    def note_sigma(self) -> None:
        """Print a note where the noise level is outside of what the model knows, or too low to matter in 8 bits."""
        from fastden.api import ROUNDING
        from fastden.images.samples import MAX_SIGMA

        sigma, model = self.settings["sigma"], self.settings["model"]
        if sigma == "auto":
            return
        low, high = TRAINED.get(model, (0.0, MAX_SIGMA))
        if 0 < sigma < ROUNDING:
            say(f"note: sigma {sigma:g}: on the scale 0-255, less than the rounding of 8-bit pictures", error=True)
        elif not low <= sigma <= high:
            who = f"the model {model} was" if model in TRAINED else "the bundled models were"
            say(f"note: sigma {sigma:g}: {who} trained for {low:g} to {high:g}", error=True)


def check_model(settings: dict[str, Any], *, eight_bit: bool = True) -> Any:
    """The network that ``settings`` name.

    Raises:
        UserError: no such device, or no such model, in a line that names which.
    """
    from fastden.network.devices import parse_device
    from fastden.network.loading import default_model, load_network

    with naming("device"):
        device = parse_device(settings["device"])
    model = settings["model"]
    if model is None:
        model = default_model(settings["sigma"] if settings["sigma_map"] is None else 0.0)
    with naming("model"):
        return load_network(
            model, device, settings["dtype"], eight_bit=eight_bit, fast=settings.get("quality") == "fast"
        )


def check_output_name(name: str) -> None:
    """Raise UserError for an empty name, which would be this folder, and for that of standard output."""
    if not name:
        raise UserError("output: ''; accepted: a file or a folder (this one is .)")
    if name == "-":
        raise UserError("output: -; accepted: a file or a folder (standard output is not written)")


def check_json_target(path: Path) -> None:
    """Raise UserError where JSON cannot be written to ``path``; before a long computation.

    An earlier file of results is replaced, and an empty file; no other file is, a picture for instance.
    """
    from fastden.whole_files import check_target

    check_target(path, overwrite=True)
    if not path.exists():
        return
    with path.open("rb") as file, suppress(ValueError, RecursionError):
        start = file.read(64)
        if not start:
            return
        if start.lstrip()[:1] in (b"{", b"["):  # no large file of another kind is read to its end
            json.loads(start + file.read())
            return
    raise UserError(f"json: {path} exists and holds no JSON; accepted: a new file, or one of earlier results")


def parse_sigma(text: str) -> Literal["auto"] | float:
    """A noise level, or auto."""
    return "auto" if text == "auto" else parse_number(text, "auto, or a number from 0 to 255")


def parse_number(text: str, accepted: str) -> float:
    """A noise level on the 0-255 scale.

    Raises:
        UserError: no number from 0 to 255; its message has ``accepted``.
    """
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value <= 255:
        raise UserError(f"sigma: {text!r}; accepted: {accepted}")
    return value


def parse_megapixels(megapixels: float) -> int:
    """The pixels that ``--max-megapixels`` allows.

    Raises:
        UserError: no number, less than a pixel, or infinite.
    """
    if not 1 <= megapixels * 1e6 < math.inf:
        raise UserError(f"max_megapixels: {megapixels:g}; accepted: a number above 0 (a pixel is 0.000001)")
    return int(megapixels * 1e6)


def parse_tile(text: str) -> Literal["auto"] | int | None:
    """The side of tiles in pixels, auto, or None.

    Raises:
        UserError: another word.
    """
    if text == "auto":
        return "auto"
    if text == "none":
        return None
    if not text.removeprefix("-").isdecimal():
        raise UserError(f"tile: {text!r}; accepted: auto, none, or a whole number of pixels")
    return int(text)
