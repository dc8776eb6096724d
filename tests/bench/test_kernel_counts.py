"""Counts of kernels: loops in a disassembly, blocks that fit, bytes of tiles."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.scripts import load

pytest.importorskip("triton")

#: A loop around a loop; the branch at 0070 goes forward.
LISTING = """
        /*0000*/                   MOV R1, c[0x0][0x28] ;      /* 0x00000a0000017a02 */
                                                               /* 0x000fe40000000f00 */
        /*0010*/                   LDS R4, [R2] ;              /* 0x0000000002047984 */
        /*0020*/                   LDSM.16.M88.4 R8, [R4] ;    /* 0x0000000004087b3b */
        /*0030*/                   HMMA.16816.F32.BF16 R8, R4, R6, R8 ;  /* 0x0 */
        /*0040*/              @!P0 HMMA.16816.F32.BF16 R12, R4, R7, R12 ;  /* 0x0 */
        /*0050*/                   IADD3 R2, R2, 0x10, RZ ;    /* 0x0 */
        /*0060*/               @P1 BRA 0x20 ;                  /* 0x0 */
        /*0070*/               @P2 BRA `(.L_x_1) 0xa0 ;        /* 0x0 */
        /*0080*/                   HMMA.16816.F32.BF16 R12, R4, R7, R12 ;  /* 0x0 */
        /*0090*/               @P3 BRA 0x10 ;                  /* 0x0 */
        /*00a0*/                   EXIT ;                      /* 0x0 */
"""


@pytest.fixture(scope="module")
def counts(root: Path) -> Any:
    return load(root / "benchmarks" / "kernel_counts.py")


def test_the_interpreter_stays_on(counts: Any) -> None:
    """Tests of kernels behind this one in the same process are interpreted, unless there is a GPU."""
    assert torch.cuda.is_available() or os.environ["TRITON_INTERPRET"] == "1"


def test_innermost_loop(counts: Any) -> None:
    assert counts.innermost(LISTING) == counts.Loop(instructions=5, matrix=2, shared_loads=1)
    assert counts.innermost(LISTING.replace("HMMA", "FFMA")) is None


def test_blocks_that_fit(counts: Any) -> None:
    assert counts.resident(168, 226416, 384) == 1
    assert counts.resident(64, 40 << 10, 256) == 4  # registers
    assert counts.resident(32, 100 << 10, 128) == 2  # shared memory
    assert counts.resident(16, 0, 32) == 32  # blocks
    assert counts.resident(128, 48 << 10, 256, "8.6") == 2  # 100 KiB
    assert counts.resident(128, 64 << 10, 256, "8.6") == 1


def test_bytes_of_a_tile(counts: Any, root: Path) -> None:
    """conv3 in CUDA, by hand: 2.5 boxes of 20 KiB for each column of taps, half of as many boxes of weights a tap."""
    from fastden.cuda import build

    if build.find_toolkit() is None:
        pytest.skip("the toolkit's headers are not found")
    source = root / "csrc" / "concat_conv_bn_relu.cu"
    toolkit = build.find_toolkit()
    flags = ["-x", "c++", "-std=c++17", "-DFASTDEN_EMULATED", "-DFASTDEN_HOPPER", f"-I{toolkit / 'include'}"]
    flags.append(f"-I{root / 'tests' / 'emulator'}")
    found = counts.evaluate({"bytes": counts.conv3_bytes(source), "none": "0"}, source, flags)
    assert found == {"bytes": 3 * 5 * 20480 // 2 + 9 * 5 * 16384 // 2, "none": 0}


def test_bytes_of_shared_memory_a_product(counts: Any, root: Path) -> None:
    """By hand: of a step of 32 channels, what is stored once, and what eight warps load."""
    from fastden.cuda import build

    toolkit = build.find_toolkit()
    if toolkit is None:
        pytest.skip("the toolkit's headers are not found")
    flags = ["-x", "c++", "-std=c++17", "-DFASTDEN_EMULATED", f"-I{toolkit / 'include'}"]
    flags.append(f"-I{root / 'tests' / 'emulator'}")
    kernels = {kernel.layer: kernel for kernel in counts.CUDA if kernel.moved}
    for layer, moved, products in (
        ("conv2", 64 * (128 + 128 + 8 * (64 + 32)), 128 * 128 * 32),
        ("conv3 on 8.0", 64 * (128 + 128 + 8 * (64 + 32)), 128 * 128 * 32),
        ("up2", 64 * (128 + 32 + 4 * (32 + 32)), 128 * 32 * 32),
    ):
        names = dict(zip(("moved", "products"), kernels[layer].moved, strict=True))
        source = root / "csrc" / f"{kernels[layer].source}.cu"
        assert counts.evaluate(names, source, flags) == {"moved": moved, "products": products}, layer


def test_counts_of_one_backend_keep_those_of_the_other(
    counts: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "counts.json"
    earlier = {"triton": "0.0", "head_tiles": [{"groups": 1}], "kernels": [{"backend": "triton"}]}
    file.write_text(json.dumps({"counts": {"now": earlier}}))
    for name in ("count_triton", "count_cuda", "count_preparation", "count_res3_forms", "count_conv3_forms"):
        monkeypatch.setattr(counts, name, lambda *_: [])
    tiles = {"groups": 2, "warps": 4, "spilled_bytes": 0}
    monkeypatch.setattr(counts, "count_head_tiles", lambda: [tiles])
    for backend, expected in (
        ("cuda", earlier),
        ("triton", {"triton": counts.triton.__version__, "head_tiles": [tiles], "kernels": []}),
    ):
        monkeypatch.setattr(sys, "argv", ["kernel_counts.py", "--json", str(file), "--backends", backend])
        assert counts.main() == 0
        found = json.loads(file.read_text())["counts"]["now"]
        assert {name: found[name] for name in expected} == expected


def test_forms_of_res3(counts: Any) -> None:
    """By hand: 192 rows for a tile of 128 pixels and its margin of 52, three convolutions 256 -> 64 -> 64 -> 256."""
    forms = {row["form"]: row for row in counts.count_res3_forms()}
    weights = (256 * 64 + 9 * 64 * 64 + 64 * 256) * 2
    assert forms["mma.sync"]["l2_bytes_a_pixel"] == (308 * 512 + weights) / 128
    assert forms["wgmma"]["l2_bytes_a_pixel"] == 308 * 512 / 128
    # Eight warps of 48 x 32 sums for 16 steps, of 32 x 32 for 36, and four times of 32 x 32 for 4; then what comes in.
    loaded = 8 * 32 * (16 * 80 + 36 * 64 + 4 * 4 * 64)
    assert forms["mma.sync"]["shared_memory_cycles"] == (loaded + 192 * 512 + weights + 320 * 128) // 128
    # Products of 64 x 64 x 16: 48 with both factors in shared memory, 72 after loads of one, 32 from registers.
    assert forms["wgmma"]["shared_memory_cycles"] == ((48 + 72) * 4096 + 32 * 2048 + 180 * 640) // 128
    assert forms["wgmma"]["tensor_cycles"] == (48 + 72 + 32) * 32
    more = forms["in one kernel with conv3"]["tensor_cycles_more_in_conv3"]
    assert more == 64 * 9 * 160 * 256 // 2048


def test_forms_of_conv3(counts: Any) -> None:
    """By hand: 90 products of 64 x 256 x 16 in bfloat16 for each of two groups, or of 64 x 128 x 32 in fp8."""
    forms = {row["form"]: row for row in counts.count_conv3_forms()}
    plain, own = forms["bfloat16"], forms["fp8, rounded by a kernel of its own"]
    assert plain["tensor_cycles"] == 2 * 90 * 128
    assert own["tensor_cycles"] == 2 * 90 * 64
    assert plain["shared_memory_cycles"] == (2 * 90 * 10240 + 2 * (480 + 2304) * 160) // 128
    assert own["shared_memory_cycles"] == (2 * 90 * 6144 + (480 + 2304) * 160) // 128
    assert own["addition_cycles"] == 12 * 2 * 128  # 12 stages, 128 sums of each thread of two groups of 128
    assert own["memory_bytes_a_pixel"] - plain["memory_bytes_a_pixel"] == 320
    before = forms["fp8, rounded by the kernels before"]
    assert own["memory_bytes_a_pixel"] - before["memory_bytes_a_pixel"] == 384
    moved = 3.35e12 / 132 / 1.755e9
    assert own["cycles_in_all"] == own["shared_memory_cycles"] + round(480 * 128 / moved)
    assert plain["cycles_in_all"] == plain["tensor_cycles"]


def test_bytes_of_a_tile_by_descriptors(counts: Any) -> None:
    """conv3 in Triton, by hand: for 9 taps of 160 channels, 128 pixels and 256 outputs; the pixels once from memory."""
    from fastden.kernels._descriptors import descriptor_conv_kernel

    tile = {"TILE_HEIGHT": 8, "TILE_WIDTH": 16, "BLOCK_N": 256, "BLOCK_K": 64, "BLOCK_B": 32}
    constants = {"A": 128, "B": 32, "O": 256, "KERNEL": 3, **tile}
    kernel = SimpleNamespace(fn=descriptor_conv_kernel.fn, arg_names=[])
    launch = SimpleNamespace(kernel=kernel, constants=constants)
    assert counts.asked_by_triton(launch) == (128, 9 * 160 * (128 + 256) * 2)
    assert counts.read_from_memory(launch) == 160 * 2
