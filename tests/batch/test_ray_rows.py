"""What the Ray engine reads and where it writes, by paths and by URLs."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from fastden.batch.ray import check_places, plan_rows
from fastden.errors import UserError

pytest.importorskip("fsspec")


@pytest.fixture
def photos(nested: Path) -> Path:
    return nested


def test_rows_of_paths(photos: Path, tmp_path: Path) -> None:
    rows = plan_rows([str(photos)], str(tmp_path / "out"), recursive=True, format_name="png")
    assert [(row["input"], row["output"]) for row in rows] == [
        (str(photos / name), str(tmp_path / "out" / target))
        for name, target in (("a.png", "a.png"), ("b.jpg", "b.png"), ("inner/c.tif", "inner/c.png"))
    ]


def test_rows_of_urls(memory: Any, photos: Path) -> None:
    for name in ("in/a.png", "in/b/a.PNG", "in/notes.txt", "in/.hidden.png"):
        memory.pipe(f"/{name}", b"x")
    below = {"input": "memory:///in/b/a.PNG", "output": "memory://out/b/a.PNG"}
    first = {"input": "memory:///in/a.png", "output": "memory://out/a.png"}
    assert [_plain(row) for row in plan_rows(["memory://in"], "memory://out/")] == [_plain(first)]
    rows = plan_rows(["memory://in"], "memory://out", recursive=True)
    assert [_plain(row) for row in rows] == [_plain(first), _plain(below)]
    (row,) = plan_rows(["memory://in/*.png"], "/data/out", format_name="jpeg")
    assert row["output"] == "/data/out/a.jpg"
    (row,) = plan_rows([str(photos / "a.png")], "memory://out")
    assert row == {"input": str(photos / "a.png"), "output": "memory://out/a.png"}
    with pytest.raises(UserError, match=r"would all be written to memory://out/a\.png"):
        plan_rows(["memory://in/a.png", str(photos / "a.png")], "memory://out")
    with pytest.raises(UserError, match=r"input: no images at memory://nothing"):
        plan_rows(["memory://nothing"], "memory://out")
    with pytest.raises(UserError, match=r"nosuch://x: Protocol not known"):
        plan_rows(["nosuch://x"], "memory://out")
    # Of several inputs those that are not there, or would share an output, have failed.
    unreadable: list[OSError] = []
    same = ["memory:///in/a.png", str(photos / "a.png")]
    (row,) = plan_rows(["memory://nothing", *same, "memory://in/b/a.PNG"], "memory://out", unreadable=unreadable)
    assert row == {"input": "memory:///in/b/a.PNG", "output": "memory://out/a.PNG"}
    assert [error.filename for error in unreadable] == ["memory://nothing", *same]


def test_a_url_may_name_a_local_file(memory: Any, photos: Path, tmp_path: Path) -> None:
    """Originals were replaced where one side was a path and the other a URL."""
    (tmp_path / "link").symlink_to(photos)
    for inputs, output in (
        ([str(photos)], f"file://{photos}"),
        ([f"file://{photos}"], str(photos)),
        ([f"local://{photos}"], f"file://{tmp_path}/link"),
        ([str(photos / "a.png")], f"file://{photos}/a.png"),
    ):
        with pytest.raises(
            UserError, match=r"output: .*a\.png is the input; accepted with --engine ray: another folder"
        ):
            check_places(plan_rows(inputs, output))
    with pytest.raises(UserError, match=r"other/a\.png, of .*photos/a\.png, is an input too"):
        check_places(
            [
                {"input": f"{photos}/a.png", "output": f"file://{tmp_path}/other/a.png"},
                {"input": f"{tmp_path}/other/a.png", "output": f"{tmp_path}/out/a.png"},
            ]
        )
    row = {"input": "memory://in/a.png", "output": f"{tmp_path}/out/a.png"}
    check_places([row])
    with pytest.raises(UserError, match=r"memory://in/a\.png, memory://in/b\.png would both be written to file://"):
        check_places([row, {"input": "memory://in/b.png", "output": f"file://{tmp_path}/out/a.png"}])
    with pytest.raises(UserError, match="is the input"):
        check_places([{"input": "memory:///in/a.png", "output": "memory://in/a.png"}])


def test_an_input_that_is_named_twice_is_one_row(memory: Any) -> None:
    """As of paths."""
    for name in ("in/a.png", "in/b.png"):
        memory.pipe(f"/{name}", b"x")
    once = plan_rows(["memory://in"], "memory://out")
    assert len(once) == 2
    for inputs in (["memory://in", "memory://in"], ["memory://in", "memory://in/*.png"]):
        assert plan_rows(inputs, "memory://out") == once


@pytest.mark.parametrize("asked", [None, "jpeg"])
def test_one_file_behind_a_url_and_an_output_file(memory: Any, photos: Path, tmp_path: Path, asked: str | None) -> None:
    """As of paths: not a folder named as a file."""
    for name in ("in/a.png", "in/b.png", "there.jpg/c.png"):
        memory.pipe(f"/{name}", b"x")
    for source, output in (
        ("memory://in/a.png", "memory://out/x.jpg"),
        (str(photos / "a.png"), "memory://out/x.JPEG"),
        ("memory://in/a.png", str(tmp_path / "x.jpg")),
    ):
        (row,) = plan_rows([source], output, format_name=asked)
        assert _plain(row) == {"input": source, "output": output}
    for output in ("memory://out/x.jpg/", "memory://there.jpg", "memory://out/v1.2", f"{tmp_path}/x.jpg/"):
        (row,) = plan_rows(["memory://in/b.png"], output)
        assert _plain(row)["output"] == f"{output.rstrip('/')}/b.png"
    for inputs in (["memory://in/a.png", "memory://in/b.png"], ["memory://in"], ["memory://in/*.png"]):
        with pytest.raises(UserError, match=r"output: memory://x\.jpg names a file; accepted for more than one input"):
            plan_rows(inputs, "memory://x.jpg")
    with pytest.raises(UserError, match="the suffix says jpeg, format says png"):
        plan_rows(["memory://in/a.png"], "memory://out/x.jpg", format_name="png")
    memory.pipe("/in/notes.txt", b"x")
    for name in ("memory://in/none.png", "memory://in/n*.png", "memory://in/notes.txt", f"{tmp_path}/none.png"):
        with pytest.raises(UserError, match=rf"input: no images at {re.escape(name)}; accepted"):
            plan_rows([name], "memory://x.jpg")
    assert plan_rows([], "memory://x.jpg") == plan_rows([], "memory://out/") == []
    with pytest.raises(UserError, match=r"input: no images at memory://in/none\.png"):
        plan_rows(["memory://in/none.png"], "memory://out/")


def test_names_behind_a_url_are_those_of_paths(memory: Any, tmp_path: Path) -> None:
    """A suffix that says the format stays: a.jpg and a.jpeg were both a.jpg."""
    (tmp_path / "in").mkdir()
    for name in ("a.jpg", "a.jpeg", "b.PNG", "c.jfif"):
        memory.pipe(f"/in/{name}", b"x")
        (tmp_path / "in" / name).write_bytes(b"x")
    for format_name in ("jpeg", None):
        there = plan_rows(["memory://in"], "memory://out", format_name=format_name)
        here = plan_rows([str(tmp_path / "in")], str(tmp_path / "out"), format_name=format_name)
        names = [[Path(row["output"]).name for row in rows] for rows in (there, here)]
        assert names[0] == names[1]
        assert len(names[0]) == 4


def test_what_is_no_input_behind_a_url(memory: Any) -> None:
    """Results of an earlier run, and what lies in hidden folders, as of paths."""
    for name in ("a.png", "b/c.png", ".trash/d.png", ".trash/deep/e.png", "clean/a.png", "clean2/f.png"):
        memory.pipe(f"/in/{name}", b"x")

    def names(*inputs: str, output: str = "memory://in/clean") -> list[str]:
        rows = [_plain(row) for row in plan_rows(inputs, output, recursive=True)]
        return [row["input"].removeprefix("memory://in/") for row in rows]

    assert names("memory://in") == names("memory://in/**/*.png") == ["a.png", "b/c.png", "clean2/f.png"]
    assert names("memory://in/*/*.png", output="memory://out") == ["b/c.png", "clean/a.png", "clean2/f.png"]
    assert names("memory://in/.trash") == names("memory://in/.t*/**/*.png") == [".trash/d.png", ".trash/deep/e.png"]
    with pytest.raises(UserError, match=r"input: memory://in/\*\*\.png: Invalid pattern"):
        names("memory://in/**.png")
    assert names("memory://in/clean", output="memory://out") == ["clean/a.png"], "the folder itself may be asked for"


@pytest.mark.parametrize("name", ["a[1].png", "what?.png", "a*.png"])
def test_names_that_look_like_patterns_behind_a_url(memory: Any, name: str) -> None:
    for there in (name, "a1.png", "whats.png", "ab.png"):
        memory.pipe(f"/in/{there}", b"x")
    (row,) = plan_rows([f"memory://in/{name}"], "memory://out")
    assert _plain(row) == {"input": f"memory://in/{name}", "output": f"memory://out/{name}"}


def _plain(row: dict[str, str]) -> dict[str, str]:
    """File systems differ in the number of slashes behind the scheme."""
    return {key: value.replace(":///", "://") for key, value in row.items()}
