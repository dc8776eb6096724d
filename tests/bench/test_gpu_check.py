"""The script for a GPU, as far as it runs without one."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest
import torch

from fastden.bench.machine import commit
from fastden.training.config import load_config
from tests.cli.run import fails
from tests.scripts import load


def stand_ins(folder: Path, log: Path, failing: str = "never") -> dict[str, str]:
    """An environment in which Python and a GPU's tools only note what they are asked; what is ``failing`` fails."""
    folder.mkdir()
    python = f'#!/bin/sh\necho "$@" >>{log}\ncase "$*" in *"{failing}"*) echo broken; exit 3 ;; esac\n'
    (folder / "python").write_text(python)
    for name in ("nvidia-smi", "compute-sanitizer", "ncu"):
        (folder / name).write_text(f'#!/bin/sh\necho {name} "$@" >>{log}\n')
    for path in folder.iterdir():
        path.chmod(0o755)
    path = f"{folder}:{os.environ['PATH']}"
    own = ("ARCHIVE", "BUDGET", "DATA", "LINES_SHOWN", "TRAINING")  # the script's, which the caller may have set
    inherited = {name: value for name, value in os.environ.items() if name not in own}
    return {**inherited, "PYTHON": str(folder / "python"), "PATH": path, "TORCH_CUDA_ARCH_LIST": "8.0"}


def gpu_check(root: Path, environment: dict[str, str], *arguments: object) -> subprocess.CompletedProcess[str]:
    command = ["bash", root / "benchmarks" / "gpu_check.sh", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


@pytest.mark.skipif(torch.cuda.is_available(), reason="its commands would run")
def test_gpu_check_asks_for_what_the_command_takes(root: Path, tmp_path: Path) -> None:
    prove = load(root / "benchmarks" / "prove.py")
    log, out, archive = tmp_path / "log", tmp_path / "results", tmp_path / "results.tar.gz"
    environment = stand_ins(tmp_path / "bin", log, failing="bench train") | {"ARCHIVE": str(archive)}
    done = gpu_check(root, environment, out)
    assert done.returncode == 1
    trains = ("train", "train-graphs", "train-kernels", "train-aten", "train-compile")
    failures = "".join(f"failed: {name} (failed)\n" for name in trains)
    assert done.stdout.endswith(failures), done.stdout + done.stderr
    status = json.loads((out / "status.json").read_text())
    assert {status.pop(name) for name in trains} == {"failed"}
    assert status.pop("tiles") == "default"
    assert (status.pop("commit"), status.pop("gpu")) == (commit(), "")
    assert set(status.values()) == {"passed"}
    assert {name for checks in prove.CHECKS.values() for name in checks} < set(status)
    assert (out / "train.log").read_text() == "broken\n"
    with tarfile.open(archive) as kept:
        assert "results/status.json" in kept.getnames()
    asked = log.read_text().splitlines()
    tests = [line for line in asked if line.startswith("-m pytest")]
    (others,) = (line for line in tests if "-m gpu and not slow" in line)
    tests.remove(others)
    waiting = {
        path.relative_to(root).as_posix()
        for path in (root / "tests").rglob("test_*.py")
        if re.search(r"^ *@pytest\.mark\.gpu$", path.read_text(encoding="utf-8"), re.M)
        and not path.is_relative_to(root / "tests/kernels")
        and not path.is_relative_to(root / "tests/cuda")
    }
    assert {word for word in others.split() if word.startswith("tests")} == waiting
    apart = [file for line in tests for file in line.split() if file.startswith("tests/")]
    assert sorted(apart) == [
        "tests/cuda/test_fp8.py",
        "tests/cuda/test_network.py",
        "tests/cuda/test_operators.py",
        "tests/kernels",
    ]
    for path in (root / "tests/cuda").glob("test_*.py"):
        assert "mark.gpu" not in path.read_text(encoding="utf-8") or f"tests/cuda/{path.name}" in apart
    for file in {word for line in asked for word in line.split() if word.startswith(("tests/", "benchmarks/"))}:
        assert (root / file).exists(), file
    assert any(line.startswith("ncu --csv --clock-control none --metrics sm__pipe_tensor") for line in asked)
    firsts = [tuple(line.split()[1:]) for line in asked if line.startswith("benchmarks/first_checks.py")]
    names = ("one-pixel", "one-hot", "tiles", "large", "repeats", "thread", "graph")
    wanted = [(name, "--backend", backend) for backend in ("triton", "cuda") for name in names]
    assert firsts == [*wanted, ("fp8", "--backend", "cuda")]
    assert "-m fastden build" in asked
    tools = [word for line in asked for word in line.split() if word in ("memcheck", "racecheck", "synccheck")]
    assert sorted(tools) == ["memcheck"] * 3 + ["racecheck"] * 3 + ["synccheck"] * 3  # of Triton, CUDA, and fp8
    benches = [line.split()[2:] for line in asked if line.startswith("-m fastden bench")]
    gradients = ["train", "train", "ops", "train", "train", "ops", "ops", "ops", "train"]
    assert [bench[1] for bench in benches] == ["model"] * 3 + ["ops"] * 4 + gradients + ["model"]
    heights = {bench[bench.index("--size") + 1] for bench in benches if bench[1] == "ops" and "--backward" not in bench}
    assert heights == set(map(str, prove.HEIGHTS))
    own = [bench[bench.index("--backends") + 1] for bench in benches]
    assert own == ["torch,triton,cuda"] * 7 + ["torch,triton"] * 9 + ["torch,triton,cuda"]
    mixed = ["fastden-auto" in bench[bench.index("--compare") + 1].split(",") for bench in benches]
    assert mixed == [bench[1] == "model" for bench in benches]
    for bench in benches:
        # The command knows every option: it fails only because it finds no GPU.
        fails(*bench, saying="finds no CUDA device")


@pytest.mark.skipif(torch.cuda.is_available(), reason="its commands would run")
def test_gpu_check_proves_in_one_part(root: Path, tmp_path: Path) -> None:
    prove = load(root / "benchmarks" / "prove.py")
    log, out = tmp_path / "log", tmp_path / "results"
    done = gpu_check(root, stand_ins(tmp_path / "bin", log, failing="repeats --backend cuda"), out, "proof")
    assert done.returncode == 1
    assert done.stdout.endswith("failed: first-cuda-repeats (failed)\n"), done.stdout + done.stderr
    status = json.loads((out / "status.json").read_text())
    assert not prove.unproven(status, "triton")
    assert status["tests-gpu"] == "passed"
    assert prove.unproven(status, "cuda") == ["first-cuda-repeats: failed"]
    benches = [line.split()[2:] for line in log.read_text().splitlines() if line.startswith("-m fastden bench ops")]
    commands = [
        line.split() for line in log.read_text().splitlines() if line.startswith(("-m fastden bench", "benchm"))
    ]
    timed = [command for command in commands if "--rounds 1 " not in " ".join([*command, ""])]
    last = [command[3] if command[1] == "fastden" else command[1] for command in timed][-7:]
    assert last == ["model"] + ["ops"] * 4 + ["fp8", "model"]  # what is proven comes first, and nothing runs beside it
    calls = timed[-7]
    assert calls[calls.index("--size") + 1 :][:2] == ["256", "256"]
    assert str(out / prove.CALLS) in calls
    assert "--graphs" not in calls
    for measured in (False, True):  # what fills the compiler's cache measures one round
        heights = {bench[bench.index("--size") + 1] for bench in benches if ("--rounds" not in bench) is measured}
        assert heights == {str(height) for height in prove.HEIGHTS}


def test_gpu_check_puts_the_build_before_what_runs_beside_it(root: Path, tmp_path: Path) -> None:
    """Without it in time there is nothing of CUDA. Tests draw the same examples in every run."""
    log = tmp_path / "log"
    environment = stand_ins(tmp_path / "bin", log)
    for name in ("CI", "CUDNN_CONV_WSCAP_DBG"):
        environment.pop(name, None)
    for name in ("python", "compute-sanitizer"):
        program = tmp_path / "bin" / name
        seen = '"$(nice) ${CI:-0} ${CUDNN_CONV_WSCAP_DBG:-0} : $@"'
        program.write_text(program.read_text().replace('"$@"', seen))
    assert gpu_check(root, environment, tmp_path / "out", "proof").returncode == 0
    lines = [line.partition(" : ") for line in log.read_text().splitlines() if " : " in line]
    level = int(subprocess.run("nice", capture_output=True, text=True, check=True).stdout)
    kinds = {"build": "-m fastden build", "timed": "-m fastden bench", "checks": "benchmarks/first_checks.py"}
    kinds |= {"tests": "-m pytest", "fills": "--rounds 1"}
    found: dict[str, set[tuple[int, int, int]]] = {}
    for before, _, asked in lines:
        kind = [name for name, words in kinds.items() if words in asked]
        if kind and not ("checks" in kind and "repeats" not in asked):
            niceness, repeatable, cap = map(int, before.split()[-3:])
            found.setdefault(kind[-1], set()).add((niceness - level, repeatable, cap))
    assert found == {
        "build": {(0, 0, 0)},
        "checks": {(10, 0, 0)},
        "tests": {(10, 1, 0)},
        "fills": {(10, 0, 4096)},
        "timed": {(0, 0, 0)},
    }


def test_gpu_check_passes_over_tests_whose_packages_are_missing(root: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    environment = stand_ins(tmp_path / "bin", log, failing="pyvips tifftools")
    done = gpu_check(root, environment, tmp_path / "out", "tests")
    assert done.returncode == 0
    assert "note: tests/batch/test_denoiser.py is passed over: it needs pyvips tifftools\n" in done.stderr
    (asked,) = (line for line in log.read_text().splitlines() if "-m gpu and not slow" in line)
    assert "tests/training/test_denoise.py" in asked
    assert "tests/batch" not in asked


def test_gpu_check_takes_a_copy_without_modes_for_unchanged(root: Path, tmp_path: Path) -> None:
    def git(*words: str) -> str:
        command = ["git", "-C", str(copy), "-c", "user.name=a", "-c", "user.email=a@example.org", *words]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    copy, environment = tmp_path / "copy", stand_ins(tmp_path / "bin", tmp_path / "log")
    script = copy / "benchmarks" / "gpu_check.sh"
    script.parent.mkdir(parents=True)
    shutil.copy(root / "benchmarks" / "gpu_check.sh", script)
    script.chmod(0o755)
    git("init", "-q")
    git("add", ".")
    git("commit", "-qm", "first")
    clean = git("describe", "--always")
    script.chmod(0o644)
    for change, wanted in (("", clean), ("# changed\n", f"{clean}-dirty")):
        script.write_text(script.read_text() + change)
        done = gpu_check(copy, environment, tmp_path / "out", "tune")
        assert json.loads((tmp_path / "out" / "status.json").read_text())["commit"] == wanted
        assert ("\tbenchmarks/gpu_check.sh\n" in done.stderr) == bool(change)  # which files, before the first step
        assert ("note: the commit is" in done.stderr) == bool(change)


@pytest.mark.skipif(torch.cuda.is_available(), reason="its commands would run")
def test_gpu_check_without_the_extension(root: Path, tmp_path: Path) -> None:
    """Steps that no part starts are no failures; those of another commit are forgotten."""
    out = tmp_path / "results"
    out.mkdir()
    (out / "status.json").write_text(json.dumps({"commit": "c0ffee", "gpu": "", "first-cuda-one-pixel": "passed"}))
    environment = stand_ins(tmp_path / "bin", tmp_path / "log", failing="fastden.cuda import extension")
    done = gpu_check(root, environment, out, "proof")
    assert done.stdout.endswith("all passed\n"), done.stdout + done.stderr
    status = json.loads((out / "status.json").read_text())
    assert status["commit"] == commit()
    assert "passed" in status.values()
    assert not [name for name in status if "cuda" in name]


@pytest.mark.parametrize(("code", "kept"), [(0, True), (1, True), (2, False)])
def test_gpu_check_archives_what_changes(root: Path, tmp_path: Path, code: int, kept: bool) -> None:
    """GNU tar ends with 1 where a file grew while it was read, as logs of steps that run do; 2 is an error."""
    environment = stand_ins(tmp_path / "bin", tmp_path / "log") | {"ARCHIVE": str(tmp_path / "results.tar.gz")}
    tar = tmp_path / "bin" / "tar"
    tar.write_text(f'#!/bin/sh\n{shutil.which("tar")} "$@"\nexit {code}\n')
    tar.chmod(0o755)
    assert gpu_check(root, environment, tmp_path / "out", "tune").returncode == 0
    assert [path.name for path in tmp_path.glob("results.tar.gz*")] == ["results.tar.gz"] * kept
    if kept:
        with tarfile.open(tmp_path / "results.tar.gz") as archive:
            assert {"out/tune.log", "out/status.json"} <= set(archive.getnames())


def test_gpu_check_archives_each_step(root: Path, tmp_path: Path) -> None:
    """What is killed has the steps before it in the archive."""
    archive = tmp_path / "results.tar.gz"
    environment = stand_ins(tmp_path / "bin", tmp_path / "log") | {"ARCHIVE": str(archive)}
    python = tmp_path / "bin" / "python"
    then = f'case "$*" in *"--size 1080"*) cp {archive} {tmp_path}/then.tar.gz ;; esac\n'
    python.write_text(python.read_text() + then)
    assert gpu_check(root, environment, tmp_path / "out", "operators").returncode == 0
    with tarfile.open(tmp_path / "then.tar.gz") as kept:
        assert "out/ops-2160.log" in kept.getnames()


def test_gpu_check_says_on_which_tiles_it_ran(root: Path, tmp_path: Path) -> None:
    """Results on tiles that the same call searched are none on the defaults; those before the search are."""
    environment = stand_ins(tmp_path / "bin", tmp_path / "log")
    python = tmp_path / "bin" / "python"
    python.write_text(python.read_text() + 'case "$*" in *tune.py*) touch "$FASTDEN_TUNED" ;; esac\n')

    def tiles(name: str, *parts: str) -> str:
        assert gpu_check(root, environment, tmp_path / name, *parts).returncode == 0
        return str(json.loads((tmp_path / name / "status.json").read_text())["tiles"])

    assert tiles("before", "operators", "tune") == "default"
    assert tiles("after", "tune", "operators") == "searched"
    (tmp_path / "after" / "tuned.json").unlink()
    assert tiles("after", "quick") == "searched"  # the results of "operators" are still there


@pytest.mark.parametrize(("failing", "tiles"), [("never", "searched"), ("_tuned._table", "default")])
def test_gpu_check_puts_tiles_of_other_kernels_aside(root: Path, tmp_path: Path, failing: str, tiles: str) -> None:
    """They would end every launch of Triton."""
    out = tmp_path / "out"
    out.mkdir()
    (out / "tuned.json").write_text("{}")
    environment = stand_ins(tmp_path / "bin", tmp_path / "log", failing=failing)
    assert gpu_check(root, environment, out, "operators").returncode == 0
    assert json.loads((out / "status.json").read_text())["tiles"] == tiles
    kept = "tuned.json" if tiles == "searched" else "tuned-other.json"
    assert [path.name for path in out.glob("tuned*")] == [kept]


def test_gpu_check_measures_what_users_have_by_default(root: Path, tmp_path: Path) -> None:
    """Whatever the caller's environment says of backends and gradients."""
    log = tmp_path / "log"
    environment = stand_ins(tmp_path / "bin", log) | {"FASTDEN_BACKWARD": "input=aten", "FASTDEN_BACKEND": "torch"}
    python = tmp_path / "bin" / "python"
    python.write_text(python.read_text().replace('"$@"', '"${FASTDEN_BACKWARD-}:${FASTDEN_BACKEND-}: $@"'))
    assert gpu_check(root, environment, tmp_path / "out", "network").returncode == 0
    own = [line.partition(" ")[0] for line in log.read_text().splitlines() if "-m fastden bench" in line]
    assert sorted(own) == ["::"] * 6 + ["aten::"] * 2 + ["kernels::"] * 2


@pytest.mark.parametrize("installed", ["this checkout", "another one", "none"])
def test_gpu_check_runs_the_kernels_of_this_checkout(root: Path, tmp_path: Path, installed: str) -> None:
    """An installation in place of another checkout brings that one's kernels, beside this one's other modules."""
    log, other, site = tmp_path / "log", tmp_path / "other", tmp_path / "site"
    shutil.copytree(root / "kernels", other / "kernels")
    site.mkdir()
    folder = {"this checkout": root, "another one": other, "none": tmp_path}[installed] / "kernels"
    (site / "sitecustomize.py").write_text(
        "import sys\n"
        "from importlib.util import spec_from_file_location\n"
        "class Finder:\n"
        "    def find_spec(name, path=None, target=None):\n"
        "        if name == 'fastden.kernels':\n"
        f"            return spec_from_file_location(name, {str(folder / '__init__.py')!r}, "
        f"submodule_search_locations=[{str(folder)!r}])\n"
        "sys.meta_path.insert(0, Finder)\n"
    )
    environment = stand_ins(tmp_path / "bin", log) | {"PYTHONPATH": str(site)}
    python = tmp_path / "bin" / "python"
    # What asks for the modules' files runs; pip installs nothing.
    python.write_text(f'{python.read_text()}case "$*" in *fastden.kernels*) exec {sys.executable} "$@" ;; esac\n')
    done = gpu_check(root, environment, tmp_path / "out", "operators")
    assert ("-m pip install --quiet --no-deps" in log.read_text()) == (installed != "this checkout")
    assert ("bench ops" in log.read_text()) == (installed == "this checkout")
    assert done.returncode == (0 if installed == "this checkout" else 1)
    if installed == "another one":
        assert f"fastden.kernels is {folder / '__init__.py'}; accepted: that of {root}" in done.stderr


def test_gpu_check_runs_the_scripts_on_this_checkout(root: Path, tmp_path: Path) -> None:
    """Python puts a script's own folder first, and fastden might come from an installation."""
    environment = stand_ins(tmp_path / "bin", tmp_path / "log") | {"PYTHONPATH": "elsewhere"}
    python = tmp_path / "bin" / "python"
    python.write_text(python.read_text().replace('"$@"', '"$PYTHONPATH $@"', 1))
    assert gpu_check(root, environment, tmp_path / "out", "tune").returncode == 0
    line = next(line for line in (tmp_path / "log").read_text().splitlines() if "benchmarks/tune.py" in line)
    assert line.startswith(f"{root}:elsewhere benchmarks/tune.py")


def test_gpu_check_keeps_its_status_on_a_full_disk(root: Path, tmp_path: Path) -> None:
    out, site = tmp_path / "out", tmp_path / "site"
    for folder in (out, site):
        folder.mkdir()
    earlier = {"commit": "c0ffee", "gpu": "", "build": "passed"}
    (out / "status.json").write_text(json.dumps(earlier))
    (site / "sitecustomize.py").write_text(
        "import pathlib\n"
        "def write_half(path, text):\n"
        "    with path.open('w') as file:\n"
        "        file.write(text[: len(text) // 2])\n"
        "    raise OSError('No space left on device')\n"
        "pathlib.Path.write_text = write_half\n"
    )
    environment = stand_ins(tmp_path / "bin", tmp_path / "log") | {"PYTHONPATH": str(site)}
    done = gpu_check(root, environment, out, "operators")
    assert "No space left on device" in done.stderr
    assert "failed: ops-2160 (did not run)" in done.stdout
    assert json.loads((out / "status.json").read_text()) == earlier


@pytest.mark.parametrize(("name", "recipe"), [("color", "color-gpu"), ("photo", "photo-gpu-2")])
def test_gpu_check_trains(root: Path, tmp_path: Path, name: str, recipe: str) -> None:
    """The rest of a run goes on where it was, and its settings are those of a configuration."""
    log, out = tmp_path / "log", tmp_path / "results"
    environment = stand_ins(tmp_path / "bin", log) | {"DATA": "photographs", "BUDGET": "120"}
    for resumed in (False, True):
        assert gpu_check(root, environment, out, name).returncode == 0
        asked = log.read_text().splitlines()[-1].split()
        assert asked[:4] == ["-m", "fastden", "train", f"benchmarks/training/{recipe}.yaml"]
        assert ("--fit" in asked) == (name == "photo")
        assert ("--resume" in asked) == resumed
        assert 0 < float(asked[asked.index("--minutes") + 1]) <= 1
        first = asked.index("--set") + 1
        changes = " ".join(asked[first : asked.index("--minutes")]).replace(" workers=", "\nworkers=")
        config = load_config(root / asked[3], changes.replace(" data=", "\ndata=").splitlines())
        assert config.output == out / recipe
        assert {folder.parent for folder in config.data} == {Path("photographs")}
        (out / recipe / "checkpoints").mkdir(parents=True, exist_ok=True)
        (out / recipe / "checkpoints" / "last.ckpt").touch()


def test_gpu_check_says_what_found_no_time(root: Path, tmp_path: Path) -> None:
    environment = stand_ins(tmp_path / "bin", tmp_path / "log") | {"BUDGET": "1"}
    done = gpu_check(root, environment, tmp_path / "out")
    assert done.returncode == 1
    assert "failed: build (no time left)\nfailed: first-triton-one-pixel (no time left)" in done.stdout
    status = json.loads((tmp_path / "out" / "status.json").read_text())
    assert status.pop("tiles") == "default"
    assert (status.pop("commit"), status.pop("gpu")) == (commit(), "")
    assert set(status.values()) == {"no time left"}
    done = gpu_check(root, environment, tmp_path / "out", "check")
    assert done.returncode == 2
    assert "part: check; accepted: first, quick, tests" in done.stderr


def test_gpu_check_takes_no_part_for_its_folder(root: Path, tmp_path: Path) -> None:
    environment = stand_ins(tmp_path / "bin", tmp_path / "log")
    done = gpu_check(root, environment, "proof")
    assert done.returncode == 2
    assert "folder: proof is the name of a part; accepted: a folder before the parts" in done.stderr
    assert not (root / "proof").exists()
    assert not (tmp_path / "log").exists()


def test_gpu_check_leaves_what_passed_before(root: Path, tmp_path: Path) -> None:
    """A second call at the same commit that finds no time says nothing new; at another commit, that there was none."""
    environment = stand_ins(tmp_path / "bin", tmp_path / "log", failing="--size 512 768")
    steps = [f"ops-{height}" for height in (2160, 1080, 512, 256)]
    for budget, also, wanted in (
        ("100", {}, ["passed", "passed", "failed", "passed"]),
        ("1", {}, ["passed", "passed", "failed", "passed"]),
        ("1", {"commit": "c0ffee"}, ["no time left"] * 4),
    ):
        file = tmp_path / "out" / "status.json"
        if also:
            file.write_text(json.dumps(json.loads(file.read_text()) | also))
        done = gpu_check(root, environment | {"BUDGET": budget}, tmp_path / "out", "operators")
        assert [json.loads(file.read_text())[name] for name in steps] == wanted
        assert ("== ops-2160: no time left" in done.stdout) == (budget == "1")


@pytest.mark.slow
def test_gpu_check_stops_what_hangs(root: Path, tmp_path: Path) -> None:
    """At the same time as others that go on."""
    environment = stand_ins(tmp_path / "bin", tmp_path / "log") | {"BUDGET": "30"}
    hanging = (tmp_path / "bin" / "python").read_text() + 'case "$*" in *"fastden build"*) sleep 90 ;; esac\n'
    (tmp_path / "bin" / "python").write_text(hanging)
    done = gpu_check(root, environment, tmp_path / "out", "first")
    assert "failed: build (timed out)" in done.stdout
    status = json.loads((tmp_path / "out" / "status.json").read_text())
    assert status["first-triton-one-pixel"] == "passed"


@pytest.mark.slow
def test_gpu_check_stops_what_fills_caches(root: Path, tmp_path: Path) -> None:
    """Also what does not end at the first signal, as in the driver: it would hold up the times for ever."""
    environment = stand_ins(tmp_path / "bin", tmp_path / "log") | {"BUDGET": "30"}
    hanging = 'case "$*" in *"--rounds 1"*) trap "" TERM; for i in $(seq 99); do sleep 1; done ;; esac\n'
    (tmp_path / "bin" / "python").write_text((tmp_path / "bin" / "python").read_text() + hanging)
    begin = time.monotonic()
    gpu_check(root, environment, tmp_path / "out", "proof")
    assert time.monotonic() - begin < 60
    status = json.loads((tmp_path / "out" / "status.json").read_text())
    assert (status["first-triton-one-pixel"], status["ops-2160"]) == ("passed", "no time left")
