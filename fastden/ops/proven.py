"""Kernels that results of a GPU show right and faster, which the automatic choice takes.

Written by ``benchmarks/prove.py``, not by hand.
"""

from __future__ import annotations

#: (backend, operator, compute capability, dtype): the file of results, from the repository's root, and a digest of the
#: kernel's sources that were measured (``benchmarks/kernel_sources.py``). If an operator has two backends, the faster
#: one comes first.
PROVEN: dict[tuple[str, str, tuple[int, int], str], tuple[str, str]] = {
    ("cuda", "bottleneck", (9, 0), "bfloat16"): (
        "benchmarks/results/h200/ops-2160.json",
        "c32552dfb15b",
    ),
    ("triton", "bottleneck", (9, 0), "bfloat16"): (
        "benchmarks/results/h200/ops-2160.json",
        "90a5c611c97c",
    ),
    ("cuda", "concat_conv_bn_relu", (9, 0), "bfloat16"): (
        "benchmarks/results/h200/ops-2160.json",
        "374029300ad8",
    ),
    ("triton", "concat_conv_bn_relu", (9, 0), "bfloat16"): (
        "benchmarks/results/h200/ops-2160.json",
        "f258b88e9a91",
    ),
    ("cuda", "head", (9, 0), "bfloat16"): (
        "benchmarks/results/h200/ops-2160.json",
        "1d4270c4d4b8",
    ),
    ("triton", "head", (9, 0), "bfloat16"): (
        "benchmarks/results/h200/ops-2160.json",
        "37484f404d46",
    ),
    ("cuda", "stem", (9, 0), "bfloat16"): (
        "benchmarks/results/h200/ops-2160.json",
        "8918e3c99671",
    ),
    ("triton", "stem", (9, 0), "bfloat16"): (
        "benchmarks/results/h200/ops-2160.json",
        "7266e9ddaf72",
    ),
    ("triton", "upsample", (9, 0), "bfloat16"): (
        "benchmarks/results/h200/ops-2160.json",
        "27ff58722ffd",
    ),
}
#: The shapes of the weights, without biases, with which each operator was measured: those of its places in the network.
SHAPES: dict[str, list[tuple[tuple[int, ...], ...]]] = {
    "bottleneck": [
        ((32, 128, 1, 1), (32, 32, 3, 3), (128, 32, 1, 1)),
        ((64, 256, 1, 1), (64, 64, 3, 3), (256, 64, 1, 1)),
    ],
    "concat_conv_bn_relu": [
        ((256, 160, 3, 3),),
    ],
    "head": [
        ((12, 256, 4, 4), (3, 4, 7, 7)),
    ],
    "stem": [
        ((4, 128, 4, 7, 7),),
    ],
    "upsample": [
        ((128, 32, 4, 4),),
    ],
}
