"""Searched configurations: found by steps, kept in a file, and read by the launches that asked for them."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from fastden.kernels import _conv, _tuned
from fastden.kernels._common import precision
from fastden.kernels._tiles import ConvConfig, config_for
from fastden.kernels.concat_conv_bn_relu import concat_conv_bn_relu
from fastden.kernels.conv_bn_relu import conv_bn_relu, conv_statistics
from tests.scripts import load


@pytest.fixture(autouse=True)
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The file of configurations: there is none at first."""
    monkeypatch.setenv(_tuned.ENVIRONMENT, str(tmp_path / "tuned.json"))
    _tuned._table.cache_clear()
    yield tmp_path / "tuned.json"
    _tuned._table.cache_clear()


@pytest.fixture(scope="module")
def tune(root: Path) -> Any:
    return load(root / "benchmarks" / "tune.py")


def inputs(device: str, pixels: int = 12) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    return torch.randn(1, 16, pixels, 1, device=device), torch.randn(16, 16, 3, 3, device=device) / 12


def here(device: str) -> str:
    return _tuned.capability(0 if device == "cuda" else None)


def trial_of() -> _tuned.Trial:
    current = _tuned._trial.get()
    assert current is not None
    return current


def asked(call: Callable[[], Any]) -> dict[_tuned.Request, Any]:
    with _tuned.trial() as trial:
        call()
    return trial.asked


def prefers(wanted: dict[str, int]) -> Callable[[Callable[[], Any]], float]:
    """A timer for which a setting costs more, the further it is from its value in ``wanted``."""

    def timer(call: Callable[[], Any]) -> float:
        config = next(iter(trial_of().configs.values()))
        return 1.0 + sum(abs(getattr(config, name) - value) for name, value in wanted.items())

    return timer


def test_a_launch_asks_by_what_is_compiled_in(device: str) -> None:
    x, weight = inputs(device)
    (request,) = asked(lambda: conv_bn_relu(x, weight, padding=1))
    assert request.kernel == "conv"
    assert request.pixels == 12
    assert "16+0 to 16, kernel 3, stride 1" in request.key
    assert request.key.endswith("float32")
    (other,) = asked(lambda: conv_statistics(x, None, weight, None, 1, 1, 1e-5))
    assert other.key != request.key
    wide = weight.repeat(1, 2, 1, 1)
    assert len({request, other, *asked(lambda: concat_conv_bn_relu(x, x, wide))}) == 3


def test_steps_find_what_is_faster(device: str, tune: Any) -> None:
    x, weight = inputs(device)

    def call() -> torch.Tensor:
        return conv_bn_relu(x, weight, padding=1)

    ((request, default),) = asked(call).items()
    timer = prefers({"block_m": 32, "stages": 1})
    config, times = tune.search(request, default, call, timer, time.monotonic() + 600)
    assert (config.block_m, config.stages) == (32, 1)
    assert times["ms"] == 1 < times["default_ms"]
    # Without time the search returns the default.
    assert tune.search(request, default, call, timer, time.monotonic() - 1)[0] == default


def test_what_is_wrong_or_fails_is_no_gain(device: str, tune: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight = inputs(device)

    def call() -> torch.Tensor:
        config = next(iter(trial_of().configs.values()), None)
        if config is not None and config.block_m < 64:
            raise RuntimeError("too small")
        y = conv_bn_relu(x, weight, padding=1)
        return y + 0.1 if config is not None and config.stages < 3 else y

    ((request, default),) = asked(lambda: conv_bn_relu(x, weight, padding=1)).items()
    config, _ = tune.search(request, default, call, prefers({"block_m": 16, "stages": 1}), time.monotonic() + 600)
    assert (config.block_m, config.stages) == (default.block_m, default.stages)


def test_launches_read_the_nearest_size(device: str, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[ConvConfig] = []
    original = _conv.second_block
    monkeypatch.setattr(_conv, "second_block", lambda others, config: taken.append(config) or original(others, config))
    x, weight = inputs(device)
    ((request, default),) = asked(lambda: conv_bn_relu(x, weight, padding=1)).items()
    expected = conv_bn_relu(x, weight, padding=1)
    small, large = (ConvConfig(size, 16, 16, warps=4, stages=2) for size in (16, 32))
    times = {"ms": 1.0, "default_ms": 2.0}
    _tuned._table.cache_clear()
    results = {request: (small, times), _tuned.Request("conv", request.key, 1000): (large, times)}
    _tuned.write(file, results, capability=here(device), gpu="none")
    for pixels, config in ((1, small), (12, small), (109, small), (120, large)):
        taken.clear()
        x, weight = inputs(device, pixels)
        found = conv_bn_relu(x, weight, padding=1)
        assert taken == [config]
        if pixels == 12:
            torch.testing.assert_close(found, expected)
    # Another launch uses its default.
    taken.clear()
    conv_bn_relu(x, weight, padding=1, stride=2)
    assert taken == [config_for(16, 16, 60, 4, precision(x))]
    assert json.loads(file.read_text())["gpu"] == "none"
    assert taken != [default] or default == config_for(16, 16, 60, 4, precision(x))


def test_tiles_of_another_kind_of_gpu_are_not_used(device: str, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.zeros(1, device=device)
    own, default = (ConvConfig(size, 16, 16, warps=4, stages=2) for size in (16, 32))
    results = {_tuned.Request("conv", "key float32", 12): (own, {})}
    for capability, config in (("1.0", default), (here(device), own)):
        _tuned.write(file, results, capability=capability)
        _tuned._table.cache_clear()
        assert _tuned.choose("conv", "key", 12, x, default) == config


def test_a_later_search_adds_to_the_file(device: str, file: Path) -> None:
    first, second = (ConvConfig(size, 16, 16, warps=4, stages=2) for size in (16, 32))
    small, large, other = (_tuned.Request(*of) for of in (("conv", "k", 12), ("conv", "k", 1000), ("head", "k", 12)))
    _tuned.write(file, {small: (first, {}), large: (first, {})}, capability="9.0")
    _tuned.write(file, {small: (second, {}), other: (first, {})}, capability="9.0")
    entries = json.loads(file.read_text())["entries"]
    assert {name: {row["pixels"]: row["config"]["block_m"] for row in rows} for name, rows in entries.items()} == {
        "conv k": {12: 32, 1000: 16},
        "head k": {12: 16},
    }
    assert sum(map(len, entries.values())) == 3
    # What other kernels or another GPU gave, and what is broken, is replaced.
    for text in (json.dumps(json.loads(file.read_text()) | {"kernels": "0"}), "{", "[]"):
        file.write_text(text)
        _tuned.write(file, {small: (first, {})}, capability="9.0")
        assert list(json.loads(file.read_text())["entries"]) == ["conv k"]
    _tuned.write(file, {other: (first, {})}, capability="8.0")
    assert list(json.loads(file.read_text())["entries"]) == ["head k"]


def test_a_file_of_other_kernels_is_refused(device: str, file: Path) -> None:
    x, weight = inputs(device)
    ((request, default),) = asked(lambda: conv_bn_relu(x, weight, padding=1)).items()
    _tuned.write(file, {request: (default, {})}, capability=here(device))
    document = json.loads(file.read_text())
    for text, message in (
        (json.dumps(document | {"kernels": "0"}), r"made with \{'kernels': '0'\}; accepted: .* Run benchmarks/tune.py"),
        ("{", "not JSON"),
    ):
        file.write_text(text)
        _tuned._table.cache_clear()
        with pytest.raises(ValueError, match=message):
            conv_bn_relu(x, weight, padding=1)
    row = {"pixels": 1, "config": {"block_q": 1}}
    file.write_text(json.dumps(document | {"entries": {f"conv {request.key}": [row]}}))
    _tuned._table.cache_clear()
    with pytest.raises(ValueError, match="block_q"):
        conv_bn_relu(x, weight, padding=1)


def test_the_search_writes_what_it_found(device: str, tune: Any, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def calls(network: Any) -> dict[str, Callable[[], torch.Tensor]]:
        x, weight = network.features(16), network.tensor(16, 16, 3, 3)
        return {str(stride): partial(conv_bn_relu, x, weight, stride=stride, padding=1) for stride in (1, 2)}

    monkeypatch.setattr(tune, "CALLS", {"conv_bn_relu": calls})
    kept: list[int] = []

    def keep(so_far: Any) -> None:
        kept.append(len(so_far))
        _tuned.write(file, so_far, capability=here(device))

    search = partial(tune.tune, ["conv_bn_relu"], ["fp32"], [(8, 6)], torch.device(device), prefers({"stages": 2}))
    found = search(time.monotonic() + 600, keep)
    assert kept == [1, 2] == list(range(1, len(found) + 1))
    assert {config.stages for config, _ in found.values()} == {2}
    assert sum(map(len, json.loads(file.read_text())["entries"].values())) == len(found)
    assert search(time.monotonic() - 1, keep) == {}


def test_float32_is_searched_with_and_without_tf32(tune: Any, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def calls(network: Any) -> dict[str, Callable[[], torch.Tensor]]:
        x = network.tensor(4)

        def call() -> torch.Tensor:
            key = f"tf32 {torch.backends.cudnn.allow_tf32}"
            _tuned.choose("conv", key, 4, x, ConvConfig(16, 16, 16, warps=4, stages=2))
            return x

        return {"call": call}

    monkeypatch.setattr(tune, "CALLS", {"conv_bn_relu": calls})
    monkeypatch.setattr(tune, "STEPS", {})
    options = ("--only", "conv_bn_relu", "--size", "8", "6", "--device", "cpu", "--dtypes", "tf32", "fp32")
    monkeypatch.setattr(sys, "argv", ["tune.py", *options])
    for before in (False, True):
        file.unlink(missing_ok=True)
        torch.backends.cudnn.allow_tf32 = before
        assert tune.main() == 0
        assert set(json.loads(file.read_text())["entries"]) == {"conv tf32 True float32", "conv tf32 False float32"}
        assert torch.backends.cudnn.allow_tf32 is before


@pytest.mark.parametrize("error", [PermissionError(13, "Permission denied"), NotADirectoryError(20, "Not a directory")])
def test_a_cache_that_cannot_be_read_is_none(device: str, monkeypatch: pytest.MonkeyPatch, error: OSError) -> None:
    """As another user with HOME=/root, and with HOME=/dev/null; one that FASTDEN_TUNED names is an error."""

    def refuse(path: Path, encoding: str) -> str:
        raise error

    x, weight = inputs(device)
    expected = conv_bn_relu(x, weight, padding=1)
    monkeypatch.setattr(Path, "read_text", refuse)
    _tuned._table.cache_clear()
    with pytest.raises(type(error)):
        conv_bn_relu(x, weight, padding=1)
    monkeypatch.delenv(_tuned.ENVIRONMENT)
    assert torch.equal(conv_bn_relu(x, weight, padding=1), expected)


def test_a_user_without_a_home(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a container that runs as a number of no user; then there is no file, and the defaults are used."""
    for name in (_tuned.ENVIRONMENT, "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("pwd.getpwuid", lambda number: {}[number])
    assert _tuned.path("9.0").parent.parts[-2:] == ("fastden", "tuned")
    assert _tuned._table(None) == {}


def test_the_default_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(_tuned.ENVIRONMENT)
    monkeypatch.setenv("XDG_CACHE_HOME", "cache")
    assert _tuned.path("9.0").parent == Path("cache/fastden/tuned")
    assert _tuned.digest() in _tuned.path("9.0").name
