"""Programs of torch.export and packages of AOTInductor."""

from __future__ import annotations

from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

import fastden
from fastden.exports.programs import Program
from fastden.exports.weights import collect
from fastden.network.model import Denoiser


def test_a_program_without_fastden(tmp_path: Path) -> None:
    path = fastden.export("color", tmp_path / "color.pt2")
    program = torch.export.load(path)
    named = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert not [name for name in named if "fastden" in name]
    model, network = Denoiser.from_pretrained("color"), program.module()
    for batch, height, width in ((1, 1, 1), (1, 7, 5), (2, 33, 47), (3, 40, 40)):
        image, level = torch.rand(batch, 3, height, width), 0.3 * torch.rand(batch, 1, height, width)
        with torch.no_grad():
            assert (network(image, level) - model(image, level)).abs().max() < 1e-5


def test_composed_does_less() -> None:
    model = Denoiser.from_pretrained("color")
    counts = []
    for composed in (True, False):
        program = Program(collect(model, composed=composed, level=0.1))
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            program(torch.rand(1, 3, 254, 254))
        counts.append(counter.get_total_flops() / 2 / 254**2)
    # By the layers' sizes, and up to 2 % for the padding: 221 thousand multiply-accumulates a pixel, and composed 146,
    # which counts all 16 taps of the head's kernels, though each phase uses 9.
    assert 145e3 < counts[0] < 149e3
    assert 220e3 < counts[1] < 225e3
