"""Networks with random statistics, small networks behind a denoiser, and measures of error."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from fastden import ops
from fastden.network.model import Denoiser
from fastden.ops import backends

if TYPE_CHECKING:
    from fastden.batch.denoiser import BatchDenoiser


def randomise(model: Denoiser, seed: int = 0) -> Denoiser:
    """Random BN statistics, BN weights (negative ones too), biases and a full-sized last layer, in place."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(like: Tensor, low: float, high: float) -> Tensor:
        return torch.rand(like.shape, generator=generator).mul_(high - low).add_(low).to(like)

    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                assert module.running_mean is not None
                assert module.running_var is not None
                module.running_mean.copy_(uniform(module.running_mean, -0.5, 0.5))
                module.running_var.copy_(uniform(module.running_var, 0.5, 2.0))
                sign = torch.where(uniform(module.weight, 0, 1) < 0.2, -1.0, 1.0).to(module.weight)
                module.weight.copy_(sign * uniform(module.weight, 0.5, 1.5))
                module.bias.copy_(uniform(module.bias, -0.5, 0.5))
            elif isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
                scale = uniform(module.weight, -1, 1)
                module.weight.copy_(scale * (6.0 / module.weight[0].numel()) ** 0.5)
                if module.bias is not None:
                    module.bias.copy_(uniform(module.bias, -0.2, 0.2))
    return model


def random_network(
    noise_level_input: bool = True,
    image_channels: int = 3,
    *,
    composed: bool = False,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> Denoiser:
    """A randomised network in evaluation mode; the same ``seed`` gives the same float32 weights in every dtype."""
    model = Denoiser(noise_level_input, image_channels, composed)
    return randomise(model, seed).eval().to(dtype)


def level(model: Denoiser, value: float = 0.1) -> float | None:
    """A noise level where ``model`` takes one."""
    return value if model.noise_level_input else None


def max_error(result: Tensor, reference: Tensor) -> float:
    """Largest absolute error, in units of the reference's largest value."""
    difference = (result.double() - reference.double()).abs().max()
    return (difference / reference.double().abs().max()).item()


def relative_l2(result: Tensor, reference: Tensor) -> float:
    """Norm of the error, in units of the reference's norm."""
    return ((result.double() - reference.double()).norm() / reference.double().norm()).item()


def border_rms(error: Tensor, width: int = 4) -> dict[str, float]:
    """Root mean square of (N, C, H, W) on each of the outer rows and columns, by name."""
    height, columns = error.shape[2:]
    result = {}
    for i in range(min(width, height)):
        result[f"row {i}"] = error[:, :, i]
        result[f"row -{i + 1}"] = error[:, :, height - 1 - i]
    for i in range(min(width, columns)):
        result[f"column {i}"] = error[..., i]
        result[f"column -{i + 1}"] = error[..., columns - 1 - i]
    return {name: line.double().square().mean().sqrt().item() for name, line in result.items()}


def poison_freed_memory() -> None:
    """Leave blocks full of NaN to the allocator, so that a read of unwritten memory shows."""
    sizes = [1 << power for power in range(6, 23, 2)]
    blocks = [torch.full((size,), float("nan")) for size in sizes for _ in range(6)]
    del blocks


class ReLUInputs(TorchDispatchMode):
    """Watches the inputs of ReLUs.

    Attributes:
        count: number of ReLUs that ran.
        smallest: absolute value of any of their inputs.
    """

    def __init__(self) -> None:
        super().__init__()
        self.count = 0
        self.smallest = math.inf

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in (torch.ops.aten.relu.default, torch.ops.aten.relu_.default):
            self.count += 1
            self.smallest = min(self.smallest, args[0].abs().min().item())
        return func(*args, **(kwargs or {}))


#: Smallest input of a ReLU that rounding does not carry to the other side of zero: float32's errors in front of the
#: ReLUs of a random network with batch statistics reached 1.4e-5.
MARGIN = 3e-5


def noted_choices(monkeypatch: pytest.MonkeyPatch) -> dict[str, set[str]]:
    """The backends that are chosen automatically from now on, by operator; it is filled as the calls come."""
    chosen: dict[str, set[str]] = {}
    automatic = backends._automatic

    def noted(operator: str, *given: Any) -> str:
        name = automatic(operator, *given)
        chosen.setdefault(operator, set()).add(name)
        return name

    monkeypatch.setattr(backends, "_automatic", noted)
    return chosen


def image_without_kinks(model: Denoiser, *shape: int, sigma: float | None = 0.1) -> Tensor:
    """A random float32 image (N, C, H, W) at which no ReLU of ``model`` has an input near zero.

    One ReLU that rounding opens or closes moves the gradients of all parameters in front of it by several percent
    (3.6 % with one of 98,304, measured). So float32 gradients are compared at such images alone.
    """
    exact = copy.deepcopy(model).double()
    for seed in range(200):
        x = torch.rand(shape, generator=torch.Generator().manual_seed(seed)).to(model.conv0.weight.device)
        with torch.no_grad(), ReLUInputs() as seen:
            exact(x.double(), sigma)
        assert seen.count == 12, "a network has twelve ReLUs"
        if seen.smallest > MARGIN:
            return x
    raise AssertionError(f"no image of shape {shape} keeps all ReLUs' inputs {MARGIN} from zero")


def copies_in_operators(backend: str, call: Callable[[], object]) -> list[str]:
    """PyTorch's copies and rearrangements that run inside fastden's operators on ``backend`` during ``call``."""
    # Not copy_, which Triton's interpreter calls for every launch.
    moves = ("_to_copy", "cat", "clone", "constant_pad_nd", "flip", "index_select", "new_zeros", "zeros")
    with torch.no_grad(), ops.use_backend(backend), profile(activities=[ProfilerActivity.CPU]) as found:
        call()
    copies = []
    for event in found.events():
        parent = event.cpu_parent
        while parent is not None and not parent.name.startswith("fastden"):
            parent = parent.cpu_parent
        if parent is not None and event.name.removeprefix("aten::") in moves:
            copies.append(f"{parent.name}: {event.name}")
    return copies


def streaming(batch: BatchDenoiser) -> BatchDenoiser:
    """The same engine, which from now on streams every image, however small."""
    look = batch.stages.reading.look
    batch.stages.reading.look = lambda job: replace(look(job), streamed=True)  # type: ignore[method-assign]
    return batch


def labelled_batch(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Noisy and clean images (4, 3, 20, 24), and their labels (4,), of five classes."""
    generator = torch.Generator().manual_seed(seed)
    clean = torch.rand(4, 3, 20, 24, generator=generator)
    noisy = clean + 0.1 * torch.randn(clean.shape, generator=generator)
    return noisy, clean, torch.randint(5, (4,), generator=generator)


def classifier(classes: int = 5, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, stride=2),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Dropout(0.5),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(6, classes),
    )


def segmenter(classes: int = 4) -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Conv2d(3, classes, 3, stride=2, padding=1), nn.BatchNorm2d(classes))


def normalise(images: Tensor) -> Tensor:
    return F.interpolate((images - 0.5) / 0.25, size=16, mode="bilinear", align_corners=False)
