"""Videos that are interrupted, damaged or without room: nothing half-written stays, and the process is as it was."""

from __future__ import annotations

import gc
import os
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from fastden.errors import UserError
from fastden.network.fused import FusedDenoiser
from fastden.video.copy import ESTIMATED
from fastden.video.frames import FrameConverter
from tests.video.clips import decoded, make_clip, make_sound_only, run

av = pytest.importorskip("av")


def test_damaged_files(tmp_path: Path, network: FusedDenoiser) -> None:
    source = make_clip(tmp_path / "a.mkv", frames=10, sound=False)
    data = bytearray(source.read_bytes())
    (tmp_path / "truncated.mkv").write_bytes(data[: len(data) * 6 // 10])
    result = run(tmp_path / "truncated.mkv", tmp_path / "b.mkv", network)
    assert 2 < result.frames < 10
    middle = len(data) // 2
    data[middle : middle + 600] = bytes(600)
    (tmp_path / "zeros.mkv").write_bytes(data)
    result = run(tmp_path / "zeros.mkv", tmp_path / "c.mkv", network)
    assert result.damaged > 0
    assert any("damaged packets or frames in the input" in note for note in result.notes)
    (tmp_path / "text.mp4").write_text("no video" * 100)
    with pytest.raises(UserError, match=r"text\.mp4: cannot be read as a video: Invalid data"):
        run(tmp_path / "text.mp4", tmp_path / "d.mp4", network)
    make_sound_only(tmp_path / "sound.mp4")
    with pytest.raises(UserError, match=r"sound\.mp4: no video stream"):
        run(tmp_path / "sound.mp4", tmp_path / "d.mp4", network)
    assert not any(path.name.startswith((".fastden", "d.")) for path in tmp_path.iterdir())


def test_an_interrupted_run_leaves_nothing(tmp_path: Path, network: FusedDenoiser) -> None:
    source = make_clip(tmp_path / "a.mp4", frames=3)

    def interrupt(done: int, total: int) -> None:
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(source, tmp_path / "b.mp4", network, progress=interrupt)
    assert [path.name for path in tmp_path.iterdir()] == ["a.mp4"]


def test_the_process_gets_its_settings_back(
    tmp_path: Path, network: FusedDenoiser, monkeypatch: pytest.MonkeyPatch
) -> None:
    """FFmpeg's level of logging and the environment, after an error too, and where two threads overlap."""
    source = make_clip(tmp_path / "a.mp4", frames=2)
    begun, may_end = threading.Barrier(2), threading.Event()
    seen: list[tuple[int | None, str | None]] = []

    def state(*_: int) -> tuple[int | None, str | None]:
        seen.append((av.logging.get_level(), os.environ.get("SVT_LOG")))
        return seen[-1]

    def first(done: int, total: int) -> None:
        if done == 1:
            begun.wait(60)

    def second(done: int, total: int) -> None:
        if done == 1:
            begun.wait(60)
            assert may_end.wait(60)
            assert state() == (av.logging.FATAL, "1")
            raise KeyboardInterrupt

    monkeypatch.delenv("SVT_LOG", raising=False)
    level = av.logging.get_level()
    try:
        av.logging.set_level(av.logging.ERROR)
        with ThreadPoolExecutor(2) as pool:
            videos = [
                pool.submit(run, source, tmp_path / f"{progress.__name__}.mp4", network, progress=progress)
                for progress in (first, second)
            ]
            assert videos[0].result().frames == 2
            may_end.set()
            with pytest.raises(KeyboardInterrupt):
                videos[1].result()
        assert state() == (av.logging.ERROR, None)
        monkeypatch.setenv("SVT_LOG", "3")
        run(source, tmp_path / "b.mp4", network, progress=state)
        assert seen[-1] == (av.logging.FATAL, "3")
        assert state() == (av.logging.ERROR, "3")
    finally:
        av.logging.set_level(level)


def test_a_file_that_appears_meanwhile_is_kept(tmp_path: Path, network: FusedDenoiser) -> None:
    source, target = make_clip(tmp_path / "a.mp4", frames=1), tmp_path / "b.mp4"
    with pytest.raises(UserError, match=r"b\.mp4: exists already"):
        run(source, target, network, progress=lambda done, total: target.write_bytes(b"mine"))
    assert target.read_bytes() == b"mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.mp4", "b.mp4"]


def test_targets(tmp_path: Path, network: FusedDenoiser) -> None:
    source = make_clip(tmp_path / "a.mp4", frames=1)
    before = source.read_bytes()
    with pytest.raises(UserError, match=r"a\.mp4: exists already"):
        run(source, source, network)
    with pytest.raises(UserError, match=r"is the input; accepted: another file"):
        run(source, source, network, overwrite=True)
    with pytest.raises(UserError, match=r"b\.png; accepted suffixes for a video: \.mp4"):
        run(source, tmp_path / "b.png", network)
    assert source.read_bytes() == before
    (tmp_path / "b.mp4").write_bytes(b"old")
    run(source, tmp_path / "b.mp4", network, overwrite=True)
    assert len(decoded(tmp_path / "b.mp4")) == 1


def test_memory_does_not_grow_with_the_length(tmp_path: Path, network: FusedDenoiser) -> None:
    """No more frames are alive at once in a long video than in a short one."""
    alive: list[int] = []
    frames: list[Any] = []
    original = FrameConverter.pixels

    def watched(self: Any, *arguments: Any) -> Any:
        array = original(self, *arguments)
        frames.append(weakref.ref(array))
        gc.collect(0)
        alive.append(sum(reference() is not None for reference in frames))
        return array

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FrameConverter, "pixels", watched)
        run(make_clip(tmp_path / "a.mp4", frames=20, sound=False), tmp_path / "b.mp4", network, "auto")
    assert len(alive) == 20 + ESTIMATED
    assert max(alive) <= ESTIMATED + 1
    assert max(alive[10 + ESTIMATED :]) <= 2
