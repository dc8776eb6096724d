"""``fastden denoise`` when something goes wrong: one line, an exit code, and nothing half-written."""

from __future__ import annotations

import errno
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from fastden.cli.console import clean_termination
from fastden.cli.main import app
from fastden.images.codec import read_image
from tests.cli.run import fails, outputs, works
from tests.image_files import bad_files, encoded, pixels, save_model


def test_bad_files_in_a_batch_are_reported_and_skipped(photos: Path, tmp_path: Path, model: str) -> None:
    bad = {name: data for name, data in bad_files().items() if not name.endswith(".gif")}
    for name, data in bad.items():
        (photos / name).write_bytes(data)
    output = tmp_path / "out"
    error = fails(
        "denoise", photos, "-o", output, "--model", model, saying=f"{len(bad)} of {len(bad) + 2} files failed"
    )
    assert outputs(output) == ["a.png", "b.jpg"]
    for name in bad:
        assert len(re.findall(rf"^error: {re.escape(str(photos / name))}: ", error, re.MULTILINE)) == 1, name
    assert len(error.splitlines()) == len(bad) + 1


def test_existing_outputs_are_kept_without_overwrite(photos: Path, tmp_path: Path, model: str) -> None:
    output = tmp_path / "out"
    output.mkdir()
    (output / "a.png").write_bytes(b"mine")
    fails(
        "denoise",
        photos,
        "-o",
        output,
        "--model",
        model,
        saying=r"a.png: exists already\n(.*\n)*error: 1 output exists already; accepted: --overwrite, which",
    )
    assert (output / "a.png").read_bytes() == b"mine"
    assert (output / "b.jpg").exists()
    works("denoise", photos, "-o", output, "--model", model, "--overwrite")
    assert read_image(output / "a.png").pixels.shape == (32, 40, 3)


@pytest.mark.parametrize("manifest", [[], ["--manifest", "record.jsonl"], ["--manifest", "none"]])
def test_a_second_run_over_a_folder_points_to_resume(
    photos: Path, tmp_path: Path, model: str, manifest: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once, at the end, where there is a record; and to --overwrite."""
    monkeypatch.chdir(tmp_path)
    output = tmp_path / "out"
    arguments = ["denoise", photos, "-o", output, "--model", model, *manifest]
    works(*arguments)
    said = [f"error: {output / name}: exists already" for name in ("a.png", "b.jpg")]
    resume = "--resume, which goes on with the earlier run; " if "none" not in manifest else ""
    end = f"error: 2 outputs exist already; accepted: {resume}--overwrite, which replaces them; another folder"
    failed = f"error: 2 of 2 files failed: {photos / 'a.png'}, {photos / 'b.jpg'}"
    assert fails(*arguments, saying="").splitlines() == [*said, failed, end]
    assert fails(*arguments, "--dry-run", saying="").splitlines() == [*said, end]
    works(*arguments, "--overwrite")
    if resume:
        works(*arguments, "--resume")


def test_what_cannot_be_written_is_not_computed(
    photos: Path, tmp_path: Path, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def computed(*arguments: Any, **options: Any) -> None:
        raise AssertionError("computed")

    monkeypatch.setattr("fastden.inference.run.denoise_tiled", computed)
    (tmp_path / "out.png").write_bytes(b"mine")
    fails("denoise", photos / "a.png", "-o", tmp_path / "out.png", "--model", model, saying="exists already")


def test_an_input_is_not_replaced_without_overwrite(photos: Path, model: str) -> None:
    path = photos / "a.png"
    before = path.read_bytes()
    fails("denoise", path, "-o", path, "--model", model, saying="exists already")
    assert path.read_bytes() == before
    works("denoise", path, "-o", path, "--model", model, "--overwrite")
    assert path.read_bytes() != before


def test_two_inputs_with_one_output(photos: Path, tmp_path: Path, model: str) -> None:
    (photos / "inner" / "a.png").write_bytes((photos / "a.png").read_bytes())
    (photos / "b.png").write_bytes((photos / "a.png").read_bytes())
    output = tmp_path / "out"
    fails(
        "denoise",
        photos / "a.png",
        photos / "inner" / "a.png",
        "-o",
        output,
        "--model",
        model,
        saying="would all be written to",
    )
    assert not output.exists()
    # The others are done, and the two are told apart from them at the end.
    rest = ["-o", output, "--format", "png", "--model", model]
    both = [photos / "b.jpg", photos / "b.png"]
    lines = [
        f"error: output: {one}, {other} would all be written to {output / 'b.png'}; accepted: different names"
        for one, other in (both, both[::-1])
    ]
    assert fails("denoise", photos, *rest, "--dry-run", saying="").splitlines() == lines
    assert not output.exists()
    end = f"error: 2 of 3 files failed: {both[0]}, {both[1]}"
    assert fails("denoise", photos, *rest, saying="").splitlines() == [*lines, end]
    assert outputs(output) == ["a.png"]


@pytest.mark.parametrize(
    ("name", "saying"),
    [
        ("missing.png", "missing.png does not exist; accepted: files, folders and glob patterns"),
        ("loop.png", "loop.png is a link that leads nowhere; accepted: files, folders and glob patterns"),
        ("*.tiff", "nothing matches *.tiff"),
        ("empty", "no images in empty; accepted suffixes: .jpg"),
        ("a" * 300, f"{'a' * 300}: {os.strerror(errno.ENAMETOOLONG)}"),
    ],
)
@pytest.mark.parametrize("others", [["a.png"], ["a.png", "inner/c.png"]])
def test_one_of_several_inputs_that_is_not_there_has_failed(
    photos: Path, tmp_path: Path, model: str, name: str, saying: str, others: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The others are done, it is named at the end, and the exit code is 1. Alone it ends the command at once."""
    monkeypatch.chdir(photos)
    Path("empty").mkdir()
    Path("loop.png").symlink_to("nowhere.png")
    rest = ["-o", tmp_path / "out", "--model", model]
    first, *more = fails("denoise", name, *others, *rest, "--dry-run", saying=re.escape(saying)).splitlines()
    assert more == []
    assert not (tmp_path / "out").exists()
    end = f"error: 1 of {len(others) + 1} files failed: {name}"
    assert fails("denoise", name, *others, *rest, saying="").splitlines() == [first, end]
    assert outputs(tmp_path / "out") == [Path(other).name for other in others]
    assert fails("denoise", name, *rest, saying="").splitlines() == [first]
    assert fails("denoise", name, "gone.png", *rest, saying="").splitlines() == [first]  # nothing is left to do


@pytest.mark.parametrize(
    ("arguments", "saying"),
    [
        (["missing.png", "-o", "out"], "input: missing.png does not exist"),
        (["missing/", "-o", "out"], "input: missing/ does not exist"),
        (["*.tiff", "-o", "out"], r"input: nothing matches \*\.tiff"),
        (["empty", "-o", "out"], "input: no images in empty"),
        (["a.bmp", "-o", "out"], "a.bmp: BMP is not read here; accepted: a copy as PNG"),
        (["a.bmp", "-o", "out", "--resume"], "a.bmp: BMP is not read here; accepted: a copy as PNG"),
        (["a.bmp", "-o", "out", "--dry-run"], "a.bmp: BMP is not read here; accepted: a copy as PNG"),
        (["a.gif", "-o", "out"], r"cannot write \.gif; accepted: \.jpg"),
        (["photos/a.png", "-o", "out.bmp"], r"cannot write \.bmp; accepted: \.jpg"),
        (["photos/a.png", "-o", "out.png", "--format", "jpeg"], "suffix says png, format says jpeg"),
        (["photos", "-o", "out.png"], "names a file; accepted for more than one input: a folder"),
        (["photos", "-o", "out.HEIC"], "names a file; accepted for more than one input: a folder"),
        (["photos", "-o", "photos/a.png"], "is a file; accepted for more than one input: a folder"),
        (["-", "-o", "out.png"], "input: -; accepted: .*standard input is not read"),
        (["", "-o", "out.png"], "input: ''; accepted: files"),
        (["photos/a.png", "-o", "-"], "output: -; accepted: .*standard output is not written"),
        (["photos", "-o", "", "--overwrite"], "output: ''; accepted: a file or a folder"),
        (["photos/a.png", "-o", "/dev/null"], "output: /dev/null is a file without an image's suffix; accepted: an im"),
        (["photos", "-o", "out", "--manifest", "/dev/null"], "manifest: /dev/null: exists and is not a regular file"),
        (["photos/a.png", "-o", "photos/a.png/out"], "output: cannot make the folder"),
        (["photos/a.png", "-o", "photos/a.png/out.png"], "output: cannot make the folder .*: photos/a.png is a file"),
        (["photos/a.png", "-o", "out.png", "--sigma", "-1"], "sigma: '-1'; accepted: auto, or a number from 0 to 255"),
        (["photos/a.png", "-o", "out.png", "--sigma", "nan"], "sigma: 'nan'"),
        (["photos/a.png", "-o", "out.png", "--sigma", "much"], "sigma: 'much'"),
        (["photos/a.png", "-o", "out.png", "--tile", "3.5"], "tile: '3.5'; accepted: auto, none, or a whole number of"),
        (["photos/a.png", "-o", "out.png", "--max-memory", "lots"], "max_memory: 'lots'"),
        (["photos/a.png", "-o", "out.png", "--strength", "3"], "strength: 3.0; accepted"),
        (["photos/a.png", "-o", "out.png", "--max-megapixels", "0.001"], "at most 0.001 megapixels"),
        (["five.tif", "-o", "out.tif"], "five.tif: 5 channels; accepted: 1 or 3"),
        (["nan.tif", "-o", "out.tif"], "nan.tif: .*NaN"),
    ],
)
def test_mistakes_are_one_line(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: str, arguments: list[str], saying: str
) -> None:
    import tifffile

    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    for kind in ("BMP", "GIF"):
        (tmp_path / f"a.{kind.lower()}").write_bytes(encoded(pixels(), kind))
    tifffile.imwrite(tmp_path / "five.tif", pixels(channels=5), photometric="rgb")
    tifffile.imwrite(tmp_path / "nan.tif", np.full((8, 8, 3), np.nan, np.float32), photometric="rgb")
    before = sorted(tmp_path.rglob("*"))
    error = fails("denoise", *arguments, "--model", model, saying=f"^error: .*({saying})")
    assert len(error.splitlines()) == 1, error
    after = [path for path in sorted(tmp_path.rglob("*")) if path not in before]
    assert [path for path in after if path.is_file()] == []


@pytest.mark.parametrize(
    ("arguments", "saying"),
    [
        (["--tile", "4"], "tile: 4; accepted: a whole number of at least 16"),
        (["--tile", "-1"], "tile: -1; accepted: a whole number of at least 16"),
        (["--tile", "none", "--max-memory", "1G"], "max_memory: given together with tile=None"),
        (["--tile", "64", "--max-memory", "1G"], "max_memory: given together with tile=64"),
        (["--max-memory", "1k"], r"max_memory: 1 KiB; accepted: at least \d\.\d+ MiB for"),
        (["--device", "abacus"], "device: 'abacus'; accepted: cpu"),
        (["--device", "meta"], "device: 'meta'; accepted: cpu"),
        (["--max-megapixels", "nan"], "max_megapixels: nan; accepted: a number above 0"),
        (["--max-megapixels", "inf"], "max_megapixels: inf; accepted"),
        (["--max-megapixels", "0"], "max_megapixels: 0; accepted"),
        (["--max-megapixels", "-3"], "max_megapixels: -3; accepted"),
        (["--strength", "5"], "strength: 5.*; accepted"),
        (["--sigma-map", "missing.png"], "sigma_map: .*missing.png: No such file"),
    ],
)
@pytest.mark.parametrize("engine", ["local", "ray"])
def test_what_concerns_all_files_is_said_once(
    photos: Path, tmp_path: Path, model: str, engine: str, arguments: list[str], saying: str
) -> None:
    if engine == "ray":
        pytest.importorskip("ray")
        if "--device" in arguments:
            pytest.skip("which devices there are, only the workers know")
        arguments = [*arguments, "--engine", "ray", "--manifest", "none"]
    _is_said_once([photos, "-o", tmp_path / "out", "--model", model, *arguments], saying)


@pytest.mark.parametrize("how", [[], ["--dry-run"]])
def test_a_strength_above_1_of_a_blind_model_is_said_once(
    photos: Path, tmp_path: Path, blind: str, how: list[str]
) -> None:
    arguments = [photos, "-o", tmp_path / "out", "--model", blind, "--strength", 1.5, *how]
    _is_said_once(arguments, r"strength: 1.5, but this model is blind")


def _is_said_once(arguments: list[Any], saying: str) -> None:
    """Check that ``fastden denoise`` fails in one line, and makes no folder for its outputs."""
    output = arguments[arguments.index("-o") + 1]
    error = fails("denoise", *arguments, saying=f"^error: {saying}")
    assert len(error.splitlines()) == 1, error
    assert not output.exists()


def test_ray_takes_no_videos(photos: Path, tmp_path: Path, model: str) -> None:
    arguments = [photos, "-o", tmp_path / "out", "--model", model, "--engine", "ray"]
    fails("denoise", *arguments, "--crf", "20", saying="^error: crf: 20 with --engine ray")
    clip = tmp_path / "clip.mp4"
    clip.touch()
    fails("denoise", clip, *arguments[1:], saying="^error: input: .*clip.mp4 is a video, with --engine ray; accepted")
    fails("denoise", *arguments[:-4], "--model", "nope", "--engine", "ray", saying="^error: model: 'nope'")


def test_what_the_system_refuses_is_one_line(
    photos: Path, tmp_path: Path, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = "a" * 300
    for arguments in (["denoise", long, "-o", tmp_path / "out"], ["denoise", photos, "-o", tmp_path / long]):
        error = fails(*arguments, "--model", model, saying=f"^error: .*{long}: {os.strerror(errno.ENAMETOOLONG)}$")
        assert len(error.splitlines()) == 1

    def unreadable(folder: Path) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(folder))

    # A folder without permissions would not do: root reads it.
    monkeypatch.setattr(Path, "iterdir", unreadable)
    for arguments in (["denoise", photos, "-o", tmp_path / "out"], ["eval", photos]):
        error = fails(*arguments, "--model", model, saying=f"^error: {photos}: {os.strerror(errno.EACCES)}$")
        assert len(error.splitlines()) == 1

    def exhausted(*arguments: Any, **options: Any) -> None:
        raise MemoryError

    monkeypatch.setattr("fastden.cli.local.plan", exhausted)
    fails("denoise", photos, "-o", tmp_path / "out", "--model", model, saying="^error: out of memory; a smaller")


def test_alpha_for_a_jpeg_is_not_computed(
    photos: Path, tmp_path: Path, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def computed(*arguments: Any, **options: Any) -> None:
        raise AssertionError("computed")

    monkeypatch.setattr("fastden.inference.run.denoise_tiled", computed)
    (photos / "a.png").write_bytes(encoded(pixels(channels=4), "PNG"))
    fails("denoise", photos / "a.png", "-o", tmp_path / "a.jpg", "--model", model, saying="a.png: JPEG has no alpha")


def test_failures_leave_no_empty_folders(photos: Path, tmp_path: Path, model: str) -> None:
    (photos / "inner" / "deep").mkdir()
    for name in ("inner/c.png", "inner/deep/d.png"):
        (photos / name).write_bytes(b"no image")
    (tmp_path / "mine").mkdir()
    for output in (tmp_path / "out", tmp_path / "mine"):
        fails("denoise", photos, "-r", "-o", output, "--model", model, saying="2 of 4 files failed")
        assert outputs(output) == ["a.png", "b.jpg"]
    (tmp_path / "empty").mkdir()
    fails("denoise", photos / "inner", "-r", "-o", tmp_path / "new" / "er", "--model", model, saying="2 of 2 files")
    fails("denoise", photos / "inner", "-r", "-o", tmp_path / "empty", "--model", model, saying="2 of 2 files failed")
    assert not (tmp_path / "new").exists()
    assert os.listdir(tmp_path / "empty") == []


def test_the_folder_of_an_output_file_is_made(photos: Path, tmp_path: Path, model: str) -> None:
    """As an output folder is; where the picture fails, it is removed again."""
    target = tmp_path / "new" / "er" / "x.png"
    rest = ["-o", target, "--model", model]
    works("denoise", photos / "a.png", *rest, "--dry-run")
    assert not (tmp_path / "new").exists()
    (photos / "bad.png").write_bytes(b"no image")
    fails("denoise", photos / "bad.png", *rest, saying="not an image")
    assert not (tmp_path / "new").exists()
    works("denoise", photos / "a.png", *rest)
    assert os.listdir(target.parent) == ["x.png"]


@pytest.mark.parametrize("command", ["denoise", "eval"])
def test_wrong_models_are_one_line(photos: Path, tmp_path: Path, command: str) -> None:
    broken = save_model(tmp_path / "broken")
    (broken / "model.safetensors").write_bytes(b"not weights")
    rest = ["-o", tmp_path / "out"] if command == "denoise" else []
    for name in ("no-such-model", broken, photos):
        error = fails(command, photos, *rest, "--model", name, saying="^error: model: ")
        assert len(error.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_a_full_disk_leaves_nothing(photos: Path, tmp_path: Path, model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    output = tmp_path / "out"
    error = fails("denoise", photos, "-o", output, "--model", model, saying="2 of 2 files failed")
    assert error.count(os.strerror(errno.ENOSPC)) == 2
    assert not output.exists()


def test_a_name_cannot_command_the_terminal(photos: Path, tmp_path: Path, model: str) -> None:
    name = "red\x1b[31m\nline.png"
    (photos / name).write_bytes((photos / "a.png").read_bytes())
    text = works("denoise", photos / name, "-o", tmp_path / "out", "--model", model)
    assert f"{photos}/red\\x1b[31m\\x0aline.png -> " in text
    assert "\x1b[31m" not in text


def test_highlights_that_a_format_cuts_off_are_noted(tmp_path: Path, model: str) -> None:
    import tifffile

    source = tmp_path / "hdr.tif"
    tifffile.imwrite(source, pixels(dtype=np.float32) * 4, photometric="rgb")
    for suffix, noted in ((".tif", False), (".png", True), (".jpg", True)):
        done = CliRunner().invoke(app, ["denoise", str(source), "-o", f"{tmp_path}/out{suffix}", "--model", model])
        assert done.exit_code == 0
        assert ("holds 0 to 1 and cuts off the rest (tiff keeps it)" in done.stderr) is noted


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_devices_are_not_replaced(photos: Path, tmp_path: Path, model: str) -> None:
    (tmp_path / "full.png").symlink_to("/dev/full")
    fails(
        "denoise",
        photos / "a.png",
        "-o",
        tmp_path / "full.png",
        "--overwrite",
        "--model",
        model,
        saying="not a regular file",
    )
    assert Path("/dev/full").is_char_device()


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGTERM to handle")
@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
def test_termination_leaves_no_half_written_file(photos: Path, tmp_path: Path, model: str, name: str) -> None:
    """The process is ended while it writes (a stand-in for fsync waits), and removes what it has begun."""
    code = (
        "import os, signal, sys, time\n"
        f"signal.signal(signal.{name}, signal.SIG_DFL)\n"  # where these tests run under nohup, too
        "from fastden.cli import main as cli\n"
        "def wait(number):\n"
        "    print('writing', flush=True)\n"
        "    time.sleep(60)\n"
        "os.fsync = wait\n"
        "cli.app(prog_name='fastden')\n"
    )
    root = Path(__file__).resolve().parents[2]
    output = tmp_path / "out"
    arguments = ["denoise", str(photos / "a.png"), "-o", str(output), "--model", model]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    running = subprocess.Popen(
        [sys.executable, "-c", code, *arguments], stdout=subprocess.PIPE, text=True, env=environment
    )
    try:
        assert running.stdout is not None
        assert running.stdout.readline() == "writing\n"
        assert len(list(output.iterdir())) == 1
        running.send_signal(getattr(signal, name))
        assert running.wait(timeout=120) == 128 + getattr(signal, name)
    finally:
        running.kill()
        running.wait()
        running.stdout.close()
    assert not output.exists()


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGHUP")
def test_under_nohup_a_closed_terminal_ends_nothing() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with clean_termination():
            assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        with clean_termination():
            assert callable(signal.getsignal(signal.SIGHUP))
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_DFL
    finally:
        signal.signal(signal.SIGHUP, before)


def test_out_of_memory_says_what_to_do(
    photos: Path, tmp_path: Path, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def exhausted(*arguments: Any, **options: Any) -> None:
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes.")

    monkeypatch.setattr("fastden.inference.run.denoise_tiled", exhausted)
    output = tmp_path / "out.png"
    fails("denoise", photos / "a.png", "-o", output, "--model", model, saying="out of memory; a smaller --max-memory")
    assert not output.exists()


def test_the_page_without_gradio(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastden.cli.ui.find_spec", lambda name: None)
    fails("ui", saying=r"error: ui: needs the package gradio; install: pip install 'fastden\[ui\]'")


def test_ctrl_c_ends_the_page_with_130(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("fastden.cli.ui.find_spec", lambda name: True)
    monkeypatch.setattr("fastden.ui.server.serve", interrupted)
    assert CliRunner().invoke(app, ["ui", "--no-browser"]).exit_code == 130


@pytest.mark.parametrize("megapixels", ["inf", "nan", "0", "1e-9"])
def test_limits_of_the_page_are_those_of_denoise(megapixels: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastden.cli.ui.find_spec", lambda name: True)
    saying = f"^error: max_megapixels: {float(megapixels):g}; accepted: a number above 0"
    fails("ui", "--max-megapixels", megapixels, saying=saying)
    fails("denoise", "a.png", "-o", "b.png", "--max-megapixels", megapixels, saying=saying)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGINT to send")
@pytest.mark.parametrize("moment", ["fastden.cli.early", "typer", "fastden.cli.main", "app"])
def test_an_interruption_before_the_command_begins_is_quiet(root: Path, moment: str) -> None:
    """Ctrl-C in the first half second meets imports, and typer's look at the commands."""
    code = (
        "import os, signal, sys, time, types\n"
        "moment = sys.argv[1]\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a shell may have it ignored
        "def interrupted(*arguments, **options):\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "    time.sleep(9)\n"
        "class Finder:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == moment:\n"
        "            interrupted()\n"
        "sys.meta_path.insert(0, Finder())\n"
        "if moment == 'app':\n"
        "    sys.modules['fastden.cli.main'] = types.SimpleNamespace(app=interrupted)\n"
        "from fastden.__main__ import main\n"
        "main()\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join((str(root), os.environ.get("PYTHONPATH", "")))}
    command = [sys.executable, "-c", code, moment]
    done = subprocess.run(command, check=False, capture_output=True, text=True, env=environment, timeout=60)
    assert (done.returncode, done.stderr, done.stdout) == (130, "", "")
