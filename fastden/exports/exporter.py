"""``fastden.export``: a network as a file for other programs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from numbers import Real
from pathlib import Path
from typing import Any, get_args

import torch

from fastden.choices import FileFormat, Layout, Precision
from fastden.exports.cards import license_of
from fastden.exports.weights import Weights, collect
from fastden.network.fused import FusedDenoiser
from fastden.network.loading import Model, load_exact
from fastden.network.model import Denoiser
from fastden.whole_files import check_target, whole_file, write_bytes, write_synced

#: The name by which the noise estimator is exported.
ESTIMATOR = "noise"
DTYPES: dict[str, torch.dtype] = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
#: What each format can hold. ONNX runtimes on CPUs have no bfloat16 convolution.
PRECISIONS: dict[str, tuple[str, ...]] = {
    "onnx": ("fp32", "fp16", "fp16-weights", "int8"),
    "dtmodel": ("fp32", "fp16"),
    "pt2": ("fp32", "fp16", "bf16"),
    "aoti": ("fp32", "fp16", "bf16"),
}
#: Format by the file name's ending; AOTInductor's packages end in .pt2 too, and are asked for by name.
ENDINGS = {".onnx": "onnx", ".pt2": "pt2", ".dtmodel": "dtmodel"}
#: The version of ONNX's operators, unless another is asked for.
OPSET = 17


@dataclass(frozen=True)
class Request:
    """A checked request to :func:`export`.

    Args:
        name: of the model, for the file's metadata.
        card: the model's card, or None.
        weights: of the network.
        precision, layout, opset: as of :func:`export`.
        sigma: the built-in noise level, 0-255, or None.
    """

    name: str
    card: str | None
    weights: Weights
    precision: str
    layout: Layout
    opset: int
    sigma: float | None

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of weights and activations."""
        return DTYPES[self.precision]

    @property
    def license(self) -> str | None:
        """The licence of the weights, as the model's card states it; None where it does not."""
        return license_of(self.card or "")

    def about(self) -> dict[str, str]:
        """The file's metadata: what it is, and what its inputs mean."""
        import fastden

        level = "none"
        if self.weights.takes_level:
            level = "the noise's standard deviation on the scale of the image, sigma / 255: a number, or a map"
        elif self.sigma is not None:
            level = f"built in: {self.sigma:g} on the scale 0-255"
        colours = "gray" if self.weights.image_channels == 1 else "RGB"
        about = {
            "model": self.name,
            "version": fastden.__version__,
            "image": f"{colours}, [0, 1], any height and width; the result is not clipped",
            "noise_level": level,
        }
        return about | ({"license": self.license} if self.license else {})


def export(
    model: Model,
    output: str | Path,
    *,
    format: FileFormat | None = None,
    precision: Precision = "fp32",
    layout: Layout = "separate",
    composed: bool = True,
    sigma: float | None = None,
    opset: int | None = None,
    overwrite: bool = False,
) -> Path:
    """Write a network to a file that other programs run.

    The network in the file takes any batch, height and width of at least 1: padding and cropping are inside. It does
    not clip its result. A network for gray images takes and gives one channel in place of RGB.

    Args:
        model: a bundled name (:func:`fastden.models`), a folder, a Hub id, or a network. ``"noise"`` is the
            network of :func:`fastden.estimate_noise`, as ONNX in float32: it judges cells of 8 x 8 pixels, and the
            program that runs it fits the curve through them, as :func:`fastden.network.level.robust_curve` does, and
            multiplies it by :func:`fastden.network.level.white_factor`.
        output: the file.
        format: None takes it from the file's name (``.onnx``, ``.pt2``, ``.dtmodel``). Else

            - ``"onnx"``: for ONNX Runtime, OpenVINO, TensorRT and others. Inputs ``input`` (N, 3, H, W), float32 RGB in
              [0, 1], and ``sigma`` (1 or N, 1, 1 or H, 1 or W), float32 on the scale of ``input`` (25 of 255 is
              25 / 255); output ``output`` (N, 3, H, W), float32;
            - ``"dtmodel"``: a model package of darktable (an archive with that ONNX file, its description and licence).
              darktable sends RGB, and sets the noise level to 25 of 255; ``sigma`` builds in another;
            - ``"pt2"``: a program of ``torch.export``, loaded by ``torch.export.load`` without fastden, called as
              ``program.module()(image, sigma)`` with ``sigma`` (N, 1, H, W);
            - ``"aoti"``: a package of AOTInductor for this machine's CPU, for C++ and Python without fastden, called
              likewise. Needs a C++ compiler.
        precision: of weights and activations. Images are float32 in all: the network's correction, which is small, is
            added to the float32 image. ``"bf16"`` only for ``pt2`` and ``aoti``. ``"fp16-weights"`` (ONNX) stores the
            weights in float16 and computes in float32: half the size, for processors without arithmetic in float16.
            ``"int8"`` (ONNX) quantises the inner convolutions by ONNX Runtime, which it needs; ranges come from the
            photographs of scikit-image with noise.
        layout: of ONNX, ``"separate"`` inputs, or ``"dpir"``: one input (N, 4, H, W) with the noise level as the fourth
            channel, as VapourSynth's vs-mlrt expects it from a DPIR model.
        composed: run conv1 o conv0 and out o cat(conv0, up3) as single convolutions, a third fewer operations;
            False writes the layers as they were trained, batch normalisation folded.
        sigma: a noise level to build in, **on the scale 0-255**; the file then takes the image alone.
        opset: of ``onnx`` and ``dtmodel``, 13 to 23; None is 17.
        overwrite: replace an existing file.

    Returns:
        The file's path.

    Raises:
        ValueError, TypeError: naming the argument, what it was and what is accepted.
        UserError: the file exists or cannot be written.
        ModuleNotFoundError: a package is missing; the message has the command that installs it.
    """
    if not isinstance(output, str | Path):
        raise TypeError(f"output: {type(output).__name__}; accepted: the path of a file")
    target = Path(output)
    kind = _format(format, target)
    if precision not in PRECISIONS[kind]:
        raise ValueError(f"precision: {precision!r}; accepted for {kind}: {', '.join(PRECISIONS[kind])}")
    if layout not in get_args(Layout):
        raise ValueError(f"layout: {layout!r}; accepted: {', '.join(get_args(Layout))}")
    if layout == "dpir" and kind != "onnx":
        raise ValueError(f"layout: 'dpir' with {kind}; accepted: with onnx")
    if opset is not None and kind not in ("onnx", "dtmodel"):
        raise ValueError(f"opset: {opset!r} with {kind}; accepted: with onnx and dtmodel")
    opset = OPSET if opset is None else opset
    if sigma is not None and (isinstance(sigma, bool) or not isinstance(sigma, Real)):
        raise TypeError(f"sigma: {type(sigma).__name__}; accepted: a number from 0 to 255, or None")
    needs = {"onnx": kind in ("onnx", "dtmodel"), "onnxruntime": precision == "int8"}
    for package, needed in needs.items():
        if needed and find_spec(package) is None:
            what = f"precision: {precision}" if package == "onnxruntime" else f"format: {kind}"
            raise ModuleNotFoundError(f"{what} needs the package {package}; install: pip install 'fastden[export]'")
    check_target(target, overwrite)
    if isinstance(model, str) and model == ESTIMATOR:
        settings = {"format": kind, "precision": precision, "layout": layout, "composed": composed, "sigma": sigma}
        return _export_estimator(settings, target, opset, overwrite)
    network, name, card = _load(model)
    if kind == "dtmodel" and network.image_channels == 1:  # darktable sends three channels
        raise ValueError("format: 'dtmodel' with a network for gray images; accepted: one for RGB")
    level = None if sigma is None else sigma / 255
    request = Request(name, card, collect(network, composed=composed, level=level), precision, layout, opset, sigma)
    with whole_file(target, overwrite=overwrite) as temporary:
        _WRITERS[kind](request, temporary)
    return target


def _export_estimator(settings: dict[str, Any], target: Path, opset: int, overwrite: bool) -> Path:
    from fastden.exports.noise_graph import build_estimator
    from fastden.inference.estimate import load_estimator

    only = {"format": "onnx", "precision": "fp32", "layout": "separate", "composed": True, "sigma": None}
    for name, value in settings.items():
        if value != only[name]:
            raise ValueError(f"{name}: {value!r} with the model 'noise'; accepted: {only[name]!r}")
    import fastden

    about = {"model": ESTIMATOR, "version": fastden.__version__, "image": "RGB, [0, 1], of 8 x 8 pixels or more"}
    made = build_estimator(load_estimator(), opset=opset, about=about)
    write_bytes(target, bytes(made.SerializeToString()), overwrite=overwrite)
    return target


def _format(format: str | None, target: Path) -> str:
    if format is None:
        if target.suffix.lower() not in ENDINGS:
            accepted = f"a name that ends in {', '.join(ENDINGS)}, or format"
            raise ValueError(f"output: {str(target)!r} does not tell the format; accepted: {accepted}")
        return ENDINGS[target.suffix.lower()]
    if format not in get_args(FileFormat):
        raise ValueError(f"format: {format!r}; accepted: {', '.join(get_args(FileFormat))}")
    return format


def _load(model: Any) -> tuple[Denoiser | FusedDenoiser, str, str | None]:
    """The network, its name and its card."""
    from fastden.network.hub import CARD_FILE, files_of

    if isinstance(model, Denoiser | FusedDenoiser):
        return model, "custom", None
    if not isinstance(model, str | Path):
        raise TypeError(f"model: {type(model).__name__}; accepted: a name, folder, Hub id, Denoiser or FusedDenoiser")
    folder = files_of(model, card=True)
    network, card = load_exact(folder, torch.float64), folder / CARD_FILE
    return network, Path(model).name, card.read_text(encoding="utf-8") if card.is_file() else None


def _write_onnx(request: Request, path: Path) -> None:
    write_synced(path, onnx_bytes(request))


def onnx_bytes(request: Request) -> bytes:
    """The ONNX file."""
    from fastden.exports.onnx_graph import build

    options: dict[str, Any] = {"layout": request.layout, "opset": request.opset, "about": request.about()}
    half, stored = request.precision == "fp16", request.precision == "fp16-weights"
    made = build(request.weights, half=half, stored_half=stored, **options)
    if request.precision == "int8":
        from fastden.exports.quantization import quantize

        made = quantize(made, request.sigma)
    return bytes(made.SerializeToString())


def _write_darktable(request: Request, path: Path) -> None:
    from fastden.exports.darktable import package

    write_synced(path, package(request, onnx_bytes(request)))


def _write_program(request: Request, path: Path) -> None:
    from fastden.exports.programs import save_program

    save_program(request, path)


def _write_compiled(request: Request, path: Path) -> None:
    from fastden.exports.programs import save_compiled

    save_compiled(request, path)


_WRITERS: dict[str, Callable[[Request, Path], None]] = {
    "onnx": _write_onnx,
    "dtmodel": _write_darktable,
    "pt2": _write_program,
    "aoti": _write_compiled,
}
