"""Rearranged kernels give what the originals give."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from fastden.algebra import image_phases, paired_stem, phase_weights, separated_head, unshuffled_weight
from fastden.network.tiles import join_phases, tile_regions


@pytest.mark.parametrize("zero_channels", [0, 1])
@pytest.mark.parametrize(("kernel", "taps"), [(7, 4), (9, 5), (4, 2)])
def test_stride_two_on_pixel_unshuffle(kernel: int, taps: int, zero_channels: int) -> None:
    x = torch.randn(2, 3, 20, 26, dtype=torch.float64)
    weight = torch.randn(5, 3, kernel, kernel, dtype=torch.float64)
    folded = F.pixel_unshuffle(F.pad(x, (0, 0, 0, 0, 0, zero_channels)), 2)
    got = F.conv2d(folded, unshuffled_weight(weight, taps, zero_channels))
    # The window of 2 * taps pixels may be larger than the kernel: fewer positions then.
    expected = F.conv2d(x, weight, stride=2)[:, :, : got.shape[2], : got.shape[3]]
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("zero_channels", [0, 1])
def test_the_stem_on_pairs(zero_channels: int) -> None:
    weight = torch.randn(4, 5, 3, 7, 7, dtype=torch.float64)
    expected = unshuffled_weight(weight.flatten(0, 1), 4, zero_channels).unflatten(0, (4, 5))
    assert torch.equal(paired_stem(weight, zero_channels), expected)


def test_image_phases() -> None:
    x = torch.randn(1, 4, 24, 20, dtype=torch.float64)
    weight = torch.randn(3, 4, 7, 7, dtype=torch.float64)
    shifted = F.pad(x, (1, 1, 1, 1))
    phases = F.conv2d(F.pixel_unshuffle(shifted, 2), unshuffled_weight(image_phases(weight), 5, 0))
    torch.testing.assert_close(F.pixel_shuffle(phases, 2), F.conv2d(x, weight), rtol=0, atol=1e-12)


@pytest.mark.parametrize("size", [(1, 1), (1, 6), (5, 4)], ids=str)
def test_transposed_convolution_as_four_phases(size: tuple[int, int]) -> None:
    x = torch.randn(2, 6, *size, dtype=torch.float64)
    weight = torch.randn(6, 3, 4, 4, dtype=torch.float64)
    joined = join_phases(F.conv2d(x, torch.cat(phase_weights(weight)), padding=1))
    assert joined.is_contiguous(memory_format=torch.channels_last)
    expected = F.conv_transpose2d(x, weight, stride=2, padding=1)
    torch.testing.assert_close(joined, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("channels", [1, 3])
def test_head_by_rows(channels: int) -> None:
    """Only the taps that a phase of a composed head uses may be non-zero."""
    weight = torch.randn(channels, 2, 2, 8, 4, 4, dtype=torch.float64)
    weight[:, 0, :, :, 3] = weight[:, 1, :, :, 0] = 0
    weight[:, :, 0, :, :, 3] = weight[:, :, 1, :, :, 0] = 0
    weight = weight.reshape(4 * channels, 8, 4, 4)
    x = torch.randn(2, 8, 9, 7, dtype=torch.float64)
    rows, merge = separated_head(weight)
    assert len(rows) % 16 == 0
    got = F.conv2d(F.conv2d(x, rows, padding=(0, 1)), merge, padding=(1, 0))
    torch.testing.assert_close(got, F.conv2d(x, weight, padding=1), rtol=0, atol=1e-12)


@pytest.mark.parametrize("inputs", [2, 5, 63, 64, 65, 200, 257])
def test_tile_regions_hold_what_each_output_reads(inputs: int) -> None:
    outputs, before, behind = inputs - 1, 2, 3
    regions = tile_regions(outputs, inputs, 64, before, behind)
    assert [start for start, *_ in regions] == [0, *[stop for _, stop, *_ in regions[:-1]]]
    assert regions[-1][1] == outputs
    for start, stop, first, last in regions:
        assert 0 <= first <= max(start - before, 0)
        assert min(stop + behind, inputs) <= last <= inputs
    assert len({last - first for *_, first, last in regions}) == 1
