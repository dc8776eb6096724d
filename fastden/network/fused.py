"""The inference form of the network: batch normalisation folded, linear chains composed."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastden import ops
from fastden.algebra import HeadWeights, compose_head, compose_stem
from fastden.network import folding, fp8, int8, onednn
from fastden.network.calibrated import Calibrated, calibrated_ranges
from fastden.network.devices import named_device, parse_device
from fastden.network.inputs import Sigma, as_map, check_input, map_or_curve, warn_of_scale
from fastden.network.level import BRIGHTNESS_RADIUS
from fastden.network.model import Denoiser
from fastden.network.own_estimator import OwnEstimator
from fastden.network.packed import Snapshot
from fastden.network.padding import pad_image, padding_for
from fastden.ops.backends import requested
from fastden.ops.modes import runs_as_written, without_autocast
from fastden.ops.network_input import can_prepare, network_input
from fastden.ops.post_operations import why_not
from fastden.ops.tensors import wants_gradient

#: What a fused network can hold and compute in.
DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}


@torch.inference_mode(mode=False)  # tensors made in inference mode have no version counter
def fuse(
    model: Denoiser,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    *,
    quality: Literal["normal", "fast"] = "normal",
    differentiable: bool = False,
) -> FusedDenoiser:
    """The inference form of ``model``: the same function, faster.

    BN with its running statistics is folded. conv1 o conv0 and out o cat(conv0, up3) are composed. Both steps run in
    float64; then the weights are cast. The result shares no memory with ``model``.

    Args:
        model: a :class:`fastden.Denoiser`.
        dtype: dtype of weights and activations, a torch dtype or its name: float64, float32, bfloat16 or float16; None
            keeps the model's.
        device: device of the result; None keeps the model's.
        quality: ``"fast"`` computes in fewer bits where no gradient is needed. On CPUs with VNNI these are 8-bit
            integers (:mod:`fastden.network.int8`): 1.5 (AMX) to 1.8 times (without) as fast as
            bfloat16. ``color`` loses 0.01 to 0.02 dB (``benchmarks/results/int8.json``), ``photo`` on photographs up
            to 0.06 dB (``benchmarks/results/real-photos-fast.json``); its features see floating values beyond [0, 1] as
            0 and 1. On GPUs of compute capability 9.0, in
            float16 or bfloat16 and with the CUDA extension, conv3 computes in 8-bit floating point
            (:mod:`fastden.network.fp8`), with ``color`` 0.003 dB worse: 1.65 ms of an H200 at 2160 x 3840 in place of
            2.05 (``benchmarks/results/h200-choice``). The model must
            know the ranges of its activations: bundled models know them, other models know them after
            :func:`fastden.calibrate`.
        differentiable: compute with PyTorch's own operations, whatever backend is chosen. Then derivatives of every
            order exist (for score matching, or for the trace of the Jacobian in plug-and-play priors). Kernels have
            first derivatives only.

    Raises:
        TypeError: ``model`` is not a Denoiser.
        ValueError: the device, dtype, quality or ``differentiable`` is not accepted; the device, the dtype or the
            model cannot run ``quality="fast"``; or a layer was replaced, or is changed by hooks, so that it cannot be
            folded. Hooks that change nothing are accepted, and do not run in the result. To test this, a layer with
            hooks is called once.
    """
    if not isinstance(model, Denoiser):
        raise TypeError(f"model: {type(model).__name__}; accepted: fastden.Denoiser")
    own = next(model.parameters())
    chosen = own.dtype if dtype is None else DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if chosen is None or chosen not in DTYPES.values():
        raise ValueError(f"dtype: {dtype!r}; accepted: {', '.join(DTYPES)}")
    device = own.device if device is None else named_device(device)
    if device != own.device:
        parse_device(device, any_kind=True)
    if not isinstance(differentiable, bool):
        raise ValueError(f"differentiable: {differentiable!r}; accepted: True or False")
    if quality not in ("normal", "fast"):
        raise ValueError(f"quality: {quality!r}; accepted: 'normal', 'fast'")
    ranges = None
    if quality == "fast":
        reasons = [f"device: {device}; accepted: cpu, cuda"]
        if device.type in ("cpu", "cuda"):
            on_cpu = device.type == "cpu"
            reasons = int8.why_not() or why_not(device, chosen) if on_cpu else fp8.why_not(chosen, device)
        if reasons:
            raise ValueError(f"quality: 'fast', but {'; '.join(reasons)}; accepted here: 'normal'")
        ranges = calibrated_ranges(model)
    return FusedDenoiser(model, ranges, differentiable).to(dtype=chosen, device=device)


def _keeping_order(fn: Callable[[Tensor], Tensor], tensor: Tensor) -> Tensor:
    """``fn`` of a weight whose memory keeps the order that kernels need, whatever memory format ``fn`` wants.

    ``.to(memory_format=torch.channels_last)`` of a module around a fused network comes here, and refuses the stem's
    five dimensions.
    """
    if tensor.dim() < 4:
        return fn(tensor)
    order = sorted(range(tensor.dim()), key=tensor.stride, reverse=True)
    flat = tensor.permute(order).flatten()  # no memory format has one dimension
    moved = fn(flat)
    if moved is flat:
        return tensor
    back = [order.index(dim) for dim in range(tensor.dim())]
    return moved.view([tensor.shape[dim] for dim in order]).permute(back)


def _as_kernels_read(name: str, weight: Tensor) -> Tensor:
    """Copy a weight: the same shape, but its memory in the order in which kernels read it.

    In this order the input channels are innermost. Without it, each call would copy the weight. A second copy in this
    order beside the weight could become stale.
    """
    if name == "stem":  # (4, O, C, 7, 7)
        return weight.permute(0, 1, 3, 4, 2).clone(memory_format=torch.contiguous_format).permute(0, 1, 4, 2, 3)
    if name == "up2":  # (C, O, 4, 4)
        return weight.transpose(0, 1).clone(memory_format=torch.channels_last).transpose(0, 1)
    return weight.clone(memory_format=torch.channels_last)


class FusedDenoiser(nn.Module):
    """What :func:`fuse` returns: called like :class:`fastden.Denoiser`, for inference only.

    Weights are buffers with the names of the network's parts. The module has no parameters, because a folded weight
    cannot be trained: the normalisation and the factors that it was made from are gone. ``module.parameters()`` is
    empty, so that an optimiser finds nothing to change. Read ``device`` and ``dtype`` instead. Gradients pass through
    the module to ``x`` and ``sigma``, and to buffers that require gradients. Biases stay in float32 where weights are
    in half precision: kernels add them to float32 sums.

    On a CPU in float32 and bfloat16, where no gradient is needed, the module runs on oneDNN
    (:mod:`fastden.network.onednn`) with packed copies of the weights. Every change of the buffers updates these copies.
    Elsewhere, and under transforms (``torch.func``, ``torch.compile``, tracing), it runs on :mod:`fastden.ops`.
    Several threads may call it at the same time.

    Weights lie in memory as kernels read them. So ``safetensors.torch.save_file`` refuses the state of a module that
    holds a fused network ("non contiguous"): ``safetensors.torch.save_model(module, path)`` saves it, and so does
    ``save_file`` of ``{name: tensor.contiguous()}``.

    A new one has float64 weights on the CPU, which :func:`fuse` casts and moves, and is in evaluation mode, whatever
    the mode of ``model``.

    Args:
        model: the network to fuse.
        ranges: ranges of its activations, for 8-bit numbers; None for more bits only.
        differentiable: as in :func:`fuse`.
    """

    stem_weight: Tensor
    stem_bias: Tensor
    head_weight: Tensor
    head_image_weight: Tensor
    head_bias: Tensor
    conv3_ranges: Tensor
    #: As of :class:`fastden.Denoiser`.
    estimator: OwnEstimator | None = None

    @torch.no_grad()
    def __init__(self, model: Denoiser, ranges: int8.Ranges | None = None, differentiable: bool = False) -> None:
        super().__init__()
        self.estimator = model.estimator
        self.differentiable = differentiable
        self.noise_level_input = model.noise_level_input
        self.image_channels = model.image_channels
        weights = folding.weights(model)
        stem = compose_stem(*weights["conv0"], *weights["conv1"])
        head = compose_head(*weights["conv0"], *weights["up3"], *weights["out"])
        pairs = {"stem": (stem.weight, stem.bias), "head": (head.weight, head.bias)}
        pairs |= {name: pair for name, pair in weights.items() if name not in ("conv0", "conv1", "up3", "out")}
        for name, (weight, bias) in pairs.items():
            self.register_buffer(f"{name}_weight", _as_kernels_read(name, weight))
            self.register_buffer(f"{name}_bias", bias.clone())
        self.register_buffer("head_image_weight", _as_kernels_read("head_image", head.image_weight))
        self._names = tuple(self._buffers)
        self._calibrated = None if ranges is None else Calibrated(ranges, self._weights())
        if ranges is not None:
            self.register_buffer("conv3_ranges", fp8.conv3_ranges(ranges), persistent=False)
            self.register_load_state_dict_post_hook(FusedDenoiser._check_loaded)
        self._onednn: tuple[Snapshot, onednn.OneDnnTiledNetwork] | None = None
        self.eval()

    @torch.inference_mode(mode=False)  # as in fuse(): tensors of that mode would refuse later gradients
    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FusedDenoiser:
        before = {name: buffer for name, buffer in self.named_buffers() if name.endswith(("_bias", "_ranges"))}
        if self._calibrated is not None and self.conv3_ranges.is_meta:  # as behind to_empty(), no state dict has them
            before["conv3_ranges"] = fp8.conv3_ranges(self._calibrated.ranges)
        super()._apply(partial(_keeping_order, fn), recurse)
        for name, exact in before.items():
            cast = getattr(self, name)
            if cast.dtype in (torch.float16, torch.bfloat16) or name.endswith("_ranges"):
                setattr(self, name, exact.to(device=cast.device, dtype=torch.float32))
        return self

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of weights and activations."""
        return self.head_weight.dtype

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return self.head_weight.device

    def forward(self, x: Tensor, sigma: Sigma = None) -> Tensor:
        """Denoise a batch. Arguments, errors and warning are those of :meth:`fastden.Denoiser.forward`.

        ``x`` may be float64, float32, bfloat16 or float16. Activations are computed in this module's dtype. The
        network's correction, which is small, is added to ``x`` at the precision of ``x``, and the result has that
        precision too. Autocast changes nothing here, with or without gradients: :func:`fuse` set the precision.

        Returns:
            (N, 3, H, W), contiguous, not clipped, in the dtype of ``x``.
        """
        height, width = check_input(x, self.image_channels, self.device)
        warn_of_scale(x)
        level = map_or_curve(x, sigma, self.noise_level_input)
        if self.prepares(x, level):
            y = self.forward_prepared(x, level, padding_for(height), padding_for(width))
        else:
            with without_autocast(x.device):  # its torch.cat refuses float16 where it is on for bfloat16
                level = as_map(level, x)
                padded = pad_image(x if level is None else torch.cat([x, level], 1))
            y = self.forward_padded(padded)
        if torch.compiler.is_compiling():
            # A view's strides would limit an exported graph to sizes that need cropping, or to sizes that do not.
            y = F.pad(y, (0, width - y.shape[3], 0, height - y.shape[2]))
            return y.clone(memory_format=torch.contiguous_format)
        return y[:, :, :height, :width].contiguous()

    def forward_padded(self, x: Tensor) -> Tensor:
        """Run the network on a padded input: (N, C, H, W) -> (N, 3, H - 6, W - 6), H and W multiples of 4."""
        backend = "torch" if self.differentiable else None
        wanted = backend or requested()
        if not torch.compiler.is_compiling() and wanted in (None, "torch") and x.shape[0] > 0:
            network = self._onednn_network() if runs_as_written(x) else None
            if network is not None and not (torch.is_grad_enabled() and x.requires_grad):
                with without_autocast(x.device):
                    return network(x)
        with without_autocast(x.device):
            return self._operators(x.to(self.dtype), x, backend)

    def prepares(self, x: Tensor, level: Tensor | None) -> bool:
        """Whether :meth:`forward_prepared` can run: a kernel makes the network's input in one pass."""
        return not self.differentiable and runs_as_written(x) and can_prepare(x, level, self.dtype)

    def forward_prepared(
        self, x: Tensor, level: Tensor | None, rows: tuple[int, int], columns: tuple[int, int]
    ) -> Tensor:
        """Run the network on an image that is not padded yet; one pass over it pads it, adds its level and casts it.

        Args:
            x: (N, C, H, W), any floating dtype.
            level: a map (N, 1, H, W), curves (N or 1, 8) over the brightness of ``x``, or None.
            rows, columns: pixels that are added before and after, by reflection, to multiples of 4. Negative numbers
                remove pixels: these only give a curve the brightness around the others.

        Returns:
            As :meth:`forward_padded`, in the dtype of ``x``.
        """
        with without_autocast(x.device):
            return self._operators(*network_input(x, level, self.dtype, rows, columns, BRIGHTNESS_RADIUS), None)

    def _operators(self, x: Tensor, image: Tensor, backend: str | None) -> Tensor:
        """Run the network on its padded input ``x``; add the correction to ``image``, which has its own dtype."""
        skip = self._bottleneck("res1", ops.stem(x, self.stem_weight, self.stem_bias, backend=backend), backend)
        low = ops.conv_bn_relu(skip, *self._pair("conv2"), stride=2, padding=1, backend=backend)
        up = ops.upsample(self._bottleneck("res2", low, backend), *self._pair("up2"), backend=backend)
        joined = self._conv3(skip, up, backend)
        weights = HeadWeights(self.head_weight, self.head_image_weight, self.head_bias)
        features = self._bottleneck("res3", joined, backend)
        return ops.head(features, x, *weights, image=image, composed=True, backend=backend)

    def _conv3(self, skip: Tensor, up: Tensor, backend: str | None) -> Tensor:
        weight, bias = self._pair("conv3")
        wanted = backend or requested()
        # Elsewhere, quality="fast" is oneDNN's form, or does not change what operators do.
        calibrated = None if self.differentiable else self._calibrated
        # A GPU without fp8 computes as quality="normal" does. Where "cuda" is asked for, the operator says why not.
        in_fp8 = calibrated and (wanted == "cuda" or (skip.is_cuda and fp8.runs(self.dtype, skip.device)))
        if calibrated is None or not in_fp8 or wants_gradient(skip, up, weight, bias):
            return ops.concat_conv_bn_relu(skip, up, weight, bias, backend=backend)
        # Where the call is recorded, no value can be read.
        if runs_as_written(skip) and not (skip.is_cuda and torch.cuda.is_current_stream_capturing()):
            calibrated.check_changes(self._weights())
        return ops.concat_conv_fp8(skip, up, weight, bias, ranges=self.conv3_ranges, backend=wanted or "cuda")

    def _weights(self) -> dict[str, Tensor]:
        return {name: getattr(self, name) for name in self._names}

    def _check_loaded(self, _: object) -> None:
        """Refuse weights that the ranges of activations do not belong to, as soon as they are loaded."""
        assert self._calibrated is not None
        self._calibrated.check(self._weights())

    def _pair(self, name: str) -> tuple[Tensor, Tensor]:
        return getattr(self, f"{name}_weight"), getattr(self, f"{name}_bias")

    def _triple(self, name: str) -> tuple[tuple[Tensor, Tensor], ...]:
        return self._pair(f"{name}_reduce"), self._pair(f"{name}_conv"), self._pair(f"{name}_expand")

    def _bottleneck(self, name: str, x: Tensor, backend: str | None) -> Tensor:
        (reduce, a), (conv, b), (expand, c) = self._triple(name)
        return ops.bottleneck(x, reduce, conv, expand, biases=(a, b, c), backend=backend)

    @property
    def quality(self) -> str:
        """``"fast"`` where the module may compute in 8-bit numbers, else ``"normal"``."""
        return "normal" if self._calibrated is None else "fast"

    @property
    def ranges(self) -> int8.Ranges | None:
        """The ranges of activations by which quality ``"fast"`` computes; None for ``"normal"``."""
        return None if self._calibrated is None else self._calibrated.ranges

    def _onednn_network(self) -> onednn.OneDnnTiledNetwork | None:
        """The packed form of the current weights; None where oneDNN cannot run, or weights need gradients."""
        buffers = self._buffers
        # A parametrisation or a parameter may have replaced a buffer.
        weights: list[Any] = [buffers[name] if name in buffers else getattr(self, name) for name in self._names]
        if not {type(weight) for weight in weights} <= {Tensor, nn.Parameter}:
            return None
        if torch.is_grad_enabled() and any(weight.requires_grad for weight in weights):
            return None
        if why_not(self.device, self.dtype):
            return None
        packed = self._onednn  # read once: another thread may replace it
        if packed is None or not packed[0].holds(weights):
            if not {weight.dtype for weight in weights} <= {self.dtype, torch.float32}:
                return None  # the operators' error names the weight
            snapshot = Snapshot(weights)
            # Pack the snapshot's copies. So weights that are packed later, for another size, are the same weights.
            copies = dict(zip(self._names, snapshot.copies, strict=True))
            folded = onednn.FoldedWeights.of(copies)
            # Integers have no NaN: weights that hold one keep it in floating point. The CPU may be another one than
            # that on which the network was made.
            network: onednn.OneDnnTiledNetwork = (
                onednn.OneDnnNetwork(folded)
                if self._calibrated is None or not folded.finite() or int8.why_not()
                else self._calibrated.quantized(copies)
            )
            packed = self._onednn = (snapshot, network)
        return packed[1]

    def __getstate__(self) -> dict[str, Any]:
        # pickle and deepcopy cannot read packed weights. The copy makes them again on first use.
        return {**self.__dict__, "_onednn": None}

    def extra_repr(self) -> str:
        told = (
            f"noise_level_input={self.noise_level_input}, image_channels={self.image_channels}, dtype={self.dtype},"
            f" quality={self.quality!r}"
        )
        return f"{told}, differentiable=True" if self.differentiable else told
