"""Count the bytes that a training step moves on a GPU, operator by operator; nothing is computed.

Each operator reads its inputs and writes its outputs once in memory, but for those that pass over them twice: BN of
PyTorch (statistics, then the result), gradients of BN (sums, then the gradient), and of convolutions (one product for
the input, one for the weight). PyTorch's convolution adds a bias in a pass of its own, and sums its gradient in one
more. The network runs under autocast, on fake tensors: composed on the kernels, composed on PyTorch's, or plain on
PyTorch's.

Also, what ``relu(bn(raw))`` costs as a pass of its own, hence what would be saved if readers normalised as they load:
the 1x1 ``expand`` of each bottleneck, which loads each value once a tile; all readers in the forward pass, the 3x3
convolutions among them, which would normalise each value nine times and hold their padding at zero; and in the backward
pass, too, where the weights' gradients read the same tensors, by kernels other than PyTorch's.

    TRITON_INTERPRET=1 python benchmarks/training_traffic.py
    python benchmarks/training_traffic.py --form composed
"""

from __future__ import annotations

import argparse
from collections import Counter
from typing import Any
from unittest import mock

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastden import ops
from fastden.network.model import Denoiser
from fastden.ops import batch_norm, pixel_pairs

#: Operators that read attributes or reserve memory: they move no bytes.
FREE = {"prim::device", "aten::empty", "aten::empty_like", "aten::empty_strided", "aten::new_empty", "aten::detach"}
FREE |= {"aten::new_empty_strided"}


def size(*values: Any) -> int:
    """Bytes of all tensors among ``values``."""
    return sum(value.numel() * value.element_size() for value in tree_leaves(values) if isinstance(value, Tensor))


def memory(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


class Traffic(TorchDispatchMode):
    """Counts what runs inside."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: Counter[str] = Counter()
        self.calls: Counter[str] = Counter()
        self.normalised: list[tuple[Tensor, int]] = []
        self.expand = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func._schema.name
        inputs = [value for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
        outputs = [value for value in tree_leaves(result) if isinstance(value, Tensor)]
        shared = {memory(tensor) for tensor in inputs}
        viewed = not func._schema.is_mutable and all(memory(tensor) in shared for tensor in outputs)
        if name in FREE or viewed:
            return result
        moved = size(inputs, outputs)
        if name == "fastden::batch_norm_gradient":
            moved += size(inputs)
        elif name == "aten::convolution_backward":
            grad, x, weight, *_, (for_x, for_weight, for_bias) = args
            moved = size([grad] * (for_x + for_weight + for_bias), [weight] * for_x, [x] * for_weight, outputs)
        elif name == "aten::convolution":
            moved += 2 * size(result) * (args[2] is not None)
        elif name == "aten::native_batch_norm":
            moved += size(args[0])
        elif name == "aten::native_batch_norm_backward":
            moved += size(args[0], args[1])
        elif name == "aten::copy_":
            moved -= size(args[0])  # it is only written
        elif name == "fastden::batch_norm_affine" and args[5] is None:
            self.normalised.append((result, moved))
        elif (
            name == "fastden::conv_bn_relu_statistics" and args[2].shape[2] == 1 and args[2].shape[0] > args[2].shape[1]
        ):
            self.expand += sum(cost for made, cost in self.normalised if memory(made) == memory(args[0]))
        self.bytes[name] += moved
        self.calls[name] += 1
        return result


def main() -> None:
    parser = argparse.ArgumentParser(description="Count the bytes that a training step on the kernels moves.")
    parser.add_argument("--form", choices=("triton", "composed", "plain"), default="triton")
    parser.add_argument("--size", type=int, nargs=2, default=(128, 128), metavar=("HEIGHT", "WIDTH"))
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--dtype", choices=("bfloat16", "float16"), default="bfloat16")
    arguments = parser.parse_args()
    backend = "triton" if arguments.form == "triton" else "torch"
    # Tensors are on a CPU, but those of a GPU are counted.
    with (
        FakeTensorMode(),
        mock.patch.object(batch_norm, "adds_bias_apart", return_value=True),
        mock.patch.object(pixel_pairs, "suit", return_value=True),
    ):
        model = Denoiser(composed=arguments.form != "plain").train()
        x = torch.empty(arguments.batch, 3, *arguments.size)
        with Traffic() as traffic, ops.use_backend(backend):
            with torch.autocast("cpu", getattr(torch, arguments.dtype)):
                y = model(x, 0.1)
            forward = sum(cost for _, cost in traffic.normalised)
            (y.float() - x).square().mean().backward()
    total = sum(traffic.bytes.values())
    table = Table("operator", "calls", "GB", "%")
    for name, moved in traffic.bytes.most_common(12):
        table.add_row(name, str(traffic.calls[name]), f"{moved / 1e9:.3f}", f"{100 * moved / total:.1f}")
    table.add_row("all", str(sum(traffic.calls.values())), f"{total / 1e9:.3f}", "100.0", style="bold")
    if arguments.form != "triton":
        Console(width=100).print(table)
        return
    for what, saved in (
        ("relu(bn(raw)) for expand", traffic.expand),
        ("relu(bn(raw)) in the forward pass", forward),
        ("relu(bn(raw)) in both passes", sum(cost for _, cost in traffic.normalised)),
    ):
        table.add_row(what, "", f"{saved / 1e9:.3f}", f"{100 * saved / total:.1f}")
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
