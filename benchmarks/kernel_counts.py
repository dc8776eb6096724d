"""Count the resources that each kernel needs at the network's sizes, from its binary and its tiles, without a GPU.

The counts of each kernel in the network are for bfloat16 and compute capability 9.0, or the one in its name:

- bytes that blocks read from the level-2 cache for each output pixel with all its channels;
- bytes of the kernel's sources that the grid reads from memory, for each output pixel, where the sources are larger
  than that cache;
- instructions of the innermost loop of matrix products, for each matrix instruction in the loop, and how many
  instructions of the loop load from shared memory;
- for convolutions on mma.sync, bytes that go through shared memory for each product: what a step stores there and what
  the warps load;
- registers of a thread, shared memory of a block, and the number of blocks that a multiprocessor holds at once.

The next counts are for the step that pads an image, adds its noise level and casts it: the bytes and launches of
PyTorch's operations, and those of the kernel that does all this at once. Then come the bytes that larger tiles of the
head spill, and the least cycles of the forms that res3 could have, alone or with conv3, and of conv3 in fp8. A count is
not a time. Only a GPU shows what the counts leave out.

    python benchmarks/kernel_counts.py                                   # the table
    python benchmarks/kernel_counts.py --json benchmarks/results/kernel_counts.json --note "what was changed"

The file keeps earlier counts under their notes. New counts replace those of the same backends under the same note.
"""

from __future__ import annotations

import argparse
import inspect
import json
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

if __name__ == "__main__":
    os.environ.pop("TRITON_INTERPRET", None)  # an interpreted kernel cannot be compiled

import torch
import triton
from compile_kernels import inspect as inspect_binary
from launches import Launch, launches
from rich.console import Console
from rich.table import Table
from torch._subclasses.fake_tensor import FakeTensorMode
from training_traffic import Traffic, size
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fastden.bench.tables import write
from fastden.cuda import build
from fastden.kernels import head
from fastden.network.inputs import noise_level
from fastden.network.padding import pad_image

ROOT = Path(__file__).resolve().parent.parent
#: Of a multiprocessor: registers, and bytes of shared memory that the system takes for each block.
REGISTERS, RESERVED = 1 << 16, 1 << 10


class Limits(NamedTuple):
    """Of a multiprocessor: bytes of shared memory, threads, blocks."""

    shared: int
    threads: int
    blocks: int


#: By architecture.
LIMITS = {
    "8.0": Limits(164 << 10, 2048, 32),
    "8.6": Limits(100 << 10, 1536, 16),
    "9.0a": Limits(228 << 10, 2048, 32),
}
MATRIX = re.compile(r"\b(QGMMA|HGMMA|HMMA)\.")
SHARED_LOADS = re.compile(r"\b(LDSM|LDS)\b")
INSTRUCTION = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)(.*?);", re.MULTILINE)
BYTES = 2


class Loop(NamedTuple):
    """The innermost loop that has the most matrix instructions: counts of its instructions."""

    instructions: int
    matrix: int
    shared_loads: int


def innermost(listing: str) -> Loop | None:
    """The innermost loop in a function's disassembly; None if no loop has a matrix instruction."""
    lines = [(int(address, 16), name + rest) for address, name, rest in INSTRUCTION.findall(listing)]
    found: list[Loop] = []
    ends = []
    for address, text in lines:
        target = re.match(r"BRA(?:\.\w+)*\s.*?0x([0-9a-f]+)", text)
        if target is not None and int(target[1], 16) < address:
            ends.append((int(target[1], 16), address))
    for first, last in ends:
        if any((first, last) != other and first <= other[0] and other[1] <= last for other in ends):
            body = [text for address, text in lines if first <= address <= last]
            inner = [(a, b) for a, b in ends if first <= a and b <= last and (a, b) != (first, last)]
            if any(MATRIX.search(text) for address, text in lines for a, b in inner if a <= address <= b):
                continue  # not innermost
        else:
            body = [text for address, text in lines if first <= address <= last]
        matrix = sum(bool(MATRIX.search(text)) for text in body)
        if matrix:
            found.append(Loop(len(body), matrix, sum(bool(SHARED_LOADS.search(text)) for text in body)))
    return max(found, key=lambda loop: loop.matrix, default=None)


def resident(registers: int, shared: int, threads: int, architecture: str = "9.0a") -> int:
    """Blocks that a multiprocessor holds at once."""
    most = LIMITS[architecture]
    warps = -(-threads // 32)
    # A warp gets registers in units of 256.
    by_registers = REGISTERS // (-(-registers * 32 // 256) * 256 * warps)
    return min(by_registers, most.shared // (shared + RESERVED), most.threads // threads, most.blocks)


def row(
    layer: str,
    backend: str,
    pixels: int,
    asked: float,
    usage: dict[str, int],
    loop: Loop | None,
    architecture: str = "9.0a",
) -> dict[str, Any]:
    """A line of the table. ``asked`` is the number of bytes that a block reads from level 2, without its results."""
    return {
        "layer": layer,
        "backend": backend,
        "l2_bytes_a_pixel": round(asked / pixels, 1),
        "tile_pixels": pixels,
        **usage,
        "blocks_a_multiprocessor": resident(usage["registers"], usage["shared_bytes"], usage["threads"], architecture),
        "loop_instructions": None if loop is None else loop.instructions,
        "loop_matrix_instructions": None if loop is None else loop.matrix,
        "instructions_a_matrix_instruction": None if loop is None else round(loop.instructions / loop.matrix, 2),
        "loop_shared_loads": None if loop is None else loop.shared_loads,
    }


def read_from_memory(launch: Launch) -> float | None:
    """Bytes of its sources that a convolution's grid reads from memory for each output pixel; None if not known.

    Blocks of one tile of pixels that run at the same time share what the first block has read. If outputs or phases
    have a grid axis of their own, behind the axis of the tiles, all pixels pass the level-2 cache once for each.
    """
    c = named_constants(launch)
    if launch.kernel.fn.__name__ not in ("conv_kernel", "descriptor_conv_kernel"):
        return None
    # By descriptors there is one phase, of stride 1.
    outputs, phases, stride = -(-c["O"] // c["BLOCK_N"]), c.get("PHASES", 1), c.get("STRIDE", 1)
    passes = outputs * phases if "program_id(1)" in inspect.getsource(launch.kernel.fn) else 1
    return passes * (c["A"] + c["B"]) * BYTES * stride**2 / phases


def disassembly(cubin: Path) -> str:
    command = [triton.knobs.nvidia.cuobjdump.path, "-sass", str(cubin)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


# ---- Triton


def named_constants(launch: Launch) -> dict[str, Any]:
    names = launch.kernel.arg_names
    return {names[key[0]] if isinstance(key, tuple) else key: value for key, value in launch.constants.items()}


def asked_by_triton(launch: Launch) -> tuple[int, float] | None:
    """Output pixels of a program's tile, and bytes that the program loads, from its constants; None if not known."""
    c = named_constants(launch)
    kernel = launch.kernel.fn.__name__
    if kernel in ("conv_kernel", "descriptor_conv_kernel"):
        taps = c["KERNEL"] ** 2
        rows = c["BLOCK_M"] if kernel == "conv_kernel" else c["TILE_HEIGHT"] * c["TILE_WIDTH"]
        steps = [(c["A"], c["BLOCK_K"]), (c["B"], c["BLOCK_B"])]
        depth = sum(-(-channels // block) * block for channels, block in steps)
        return rows, taps * depth * (rows + c["BLOCK_N"]) * BYTES
    if kernel == "bottleneck_kernel":
        pixels, margin = c["TILE_HEIGHT"] * c["TILE_WIDTH"], c["CHUNKS"] * c["BLOCK_R"]
        reduce = c["CHUNKS"] * (c["BLOCK_R"] + c["BLOCK_MID"]) * c["C"]
        scratch = margin * c["BLOCK_MID"]
        convolve = 9 * c["BLOCK_MID"] * (pixels + c["BLOCK_MID"])
        expand = c["C"] * c["BLOCK_MID"] + pixels * c["C"]
        return pixels, (reduce + scratch + convolve + expand) * BYTES
    if kernel == "stem_kernel":
        return c["BLOCK_M"], 7 * c["BLOCK_K"] * (c["BLOCK_M"] + c["BLOCK_N"]) * BYTES
    if kernel == "head_kernel":
        side, window = 2 * c["GROUP"], c["GROUP"] + 3 - c["SKIPPED"]
        rows = side + 6
        blocks = -(-rows * c["ROOM"] // c["BLOCK_ROW"])
        depth = window**2 * c["M"] + rows * blocks * c["BLOCK_ROW"]
        # A group has GROUP x GROUP pixels at half resolution.
        return c["BLOCK_M"] * c["GROUP"] ** 2, depth * (c["BLOCK_M"] + c["BLOCK_N"]) * BYTES
    return None


#: (groups of a tile, warps) of the head's kernel that are compiled. The first pair is the default.
HEAD_TILES = ((64, 8), (128, 8), (128, 16), (256, 16))
#: Labels of the launches that the network uses, by operator.
PLACES = {
    "stem": ("4 channels planar", "4 channels channels-last"),
    "bottleneck": ("128-32", "256-64"),
    "conv_bn_relu": ("conv2",),
    "upsample": ("up2",),
    "concat_conv_bn_relu": ("conv3",),
    "head": ("9 taps, input planar", "9 taps, input channels-last"),
}


def count_triton(architecture: int = 90) -> list[dict[str, Any]]:
    rows = []
    for operator, names in PLACES.items():
        for launch in launches(operator, "bf16", architecture):
            if launch.label not in {f"{operator} {name} bf16" for name in names}:
                continue
            known = asked_by_triton(launch)
            if known is None:
                continue
            source = ASTSource(launch.kernel, launch.signature, launch.constants, launch.attributes)
            compiled = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=launch.options)
            with tempfile.TemporaryDirectory() as folder:
                binary = Path(folder) / "kernel.cubin"
                binary.write_bytes(compiled.asm["cubin"])
                listing = disassembly(binary)
                command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(binary)]
                usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            used = {
                "registers": max(map(int, re.findall(r"REG:(\d+)", usage))),
                "shared_bytes": compiled.metadata.shared,
                "threads": 32 * launch.options["num_warps"],
            }
            counted = row(launch.label, "triton", *known, used, innermost(listing))
            rows.append(counted | {"memory_bytes_a_pixel": read_from_memory(launch)})
    return rows


def count_head_tiles(architecture: int = 90) -> list[dict[str, Any]]:
    """Registers and spills of the head's kernel in bfloat16, by groups of a tile and warps."""
    rows = []
    for groups, warps in HEAD_TILES:
        default = head.config_for
        head.config_for = lambda *given: replace(default(*given), block_m=groups, warps=warps)  # noqa: B023
        try:
            (launch,) = (
                one
                for one in launches("head", "bf16", architecture)
                if one.label == "head 9 taps, input channels-last bf16"
            )
        finally:
            head.config_for = default
        found = inspect_binary(launch, architecture)
        pixels, asked = asked_by_triton(launch) or (1, 0.0)
        kept = {name: found[name] for name in ("registers", "spilled_bytes", "shared_bytes")}
        rows.append({"groups": groups, "warps": warps, "l2_bytes_a_pixel": round(asked / pixels, 1), **kept})
    return rows


# ---- The network's input


def count_preparation(height: int = 1080, width: int = 1920) -> list[dict[str, Any]]:
    """Count memory bytes for each pixel of a float32 image, and launches, before the network in bfloat16 starts."""
    rows = []
    pixels = height * width
    with FakeTensorMode():
        x = torch.empty(1, 3, height, width)
        levels: dict[str, Any] = {"number": 0.1, "map": x[:, :1].clone(), "curve": torch.empty(1, 8)}
        for name, sigma in levels.items():
            with Traffic() as traffic:
                level = noise_level(x, sigma, True)
                assert level is not None
                padded = pad_image(torch.cat([x, level], 1))
                y = padded.to(torch.bfloat16)
            read = {"number": 0, "map": size(x[:, :1]), "curve": 8 * 4}[name]
            # The image is read once. It is written in the network's dtype, and in its own dtype for the head.
            fused = size(x) + read + size(y) + size(padded[:, :3])
            # The map of a number has no memory of its own: it is one value, expanded to all pixels.
            moved = sum(traffic.bytes.values()) - (size(level) if name == "number" else 0)
            for backend, total, launched in (("torch", moved, sum(traffic.calls.values())), ("triton", fused, 1)):
                counts = {"memory_bytes_a_pixel": round(total / pixels, 1), "launches": launched}
                rows.append({"layer": f"input, level from a {name}", "backend": backend, **counts})
    return rows


# ---- Forms of conv3 and res3


def count_res3_forms(channels: int = 256, middle: int = 64, tile: tuple[int, int] = (8, 16)) -> list[dict[str, Any]]:
    """Count, for a tile, the work of res3 in the forms that it could have, next to what each adds to conv3.

    Cycles are what a multiprocessor of an H100 needs at least, if one resource were all that it waits for. Memory moves
    3.35 TB/s for 132 multiprocessors at 1.755 GHz; shared memory 128 bytes a cycle; wgmma makes 2048 products a cycle.
    mma.sync is counted at the same rate, which it does not reach on this GPU.

    Args:
        channels, middle: of the bottleneck.
        tile: rows and columns of output pixels.
    """
    pixels, margin = tile[0] * tile[1], (tile[0] + 2) * (tile[1] + 2)
    rows = -(-margin // 64) * 64
    reduce, convolve, expand = channels * middle, 9 * middle * middle, middle * channels
    weights = (reduce + convolve + expand) * BYTES
    # Parts of 16 channels in the inner dimension of each product, all blocks of 64 outputs of `expand` together.
    parts = (channels // 16, 9 * middle // 16, middle // 16 * channels // 64)
    # mma.sync: 8 warps, 4 down and 2 across, load both factors; copies come in and both maps are stored.
    warps = [8 * 32 * (height // 4 + width // 2) for height, width in ((rows, middle), (pixels, middle), (pixels, 64))]
    mma = sum(part * loaded for part, loaded in zip(parts, warps, strict=True))
    mma += rows * channels * BYTES + weights + (rows + pixels) * middle * BYTES
    # wgmma: each 64 x 64 x 16 products read 2 KiB of weights, and 2 KiB of pixels, except where these are in registers;
    # `conv` loads its pixels into registers.
    unit, blocks, tiles = 64 * 16 * BYTES, rows // 64, pixels // 64
    wgmma = 2 * unit * blocks * parts[0] + 2 * unit * tiles * parts[1] + unit * tiles * parts[2]
    wgmma += margin * (channels + middle) * BYTES
    rest = wgmma - 2 * unit * blocks * parts[0] - margin * channels * BYTES
    products = rows * reduce + pixels * (convolve + expand)
    conv3 = 9 * 160 * channels
    whole = 2 * channels * BYTES
    forms: dict[str, tuple[float, float, float, float, float, float]] = {
        # Bytes of memory a pixel; bytes from level 2, of shared memory, and products a tile; products and bytes of
        # memory a pixel that conv3 has more.
        "mma.sync": (whole, (margin + pixels) * channels * BYTES + weights, mma, products, 0, 0),
        "wgmma": (whole, (margin + pixels) * channels * BYTES, wgmma, products, 0, 0),
        "wgmma, its first convolution in conv3": (
            whole + middle * BYTES, (margin * middle + pixels * channels) * BYTES, rest + margin * middle * BYTES,
            products - rows * reduce, pixels * reduce, middle * BYTES,
        ),
        # conv3 on the margin too; its result is neither written nor read.
        "in one kernel with conv3": (
            channels * BYTES, 0, wgmma - margin * channels * BYTES, products, (rows - pixels) * conv3,
            -channels * BYTES,
        ),
    }  # fmt: skip
    moved = 3.35e12 / 132 / 1.755e9
    return [
        {
            "form": form,
            "memory_bytes_a_pixel": memory,
            "l2_bytes_a_pixel": round(level2 / pixels, 1),
            "memory_cycles": round(memory * pixels / moved),
            "shared_memory_cycles": round(shared / 128),
            "tensor_cycles": round(multiplied / 2048),
            "tensor_cycles_more_in_conv3": round(more / 2048),
            "memory_bytes_a_pixel_more_in_conv3": written,
        }
        for form, (memory, level2, shared, multiplied, more, written) in forms.items()
    ]


def count_conv3_forms(tile: int = 128, channels: int = 160, outputs: int = 256, taps: int = 9) -> list[dict[str, Any]]:
    """Count, for a tile, the least cycles of conv3 in bfloat16 and in fp8; resources as in :func:`count_res3_forms`.

    What other kernels read and write more for it takes its time in memory before or after.

    Args:
        tile: output pixels, 64 of each of two warp groups.
        channels, outputs: of conv3, whose sources have 128 and 32 channels.
        taps: of conv3.
    """
    moved = 3.35e12 / 132 / 1.755e9
    products = tile * taps * channels * outputs
    arriving = (3 * 160 + taps * outputs) * channels  # elements that come into shared memory: pixels and weights
    result = outputs * BYTES
    # Sums of each stage, three taps of the second source in one, are added by 128 lanes.
    additions = (taps + taps // 3) * tile * outputs
    forms: dict[str, tuple[int, int, int, int]] = {
        # Bytes of an element; outputs of an instruction; bytes of memory a pixel more than conv3's own; additions.
        "bfloat16": (2, 256, 0, 0),
        "fp8, rounded by a kernel of its own": (1, 128, channels * (BYTES + 1), additions),
        # The first source is written twice then; the second in fp8 alone.
        "fp8, rounded by the kernels before": (1, 128, 128 - 32, additions),
    }
    rows = []
    for form, (width, columns, extra, added) in forms.items():
        memory = channels * width + result
        instructions = products * width // (64 * columns * 32)
        # An instruction reads 32 bytes of each of its 64 pixels and of its columns.
        shared = instructions * 32 * (64 + columns) + arriving * width
        cycles = {
            "memory_cycles": round(memory * tile / moved),
            "shared_memory_cycles": shared // 128,
            "tensor_cycles": products * width // (2048 * BYTES),
            "addition_cycles": added // 128,
        }
        in_all = max(cycles.values()) + round(extra * tile / moved)
        rows.append({"form": form, "memory_bytes_a_pixel": memory + extra, **cycles, "cycles_in_all": in_all})
    return rows


# ---- CUDA C++


class Kernel(NamedTuple):
    """A CUDA kernel of a layer of the network.

    Attributes:
        layer: name of the layer.
        source: name of the file in ``csrc``, without its ending.
        mangled: regular expression that matches the kernel's name in the binary.
        shared, threads: C++ expressions for the bytes of shared memory and the number of threads of a block.
        pixels: C++ expression for the number of a tile's output pixels (at half resolution for the head).
        asked: C++ expression for the bytes that a tile loads; "" for :func:`conv3_bytes`.
        architecture: that the kernel is compiled for.
        moved: C++ expressions for bytes that go through shared memory and for the products; () if they are not counted.
    """

    layer: str
    source: str
    mangled: str
    shared: str
    threads: str
    pixels: str
    asked: str
    architecture: str = "9.0a"
    moved: tuple[str, ...] = ()


def convolution(
    layer: str, source: str, tile: tuple[int, ...], taps: int, depth: int, architecture: str = "9.0a"
) -> Kernel:
    """The kernel of ``convolution.cuh``. A tile is rows, columns, warps down and across, and stages."""
    name = f"ConvolutionTile<__nv_bfloat16, {', '.join(map(str, tile))}>"
    mangled = "convolution_kernelI13__nv_bfloat16" + "".join(f"Li{number}E" for number in tile)
    outputs = 256 if layer.startswith("conv3") else tile[1]  # whose blocks all read the pixels
    asked = f"{taps} * {depth} * ({tile[0]} + {tile[1]}) * 2 * {outputs // tile[1]}"
    shared, threads = f"{name}::kSharedBytes", f"{name}::kThreads"
    moved = f"{name}::kMovedBytes", f"{name}::kProducts"
    return Kernel(layer, source, mangled, shared, threads, str(tile[0]), asked, architecture, moved)


#: A tile with its margin, the tile once more as the residual, and the weights.
_BLOCK = "((kMarginPixels + kPixels) * {channels} + (2 * {channels} + 9 * {middle}) * {middle}) * 2"
CUDA = (
    Kernel(
        "stem", "stem", r"stem_kernelI13__nv_bfloat16", "kSharedBytes", "kThreads", "kRows",
        # Weights stay in shared memory from tile to tile.
        "patch_rows(3) * patch_columns(4) * 8",
    ),
    Kernel(
        "res1", "bottleneck", r"GLOBAL__N__\w*bottleneck_kernelI13__nv_bfloat16Li32E", "Layout<32>::kSharedBytes",
        "kThreads", "kPixels", _BLOCK.format(channels=128, middle=32),
    ),
    Kernel(
        "res3 on mma.sync", "bottleneck", r"GLOBAL__N__\w*bottleneck_kernelI13__nv_bfloat16Li64E",
        "Layout<64>::kSharedBytes", "kThreads", "kPixels", _BLOCK.format(channels=256, middle=64),
    ),
    Kernel(
        "res3 on wgmma", "bottleneck", r"hopper_bottleneck\w*bottleneck_kernelI13__nv_bfloat16E",
        "hopper_bottleneck::kSharedBytes", "hopper_bottleneck::kThreads", "kPixels",
        # Weights stay in shared memory from tile to tile.
        "(kMarginPixels + kPixels) * 256 * 2",
    ),
    convolution("conv2", "conv_bn_relu", (128, 128, 2, 4, 4), 9, 128),
    convolution("up2", "upsample", (128, 32, 4, 1, 4), 4, 128),
    convolution("conv2 on 8.0", "conv_bn_relu", (128, 128, 2, 4, 4), 9, 128, "8.0"),
    convolution("conv3 on 8.0", "conv_bn_relu", (128, 128, 2, 4, 4), 9, 160, "8.0"),
    # Of a multiprocessor with 100 KiB of shared memory.
    convolution("conv3 on 8.6, four stages", "conv_bn_relu", (128, 128, 2, 4, 4), 9, 160, "8.6"),
    convolution("conv3 on 8.6, three stages", "conv_bn_relu", (128, 128, 2, 4, 3), 9, 160, "8.6"),
    convolution("up2 on 8.6, four stages", "upsample", (128, 32, 4, 1, 4), 4, 128, "8.6"),
    convolution("up2 on 8.6, three stages", "upsample", (128, 32, 4, 1, 3), 4, 128, "8.6"),
    Kernel(
        "conv3", "concat_conv_bn_relu", r"concat_kernelI13__nv_bfloat16(?:S2_)?Li2E", "hopper::kSharedBytes",
        "hopper::kThreads", "hopper::kTileRows * hopper::kTileColumns", "",
    ),
    Kernel(
        "conv3 in fp8", "concat_conv_fp8", r"concat_kernelI13__nv_fp8_e4m313__nv_bfloat16Li1E", "hopper::kSharedBytes",
        "hopper::kThreads", "hopper::kTileRows * hopper::kTileColumns",
        # The second source's boxes are a quarter as wide.
        "(3 * hopper::kLeftBytes + 9 * hopper::kRightBytes / hopper::kCluster) * 5 / 4",
    ),
    Kernel(
        "rounding for fp8", "concat_conv_fp8", r"rounding_kernelI13__nv_bfloat16E", "fp8::kThreads * 4",
        "fp8::kThreads", "fp8::kThreads / 8", "fp8::kThreads / 8 * fp8::kChannels * 2",
    ),
    Kernel(
        "head", "head", r"head_kernelI13__nv_bfloat16Lb1E", "kSharedBytes", "kThreads", "kTileRows * kTileColumns",
        # 12 of 16 columns have weights; the others' zeros are not read.
        "256 / kMaps * (kMarginPixels * kMapBytes + 12 * 16 * kMapBytes) + kPatchBytes + 3 * 49 * 8",
    ),
)  # fmt: skip


def evaluate(expressions: dict[str, str], source: Path, flags: list[str]) -> dict[str, int]:
    """Values of constant C++ expressions in the scope of a source. A compiler computes them; nothing runs."""
    lines = [f'#include "{source.name}"', "namespace fastden {", 'extern "C" {']
    lines += [f"extern const int count_{name} = {text};" for name, text in expressions.items()]
    lines += ["}", "}"]
    with tempfile.TemporaryDirectory() as folder:
        file, target = Path(folder) / "counts.cpp", Path(folder) / "counts.s"
        file.write_text("\n".join(lines), encoding="utf-8")
        subprocess.run(["g++", "-S", "-w", *flags, f"-I{source.parent}", str(file), "-o", str(target)], check=True)
        text = target.read_text(encoding="utf-8")
    found = {}
    for name in expressions:
        value = re.search(rf"^count_{name}:\s*\.(long\s+(-?\d+)|zero)", text, re.MULTILINE)
        assert value is not None, name
        found[name] = int(value[2] or 0)
    return found


def conv3_bytes(source: Path) -> str:
    """C++ expression for what a block of conv3 reads of level 2 for a tile: existing channels, half of the weights."""
    text = "".join(
        path.read_text(encoding="utf-8") for path in (source, source.with_name("concat_hopper.cuh")) if path.exists()
    )
    # Earlier versions read weights of 64 channels for the second source's 32 channels. The other channels of its pixels
    # are zeros, and are not read.
    halves = 5 if "weight_b" in text else 6
    columns = 3 if "kLargestKernel" in text else 9
    return f"({columns} * 5 * hopper::kLeftBytes + 9 * {halves} * hopper::kRightBytes / hopper::kCluster) / 2"


def compiled(csrc: Path, source: str, architecture: str, toolkit: Path) -> tuple[str, str]:
    """Disassembly and resources of the kernels of a source."""
    flags = [flag for flag in build.plan(csrc, ["9.0a"], toolkit=toolkit).nvcc_flags if not flag.startswith("-gencode")]
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        target = [f"-arch=sm_{architecture.replace('.', '')}", "-cubin", "-o", str(cubin), str(csrc / f"{source}.cu")]
        subprocess.run([str(toolkit / "bin" / "nvcc"), *flags, *target], check=True, capture_output=True)
        usage = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(cubin)]
        return disassembly(cubin), subprocess.run(usage, capture_output=True, text=True, check=True).stdout


def count_cuda(csrc: Path) -> list[dict[str, Any]]:
    toolkit = build.find_toolkit()
    if toolkit is None:
        print("nvcc is not found: no counts of the CUDA kernels", file=sys.stderr)
        return []
    emulated = ["-std=c++17", "-DFASTDEN_EMULATED", "-DFASTDEN_HOPPER", f"-I{ROOT / 'tests' / 'emulator'}"]
    emulated += [f"-I{toolkit / 'include'}"]
    binaries: dict[tuple[str, str], tuple[str, str]] = {}
    rows = []
    for kernel in CUDA:
        source = csrc / f"{kernel.source}.cu"
        if not source.exists():
            continue  # earlier sources
        asked = kernel.asked or conv3_bytes(source)
        names = {"shared": kernel.shared, "threads": kernel.threads, "pixels": kernel.pixels, "asked": asked}
        names |= dict(zip(("moved", "products"), kernel.moved, strict=False))
        values = evaluate(names, source, ["-x", "c++", *emulated])
        key = kernel.source, kernel.architecture
        if key not in binaries:
            binaries[key] = compiled(csrc, *key, toolkit)
        listing, resources = binaries[key]
        parts = re.split(r"Function : ([\w$.]+)", listing)
        (body,) = (text for name, text in zip(parts[1::2], parts[2::2], strict=True) if re.search(kernel.mangled, name))
        registers = re.search(rf"Function \S*{kernel.mangled}\S*:\s*REG:(\d+)", resources)
        assert registers is not None, resources
        used = {
            "registers": int(registers[1]),
            "shared_bytes": values["shared"],
            "threads": values["threads"],
        }
        counts = row(
            kernel.layer, "cuda", values["pixels"], values["asked"], used, innermost(body), kernel.architecture
        )
        per_product = round(values["moved"] / values["products"], 4) if kernel.moved else None
        rows.append(counts | {"shared_bytes_a_product": per_product})
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description="Count what the kernels ask of a GPU, without one.")
    parser.add_argument("--json", type=Path, help="add the counts to this file")
    parser.add_argument("--note", default="now", help="what these counts are of")
    parser.add_argument("--csrc", type=Path, default=ROOT / "csrc", help="folder of the CUDA sources")
    parser.add_argument("--backends", nargs="+", choices=("triton", "cuda"), default=["triton", "cuda"])
    arguments = parser.parse_args()
    rows = count_triton() if "triton" in arguments.backends else []
    rows += count_cuda(arguments.csrc) if "cuda" in arguments.backends else []
    table = Table(*("layer", "backend", "L2 B a pixel", "registers", "shared KiB", "blocks", "instructions a product"))
    table.add_column("shared B a product")
    for one in rows:
        values = (one["l2_bytes_a_pixel"], one["registers"], f"{one['shared_bytes'] / 1024:.0f}")
        more = (one["blocks_a_multiprocessor"], one["instructions_a_matrix_instruction"])
        table.add_row(
            one["layer"], one["backend"], *map(str, values), *map(str, more),
            str(one.get("shared_bytes_a_product") or ""),
        )  # fmt: skip
    Console(width=140).print(table)
    preparation = count_preparation()
    for one in preparation:
        print(f"{one['layer']}, {one['backend']}: {one['memory_bytes_a_pixel']} B a pixel, {one['launches']} launches")
    head_tiles = count_head_tiles() if "triton" in arguments.backends else []
    for one in head_tiles:
        print(f"head, tiles of {one['groups']} groups, {one['warps']} warps: {one['spilled_bytes']} B spilled")
    res3_forms, conv3_forms = count_res3_forms(), count_conv3_forms()
    for one in res3_forms + conv3_forms:
        print(", ".join(f"{name.replace('_', ' ')}: {value}" for name, value in one.items()))
    if arguments.json:
        document: dict[str, Any] = {"command": "python benchmarks/kernel_counts.py", "counts": {}}
        if arguments.json.exists():
            document = json.loads(arguments.json.read_text(encoding="utf-8"))
        earlier = document["counts"].get(arguments.note, {})
        rows = [one for one in earlier.get("kernels", []) if one["backend"] not in arguments.backends] + rows
        version = triton.__version__
        if "triton" not in arguments.backends:
            version, head_tiles = earlier.get("triton"), earlier.get("head_tiles", [])
        document["counts"][arguments.note] = {
            "triton": version,
            "kernels": rows,
            "preparation": preparation,
            "head_tiles": head_tiles,
            "res3_forms": res3_forms,
            "conv3_forms": conv3_forms,
        }
        write(arguments.json, document)
    return 0


if __name__ == "__main__":
    sys.exit(main())
