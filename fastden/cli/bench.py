"""``fastden bench``: the network's speed on this machine. Heavy imports wait inside the commands."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from fastden.cli.options import DeviceOption, ModelOption, check_json_target, naming
from fastden.errors import UserError

if TYPE_CHECKING:
    import torch

    from fastden.bench.compare import Settings
    from fastden.bench.machine import Sensors
    from fastden.network.model import Denoiser

app = typer.Typer(
    help="Measure speed, memory and, on a GPU, energy beside other ways to run the same network. Contenders run in turn"
    " on the same weights and images; one whose result errs, against float64, more than twice as much as eager PyTorch"
    " gets no ratio, and the exit code is then 1.",
    no_args_is_help=True,
    rich_markup_mode=None,
)


#: Height and width, images and rounds where the user says nothing, by command, on a GPU and on a CPU.
DEFAULTS = {
    "ops": {"cuda": (1080, 1920, 1, 20), "cpu": (512, 768, 1, 7)},
    "model": {"cuda": (2160, 3840, 1, 20), "cpu": (512, 768, 1, 7)},
    "train": {"cuda": (128, 128, 64, 20), "cpu": (64, 64, 4, 7)},
    "batch": {"cuda": (2160, 3840, 16, 3), "cpu": (512, 768, 8, 3)},
}

#: Environment variables that change which gradients and tiles are measured.
CHANGING = ("FASTDEN_BACKWARD", "FASTDEN_TUNED")

Json = Annotated[Path | None, typer.Option("--json", help="Write everything measured to a file.", readable=False)]
Plots = Annotated[
    Path | None, typer.Option("--plots", help="Draw bars and a roofline, PNG, into a folder.", readable=False)
]
Compare = Annotated[
    str | None, typer.Option("--compare", help='Contenders beside fastden, separated by commas; "" for none.')
]
Backends = Annotated[str | None, typer.Option("--backends", help="fastden's own; default all that can run here.")]
Dtype = Annotated[
    Literal["float32", "bfloat16", "float16"] | None,
    typer.Option("--dtype", help="Default bfloat16 where the machine has it natively, else float32."),
]
Size = Annotated[tuple[int, int] | None, typer.Option("--size", metavar="HEIGHT WIDTH", help="Pixels of an image.")]
Batch = Annotated[int | None, typer.Option("--batch", min=1, help="Images in a call.")]
Rounds = Annotated[int | None, typer.Option("--rounds", min=1, help="In each, every contender has its turn.")]


def _changing() -> dict[str, str]:
    """The variables of :data:`CHANGING` that are set, of a file its name; a file of tiles counts once it exists."""
    given = {name: Path(os.environ[name]) for name in CHANGING if os.environ.get(name)}
    return {name: value.name for name, value in given.items() if name != "FASTDEN_TUNED" or value.exists()}


@dataclass
class _Run:
    """A benchmark from its options to its exit code."""

    command: str
    model_name: str
    model: Denoiser
    settings: Settings
    size: tuple[int, int]
    batch: int
    peers: tuple[str, ...]
    backends: tuple[str, ...]
    json: Path | None
    plots: Path | None
    left_out: dict[str, str]
    sensors: Sensors | None
    extra: dict[str, Any] = field(default_factory=dict)

    def finish(
        self, measure: Callable[[Mapping[str, float]], Iterable[Mapping[str, Any]]], floors: bool = True
    ) -> None:
        """Measure, print, write, and exit with the code. The file is written after each result."""
        from fastden.bench import machine, plots, tables

        device, dtype = self.settings.device, self.settings.dtype
        results: list[Mapping[str, Any]] = []
        with machine.steady_settings(device):
            before = self.sensors.state() if self.sensors else None
            limits = machine.ceilings(device, dtype) if floors else {}
            facts = self._facts(limits)
            for result in measure(limits):
                results.append(result)
                if self.json is not None:
                    sensors = {"before": before, "after": None}
                    tables.write(self.json, {**facts, "sensors": sensors, "complete": False, "results": results})
            after = self.sensors.state() if self.sensors else None
        code = tables.exit_code(results)
        document = {
            **facts,
            "sensors": {"before": before, "after": after},
            "complete": True,
            "all_right": code == 0,
            "results": results,
        }
        tables.show(results, limits, self.left_out)
        if self.json is not None:
            tables.write(self.json, document)
        if self.plots is not None:
            plots.draw(document, self.plots)
        raise typer.Exit(code)

    def _facts(self, limits: Mapping[str, float]) -> dict[str, Any]:
        """What the file says beside the results."""
        from fastden.bench import machine

        return {
            "command": f"fastden bench {self.command}",
            "name": self.command,
            "machine": machine.describe(self.settings.device),
            "environment": _changing(),
            "settings": {
                "model": self.model_name,
                "size": list(self.size),
                "batch": self.batch,
                "dtype": str(self.settings.dtype).removeprefix("torch."),
                "rounds": self.settings.rounds,
                "repeats": self.settings.repeats,
                "peers": self.peers,
                "backends": self.backends,
                "tf32": False,
                **self.extra,
            },
            "ceilings": limits,
            "left_out": self.left_out,
        }


@dataclass(frozen=True)
class _Options:
    """What the user asked for, not yet checked; None where the user said nothing."""

    model: str
    compare: str | None
    backends: str | None
    device: str | None
    dtype: str | None
    size: tuple[int, int] | None
    batch: int | None
    rounds: int | None
    json: Path | None
    plots: Path | None


def _prepare(command: str, options: _Options, training: bool = False, **settings: Any) -> _Run:
    """Check all options, and load the network, before anything is measured."""
    from fastden.bench import forms
    from fastden.bench.compare import Settings
    from fastden.bench.machine import Sensors
    from fastden.network.loading import choose_dtype

    device = _device(options.device)
    dtype = choose_dtype(options.dtype or "auto", device, eight_bit=True)
    height, width, batch, rounds = DEFAULTS[command][device.type]
    size = options.size or (height, width)
    if min(size) < 1:
        raise UserError(f"size: {size[0]} {size[1]}; accepted: height and width of at least 1")
    peers = forms.choose_peers(options.compare, *_peers(command, device, dtype))
    backends: tuple[str, ...] = ()
    left_out: dict[str, str] = {}
    if command != "batch":
        backends, left_out = forms.choose_backends(options.backends, device, dtype, training)
    if forms.AUTO in peers:
        same = forms.why_not_automatic(device, dtype)
        if same:
            peers = tuple(name for name in peers if name != forms.AUTO)
            left_out[forms.AUTO] = same
    _check_outputs(options)
    sensors = Sensors.of(device)
    if isinstance(sensors, str) and device.type == "cuda":
        left_out["clocks, power and energy"] = sensors
    return _Run(
        command,
        options.model,
        _load(options.model, device),
        Settings(device, dtype, options.rounds or rounds, **settings),
        size,
        options.batch or batch,
        peers,
        backends,
        options.json,
        options.plots,
        left_out,
        None if isinstance(sensors, str) else sensors,
    )


def _device(name: str | None) -> torch.device:
    from fastden.network.devices import parse_device

    with naming("device"):
        device = parse_device(name)
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"device: {device}; accepted: cpu, cuda")
    return device


def _check_outputs(options: _Options) -> None:
    """Raise where a result could not be written."""
    from fastden.bench.plots import check_folder

    if options.json is not None:
        check_json_target(options.json)
    if options.plots is not None:
        check_folder(options.plots)


def _load(model: str, device: torch.device) -> Denoiser:
    """The network in float32, for inference."""
    import torch

    from fastden.network.model import Denoiser

    with naming("model", remedy="another --device may have more"):
        return Denoiser.from_pretrained(model).to(device, torch.float32).eval()


def _peers(command: str, device: torch.device, dtype: torch.dtype) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The contenders that a command accepts, and those that it takes by itself."""
    import torch

    from fastden.bench.forms import AUTO, COMPOSED, FAST, FUSED_COMPILE, PLAIN
    from fastden.network import int8

    plain = ("eager", "channels_last", "compile")
    if command == "batch":
        return plain, ("channels_last",)
    if command == "model" and device.type == "cpu":
        names = {torch.float32: ("openvino", "onnxruntime"), torch.bfloat16: ("openvino",)}.get(dtype, ())
        rivals = (FUSED_COMPILE, *(name + form for name in names for form in ("", COMPOSED)))
        fast = () if int8.why_not() else (FAST,)
        return (*PLAIN, *rivals, *fast), (*plain, *rivals, *fast)
    if command == "model":
        return (*PLAIN, FUSED_COMPILE, AUTO), (AUTO, *plain, FUSED_COMPILE, "max_autotune")
    # On a GPU the search for the fastest form takes minutes: for the network and for training, not for each operator.
    return PLAIN, PLAIN if command != "ops" and device.type == "cuda" else plain


@app.command()
def ops(
    only: Annotated[str | None, typer.Option("--only", help="Operators, separated by commas; default all.")] = None,
    backward: Annotated[
        bool, typer.Option("--backward", help="Forward with batch statistics, and all gradients.")
    ] = False,
    json: Json = None,
    plots: Plots = None,
    compare: Compare = None,
    backends: Backends = None,
    model: ModelOption = "color",
    device: DeviceOption = None,
    dtype: Dtype = None,
    size: Size = None,
    batch: Batch = None,
    rounds: Rounds = None,
    energy: Annotated[
        float, typer.Option("--energy", min=0, help="On a GPU, seconds for each contender's energy; 0 leaves it out.")
    ] = 1.0,
) -> None:
    """Measure each operator at the shapes that the network gives it, beside the layers that it stands for."""
    import torch

    from fastden.bench import operators
    from fastden.bench.compare import compare as run_all

    options = _Options(model, compare, backends, device, dtype, size, batch, rounds, json, plots)
    run = _prepare("ops", options, training=backward, graphs=True, energy_seconds=energy)
    names = operators.choose(only, backward)
    run.extra = {"operators": names, "backward": backward}
    jobs = operators.jobs(
        run.model, run.size, run.batch, names, run.settings.dtype, run.peers, run.backends, training=backward
    )

    def measure(limits: Mapping[str, float]) -> Iterator[dict[str, Any]]:
        for job, contenders in jobs:
            yield run_all(job, contenders, run.settings, limits, sensors=run.sensors)
            # The next operator is another program: not a recompilation of this one, which would count against a limit.
            torch.compiler.reset()

    run.finish(measure)


@app.command("model")
def network(
    json: Json = None,
    plots: Plots = None,
    compare: Compare = None,
    backends: Backends = None,
    model: ModelOption = "color",
    device: DeviceOption = None,
    dtype: Dtype = None,
    size: Size = None,
    batch: Batch = None,
    rounds: Rounds = None,
    large: Annotated[
        bool, typer.Option("--large", help="A picture of 24 megapixels by tiles too, on a CPU: time and peak memory.")
    ] = False,
) -> None:
    """Measure the whole network at inference."""
    from fastden.bench.compare import compare as run_all
    from fastden.bench.network import inference

    run = _prepare("model", _Options(model, compare, backends, device, dtype, size, batch, rounds, json, plots))
    if large and run.settings.device.type != "cpu":
        raise UserError(f"large: with device {run.settings.device}; accepted: cpu, whose peak memory the system tells")

    def measure(limits: Mapping[str, float]) -> list[dict[str, Any]]:
        with TemporaryDirectory() as folder:
            settings = run.settings
            job, contenders = inference(
                run.model, run.size, run.batch, settings.dtype, run.peers, run.backends, Path(folder)
            )
            result = run_all(job, contenders, settings, limits, sensors=run.sensors)
        if large:
            from fastden.bench.large import measured

            try:
                row = measured(run.model_name, str(settings.dtype).removeprefix("torch."))
            except RuntimeError as failure:  # it must not lose the comparison
                row = {"failed": " ".join(str(failure).split())[:300]}
                print(row["failed"], file=sys.stderr)
            else:
                peak = "" if row["peak_rss_mib"] is None else f", {row['peak_rss_mib']:.0f} MiB at most"
                print(f"{row['height']} x {row['width']} pixels by tiles: {row['seconds']} s{peak}")
            result["large"] = row
        return [result]

    run.finish(measure)


@app.command()
def train(
    json: Json = None,
    plots: Plots = None,
    compare: Compare = None,
    backends: Backends = None,
    model: ModelOption = "color",
    device: DeviceOption = None,
    dtype: Dtype = None,
    size: Size = None,
    batch: Batch = None,
    rounds: Rounds = None,
    graphs: Annotated[
        bool, typer.Option("--graphs", help="On a GPU, time replays of CUDA graphs: without the host's part.")
    ] = False,
) -> None:
    """Measure a training step: forward and backward, float32 weights under autocast, the optimiser left out."""
    from fastden.bench.compare import compare as run_all
    from fastden.bench.network import training

    options = _Options(model, compare, backends, device, dtype, size, batch, rounds, json, plots)
    run = _prepare("train", options, training=True, graphs=graphs)
    if graphs and run.settings.device.type != "cuda":
        raise UserError(f"graphs: device {run.settings.device}; accepted: cuda")
    run.extra["graphs"] = graphs

    def measure(limits: Mapping[str, float]) -> list[dict[str, Any]]:
        job, contenders = training(run.model, run.size, run.batch, run.settings.dtype, run.peers, run.backends)
        return [run_all(job, contenders, run.settings, limits, sensors=run.sensors)]

    run.finish(measure)


@app.command()
def batch(
    json: Json = None,
    plots: Plots = None,
    compare: Compare = None,
    model: ModelOption = "color",
    device: DeviceOption = None,
    dtype: Dtype = None,
    size: Size = None,
    images: Annotated[int | None, typer.Option("--images", min=1, help="Files in the folder.")] = None,
    rounds: Rounds = None,
) -> None:
    """Measure a folder of PNG files from reading to writing: megapixels a second, and how much of it is computing.

    ``fastden denoise`` runs in a process of its own; what it takes to start is measured too, and left out.
    """
    import statistics

    from fastden.bench import files
    from fastden.bench.compare import compare as run_all
    from fastden.bench.timing import Call, Stopwatch

    options = _Options(model, compare, None, device, dtype, size, images, rounds, json, plots)
    run = _prepare("batch", options, repeats=1, warm_up=1)

    def measure(limits: Mapping[str, float]) -> list[dict[str, Any]]:
        watch = Stopwatch(run.settings.device)

        def milliseconds(call: Call) -> float:
            return call.measure() if isinstance(call, files.Command) else watch(call)

        with TemporaryDirectory() as folder:
            job, contenders, command = files.folder_job(
                run.model, model, run.size, run.batch, run.settings.dtype, run.peers, Path(folder)
            )
            result = run_all(job, contenders, run.settings, limits, measure=milliseconds, fetch=files.results)
        if command.whole:
            result["command"] = {
                "seconds": command.whole,
                "start_seconds": command.start,
                "compute_seconds": command.computing,
                "further_start_seconds": command.further_starts,
            }
        if command.whole and "failed" not in result["contenders"]["fastden"]:
            shares = [c / (w - s) for c, w, s in zip(command.computing, command.whole, command.start, strict=True)]
            result["command"]["compute_share"] = statistics.median(shares)
            print(f"computing takes {100 * result['command']['compute_share']:.0f} % of fastden's time")
        return [result]

    run.finish(measure, floors=False)
