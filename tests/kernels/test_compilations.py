"""How often Triton compiles over a folder of photographs of many sizes: once for each kernel, without a GPU to ask."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

# A driver that launches nothing. Triton asks the hook before it compiles; told that this is done, it does not.
SCRIPT = """
import collections, json
import torch, triton
from triton.backends.compiler import GPUTarget

class Driver:
    get_current_device = staticmethod(lambda: 0)
    get_current_stream = staticmethod(lambda device: 0)
    get_current_target = staticmethod(lambda: GPUTarget("cuda", 90, 32))

triton.runtime.driver.set_active(Driver())
keys = collections.defaultdict(set)
def hook(*, key, fn, **_):
    keys[fn.name.rpartition(".")[2]].add(key)
    return True
triton.knobs.runtime.jit_cache_hook = hook

from fastden.kernels.batch_norm import affine, affine_gradient, statistics
from fastden.kernels.bottleneck import BottleneckConfig, bottleneck
from fastden.kernels.concat_conv_bn_relu import concat_conv_bn_relu
from fastden.kernels.conv_bn_relu import conv_bn_relu, conv_statistics
from fastden.kernels.head import head
from fastden.kernels.network_input import network_input
from fastden.kernels.stem import stem
from fastden.kernels.upsample import upsample
from fastden.kernels.weight_gradient import stem_weight_gradient, weight_gradient

def random(*shape):
    return torch.zeros(shape, dtype=torch.bfloat16)

def nhwc(*shape):
    return random(*shape).contiguous(memory_format=torch.channels_last)

# From 1 x 1 features on, by way of multiples of 16, in batches of one and of several.
sizes = [(1 + index, 1 + 5 * index % 33) for index in range(18)] + [(16, 16), (32, 48)]
split = BottleneckConfig(block_m=16, warps=4, stages=2, fused=False)
for index, (h, w) in enumerate(sizes):
    n = 1 + index % 3
    x = nhwc(n, 16, h, w)
    square, one = random(16, 16, 3, 3), random(16, 16, 1, 1)
    conv_bn_relu(x, square, padding=1)
    raw, *_ = conv_statistics(x, None, square, None, 1, 1, 1e-5)
    concat_conv_bn_relu(x, x, random(16, 32, 3, 3))
    upsample(x, random(16, 16, 4, 4))
    bottleneck(x, one, square, one)
    bottleneck(x, one, square, one, config=split)
    weight_gradient(x, x, None, 3, 1, 1)
    vector = torch.zeros(16)
    statistics(x, 1e-5)
    affine(x, vector, vector, vector, vector, x, True)
    affine_gradient(x, None, x, vector, vector, vector, vector, True, False)
    h, w = h + 1, w + 1
    image = random(n, 3, 2 * h + 4, 2 * w + 4)
    network_input(image, vector[:8].expand(n, 8), torch.float32, (3, 3 + index % 4), (3, 5), 2)
    network_input(image, image[:, :1], torch.float32, (3, 3 + index % 4), (3, 5), 2)
    stem(image, random(4, 16, 3, 7, 7), random(4, 16))
    head(nhwc(n, 16, h, w), image, random(12, 16, 4, 4), random(3, 3, 7, 7), random(3))
    stem_weight_gradient(nhwc(n, 16, h, w), image)
print(json.dumps({name: len(found) for name, found in keys.items()}))
"""
#: Kernels that are launched in more than one way above.
WAYS = {"combine_kernel": 2, "conv_kernel": 5, "network_input_kernel": 2, "weight_gradient_kernel": 2}


def test_sizes_are_no_part_of_a_compiled_kernel(root: Path, tmp_path: Path) -> None:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], cwd=root, capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert {"stem_kernel", "head_kernel", "bottleneck_kernel", "conv_expand_kernel", "combine_kernel"} < set(found)
    assert found == {name: WAYS.get(name, 1) for name in found}
