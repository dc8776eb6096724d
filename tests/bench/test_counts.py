"""The counts of arithmetic against PyTorch's own counter."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from fastden import Denoiser
from fastden.bench import counts, operators

CASES = [part for parts in operators.OPERATORS.values() for part in parts]


@pytest.mark.parametrize("colours", [1, 3])
@pytest.mark.parametrize("noise_level_input", [True, False])
@pytest.mark.parametrize("composed", [True, False])
def test_whole_network(noise_level_input: bool, composed: bool, colours: int) -> None:
    # Shapes without data: a megapixel takes no time.
    with FakeTensorMode():
        model = Denoiser(noise_level_input, colours, composed=composed).eval()
        x = torch.empty(1, colours, 1022, 1022)
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            model(x, 0.1 if noise_level_input else None)
    macs = (counts.COMPOSED_MACS if composed else counts.PLAIN_MACS).of(model.conv0.in_channels, colours)
    # The head's 4x4 kernels hold nine taps that are not zero, and PyTorch multiplies by all sixteen.
    zeros = (16 - 9) * 256 * colours if composed else 0
    # Borders: conv0 and out are not padded, and the network works on two pixels more in each direction.
    assert counter.get_total_flops() == pytest.approx(2 * (macs + zeros) * 1024**2, rel=0.01)


@pytest.mark.parametrize("part", CASES)
def test_plain_form_of_each_part(part: str) -> None:
    model = Denoiser().eval()
    operator = next(name for name, parts in operators.OPERATORS.items() if part in parts)
    case = next(case for case in operators.cases(model, (62, 62), 1, [operator]) if case.part == part)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        y = case.plain(*case.inputs)
    count = (counts.PARTS | counts.UNITS)[part]
    ends = part in ("stem", "head")
    assert counter.get_total_flops() == pytest.approx(2 * count.plain.of(4) * 64**2, rel=0.02 if ends else 0)
    values = y.numel() + sum(tensor.numel() for tensor in case.inputs)
    # stem and head read the image with its padding.
    assert values == pytest.approx(count.values.of(4) * 64**2, rel=0.05 if ends else 0)
