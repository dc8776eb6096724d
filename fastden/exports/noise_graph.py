"""The noise estimator's network as an ONNX graph; the curve through its cells is fitted by the program that runs it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from fastden.exports.onnx_graph import Graph, check_opset
from fastden.network.level import CELL, CLIPPED, FLOOR, NoiseEstimator

if TYPE_CHECKING:
    import onnx
    from torch import nn

#: Channels of the output, in the order of :class:`fastden.network.level.Cells`.
CELLS = ("log_level", "log_variance", "coarseness", "brightness", "usable")


def build_estimator(estimator: NoiseEstimator, *, opset: int = 17, about: dict[str, str]) -> onnx.ModelProto:
    """The ONNX model, float32.

    Its input ``input`` is (N, 3, H, W), RGB in [0, 1], H and W at least 8; its output ``cells`` is (N, 5, H // 8,
    W // 8) with the channels :data:`CELLS`, ``usable`` being 1 or 0.

    Args:
        estimator: the network.
        opset: of the operators, 13 to 23.
        about: the file's metadata.

    Raises:
        ValueError: another opset.
    """
    from onnx import TensorProto, helper

    check_opset(opset)
    graph = _Estimator()
    graph.cells(estimator)
    inputs = [helper.make_tensor_value_info("input", TensorProto.FLOAT, ["batch", 3, "height", "width"])]
    size: list[str | int | None] = ["batch", len(CELLS), "rows", "columns"]
    outputs = [helper.make_tensor_value_info("cells", TensorProto.FLOAT, size)]
    return graph.model("fastden-noise", inputs, outputs, opset, about)


class _Estimator(Graph):
    """The estimator's graph."""

    def number(self, value: float) -> str:
        return self.constant(np.array(value, np.float32))

    def average(self, value: str, step: int) -> str:
        return self.node("AveragePool", value, kernel_shape=[step] * 2, strides=[step] * 2) if step > 1 else value

    def largest(self, value: str) -> str:
        return self.node("MaxPool", value, kernel_shape=[CELL] * 2, strides=[CELL] * 2)

    def conv(self, value: str, weight: Any, bias: Any = None) -> str:
        """A convolution; what is beyond the border is as the border."""
        side = weight.shape[2] // 2
        if side:
            pads = self.integers([0, 0, side, side, 0, 0, side, side])
            value = self.node("Pad", value, pads, mode="edge")
        parameters = [self.constant(weight.detach().contiguous().numpy())]
        if bias is not None:
            parameters.append(self.constant(bias.detach().numpy()))
        return self.node("Conv", value, *parameters, kernel_shape=list(weight.shape[2:]))

    def cells(self, estimator: NoiseEstimator) -> None:
        """:meth:`NoiseEstimator.forward`."""
        from onnx import TensorProto

        size = self.shape("input", 2, 4)
        cell = self.integer(CELL)
        whole = self.node("Mul", self.node("Div", size, cell), cell)
        x = self.node("Slice", "input", self.integers([0, 0]), whole, self.integers([2, 3]))
        features = []
        banks: list[nn.Conv2d] = list(estimator.banks)  # type: ignore[arg-type]
        for step, bank in zip((1, 2, 4), banks, strict=True):
            response = self.conv(self.average(x, step), bank.weight - bank.weight.mean((2, 3), keepdim=True))
            energy = self.average(self.node("Mul", response, response), CELL // step)
            log = self.node("Log", self.node("Add", energy, self.number(FLOOR**2)))
            features.append(self.node("Add", self.node("Mul", log, self.number(0.5)), self.number(4.0)))
        features.append(self.node("Sub", self.average(x, CELL), self.number(0.5)))
        value = self.node("Concat", *features, axis=1)
        for layer in estimator.trunk:
            parameters: Any = layer
            has_weights = hasattr(layer, "weight")
            value = self.conv(value, parameters.weight, parameters.bias) if has_weights else self.node("Relu", value)
        log_level = self.node("Sub", self.slice(value, 1, 0, 1), self.number(4.0))
        log_variance = self.node("Clip", self.slice(value, 1, 1, 2), self.number(-6.0), self.number(4.0))
        coarseness = self.node("Sub", self.slice(value, 1, 2, 3), self.number(0.5))
        red, green, blue = (self.slice(x, 1, index, index + 1) for index in range(3))
        gray = self.node("Div", self.node("Add", self.node("Add", red, green), blue), self.number(3.0))
        brightness = self.average(gray, CELL)
        flat = self.node("Equal", self.largest(gray), self.node("Neg", self.largest(self.node("Neg", gray))))
        above = self.node("Greater", brightness, self.number(CLIPPED))
        below = self.node("Less", brightness, self.number(1 - CLIPPED))
        usable = self.node("And", self.node("Not", flat), self.node("And", above, below))
        parts = (log_level, log_variance, coarseness, brightness, self.node("Cast", usable, to=TensorProto.FLOAT))
        self.node("Concat", *parts, axis=1, output="cells")
