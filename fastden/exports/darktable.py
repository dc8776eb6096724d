"""A model package of darktable: ``ID/model.onnx`` with ``ID/config.json``, which describes it, and its licence.

The form is that of the packages of the darktable-ai project: https://github.com/darktable-org/darktable-ai. darktable's
denoiser gives a network tiles in sRGB, and a second input, where it has one, the constant 25 / 255.
"""

from __future__ import annotations

import io
import json
import re
from typing import TYPE_CHECKING, Any
from zipfile import ZIP_DEFLATED, ZipFile, ZipInfo

from fastden.exports.cards import section, summary

if TYPE_CHECKING:
    from fastden.exports.exporter import Request

PAPER = "https://arxiv.org/abs/1706.04284"
#: darktable sets a two-input network's noise level to this, on the scale 0-255.
DARKTABLE_SIGMA = 25


def package(request: Request, onnx_file: bytes) -> bytes:
    """The archive.

    Args:
        request: of the export.
        onnx_file: the network.
    """
    config = describe(request)
    files = {"config.json": json.dumps(config, indent=4, ensure_ascii=False).encode() + b"\n", "model.onnx": onnx_file}
    if request.card is not None:
        files["README.md"] = request.card.encode()
    archive = io.BytesIO()
    with ZipFile(archive, "w", ZIP_DEFLATED) as packed:
        for name, data in sorted(files.items()):
            # A fixed date: the same model gives the same file.
            packed.writestr(ZipInfo(f"{config['id']}/{name}", (1980, 1, 1, 0, 0, 0)), data, ZIP_DEFLATED)
    return archive.getvalue()


def describe(request: Request) -> dict[str, Any]:
    """``config.json``: every statement about licence and data is the model card's."""
    import fastden

    card = request.card or ""
    name = re.sub(r"[^a-z0-9]+", "-", request.name.lower()).strip("-") or "custom"
    if request.weights.takes_level:
        sentence = f"takes the noise level as a second input, which darktable sets to {DARKTABLE_SIGMA} of 255"
    elif request.sigma is not None:
        name = f"{name}-{request.sigma:g}".replace(".", "-")
        sentence = f"made for noise of standard deviation {request.sigma:g} of 255"
    else:
        sentence = "blind: takes no noise level"
    data = " ".join(section(card, "Data").split())
    return {
        "id": f"denoise-fastden-{name}",
        "name": f"fastden {request.name}",
        "description": f"fastden's denoiser; {sentence}",
        "task": "denoise",
        "arch": "fastden",
        "backend": "onnx",
        "version": fastden.__version__,
        "tiling": True,
        "num_inputs": 2 if request.weights.takes_level else 1,
        "model_card": {
            "long_description": summary(card) or "no model card",
            "scope": "single-image denoising",
            "paper": PAPER,
            "license": request.license or "not stated",
            "training_data": data or "not stated",
            "training_data_license": "by source, as listed in training_data" if data else "not stated",
            "notes": " ".join(section(card, "Limits").split()) or "not stated",
        },
    }
