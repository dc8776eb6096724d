"""Backends of the operators: the list, the choice, and the reasons why one cannot run.

The backend of an operator is the one that its ``backend`` argument names. Without the argument, it is that of the
innermost :func:`use_backend`; else that of the environment variable ``FASTDEN_BACKEND``; else the automatic choice. If
a requested backend cannot run, the operator raises an error with every backend's reasons. It never uses another backend
silently. The automatic choice uses a kernel only if committed results from a GPU show that it is correct and faster
(:mod:`fastden.ops.proven`). These results are of the fused network's inference: folded weights of its own shapes,
without gradients. For all else the automatic choice is ``torch``: with batch normalisation, other shapes, gradients or
autocast, and where PyTorch's operations are recorded or transformed (``torch.func``, ``torch.export``,
``torch.jit.trace``, ``FlopCounterMode``).
"""

from __future__ import annotations

import os
import shutil
import sysconfig
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache
from importlib import import_module, util
from pathlib import Path

import torch
from torch import Tensor

from fastden.ops._triton_start import why_not_started
from fastden.ops.modes import runs_as_written
from fastden.ops.proven import PROVEN, SHAPES
from fastden.ops.tensors import differentiated_otherwise, wants_gradient
from fastden.ops.tracing import autocast_enabled, constant_result, exporting, transform_active


@dataclass(frozen=True)
class Backend:
    """A way to run operators.

    Args:
        name: the name that users pass.
        summary: one line for ``fastden info``.
        dtypes: accepted dtypes of the operators' inputs; None for any.
        batch_statistics: whether its operators can normalise with the statistics of the batch.
    """

    name: str
    summary: str
    dtypes: tuple[torch.dtype, ...] | None = None
    batch_statistics: bool = True


KERNEL_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
BACKENDS = (
    Backend("torch", "PyTorch's own operations: the reference, on any device"),
    Backend("triton", "Triton kernels, for CUDA devices", KERNEL_DTYPES),
    Backend("cuda", "CUDA C++ kernels, built ahead, for inference", KERNEL_DTYPES[:2], batch_statistics=False),
)
NAMES = tuple(backend.name for backend in BACKENDS)
ENVIRONMENT = "FASTDEN_BACKEND"
#: The package of Triton's kernels, with one module for each operator but these.
KERNELS = "fastden.kernels"
CUDA_ONLY = ("concat_conv_fp8",)
#: What the operators call weights, but biases. All other inputs are pictures.
WEIGHTS = ("weight", "image_weight", "reduce", "conv", "expand")

_scoped: ContextVar[str | None] = ContextVar("fastden_backend", default=None)
#: What :func:`_ask_traced` found last.
_answer: ContextVar[bool] = ContextVar("fastden_answer", default=False)


class BackendError(RuntimeError):
    """A requested backend cannot run; the message has the inputs and every backend's reasons."""


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run operators on backend ``name`` inside the ``with`` block, only in this thread or task.

    A backward pass inside the block runs in this thread, on any device. Activation checkpointing
    (``torch.utils.checkpoint``) runs the forward pass again when the backward pass needs it, on the backend of that
    moment: so keep the backward pass inside the block too, or PyTorch raises ``CheckpointError``. A function compiled
    by ``torch.compile`` keeps the backend that it was traced with. With ``fullgraph=True`` the block must be around the
    call of that function, and not inside of it, where it cannot be traced.

    In training on ``triton``, do not write into an operator's or a block's result where PyTorch does not count it, as
    through ``y.data`` or the array of ``y.detach().numpy()``: the backward pass makes some results again, and the
    gradients would be those of the unchanged result. Counted writes, ``y.clamp_()`` under ``torch.no_grad()`` for
    example, are noticed.

    Raises:
        ValueError: there is no such backend.
    """
    token = _scoped.set(_known(name, "backend"))
    try:
        # Autograd computes the gradients of a CUDA device in a thread of its own, which this context does not reach:
        # what is recomputed there would run on another backend (seen on an H200).
        with torch.autograd.set_multithreading_enabled(False):
            yield
    finally:
        _scoped.reset(token)


@constant_result
def requested() -> str | None:
    """The backend that the context or the environment requests; None if the choice is automatic."""
    scoped = _scoped.get()
    if scoped is not None:
        return scoped
    name = os.environ.get(ENVIRONMENT)
    return _known(name, ENVIRONMENT) if name else None


def choose(
    operator: str,
    backend: str | None,
    *,
    batch_statistics: bool = False,
    as_measured: bool = True,
    **tensors: Tensor | None,
) -> str:
    """Name of the backend that ``operator`` runs on.

    Args:
        operator: name of the operator.
        backend: the backend that the caller requests, or None.
        batch_statistics: whether the operator must normalise with the statistics of the batch.
        as_measured: whether all that is not in ``tensors`` is as in the fused network: no batch normalisation, and
            the same settings. Otherwise the automatic choice is ``torch``.
        **tensors: the inputs, by the names of the operator's arguments.

    Returns:
        Its name; ``"torch"`` for an empty batch that is normalised with its own statistics.

    Raises:
        ValueError: there is no such backend.
        BackendError: the requested backend cannot run. Under ``torch.compile``, PyTorch raises its own RuntimeError at
            the first call, which quotes this error.
    """
    name = requested() if backend is None else _known(backend, "backend")
    if name is None:
        return _automatic(operator, as_measured and not batch_statistics, tensors)
    if name == "torch":
        return name
    if torch.compiler.is_compiling():
        _make_ready(name)
        _check_traced(operator, name, batch_statistics, **tensors)
    else:
        _check(operator, name, batch_statistics, False, **tensors)
    # An empty batch has no statistics, and leaves a kernel nothing to run: PyTorch's operations keep the running ones.
    return "torch" if batch_statistics and _first(tensors).shape[0] == 0 else name


def why_not(
    operator: str, backend: str, *, batch_statistics: bool = False, traced: bool = False, **tensors: Tensor | None
) -> list[str]:
    """Why ``operator`` cannot run on ``backend`` with these inputs; empty if it can. Arguments as in :func:`choose`.

    Args:
        traced: whether ``torch.compile`` traces the call, and so handles transforms itself.

    Raises:
        ValueError: there is no such backend.
    """
    entry = _entry(_known(backend, "backend"))
    if entry.dtypes is None:
        return []
    missing = unavailable(entry)
    if missing:
        return missing
    reasons = _why_not_statistics(entry) if batch_statistics else []
    if not traced and differentiated_otherwise(*tensors.values()):
        reasons.append("a transform of torch.func or forward-mode differentiation is active; accepted: backend torch")
    present = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    devices = {tensor.device.type for tensor in present.values()}
    if devices != {"cuda"} and not (_runs_on_cpu(entry) and devices == {"cpu"}):
        reasons.append(f"device {', '.join(sorted(devices))}; accepted: cuda")
    # Biases may always be float32: kernels add them to float32 sums. Ranges are.
    wide = {
        name for name, tensor in present.items() if name.endswith(("bias", "ranges")) and tensor.dtype == torch.float32
    }
    found = {(tensor.dtype, tensor.device.type): tensor for name, tensor in present.items() if name not in wide}
    dtypes = set(map(_as_run, found.values()))  # of each kind once: eight calls of a pass ask
    if not dtypes <= set(entry.dtypes):
        reasons.append(f"dtype {_names(dtypes)}; accepted: {_names(entry.dtypes)}")
    elif len(dtypes) > 1:
        reasons.append(f"dtypes {_names(dtypes)}; accepted: one for all inputs")
    if entry.name == "triton":
        if operator in CUDA_ONLY:
            return [*reasons, f"{operator} has no kernel in Triton; the cuda backend has one"]
        return reasons + import_module(f"{KERNELS}.{operator}").why_not(**present)
    from fastden.cuda import limits

    return reasons + limits.why_not(operator, **present)


def unavailable(backend: Backend) -> list[str]:
    """Why ``backend`` cannot run any operator here; empty if it can."""
    if backend.name == "cuda":
        from fastden.cuda import extension

        return extension.why_not()
    if backend.name == "triton":
        if not _installed("triton"):
            return ["triton is not installed (pip install 'fastden[gpu]')"]
        if not _installed(KERNELS):
            return [f"{KERNELS} is not installed: fastden runs from an uninstalled checkout (pip install -e .)"]
    return []


def _why_not_statistics(backend: Backend) -> list[str]:
    if backend.batch_statistics:
        return []
    return ["batch statistics; accepted: folded or frozen batch normalisation; the triton backend makes them"]


@constant_result
def _make_ready(name: str) -> bool:
    """Load the module that registers the operators, for traced code; returns whether that worked."""
    # Dynamo calls this function before it traces the two others. Dynamo must not trace into them, but call them with
    # fake tensors. The marks are set here and not on import, because they load Dynamo.
    torch.compiler.allow_in_graph(_check_traced)
    torch.compiler.allow_in_graph(_ask_traced)
    return not unavailable(_entry(name))


def _runs_on_cpu(backend: Backend) -> bool:
    """Whether the kernels of this backend run on the CPU here, interpreted or emulated, for tests."""
    if backend.name == "cuda":
        from fastden.cuda import extension

        return extension.emulated()
    return interpreted()


def _entry(name: str) -> Backend:
    return BACKENDS[NAMES.index(name)]


@cache
def interpreted() -> bool:
    """Whether Triton interprets its kernels on the CPU, because ``TRITON_INTERPRET=1`` is set."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@cache
def _has_compiler() -> bool:
    """Whether there is what Triton compiles its launcher with: a C compiler and Python's headers.

    Slim containers have neither. A backend that is asked for gives Triton's own error there.
    """
    # As in triton/runtime/build.py.
    compiler = os.environ.get("CC")
    names = ("gcc", "clang") if compiler is None else (compiler,)
    scheme = sysconfig.get_default_scheme().replace("posix_local", "posix_prefix")  # Debian's own
    headers = Path(sysconfig.get_paths(scheme)["include"])
    return any(map(shutil.which, names)) and (headers / "Python.h").is_file()


@cache
def _installed(module: str) -> bool:
    try:
        return util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def _known(name: str, what: str) -> str:
    if name not in NAMES:
        raise ValueError(f"{what}: {name!r}; accepted: {', '.join(NAMES)}")
    return name


def _check(operator: str, name: str, batch_statistics: bool, traced: bool, **tensors: Tensor | None) -> None:
    """Raise BackendError with the reasons if ``operator`` cannot run on ``name``."""
    if why_not(operator, name, batch_statistics=batch_statistics, traced=traced, **tensors):
        raise BackendError(_refusal(operator, name, batch_statistics, traced, tensors))


def _check_traced(operator: str, name: str, batch_statistics: bool, **tensors: Tensor | None) -> None:
    """:func:`_check` with the sizes of the first call."""
    seen = _of_first_call(tensors)
    if seen is not None:
        _check(operator, name, batch_statistics, True, **seen)


def _ask_traced(operator: str, name: str, **tensors: Tensor | None) -> None:
    """Find whether ``operator`` can run on ``name`` with the sizes of the first call. :func:`_answered` has the answer.

    Dynamo calls this function with fake tensors. From such a function it accepts no result but tensors and None.
    """
    seen = _of_first_call(tensors)
    _answer.set(seen is not None and not why_not(operator, name, batch_statistics=False, traced=True, **seen))


@constant_result
def _answered() -> bool:
    return _answer.get()


def _of_first_call(tensors: dict[str, Tensor | None]) -> dict[str, Tensor | None] | None:
    """Tensors with the sizes of the first call: a comparison of a symbolic size would restrict that size.

    None if a size is known only at run time.
    """
    seen: dict[str, Tensor | None] = {}
    for key, tensor in tensors.items():
        seen[key] = tensor
        if tensor is not None and any(isinstance(size, torch.SymInt) for size in tensor.shape):
            sizes = [size.node.hint if isinstance(size, torch.SymInt) else size for size in tensor.shape]
            if None in sizes:
                return None
            seen[key] = tensor.new_empty(sizes)
    return seen


def _first(tensors: dict[str, Tensor | None]) -> Tensor:
    return next(tensor for tensor in tensors.values() if tensor is not None)


def _automatic(operator: str, as_measured: bool, tensors: dict[str, Tensor | None]) -> str:
    first = _first(tensors)
    proven = proven_backends(operator, first.device, _as_run(first))
    # What is proven is inference. A trace of torch.jit would record comparisons of sizes: it is asked for first.
    if not proven or not as_measured or wants_gradient(*tensors.values()) or _recorded(tensors):
        return "torch"
    if not _measured(operator, tensors):
        return "torch"
    for name in proven:
        if _can_run(operator, name, first.device, tensors):
            return name
    return "torch"


@constant_result
def left_out(name: str, device: torch.device) -> bool:
    """Whether the automatic choice leaves a backend out, though nothing is wrong with the inputs."""
    return bool(why_left_out(name, device))


def why_left_out(name: str, device: torch.device) -> list[str]:
    """Why the automatic choice leaves a backend out on a device: it could not run before, or does not start there.

    Who asks for the backend gets its own error instead.
    """
    if name == "triton":
        if interpreted():  # for tests on a CPU; a picture on a GPU would take hours
            return ["TRITON_INTERPRET=1 is set"] if device.type == "cuda" else []
        if not _has_compiler():
            return ["Triton finds no C compiler, or no Python.h"]
        reason = why_not_started(device) if device.type == "cuda" else ""
        return [f"Triton cannot start ({reason})"] if reason else []
    if name != "cuda":
        return []
    from fastden.cuda import extension

    # Not its reasons: to look again reads all sources, and may start nvcc.
    return ["the extension could not be loaded before"] if extension.missing() else []


def expected(operators: Iterable[str], device: torch.device, dtype: torch.dtype) -> dict[str, str]:
    """What the automatic choice takes on a device for each of some operators, with inputs as they were measured."""
    able: dict[str, bool] = {}
    found = {}
    for operator in operators:
        found[operator] = "torch"
        for name in proven_backends(operator, device, dtype):
            if name not in able:
                able[name] = not (unavailable(_entry(name)) or left_out(name, device))
            if able[name]:
                found[operator] = name
                break
    return found


def _can_run(operator: str, name: str, device: torch.device, tensors: dict[str, Tensor | None]) -> bool:
    if left_out(name, device):
        return False
    if not torch.compiler.is_compiling():
        return not why_not(operator, name, batch_statistics=False, traced=False, **tensors)
    if not _make_ready(name):
        return False
    _ask_traced(operator, name, **tensors)
    return _answered()


def _measured(operator: str, tensors: dict[str, Tensor | None]) -> bool:
    """Whether weights and biases are like those that were measured: the fused network's, in the dtype of its inputs.

    A fused network has a bias everywhere, in float32. A network that is not fused has biases in the dtype of its
    weights, or none, or autocast converts its weights at each call.
    """
    weights = []
    run = None
    for name, tensor in tensors.items():
        if name.endswith("bias"):
            if tensor is None or tensor.dtype != torch.float32:
                return False
        elif tensor is not None:
            run = run or _as_run(tensor)
            if tensor.dtype != run:
                return False
            if name in WEIGHTS:
                weights.append(tuple(tensor.shape))
    return tuple(weights) in measured_shapes(operator)


@constant_result
def measured_shapes(operator: str) -> list[tuple[tuple[int, ...], ...]]:
    """The shapes of all weights of an operator, for each of its places in the network that was measured."""
    return SHAPES.get(operator, [])


def _recorded(tensors: dict[str, Tensor | None]) -> bool:
    """Whether this call is transformed, counted or saved to be run elsewhere, which needs PyTorch's operations.

    Code that ``torch.compile`` traces runs here, in this process.
    """
    if torch.compiler.is_compiling():
        return exporting() or transform_active()
    return not runs_as_written(*tensors.values())


@constant_result
def proven_backends(operator: str, device: torch.device, dtype: torch.dtype) -> list[str]:
    """The backends that results of a GPU show right and faster there, the fastest first."""
    # PyTorch for AMD's GPUs calls them "cuda", and an MI200 has the numbers of an H100 (9, 0).
    if not PROVEN or device.type != "cuda" or torch.version.hip:
        return []
    if device.index is None:  # the current one, which may be another one next time
        return list(_proven_on(operator, None, dtype))
    return list(_proven_on_index(operator, device.index, dtype))


def _proven_on(operator: str, index: int | None, dtype: torch.dtype) -> tuple[str, ...]:
    listed = [key for key in PROVEN if key[1] == operator and key[3] == _names([dtype])]
    # Fake tensors are on CUDA devices where there are none.
    if not listed or not torch.cuda.is_available():
        return ()
    capability = torch.cuda.get_device_capability(index)
    return tuple(key[0] for key in listed if key[2] == capability)  # the table has the fastest first


#: A call of the network asks eight times, and each time took 9 to 15 microseconds of the host's.
_proven_on_index = cache(_proven_on)


def _refusal(operator: str, name: str, batch_statistics: bool, traced: bool, tensors: dict[str, Tensor | None]) -> str:
    inputs = "; ".join(
        f"{key}: {tuple(tensor.shape)} {tensor.dtype} {tensor.device}"
        for key, tensor in tensors.items()
        if tensor is not None
    )
    lines = [f"backend {name!r} was asked for and cannot run {operator} on {inputs}"]
    for backend in NAMES:
        reasons = why_not(operator, backend, batch_statistics=batch_statistics, traced=traced, **tensors)
        lines.append(f"  {backend}: {'; '.join(reasons) if reasons else 'can run'}")
    return "\n".join(lines)


def _as_run(tensor: Tensor) -> torch.dtype:
    """The dtype that an operator computes in: autocast's dtype if autocast is on."""
    kind = tensor.device.type
    if tensor.dtype != torch.float64 and autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return tensor.dtype


def _names(dtypes: object) -> str:
    return ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))  # type: ignore[attr-defined]
