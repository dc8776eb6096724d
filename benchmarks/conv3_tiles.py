"""conv3, two thirds of the network's arithmetic: the default tile beside others, with and without descriptors, in turn.

Descriptors need a GPU of compute capability 9.0 or later: older ones run the others alone. Exits with 1 where a result
is wrong. Interpreted on a CPU (``TRITON_INTERPRET=1``, a small ``--size``) its times mean nothing.

    python benchmarks/conv3_tiles.py --json benchmarks/results/bench/conv3-tiles.json
"""

from __future__ import annotations

import argparse
import sys
from functools import partial
from pathlib import Path

import torch

from fastden import ops
from fastden.bench import machine, tables
from fastden.bench.compare import Contender, Job, Settings, bounds, compare
from fastden.kernels._descriptors import why_not
from fastden.kernels._tiles import ConvConfig, config_for
from fastden.kernels.concat_conv_bn_relu import DESCRIBED, concat_conv_bn_relu


def name(config: ConvConfig | None) -> str:
    if config is None:
        return "by default"
    tile = f"{config.block_m}x{config.block_n}x{config.block_k}, {config.warps} warps, {config.stages} stages"
    return f"descriptors {tile}" if config.descriptors else tile


def main() -> int:
    parser = argparse.ArgumentParser(description="Compare tiles for conv3.")
    parser.add_argument("--size", type=int, nargs=2, default=(540, 960), help="height and width of conv3's own input")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--dtype", choices=("bfloat16", "float16"), default="bfloat16")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = getattr(torch, arguments.dtype)
    torch.manual_seed(0)
    # Half of the values are zeros, as after a ReLU; up2 has no ReLU.
    a = torch.randn(arguments.batch, 128, *arguments.size, device=device).relu().to(dtype)
    b = torch.randn(arguments.batch, 32, *arguments.size, device=device).to(dtype)
    weight = (torch.randn(256, 160, 3, 3, device=device) / 38).to(dtype)
    bias = torch.randn(256, device=device).to(dtype)
    a, b, weight = (tensor.contiguous(memory_format=torch.channels_last) for tensor in (a, b, weight))
    exact = ops.concat_conv_bn_relu(*(tensor.double() for tensor in (a, b, weight, bias)), backend="torch")
    eager = ops.concat_conv_bn_relu(a, b, weight, bias, backend="torch")
    pixels = a.shape[0] * a.shape[2] * a.shape[3]
    flops = 2.0 * 9 * 160 * 256 * pixels
    moved = float((160 + 256) * pixels * dtype.itemsize)
    job = Job("conv3", len(a), pixels, moved, (exact,), bounds(eager, (exact,), dtype))
    described = () if why_not(a, b, weight) else DESCRIBED
    plain = config_for(128, 256, pixels, dtype.itemsize)
    calls = {
        config: partial(concat_conv_bn_relu, a, b, weight, bias, config=config) for config in (None, plain, *described)
    }
    contenders = [Contender(name(config), lambda call=call: call, flops, own=True) for config, call in calls.items()]
    settings = Settings(device, dtype, arguments.rounds, graphs=device.type == "cuda")
    with machine.steady_settings(device):
        limits = machine.ceilings(device, dtype)
        results = [compare(job, contenders, settings, limits)]
    tables.show(results, limits, {})
    if arguments.json:
        document = {"machine": machine.describe(device), "size": arguments.size, "ceilings": limits, "results": results}
        tables.write(arguments.json, {"command": "python benchmarks/conv3_tiles.py", **document})
    return tables.exit_code(results)


if __name__ == "__main__":
    sys.exit(main())
