"""Contenders for one job: each result judged first, then all timed in turn."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastden.bench.machine import Sensors
from fastden.bench.timing import Call, Replay, Stopwatch, interleaved, peak_mib, summary

#: Accepted error of a result, as a multiple of the error of eager PyTorch in the same dtype, against float64.
TOLERANCE = 2.0
#: Accepted ratio of two maximum errors, beyond :data:`TOLERANCE`. The maximum of many errors varies by chance, their
#: root mean square does not: two operators with the same relative L2 norm have maxima that differ by a factor of up to
#: two (float32, 14 x 18 pixels, 264 comparisons: the ratio's logarithm has a standard deviation of 0.19, the largest
#: ratio was 1.96). The maximum finds what the norm hides, such as a wrong column.
CHANCE = 2.0


@dataclass(frozen=True)
class Contender:
    """A way to do the job.

    Args:
        name: in tables and files.
        build: makes the call; it may spend time on compiling or converting.
        flops: floating-point operations of one call; 0 where they are not counted.
        own: whether it is fastden.
        graphs: whether its call may be captured in a CUDA graph, and its memory read from PyTorch's allocator.
        bounds: its largest errors, if not the job's.
        counted: whether it computes in the run's dtype, in which operations, bytes and the machine's rates are counted.
        why_not_timed: says, once all times are measured, why its own say nothing; empty where they do.
    """

    name: str
    build: Callable[[], Call]
    flops: float = 0.0
    own: bool = False
    graphs: bool = True
    bounds: Mapping[str, float] | None = None
    counted: bool = True
    why_not_timed: Callable[[], str] | None = None


@dataclass(frozen=True)
class Job:
    """What every contender does.

    Args:
        name: in tables and files.
        images, pixels: in one call; pixels of all images together.
        bytes: lower bound of bytes read and written; 0 where they are not counted.
        reference: the right result in float64.
        bounds: largest errors by kind, see :func:`errors`.
    """

    name: str
    images: int
    pixels: int
    bytes: float
    reference: tuple[Tensor, ...]
    bounds: Mapping[str, float]


@dataclass(frozen=True)
class Settings:
    """How to measure.

    Args:
        device, dtype: of all contenders.
        rounds, repeats: of the timing, see :func:`fastden.bench.timing.interleaved`.
        graphs: on a GPU, time replays of CUDA graphs.
        energy_seconds: on a GPU, how long each contender runs for its energy; 0 leaves the energy out.
        warm_up: calls before anything counts: compilers and cuDNN choose what to run in the first ones.
    """

    device: torch.device
    dtype: torch.dtype
    rounds: int
    repeats: int = 2
    graphs: bool = False
    energy_seconds: float = 1.0
    warm_up: int = 3


def tensors(result: Any) -> tuple[Tensor, ...]:
    """A call's result as a tuple."""
    return (result,) if isinstance(result, Tensor) else tuple(result)


def errors(results: Sequence[Tensor], references: Sequence[Tensor]) -> dict[str, float]:
    """The worst tensor's ``relative_l2``, and its ``maximum`` error in units of the reference's largest value.

    Tensors that are zero up to rounding, such as the gradient of a bias in front of batch statistics, have no
    relative error and are left out.

    Args:
        results: of a contender, of any floating dtype.
        references: float64, as many and of the same shapes.

    Returns:
        Both errors; infinity where a result holds NaN.

    Raises:
        ValueError: another number of results, or another shape.
    """
    if len(results) != len(references):
        raise ValueError(f"{len(results)} results; the reference has {len(references)}")
    references = [reference.detach() for reference in references]
    largest = max(float(reference.square().mean()) for reference in references) ** 0.5
    worst = {"relative_l2": 0.0, "maximum": 0.0}
    for result, reference in zip(results, references, strict=True):
        if result.shape != reference.shape:
            raise ValueError(f"a result of shape {tuple(result.shape)}; the reference has {tuple(reference.shape)}")
        if float(reference.square().mean()) ** 0.5 <= 1e-9 * largest:
            continue
        difference = result.detach().to(reference.device, torch.float64) - reference
        for kind, value in (
            ("relative_l2", difference.norm() / reference.norm()),
            ("maximum", difference.abs().max() / reference.abs().max()),
        ):
            # A NaN counts as infinitely wrong, and max() would drop it.
            worst[kind] = max(worst[kind], float(value.nan_to_num(torch.inf, torch.inf)))
    return worst


def bounds(
    eager: Any, reference: tuple[Tensor, ...], dtype: torch.dtype, *, gradients: bool = False
) -> dict[str, float]:
    """The largest errors accepted, from eager PyTorch's own; no result need be better than ``dtype`` resolves.

    The relative L2 norm may be :data:`TOLERANCE` times eager's, the maximum :data:`CHANCE` times more.

    Args:
        eager: what eager PyTorch returns in ``dtype``; a list of results where it has several ways, of which the worst
            counts: by memory layout oneDNN adds in different orders, and errs differently by a factor of up to two.
        reference: the right result in float64.
        dtype: of the contenders.
        gradients: judge by ``relative_l2`` alone, and allow for ReLUs that open or close by rounding: where a share of
            them does, about what the dtype resolves, gradients move by that share's square root.
    """
    unit = torch.finfo(dtype).eps
    floors = {"relative_l2": TOLERANCE * unit**0.5} if gradients else {"relative_l2": unit / 2, "maximum": unit}
    ways = [errors(tensors(result), reference) for result in (eager if isinstance(eager, list) else [eager])]
    factors = {"relative_l2": TOLERANCE, "maximum": TOLERANCE * CHANCE}
    return {kind: max(factors[kind] * max(way[kind] for way in ways), floor) for kind, floor in floors.items()}


def compare(
    job: Job,
    contenders: Sequence[Contender],
    settings: Settings,
    limits: Mapping[str, float],
    *,
    sensors: Sensors | None = None,
    measure: Callable[[Call], float] | None = None,
    fetch: Callable[[Any], tuple[Tensor, ...]] = tensors,
) -> dict[str, Any]:
    """Judge and time ``contenders``.

    Args:
        job: what they do.
        contenders: in the order of the table.
        settings: how to measure.
        limits: :func:`fastden.bench.machine.ceilings`.
        sensors: of the GPU, for energy.
        measure: time of a call in milliseconds, if not by the device's clock.
        fetch: makes tensors of what a call returns.

    Returns:
        The job, and a row for each contender: errors and whether they are ``right``, all times, median and quartiles,
        rates, shares of the ceilings, memory, energy, and ``slower_by``, the ratio to fastden's fastest right
        contender. A contender that fails, or whose times say nothing, has ``failed``, the reason; one that is wrong has
        no ratio.
    """
    rows: dict[str, dict[str, Any]] = {}
    calls: dict[str, Call] = {}
    for contender in contenders:
        row = rows[contender.name] = {"own": contender.own}
        try:
            calls[contender.name] = ready(contender, job, settings, row, fetch)
        # The failure of one contender must not lose the results of the others.
        except Exception as failure:
            row["failed"] = f"{type(failure).__name__}: {' '.join(str(failure).split())[:300]}"
        verdict = row.get("failed", "ready" if row.get("right") else "wrong result")
        print(f"{job.name}: {contender.name}: {verdict}", file=sys.stderr)
    times = interleaved(calls, measure or Stopwatch(settings.device), settings.rounds, settings.repeats)
    for contender in contenders:
        row = rows[contender.name]
        if contender.name in calls and contender.why_not_timed is not None and (reason := contender.why_not_timed()):
            rows[contender.name] = {"own": contender.own, "failed": reason}
            print(f"{job.name}: {contender.name}: {reason}", file=sys.stderr)
        elif contender.name in calls:
            row |= summary(times[contender.name]) | {"raw_ms": times[contender.name]}
            row |= _rates(job, contender, row["median_ms"], limits)
            if sensors is not None and settings.energy_seconds > 0 and row["right"]:
                load = sensors.under_load(calls[contender.name], row["median_ms"], settings.energy_seconds)
                used = load["joules_a_call"]
                row["sensors"] = load
                row["joules_a_megapixel"] = None if used is None else used / (job.pixels / 1e6)
    _ratios(rows)
    return {
        "name": job.name,
        "images": job.images,
        "megapixels": job.pixels / 1e6,
        "bytes_at_least": job.bytes,
        "bounds": dict(job.bounds),
        "contenders": rows,
    }


def all_right(result: Mapping[str, Any]) -> bool:
    """Whether every contender of a comparison ran and was right, and the large picture did not fail."""
    return "failed" not in result.get("large", {}) and all(
        row.get("right", False) for row in result["contenders"].values()
    )


def ready(
    contender: Contender,
    job: Job,
    settings: Settings,
    row: dict[str, Any],
    fetch: Callable[[Any], tuple[Tensor, ...]] = tensors,
) -> Call:
    """Build a contender's call, warm it up, and judge what it returns; ``row`` gets the findings."""
    call = contender.build()
    for _ in range(settings.warm_up):
        call()
    row["peak_mib"] = peak_mib(call, settings.device) if contender.graphs else None
    row["timing"] = "host clock" if settings.device.type == "cpu" else "CUDA events"
    if settings.device.type == "cuda" and settings.graphs and contender.graphs:
        call = Replay(call)
        row["timing"] = "CUDA graph"
    row["errors"] = errors(fetch(call()), job.reference)
    bounds = job.bounds if contender.bounds is None else contender.bounds
    row["right"] = all(error <= bounds[kind] for kind, error in row["errors"].items() if kind in bounds)
    return call


def _rates(job: Job, contender: Contender, milliseconds: float, limits: Mapping[str, float]) -> dict[str, float]:
    megapixels = job.pixels / 1e6
    rates = {
        "ms_a_megapixel": milliseconds / megapixels,
        "megapixels_a_second": 1e3 * megapixels / milliseconds,
        "images_a_second": 1e3 * job.images / milliseconds,
    }
    if contender.counted and contender.flops:
        rates |= {"flops": contender.flops, "tflops": contender.flops / milliseconds / 1e9}
        rates["share_of_matrix_rate"] = rates["tflops"] / limits["matrix_tflops"]
    if contender.counted and job.bytes:
        rates["gigabytes_a_second"] = job.bytes / milliseconds / 1e6
        rates["share_of_copy_bandwidth"] = rates["gigabytes_a_second"] / limits["copy_gigabytes_a_second"]
    return rates


def _ratios(rows: Mapping[str, dict[str, Any]]) -> None:
    """Add ``slower_by`` to what is right; its range is that of the quartiles."""
    right = [row for row in rows.values() if row.get("right") and "median_ms" in row]
    best = min((row for row in right if row["own"]), key=lambda row: row["median_ms"], default=None)
    for row in right if best is not None else ():
        assert best is not None
        row["slower_by"] = row["median_ms"] / best["median_ms"]
        row["slower_by_range"] = [row["q1_ms"] / best["q3_ms"], row["q3_ms"] / best["q1_ms"]]
