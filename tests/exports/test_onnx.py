"""ONNX files: the network's results in ONNX Runtime and OpenVINO, at any size."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import onnxruntime as ort
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import shape_inference
from torch import Tensor

import fastden
from fastden.network.model import Denoiser
from tests.helpers import random_network

SIGMA = 25 / 255


@pytest.fixture(scope="module")
def color() -> Denoiser:
    return Denoiser.from_pretrained("color")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("onnx")


@pytest.fixture(scope="module")
def composed(color: Denoiser, folder: Path) -> ort.InferenceSession:
    return session(fastden.export(color, folder / "composed.onnx"))


@pytest.fixture(scope="module")
def plain(color: Denoiser, folder: Path) -> ort.InferenceSession:
    return session(fastden.export(color, folder / "plain.onnx", composed=False))


def session(source: Path | bytes) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    model = source if isinstance(source, bytes) else str(source)
    return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def run(network: ort.InferenceSession, image: Tensor, sigma: Tensor | float | None = None) -> Tensor:
    inputs = {"input": image.numpy()}
    if sigma is not None:
        level = torch.full((1, 1, 1, 1), sigma) if isinstance(sigma, float) else sigma
        inputs["sigma"] = level.numpy()
    return torch.from_numpy(network.run(None, inputs)[0])


def error(result: Tensor, model: Denoiser, image: Tensor, sigma: Tensor | float | None) -> float:
    with torch.no_grad():
        wanted = model(image, sigma)
    assert result.shape == wanted.shape
    return float((result - wanted).abs().max())


sizes = st.integers(1, 45)


@settings(max_examples=25)
@given(batch=st.integers(1, 3), height=sizes, width=sizes, form=st.sampled_from(["composed", "plain"]))
def test_any_size(color: Denoiser, composed: Any, plain: Any, batch: int, height: int, width: int, form: str) -> None:
    network = composed if form == "composed" else plain
    image = torch.rand(batch, 3, height, width)
    assert error(run(network, image, SIGMA), color, image, SIGMA) < 1e-5
    for shape in ((batch, 1, height, width), (1, 1, height, width), (batch, 1, 1, 1)):
        level = 0.3 * torch.rand(shape)
        assert error(run(network, image, level), color, image, level.expand(batch, 1, height, width)) < 1e-5


def test_names_and_free_sizes(composed: ort.InferenceSession) -> None:
    image, sigma = composed.get_inputs()
    assert (image.name, image.shape) == ("input", ["batch", 3, "height", "width"])
    assert (sigma.name, sigma.shape) == ("sigma", ["sigma_batch", 1, "sigma_height", "sigma_width"])
    (output,) = composed.get_outputs()
    assert (output.name, output.shape) == ("output", ["batch", 3, "height", "width"])


def test_openvino(color: Denoiser, composed: Any, folder: Path) -> None:
    openvino = pytest.importorskip("openvino")
    settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1}
    network = openvino.Core().compile_model(str(folder / "composed.onnx"), "CPU", settings)
    for shape in ((1, 3, 1, 1), (2, 3, 7, 5), (1, 3, 33, 46)):
        image = torch.rand(shape)
        level = 0.3 * torch.rand(shape[0], 1, *shape[2:])
        for sigma in (torch.full((1, 1, 1, 1), SIGMA), level):
            result = network({"input": image.numpy(), "sigma": sigma.numpy()})["output"]
            whole = sigma.expand(shape[0], 1, *shape[2:])
            assert error(torch.from_numpy(result), color, image, whole) < 1e-5


def fix_sizes(model: onnx.ModelProto, height: int, width: int) -> None:
    """Set the image's size, as vs-mlrt does before it infers the others."""
    for value in model.graph.input:
        for axis, size in ((0, 1), (2, height), (3, width)):
            value.type.tensor_type.shape.dim[axis].dim_value = size
    output = model.graph.output[0].type.tensor_type.shape.dim
    output[0].dim_value = 1
    for axis in (2, 3):
        output[axis].Clear()
    del model.graph.value_info[:]


def test_the_layout_of_vs_mlrt(color: Denoiser, tmp_path: Path) -> None:
    model = onnx.load(fastden.export(color, tmp_path / "drunet_color.onnx", layout="dpir"))
    assert len(model.graph.input) == len(model.graph.output) == 1
    assert model.graph.input[0].type.tensor_type.shape.dim[1].dim_value == 4
    fix_sizes(model, 40, 56)
    inferred = shape_inference.infer_shapes(model)
    assert [dim.dim_value for dim in inferred.graph.output[0].type.tensor_type.shape.dim] == [1, 3, 40, 56]
    network = session(model.SerializeToString())
    assert network.get_outputs()[0].shape == [1, 3, 40, 56]
    image, level = torch.rand(1, 3, 40, 56), 0.3 * torch.rand(1, 1, 40, 56)
    assert error(run(network, torch.cat([image, level], 1)), color, image, level) < 1e-5


@pytest.mark.parametrize("composed", [True, False])
def test_a_built_in_level(tmp_path: Path, composed: bool) -> None:
    model = random_network()
    network = session(fastden.export(model, tmp_path / "fixed.onnx", sigma=40, composed=composed))
    assert [value.name for value in network.get_inputs()] == ["input"]
    image = torch.rand(1, 3, 21, 30)
    with torch.no_grad():
        scale = float((model(image, 40 / 255) - image).abs().max())
    assert error(run(network, image), model, image, 40 / 255) < 1e-5 * max(scale, 1)


@pytest.mark.parametrize(("noise_level_input", "channels"), [(False, 3), (True, 1), (False, 1)])
def test_other_networks(tmp_path: Path, noise_level_input: bool, channels: int) -> None:
    model = random_network(noise_level_input, channels)
    network = session(fastden.export(model, tmp_path / "other.onnx"))
    image = torch.rand(2, channels, 13, 10)
    sigma = SIGMA if noise_level_input else None
    with torch.no_grad():
        scale = float((model(image, sigma) - image).abs().max())
    assert error(run(network, image, sigma), model, image, sigma) < 1e-5 * max(scale, 1)


def test_a_fused_network(color: Denoiser, composed: Any, tmp_path: Path) -> None:
    network = session(fastden.export(fastden.fuse(color), tmp_path / "fused.onnx"))
    image = torch.rand(1, 3, 20, 20)
    assert torch.allclose(run(network, image, SIGMA), run(composed, image, SIGMA), rtol=0, atol=1e-5)


def test_half_precision(color: Denoiser, tmp_path: Path) -> None:
    path = fastden.export(color, tmp_path / "half.onnx", precision="fp16")
    assert path.stat().st_size < 2.5e6
    weights = [tensor for tensor in onnx.load(path).graph.initializer if len(tensor.dims) == 4]
    assert {tensor.data_type for tensor in weights} == {onnx.TensorProto.FLOAT16}
    network = session(path)
    images = [torch.full((1, 3, 40, 44), value) for value in (0.0, 1.0)]
    images += [torch.rand(1, 3, 40, 44), (torch.rand(1, 3, 40, 44) > 0.5).float()]
    for image in images:
        for sigma in (0.0, 75 / 255):
            result = run(network, image, sigma)
            assert result.dtype == torch.float32
            assert torch.isfinite(result).all()
            # The bound is a quarter of a step of 8 bits.
            assert error(result, color, image, sigma) < 0.25 / 255
    openvino = pytest.importorskip("openvino")
    network = openvino.Core().compile_model(str(path), "CPU", {"INFERENCE_NUM_THREADS": 1})
    for image in images:
        level = torch.full((1, 1, 1, 1), SIGMA)
        result = torch.from_numpy(network({"input": image.numpy(), "sigma": level.numpy()})["output"])
        # It may compute in bfloat16, which resolves 1 / 256.
        assert error(result, color, image, SIGMA) < 2 / 255


def test_weights_in_half_precision(color: Denoiser, tmp_path: Path) -> None:
    path = fastden.export(color, tmp_path / "stored.onnx", precision="fp16-weights")
    assert path.stat().st_size < 1.8e6
    network = session(path)
    image = torch.rand(1, 3, 40, 44)
    # Weights are rounded and arithmetic is exact: the error is below that of half precision throughout.
    assert error(run(network, image, SIGMA), color, image, SIGMA) < 0.1 / 255


def test_int8(color: Denoiser, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("DEBUG"):
        path = fastden.export(color, tmp_path / "int8.onnx", precision="int8")
    # A record of the root logger would come with a handler in the user's program.
    assert not [record for record in caplog.records if record.name == "root" or record.levelname != "DEBUG"]
    made = onnx.load(path)
    keys = {entry.key for entry in made.metadata_props}
    assert "model" in keys
    assert not [key for key in keys if key.startswith("onnx.")]
    weights = [tensor for tensor in made.graph.initializer if tensor.data_type == onnx.TensorProto.INT8]
    assert sum(len(tensor.dims) == 4 for tensor in weights) == 11  # res1 to res3, conv2, conv3
    network = session(path)
    clean = torch.linspace(0.2, 0.8, 60).expand(1, 3, 50, 60)
    image = clean + SIGMA * torch.randn(clean.shape)
    result, wanted = run(network, image, SIGMA), run(session(fastden.export(color, tmp_path / "a.onnx")), image, SIGMA)
    assert (result - wanted).square().mean().sqrt() < 2 / 255
    assert (result - clean).square().mean() < 0.1 * (image - clean).square().mean()


@pytest.mark.parametrize("opset", [13, 18, 23])
def test_opsets(color: Denoiser, tmp_path: Path, opset: int) -> None:
    path = fastden.export(color, tmp_path / "opset.onnx", opset=opset)
    assert [entry.version for entry in onnx.load(path).opset_import] == [opset]
    image = torch.rand(1, 3, 9, 14)
    assert error(run(session(path), image, SIGMA), color, image, SIGMA) < 1e-5


def test_metadata(tmp_path: Path) -> None:
    path = fastden.export("color", tmp_path / "color.onnx")
    about = {entry.key: entry.value for entry in onnx.load(path).metadata_props}
    assert about["model"] == "color"
    assert about["version"] == fastden.__version__
    assert about["license"] == "Apache-2.0"
    assert "sigma / 255" in about["noise_level"]
    assert about["image"].startswith("RGB")
    path = fastden.export(random_network(image_channels=1), tmp_path / "gray.onnx")
    about = {entry.key: entry.value for entry in onnx.load(path).metadata_props}
    assert about["image"].startswith("gray")
    # A network object has no card, so the file names no licence.
    assert "license" not in about


@pytest.mark.parametrize("name", fastden.models())
def test_every_bundled_model(tmp_path: Path, name: str) -> None:
    model = Denoiser.from_pretrained(name)
    network = session(fastden.export(name, tmp_path / "a.onnx"))
    image = torch.rand(1, 3, 22, 31)
    sigma = SIGMA if model.noise_level_input else None
    assert error(run(network, image, sigma), model, image, sigma) < 1e-5


@pytest.mark.parametrize("size", [(8, 8), (9, 17), (61, 70)])
def test_the_estimator_of_the_noise(folder: Path, size: tuple[int, int]) -> None:
    from fastden.inference.estimate import load_estimator

    network = session(fastden.export("noise", folder / "noise.onnx", overwrite=True))
    image = torch.rand(2, 3, *size)
    image[:, :, :8, :8] = 0.5  # a flat cell, which is not usable
    with torch.no_grad():
        wanted = torch.stack([field.float() for field in load_estimator()(image)], 1)
    result = run(network, image)
    assert result.shape == wanted.shape
    assert not result[:, 4, 0, 0].any()
    assert (result - wanted).abs().max() < 1e-5


@pytest.mark.filterwarnings("ignore")  # a trace warns of each comparison
@pytest.mark.parametrize("dynamo", [False, True])
def test_pytorchs_own_exporters(dynamo: bool, tmp_path: Path) -> None:
    """Of a user who exports the module and not its file: both understand how the border is written."""
    network = fastden.fuse(random_network(noise_level_input=False))
    file = tmp_path / "own.onnx"
    x = torch.rand(1, 3, 16, 20)  # all of it within reach of the border
    torch.onnx.export(network, (x,), file, dynamo=dynamo, input_names=["x"], opset_version=18)
    (y,) = ort.InferenceSession(file).run(None, {"x": x.numpy()})
    assert_close(y, network, x)


@pytest.mark.filterwarnings("ignore")
def test_openvinos_own_conversion() -> None:
    openvino = pytest.importorskip("openvino")
    network, x = fastden.fuse(random_network(noise_level_input=False)), torch.rand(1, 3, 16, 20)
    converted = openvino.convert_model(network, example_input=x)
    model = openvino.compile_model(converted, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    assert_close(model(x.numpy())[0], network, x)


def assert_close(y: Any, network: torch.nn.Module, x: Tensor) -> None:
    with torch.no_grad():
        expected = network(x)
    assert (torch.from_numpy(y) - expected).abs().max() < 1e-5 * expected.abs().max()
