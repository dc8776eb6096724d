"""The network as an ONNX graph of standard operators, for any batch, height and width.

Written node by node: ``torch.onnx.export`` of PyTorch 2.13 fails on a remainder by an image's size, which the padding
needs. The padding is an index, since ONNX's own (Pad, mode reflect) refuses images that are smaller than it; 1x1 works.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from fastden.algebra import BORDER
from fastden.exports.weights import Weights
from fastden.network.padding import ALIGNMENT

if TYPE_CHECKING:
    import onnx

    from fastden.choices import Layout

#: Opsets that the graph can be written in: its operators have one form in all of them.
OPSETS = (13, 23)


def build(
    weights: Weights,
    *,
    layout: Layout = "separate",
    half: bool = False,
    stored_half: bool = False,
    opset: int = 17,
    about: dict[str, str],
) -> onnx.ModelProto:
    """The ONNX model.

    Args:
        weights: of the network.
        layout: ``"separate"``: inputs ``input`` (N, 3, H, W) and, where the weights take the level, ``sigma``
            (N or 1, 1, H or 1, W or 1) on the scale of ``input``. ``"dpir"``: one input (N, 4, H, W) whose last channel
            is the level. The output ``output`` is (N, 3, H, W). All float32.
        half: weights and activations in float16. Inputs and output stay float32, and the network's correction is added
            to the float32 image.
        stored_half: weights in float16, which are cast to float32 before they are used.
        opset: of the operators.
        about: the file's metadata.

    Raises:
        ValueError: another opset; layout ``"dpir"`` without a noise level.
    """
    from onnx import TensorProto, helper

    check_opset(opset)
    if layout == "dpir" and not weights.takes_level:
        raise ValueError("layout: 'dpir' with a network that takes no noise level; accepted: 'separate'")
    graph = _Network(weights, half, stored_half)
    channels = weights.image_channels
    size: list[str | int | None] = ["batch", channels, "height", "width"]
    inputs = [helper.make_tensor_value_info("input", TensorProto.FLOAT, size)]
    image = source = "input"
    if layout == "dpir":
        with_level: list[str | int | None] = ["batch", channels + 1, "height", "width"]
        inputs = [helper.make_tensor_value_info("input", TensorProto.FLOAT, with_level)]
        image = graph.slice("input", 1, 0, channels)
    elif weights.takes_level:
        level_size: list[str | int | None] = ["sigma_batch", 1, "sigma_height", "sigma_width"]
        inputs.append(helper.make_tensor_value_info("sigma", TensorProto.FLOAT, level_size))
        pieces = graph.shape("input", 0, 1), graph.integers([1]), graph.shape("input", 2, 4)
        whole = graph.node("Concat", *pieces, axis=0)
        source = graph.node("Concat", "input", graph.node("Expand", "sigma", whole), axis=1)
    correction = graph.network(graph.padded(source))
    cropped = graph.node("Slice", correction, graph.integers([0, 0]), graph.shape(image, 2, 4), graph.integers([2, 3]))
    graph.node("Add", cropped, image, output="output")
    outputs = [helper.make_tensor_value_info("output", TensorProto.FLOAT, size)]
    return graph.model("fastden", inputs, outputs, opset, about)


class Graph:
    """Nodes and initialisers of an ONNX graph; values are known by their names."""

    def __init__(self) -> None:
        self.nodes: list[Any] = []
        self.initializers: list[Any] = []

    def node(self, operator: str, *inputs: str, output: str | None = None, **attributes: Any) -> str:
        from onnx import helper

        name = output or f"{operator.lower()}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(operator, list(inputs), [name], name=name, **attributes))
        return name

    def constant(self, array: np.ndarray[Any, Any], name: str | None = None) -> str:
        from onnx import numpy_helper

        name = name or f"constant_{len(self.initializers)}"
        self.initializers.append(numpy_helper.from_array(array, name))
        return name

    def integers(self, values: list[int]) -> str:
        return self.constant(np.array(values, np.int64))

    def integer(self, value: int) -> str:
        return self.constant(np.array(value, np.int64))

    def shape(self, value: str, start: int, stop: int) -> str:
        return self.node("Slice", self.node("Shape", value), self.integers([start]), self.integers([stop]))

    def slice(self, value: str, axis: int, start: int, stop: int) -> str:
        return self.node("Slice", value, *(self.integers([number]) for number in (start, stop, axis)))

    def model(
        self, name: str, inputs: list[Any], outputs: list[Any], opset: int, about: dict[str, str]
    ) -> onnx.ModelProto:
        """The graph as a model, checked."""
        from onnx import checker, helper

        made = helper.make_graph(self.nodes, name, inputs, outputs, self.initializers)
        model = helper.make_model(
            made,
            producer_name="fastden",
            opset_imports=[helper.make_opsetid("", opset)],
            ir_version=helper.find_min_ir_version_for([helper.make_opsetid("", opset)]),
        )
        helper.set_model_props(model, about)
        checker.check_model(model, full_check=True)
        return model


def check_opset(opset: Any) -> None:
    """Raise ValueError for an opset that graphs cannot be written in."""
    if isinstance(opset, bool) or not isinstance(opset, int) or not OPSETS[0] <= opset <= OPSETS[1]:
        raise ValueError(f"opset: {opset!r}; accepted: {OPSETS[0]} to {OPSETS[1]}")


class _Network(Graph):
    """The denoiser's graph."""

    def __init__(self, weights: Weights, half: bool, stored_half: bool) -> None:
        super().__init__()
        self.weights = weights
        self.half, self.stored_half = half, stored_half

    def parameter(self, name: str, tensor: Tensor) -> str:
        from onnx import TensorProto

        stored = self.stored_half and tensor.dim() == 4
        values = tensor.to(torch.float16 if self.half or stored else torch.float32).contiguous().numpy()
        if not stored:
            return self.constant(values, name)
        # Runtimes do it once, when they load the file.
        return self.node("Cast", self.constant(values, name), to=TensorProto.FLOAT)

    def padded(self, value: str) -> str:
        """:func:`fastden.network.padding.pad_image`."""
        for axis in (2, 3):
            size = self.node("Gather", self.node("Shape", value), self.integer(axis), axis=0)
            # After conv0 there are size + 2 pixels; they are padded to the next multiple of 4, at least 8.
            behind = 2 * BORDER - 4
            rounded = self.node("Add", size, self.integer(behind + ALIGNMENT - 1))
            blocks = self.node("Div", rounded, self.integer(ALIGNMENT))
            aligned = self.node("Max", self.node("Mul", blocks, self.integer(ALIGNMENT)), self.integer(2 * ALIGNMENT))
            stop = self.node("Add", aligned, self.integer(4 - BORDER))
            position = self.node("Range", self.integer(-BORDER), stop, self.integer(1))
            mirrored = self.node("Mul", self.node("Sub", size, self.integer(1)), self.integer(2))
            period = self.node("Max", mirrored, self.integer(1))
            phase = self.node("Mod", position, period)
            index = self.node("Min", phase, self.node("Sub", period, phase))
            value = self.node("Gather", value, index, axis=axis)
        return value

    def conv(self, name: str, value: str, *, stride: int = 1, padding: int = 0, relu: bool = True) -> str:
        made = self.convolution(name, value, *self.weights.pairs[name], stride=stride, padding=padding)
        return self.node("Relu", made) if relu else made

    def convolution(
        self, name: str, value: str, weight: Tensor, bias: Tensor, *, stride: int = 1, padding: int = 0
    ) -> str:
        parameters = self.parameter(f"{name}.weight", weight), self.parameter(f"{name}.bias", bias)
        sides: dict[str, Any] = {"kernel_shape": list(weight.shape[2:]), "strides": [stride] * 2, "pads": [padding] * 4}
        return self.node("Conv", value, *parameters, **sides)

    def upsample(self, name: str, value: str) -> str:
        weight, bias = self.weights.pairs[name]
        parameters = self.parameter(f"{name}.weight", weight), self.parameter(f"{name}.bias", bias)
        return self.node("ConvTranspose", value, *parameters, kernel_shape=[4, 4], strides=[2, 2], pads=[1] * 4)

    def bottleneck(self, name: str, value: str) -> str:
        y = self.conv(f"{name}_reduce", value)
        y = self.conv(f"{name}_conv", y, padding=1)
        y = self.conv(f"{name}_expand", y, relu=False)
        return self.node("Relu", self.node("Add", y, value))

    def stem(self, value: str) -> str:
        """The composed stem; the weights of the first row and column have no taps on the row and column before."""
        weight, bias = self.weights.pairs["stem"]
        row, column = self.slice(value, 2, 0, 6), self.slice(value, 3, 0, 6)
        behind, right, end = self.slice(value, 2, 1, _END), self.slice(row, 3, 1, _END), self.slice(column, 2, 1, _END)
        pieces = {
            "inside": (self.slice(behind, 3, 1, _END), weight[0], bias[0]),
            "top": (right, weight[1][:, :, 1:], bias[1]),
            "left": (end, weight[2][..., 1:], bias[2]),
            "corner": (self.slice(row, 3, 0, 6), weight[3][:, :, 1:, 1:], bias[3]),
        }
        made = {
            name: self.node("Relu", self.convolution(f"stem_{name}", *piece, stride=2))
            for name, piece in pieces.items()
        }
        sides = (("corner", "left"), ("top", "inside"))
        columns = [self.node("Concat", *(made[name] for name in side), axis=2) for side in sides]
        return self.node("Concat", *columns, axis=3)

    def network(self, padded: str) -> str:
        """The correction of the padded image, float32."""
        from onnx import TensorProto

        if self.half:
            padded = self.node("Cast", padded, to=TensorProto.FLOAT16)
        if self.weights.composed:
            skip = self.bottleneck("res1", self.stem(padded))
        else:
            first = self.conv("conv0", padded, relu=False)
            skip = self.bottleneck("res1", self.conv("conv1", first, stride=2, padding=1))
        low = self.bottleneck("res2", self.conv("conv2", skip, stride=2, padding=1))
        joined = self.node("Concat", skip, self.upsample("up2", low), axis=1)
        features = self.bottleneck("res3", self.conv("conv3", joined, padding=1))
        if self.weights.composed:
            phases = self.conv("head", features, padding=1, relu=False)
            spread = self.node("DepthToSpace", phases, blocksize=2, mode="CRD")
            y = self.node("Add", spread, self.conv("head_image", padded, relu=False))
        else:
            y = self.conv("out", self.node("Concat", first, self.upsample("up3", features), axis=1), relu=False)
        return self.node("Cast", y, to=TensorProto.FLOAT) if self.half else y


#: ONNX's end of a slice that goes up to the last element.
_END = np.iinfo(np.int64).max
