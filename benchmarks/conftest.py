"""Shared by the suites for pytest-benchmark: the contenders of ``fastden bench``, one test each.

    pytest benchmarks/bench_bottleneck.py
    pytest benchmarks/bench_*.py --image-size 1080x1920 --bench-dtype bfloat16 --bench-compare eager,compile

A suite names what it measures in ``SUITE``: an operator, or ``network_input``, ``model``, ``train`` or ``batch``. Each
test fails where the result is wrong. Times are the host's, a GPU's L2 cache is overwritten before each call; ``fastden
bench`` measures with CUDA events, all contenders in turn.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch

import fastden
from fastden.bench import files, forms, gradients, machine, network, operators, preparation
from fastden.bench.compare import Contender, Job, Settings, ready, tensors
from fastden.network.devices import parse_device
from fastden.network.loading import choose_dtype


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("fastden")
    group.addoption("--image-size", default="512x768", help="HEIGHTxWIDTH; of train, the crops are an eighth of it")
    group.addoption("--bench-compare", default="eager,channels_last,compile", help="contenders beside fastden")
    group.addoption("--bench-device", default=None, help="cpu, cuda, ...; default CUDA if there is any")
    group.addoption("--bench-dtype", default="auto", help="auto, float32, bfloat16 or float16")


class _Suite:
    """The jobs of one suite; each is made when its first contender's turn comes, and only the last one is kept."""

    def __init__(self, config: pytest.Config) -> None:
        height, width = config.getoption("--image-size").split("x")
        self.size = (int(height), int(width))
        self.device = parse_device(config.getoption("--bench-device"))
        self.dtype = choose_dtype(config.getoption("--bench-dtype"), self.device, eight_bit=True)
        self.peers = forms.choose_peers(config.getoption("--bench-compare"), forms.PLAIN, ())
        self.backends, _ = forms.choose_backends(None, self.device, self.dtype)
        self.folder = TemporaryDirectory()
        self.model = cache(lambda: fastden.Denoiser.from_pretrained("color").to(self.device).eval())
        self._made: tuple[Any, Job, dict[str, Contender]] | None = None

    def parameters(self, suite: str, training: bool) -> list[tuple[str, str]]:
        """Pairs of a part of the network, or the suite itself, and a contender."""
        backends, _ = forms.choose_backends(None, self.device, self.dtype, training)
        if suite == preparation.NAME:
            backends = tuple(name for name in backends if name in preparation.BACKENDS)
        own = ["fastden"] if suite == "batch" else [forms.own_name(name) for name in backends]
        parts = (operators.OPERATORS | gradients.OPERATORS).get(suite, (suite,))
        return [(part, name) for part in parts for name in (*own, *self.peers)]

    def job(self, suite: str, part: str, backward: bool) -> tuple[Job, dict[str, Contender]]:
        key = suite, part, backward
        if self._made is None or self._made[0] != key:
            self._made = None
            torch.compiler.reset()
            job, contenders = self._make(suite, part, backward)
            self._made = key, job, {contender.name: contender for contender in contenders}
        return self._made[1:]

    def _make(self, suite: str, part: str, backward: bool) -> tuple[Job, list[Contender]]:
        rest = (self.dtype, self.peers, self.backends)
        if suite in gradients.OPERATORS:
            return gradients.job(suite, part, self.size, 1, self.device, *rest)
        if suite == preparation.NAME:
            return preparation.job(self.size, 1, self.device, *rest)
        model = self.model()
        if suite == "model":
            return network.inference(model, self.size, 1, *rest, Path(self.folder.name))
        if suite == "train":
            return network.training(model, (self.size[0] // 8, self.size[1] // 8), 8, *rest)
        if suite == "batch":
            folder = Path(self.folder.name) / "batch"
            folder.mkdir()
            return files.folder_job(model, "color", self.size, 4, self.dtype, self.peers, folder)[:2]
        case = next(case for case in operators.cases(model, self.size, 1, [suite]) if case.part == part)
        if backward:
            return operators.backward(case, self.size, *rest)
        return operators.forward(case, model, self.size, *rest)


@pytest.fixture(scope="session")
def suite(request: pytest.FixtureRequest) -> Iterator[_Suite]:
    current = _Suite(request.config)
    with machine.steady_settings(current.device):
        yield current
    current.folder.cleanup()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "contender" in metafunc.fixturenames:
        suite = metafunc.module.SUITE
        training = suite == "train" or metafunc.function.__name__ == "test_backward"
        pairs = _Suite(metafunc.config).parameters(suite, training)
        metafunc.parametrize(("part", "contender"), pairs, ids=["-".join(pair) for pair in pairs])


@pytest.fixture
def measure(benchmark: Any, suite: _Suite, request: pytest.FixtureRequest) -> Callable[..., None]:
    """Judge a contender, then hand it to pytest-benchmark."""

    def run(part: str, contender: str, backward: bool = False) -> None:
        job, contenders = suite.job(request.module.SUITE, part, backward)
        settings = Settings(suite.device, suite.dtype, rounds=7)
        row: dict[str, Any] = {}
        call = ready(contenders[contender], job, settings, row, files.results if job.name == "batch" else tensors)
        assert row["right"], f"wrong result: errors {row['errors']}, accepted {job.bounds}"
        benchmark.group = job.name + (" backward" if backward else "")
        benchmark.extra_info |= {**row, "megapixels": job.pixels / 1e6, "flops": contenders[contender].flops}
        cuda = suite.device.type == "cuda"
        cold = torch.empty(1 << 28 if cuda else 0, dtype=torch.uint8, device=suite.device)

        def prepare() -> None:
            cold.zero_()
            if cuda:
                torch.cuda.synchronize()

        def timed() -> None:
            call()
            if cuda:
                torch.cuda.synchronize()

        benchmark.pedantic(timed, setup=prepare, rounds=settings.rounds)

    return run
