"""Fold batch normalisation into a network's weights; refuse layers that cannot be folded."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastden.algebra import fold_batch_norm
from fastden.network.model import Denoiser
from fastden.nn import Bottleneck, ConcatConvBNReLU, ConvBNReLU, Upsample, is_plain_upsample
from fastden.plain_layers import evaluating, has_geometry, is_plain_conv, is_untouched

Pair = tuple[Tensor, Tensor]
_NORM_FORWARDS = (nn.BatchNorm2d.forward, nn.SyncBatchNorm.forward)


@torch.no_grad()
def weights(model: Denoiser) -> dict[str, Pair]:
    """Weight and bias of each convolution of ``model`` with its BN folded, float64, on the CPU.

    Returns:
        By name: conv0, conv1, res1_reduce, res1_conv, res1_expand, conv2, ..., up2, conv3, up3, out.

    Raises:
        ValueError: a layer is not a plain one, or its tensors are shared among processes; the error names it. Or the
            model is on meta.
    """
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if any(kind.__name__ == "DTensor" for kind in type(tensor).__mro__):  # without an import of a second
            raise ValueError(
                f"{name.rpartition('.')[0]}: its {name.rpartition('.')[2]} is a DTensor, shared among processes (FSDP2,"
                " tensor parallelism); accepted by fuse(): whole tensors (load get_model_state_dict(model,"
                " options=StateDictOptions(full_state_dict=True)) of torch.distributed.checkpoint.state_dict into a new"
                " Denoiser)"
            )
    if any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers())):
        raise ValueError("model: on meta, without weights; accepted: one with weights (load_state_dict(assign=True))")
    # In training, parametrisations may draw (dropout) or move buffers of theirs (spectral_norm) when a weight is read.
    with evaluating(model):
        return _weights(model)


def _weights(model: Denoiser) -> dict[str, Pair]:
    check_call(model)
    for name in ("forward_padded", "_trunk", "_forward_composed"):
        if getattr(type(model), name) is not getattr(Denoiser, name) or name in vars(model):
            raise ValueError(_refusal("model", model, f"has a {name} of its own"))
    pairs = {"conv0": _conv("conv0", model.conv0, 5, 1, 0)}
    for name, kind, stride in (("conv1", ConvBNReLU, 2), ("conv2", ConvBNReLU, 2), ("conv3", ConcatConvBNReLU, 1)):
        block = getattr(model, name)
        _check_module(name, block, kind, partial(_features, model, name))
        if block.relu is not True:
            raise ValueError(_refusal(name, block, "has no ReLU"))
        pairs[name] = _fold(f"{name}.bn", block.bn, *_conv(f"{name}.conv", block.conv, 3, stride, 1))
    for name in ("res1", "res2", "res3"):
        block = getattr(model, name)
        _check_module(name, block, Bottleneck, partial(_features, model, name))
        for part, bn, kernel in (("reduce", "bn1", 1), ("conv", "bn2", 3), ("expand", "bn3", 1)):
            pair = _conv(f"{name}.{part}", getattr(block, part), kernel, 1, kernel // 2)
            pairs[f"{name}_{part}"] = _fold(f"{name}.{bn}", getattr(block, bn), *pair)
    pairs |= {name: _upsample(name, getattr(model, name)) for name in ("up2", "up3")}
    pairs["out"] = _conv("out", model.out, 3, 1, 0)
    return pairs


def check_call(model: Denoiser) -> None:
    """Raise ValueError where a call of ``model`` gives something else than :meth:`fastden.Denoiser.forward` does."""
    _check_module("model", model, Denoiser, partial(_image, model))


def _fold(name: str, bn: nn.Module, weight: Tensor, bias: Tensor) -> Pair:
    if not is_untouched(bn, (nn.BatchNorm2d, nn.SyncBatchNorm), *_NORM_FORWARDS, hooks=True):
        raise ValueError(_refusal(name, bn, "is no BatchNorm2d"))
    if bn.running_mean is None or bn.running_var is None:
        raise ValueError(_refusal(name, bn, "has no running statistics"))

    def plain(x: Tensor) -> Tensor:
        return F.batch_norm(x, bn.running_mean, bn.running_var, bn.weight, bn.bias, eps=bn.eps)

    _check_hooks(name, bn, plain, lambda: _ramp(bn.running_mean, 1, bn.num_features, 2, 2))
    mean, variance = _exact(bn.running_mean), _exact(bn.running_var)
    scale = torch.ones_like(mean) if bn.weight is None else _exact(bn.weight)
    shift = torch.zeros_like(mean) if bn.bias is None else _exact(bn.bias)
    return fold_batch_norm(weight, bias, scale, shift, mean, variance, bn.eps)


def _conv(name: str, conv: nn.Module, kernel: int, stride: int, padding: int) -> Pair:
    if not is_plain_conv(conv, hooks=True) or not has_geometry(conv, kernel, stride, padding):  # type: ignore[arg-type]
        raise ValueError(_refusal(name, conv, "is not the convolution that the network was built with"))
    assert isinstance(conv, nn.Conv2d)

    def plain(x: Tensor) -> Tensor:
        return F.conv2d(x, conv.weight, conv.bias, stride, padding)

    _check_hooks(name, conv, plain, lambda: _ramp(conv.weight, 1, conv.in_channels, kernel, kernel))
    return _pair(conv, conv.out_channels)


def _upsample(name: str, layer: nn.Module) -> Pair:
    if not is_plain_upsample(layer, hooks=True):
        raise ValueError(_refusal(name, layer, "is not the transposed convolution that the network was built with"))
    assert isinstance(layer, Upsample)

    def plain(x: Tensor) -> Tensor:
        return F.conv_transpose2d(x, layer.weight, layer.bias, 2, 1)

    _check_hooks(name, layer, plain, lambda: _ramp(layer.weight, 1, layer.in_channels, 2, 2))
    return _pair(layer, layer.out_channels)


def _pair(layer: nn.Conv2d | nn.ConvTranspose2d, outputs: int) -> Pair:
    # Read the weight after the hooks ran: hooks such as those of torch.nn.utils.weight_norm set it.
    weight = _exact(layer.weight)
    return weight, weight.new_zeros(outputs) if layer.bias is None else _exact(layer.bias)


def _check_module(name: str, module: nn.Module, kind: type[nn.Module], inputs: Callable[[], tuple[Any, ...]]) -> None:
    """Raise ValueError unless ``module`` is a ``kind`` and a call runs the ``forward`` of that class."""
    if not is_untouched(module, kind, hooks=True):
        raise ValueError(_refusal(name, module, f"is not fastden's {kind.__name__}"))
    _check_hooks(name, module, lambda *arguments: kind.forward(module, *arguments), inputs)


def _check_hooks(
    name: str, module: nn.Module, plain: Callable[..., Tensor], inputs: Callable[[], Tensor | tuple[Any, ...]]
) -> None:
    """Raise ValueError where forward hooks change the result of ``module``. It calls a module with hooks once."""
    if not (module._forward_hooks or module._forward_pre_hooks):
        return
    made = inputs()
    arguments = made if isinstance(made, tuple) else (made,)
    with evaluating(module):
        result, expected = module(*arguments), plain(*arguments)
    tolerance = 64 * torch.finfo(expected.dtype).eps * float(expected.abs().max())
    same = isinstance(result, Tensor) and result.shape == expected.shape
    if not same or not torch.allclose(result, expected, rtol=0.0, atol=tolerance):
        raise ValueError(_refusal(name, module, "has hooks that change its result"))


def _ramp(like: Tensor | None, *shape: int) -> Tensor:
    """Evenly spaced values from 0 to 1, in the dtype and on the device of ``like``. No random state changes."""
    assert like is not None
    count = torch.Size(shape).numel()
    return torch.linspace(0, 1, count, dtype=torch.float32, device="cpu").to(like).view(shape)


def _image(model: Denoiser) -> tuple[Any, ...]:
    x = _ramp(next(model.parameters()), 1, model.image_channels, 4, 4)
    return (x, 0.1) if model.noise_level_input else (x,)


def _features(model: Denoiser, name: str) -> tuple[Tensor, ...]:
    channels = {"conv1": (64,), "res1": (128,), "conv2": (128,), "res2": (128,), "conv3": (128, 32), "res3": (256,)}
    return tuple(_ramp(next(model.parameters()), 1, count, 4, 4) for count in channels[name])


def _refusal(name: str, module: nn.Module, reason: str) -> str:
    return (
        f"{name}: {type(module).__name__} {reason}; accepted by fuse(): the layers that the network was built with, and"
        " parametrisations of their tensors (merge or remove adapters, wrappers and hooks first, or use the network as"
        " it is)"
    )


def _exact(tensor: Tensor) -> Tensor:
    """``tensor`` in float64, on the CPU: not every device has float64."""
    return tensor.detach().cpu().double()
