"""``fastden denoise`` with a video."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from fastden.cli.main import app
from tests.cli.run import fails, works
from tests.helpers import random_network
from tests.video.clips import copied, decoded, make_clip, make_video, streams

pytest.importorskip("av")


@pytest.fixture
def model(tmp_path: Path) -> str:
    random_network().save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


def test_command(tmp_path: Path, model: str) -> None:
    source = make_clip(tmp_path / "a.mp4", frames=3)

    def call(*arguments: Any) -> Any:
        return CliRunner().invoke(app, ["denoise", *map(str, arguments), "--model", model])

    done = call(source, "-o", tmp_path / "b.mp4", "--crf", 30)
    assert done.exit_code == 0, done.output
    assert f"{source} -> {tmp_path / 'b.mp4'}, 3 frames of 64 x 48, sigma " in done.stdout
    assert " (estimated)" in done.stdout
    assert call(source, "-o", tmp_path / "folder").exit_code == 0
    assert (tmp_path / "folder" / "a.mp4").stat().st_size > (tmp_path / "b.mp4").stat().st_size
    for arguments, message in {
        (source, tmp_path / "b.mp4", "-o", tmp_path / "c"): "with 1 more; accepted: a video alone, or images",
        (source, "-o", tmp_path / "c.mp4", "--format", "png"): "format: given with a video; accepted: with images",
        (source, "-o", tmp_path / "c.mp4", "--manifest", "m"): "manifest: given with a video; accepted: with images",
        (source, "-o", tmp_path / "c.mp4", "--max-megapixels", 0.003): "frames of 64 x 48 pixels; accepted: at most",
        (tmp_path / "a.png", "-o", tmp_path / "c.png", "--crf", 20): "crf: 20, but the input is no video",
        (tmp_path / "missing.mp4", "-o", tmp_path / "new" / "c.mp4"): "missing.mp4: cannot be read as a video: No such",
    }.items():
        failed = call(*arguments)
        assert failed.exit_code == 1
        assert message in failed.stderr
        assert len(failed.stderr.splitlines()) == 1
    assert not (tmp_path / "new").exists()


def test_a_pattern_that_names_a_video(tmp_path: Path, model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    make_clip(tmp_path / "long.mp4", frames=2)
    for pattern in ("lon?.mp4", "**/lon[g].mp4"):
        works("denoise", pattern, "-o", "q/", "--crf", 30, "--overwrite", "--model", model)  # q/long.mp4 is no input
        assert [path.name for path in (tmp_path / "q").iterdir()] == ["long.mp4"]
    make_clip(tmp_path / "[1].mp4", frames=2)
    works("denoise", "[1].mp4", "-o", "r/", "--model", model)  # a file of that name is no pattern
    (tmp_path / "folder.mp4").mkdir()
    options = ("-o", "s/", "--model", model)
    fails("denoise", "*.mp4", *options, saying=r"input: \[1\].mp4 with 1 more; accepted: a video alone, or images")
    fails("denoise", "lon?.mp4", "a.png", *options, saying=r"input: long.mp4 with 1 more; accepted: a video alone")
    fails("denoise", "none*.mp4", "--crf", 30, *options, saying=r"^error: input: nothing matches none\*.mp4$")
    fails("denoise", "lon?.mp4", "--engine", "ray", *options, saying="input: long.mp4 is a video, with --engine ray")
    assert not (tmp_path / "s").exists()


def test_other_suffixes_of_videos(tmp_path: Path, model: str) -> None:
    """Their message was that of images, and blamed the output."""
    source = tmp_path / "a.ts"
    copied(make_video(tmp_path / "b.mp4", frames=3, sound="aac"), source)
    works("denoise", source, "-o", tmp_path / "c.mp4", "--model", model)
    works("denoise", source, "-o", tmp_path / "out", "--model", model)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["a.mkv"]
    for made in (tmp_path / "c.mp4", tmp_path / "out" / "a.mkv"):
        assert len(decoded(made)) == 3
        assert len(streams(made, "audio")) == len(streams(source, "audio"))
    fails("denoise", source, "-o", tmp_path / "c.ts", "--model", model, saying=r"output: .*c\.ts; accepted suffixes")
    for name in ("a.bin", "a.png"):
        (tmp_path / name).write_bytes(b"x")
        options = ("-o", tmp_path / "d.mp4", "--model", model)
        fails(
            "denoise",
            tmp_path / name,
            *options,
            saying=rf"^error: input: .*{name} is no video, and the output .*d\.mp4 is",
        )
    nested = ("-o", tmp_path / "c.mp4" / "d.mp4", "--model", model)
    fails("denoise", source, *nested, saying=r"output: cannot make the folder .*c\.mp4: .*c\.mp4 is a file$")


def test_an_interrupted_command_says_so(tmp_path: Path, model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*arguments: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("fastden.cli.video.denoise_video", interrupt)
    arguments = ["denoise", str(tmp_path / "a.mp4"), "-o", str(tmp_path / "new" / "b.mp4"), "--model", model]
    done = CliRunner().invoke(app, arguments)
    assert (done.exit_code, done.stderr) == (130, "error: interrupted; nothing was written\n")
    assert not (tmp_path / "new").exists()


def test_a_command_out_of_memory_says_so(tmp_path: Path, model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: Any, **options: Any) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")

    monkeypatch.setattr("fastden.cli.video.denoise_video", full)
    arguments = ["denoise", str(tmp_path / "a.mp4"), "-o", str(tmp_path / "x" / "y" / "b.mp4"), "--model", model]
    done = CliRunner().invoke(app, arguments)
    assert (done.exit_code, done.stderr) == (1, "error: out of memory; a smaller --max-memory or --tile needs less\n")
    assert not (tmp_path / "x").exists()
