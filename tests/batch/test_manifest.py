"""The record of a run, and what is left out when it is resumed."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import fastden
from fastden.batch.dry_run import rehearse
from fastden.batch.manifest import NAME, Manifest
from fastden.batch.plan import Job
from fastden.batch.report import Listener
from fastden.errors import UserError
from fastden.images.kinds import known_formats
from fastden.network import int8
from fastden.whole_files import digest
from tests.helpers import streaming
from tests.image_files import encoded, pixels, save_model


def names(report: Any) -> list[str]:
    return sorted(Path(record.output).name for record in report.done)


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("written", [False, True])
def test_a_file_that_a_worker_never_wrote_is_not_the_runs(tmp_path: Path, written: bool) -> None:
    """Without a checksum, as earlier versions recorded what was to begin, what lies there may be someone else's."""
    job = Job(tmp_path / "a.png", tmp_path / "b.png")
    common = {"input": str(job.source), "output": "b.png", "model": {}}
    records = [
        {**common, "status": "writing"} | ({"output_sha256": "0"} if written else {}),
        common | {"status": "failed"},
    ]
    (tmp_path / NAME).write_text("".join(json.dumps(record) + "\n" for record in records))
    assert Manifest(tmp_path / NAME).knows(job) is written


def test_what_is_on_record(photos: Path, tmp_path: Path, network: Any) -> None:
    (photos / "bad.png").write_bytes(b"no image")
    batch = fastden.BatchDenoiser(network, sigma=12.5, strength=0.5)
    batch.run(photos, tmp_path / "out", format="png")
    records = lines(tmp_path / "out" / NAME)
    by_name = {record["output"]: record for record in records}
    assert sorted(by_name) == ["0.png", "1.png", "2.png", "3.png", "bad.png", "wide.png"]
    wide = by_name["wide.png"]
    source = photos / "wide.jpg"
    assert wide["input"] == str(source)
    assert (wide["status"], wide["sigma"], wide["sigma_source"]) == ("done", 12.5, "given")
    assert (wide["input_size"], wide["input_mtime_ns"]) == (source.stat().st_size, source.stat().st_mtime_ns)
    assert wide["output_sha256"] == digest(tmp_path / "out" / "wide.png")
    assert wide["output_size"] == (tmp_path / "out" / "wide.png").stat().st_size
    assert (wide["width"], wide["height"]) == (61, 24)
    assert set(wide["seconds"]) == {"read", "compute", "write"}
    assert wide["options"] == {
        "sigma": 12.5,
        "sigma_map": None,
        "strength": 0.5,
        "chroma": None,
        "quality": "normal",
        "model_by_noise": False,
        "dtype": "auto",
        "format": "png",
        "strip_metadata": False,
    }
    assert wide["noise"] is None
    assert wide["model"] == {"name": "Blend", "sha256": batch.settings.weights()["sha256"]}
    assert len(wide["model"]["sha256"]) == 64
    assert by_name["bad.png"]["status"] == "failed"
    formats = ", ".join(known_formats())
    assert by_name["bad.png"]["error"] == f"{photos / 'bad.png'}: not an image in a known format; accepted: {formats}"
    assert [record["status"] for record in records if record["output"] == "0.png"] == ["writing", "done"]


#: Results that their user has edited.
CHANGED = ("1.png", "2.png")


def test_resume_does_what_is_not_done_or_has_changed(photos: Path, tmp_path: Path, network: Any) -> None:
    output = tmp_path / "out"

    def again(**options: Any) -> Any:
        return fastden.BatchDenoiser(network, **{"sigma": 5, **options}).run(photos, output, resume=True)

    assert len(again().done) == 5
    report = again()
    assert (report.done, report.failed, len(report.skipped)) == ([], [], 5)
    (output / "0.png").unlink()
    with (output / "1.png").open("ab") as file:
        file.write(b"more")
    edited = bytearray((output / "2.png").read_bytes())
    edited[-1] ^= 1
    (output / "2.png").write_bytes(edited)
    os.utime(photos / "3.png", ns=(1, 1))
    for options, redone in (({}, ["0.png", "3.png"]), ({"strength": 0.5}, ["0.png", "3.png", "wide.jpg"])):
        report = again(**options)
        assert names(report) == redone
        ending = "changed since fastden wrote it; accepted: another name, or overwrite (--overwrite)"
        assert sorted(record.error for record in report.failed) == [f"{output / name}: {ending}" for name in CHANGED]
        assert (output / "2.png").read_bytes() == edited
    assert names(again(overwrite=True)) == ["0.png", "1.png", "2.png", "3.png", "wide.jpg"]
    assert names(again(strength=0.5)) == ["0.png", "1.png", "2.png", "3.png", "wide.jpg"]
    assert again(strength=0.5, tile=64).done == [], "tiles do not change the result"
    assert len(again().done) == 5


def test_other_weights_are_another_model(photos: Path, tmp_path: Path) -> None:
    model = save_model(tmp_path / "model")
    for changed in (False, True):
        if changed:
            other = save_model(tmp_path / "other", noise_level_input=False)
            for file in other.iterdir():
                (model / file.name).write_bytes(file.read_bytes())
        report = fastden.BatchDenoiser(str(model)).run(photos / "0.png", tmp_path / "out", resume=True)
        assert len(report.done) == 1, report.failed
    assert report.done[0].sigma_source == "blind"


@pytest.mark.parametrize("in_memory", [False, True])
def test_another_calibration_is_another_result(tmp_path: Path, in_memory: bool) -> None:
    """On a cluster too, whose driver computes in more bits and wishes for the workers' quality."""
    job, folder = Job(tmp_path / "a.png", tmp_path / "b.png"), save_model(tmp_path / "model")

    def options(quality: Any) -> dict[str, Any]:
        model = fastden.Denoiser.from_pretrained(folder) if in_memory else str(folder)
        settings = fastden.BatchDenoiser(model, sigma=5).settings
        settings.wishes = replace(settings.wishes, quality=quality)
        return settings.options(job)

    plain = options("normal")
    assert "ranges" not in plain
    seen = []
    for level in (0.1, 0.1, 0.2):
        int8.save_ranges(folder, {"level": torch.tensor([level])}, "0")
        seen.append(options("fast")["ranges"])
        assert options("normal") == plain
    assert seen[0] == seen[1] != seen[2]


@pytest.mark.skipif(bool(int8.why_not()), reason="; ".join(int8.why_not()) or "runs")
def test_resume_in_8_bits_after_another_calibration(photos: Path, tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model")
    model = fastden.Denoiser.from_pretrained(folder)

    def again(model: Any) -> list[int]:
        batch = fastden.BatchDenoiser(model, sigma=5, quality="fast")
        report = batch.run(photos, tmp_path / "out", resume=True)
        return [len(report.done), len(report.skipped)]

    for largest, done in ((4.0, [5, 0]), (4.0, [0, 5]), (5.0, [5, 0])):
        ranges = {name: torch.full((channels,), largest) for name, channels in int8.ACTIVATIONS.items()}
        int8.save_ranges(folder, {**ranges, "level": torch.tensor([0.3])}, int8.fingerprint(model))
        assert again(folder) == done
    model.int8_ranges = int8.load_ranges(folder)
    assert again(fastden.fuse(model, quality="fast")) == again(model) == [5, 0]
    assert again(model) == [0, 5]


def test_what_is_not_on_record_is_not_replaced(photos: Path, tmp_path: Path, network: Any) -> None:
    output = tmp_path / "out"
    output.mkdir()
    (output / "0.png").write_bytes(b"mine")
    report = fastden.BatchDenoiser(network, sigma=5).run(photos, output, resume=True)
    assert [record.error for record in report.failed] == [
        f"{output / '0.png'}: exists already; accepted: another name, or overwrite (--overwrite)"
    ]
    assert (output / "0.png").read_bytes() == b"mine"
    assert names(fastden.BatchDenoiser(network, sigma=5, overwrite=True).run(photos, output, resume=True)) == ["0.png"]


def test_an_image_that_was_replaced_by_its_result_is_done(photos: Path, network: Any) -> None:
    batch = fastden.BatchDenoiser(network, sigma=5, overwrite=True)
    assert len(batch.run(photos, photos, resume=True).done) == 5
    assert len(batch.run(photos, photos, resume=True).skipped) == 5


def test_a_result_in_place_is_not_denoised_again(photos: Path, network: Any) -> None:
    """With other settings a resumed run would take its own results for its inputs: the originals are gone."""
    first = fastden.BatchDenoiser(network, sigma=5, overwrite=True)
    first.run(photos, photos)
    before = {path.name: path.read_bytes() for path in photos.glob("*.*g")}
    for overwrite in (False, True):
        other = fastden.BatchDenoiser(network, sigma=9, overwrite=overwrite)
        report = other.run(photos, photos, resume=True)
        assert (report.done, len(report.failed)) == ([], 5)
        told = sorted(record.error or "" for record in report.failed)
        assert told[0] == f"{photos / '0.png'}: denoised already, in place; accepted for other settings: its original"
        steps = rehearse(other, [Job(photos / "0.png", photos / "0.png")], photos, resume=True).steps
        assert steps[0].error == told[0]
        assert {path.name: path.read_bytes() for path in photos.glob("*.*g")} == before
    assert len(first.run(photos, photos, resume=True).skipped) == 5
    # Without resume its user asks for just that.
    assert len(fastden.BatchDenoiser(network, sigma=9, overwrite=True).run(photos, photos).done) == 5


def test_a_run_in_place_that_was_killed_goes_on(photos: Path, network: Any) -> None:
    """Between the record and the replacing of the input nothing has happened to the picture."""
    original = photos / "0.png"
    data, times = original.read_bytes(), os.stat(original)
    fastden.BatchDenoiser(network, sigma=5, overwrite=True).run(photos, photos)
    original.write_bytes(data)
    os.utime(original, ns=(times.st_atime_ns, times.st_mtime_ns))
    report = fastden.BatchDenoiser(network, sigma=5).run(photos, photos, resume=True)
    assert (names(report), len(report.skipped)) == (["0.png"], 4)


def test_what_the_run_before_the_killed_one_wrote_is_replaced(photos: Path, tmp_path: Path, network: Any) -> None:
    fastden.BatchDenoiser(network, sigma=5).run(photos, tmp_path / "out")
    first = (tmp_path / "out" / "0.png").read_bytes()
    fastden.BatchDenoiser(network, sigma=9).run(photos, tmp_path / "out", resume=True)
    (tmp_path / "out" / "0.png").write_bytes(first)
    assert names(fastden.BatchDenoiser(network, sigma=9).run(photos, tmp_path / "out", resume=True)) == ["0.png"]


#: Writes a manifest of a run on ``aü.png``, or tells whether that run is done, in the locale of the process.
IN_ANOTHER_LOCALE = """
import os, sys
from pathlib import Path
from fastden.batch.manifest import NAME, Manifest, Record
from fastden.batch.plan import Job
from fastden.whole_files import digest

folder = Path(sys.argv[1])
(source,) = folder.glob("in/*.png")
job = Job(source, folder / "out" / source.name)
manifest = Manifest(folder / "out" / NAME)
if sys.argv[2] == "write":
    sizes = {"input_size": os.stat(source).st_size, "input_mtime_ns": os.stat(source).st_mtime_ns}
    sizes |= {"output_size": os.stat(job.target).st_size, "output_sha256": digest(job.target)}
    manifest.add(Record(str(source), manifest.name_of(job.target), "done", "", {"sha256": "0"}, {}, **sizes))
print(sys.getfilesystemencoding(), manifest.finished(job, ["0"], {}), len(manifest.written()))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="file names are bytes on Linux")
def test_another_locale_names_the_same_file(tmp_path: Path, root: Path) -> None:
    for name in ("in", "out"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "aü.png").write_bytes(b"a picture")

    def said(what: str, utf8: str) -> list[str]:
        environment = {**os.environ, "LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": utf8}
        command = [sys.executable, "-c", IN_ANOTHER_LOCALE, str(tmp_path), what]
        environment["PYTHONPATH"] = os.pathsep.join((str(root), environment.get("PYTHONPATH", "")))
        return subprocess.run(command, capture_output=True, text=True, env=environment, check=True).stdout.split()

    manifest = tmp_path / "out" / NAME
    assert said("write", "0")[0] != "utf-8"
    assert '"aü.png"' in manifest.read_text("utf-8"), "the bytes of the name, taken for UTF-8"
    assert said("ask", "1") == ["utf-8", "True", "1"]
    assert said("ask", "0")[1:] == ["True", "1"]
    # As earlier versions wrote it in that locale.
    text = manifest.read_text("utf-8").replace(
        "aü.png", os.fsdecode(b"a\xc3\xbc.png").encode().decode("ascii", "surrogateescape")
    )
    manifest.write_bytes(text.encode("utf-8", "surrogatepass"))
    assert said("ask", "1")[1:] == said("ask", "0")[1:] == ["True", "1"]


#: Python's parser of JSON raises RecursionError for it.
DEEP = b'{"input": ' + b"[" * 100_000 + b"]" * 100_000 + b"}\n"


def test_lines_that_are_no_records_are_passed_over(photos: Path, tmp_path: Path, network: Any) -> None:
    output, batch = tmp_path / "out", fastden.BatchDenoiser(network, sigma=5)
    batch.run(photos, output)
    path = output / NAME
    whole = path.read_bytes()
    path.write_bytes(b"[]\n{}\nnull\n\xff\n" + b'{"output": [], "model": {}}\n' + DEEP + whole[:-40])
    assert len(batch.run(photos, output, resume=True).skipped) == 5, "the line before, ``writing``, has the checksum"
    (output / "0.png").unlink()
    assert names(batch.run(photos, output, resume=True)) == ["0.png"]
    last = path.read_bytes().splitlines()
    assert json.loads(last[-1])["status"] == "done"
    assert sum(b"}{" in line for line in last) == 0, "a cut line swallows no other"


def test_manifests_elsewhere_and_nowhere(photos: Path, tmp_path: Path, network: Any) -> None:
    batch = fastden.BatchDenoiser(network, sigma=5)
    batch.run(photos, tmp_path / "a", manifest=tmp_path / "record.jsonl")
    assert not (tmp_path / "a" / NAME).exists()
    assert {record["output"] for record in lines(tmp_path / "record.jsonl")} >= {"a/0.png", "a/wide.jpg"}
    assert len(batch.run(photos, tmp_path / "a", manifest=tmp_path / "record.jsonl", resume=True).skipped) == 5
    batch.run(photos, tmp_path / "b", manifest=None)
    assert not (tmp_path / "b" / NAME).exists()
    batch.run(photos / "0.png", tmp_path / "one.png")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "one.png", "photos", "record.jsonl"]
    with pytest.raises(UserError, match="does not exist"):
        batch.run(photos, tmp_path / "c", manifest=tmp_path / "missing" / "record.jsonl")


def test_no_output_without_a_record(
    photos: Path, tmp_path: Path, network: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: Manifest, line: bytes) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Manifest, "_append", full)
    report = fastden.BatchDenoiser(network, sigma=5).run(photos, tmp_path / "out")
    message = f"manifest: {tmp_path / 'out' / NAME} cannot be written: {os.strerror(errno.ENOSPC)}"
    assert {record.error for record in report.failed} == {message}
    assert len(report.failed) == 5
    assert not (tmp_path / "out").exists()


def test_the_record_of_a_single_file(photos: Path, tmp_path: Path, network: Any) -> None:
    manifest = Manifest(tmp_path / "record.jsonl")
    batch = fastden.BatchDenoiser(network, sigma=5)
    job = Job(photos / "0.png", tmp_path / "0.png")
    assert batch.one(job, manifest).status == "done"
    assert Manifest(manifest.path).finished(job, batch.settings.known_weights, batch.settings.options(job))
    failed = batch.one(Job(photos / "missing.png", tmp_path / "1.png"), manifest)
    assert (failed.status, failed.output) == ("failed", "1.png")
    assert failed.error == f"{photos / 'missing.png'}: cannot be read: {os.strerror(errno.ENOENT)}"


#: Starts once and forks for each kill, so that PyTorch is loaded once. A child kills itself at the given one of the
#: moments at which it touches the disk: before and after each fsync and each naming. Outputs are named by a link,
#: because no file may be replaced.
KILLED = """
import os, signal, sys
import fastden
from fastden.batch.denoiser import BatchDenoiser

source, target, model, moments = sys.argv[1:]

def run(last):
    left = [-1 if last == "none" else int(last)]
    def counted(call):
        def dying(*arguments):
            for after in (False, True):
                if left[0] == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                left[0] -= 1
                result = None if after else call(*arguments)
            return result
        return dying
    os.fsync, os.link = counted(os.fsync), counted(os.link)
    report = BatchDenoiser(model, sigma=10).run(source, target, resume=True)
    print(len(report.done), len(report.skipped), len(report.failed), flush=True)

for moment in moments.split(","):
    child = os.fork()
    if not child:
        run(moment)
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@pytest.mark.parametrize("streamed", [False, True])
def test_a_file_that_appears_meanwhile_is_kept(photos: Path, tmp_path: Path, network: Any, streamed: bool) -> None:
    """Another run, or another program, makes an output while its image is computed; ``overwrite`` is off."""
    batch = fastden.BatchDenoiser(network, sigma=5)
    batch = streaming(batch) if streamed else batch
    output = tmp_path / "out"

    def appear(ended: int, part: float) -> None:
        (output / "2.tif").write_bytes(b"mine")

    run = {"listener": Listener(progress=appear), "format": "tiff"}
    report = batch.run(photos, output, **run)
    assert [record.error for record in report.failed] == [
        f"{output / '2.tif'}: exists already; accepted: another name, or overwrite (--overwrite)"
    ]
    assert len(report.done) == 4
    for _ in range(2):  # a resumed run does not take it for its own either
        assert (output / "2.tif").read_bytes() == b"mine"
        resumed = batch.run(photos, output, resume=True, format="tiff")
        assert (len(resumed.failed), len(resumed.skipped)) == (1, 4)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_killed_at_any_moment_and_resumed(tmp_path: Path, root: Path) -> None:
    """Six kills, each in another phase of a file, then a run to the end, give the bytes of a run without kills."""
    folder = tmp_path / "in"
    folder.mkdir()
    for index in range(6):
        (folder / f"{index}.png").write_bytes(encoded(pixels(16, 16 + index, seed=index), "PNG"))
    model = str(save_model(tmp_path / "model"))

    def run(target: Path, moments: str) -> list[str]:
        command = [sys.executable, "-c", KILLED, str(folder), str(target), model, moments]
        environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True, timeout=200)
        return done.stdout.splitlines()

    assert run(tmp_path / "whole", "none") == ["6 0 0", "0"]
    # A file takes eight moments: before and after its own fsync, that of ``writing``, its naming, and that of ``done``.
    results = run(tmp_path / "killed", "0,1,3,5,6,12,none,none")
    assert results[:6] == ["-9"] * 6
    done, skipped, failed = map(int, results[6].split())
    assert (done + skipped, failed) == (6, 0)
    assert skipped >= 3, "what was finished is not done again"
    assert results[8] == "0 6 0"
    for path in (tmp_path / "whole").glob("*.png"):
        assert (tmp_path / "killed" / path.name).read_bytes() == path.read_bytes()
    assert sorted(path.name for path in (tmp_path / "killed").iterdir()) == [
        NAME,
        *(f"{index}.png" for index in range(6)),
    ]


def test_a_failure_does_not_hide_what_was_done(photos: Path, tmp_path: Path, network: Any) -> None:
    """A run without resume fails on every file that is there; the next one with it still knows what is done."""
    batch = fastden.BatchDenoiser(network, sigma=5)
    assert len(batch.run(photos, tmp_path / "out").done) == 5
    assert len(batch.run(photos, tmp_path / "out").failed) == 5
    report = batch.run(photos, tmp_path / "out", resume=True)
    assert (len(report.skipped), report.done, report.failed) == (5, [], [])


def test_results_of_another_input_are_not_replaced(photos: Path, tmp_path: Path, network: Any) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "0.png").write_bytes((photos / "1.png").read_bytes())
    batch = fastden.BatchDenoiser(network, sigma=5)
    batch.run(photos, tmp_path / "out")
    before = (tmp_path / "out" / "0.png").read_bytes()
    (failed,) = batch.run(other, tmp_path / "out", resume=True).failed
    assert failed.error is not None
    assert "exists already" in failed.error
    assert (tmp_path / "out" / "0.png").read_bytes() == before


@pytest.mark.skipif(sys.platform != "linux", reason="file names are bytes on Linux")
def test_a_name_that_is_no_utf8(photos: Path, tmp_path: Path, network: Any) -> None:
    name = os.fsdecode(b"a\xff.png")
    try:
        (photos / "0.png").rename(photos / name)
    except OSError:
        pytest.skip("this file system takes UTF-8 alone")
    batch = fastden.BatchDenoiser(network, sigma=5)
    report = batch.run(photos, tmp_path / "out")
    assert (len(report.done), report.failed) == (5, [])
    assert (tmp_path / "out" / name).exists()
    assert len(batch.run(photos, tmp_path / "out", resume=True).skipped) == 5


def test_a_listener_that_fails_ends_the_run(photos: Path, tmp_path: Path, network: Any) -> None:
    """It must neither hang nor count an image twice."""

    def broken(job: Any, record: Any) -> None:
        raise OSError("the terminal is gone")

    with pytest.raises(OSError, match="the terminal is gone"):
        fastden.BatchDenoiser(network, sigma=5).run(photos, tmp_path / "out", listener=Listener(record=broken))


def test_images_that_cannot_go_together_fail_alone(photos: Path, tmp_path: Path) -> None:
    gray = fastden.fuse(fastden.Denoiser(image_channels=1))
    report = fastden.BatchDenoiser(gray, sigma=5).run(photos, tmp_path / "out")
    assert len(report.failed) == 5


def test_a_file_of_the_run_is_no_manifest(photos: Path, tmp_path: Path, network: Any) -> None:
    """JSON was appended to a picture."""
    batch = fastden.BatchDenoiser(network, sigma=5)
    (tmp_path / "out").mkdir()
    (tmp_path / "link.png").symlink_to(tmp_path / "out" / "1.png")
    originals = {path: path.read_bytes() for path in photos.iterdir()}
    for name, what in (
        (tmp_path / "out" / "1.png", "an output"),
        (tmp_path / "link.png", "an output"),
        (photos / "0.png", "an input"),
    ):
        with pytest.raises(UserError, match=rf"manifest: {name} is {what} of this run; accepted: another file"):
            batch.run(photos, tmp_path / "out", manifest=name)
    assert list((tmp_path / "out").iterdir()) == []
    assert {path: path.read_bytes() for path in photos.iterdir()} == originals
