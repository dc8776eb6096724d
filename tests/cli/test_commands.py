"""The other commands, and what importing and starting costs."""

from __future__ import annotations

import gc
import json
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import typer

import fastden
from fastden.cli.console import duration
from fastden.cli.early import without_garbage_collection
from fastden.cli.main import app
from fastden.errors import shown_bytes
from fastden.inference.arguments import parse_memory
from tests.cli.run import fails, in_fresh_python, works


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; sys.argv = ['fastden', '--help']\n"
        "from fastden.cli.main import app\n"
        "try: app()\n"
        "except SystemExit as error: assert not error.code\n"
        "assert not {'torch', 'numpy', 'pyvips', 'huggingface_hub', 'rich'} & set(sys.modules), 'heavy'\n"
    )
    assert "denoise" in in_fresh_python(code)


def test_importing_fastden_loads_no_torch_and_lists_its_names() -> None:
    code = (
        "import sys, fastden\n"
        "assert 'torch' not in sys.modules\n"
        "assert set(fastden.__all__) <= set(dir(fastden))\n"
        "assert fastden.__version__\n"
        "for name in fastden.__all__: getattr(fastden, name)\n"
        "import torch\n"
        "assert not torch.cuda.is_initialized()\n"
    )
    in_fresh_python(code)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        fastden.nothing  # type: ignore[attr-defined]  # noqa: B018


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_library_loads_before_python_imports_it() -> None:
    code = (
        "import sys\n"
        "from fastden.cli.early import start_loading\n"
        "assert start_loading(['--help']) is start_loading(['denoise', '--help']) is start_loading([]) is None\n"
        "thread = start_loading(['denoise', 'a.png'])\n"
        "thread.join()\n"
        "assert 'torch' not in sys.modules\n"
        "assert 'libtorch_cpu' in open('/proc/self/maps').read()\n"
        "import torch\n"
        "assert torch.ones(3).sum() == 3\n"
    )
    in_fresh_python(code)


#: A library that is loaded only if another thread makes a file meanwhile.
WAITING = """
#include <stdlib.h>
#include <unistd.h>
static void __attribute__((constructor)) wait_for_python(void) {
    for (int i = 0; access("go", F_OK); i++) {
        if (i > 2000) _exit(3);
        usleep(10000);
    }
}
"""


@pytest.mark.skipif(sys.platform != "linux" or shutil.which("gcc") is None, reason="compiles a library for Linux")
def test_python_goes_on_while_the_library_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "lib").mkdir()
    command = ["gcc", "-shared", "-fPIC", "-x", "c", "-", "-o", tmp_path / "lib" / "libwaiting.so"]
    subprocess.run(command, input=WAITING, text=True, check=True)
    monkeypatch.chdir(tmp_path)
    code = (
        "import time\n"
        "from pathlib import Path\n"
        "from types import SimpleNamespace\n"
        "from fastden.cli import early\n"
        "early.find_spec = lambda name: SimpleNamespace(submodule_search_locations=['.'])\n"
        "early.LIBRARIES = (('libwaiting.so', False),)\n"
        "thread = early.start_loading(['denoise'])\n"
        "time.sleep(0.2)\n"
        "assert thread.is_alive()\n"
        "Path('go').touch()\n"
        "thread.join()\n"
        "assert 'libwaiting' in open('/proc/self/maps').read()\n"
    )
    in_fresh_python(code)


def test_imports_without_garbage_collection() -> None:
    assert gc.isenabled()
    frozen = gc.get_freeze_count()
    try:
        with without_garbage_collection():
            assert not gc.isenabled()
        assert gc.isenabled()
        assert gc.get_freeze_count() > frozen
    finally:
        gc.unfreeze()


def test_what_is_imported_so_is_freed_at_the_end() -> None:
    code = (
        "import os\n"
        "from fastden.cli.early import without_garbage_collection\n"
        "class Part:\n"
        "    def __del__(self, write=os.write): write(1, b'freed')\n"
        "with without_garbage_collection():\n"
        "    part = Part()\n"
        "    part.itself = part\n"
        "del part\n"
    )
    assert in_fresh_python(code) == "freed"


def test_usage_errors_have_code_2(photos: Path) -> None:
    fails("denoise", photos, saying="output", code=2)
    fails("denoise", photos, "-o", "x", "--dtype", "int3", saying="int3", code=2)
    fails("polish", saying="polish", code=2)


def test_info_and_version() -> None:
    report = json.loads(works("info", "--json"))
    assert report["backends"]["torch"]["available"]
    assert "backends" in works("info")
    assert works("--version") == f"fastden {fastden.__version__}\n"


def test_models_are_listed_with_a_line_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastden.network.hub.WEIGHTS", tmp_path)
    assert "no models are bundled" in works("models")
    for name, card in (
        ("one", "---\nlicense: x\n---\n# Title\n\nRemoves noise of\nany level. More.\n"),
        ("second", None),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_bytes(b"")
        if card:
            (tmp_path / name / "README.md").write_text(card)
    assert works("models") == "one     Removes noise of any level\nsecond  (no model card)\n"


def test_train_reads_its_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def run(config: Any, **options: Any) -> Path:
        calls.append((config, options))
        return tmp_path / "model"

    monkeypatch.setattr("fastden.training.trainer.train", run)
    config = tmp_path / "run.yaml"
    config.write_text(f"data: [{tmp_path}]\noutput: {tmp_path / 'out'}\nsteps: 7\n")
    options = ("--resume", "--minutes", 1.5, "--fit", "--accelerator", "cpu")
    text = works("train", config, "--set", "batch=2", "crop=32", *options, "--set", "lr=0.5")
    ((settings, passed),) = calls
    assert (settings.steps, settings.batch, settings.crop, settings.lr) == (7, 2, 32, 0.5)
    assert passed == {"resume": True, "minutes": 1.5, "fit": True, "accelerator": "cpu", "devices": "auto"}
    assert str(tmp_path / "model") in text
    fails("train", config, "--set", "speed=9", saying="^error: speed: .*accepted keys")
    fails("train", tmp_path / "missing.yaml", saying="^error: config: cannot read")


def test_train_without_its_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lightning.pytorch", None)
    monkeypatch.delitem(sys.modules, "fastden.training.trainer", raising=False)
    fails("train", tmp_path / "run.yaml", saying=r"pip install 'fastden\[train\]'")


def test_train_out_of_memory_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tmp_path / "run.yaml"
    config.write_text(f"data: [{tmp_path}]\noutput: {tmp_path / 'out'}\n")
    saying = "^error: train: out of memory; a smaller batch or crop needs less$"
    for full in (MemoryError(), torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")):

        def run(*arguments: Any, full: Exception = full, **options: Any) -> None:
            raise full

        monkeypatch.setattr("fastden.training.trainer.train", run)
        fails("train", config, saying=saying)


def test_train_mistakes_are_one_line(photos: Path, tmp_path: Path) -> None:
    config = tmp_path / "run.yaml"
    (tmp_path / "file").write_text("")
    settings = "steps: 1\nepoch_steps: 1\nbatch: 1\ncrop: 16\nvalidation: 0\nprecision: 32-true\n"
    config.write_text(f"data: [{photos}]\noutput: {tmp_path / 'out'}\n{settings}")
    for arguments, saying in (
        (["--set", "init=nothere"], "'nothere'.*accepted"),
        (["--set", f"output={tmp_path / 'file' / 'out'}"], "file"),
        (["--accelerator", "abacus"], "abacus"),
    ):
        error = fails("train", config, *arguments, saying=f"^error: .*{saying}")
        assert len(error.splitlines()) == 1, error


def _commands(command: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    yield name, command
    for word, inner in getattr(command, "commands", {}).items():
        yield from _commands(inner, f"{name} {word}".strip())


def test_help_lists_the_commands_in_order_of_use(root: Path) -> None:
    shown = [line.split()[0] for line in works("--help").split("Commands:")[1].strip().splitlines()]
    assert shown[:3] == ["denoise", "noise", "ui"]
    page = (root / "docs" / "command_line.md").read_text()
    assert [name for name in shown if f"| `fastden {name}` |" not in page] == []


@pytest.mark.parametrize(
    ("url", "opened"),
    [
        ("http://127.0.0.1:1", "http://127.0.0.1:1"),
        ("http://0.0.0.0:1", "http://127.0.0.1:1"),
        ("http://[::]:1", "http://[::1]:1"),
    ],
)
def test_the_page_does_not_wait_for_the_browser(url: str, opened: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A browser of the terminal is waited for until it is closed, and itself waits for the page."""
    serving, asked = threading.Event(), threading.Event()
    seen: list[str] = []

    def browse(address: str) -> None:
        seen.append(address)
        assert serving.wait(10)
        asked.set()

    def serve(*_: Any, ready: Any, **__: Any) -> None:
        ready(url, True)
        serving.set()
        assert asked.wait(10)

    monkeypatch.setattr("fastden.cli.ui.find_spec", lambda name: True)
    monkeypatch.setattr("fastden.ui.server.serve", serve)
    monkeypatch.setattr("webbrowser.open", browse)
    assert url in works("ui")
    assert seen == [opened]


def test_every_option_is_documented(root: Path) -> None:
    pages = {path.name: path.read_text() for path in (root / "docs").glob("*.md")}
    missing = []
    for name, command in _commands(typer.main.get_command(app)):
        if name.startswith("bench "):  # docs/benchmarks.md shows the ways to call it; its help has the rest
            continue
        text = pages["command_line.md"] if name == "denoise" else "\n".join(pages.values())
        for option in (word for item in command.params for word in [*item.opts, *item.secondary_opts]):
            if option.startswith("--") and option != "--help" and not re.search(rf"{option}(?![\w-])", text):
                missing.append(f"{name} {option}")
    assert missing == []


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.034, "0.034 s"), (9.96, "10 s"), (119, "119 s"), (186, "3.1 minutes"), (7300, "2.0 hours"), (1e6, "12 days")],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("count", "text"), [(17, "17 bytes"), (1024, "1 KiB"), (1146881, "1.1 MiB"), (3 << 29, "1.5 GiB")]
)
def test_sizes_are_rounded_up(count: int, text: str) -> None:
    assert shown_bytes(count) == text
    assert (parse_memory(text.replace(" bytes", "")) or 0) >= count


def test_only_some_of_many_failed_files_are_named_again(tmp_path: Path, model: str) -> None:
    for number in range(7):
        (tmp_path / f"{number}.png").write_bytes(b"no image")
    error = fails("denoise", tmp_path, "-o", tmp_path / "out", "--model", model, saying="7 of 7 files failed")
    last = error.splitlines()[-1]
    assert last.endswith("4.png and 2 more, told above")
    assert "5.png" not in last
    assert error.count("5.png") == 1


@pytest.mark.parametrize("module", ["bench", "evaluate", "export", "main", "noise"])
def test_typer_refuses_no_path_for_its_permission(module: str) -> None:
    """It would end the command with exit code 2 and the usage; a command tells of it as of any file it cannot read."""
    text = (Path(fastden.__file__).parent / "cli" / f"{module}.py").read_text(encoding="utf-8")
    paths = re.findall(r"Annotated\[\s*(?:list\[Path\]|Path)[^\]]*?typer\.(?:Option|Argument)\(.*?\]", text, re.DOTALL)
    assert paths
    assert [path for path in paths if "readable=False" not in path] == []
