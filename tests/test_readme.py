"""Python, commands and links of README and of the pages of ``docs/`` work as they stand."""

from __future__ import annotations

import re
import shlex
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
import yaml
from PIL import Image
from torch import nn

from fastden.cli.main import app
from tests.cli.run import works
from tests.image_files import pixels

ROOT = Path(__file__).resolve().parent.parent
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")))
#: Front pages of comparable projects have 271 to 921 words.
WORDS = 800


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def code(path: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", path.read_text(), re.DOTALL | re.MULTILINE)


def commands(path: Path) -> list[str]:
    """The lines of a page that begin with the command, without their comments."""
    lines = re.findall(r"^    (fastden .*)$", path.read_text(), re.MULTILINE)
    return [line.split("  #")[0].strip() for line in lines]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with small files of the names that the pages use."""
    monkeypatch.chdir(tmp_path)
    for file in ("photo.jpg", "scan.tif", "archive/2024/a.png", "archive/b.jpg", "photographs/c.png"):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels()).save(tmp_path / file)
    return tmp_path


def test_readme_is_a_front_page(root: Path) -> None:
    assert len((root / "README.md").read_text().split()) <= WORDS


@pytest.mark.parametrize("path", [path for path in PAGES if code(path, "python")], ids=name)
def test_python_runs(path: Path, folder: Path) -> None:
    """A page's blocks run one after the other, as a reader runs them."""
    names: dict[str, Any] = {
        "x": torch.rand(1, 3, 24, 20),
        "image": pixels(24, 20),
        "classifier": nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
        "loader": [(torch.rand(2, 3, 24, 20), torch.tensor([0, 3]))],
    }
    for block in code(path, "python"):
        exec(block, names)
        for result in ("y", "clean"):
            if isinstance(names.get(result), torch.Tensor):
                assert names[result].isfinite().all()


def test_joint_training_saves_a_denoiser_and_leaves_the_classifier(folder: Path) -> None:
    (block,) = (block for block in code(ROOT / "docs" / "joint_training.md", "python") if "JointDenoiser" in block)
    classifier = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    exec(block, {"classifier": classifier, "loader": [(torch.rand(2, 3, 24, 20), torch.tensor([0, 3]))]})
    assert (folder / "my-denoiser" / "model.safetensors").is_file()
    assert all(parameter.grad is None for parameter in classifier.parameters())


@pytest.mark.parametrize("line", commands(ROOT / "README.md"))
def test_commands_of_the_readme_run(line: str, folder: Path) -> None:
    if "clip.mp4" in line:
        pytest.importorskip("av")
        from tests.video.clips import make_clip

        make_clip(folder / "clip.mp4")
    arguments = shlex.split(line)[1:]
    shown = works(*arguments)
    if "-o" not in arguments:
        assert shown
        return
    output = folder / arguments[arguments.index("-o") + 1]
    assert output.is_file() or sorted(path.name for path in output.rglob("*.*g")) == ["a.png", "b.jpg"]


LINES = sorted(set(chain.from_iterable(map(commands, PAGES))))


@pytest.mark.parametrize("line", LINES)
def test_commands_of_the_pages_parse(line: str) -> None:
    """Their options exist and take these values; most of them would run too long here."""
    words = shlex.split(line)[1:]
    command: Any = typer.main.get_command(app)
    while words and words[0] in getattr(command, "commands", {}):
        command = command.commands[words.pop(0)]
    if words != ["--help"]:
        command.make_context("fastden", words)


def test_a_wrong_command_is_found() -> None:
    command: Any = typer.main.get_command(app)
    with pytest.raises(Exception, match="No such option"):
        command.commands["denoise"].make_context("fastden", shlex.split("photo.jpg -o clean.jpg --sygma 3"))


def test_make_targets_exist(root: Path) -> None:
    targets = set(re.findall(r"^(\w+):", (root / "Makefile").read_text(), re.MULTILINE))
    for path in (*PAGES, root / "CONTRIBUTING.md"):
        wanted = set(re.findall(r"(?:^    |`)make (\w+)", path.read_text(), re.MULTILINE))
        assert wanted <= targets, name(path)


@pytest.mark.parametrize("file", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md", "csrc/README.md"])
def test_links_lead_to_files(root: Path, file: str) -> None:
    """Those of ``docs/`` are checked by ``make docs``."""
    folder = (root / file).parent
    text = re.sub(r"^```.*?^```", "", (root / file).read_text(), flags=re.DOTALL | re.MULTILINE)
    links = re.findall(r"\]\((?!https?://)([^)#\s]+)", text)
    assert [link for link in links if not (folder / link).exists()] == []


def test_links_into_pages_lead_to_headings(root: Path) -> None:
    for page, heading in re.findall(r"\]\((docs/[^)#\s]+)#([^)\s]+)\)", (root / "README.md").read_text()):
        headings = re.findall(r"^#+ (.*)$", (root / page).read_text(), re.MULTILINE)
        assert heading in {re.sub(r"[^\w]+", "-", text.lower()).strip("-") for text in headings}


def test_training_configuration_of_the_page_is_accepted(root: Path) -> None:
    config = pytest.importorskip("fastden.training.config")
    (block,) = code(root / "docs" / "training.md", "yaml")
    assert config.TrainConfig(**yaml.safe_load(block)).steps == 24000


def test_tables_of_speed_and_quality_agree(root: Path) -> None:
    """README's rows stand word for word in the page of results."""
    results = (root / "docs" / "benchmarks.md").read_text().replace("**", "")
    readme = (root / "README.md").read_text().replace("**", "").replace(", takes no sigma", "")
    rows = [row for row in readme.splitlines() if re.match(r"\| .*\d\.\d\d", row)]
    assert len(rows) == 18
    assert [row for row in rows if row not in results] == []


def test_the_site_is_built_strictly(root: Path) -> None:
    assert re.search(r"^strict: true$", (root / "mkdocs.yml").read_text(), re.MULTILINE)
    assert "mkdocs build --strict" in (root / "Makefile").read_text()
    assert "make docs" in (root / ".ci" / "run").read_text()


def test_citation_states_the_version(root: Path) -> None:
    citation = yaml.safe_load((root / "CITATION.cff").read_text())
    version = re.search(r'^version = "(.*)"$', (root / "pyproject.toml").read_text(), re.MULTILINE)
    assert version is not None
    assert citation["version"] == version[1]


def test_the_workflow_calls_what_the_makefile_has(root: Path) -> None:
    workflow = yaml.safe_load((root / ".github" / "workflows" / "ci.yml").read_text())
    steps = [step.get("run", "") for job in workflow["jobs"].values() for step in job["steps"]]
    wanted = {match[1] for step in steps for match in re.finditer(r"make (\w+)", step)}
    assert wanted == {"lint", "test", "docs", "dist"}
    assert wanted <= set(re.findall(r"^(\w+):", (root / "Makefile").read_text(), re.MULTILINE))
    python = re.search(r'requires-python = ">=(.*)"', (root / "pyproject.toml").read_text())
    assert python is not None
    assert workflow["jobs"]["test"]["strategy"]["matrix"]["python"][0] == python[1]
