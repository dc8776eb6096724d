"""The forms in which a module is run: PyTorch's own ways, other runtimes, and fastden's backends."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastden.bench.images import SIGMA
from fastden.bench.timing import Call
from fastden.errors import UserError
from fastden.ops import backends
from fastden.ops.backends import use_backend

#: PyTorch's own ways to run a module.
PLAIN = ("eager", "channels_last", "compile", "max_autotune")
#: fastden's own inference form, composed and folded, on PyTorch's compiled operations: for the whole network.
FUSED_COMPILE = "fused_compile"
#: fastden in 8-bit integers, for the whole network on a CPU, and its largest relative L2 error of the picture.
#: Measured: 0.0036 to 0.0041 at 512 x 768 pixels (``benchmarks/results/cpu/amd-epyc``).
FAST, FAST_ERROR = "fastden-fast", 0.01
#: fastden on the backends that are chosen where nobody names one, for the whole network on a GPU.
AUTO = "fastden-auto"
#: The fused network's operators: those of :data:`fastden.bench.operators.OPERATORS`, which imports this module.
NETWORK_OPERATORS = ("stem", "bottleneck", "conv_bn_relu", "upsample", "concat_conv_bn_relu", "head")
#: Behind a runtime's name: it runs the composed network instead of the plain one.
COMPOSED = "_composed"
#: Other runtimes, for the whole network on a CPU, and the packages that they need.
RUNTIMES = {
    name + form: (name, "onnx", "onnxscript") for name in ("openvino", "onnxruntime") for form in ("", COMPOSED)
}


class WithLevel(nn.Module):
    """A network with its noise level built in: every contender takes the image alone."""

    def __init__(self, model: nn.Module, sigma: float | None = SIGMA) -> None:
        super().__init__()
        self.model = model
        self.sigma = sigma

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x, self.sigma)


def choose_peers(text: str | None, accepted: Sequence[str], default: Sequence[str]) -> tuple[str, ...]:
    """The contenders that ``--compare`` names, in order.

    Raises:
        UserError: an unknown name; a package that is missing.
    """
    names = tuple(default) if text is None else tuple(part.strip() for part in text.split(",") if part.strip())
    for name in names:
        if name not in accepted:
            raise UserError(f"compare: {name!r}; accepted here: {', '.join(accepted)}")
        missing = [package for package in RUNTIMES.get(name, ()) if find_spec(package) is None]
        if missing:
            raise UserError(
                f"compare: {name} needs {', '.join(missing)}; install: pip install 'fastden[bench]', or name others"
                " with --compare"
            )
    return tuple(dict.fromkeys(names))


def choose_backends(
    text: str | None, device: torch.device, dtype: torch.dtype, training: bool = False
) -> tuple[tuple[str, ...], dict[str, str]]:
    """fastden's backends that ``--backends`` names, or all that can run; and why the others cannot.

    Args:
        text: the option.
        device, dtype: to measure on and in.
        training: whether with batch statistics.

    Raises:
        UserError: an unknown name, or one that cannot run here.
    """
    able, left_out = [], {}
    asked = None if text is None else [part.strip() for part in text.split(",") if part.strip()]
    for name in asked or ():
        if name not in backends.NAMES:
            raise UserError(f"backends: {name!r}; accepted: {', '.join(backends.NAMES)}")
    for backend in backends.BACKENDS:
        if asked is not None and backend.name not in asked:
            continue
        reasons = backends.unavailable(backend)
        if backend.dtypes is not None:
            # Interpreted and emulated kernels run on a CPU for tests alone: their times mean nothing.
            if device.type != "cuda":
                reasons.append(f"device {device.type}; accepted: cuda")
            if dtype not in backend.dtypes:
                reasons.append(f"dtype {dtype}; accepted: {', '.join(map(str, backend.dtypes))}".replace("torch.", ""))
            if training and not backend.batch_statistics:
                reasons.append("batch statistics, which its operators do not make")
        if not reasons:
            able.append(backend.name)
        elif asked is not None:
            raise UserError(f"backends: {backend.name} cannot run: {'; '.join(reasons)}")
        else:
            left_out[own_name(backend.name)] = "; ".join(reasons)
    return tuple(able), left_out


def why_not_automatic(device: torch.device, dtype: torch.dtype) -> str:
    """Why :data:`AUTO` would be no contender of its own; empty where the fused network gets a mixture of backends."""
    asked = backends.requested()
    if asked is not None:
        return f"{asked} is asked for"
    chosen = set(backends.expected(NETWORK_OPERATORS, device, dtype).values())
    return "" if len(chosen) > 1 else f"the automatic choice is {chosen.pop()} alone"


def own_name(backend: str) -> str:
    """fastden on one of its backends, as a contender."""
    return f"fastden-{backend}"


def laid_out(tensors: Sequence[Tensor], dtype: torch.dtype, form: str) -> tuple[Tensor, ...]:
    """Images and feature maps in the dtype and the memory layout of a form."""
    layout = torch.contiguous_format if form == "eager" else torch.channels_last
    return tuple(tensor.to(dtype).contiguous(memory_format=layout) for tensor in tensors)


def compiled(module: Callable[..., Any], form: str) -> Any:
    """A module or function itself, or compiled where the form says so."""
    if form not in ("compile", "max_autotune"):
        return module
    return torch.compile(module, mode="max-autotune" if form == "max_autotune" else None, dynamic=False)


def arranged(module: nn.Module, form: str) -> nn.Module:
    """A copy of ``module`` in the memory layout of a form."""
    copied = copy.deepcopy(module)
    return copied if form == "eager" else copied.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def prepared(form: str, module: nn.Module, dtype: torch.dtype) -> Callable[..., Tensor]:
    """Inference of ``module`` in one of :data:`PLAIN`, on inputs that are :func:`laid_out`."""
    network = compiled(arranged(module, form).to(dtype), form)

    def run(*sources: Tensor) -> Tensor:
        with torch.no_grad(), use_backend("torch"):
            return network(*sources)

    return run


def plain(form: str, module: nn.Module, inputs: Sequence[Tensor], dtype: torch.dtype) -> Call:
    """:func:`prepared`, and its inputs."""
    run, sources = prepared(form, module, dtype), laid_out(inputs, dtype, form)
    return lambda: run(*sources)


def export_onnx(network: nn.Module, x: Tensor, path: Path) -> Path:
    """The network with its noise level, for images of the size of ``x``, as an ONNX file; kept if it is there."""
    if not path.exists():
        with torch.no_grad(), use_backend("torch"):
            sigma = SIGMA if getattr(network, "noise_level_input", True) else None
            program = torch.onnx.export(WithLevel(network, sigma).eval(), (x,), dynamo=True, verbose=False)
        assert program is not None
        program.save(path)
    return path


def openvino(path: Path, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    """OpenVINO on a file, ONNX or its own format, in float32 or bfloat16, on as many threads as PyTorch has."""
    import openvino as ov

    settings = {
        "INFERENCE_PRECISION_HINT": "bf16" if dtype == torch.bfloat16 else "f32",
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
    }
    request = ov.Core().compile_model(str(path), "CPU", settings).create_infer_request()
    return lambda x: torch.from_numpy(next(iter(request.infer([x.numpy()]).values())))


def onnxruntime(path: Path, x: Tensor) -> Call:
    """Inference by ONNX Runtime of an ONNX file, in float32, on as many threads as PyTorch has."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    inputs = {session.get_inputs()[0].name: x.numpy()}
    return lambda: torch.from_numpy(session.run(None, inputs)[0])
