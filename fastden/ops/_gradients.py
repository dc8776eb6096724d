"""Gradients of convolutions, on Triton's kernels or on PyTorch's ``aten::convolution_backward``.

On kernels, the gradient of an input is a convolution of the result's gradient with rearranged weights, and the forward
kernels compute it. For stride 1, the weight is reversed and transposed. For stride 2, the four phases of a transposed
convolution compute it. The gradient of a weight has its own operator (:mod:`fastden.ops.weight_gradient`).

The backend ``triton`` takes, for each kind of convolution, the way that was faster on an H200 (:data:`DEFAULT`). The
backend ``cuda`` has no kernels for gradients and uses PyTorch's. The environment variable ``FASTDEN_BACKWARD``
overrides this: ``aten`` or ``kernels`` for all gradients, ``input=aten`` or ``weight=aten`` (separated by commas) for
those of inputs or weights.

Measured are both ways for each block in a training step in bfloat16, 64 crops of 128 pixels (``kernels`` in the step
on Triton, ``aten`` in the one on PyTorch), and each weight's gradient alone at 512 x 768. Not measured, but predicted:

- The step by :data:`DEFAULT` as a whole. With ``kernels`` for all gradients the GPU computes 10.05 ms. The sums of the
  table say 7.8 ms: 2.0 less for weights, 0.2 less for inputs.
- Two sources. PyTorch's step computes one gradient of the concatenation. Here each source has its own call, so nothing
  is concatenated. For the channels of conv3, the two calls together have as many of cuDNN's tiles as the one.
- float32, float16, and GPUs other than 9.0. They have the same defaults, because cuDNN is tuned for all of them, and
  the tiles of the Triton kernel of weights are tuned for none.

Memory does not depend on the way: with Triton's forward pass, a step on the H200 held 1206 MiB at its peak with
``aten`` (``benchmarks/results/h200/train-aten.json`` at d3ebf74) and 1210 MiB with ``kernels``.
``kernels`` give the same bits at every call. cuDNN does so under ``torch.use_deterministic_algorithms``.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import wraps
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from fastden.kernels._layout import channels_last
from fastden.ops import weight_gradient  # noqa: F401 (registers the operators)
from fastden.ops.tracing import constant_result

ENVIRONMENT = "FASTDEN_BACKWARD"
WAYS = ("aten", "kernels")


class Ways(NamedTuple):
    """How the gradients of inputs and of weights are computed: ``aten`` or ``kernels``."""

    input: str
    weight: str


# Milliseconds of the H200, kernels / aten. "step": benchmarks/results/h200/train-profile.json, backward passes of the
# forms "triton" and "composed". "alone": benchmarks/results/h200/ops-gradients.json.
#
#                       input, step     weight, step    weight, alone
#   stem                                0.163 / 0.342   0.070 / 0.452
#   res1                0.106 / 0.131   0.260 / 0.143
#   res2                0.033 / 0.040   0.094 / 0.055
#   res3                0.223 / 0.248   0.410 / 0.174   0.173 / 0.091   its three convolutions
#   conv2               0.111 / 0.052   0.141 / 0.056   0.054 / 0.033
#   conv3               0.526 / 0.351   1.054 / 0.409   0.386 / 0.180
#   up2                 0.032 / 0.042   0.102 / 0.098   0.031 / 0.029
#   head                0.102 / 0.392   1.573 / 0.668   0.214 / 0.070   alone: of the features' weight
#
# Inputs of blocks: aten adds the gradient of the residual in a pass of its own, which is counted here. Four launches of
# the kernels take 0.139, 0.044 and 0.292 ms. One of them computes the forward ``expand`` again: 24 % of their bytes,
# which are taken off. Weights of the head: without 0.101 ms in which cuDNN changed the layout of the image and of the
# gradient; both ways get them channels-last. The weight of the features has 16 taps in aten's step, 9 here and alone.
# Not measured: gradients of images (of the stem and the head), which training does not need.
#: How the backend ``triton`` computes the gradients of each kind of convolution.
DEFAULT = {
    "stem": Ways(input="kernels", weight="kernels"),
    "convolution": Ways(input="kernels", weight="aten"),  # stride 1: blocks
    "strided convolution": Ways(input="aten", weight="aten"),  # conv2
    "two sources": Ways(input="aten", weight="aten"),  # conv3
    "upsample": Ways(input="kernels", weight="aten"),  # up2
    "head": Ways(input="kernels", weight="aten"),
}


@constant_result
def ways(backend: str, kind: str) -> Ways:
    """How the gradients of a convolution are computed after its forward pass on ``backend``.

    Args:
        backend: ``triton`` or ``cuda``.
        kind: of :data:`DEFAULT`.

    Raises:
        ValueError: FASTDEN_BACKWARD is malformed.
    """
    chosen = DEFAULT[kind]._asdict() if backend == "triton" else {"input": "aten", "weight": "aten"}
    text = os.environ.get(ENVIRONMENT, "")
    for part in filter(None, text.split(",")):
        name, _, way = part.rpartition("=")
        if way not in WAYS or name not in ("", *chosen):
            accepted = "aten, kernels, or input= and weight= with one of them, separated by commas"
            raise ValueError(f"{ENVIRONMENT}: {text!r}; accepted: {accepted}")
        chosen.update({name: way} if name else dict.fromkeys(chosen, way))
    return Ways(**chosen)


def kind_of(b: Tensor | None, stride: int) -> str:
    """The kind, of :data:`DEFAULT`, of a convolution of one source or two."""
    if b is not None:
        return "two sources"
    return "convolution" if stride == 1 else "strided convolution"


def conv_gradients(
    needed: tuple[bool, ...],
    grad: Tensor,
    a: Tensor,
    b: Tensor | None,
    weight: Tensor,
    stride: int,
    padding: int,
    ways: Ways,
    added: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of ``conv2d(cat([a, b], 1), weight)``; the sources stay apart.

    Args:
        needed: whether the gradients of a, b and the weight are needed.
        grad: gradient of the result, channels-last.
        a: (N, A, H, W).
        b: (N, B, H, W) or None.
        weight: (O, A + B, k, k).
        stride, padding: of the convolution.
        ways: how the gradients are computed.
        added: a tensor of the shape of ``a`` that is added to its gradient, or None.

    Returns:
        Gradients of a, b and the weight; None for those that are not needed.
    """
    split = a.shape[1]
    sources = [(a, weight if b is None else weight[:, :split], needed[0])]
    if b is not None:
        sources.append((b, weight[:, split:], needed[1]))
    grads: list[Tensor | None] = [None, None]
    grad_weight = None
    # If PyTorch computes both, one call computes them at once.
    of_weight = needed[2] and ways.weight == "aten"
    parts: list[Tensor] = []
    for index, (x, part, wanted) in enumerate(sources):
        of_input = wanted and ways.input == "aten"
        if of_input or of_weight:
            grad_x, grad_part = _aten(grad, x, part, stride, padding, of_input, of_weight)
            if of_weight:
                parts.append(grad_part)
            if of_input:
                grads[index] = grad_x
        if wanted and not of_input:
            grads[index] = _input_gradient(grad, part, x.shape, stride, padding, added if index == 0 else None)
    if grads[0] is not None and added is not None and ways.input == "aten":
        grads[0] = grads[0].add_(added)
    if of_weight:
        grad_weight = parts[0] if b is None else torch.cat(parts, 1)
    elif needed[2]:
        grad_weight = torch.ops.fastden.weight_gradient(grad, a, b, weight.shape[-1], stride, padding)
    return grads[0], grads[1], grad_weight


def upsample_gradients(
    needed: tuple[bool, ...], grad: Tensor, x: Tensor, weight: Tensor, ways: Ways
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of the input and the weight of a transposed convolution of kernel 4, stride 2, padding 1."""
    grad_x = grad_weight = None
    x = channels_last(x)
    aten = [needed[0] and ways.input == "aten", needed[1] and ways.weight == "aten", False]
    if any(aten):
        grad_x, grad_weight, _ = torch.ops.aten.convolution_backward(
            grad, x, weight, None, [2, 2], [1, 1], [1, 1], True, [0, 0], 1, aten
        )
    # A transposed convolution is the gradient of a convolution's input. So its own gradient is that convolution.
    if needed[0] and not aten[0]:
        grad_x = torch.ops.fastden.conv_bn_relu(grad, weight, None, None, False, 2, 1)
    if needed[1] and not aten[1]:
        grad_weight = torch.ops.fastden.weight_gradient(x, grad, None, 4, 2, 1)
    return grad_x, grad_weight


def _aten(
    grad: Tensor, x: Tensor, weight: Tensor, stride: int, padding: int, of_input: bool, of_weight: bool
) -> tuple[Tensor, Tensor]:
    # cuDNN takes channels-last if x or the weight has it. Images do not, and then the gradient would be copied, too.
    x = channels_last(x)
    return torch.ops.aten.convolution_backward(
        grad, x, weight, None, [stride] * 2, [padding] * 2, [1, 1], False, [0, 0], 1, [of_input, of_weight, False]
    )[:2]


def _input_gradient(
    grad: Tensor, weight: Tensor, shape: tuple[int, ...], stride: int, padding: int, added: Tensor | None
) -> Tensor:
    """Gradient of a convolution's input, which has ``shape``, plus ``added``; computed by the forward kernels."""
    kernel = weight.shape[-1]
    height, width = shape[2:]
    # For stride 2: a transposed convolution of kernel 2 t with padding t - 1 and t even. Zeros surround the weight.
    taps = 2 if kernel <= 4 else 4
    before = taps - 1 - padding
    if stride == 2 and before >= 0 and kernel + before <= 2 * taps:
        after = 2 * taps - kernel - before
        # Rows and columns after the last window, which no window reaches.
        more = [max(0, (size - 2 * made + 1) // 2) for size, made in zip((height, width), grad.shape[2:], strict=True)]
        if any(more):
            grad = F.pad(grad, (0, more[1], 0, more[0]))
        filled = F.pad(weight, (before, after, before, after))
        result = torch.ops.fastden.upsample(channels_last(grad), filled, None)[:, :, :height, :width]
        return channels_last(result if added is None else result + added)
    if stride > 1:
        # Zeros go between the gradient's pixels, and after them for rows and columns that no window reaches.
        spread = grad.new_zeros((*grad.shape[:2], height + 2 * padding - kernel + 1, width + 2 * padding - kernel + 1))
        spread[:, :, ::stride, ::stride] = grad
        grad = spread
    margin = kernel - 1 - padding
    if margin < 0:
        # This cuts off the gradient of the padding.
        grad = grad[:, :, -margin : grad.shape[2] + margin, -margin : grad.shape[3] + margin]
    turned = weight.flip(2, 3).transpose(0, 1)
    return torch.ops.fastden.conv_bn_relu(channels_last(grad), turned, None, added, False, 1, max(margin, 0))


class _NoSecondDerivative(torch.autograd.Function):
    """Passes gradients through; its backward pass raises.

    Autograd runs a backward pass only on the way to a tensor whose gradient is wanted. So the function also takes all
    tensors that the gradients depend on.
    """

    @staticmethod
    def forward(ctx: Any, name: str, depends_on: int, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
        ctx.name = name
        gradients = tensors[depends_on:]
        return tuple(None if gradient is None else gradient.view_as(gradient) for gradient in gradients)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> Any:
        raise RuntimeError(
            f"{ctx.name}: second derivatives on kernels; accepted: first derivatives. The torch backend has both"
            ' (fastden.ops.use_backend("torch") around the forward pass, or FASTDEN_BACKEND=torch), and so has'
            " fastden.fuse(..., differentiable=True)"
        )


def first_derivative_only(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorator of an operator's ``backward(ctx, saved, *gradients)``, where ``saved`` is ``ctx.saved_tensors``.

    A second derivative raises an error that says what to do. The saved tensors have to lead autograd to every input
    that a gradient depends on.
    """

    def decorate(backward: Callable[..., Any]) -> Callable[..., Any]:
        once = once_differentiable(backward)

        @wraps(backward)
        def run(ctx: Any, *gradients: Tensor) -> Any:
            saved = ctx.saved_tensors  # read once: activation checkpointing returns each tensor only once
            if torch.compiler.is_compiling() or not torch.is_grad_enabled():
                return once(ctx, saved, *gradients)
            with torch.no_grad():
                results = backward(ctx, saved, *gradients)
            # If none of these requires a gradient, no second derivative exists, and the results require none either.
            depends_on = [one for one in (*gradients, *saved) if isinstance(one, Tensor) and one.requires_grad]
            return _NoSecondDerivative.apply(name, len(depends_on), *depends_on, *results)

        return run

    return decorate
