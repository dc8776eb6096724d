"""Round the weights of the network in 8-bit integers so that the errors of a convolution's sum cancel.

To the nearest code, each weight is rounded as if no other were. But the inputs of a convolution rise and fall together,
so that errors of neighbouring weights may be made to cancel. Weights are rounded one after the other, and those that
are still to come take up the error (Frantar et al., "GPTQ: Accurate post-training quantization for generative
pre-trained transformers", ICLR 2023). Each weight gets one of the two codes next to it. So a bit a weight is kept, with
which the codes are made again from the weights; in a trial, codes further away gained nothing more. The mean of a
convolution's sum does not err. What the rounding is worth is in ``benchmarks/results/int8-parts.json``.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from fastden.network.int8 import Int8Network, QuantizedConvolution, Ranges, Rounding, below

if TYPE_CHECKING:
    from collections.abc import Iterator

#: Windows of inputs that each convolution learns from, over all pictures. The head has the most weights for one result,
#: 4096.
WINDOWS = 32768
#: Share of the mean variance that is added to all: it keeps a matrix of few windows invertible.
DAMPING = 0.01
#: Weights of one result that are rounded before the others take up their errors.
BLOCK = 128


def second_order_rounding(network: Int8Network, inputs: list[Tensor]) -> Ranges:
    """Round the weights of all convolutions, one after the other, and leave the network with them.

    Args:
        network: with the nearest codes.
        inputs: padded inputs (N, C, H, W) of the network.

    Returns:
        ``up.<convolution>`` and ``mean.<convolution>``, which :class:`Int8Network` reads with the ranges.
    """
    rounded: Ranges = {}
    for name in network.convolutions():
        windows = Windows(max(WINDOWS // len(inputs), 1))
        with _recorded(network, name, windows):
            for x in inputs:
                network(x)
        convolution = network.convolutions()[name]
        rounding = rounding_of(convolution, windows)
        convolution.round(rounding)
        rounded |= rounding.as_tensors(name)
    return rounded


class Windows:
    """Mean and covariance of the inputs that one result of a convolution reads, from windows at random places.

    Args:
        number: of windows that each :meth:`see` takes, or all where the input has fewer.
    """

    def __init__(self, number: int) -> None:
        self.number = number
        self.generator = torch.Generator().manual_seed(0)
        self.count = 0
        #: The mean of the first input's windows, rounded: sums of differences from it keep their digits. Codes are
        #: integers, and so their differences: a product's errors in single precision, which lay on one side, go (on an
        #: AMD EPYC they made 3e-5 of a variance).
        self.near: Tensor | None = None
        self.sum = self.products = torch.zeros((), dtype=torch.float64, device="cpu")

    def see(self, convolution: QuantizedConvolution, x: Tensor) -> None:
        """Take windows of an input (N, C, H, W) of codes."""
        stride, padding = (values[0] for values in convolution.geometry[:2])
        rows, columns = convolution.weight.shape[2:]
        views = F.pad(x.float(), (padding,) * 4).unfold(2, rows, stride).unfold(3, columns, stride)
        n, _, height, width = views.shape[:4]
        positions = torch.randperm(n * height * width, generator=self.generator, device="cpu")[: self.number]
        positions, column = positions // width, positions % width
        taken = views.permute(0, 2, 3, 1, 4, 5)[positions // height, positions % height, column].flatten(1)
        if self.near is None:
            self.near = taken.mean(0).round()
        taken = taken - self.near
        self.products = self.products + (taken.T @ taken).double()
        self.sum = self.sum + taken.sum(0, dtype=torch.float64)
        self.count += len(taken)

    def statistics(self) -> tuple[Tensor, Tensor]:
        """Mean (K,) and covariance (K, K), K = C k k, float64."""
        assert self.near is not None
        mean = self.sum / self.count
        return self.near + mean, self.products / self.count - torch.outer(mean, mean)


class _Recorder:
    """Stands in for a convolution, and shows its inputs to ``windows``."""

    def __init__(self, convolution: QuantizedConvolution, windows: Windows) -> None:
        self.convolution, self.windows = convolution, windows

    def __call__(self, x: Tensor) -> Tensor:
        self.windows.see(self.convolution, x)
        return self.convolution(x)

    def add_to_(self, y: Tensor, x: Tensor) -> Tensor:
        self.windows.see(self.convolution, x)
        return self.convolution.add_to_(y, x)


@contextmanager
def _recorded(network: Int8Network, name: str, windows: Windows) -> Iterator[None]:
    """Let one convolution of a network, such as ``"res1.conv"``, show its inputs."""
    *block, part = name.split(".")
    holder = getattr(network, block[0]) if block else network
    convolution = getattr(holder, part)
    setattr(holder, part, _Recorder(convolution, windows))
    try:
        yield
    finally:
        setattr(holder, part, convolution)


def rounding_of(convolution: QuantizedConvolution, windows: Windows) -> Rounding:
    """How to round the weights of a convolution that saw these inputs."""
    mean, covariance = windows.statistics()
    exact = convolution.exact()
    up = chosen_above(exact.flatten(1), covariance).view_as(exact)
    missing = (exact - below(exact) - up.double()).flatten(1)
    zero = convolution.zero.repeat_interleave(missing.shape[1] // len(convolution.zero))
    return Rounding(up, (missing @ (mean - zero)).float())


def chosen_above(exact: Tensor, covariance: Tensor) -> Tensor:
    """Which weights get the code above them.

    Args:
        exact: (O, K), float64, in units of codes.
        covariance: (K, K), float64, of the inputs that the weights multiply.

    Returns:
        (O, K), bool.
    """
    covariance = covariance.clone()
    diagonal = covariance.diagonal()
    damping = DAMPING * diagonal.mean().clamp(min=1e-12)
    diagonal += damping
    # Weights of the strongest inputs first: those behind them are left to take up their errors.
    order = diagonal.argsort(descending=True)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(covariance[order][:, order]))
    factor = torch.linalg.cholesky(inverse, upper=True)
    left, floor = exact[:, order], below(exact[:, order])
    up = torch.zeros_like(left, dtype=torch.bool)
    for first in range(0, left.shape[1], BLOCK):
        last = min(first + BLOCK, left.shape[1])
        errors = torch.zeros_like(left[:, first:last])
        for column in range(first, last):
            chosen = left[:, column] - floor[:, column] > 0.5
            error = (left[:, column] - floor[:, column] - chosen.to(left)) / factor[column, column]
            left[:, column + 1 : last] -= torch.outer(error, factor[column, column + 1 : last])
            errors[:, column - first], up[:, column] = error, chosen
        left[:, last:] -= errors @ factor[first:last, last:]
    return up[:, order.argsort()]
