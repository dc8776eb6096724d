"""The network as a program of PyTorch: ``torch.export``, and compiled ahead of time by AOTInductor."""

from __future__ import annotations

import shutil
import tempfile
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastden.exports.weights import Weights
from fastden.network.padding import exported_index

if TYPE_CHECKING:
    from fastden.exports.exporter import Request


class Program(nn.Module):
    """The network in PyTorch's own operators, without a branch on the image's size: one graph for all of them.

    Called as ``program(image, sigma)`` with ``sigma`` (N, 1, H, W), or ``program(image)`` where it takes none.

    Args:
        weights: of the network.
        dtype: of weights and activations.
    """

    def __init__(self, weights: Weights, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.composed = weights.composed
        for name, (weight, bias) in weights.pairs.items():
            # Contiguous: torch.export.save warns of buffers in another order.
            self.register_buffer(f"{name}_weight", weight.to(dtype).contiguous())
            self.register_buffer(f"{name}_bias", bias.to(dtype).contiguous())
        self.dtype = dtype

    def forward(self, image: Tensor, sigma: Tensor | None = None) -> Tensor:
        height, width = image.shape[2], image.shape[3]
        x = image if sigma is None else torch.cat([image, sigma], 1)
        for axis in (2, 3):
            x = x.index_select(axis, exported_index(x.shape[axis], x.device))
        y = self._network(x.to(self.dtype)).to(image.dtype)
        # Not a slice: its strides put a guard into the program that failed wherever height or width is 2 more than a
        # multiple of 4 (105 of 231 sizes tried), as in Denoiser.forward.
        return image + F.pad(y, (0, width - y.shape[3], 0, height - y.shape[2]))

    def _pair(self, name: str) -> tuple[Tensor, Tensor]:
        return getattr(self, f"{name}_weight"), getattr(self, f"{name}_bias")

    def _conv(self, name: str, x: Tensor, stride: int = 1, padding: int = 0) -> Tensor:
        return F.conv2d(x, *self._pair(name), stride=stride, padding=padding)

    def _upsample(self, name: str, x: Tensor) -> Tensor:
        return F.conv_transpose2d(x, *self._pair(name), stride=2, padding=1)

    def _bottleneck(self, name: str, x: Tensor) -> Tensor:
        y = F.relu(self._conv(f"{name}_reduce", x))
        y = F.relu(self._conv(f"{name}_conv", y, padding=1))
        return F.relu(self._conv(f"{name}_expand", y) + x)

    def _stem(self, x: Tensor) -> Tensor:
        weight, bias = self._pair("stem")
        inside = F.conv2d(x[:, :, 1:, 1:], weight[0], bias[0], stride=2)
        # The first row's and column's weights have no taps on the row and column before.
        top = F.conv2d(x[:, :, :6, 1:], weight[1][:, :, 1:], bias[1], stride=2)
        left = F.conv2d(x[:, :, 1:, :6], weight[2][..., 1:], bias[2], stride=2)
        corner = F.conv2d(x[:, :, :6, :6], weight[3][:, :, 1:, 1:], bias[3], stride=2)
        return F.relu(torch.cat([torch.cat([corner, left], 2), torch.cat([top, inside], 2)], 3))

    def _network(self, x: Tensor) -> Tensor:
        first = x
        if not self.composed:
            first = self._conv("conv0", x)
            start = F.relu(self._conv("conv1", first, 2, 1))
        skip = self._bottleneck("res1", self._stem(x) if self.composed else start)
        low = self._bottleneck("res2", F.relu(self._conv("conv2", skip, 2, 1)))
        joined = torch.cat([skip, self._upsample("up2", low)], 1)
        features = self._bottleneck("res3", F.relu(self._conv("conv3", joined, padding=1)))
        if self.composed:
            return F.pixel_shuffle(self._conv("head", features, padding=1), 2) + self._conv("head_image", x)
        return self._conv("out", torch.cat([first, self._upsample("up3", features)], 1))


def trace(request: Request) -> torch.export.ExportedProgram:
    """The program, for any batch, height and width."""
    program = Program(request.weights, request.dtype).eval()
    free = torch.export.Dim.DYNAMIC
    # Sizes that are equal, or 1, would be taken for constants.
    # Not random ones: the caller's random numbers go on as if nothing had been exported.
    image = torch.full((2, request.weights.image_channels, 33, 47), 0.5, dtype=torch.float32, device="cpu")
    inputs: tuple[Tensor, ...] = (image,)
    if request.weights.takes_level:
        inputs = (image, image.new_full((2, 1, 33, 47), 0.1))
    shapes = tuple({0: free, 2: free, 3: free} for _ in inputs)
    with torch.no_grad():
        return torch.export.export(program, inputs, dynamic_shapes=shapes)


def save_program(request: Request, path: Path) -> None:
    """Write a program of ``torch.export``."""
    # PyTorch wants the ending.
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".fastden-") as folder:
        made = Path(folder) / "program.pt2"
        torch.export.save(trace(request), made, extra_files=request.about())
        shutil.move(made, path)


def save_compiled(request: Request, path: Path) -> None:
    """Write a package of AOTInductor for this machine's CPU."""
    from torch._inductor import aoti_compile_and_package

    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".fastden-") as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = Path(folder) / "program.pt2"
        aoti_compile_and_package(trace(request), package_path=str(made))
        shutil.move(made, path)
