"""Gradients of the operators that read or make the image, stem and head, on kernels; see ``_autograd.py``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastden.ops._autograd import channels_last
from fastden.ops._dispatch import OPERATORS


class Stem(torch.autograd.Function):
    """conv1 o conv0, with a ReLU or without; x is given the gradient only where it wants one."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, relu: bool, backend: str) -> Tensor:
        y = OPERATORS[backend].stem(x, weight, bias, relu)
        ctx.save_for_backward(x, weight, y if relu else None)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, y = ctx.saved_tensors
        grad = channels_last(grad)
        if y is not None:
            grad = torch.ops.aten.threshold_backward(grad, y, 0)
        padded = torch.nn.functional.pad(x, (1, 0, 1, 0))
        grad_padded = torch.zeros_like(padded) if ctx.needs_input_grad[0] else None
        weights, biases = [], []
        first, rest = slice(None, 1), slice(1, None)
        # Each region of the output has its own weights; output row i reads rows 2 i to 2 i + 6 of the padded image.
        for index, (rows, columns) in enumerate(((rest, rest), (first, rest), (rest, first), (first, first))):
            part = grad[:, :, rows, columns]
            window = (..., *(slice(None, 7) if side is first else slice(2, None) for side in (rows, columns)))
            if 0 in part.shape:
                weights.append(torch.zeros_like(weight[index]))
                biases.append(torch.zeros_like(weight[index, :, 0, 0, 0]))
                continue
            wanted = [grad_padded is not None, ctx.needs_input_grad[1], False]
            grad_x, grad_weight, _ = torch.ops.aten.convolution_backward(
                part, padded[window], weight[index], None, [2, 2], [0, 0], [1, 1], False, [0, 0], 1, wanted
            )
            if grad_padded is not None:
                grad_padded[window] += grad_x
            weights.append(grad_weight)
            biases.append(part.sum((0, 2, 3)))
        return (
            None if grad_padded is None else grad_padded[:, :, 1:, 1:],
            torch.stack(weights) if ctx.needs_input_grad[1] else None,
            torch.stack(biases) if ctx.needs_input_grad[2] else None,
            None,
            None,
        )


class Head(torch.autograd.Function):
    """out o cat(conv0, up3), with the image added or without."""

    @staticmethod
    def forward(
        ctx: Any,
        features: Tensor,
        x: Tensor,
        weight: Tensor,
        image_weight: Tensor,
        bias: Tensor,
        image: Tensor | None,
        add_input: bool,
        clamp: bool,
        composed: bool,
        backend: str,
    ) -> Tensor:
        ctx.save_for_backward(features, x, weight, image_weight)
        ctx.add_to_input = add_input and image is None
        ctx.image_shape = None if image is None else image.shape
        return OPERATORS[backend].head(features, x, weight, image_weight, bias, image, add_input, clamp, composed)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, full_grad: Tensor) -> tuple[Tensor | None, ...]:
        features, x, weight, image_weight = ctx.saved_tensors
        needed = ctx.needs_input_grad
        grad_features = grad_weight = grad_x = grad_image_weight = grad_image = None
        grad = full_grad.to(features.dtype)
        if needed[0] or needed[2]:
            phases = channels_last(torch.nn.functional.pixel_unshuffle(grad, 2))
            grad_features, grad_weight, _ = torch.ops.aten.convolution_backward(
                phases, features, weight, None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1, [needed[0], needed[2], False]
            )
        if needed[1] or needed[3]:
            grad_x, grad_image_weight, _ = torch.ops.aten.convolution_backward(
                grad, x, image_weight, None, [1, 1], [0, 0], [1, 1], False, [0, 0], 1, [needed[1], needed[3], False]
            )
        if grad_x is not None and ctx.add_to_input:
            grad_x[:, : grad.shape[1], 3:-3, 3:-3] += grad
        if needed[5]:
            grad_image = full_grad.new_zeros(ctx.image_shape)
            grad_image[:, : grad.shape[1], 3:-3, 3:-3] = full_grad
        bias = grad.sum((0, 2, 3)) if needed[4] else None
        return grad_features, grad_x, grad_weight, grad_image_weight, bias, grad_image, None, None, None, None
