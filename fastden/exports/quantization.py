"""ONNX files that compute in 8-bit integers: ONNX Runtime's static quantisation, calibrated on photographs."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import onnx

#: Noise levels, 0-255, of the pictures by which the ranges of the activations are found.
SIGMAS = (0.0, 10.0, 25.0, 50.0)
#: Side of their crops, pixels, and how many there are of each picture.
CROP, CROPS = 128, 4
#: Convolutions that see the image, or make the correction, stay in float32: their rounding would be noise.
EXACT = ("stem", "conv0", "head", "out")


def quantize(model: onnx.ModelProto, sigma: float | None) -> onnx.ModelProto:
    """The same graph with its inner convolutions in int8, as nodes of QuantizeLinear and DequantizeLinear.

    Weights are quantised for each output channel, activations for each tensor.

    Args:
        model: in float32, of :func:`fastden.exports.onnx_graph.build`.
        sigma: the built-in noise level, 0-255, or None.
    """
    import onnx
    from onnxruntime.quantization import QuantFormat, QuantType, quantize_static

    convolutions = [node for node in model.graph.node if node.op_type == "Conv"]
    exact = [node.name for node in convolutions if node.input[1].startswith(EXACT)]
    marked = onnx.ModelProto()
    marked.CopyFrom(model)
    # The graph needs no preprocessing. Without this mark ONNX Runtime advises it through the root logger, to which that
    # adds a handler.
    marked.metadata_props.add(key="onnx.quant.pre_process", value="onnxruntime.quant")
    with tempfile.TemporaryDirectory(prefix="fastden-") as folder:
        source, target = Path(folder, "float.onnx"), Path(folder, "int8.onnx")
        onnx.save(marked, str(source))
        quantize_static(
            str(source),
            str(target),
            _Pictures(model, sigma),
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=["Conv"],
            nodes_to_exclude=exact,
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
        )
        made = onnx.load(str(target))
    del made.metadata_props[:]
    made.metadata_props.extend(model.metadata_props)
    made.producer_name, made.producer_version = model.producer_name, model.producer_version
    return made


class _Pictures:
    """What ONNX Runtime calls a calibration data reader: inputs of the network, one after another.

    Args:
        model: whose inputs they are.
        sigma: as in :func:`quantize`.
    """

    def __init__(self, model: onnx.ModelProto, sigma: float | None) -> None:
        self.inputs = {value.name: value.type.tensor_type.shape.dim[1].dim_value for value in model.graph.input}
        self.channels = int(model.graph.output[0].type.tensor_type.shape.dim[1].dim_value)
        self.sigmas = SIGMAS if sigma is None else (sigma,)
        self.coming = self._inputs()

    def get_next(self) -> dict[str, Any] | None:
        """The next inputs, or None."""
        return next(self.coming, None)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return self.coming

    def __next__(self) -> dict[str, Any]:
        return next(self.coming)

    def _inputs(self) -> Iterator[dict[str, Any]]:
        random = np.random.default_rng(0)
        for index, clean in enumerate(_crops(self.channels)):
            sigma = self.sigmas[index % len(self.sigmas)] / 255
            noisy = (clean + random.normal(0, sigma, clean.shape)).astype(np.float32)[None]
            level = np.full((1, 1, 1, 1), sigma, np.float32)
            if self.inputs["input"] > self.channels:  # the level is the last channel
                noisy = np.concatenate([noisy, np.broadcast_to(level, (1, 1, *noisy.shape[2:]))], 1)
            yield {"input": noisy} | ({"sigma": level} if "sigma" in self.inputs else {})


def _crops(channels: int) -> Iterator[np.ndarray[Any, Any]]:
    """Crops (C, CROP, CROP) of the photographs that come with scikit-image, in [0, 1]."""
    from skimage import data

    random = np.random.default_rng(1)
    pictures = [data.astronaut(), data.coffee(), data.chelsea(), data.rocket()]
    for _ in range(CROPS):
        for picture in pictures:
            top, left = (int(random.integers(size - CROP)) for size in picture.shape[:2])
            crop = picture[top : top + CROP, left : left + CROP].transpose(2, 0, 1) / 255
            yield crop if channels == 3 else crop.mean(0, keepdims=True)
