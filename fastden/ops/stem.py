"""stem: conv1 o conv0 as one 7x7 convolution of stride 2 on the raw image, exact on the border too."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fastden.algebra import paired_stem
from fastden.kernels._layout import channels_last
from fastden.ops import pixel_pairs, post_operations
from fastden.ops._checks import check_batch_norm, check_filled, check_flags, check_shape, check_tensors
from fastden.ops._gradients import first_derivative_only, ways
from fastden.ops._library import OPERATORS, Operator, check, check_not_empty, empty_like
from fastden.ops.backends import choose
from fastden.ops.batch_norm import BatchNorm, batch_norm_relu, batch_statistics, finish, split_bias
from fastden.ops.modes import transforming
from fastden.ops.tensors import in_autocast, like, may_overwrite, wants_gradient


def stem(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    bn: BatchNorm | None = None,
    relu: bool = True,
    backend: str | None = None,
) -> Tensor:
    """First feature map at half resolution, directly from the padded image.

    conv1 pads the *output* of conv0 with zeros. So on the first row and column of the result, the taps that would read
    this padding do not exist. There are four weight sets; see :func:`fastden.algebra.compose_stem`.

    Args:
        x: (N, C, H, W), the padded network input; H and W even, at least 8.
        weight: (4, O, C, 7, 7): inside, first row, first column, corner.
        bias: (4, O), in the same order; float32 or the dtype of ``x``.
        bn: batch normalisation over O channels; None if it is folded.
        relu: whether the ReLU is applied.
        backend: see :mod:`fastden.ops.backends`; None leaves it to the context, the environment or fastden.

    Returns:
        (N, O, (H - 4) / 2, (W - 4) / 2).

    Raises:
        TypeError, ValueError: names the argument, its value and the accepted values.
        RuntimeError: the requested backend cannot run; the message gives every backend's reasons.
    """
    if not torch.compiler.is_compiling():
        check_tensors(x=x, weight=weight, bias=bias)
        check_input_size(x)
        check_shape("weight", weight, 4, "O", x.shape[1], 7, 7)
        check_filled(weight=weight)
        check_shape("bias", bias, 4, weight.shape[1])
        check_batch_norm("bn", bn, weight.shape[1])
        check_flags(relu=relu)
    backend = choose(
        "stem",
        backend,
        batch_statistics=batch_statistics(bn),
        as_measured=bn is None and relu,
        x=x,
        weight=weight,
        bias=bias,
    )
    if backend != "torch":
        y = Stem.apply(*in_autocast(x, weight), bias, relu and bn is None, backend)
        if bn is not None and bn.training:
            return batch_norm_relu(y, bn, relu)
        return y if bn is None else finish(y, bn, None, relu)
    if pixel_pairs.suit(x, weight):
        y, left_out = _on_pairs(x, weight, bias, bn)
        return finish(y, bn, None, relu, left_out)
    # What all pixels have in common is the bias of the inside.
    inside, left_out = split_bias(bias[0], bn)
    if left_out is not None:
        bias = bias - left_out
    bias = bias.to(x.dtype)
    fused = bn is None and relu and post_operations.serves(x, weight, bias)
    convolution = partial(post_operations.convolution, relu=True) if fused else F.conv2d
    x = F.pad(x, (1, 0, 1, 0))
    y = convolution(x, weight[0], None if inside is None else bias[0], stride=2)
    row = convolution(x[:, :, :7], weight[1], bias[1], stride=2)
    # Nine columns, to get the first one right: oneDNN 3.12's bf16 convolution reads uninitialised memory when this
    # kernel meets an output one column wide (NaN in 10 of 10 runs on poisoned memory).
    column = convolution(x[..., :9], weight[2], bias[2], stride=2)[..., :1]
    corner = convolution(x[:, :, :7, :7], weight[3], bias[3], stride=2)
    if may_overwrite():
        # These lines write into the convolution's output without a copy: conv2d's backward does not need its output.
        # Each write copies the whole gradient in the backward pass: two of them, not three.
        y[:, :, :1] = torch.cat([corner, row[..., 1:]], 3)
        y[:, :, 1:, :1] = column[:, :, 1:]
    else:
        below = torch.cat([column, y[..., 1:]], 3)[:, :, 1:]
        y = torch.cat([torch.cat([corner, row[..., 1:]], 3), below], 2)
    return y if fused else finish(y, bn, None, relu, left_out)


def _on_pairs(x: Tensor, weight: Tensor, bias: Tensor, bn: BatchNorm | None) -> tuple[Tensor, Tensor | None]:
    """The convolution by pairs of pixels, its border as one matrix product; and the bias that it lacks."""
    (weight,) = in_autocast(weight)
    own_bias, other_biases = bias.split([1, 3])
    inside, left_out = split_bias(own_bias.squeeze(0), bn)
    if left_out is not None:
        other_biases = other_biases - left_out
    # A split has one gradient of both parts, an index fills all of the four sets with zeros first.
    own, others = paired_stem(weight, pixel_pairs.zeros_for(x.shape[1])).split([1, 3])
    x = pixel_pairs.folded(x, weight.dtype)
    y = F.conv2d(x, own.squeeze(0), like(inside, x))
    windows = _border_windows(x, own.shape[-1])
    sets, biases = others.permute(0, 1, 3, 4, 2).flatten(2).flatten(0, 1), other_biases.flatten().to(x.dtype)
    if x.dtype == torch.float32:
        # By a convolution, too: on a GPU it rounds to TF32, unless told not to, and a matrix product only if told to.
        columns, kernels = (one.permute(0, 3, 1, 2) for one in (windows[:, None], sets[:, None, None]))
        made = F.conv2d(columns, kernels, biases).permute(0, 2, 3, 1).squeeze(1)
    else:
        made = F.linear(windows, sets, biases)
    return _with_border(y, made), left_out


def _border_windows(x: Tensor, taps: int) -> Tensor:
    """What the first row and the first column of the result read.

    Args:
        x: (N, C, H, W), padded.
        taps: of the convolution to (N, O, h, w).

    Returns:
        (N, w + h - 1, taps * taps * C): the row, and then the column without the corner; channels innermost.
    """
    pixels = x.permute(0, 2, 3, 1)
    row = pixels[:, :taps].unfold(2, taps, 1).permute(0, 2, 1, 4, 3)
    column = pixels[:, 1:, :taps].unfold(1, taps, 1).permute(0, 1, 4, 2, 3)
    return torch.cat([row, column], 1).flatten(2)


def _with_border(y: Tensor, made: Tensor) -> Tensor:
    """``y`` (N, O, h, w) with another first row and column: (N, w + h - 1, 3 O), all three sets of each window."""
    if may_overwrite():
        # Into the convolution's output without a copy: its gradient does not need it.
        return (_Border.apply if wants_gradient(y, made) and not transforming() else _write_border)(y, made)
    row, column, corner = (made[part] for part in _border_parts(made, y.shape[3]))
    first = torch.cat([corner[:, None], row], 1).transpose(1, 2)[:, :, None]
    below = torch.cat([column.transpose(1, 2)[..., None], y[:, :, 1:, 1:]], 3)
    return torch.cat([first, below], 2)


def _border_parts(made: Tensor, width: int) -> tuple[tuple[Any, ...], ...]:
    """The first row and the first column without the corner, and the corner, in what :func:`_with_border` takes."""
    o = made.shape[2] // 3
    return (
        (_ALL, slice(1, width), slice(0, o)),
        (_ALL, slice(width, None), slice(o, 2 * o)),
        (_ALL, 0, slice(2 * o, None)),
    )


_ALL = slice(None)
#: The parts of :func:`_border_parts` in (N, h, w, O).
_BORDER: tuple[tuple[Any, ...], ...] = (_ALL, 0, slice(1, None)), (_ALL, slice(1, None), 0), (_ALL, 0, 0)


def _write_border(y: Tensor, made: Tensor) -> Tensor:
    pixels = y.permute(0, 2, 3, 1)
    for into, part in zip(_BORDER, _border_parts(made, y.shape[3]), strict=True):
        pixels[into] = made[part]
    return y


class _Border(torch.autograd.Function):
    """:func:`_write_border`. PyTorch's own gradient would copy all of the result's gradient for each write."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, made: Tensor) -> Tensor:
        ctx.mark_dirty(y)
        return _write_border(y, made)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        n, outputs, height, width = grad.shape
        of_y, of_made = grad.clone(), grad.new_zeros(n, width + height - 1, 3 * outputs)
        pixels = grad.permute(0, 2, 3, 1)
        for part, into in zip(_BORDER, _border_parts(of_made, width), strict=True):
            of_made[into] = pixels[part]
        of_y[:, :, 0] = 0
        of_y[:, :, 1:, 0] = 0
        return of_y, of_made


def check_input_size(x: Tensor) -> None:
    """Raise ValueError unless ``x`` is a padded network input: (N, C, H, W), H and W even and at least 8."""
    check_shape("x", x, "N", "C", "H", "W")
    if any(size % 2 or size < 8 for size in x.shape[2:]):
        raise ValueError(f"x: shape {tuple(x.shape)}; accepted: (N, C, H, W), H and W even and at least 8")


def _operator(x: Tensor, weight: Tensor, bias: Tensor, relu: bool) -> Tensor:
    from fastden.kernels.stem import stem

    return stem(x, weight, bias, relu)


_OPERATOR = Operator(_operator, "stem")


@_OPERATOR.shape
def _(x: Tensor, weight: Tensor, bias: Tensor, **_: Any) -> Tensor:
    check(x.dim() == 4, "x", x, "4 dimensions")
    n, channels, height, width = x.shape
    even = height % 2 == 0 and width % 2 == 0 and height >= 8 and width >= 8
    check(even, "x", x, "(N, C, H, W), H and W even and at least 8")
    outputs = weight.shape[1]
    check(tuple(weight.shape) == (4, outputs, channels, 7, 7), "weight", weight, f"(4, O, {channels}, 7, 7)")
    check_not_empty(weight=weight)
    check(tuple(bias.shape) == (4, outputs), "bias", bias, f"(4, {outputs})")
    return empty_like(x, (n, outputs, (height - 4) // 2, (width - 4) // 2))


class Stem(torch.autograd.Function):
    """conv1 o conv0, with or without a ReLU. x gets a gradient only if it needs one."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, relu: bool, backend: str) -> Tensor:
        y = OPERATORS[backend].stem(x, weight, bias, relu)
        ctx.save_for_backward(x, weight, y if relu else None)
        ctx.ways = ways(backend, "stem")
        ctx.bias_dtype = bias.dtype
        return y

    @staticmethod
    @first_derivative_only("stem")
    def backward(ctx: Any, saved: tuple[Any, ...], grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, y = saved
        grad = channels_last(grad)
        if y is not None:
            grad = torch.ops.aten.threshold_backward(grad, y, 0)
        needed, way = ctx.needs_input_grad, ctx.ways
        grad_x = grad_weight = grad_bias = None
        aten = (needed[0] and way.input == "aten", needed[1] and way.weight == "aten")
        if any(aten):
            grad_x, grad_weight = _aten_gradients(*aten, grad, x, weight)
        if needed[0] and not aten[0]:
            grad_x = _input_gradient(grad, weight)
        if needed[1] and not aten[1]:
            grad_weight = torch.ops.fastden.weight_gradient_stem(grad, x)
        if needed[2]:
            grad_bias = torch.stack([grad[part].sum((0, 2, 3), dtype=ctx.bias_dtype) for part in _REGIONS])
        return grad_x, grad_weight, grad_bias, None, None


_FIRST, _REST = slice(None, 1), slice(1, None)
#: The part of the result that each of the four sets of weights makes.
_REGIONS = tuple((..., rows, columns) for columns in (_REST, _FIRST) for rows in (_REST, _FIRST))


def _input_gradient(grad: Tensor, weight: Tensor) -> Tensor:
    """Gradient of the image: for each region of the result, a transposed convolution with the region's weights.

    Output pixel i reads rows from 2 i - 1 on: rows 2 (i + 1) - 3 + t. This is a transposed convolution of kernel 8 with
    a padding of 3, if the result gets one more row at the front. It also gets one more row at the end, because the last
    window ends before the image does.
    """
    total: Tensor | None = None
    for part, kernel in zip(_REGIONS, weight, strict=True):
        # A region that begins at the second row or column has a row or column of zeros in place of the first. If the
        # weights belong to the first row or column, that one is enough.
        above, before = (1 if span is _FIRST else 2 for span in part[1:])
        region = channels_last(F.pad(grad[part], (before, 1, above, 1)))
        made = torch.ops.fastden.upsample(region, F.pad(kernel, (0, 1, 0, 1)), None)
        if total is None:
            total = made
        else:
            # The windows of the first row end on row 5. This is the last row of the third pair.
            total[:, :, : made.shape[2], : made.shape[3]] += made
    assert total is not None
    return total


def _aten_gradients(
    of_input: bool, of_weight: bool, grad: Tensor, x: Tensor, weight: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of the image and the weights, computed by PyTorch's convolutions for each region."""
    padded = F.pad(x, (1, 0, 1, 0))
    grad_padded = torch.zeros_like(padded) if of_input else None
    weights = []
    # Output row i reads rows 2 i to 2 i + 6 of the padded image.
    for part, kernel in zip(_REGIONS, weight, strict=True):
        window = (..., *(slice(None, 7) if side is _FIRST else slice(2, None) for side in part[1:]))
        region = grad[part]
        if 0 in region.shape:
            weights.append(torch.zeros_like(kernel))
            continue
        grad_x, grad_weight, _none = torch.ops.aten.convolution_backward(
            region, padded[window], kernel, None, [2, 2], [0, 0], [1, 1], False, [0, 0], 1, [of_input, of_weight, False]
        )
        if grad_padded is not None:
            grad_padded[window] += grad_x
        weights.append(grad_weight)
    return (None if grad_padded is None else grad_padded[:, :, 1:, 1:]), torch.stack(weights) if of_weight else None
