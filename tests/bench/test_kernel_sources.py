"""Which changes of the sources are changes of a kernel that was measured."""

from __future__ import annotations

from pathlib import Path

import pytest

from fastden.ops import proven
from tests.bench.conftest import Checkout
from tests.scripts import load


@pytest.mark.parametrize(
    ("file", "old", "new", "changed"),
    [
        ("csrc/head.cu", "\n}", "\nint added;}", {"cuda head"}),
        ("csrc/patch.cuh", "\n}", "\nint added;}", {"cuda head", "cuda stem"}),
        # A header that a header includes.
        ("csrc/tensor_map.cuh", "const", "", {"cuda bottleneck", "cuda concat_conv_bn_relu", "cuda concat_conv_fp8"}),
        # conv3 runs another kernel.
        ("csrc/convolution.cuh", "#pragma once", "", {"cuda conv_bn_relu", "cuda upsample"}),
        ("csrc/upsample.cu", "phases.kernel = 2", "phases.kernel = 0x2", {"cuda upsample"}),
        ("csrc/bindings.cpp", "\n}", "\nint added;}", set()),
        ("kernels/head.py", " + ", " - ", {"triton head"}),
        ("kernels/stem.py", " + ", " - ", {"triton head", "triton stem"}),
        # The default tiles, which the kernels' own files do not import all.
        (
            "kernels/_tiles.py",
            "warps=8, stages=3",
            "warps=4, stages=3",
            {
                f"triton {name}"
                for name in ("bottleneck", "concat_conv_bn_relu", "conv_bn_relu", "upsample", "weight_gradient")
            },
        ),
        # Neither comments nor white space, and no docstrings.
        ("csrc/convolution.cuh", "#pragma once", "#pragma  once  // of 'all' // headers\n/* once\n\"*/", set()),
        ("csrc/upsample.cu", "Convolution phases = {};", "Convolution\n    phases={ /* = {1} */ } ;", set()),
        ("kernels/_tiles.py", '"""Tiles', '"""Some tiles', set()),
        ("kernels/_tiles.py", '    """Store', '    # A comment.\n\n    """It stores', set()),
        ("kernels/_tiles.py", "(acc < 0.0, 0.0, acc)", "(\n        acc < 0.0, 0.0, acc,\n    )", set()),
    ],
)
def test_which_change_is_one_of_a_kernel(checkout: Checkout, file: str, old: str, new: str, changed: set[str]) -> None:
    before = checkout.digests()
    checkout.replace(file, old, new)
    after = checkout.digests()
    assert {name for name in before if before[name] != after[name]} == changed


def test_flags_of_the_compiler_are_of_a_cuda_kernel(checkout: Checkout) -> None:
    before = checkout.digests()
    checkout.replace("fastden/cuda/build.py", '"-lineinfo"', '"-lineinfo", "--use_fast_math"')
    after = checkout.digests()
    changed = {name for name in before if before[name] != after[name]}
    assert changed == {name for name in before if name.startswith("cuda ")} != set()


def test_what_is_left_out_is_for_other_shapes(root: Path) -> None:
    """conv3's kernel of 9.0 includes nothing of the one for other shapes, and takes the shapes that were measured."""
    sources = load(root / "benchmarks" / "kernel_sources.py")
    assert set(sources.OTHER_SHAPES) == {("concat_conv_bn_relu", (9, 0))}
    left = [root / "csrc" / "concat_hopper.cuh"]
    found: set[str] = set()
    while left:
        path = left.pop()
        if path.name not in found and path.is_file():
            found.add(path.name)
            left += sources.included(path)
    assert {"concat_hopper.cuh", "hopper.cuh"} <= found
    assert not found & set(sources.OTHER_SHAPES["concat_conv_bn_relu", (9, 0)])
    ((weight,),) = proven.SHAPES["concat_conv_bn_relu"]
    outputs, channels, *kernel = weight
    # As hopper::fits of csrc/concat_conv_bn_relu.cu: 128 and 32 channels, 256 outputs, 3 x 3.
    constants = (root / "csrc" / "concat_hopper.cuh").read_text()
    assert "kTileOutputs = 256;" in constants
    assert "kStepChannels = 64;" in constants
    assert (outputs % 256, (channels - 32) % 64, kernel) == (0, 0, [3, 3])


def test_tokens_of_cuda(root: Path) -> None:
    """Texts, operators and the lines of directives stay what they are."""
    plain = load(root / "benchmarks" / "kernel_sources.py").plain_cuda
    apart = [
        'a = "x  // y";',
        'a = "x // y";',
        "a = b + +c;",
        "a = b++ c;",
        "int ab;",
        "int a b;",
        "#define A 1\nb",
        "#define A 1 b",
        "#define A (x)",
        "#define A(x)",
        "a = 1'000; // '",
        "a = 1'0; b = '\"'; // \"",
    ]
    assert len(set(map(plain, apart))) == len(apart)
    for one, other in (
        ("a(b,c)", "a( b, // c\n  c )"),
        ("#define A \\\n 1", "#define A 1"),
        ("a = 1'000; // '", "a = 1'000;"),
        ("a = '\"'; // \"", "a = '\"';"),
    ):
        assert plain(one) == plain(other)
