"""The network in float32, bfloat16 and 8-bit integers, and OpenVINO's 8 bits beside them: seconds and PSNR.

    python benchmarks/int8.py --calibration ../shared/data/train/free --quality ../shared/data/eval/kodak24 \\
        --json benchmarks/results/int8.json

All run the same weights on the same pictures, in turn. A bundled model has the ranges that ship with it. NNCF
(``pip install nncf``) makes OpenVINO's 8-bit form with its preset "mixed", calibrated on noisy crops of the
``--calibration`` pictures, from the plain network: NNCF 3.4 fails on the composed one. The results
file holds an entry for each processor; a run on another machine adds its own.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from fp8 import psnr, with_noise
from torch import Tensor

from fastden import Denoiser, FusedDenoiser, calibrate, fuse
from fastden.bench import forms
from fastden.bench.images import photograph
from fastden.bench.machine import describe, report
from fastden.bench.scripts import command
from fastden.network import int8, onednn
from fastden.training.data import central_crops, find_photographs

Call = Callable[[Tensor], Tensor]
#: Noise level of the timed picture, and of the comparison, 0-255 scale.
SIGMA, SIGMAS = 25.0, (15.0, 25.0, 50.0)


@command
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="color")
    parser.add_argument("--calibration", type=Path, required=True, help="folder of photographs")
    parser.add_argument("--quality", type=Path, help="folder of photographs to take the PSNR on")
    parser.add_argument("--every", type=int, default=1, help="of them every n-th")
    parser.add_argument("--size", type=int, nargs=2, default=(512, 768))
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--no-openvino", action="store_true")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    files = [] if arguments.quality is None else find_photographs(arguments.quality)[:: arguments.every]
    model = Denoiser.from_pretrained(arguments.model)
    pictures = central_crops([arguments.calibration], 32)
    if model.int8_ranges is None:  # bundled models are judged with the ranges that ship
        calibrate(model, pictures)
    size = tuple(arguments.size)
    with tempfile.TemporaryDirectory() as folder:
        calls = _calls(model, pictures, size, Path(folder), not arguments.no_openvino)
        entry: dict[str, Any] = {
            "machine": describe(torch.device("cpu")),
            "threads": torch.get_num_threads(),
            "model": arguments.model,
            "size": list(size),
            **_times(calls, size, arguments.repeats),
        }
    if arguments.quality is not None:
        entry |= {"every": arguments.every, "pictures": len(files)}
        entry["kodak24" if "kodak" in arguments.quality.name else arguments.quality.name] = _quality(
            model, files, pictures, not arguments.no_openvino
        )
    report(entry, arguments.json)


def _own(model: Denoiser) -> dict[str, FusedDenoiser]:
    networks = {"float32": fuse(model)}
    if onednn.native_bf16():
        networks["bfloat16"] = fuse(model, torch.bfloat16)
    if not int8.why_not():
        networks["int8"] = fuse(model, quality="fast")
    return networks


def _calls(
    model: Denoiser, pictures: list[Tensor], size: tuple[int, ...], folder: Path, rivals: bool
) -> dict[str, Call]:
    calls: dict[str, Call] = {name: partial(network, sigma=SIGMA / 255) for name, network in _own(model).items()}
    if rivals:
        x = torch.rand(1, 3, *size)
        path = forms.export_onnx(fuse(model), x, folder / "composed.onnx")
        dtype = torch.bfloat16 if onednn.native_bf16() else torch.float32
        calls[f"openvino {dtype}".replace("torch.", "")] = forms.openvino(path, dtype)
        # It is calibrated at the size that it runs at: the exported file has no other.
        path = forms.export_onnx(model, x, folder / "plain.onnx")
        calls["openvino int8"] = forms.openvino(_quantized(path, _cut(pictures, size), folder), torch.float32)
    return calls


def _cut(pictures: list[Tensor], size: tuple[int, ...]) -> list[np.ndarray[Any, Any]]:
    """The calibration's noisy pictures, mirrored up to ``size``, at the level of the exported file."""
    noisy = []
    generator = torch.Generator().manual_seed(0)
    for picture in pictures:
        rows = torch.arange(size[0]) % (2 * picture.shape[2])
        columns = torch.arange(size[1]) % (2 * picture.shape[3])
        rows, columns = (
            torch.minimum(rows, 2 * picture.shape[2] - 1 - rows),
            torch.minimum(columns, 2 * picture.shape[3] - 1 - columns),
        )
        clean = picture[:, :, rows][:, :, :, columns]
        noisy.append((clean + SIGMA / 255 * torch.randn(clean.shape, generator=generator)).numpy())
    return noisy


def _quantized(path: Path, pictures: list[np.ndarray[Any, Any]], folder: Path) -> Path:
    import nncf
    import openvino as ov

    network = ov.Core().read_model(str(path))
    quantized = nncf.quantize(network, nncf.Dataset(pictures), preset=nncf.QuantizationPreset.MIXED, subset_size=16)
    target = folder / "int8.xml"
    ov.save_model(quantized, str(target))
    return target


def _times(calls: dict[str, Call], size: tuple[int, ...], repeats: int) -> dict[str, Any]:
    # Not numbers at random: OpenVINO's ranges are those of noisy photographs.
    noisy = photograph(*size)
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    results: dict[str, Tensor] = {}
    with torch.inference_mode():
        for repeat in range(repeats + 1):  # the first call packs weights
            for name, call in calls.items():
                start = time.perf_counter()
                results[name] = call(noisy)
                if repeat:
                    seconds[name].append(time.perf_counter() - start)
    medians = {name: round(median(values), 4) for name, values in seconds.items()}
    wanted = results["float32"]
    return {
        "seconds": medians,
        "slower_than_int8": {name: round(value / medians["int8"], 3) for name, value in medians.items()}
        if "int8" in medians
        else None,
        "relative_error": {
            name: round(float((result - wanted).norm() / (wanted - noisy).norm()), 5)
            for name, result in results.items()
        },
    }


def _quality(
    model: Denoiser, files: list[Path], calibration: list[Tensor], rivals: bool
) -> dict[str, dict[str, float]]:
    """Mean PSNR in dB by noise level and form; OpenVINO's at level 25 alone, on pictures of one size."""
    means: dict[str, dict[str, float]] = {}
    quantized: dict[tuple[int, ...], Call] = {}
    own = _own(model)
    with tempfile.TemporaryDirectory() as scratch, torch.inference_mode():
        for sigma in SIGMAS:
            scores: dict[str, list[float]] = {}
            for index, file in enumerate(files):
                clean, x = with_noise(file, sigma, index)
                results = {name: network(x, sigma / 255) for name, network in own.items()}
                if rivals and sigma == SIGMA:
                    size = tuple(clean.shape[2:])
                    if size not in quantized:
                        directory = Path(scratch) / "x".join(map(str, size))
                        directory.mkdir()
                        path = forms.export_onnx(model, clean, directory / "plain.onnx")
                        path = _quantized(path, _cut(calibration, size), directory)
                        quantized[size] = forms.openvino(path, torch.float32)
                    results["openvino int8"] = quantized[size](x)
                for name, result in results.items():
                    scores.setdefault(name, []).append(psnr(result, clean))
            means[f"{sigma:g}"] = {name: round(float(np.mean(values)), 4) for name, values in scores.items()}
    return means


if __name__ == "__main__":
    main()
