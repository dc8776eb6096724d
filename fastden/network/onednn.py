"""The fused network on a CPU: oneDNN convolutions with post-operations on tiles that stay in cache.

Bias, ReLU and the residual sum run inside the convolutions. Weights are packed once for each tile shape. Activations
are channels-last. The concatenation in front of conv3 is made tile by tile. All operators are PyTorch's own, so nothing
has to be built.
"""

from __future__ import annotations

import ctypes
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fastden.algebra import (
    BORDER,
    HeadWeights,
    StemWeights,
    image_phases,
    phase_weights,
    separated_head,
    unshuffled_weight,
)
from fastden.network.packed import PackedWeights
from fastden.network.tiles import channels_last_empty, gathered, join_phases, tile_regions
from fastden.ops.activations import fold, zeros_for
from fastden.ops.post_operations import finite, has_bf16, missing_parts

#: Rows and columns of half-resolution features that the last stages make at a time. Fewer rows need less memory, but
#: more edges are computed twice. With and without AMX, in three dtypes, 64 rows take 5 to 11 % longer, and 512 rows or
#: 384 columns from 6 % less to 2 % more (``benchmarks/results/cpu-tiles.json``).
TILE_ROWS, TILE_COLUMNS = 256, 192
#: Features that a tile needs before and behind its own. res3's 3x3 convolution needs 1 on each side; the head's 4x4
#: needs 1 before and 2 behind. conv3's neighbours are inputs, see :func:`fastden.network.tiles.gathered`.
BEFORE, BEHIND = 2, 3
#: Rows of half-resolution features that stem and res1 make at a time, chosen as the above: 16 rows take 0.99 to 1.10
#: times as long, 32 and 128 rows 0.96 to 1.03 times.
FRONT_ROWS = 64
#: Largest number of pixels of images that run together. Small images fill the cores better together; large images
#: together do not fit into the cache.
BATCH_PIXELS = 1 << 17


def native_bf16() -> bool:
    """Whether this CPU multiplies bfloat16 natively (AMX tiles or AVX-512 BF16) and PyTorch can use it.

    Without such units oneDNN computes bfloat16 through float32. With AVX-512 BF16 the network takes half of float32's
    time (``benchmarks/results/bf16.json``), with AMX a fifth (``benchmarks/results/cpu.json``).
    """
    return not missing_parts() and _has_bf16_units() and has_bf16()


def _has_bf16_units() -> bool:
    return bool(torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported())


def keep_freed_memory() -> bool:
    """Ask the C library to keep freed memory, up to 2 GiB, and not to return it to the system.

    Activations are freed and allocated again all the time, and the system needs time to map new pages. The setting is
    for the whole process. So programs, such as the command line, should use it, and libraries should not. It works with
    glibc only.

    Returns:
        Whether the C library accepted the setting.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    trim_threshold, mmap_threshold = -1, -3
    # Older versions of glibc accept at most 32 MiB here. Each of the two settings ends glibc's own adaptation of the
    # thresholds, so the order matters.
    if not (mallopt(mmap_threshold, 2**30) or mallopt(mmap_threshold, 2**25)):
        return False
    return bool(mallopt(trim_threshold, 2**31 - 1))


class Convolution:
    """A convolution with its bias and, on call, a residual sum and ReLU as post-operations.

    Args:
        weight: (O, C, k, k), float32 or bfloat16, on the CPU.
        bias: (O,), rounded to the weight's dtype: PyTorch's oneDNN convolutions take a bias of that dtype.
        stride, padding: as in ``torch.nn.functional.conv2d``.
        relu: whether ReLU follows.

    Attributes:
        apart: whether ReLU is an operation of its own. oneDNN's is a maximum with 0, which makes zeros of NaN.
    """

    def __init__(
        self, weight: Tensor, bias: Tensor, stride: int = 1, padding: int | tuple[int, int] = 0, relu: bool = True
    ) -> None:
        self.weight = weight
        self.relu = relu
        self.apart = False
        self.bias = bias.to(weight.dtype)
        self.geometry = ([padding] * 2 if isinstance(padding, int) else list(padding), [stride] * 2, [1, 1], 1)
        self._packed = PackedWeights()

    def _pack(self, shape: tuple[int, ...]) -> Tensor:
        """Weights in the layout that oneDNN wants for this input shape (it may differ between shapes)."""
        packed = self._packed.get(shape)
        if packed is None:
            # PyTorch's type stub for this function lacks the shape. Without the shape the layout is a guess.
            packed = torch._C._nn.mkldnn_reorder_conv2d_weight(  # type: ignore[call-arg]
                self.weight.to_mkldnn(), *self.geometry, shape
            )
            packed = self._packed.add(shape, packed)
        return packed

    def __call__(self, x: Tensor) -> Tensor:
        """(N, C, H, W) channels-last -> (N, O, H', W') channels-last."""
        activation = "relu" if self.relu and not self.apart else "none"
        y = torch.ops.mkldnn._convolution_pointwise(
            x, self._pack(x.shape), self.bias, *self.geometry, activation, [], ""
        )
        return y.relu_() if self.relu and self.apart else y

    def add_to_(self, y: Tensor, x: Tensor) -> Tensor:
        """``y <- relu(y + conv(x))`` in place, as a post-operation."""
        activation = "relu" if self.relu and not self.apart else None
        y = torch.ops.mkldnn._convolution_pointwise_.binary(
            y, x, self._pack(x.shape), self.bias, *self.geometry, "add", 1.0, activation, [], ""
        )
        return y.relu_() if self.relu and self.apart else y


class EdgeConvolution:
    """The stem's convolution for one edge of the image, with ReLU, as a matrix product.

    For a small image oneDNN's convolution takes most of its time to be set up; a product does not. Sums, weights and
    bias are float32, also where the network is bfloat16.

    Args:
        weight: (O, C, 4, 4).
        bias: (O,).
        columns: whether the edge is the left column; else it is the top row.
    """

    def __init__(self, weight: Tensor, bias: Tensor, columns: bool) -> None:
        self.weight = weight.float().permute(2, 3, 1, 0).flatten(0, 2).contiguous()
        self.bias = bias.float()
        self.columns = columns

    def __call__(self, folded: Tensor) -> Tensor:
        """(N, C, h + 3, w + 3) -> (N, O, h, 1) or (N, O, 1, w), float32."""
        pixels = folded.permute(0, 2, 3, 1)
        # The windows along the edge, then their rows, columns and channels.
        if self.columns:
            windows = pixels[:, :, :4].unfold(1, 4, 1).permute(0, 1, 4, 2, 3)
        else:
            windows = pixels[:, :4].unfold(2, 4, 1).permute(0, 2, 1, 4, 3)
        n, length = windows.shape[:2]
        y = torch.addmm(self.bias, windows.reshape(n * length, -1).float(), self.weight).relu_()
        y = y.view(n, length, -1).transpose(1, 2)
        return y[..., None] if self.columns else y[:, :, None]


@dataclass(frozen=True)
class FoldedBottleneck:
    """Three convolutions with BN folded."""

    reduce: Convolution
    conv: Convolution
    expand: Convolution

    def __call__(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> the same tensor, overwritten."""
        return self.expand.add_to_(x, self.conv(self.reduce(x)))


@dataclass(frozen=True)
class FoldedWeights:
    """All folded and composed weights of a network, in one dtype.

    Attributes name the parts of :class:`fastden.Denoiser`; pairs are (weight, bias), bottlenecks three pairs.
    """

    stem: StemWeights
    res1: tuple[tuple[Tensor, Tensor], ...]
    conv2: tuple[Tensor, Tensor]
    res2: tuple[tuple[Tensor, Tensor], ...]
    up2: tuple[Tensor, Tensor]
    conv3: tuple[Tensor, Tensor]
    res3: tuple[tuple[Tensor, Tensor], ...]
    head: HeadWeights

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> FoldedWeights:
        """Select the weights from the buffers of a :class:`fastden.network.fused.FusedDenoiser` by name."""

        def pair(name: str) -> tuple[Tensor, Tensor]:
            return tensors[f"{name}_weight"], tensors[f"{name}_bias"]

        def triple(name: str) -> tuple[tuple[Tensor, Tensor], ...]:
            return pair(f"{name}_reduce"), pair(f"{name}_conv"), pair(f"{name}_expand")

        return cls(
            stem=StemWeights(*pair("stem")),
            res1=triple("res1"),
            conv2=pair("conv2"),
            res2=triple("res2"),
            up2=pair("up2"),
            conv3=pair("conv3"),
            res3=triple("res3"),
            head=HeadWeights(tensors["head_weight"], tensors["head_image_weight"], tensors["head_bias"]),
        )

    def finite(self) -> bool:
        """Whether no weight is NaN or infinite."""
        pairs = (*self.res1, self.conv2, *self.res2, self.up2, self.conv3, *self.res3)
        return finite(*self.stem, *(tensor for pair in pairs for tensor in pair), *self.head)


@dataclass(frozen=True)
class _Head:
    """The features' part of the head, with the bias: (N, M, h, w) -> (N, 4 K, h - 1, w - 1)."""

    parts: tuple[Convolution, ...]

    def __call__(self, features: Tensor) -> Tensor:
        for part in self.parts:
            features = part(features)
        return features


class OneDnnTiledNetwork(ABC):
    """The fused network in tiles that stay in cache; the base class of its forms in different number formats.

    A form sets the parts below and defines what the stem reads. The parts take and return channels-last tensors.

    Attributes:
        channels: number of channels of the image.
        zero_channels: number of zero channels that are added to the folded input.
        features: dtype of the activations between the convolutions.
        stem: makes the first features from the folded input (N, C, h + 3, w + 3): (N, O, h, w).
        left, top: make the left column (N, O, h, 1) and the top row (N, 2 O, 1, w) of the first features from the same
            input. The second half of the row's channels holds the corner.
        up2: makes the four phases of the upsampled features, as channels.
        outside: value that conv3 reads beyond the image in the channels of its second source.
    """

    channels: int
    zero_channels: int = 0
    features: torch.dtype
    outside: int = 0
    stem: Callable[[Tensor], Tensor]
    left: Callable[[Tensor], Tensor]
    top: Callable[[Tensor], Tensor]
    res1: Callable[[Tensor], Tensor]
    conv2: Callable[[Tensor], Tensor]
    res2: Callable[[Tensor], Tensor]
    up2: Callable[[Tensor], Tensor]
    conv3: Callable[[Tensor], Tensor]
    res3: Callable[[Tensor], Tensor]
    head: Callable[[Tensor], Tensor]

    @torch.no_grad()
    def __call__(self, x: Tensor) -> Tensor:
        """(N, C, H, W), padded network input, H and W multiples of 4 -> (N, K, H - 6, W - 6), in the dtype of ``x``."""
        together = max(BATCH_PIXELS // (x.shape[2] * x.shape[3]), 1)
        parts = [self._run(part) for part in x.split(together)]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    @abstractmethod
    def _inputs(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """What the stem reads, folded (:func:`fold`), and the image's own part of the result (N, 4 K, h - 1, w - 1)."""

    def _run(self, x: Tensor) -> Tensor:
        folded, y = self._inputs(x)
        skip = self._front(folded)
        low = self.res2(self.conv2(skip))
        upsampled = join_phases(self.up2(low))
        self._add_tail(skip, upsampled, y)
        # One pass moves the four phases to their pixels, and adds the image at its own precision.
        image = x[:, : self.channels, BORDER:-BORDER, BORDER:-BORDER]
        result = torch.empty(image.shape, dtype=x.dtype, device=x.device)
        pairs = (y.shape[2], 2), (y.shape[3], 2)
        torch.add(
            image.unflatten(2, pairs[0]).unflatten(4, pairs[1]),
            y.unflatten(1, (self.channels, 2, 2)).permute(0, 1, 4, 2, 5, 3),
            out=result.unflatten(2, pairs[0]).unflatten(4, pairs[1]),
        )
        return result

    def _front(self, folded: Tensor) -> Tensor:
        """Run stem and res1 on a few rows at a time, so that res1 finds stem's output in cache: (N, 128, h, w)."""
        height, width = folded.shape[2] - 3, folded.shape[3] - 3
        skip: Tensor | None = None
        for top, bottom, first, last in tile_regions(height, height, FRONT_ROWS, 1, 1):
            y = self.res1(self._stem(folded[:, :, first : last + 3], first == 0))
            if bottom - top == height:
                return y
            if skip is None:
                skip = channels_last_empty(y.shape[0], y.shape[1], height, width, self.features)
            skip[:, :, top:bottom] = y[:, :, top - first : bottom - first]
        assert skip is not None
        return skip

    def _stem(self, folded: Tensor, at_top: bool) -> Tensor:
        y = self.stem(folded)
        y[:, :, :, :1] = self.left(folded)
        if at_top:
            row, corner = self.top(folded).chunk(2, 1)
            y[:, :, :1] = row
            y[:, :, :1, :1] = corner[..., :1]
        return y

    def _add_tail(self, skip: Tensor, upsampled: Tensor, y: Tensor) -> None:
        """Run conv3, res3 and head tile by tile, and add the result to ``y`` (N, 4 K, h - 1, w - 1)."""
        rows = tile_regions(y.shape[2], skip.shape[2], TILE_ROWS, BEFORE, BEHIND)
        columns = tile_regions(y.shape[3], skip.shape[3], TILE_COLUMNS, BEFORE, BEHIND)
        for top, bottom, first_row, last_row in rows:
            for left, right, first_column, last_column in columns:
                spans = (first_row, last_row), (first_column, last_column)
                part = self.head(self.res3(self.conv3(gathered(skip, upsampled, *spans, self.outside))))
                inner = part[:, :, top - first_row : bottom - first_row, left - first_column : right - first_column]
                y[:, :, top:bottom, left:right] += inner


class OneDnnNetwork(OneDnnTiledNetwork):
    """The fused network, on float32 or bfloat16 CPU tensors, without gradients."""

    stem: Convolution
    res1: FoldedBottleneck
    conv2: Convolution
    res2: FoldedBottleneck
    up2: Convolution
    conv3: Convolution
    res3: FoldedBottleneck
    head: _Head

    def __init__(self, weights: FoldedWeights) -> None:
        stem, head = weights.stem, weights.head
        self.features = head.weight.dtype
        self.channels = head.image_weight.shape[0]
        self.zero_channels = zeros_for(self.features, stem.weight.shape[2])
        inside, left, top = ((unshuffled_weight(w, 4, self.zero_channels), b) for w, b in stem_parts(stem))
        self.stem = Convolution(*inside)
        self.left, self.top = EdgeConvolution(*left, columns=True), EdgeConvolution(*top, columns=False)
        self.res1 = _bottleneck(weights.res1)
        self.conv2 = Convolution(*weights.conv2, stride=2, padding=1)
        self.res2 = _bottleneck(weights.res2)
        # One convolution for all phases reads its input once, and is one call.
        phases = torch.cat(phase_weights(weights.up2[0]))
        self.up2 = Convolution(phases, weights.up2[1].repeat(4), padding=1, relu=False)
        self.conv3 = Convolution(*weights.conv3)
        self.res3 = _bottleneck(weights.res3)
        self.head = _head(head)
        self.image = image_convolution(head, self.zero_channels)
        if not weights.finite():
            for convolution in self._convolutions():
                convolution.apart = True

    def _convolutions(self) -> Iterator[Convolution]:
        for block in (self.res1, self.res2, self.res3):
            yield from (block.reduce, block.conv, block.expand)
        yield from (self.stem, self.conv2, self.up2, self.conv3, *self.head.parts, self.image)

    def _inputs(self, x: Tensor) -> tuple[Tensor, Tensor]:
        folded = fold(x, self.features, self.zero_channels)
        return folded, self.image(folded)


def stem_parts(weights: StemWeights) -> list[tuple[Tensor, Tensor]]:
    """Weight and bias of the stem's three convolutions: inside, left column, top row.

    The last one also has the corner's weights, as more output channels. This saves a call: on a small image a call
    takes more time than its computation.
    """
    inside, top, left, corner = zip(weights.weight, weights.bias, strict=True)
    return [inside, left, (torch.cat([top[0], corner[0]]), torch.cat([top[1], corner[1]]))]


def image_convolution(head: HeadWeights, zero_channels: int) -> Convolution:
    """The head's convolution of the image, without bias. It reads the folded input and gives the 2x2 phases."""
    image = image_phases(head.image_weight)
    return Convolution(unshuffled_weight(image, 5, zero_channels), image.new_zeros(len(image)), relu=False)


def _bottleneck(pairs: tuple[tuple[Tensor, Tensor], ...]) -> FoldedBottleneck:
    reduce, conv, expand = pairs
    return FoldedBottleneck(Convolution(*reduce), Convolution(*conv, padding=1), Convolution(*expand))


def _head(weights: HeadWeights) -> _Head:
    bias = weights.bias.repeat_interleave(4)
    if weights.weight.dtype == torch.bfloat16:
        # Two convolutions would read and round once more, which cost more than they saved in a trial whose figures were
        # not kept.
        return _Head((Convolution(weights.weight, bias, padding=1, relu=False),))
    rows, merge = separated_head(weights.weight)
    first = Convolution(rows, rows.new_zeros(len(rows)), padding=(0, 1), relu=False)
    return _Head((first, Convolution(merge, bias, padding=(1, 0), relu=False)))
