"""The Ray engine: rows of names, records back, the local engine's bytes."""

from __future__ import annotations

import logging
import shutil
import signal
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from fastden.batch import ray as ray_module
from fastden.batch.manifest import NAME, Record
from fastden.batch.plan import Job
from fastden.batch.ray import Pool, Row, Worker, choose_pool, connect, distribute, mark_absent, plan_rows
from fastden.cli.main import app
from fastden.errors import UserError
from fastden.images.codec import read_image
from fastden.images.finder import left_out_note
from tests.cli.run import fails, works
from tests.image_files import cannot_be_looked_at, save_model

pytest.importorskip("fsspec")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_model(tmp_path_factory.mktemp("model")))


@pytest.fixture
def photos(nested: Path) -> Path:
    return nested


@pytest.mark.parametrize("ended", [False, True])
def test_rays_settings_are_set_back(monkeypatch: pytest.MonkeyPatch, ended: bool) -> None:
    """Progress bars and the logger are the process's; a run that is not read to its end sets them back too."""
    context, logger = SimpleNamespace(enable_progress_bars=True), logging.getLogger("ray.data")
    record = Record("a.png", "b.png", "done", "now", {}, {}).as_json()
    rows = SimpleNamespace(iter_rows=lambda: iter([{"record": record}] * 2))
    data = SimpleNamespace(
        DataContext=SimpleNamespace(get_current=lambda: context),
        from_items=lambda *_, **options: SimpleNamespace(map=lambda *_, **options: rows),
        ActorPoolStrategy=lambda **options: None,
    )
    monkeypatch.setattr(ray_module, "_ray", lambda: SimpleNamespace(data=data))
    traces = logging.getLogger("ray.data.exceptions")
    level = logger.level
    records = distribute([{"input": "a.png", "output": "b.png"}], {}, Pool(1, 0, 1))
    assert next(records).output == "b.png"
    assert (context.enable_progress_bars, logger.level) == (False, logging.ERROR)
    assert traces.level == logging.CRITICAL
    if ended:
        assert len(list(records)) == 1
    else:
        records.close()
    assert (context.enable_progress_bars, logger.level) == (True, level)
    assert traces.level == logging.NOTSET


def record_of(worker: Worker, source: Any, target: Any) -> Record:
    return Record.from_json(worker({"input": str(source), "output": str(target)})["record"])


def test_files_that_are_left_out_are_counted(
    memory: Any, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the local engine does, behind URLs too."""
    monkeypatch.setattr("fastden.images.formats.is_installed", lambda kind: False)
    (photos / "x.NEF").write_bytes(b"")
    (photos / "x.exr").write_bytes(b"")
    left_out: list[Path] = []
    rows = plan_rows([str(photos)], str(tmp_path / "out"), left_out=left_out)
    assert [path.name for path in left_out] == ["x.NEF", "x.exr"]
    with memory.open("/in/y.heic", "wb") as file:
        file.write(b"")
    shutil.copy(photos / "a.png", tmp_path / "a.png")
    memory.put(str(tmp_path / "a.png"), "/in/a.png")
    behind: list[Path] = []
    assert len(plan_rows(["memory://in"], "memory://out", left_out=behind)) == 1
    assert [path.name for path in behind] == ["y.heic"]
    monkeypatch.setattr("fastden.cli.cluster.connect", lambda *_: Pool(1, 0, 1))
    monkeypatch.setattr("fastden.cli.cluster.distribute", lambda *_: iter(()))
    command = ["denoise", str(photos), "-o", str(tmp_path / "out"), "--engine", "ray", "--sigma", "5"]
    told = CliRunner().invoke(app, command).stderr
    assert f"note: {left_out_note(left_out)}" in told
    assert len(rows) == 2


def test_a_worker(photos: Path, tmp_path: Path, memory: Any, model: str) -> None:
    """Paths, URLs in and out, and failures, each with its record."""
    works("denoise", photos / "b.jpg", "-o", tmp_path / "expected.jpg", "--model", model)
    expected = (tmp_path / "expected.jpg").read_bytes()
    worker = Worker({"model": model}, 1)
    record = record_of(worker, photos / "b.jpg", tmp_path / "new" / "b.jpg")
    assert (record.status, record.error) == ("done", None)
    assert (record.width, record.height) == (40, 32)
    assert set(record.seconds) == {"read", "compute", "write"}
    assert (tmp_path / "new" / "b.jpg").read_bytes() == expected
    memory.pipe("/in/b.jpg", (photos / "b.jpg").read_bytes())
    record = record_of(worker, "memory://in/b.jpg", "memory://out/deep/b.jpg")
    assert (record.status, record.input) == ("done", "memory://in/b.jpg")
    assert memory.cat("/out/deep/b.jpg") == expected
    again = record_of(worker, "memory://in/b.jpg", "memory://out/deep/b.jpg")
    assert again.status == "failed"
    assert "exists already" in again.error
    missing = record_of(worker, "memory://in/missing.jpg", "memory://out/missing.jpg")
    assert missing.status == "failed"
    memory.pipe("/in/text.png", b"no image")
    bad = record_of(worker, "memory://in/text.png", tmp_path / "text.png")
    assert bad.status == "failed"
    assert bad.error.startswith("memory://in/text.png: ")  # not the copy, which is gone
    assert "fastden-" not in bad.error
    other = record_of(worker, "memory://in/b.jpg", "memory://out/b.bmp")
    assert other.error.startswith("memory://out/b.bmp: cannot write .bmp")
    assert memory.find("/out") == ["/out/deep/b.jpg"]
    assert not (tmp_path / "text.png").exists()


def test_pools() -> None:
    machine = {"CPU": 16.0, "GPU": 2.0, "node:10.0.0.1": 1.0, "node:__internal_head__": 1.0}
    assert choose_pool(machine, None, 1, None) == Pool(2, 1, 8)
    assert choose_pool(machine, None, 4, None) == Pool(8, 0.25, 2)
    assert choose_pool(machine, 3, 1, None) == Pool(3, 1, 5)
    assert choose_pool(machine, None, 1, "cpu") == Pool(1, 0, 16)
    assert choose_pool({"CPU": 8.0, "node:a": 1.0, "node:b": 1.0}, None, 1, None) == Pool(2, 0, 4)
    assert choose_pool({"CPU": 2.0, "node:a": 1.0}, 4, 1, None) == Pool(4, 0, 1)
    with pytest.raises(UserError, match=r"workers: 0; accepted: 1 or more"):
        choose_pool(machine, 0, 1, None)
    assert choose_pool(machine, None, 1, "cuda") == Pool(2, 1, 8)
    for device in ("cuda", "cuda:1"):
        with pytest.raises(UserError, match=f"device: {device}, but the Ray cluster has no GPU; accepted: cpu"):
            choose_pool({"CPU": 8.0, "node:a": 1.0}, None, 1, device)


def test_a_worker_that_cannot_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its calls say why. An error of the actor's own would be repeated by Ray, with 300 lines."""
    row = Worker({"model": str(tmp_path / "none")}, 1)({"input": "a.png", "output": "b.png"})
    assert row["record"] == ""
    assert row["broken"].startswith(f"model: '{tmp_path / 'none'}', no folder that exists; accepted:")
    data = SimpleNamespace(
        DataContext=SimpleNamespace(get_current=lambda: SimpleNamespace(enable_progress_bars=True)),
        from_items=lambda *_, **options: SimpleNamespace(
            map=lambda *_, **options: SimpleNamespace(iter_rows=lambda: iter([row]))
        ),
        ActorPoolStrategy=lambda **options: None,
    )
    monkeypatch.setattr(ray_module, "_ray", lambda: SimpleNamespace(data=data))
    with pytest.raises(UserError, match="engine: ray, but a worker cannot start: model: "):
        next(distribute([{"input": "a.png", "output": "b.png"}], {}, Pool(1, 0, 1)))


def test_errors_of_rays_own(photos: Path, tmp_path: Path, model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One line, the last of the cause; a defect of fastden keeps its trace."""

    class RayError(Exception):
        """As ``ray.exceptions.RayError``."""

    class RayTaskError(RayError):
        """As ``ray.exceptions.RayTaskError``."""

    def dying(*_: Any) -> Iterator[Record]:
        raise RayError("\x1b[36mray::Map\x1b[39m died\n  File x\n\x1b[31mOutOfMemoryError: 3 GB\x1b[0m\n\n")
        yield

    monkeypatch.setitem(sys.modules, "ray.exceptions", SimpleNamespace(RayError=RayError, RayTaskError=RayTaskError))
    monkeypatch.setattr("fastden.cli.cluster.connect", lambda *_: Pool(1, 0, 1))
    monkeypatch.setattr("fastden.cli.cluster.distribute", dying)
    command = ["denoise", photos, "-o", tmp_path / "out", "--model", model, "--sigma", 20, "--engine", "ray"]
    errors = fails(*command, saying="^error: engine: ray stopped: OutOfMemoryError: 3 GB$")
    assert len(errors.splitlines()) == 1

    def defective(*_: Any) -> Iterator[Record]:
        raise KeyError("x")
        yield

    monkeypatch.setattr("fastden.cli.cluster.distribute", defective)
    assert isinstance(CliRunner().invoke(app, list(map(str, command))).exception, KeyError)
    assert ray_module.told_by_ray(KeyError("x")) == ""
    assert ray_module.told_by_ray(RayError()) == "RayError"


def test_termination_and_the_note_about_sigma(
    photos: Path, tmp_path: Path, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As of the local engine. Ray's start sets a handler of its own, which ends the process in a crash."""
    before = signal.getsignal(signal.SIGTERM)

    def starts(*_: Any) -> Pool:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        return Pool(1, 0, 1)

    def terminated(*_: Any) -> Iterator[Record]:
        signal.raise_signal(signal.SIGTERM)
        yield from ()

    monkeypatch.setattr("fastden.cli.cluster.connect", starts)
    monkeypatch.setattr("fastden.cli.cluster.distribute", terminated)
    command = ["denoise", photos, "-o", tmp_path / "out", "--model", model, "--sigma", 0.1, "--engine", "ray"]
    try:
        fails(*command, saying="^note: sigma 0.1: on the scale 0-255", code=143)
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_defect_in_a_worker_keeps_its_trace() -> None:
    """Ray Data 2.60 gives a KeyError as RayTaskError(UserCodeException), and told of it its own advice on retries."""
    exceptions = pytest.importorskip("ray.exceptions", reason="ray is not installed")

    def told(cause: Exception) -> str:
        trace = f"Traceback (most recent call last):\n{type(cause).__name__}: {cause}"
        error = exceptions.RayTaskError("submit", trace, cause, "ray::submit", 1, "127.0.0.1")
        assert ray_module.told_by_ray(error) == ray_module.told_by_ray(error.as_instanceof_cause())
        return ray_module.told_by_ray(error)

    assert told(KeyError("x")) == ""
    assert told(getattr(exceptions, "UserCodeException", ValueError)("UDF failed")) == ""
    assert told(exceptions.OutOfMemoryError("3 GB")) == "OutOfMemoryError: 3 GB"


@pytest.mark.slow
def test_same_bytes_as_the_local_engine(photos: Path, tmp_path: Path, model: str) -> None:
    ray = pytest.importorskip("ray", reason="ray is not installed")
    pytest.importorskip("ray.data", reason="ray[data] is not installed")
    (photos / "bad.png").write_bytes(b"no image")
    options = ["--model", model, "--sigma", 20, "--recursive"]
    fails("denoise", photos, "-o", tmp_path / "local", *options, saying="1 of 4 files failed")
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=100 << 20)
    try:
        errors = fails(
            "denoise",
            photos,
            "-o",
            tmp_path / "ray",
            *options,
            "--engine",
            "ray",
            "--workers",
            2,
            saying="1 of 4 files",
        )
    finally:
        ray.shutdown()
    assert f"{photos / 'bad.png'}" in errors
    names = [str(path.relative_to(tmp_path / "local")) for path in (tmp_path / "local").rglob("[!.]*.*")]
    assert sorted(names) == ["a.png", "b.jpg", "inner/c.tif"]
    for name in names:
        assert (tmp_path / "local" / name).read_bytes() == (tmp_path / "ray" / name).read_bytes()


def test_resume(photos: Path, tmp_path: Path, model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files on record as done are left out, in a worker's file of a killed run too; others and changed ones stay."""
    asked: list[Row] = []

    def here(rows: list[Row], settings: dict[str, Any], pool: Pool, manifest: str | None) -> Iterator[Record]:
        worker = Worker(settings, pool.cpus, manifest)
        for row in rows:
            asked.append(row)
            yield Record.from_json(worker(row)["record"])

    monkeypatch.setattr("fastden.cli.cluster.connect", lambda *_: Pool(1, 0, 1))
    monkeypatch.setattr("fastden.cli.cluster.distribute", here)
    out = tmp_path / "out"
    options = ["--model", model, "--sigma", 20, "-r", "--engine", "ray"]
    works("denoise", photos, "-o", out, *options)
    expected = {path: path.read_bytes() for path in out.rglob("[!.]*.*")}
    assert len(expected) == len(asked) == 3
    manifest = out / NAME
    lines = manifest.read_text().splitlines(keepends=True)
    manifest.write_text("".join(line for line in lines if "b.jpg" not in line))
    (began,) = (line.replace('"status": "done"', '"status": "writing"') for line in lines if "b.jpg" in line)
    (out / f"{NAME}.0123456789abcdef").write_text(began)
    (out / "inner" / "c.tif").write_bytes(b"another")
    asked.clear()
    fails(
        "denoise", photos, "-o", out, *options, "--resume", saying=r"c\.tif: changed since fastden wrote it; accepted"
    )
    assert (out / "inner" / "c.tif").read_bytes() == b"another"
    assert asked == []
    text = works("denoise", photos, "-o", out, *options, "--resume", "--overwrite")
    assert "2 images done before" in text
    assert [Path(row["input"]).name for row in asked] == ["c.tif"]
    assert {path: path.read_bytes() for path in out.rglob("[!.]*.*")} == expected
    asked.clear()
    works("denoise", photos, "-o", out, *options, "--resume")
    assert asked == []
    manifest.unlink()
    fails("denoise", photos, "-o", out, *options, "--resume", saying="exists already")
    assert {path: path.read_bytes() for path in out.rglob("[!.]*.*")} == expected
    for place in (photos, f"file://{photos}"):
        fails(
            "denoise", photos, "-o", place, *options, "--overwrite", saying="is the input; accepted with --engine ray"
        )
    fails("denoise", photos, "-o", "memory://out", *options, "--resume", saying="resume: there is no manifest")


@pytest.mark.parametrize("output", ["out", "memory://out"])
def test_a_row_that_ray_repeats(
    photos: Path, tmp_path: Path, memory: Any, model: str, monkeypatch: pytest.MonkeyPatch, output: str
) -> None:
    """A worker dies behind the naming of its output, and Ray gives the row to another one. What was there is kept."""

    def repeating(rows: list[Row], settings: dict[str, Any], pool: Pool, manifest: str | None) -> Iterator[Record]:
        worker = Worker(settings, pool.cpus, manifest)
        for row in rows:
            worker(row)
            yield Record.from_json(worker(row)["record"])

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("fastden.cli.cluster.connect", lambda *_: Pool(1, 0, 1))
    monkeypatch.setattr("fastden.cli.cluster.distribute", repeating)
    command = ["denoise", photos, "-o", output, "--model", model, "--sigma", 20, "--engine", "ray"]
    works(*command)
    assert "2 of 2 files failed" in fails(*command, saying="exists already")


def test_a_folder_that_cannot_be_made(
    photos: Path, tmp_path: Path, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def here(rows: list[Row], settings: dict[str, Any], pool: Pool, manifest: str | None) -> Iterator[Record]:
        return (Record.from_json(Worker(settings, pool.cpus, manifest)(row)["record"]) for row in rows)

    monkeypatch.setattr("fastden.cli.cluster.connect", lambda *_: Pool(1, 0, 1))
    monkeypatch.setattr("fastden.cli.cluster.distribute", here)
    out = tmp_path / "out"
    out.mkdir()
    (out / "inner").write_bytes(b"a file")
    command = ["denoise", photos, "-o", out, "-r", "--model", model, "--sigma", 20, "--engine", "ray"]
    assert "1 of 3 files failed" in fails(*command, saying=f"cannot make the folder {out / 'inner'}")
    assert sorted(path.name for path in out.glob("[!.]*")) == ["a.png", "b.jpg", "inner"]


def test_mistakes(photos: Path, tmp_path: Path, model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fails(
        "denoise",
        photos,
        "-o",
        tmp_path / "out",
        "--model",
        model,
        "--workers",
        2,
        saying="accepted: with --engine ray",
    )
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UserError, match=r"install: pip install 'fastden\[ray\]'"):
        connect(None, 1, None)


def test_a_file_appears_whole_behind_a_url(memory: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.png").write_bytes(b"whole")

    def breaks(local: Any, remote: Any, size: int) -> None:
        remote.write(b"ha")
        raise OSError("connection lost")

    monkeypatch.setattr(ray_module.shutil, "copyfileobj", breaks)
    with pytest.raises(OSError, match="connection lost"):
        ray_module._send(tmp_path / "a.png", "memory://out/a.png")
    assert memory.find("/out") == []
    monkeypatch.undo()
    ray_module._send(tmp_path / "a.png", "memory://out/a.png")
    assert memory.cat("/out/a.png") == b"whole"


@pytest.fixture
def worker(model: str) -> Worker:
    return Worker({"model": model, "dtype": "float32"}, 1)


def copies(photos: Path, count: int) -> list[Path]:
    """Files of the same picture."""
    paths = [photos / f"{index}.png" for index in range(count)]
    for path in paths:
        shutil.copy(photos / "a.png", path)
    return paths


def side_by_side(worker: Worker, sources: list[Path], output: Path) -> list[Record]:
    """Give a worker a thread for each file, up to three."""
    output.mkdir()
    with ThreadPoolExecutor(3) as threads:
        return list(threads.map(lambda source: record_of(worker, source, output / source.name), sources))


def test_a_worker_reads_while_it_computes(
    photos: Path, tmp_path: Path, worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Called from several threads, it reads files side by side; one thread computes, within the memory for images."""
    stages = worker.denoiser.stages
    read, compute = stages.reading.read, stages.computing.compute
    computing, computers, held = threading.Event(), set(), []
    reading_beside = threading.Event()

    def slow(works: list[Any], *rest: Any) -> None:
        computers.add(threading.current_thread().name)
        computing.set()
        assert reading_beside.wait(20), "no file was read while another was computed"
        held.append(worker.denoiser._gate.taken)
        compute(works, *rest)

    def beside(work: Any) -> None:
        if not work.job.source.name.startswith("0"):
            assert computing.wait(20)
            reading_beside.set()
        read(work)

    monkeypatch.setattr(stages.computing, "compute", slow)
    monkeypatch.setattr(stages.reading, "read", beside)
    sources, output = copies(photos, 5), tmp_path / "out"
    records = side_by_side(worker, sources, output)
    assert [record.status for record in records] == ["done"] * 5, records
    assert len(computers) == 1
    assert held[0] >= 2 * stages.reading.look(Job(sources[0], output / "0.png")).size
    assert worker.denoiser._gate.taken == 0
    assert len({path.read_bytes() for path in output.iterdir()}) == 1


def test_a_worker_within_its_memory(
    photos: Path, tmp_path: Path, worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No image is admitted beside one that fills the memory for images; a failed image gives its memory back."""
    computing, held = worker.denoiser.stages.computing, []
    compute = computing.compute

    def noting(works: list[Any], *rest: Any) -> None:
        held.append(worker.denoiser._gate.taken)
        compute(works, *rest)

    monkeypatch.setattr(computing, "compute", noting)
    worker.denoiser._gate.limit = 1
    first, last = copies(photos, 2)
    broken = photos / "broken.png"
    broken.write_bytes((photos / "a.png").read_bytes()[:200])
    records = side_by_side(worker, [first, broken, last], tmp_path / "out")
    assert [record.status for record in records] == ["done", "failed", "done"]
    assert held == [1, 1]
    assert worker.denoiser._gate.taken == 0


def test_a_worker_that_streams(photos: Path, tmp_path: Path, worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    """The thread that computes also reads and writes streamed images; the results are those from memory."""
    stages, streamers = worker.denoiser.stages, set()
    sources = copies(photos, 2)
    side_by_side(worker, sources, tmp_path / "whole")
    look, stream = stages.reading.look, stages.stream

    def watched(work: Any, *rest: Any) -> Any:
        streamers.add(threading.current_thread())
        return stream(work, *rest)

    monkeypatch.setattr(stages.reading, "look", lambda job: replace(look(job), streamed=True))
    monkeypatch.setattr(stages, "stream", watched)
    records = side_by_side(worker, sources, tmp_path / "streamed")
    assert [record.status for record in records] == ["done", "done"]
    assert all(record.streamed for record in records)
    assert streamers == {worker.computer.submit(threading.current_thread).result()}
    for name in ("0.png", "1.png"):
        pair = (read_image(tmp_path / folder / name).pixels for folder in ("whole", "streamed"))
        assert np.array_equal(*pair)
    assert worker.denoiser._gate.taken == 0


def test_what_cannot_be_looked_at_is_not_replaced(memory: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    row = {"input": "a.png", "output": "memory://out/a.png"}
    assert mark_absent([row], "memory://out") == [{**row, "absent": "yes"}]

    def refused(*_: Any, **__: Any) -> Any:
        raise ValueError("no listing")

    monkeypatch.setattr(type(memory), "find", refused)
    assert mark_absent([row], "memory://out") == [row]
    here = {"input": "a.png", "output": str(tmp_path / "b.png")}
    assert mark_absent([here], str(tmp_path)) == [{**here, "absent": "yes"}]
    cannot_be_looked_at(tmp_path / "b.png", monkeypatch)
    assert mark_absent([here], str(tmp_path)) == [here]
