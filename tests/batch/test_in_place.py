"""Results beside their inputs, under another suffix: what a run takes for an input when it is resumed."""

from __future__ import annotations

import errno
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import fastden
from fastden.batch.manifest import NAME, Manifest, Record, made_before
from fastden.batch.plan import ignores_case, plan
from fastden.batch.ray import Pool, Worker, plan_rows
from fastden.cli.main import app
from fastden.errors import UserError
from tests.cli.run import fails, works
from tests.image_files import encoded, pixels, save_model


def results(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.tif")}


def cut_as_by_a_kill(photos: Path) -> None:
    """A killed run's files: 0 is done, 1 has its name but no last line, 2 is not renamed, others are missing."""
    path = photos / NAME
    kept = [
        line
        for line in path.read_text().splitlines(keepends=True)
        for record in [json.loads(line)]
        if record["output"] == "0.tif" or (record["output"] in ("1.tif", "2.tif") and record["status"] == "writing")
    ]
    assert len(kept) == 4
    path.write_text("".join(kept))
    for name in ("2.tif", "3.tif", "wide.tif"):
        (photos / name).unlink()
    (photos / ".fastden-0123456789abcdef.tmp").write_bytes(b"half")


def test_a_killed_run_goes_on(photos: Path, tmp_path: Path, network: Any) -> None:
    batch = fastden.BatchDenoiser(network, sigma=5)
    batch.run(photos, tmp_path / "whole", format="tiff")
    batch.run(photos, photos, format="tiff")
    expected = results(photos)
    assert expected == results(tmp_path / "whole") != {}
    cut_as_by_a_kill(photos)
    with pytest.raises(UserError, match=r"0\.png, .*0\.tif would all be written to .*0\.tif"):
        plan([str(photos)], photos, format_name="tiff")
    unreadable: list[OSError] = []
    jobs = plan([str(photos)], photos, format_name="tiff", unreadable=unreadable)
    assert [job.source.name for job in jobs] == ["2.png", "3.png", "wide.jpg"]  # nothing is replaced without --resume
    assert sorted(Path(error.filename).name for error in unreadable) == ["0.png", "0.tif", "1.png", "1.tif"]
    report = batch.run(photos, photos, format="tiff", resume=True)
    assert report.failed == []
    assert sorted(job.source.name for job in report.skipped) == ["0.png", "1.png"]
    assert sorted(record.output for record in report.done) == ["2.tif", "3.tif", "wide.tif"]
    assert results(photos) == expected
    assert list(photos.glob("*.tmp")) == []
    (photos / "fresh.jpg").write_bytes(encoded(pixels(seed=8), "JPEG"))
    (photos / "0.tif").write_bytes(b"edited")
    report = batch.run(photos, photos, format="tiff", resume=True)
    assert [record.output for record in report.done] == ["fresh.tif"]
    (failed,) = report.failed
    assert f"{photos / '0.tif'}: changed since fastden wrote it" in str(failed.error)
    assert (photos / "0.tif").read_bytes() == b"edited"
    again = fastden.BatchDenoiser(network, sigma=5, overwrite=True)
    assert [record.output for record in again.run(photos, photos, format="tiff", resume=True).done] == ["0.tif"]
    assert {name: data for name, data in results(photos).items() if name != "fresh.tif"} == expected


@pytest.mark.skipif(sys.platform == "win32", reason="links need a privilege on Windows")
def test_patterns_names_and_links(photos: Path, tmp_path: Path, network: Any) -> None:
    batch = fastden.BatchDenoiser(network, sigma=5)
    batch.run(photos, photos, format="tiff")
    (tmp_path / "link").symlink_to(photos, target_is_directory=True)
    names = sorted(photos.glob("[!.]*"))
    assert len(names) == 10
    for inputs, output in ((f"{photos}/*", photos), (names, photos), (tmp_path / "link", photos), (photos, "link")):
        report = batch.run(inputs, tmp_path / output, format="tiff", resume=True)
        assert (len(report.skipped) + len(report.done), report.failed) == (5, [])
    made = "results of the run that is resumed; accepted: its inputs"
    with pytest.raises(UserError, match=made):
        batch.run(photos / "0.tif", photos, format="tiff", resume=True)


def test_results_whose_inputs_are_gone(photos: Path, network: Any) -> None:
    """They count as results as long as nobody has changed them."""
    batch = fastden.BatchDenoiser(network, sigma=5)
    batch.run(photos, photos, format="tiff")
    for name in ("0.png", "1.png"):
        (photos / name).unlink()
    (photos / "1.tif").write_bytes(encoded(pixels(seed=9), "TIFF"))
    made = made_before("auto", photos)
    assert [made(photos / name) for name in ("0.tif", "1.tif", "2.tif", "2.png")] == [True, False, True, False]
    (failed,) = batch.run(photos, photos, format="tiff", resume=True).failed
    assert failed.error is not None
    assert failed.error.startswith(f"{photos / '1.tif'}: exists already")
    for path in photos.glob("*.*g"):
        path.unlink()
    (photos / "1.tif").unlink()
    with pytest.raises(UserError, match="are results of earlier runs; accepted: their inputs"):
        batch.run(photos, photos, format="tiff", resume=True)


def test_what_was_replaced_by_its_result_stays_an_input(photos: Path, network: Any) -> None:
    fastden.BatchDenoiser(network, sigma=5, overwrite=True).run(photos, photos)
    assert not any(map(made_before("auto", photos), photos.iterdir()))
    assert not any(map(made_before(None, photos), photos.iterdir()))


@pytest.fixture
def model(tmp_path: Path) -> str:
    return str(save_model(tmp_path / "model"))


def test_rehearsed(photos: Path, model: str) -> None:
    rest = ["-o", photos, "--format", "tiff", "--model", model, "--sigma", 5]
    works("denoise", photos, *rest)
    cut_as_by_a_kill(photos)
    text = works("denoise", photos, *rest, "--resume", "--dry-run")
    assert text.count("done before\n") == 2
    assert "would denoise 3 images" in text
    fails("denoise", photos, *rest, "--dry-run", saying="would all be written to")


def test_on_ray(photos: Path, model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def here(
        rows: list[dict[str, str]], settings: dict[str, Any], pool: Pool, manifest: str | None
    ) -> Iterator[Record]:
        worker = Worker(settings, 1, manifest)
        for row in rows:
            asked.append(Path(row["input"]).name)
            yield Record.from_json(worker(row)["record"])

    monkeypatch.setattr("fastden.cli.cluster.connect", lambda *_: Pool(1, 0, 1))
    monkeypatch.setattr("fastden.cli.cluster.distribute", here)
    rest = ["-o", photos, "--format", "tiff", "--model", model, "--sigma", 5, "--engine", "ray"]
    works("denoise", photos, *rest)
    expected = results(photos)
    done = (photos / NAME).read_text()
    begun = done.replace('"status": "done"', '"status": "writing"')
    (photos / NAME).write_text(begun + done)
    cut_as_by_a_kill(photos)
    kept = (photos / NAME).read_text().splitlines(keepends=True)
    by_workers = [line for line in kept if '"writing"' in line]
    (photos / f"{NAME}.0123456789abcdef").write_text("".join(by_workers))
    (photos / NAME).write_text("".join(line for line in kept if line not in by_workers))
    asked.clear()
    works("denoise", photos, *rest, "--resume")
    assert sorted(asked) == ["2.png", "3.png", "wide.jpg"]
    assert results(photos) == expected
    (photos / "3.tif").write_bytes(b"edited")
    fails("denoise", photos, *rest, "--resume", saying=r"3\.tif: changed since fastden wrote it")
    assert (photos / "3.tif").read_bytes() == b"edited"


def test_an_output_that_is_another_ones_input(tmp_path: Path, model: str) -> None:
    """It is refused: chance would decide whether it is read before or after it is replaced."""
    (tmp_path / "in" / "sub").mkdir(parents=True)
    (tmp_path / "out" / "sub").mkdir(parents=True)
    for name in ("in/sub/a.png", "out/sub/a.png"):
        (tmp_path / name).write_bytes(encoded(pixels(), "PNG"))
    before = (tmp_path / "out" / "sub" / "a.png").read_bytes()
    inputs = [tmp_path / "in", tmp_path / "out" / "sub"]
    rest = ["-o", tmp_path / "out", "-r", "--overwrite", "--model", model]
    fails("denoise", *inputs, *rest, saying=r"out/sub/a\.png, of .*in/sub/a\.png, is an input too; accepted: another")
    assert (tmp_path / "out" / "sub" / "a.png").read_bytes() == before
    assert not (tmp_path / "out" / "a.png").exists()


@pytest.mark.parametrize("names", [("x.png", "X.PNG"), ("Masse.png", "Maße.png")])
def test_names_that_differ_in_case_alone(tmp_path: Path, names: tuple[str, str], monkeypatch: Any) -> None:
    """On some file systems they are one file, on others two."""
    for folder, name in zip("ab", names, strict=True):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / name).write_bytes(encoded(pixels(), "PNG"))
    inputs = [str(tmp_path / "a"), str(tmp_path / "b")]
    monkeypatch.setattr("fastden.batch.plan.ignores_case", lambda folder: True)
    with pytest.raises(UserError, match="would all be written to"):
        plan(inputs, tmp_path / "out")
    monkeypatch.setattr("fastden.batch.plan.ignores_case", lambda folder: False)
    assert sorted(job.target.name for job in plan(inputs, tmp_path / "out")) == sorted(names)


def test_whether_a_file_system_ignores_case(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    same = (tmp_path / "FOLDER").exists()
    assert ignores_case(str(folder)) == ignores_case(str(folder / "new" / "12")) == same
    if not same:
        (tmp_path / "FOLDER").mkdir()  # another one
        ignores_case.cache_clear()
        assert not ignores_case(str(folder))


@pytest.mark.skipif(sys.platform == "win32", reason="links need a privilege on Windows")
def test_links_that_lead_to_themselves(photos: Path, tmp_path: Path, network: Any) -> None:
    (photos / "loop.png").symlink_to(photos / "loop.png")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "0.png").symlink_to(tmp_path / "out" / "0.png")
    report = fastden.BatchDenoiser(network, sigma=5).run(photos, tmp_path / "out")
    assert len(report.done) == 4
    assert [record.error for record in report.failed] == [
        f"{tmp_path / 'out' / '0.png'}: is a link that leads to itself"
    ]
    assert (tmp_path / "out" / "0.png").is_symlink()
    with pytest.raises(UserError, match="is a link that leads nowhere"):
        plan([str(photos / "loop.png")], tmp_path / "out")


def test_a_file_that_is_no_manifest_is_not_written_to(photos: Path, tmp_path: Path, network: Any) -> None:
    image, settings = tmp_path / "other.png", tmp_path / "settings.json"
    image.write_bytes((photos / "0.png").read_bytes())
    settings.write_text('{\n "mine": 1\n}\n')
    for path in (image, settings):
        before = path.read_bytes()
        with pytest.raises(UserError, match="is no record of a run; accepted: a new file"):
            fastden.BatchDenoiser(network, sigma=5).run(photos, tmp_path / "out", manifest=path)
        assert path.read_bytes() == before
    assert not (tmp_path / "out").exists()
    for cut in (b"", b'{"in', b'{"input": "/a", "outp'):
        (tmp_path / "cut").write_bytes(cut)
        Manifest(tmp_path / "cut")


@pytest.mark.usefixtures("unreadable_inner")
def test_ray_reports_folders_that_cannot_be_looked_into(
    photos: Path, tmp_path: Path, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (photos / "inner").mkdir()
    monkeypatch.setattr("fastden.cli.cluster.connect", lambda *_: Pool(1, 0, 1))
    monkeypatch.setattr("fastden.cli.cluster.distribute", lambda *_: iter(()))
    unreadable: list[OSError] = []
    assert len(plan_rows([str(photos)], str(tmp_path / "out"), recursive=True, unreadable=unreadable)) == 5
    assert [error.filename for error in unreadable] == [str(photos / "inner")]
    arguments = ["denoise", photos, "-o", tmp_path / "out", "-r", "--engine", "ray", "--model", model]
    done = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert done.exit_code == 1
    assert f"error: {photos / 'inner'}: {os.strerror(errno.EACCES)}\n" in done.stderr
    assert "error: 1 of 6 files failed" in done.stderr
