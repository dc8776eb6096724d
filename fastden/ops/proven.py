"""Kernels that results of a GPU show right and faster, which the automatic choice takes.

Written by ``benchmarks/prove.py``, not by hand.
"""

from __future__ import annotations

#: (backend, operator, compute capability, dtype): the file of results, from the repository's root. If an operator has
#: two backends, the faster one comes first.
PROVEN: dict[tuple[str, str, tuple[int, int], str], str] = {
    ("cuda", "bottleneck", (9, 0), "bfloat16"): "benchmarks/results/h200/ops-2160.json",
    ("triton", "bottleneck", (9, 0), "bfloat16"): "benchmarks/results/h200/ops-2160.json",
    ("cuda", "concat_conv_bn_relu", (9, 0), "bfloat16"): "benchmarks/results/h200/ops-2160.json",
    ("triton", "concat_conv_bn_relu", (9, 0), "bfloat16"): "benchmarks/results/h200/ops-2160.json",
    ("cuda", "head", (9, 0), "bfloat16"): "benchmarks/results/h200/ops-2160.json",
    ("triton", "head", (9, 0), "bfloat16"): "benchmarks/results/h200/ops-2160.json",
    ("cuda", "stem", (9, 0), "bfloat16"): "benchmarks/results/h200/ops-2160.json",
    ("triton", "stem", (9, 0), "bfloat16"): "benchmarks/results/h200/ops-2160.json",
    ("triton", "upsample", (9, 0), "bfloat16"): "benchmarks/results/h200/ops-2160.json",
}
