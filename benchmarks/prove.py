"""Rewrite the table that the automatic choice reads, from the results of a run of ``gpu_check.sh``.

A kernel is proven for the GPU's compute capability and a dtype where every check of its backend's results passed, the
sanitizers found nothing there, and at every place of the operator in the network, at four sizes, it is right and faster
than each rival that is right: its third quartile below the rival's first. These times are the GPU's alone. Users call
the network without CUDA graphs, and at 256 x 256 pixels the host decides: there the whole network has to be faster on
the backend than on PyTorch's operations, and so has the mixture of backends that was chosen automatically
(``fastden-auto``), if the file has it. If two backends are proven for an operator, the table has the faster one
first. All results, and the checks, have to be of one commit and one GPU. They have to lie in the repository, for they
are committed with the table.

What the table has stays, unless these results show it wrong or not faster, or its backend failed a check: a run that
found no time for a kernel, a size or a check says nothing of it.

The table also has the shapes of the weights that the operators were measured with: for others, nothing is chosen.

An entry has a digest of its kernel's sources (``kernel_sources.py``) at the commit that was measured; the repository
has to have that commit. Kernels that have changed since are left out. When a kernel of the table changes, a test fails:
measure it again, or take it out of the table with ``--drop``.

    benchmarks/gpu_check.sh benchmarks/results/gpu/h100
    python benchmarks/prove.py benchmarks/results/gpu/h100            # says what is proven and what not, and why
    python benchmarks/prove.py benchmarks/results/gpu/h100 --write
    python benchmarks/prove.py --drop                                 # takes out kernels that have changed since
"""

from __future__ import annotations

import argparse
import io
import json
import subprocess
import sys
import tarfile
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from kernel_sources import PATHS, digest

from fastden.bench.forms import AUTO
from fastden.bench.operators import OPERATORS, job_name, weight_shapes
from fastden.ops.backends import NAMES
from fastden.ops.proven import PROVEN

ROOT = Path(__file__).resolve().parent.parent
TABLE = ROOT / "fastden" / "ops" / "proven.py"
FIRST_CHECKS = ("one-pixel", "one-hot", "tiles", "large", "repeats", "thread", "graph")
#: Steps of gpu_check.sh without which no kernel of a backend is proven.
CHECKS = {
    backend: (
        *(f"first-{backend}-{name}" for name in FIRST_CHECKS),
        f"tests-{backend}",
        *(f"sanitizer-{backend}-{tool}" for tool in ("memcheck", "racecheck", "synccheck")),
    )
    for backend in NAMES[1:]
}
#: Heights of the images whose results are needed.
HEIGHTS = (256, 512, 1080, 2160)
#: What ``fastden bench model`` wrote of calls of the smallest.
CALLS = "model-256.json"
Key = tuple[str, str, tuple[int, int], str]
#: A file of results, and the digest of the sources that were measured.
Entry = tuple[str, str]


def unproven(status: dict[str, str], backend: str) -> list[str]:
    """Checks of a backend that gpu_check.sh did not see pass, from its ``status.json``."""
    searched = ["tiles: searched (tuned.json), which users do not have; accepted: the defaults"]
    failed = [f"{name}: {status.get(name, 'did not run')}" for name in CHECKS[backend] if status.get(name) != "passed"]
    return failed + searched * (backend == "triton" and status.get("tiles") == "searched")


def why_not_together(status: dict[str, str], documents: dict[str, dict[str, Any]]) -> list[str]:
    """Why checks and results prove nothing together; empty where they do.

    Args:
        status: ``status.json``.
        documents: what ``fastden bench`` wrote, by file.
    """
    reasons = []
    for key, accepted in (("commit", "one, without changes"), ("gpu", "one")):
        found = {"status.json": status.get(key)} | {name: one["machine"].get(key) for name, one in documents.items()}
        if len(set(found.values())) > 1 or any(not one or one.endswith("-dirty") for one in found.values()):
            told = ", ".join(f"{one} ({name})" for name, one in found.items())
            reasons.append(f"{key}: {told}; accepted: {accepted}")
    for name, document in documents.items():
        # The command fails if a contender was wrong; its file has the reason.
        expected = "passed" if document.get("all_right") else "failed"
        ended = status.get(Path(name).stem, "did not run")
        if document["complete"] and ended != expected:
            reasons.append(f"{name}: its step {ended}; accepted: {expected}, as the file says")
    return reasons


def why_not_faster(rows: dict[str, Any], own: str) -> list[str]:
    """Why contender ``own`` is not right and faster than each right rival; empty where it is."""
    mine = rows.get(own)
    if mine is None:
        return ["did not run"]
    if not mine.get("right"):
        return [mine.get("failed", "wrong result")]
    rivals = {name: row for name, row in rows.items() if name != own and row.get("right")}
    # Other kernels of fastden are no rivals: if two are proven, the faster one is chosen.
    rivals = {name: row for name, row in rivals.items() if not row["own"] or name == "fastden-torch"}
    if not rivals:
        return ["no rival gave a right result"]
    slower = [name for name, row in rivals.items() if mine["q3_ms"] >= row["q1_ms"]]
    return [f"not faster than {', '.join(slower)}"] if slower else []


def is_judged(rows: dict[str, Any], own: str) -> bool:
    """Whether contender ``own`` was measured: its result was compared and, if it is right, a right rival was timed.

    One that failed has no result: the fault may be that of the contender before it.
    """
    mine = rows.get(own, {})
    rivals = [row for name, row in rows.items() if name != own and (not row["own"] or name == "fastden-torch")]
    return "right" in mine and (not mine["right"] or any(row.get("right") for row in rivals))


def why_not_called(calls: dict[str, Any] | None, capability: str, dtype: str, backend: str) -> list[str]:
    """Why calls of the network are not right and faster on ``backend`` than on PyTorch's operations; empty if they are.

    Nor may those of the automatic choice be slower, where it is a mixture. Files of earlier code do not have it; it is
    not the mixture that the new table will choose, but the one of the commit that was measured.

    Args:
        calls: :data:`CALLS`, if it is there.
    """
    if calls is None or not calls["complete"]:
        return [f"{CALLS}: no complete results"]
    measured = (calls["machine"]["compute_capability"], calls["settings"]["dtype"])
    if measured != (capability, dtype):
        return [f"{CALLS}: of {' '.join(measured)}; accepted: {capability} {dtype}"]
    own = f"fastden-{backend}"
    rows = called(calls["results"][0], own)
    reasons = [f"{CALLS}: {reason}" for reason in why_not_faster(rows, own)]
    if AUTO in rows:
        reasons += [f"{CALLS}: {AUTO}: {reason}" for reason in why_not_faster(rows, AUTO)]
    return reasons


def called(result: dict[str, Any], own: str) -> dict[str, Any]:
    """The contenders that decide on calls of the network."""
    return {name: row for name, row in result["contenders"].items() if name in (own, AUTO, "fastden-torch")}


def prove(
    documents: dict[str, dict[str, Any]], calls: dict[str, Any] | None, backends: Iterable[str] = NAMES[1:]
) -> tuple[dict[Key, str], list[str]]:
    """Entries for the table, each with its file of results, and why others are left out.

    Args:
        documents: what ``fastden bench ops`` wrote, by file.
        calls: :data:`CALLS`, if it is there.
        backends: whose checks passed.
    """
    backends = tuple(backends)
    by_height: dict[tuple[str, str], dict[int, tuple[str, dict[str, Any]]]] = {}
    for name, document in documents.items():
        settings = document["settings"]
        key = (document["machine"]["compute_capability"], settings["dtype"])
        by_height.setdefault(key, {})[settings["size"][0]] = (name, document)
    entries: dict[Key, str] = {}
    notes = []
    for (capability, dtype), at_height in sorted(by_height.items()):
        lacking = [str(height) for height in HEIGHTS if height not in at_height or not at_height[height][1]["complete"]]
        if lacking:
            notes.append(f"{capability} {dtype}: no complete results of height {', '.join(lacking)}")
            continue
        slow_calls = {backend: why_not_called(calls, capability, dtype, backend) for backend in backends}
        notes += [f"{name} {capability} {dtype}: {reason}" for name in backends for reason in slow_calls[name]]
        major, minor = map(int, capability.split("."))
        operators = {result["name"].split()[0] for _, document in at_height.values() for result in document["results"]}
        for operator in sorted(operators):
            rows = {
                f"{result['name']} at {height}": result["contenders"]
                for height, (_, document) in sorted(at_height.items())
                for result in document["results"]
                if result["name"].split()[0] == operator
            }
            names = [job_name(operator, part) for part in OPERATORS.get(operator, ())] or [operator]
            missing = [f"{name} at {height}: no result" for height in HEIGHTS for name in names]
            missing = [reason for reason in missing if reason.removesuffix(": no result") not in rows]
            times: dict[str, float] = {}
            for backend in backends:
                own = f"fastden-{backend}"
                slower = [f"{name}: {reason}" for name, row in rows.items() for reason in why_not_faster(row, own)]
                if slower or missing:
                    notes.append(f"{backend} {operator} {capability} {dtype}: {'; '.join(slower + missing)}")
                elif not slow_calls[backend]:
                    times[backend] = sum(row[own]["q3_ms"] for row in rows.values())
            for backend in sorted(times, key=times.__getitem__):
                entries[backend, operator, (major, minor), dtype] = at_height[max(HEIGHTS)][0]
    return entries, notes


@contextmanager
def measured_sources(commit: str) -> Iterator[Path]:
    """A folder with the kernels' sources at a commit.

    Raises:
        subprocess.CalledProcessError: the repository does not have it.
    """
    command = ["git", "-C", str(ROOT), "archive", commit, *PATHS]
    archive = subprocess.run(command, check=True, capture_output=True).stdout
    with TemporaryDirectory() as folder, tarfile.open(fileobj=io.BytesIO(archive)) as files:
        files.extractall(folder, filter="data")
        yield Path(folder)


def changed(table: dict[Key, Entry]) -> list[Key]:
    """The kernels of a table whose sources are no longer those that were measured."""
    return [key for key, (_, measured) in table.items() if digest(ROOT, *key[:3]) != measured]


def refuted(
    table: Iterable[Key],
    documents: dict[str, dict[str, Any]],
    calls: dict[str, Any] | None,
    failed: Collection[str] = (),
) -> set[Key]:
    """The kernels of a table that results show wrong or not faster, at any size, also where other results are missing.

    Args:
        table: its kernels.
        documents, calls: as of :func:`prove`.
        failed: backends with a check that failed.
    """
    found = set()
    for key in table:
        backend, operator, (major, minor), dtype = key
        machine = (f"{major}.{minor}", dtype)
        own = f"fastden-{backend}"
        alike, calls_alike = (
            [one for one in some if (one["machine"]["compute_capability"], one["settings"]["dtype"]) == machine]
            for some in (documents.values(), [calls] if calls else [])
        )
        comparisons = [
            (result["contenders"], own)
            for document in alike
            for result in document["results"]
            if result["name"].split()[0] == operator
        ]
        comparisons += [
            (called(result, own), name) for one in calls_alike for result in one["results"] for name in (own, AUTO)
        ]
        is_slower = any(is_judged(rows, name) and why_not_faster(rows, name) for rows, name in comparisons)
        if is_slower or (alike and backend in failed):
            found.add(key)
    return found


def merged(entries: dict[Key, Entry], out: Iterable[Key]) -> dict[Key, Entry]:
    """The table with ``entries``, and without the other kernels in ``out``."""
    out = set(out)
    kept = {key: entry for key, entry in PROVEN.items() if key not in out and key not in entries}
    # Where two backends were not compared, they keep their order.
    before, uncompared = list(PROVEN), {key[1:] for key in kept}
    together = kept | entries
    order = {key: before.index(key) if key in PROVEN and key[1:] in uncompared else len(before) for key in together}
    return {key: together[key] for key in sorted(together, key=order.__getitem__)}


def write(table: dict[Key, Entry], path: Path) -> None:
    head, _, rest = path.read_text(encoding="utf-8").partition("PROVEN:")
    comment = "#:" + rest.partition("#:")[2].partition("SHAPES:")[0]
    # The order of backends stays: it is that of their times.
    ordered = sorted(table.items(), key=lambda entry: entry[0][1:])
    # Several lines for each, whatever their length: ruff leaves them so.
    lines = [f"    {key!r}: (\n        {file!r},\n        {made_of!r},\n    ),\n" for key, (file, made_of) in ordered]
    body = "{\n" + "".join(lines).replace("'", '"') + "}" if lines else "{}"
    kind = "dict[tuple[str, str, tuple[int, int], str], tuple[str, str]]"
    operators = sorted({operator for _, operator, _, _ in table} & OPERATORS.keys())
    shapes = "".join(
        f'    "{operator}": [\n' + "".join(f"        {one!r},\n" for one in weight_shapes(operator)) + "    ],\n"
        for operator in operators
    )
    of_shapes = "SHAPES: dict[str, list[tuple[tuple[int, ...], ...]]] = "
    of_shapes += f"{{\n{shapes}}}" if shapes else "{}"
    path.write_text(f"{head}PROVEN: {kind} = {body}\n{comment}{of_shapes}\n", encoding="utf-8")


def drop() -> None:
    """Write the table without the kernels that have changed since they were measured."""
    dropped = changed(PROVEN)
    write({key: entry for key, entry in PROVEN.items() if key not in dropped}, TABLE)
    print("\n".join(f"dropped: {key}" for key in dropped) or "nothing has changed")


def nothing(*reasons: str) -> int:
    """Say why nothing is proven; the exit code."""
    print("nothing is proven:\n  " + "\n  ".join(reasons), file=sys.stderr)
    return 1


def main() -> int:
    parser = argparse.ArgumentParser(description="Put what a GPU proved into the table of the automatic choice.")
    parser.add_argument("results", type=Path, nargs="?", help="folder that gpu_check.sh wrote, in this repository")
    parser.add_argument("--write", action="store_true", help="rewrite the table; without it only say what would be")
    parser.add_argument("--drop", action="store_true", help="only take out kernels that have changed since measured")
    arguments = parser.parse_args()
    if arguments.drop == (arguments.results is not None):
        parser.error("accepted: a folder of results, or --drop")
    if arguments.drop:
        drop()
        return 0
    folder = arguments.results.resolve()
    if not folder.is_relative_to(ROOT):
        parser.error(f"{folder} lies outside {ROOT}; the results are committed with the table")
    if not (folder / "status.json").is_file():
        return nothing(f"{folder}: no status.json; accepted: a folder that gpu_check.sh wrote")
    status = json.loads((folder / "status.json").read_text(encoding="utf-8"))
    lacking = {backend: unproven(status, backend) for backend in CHECKS}
    for backend, checks in lacking.items():
        if checks:
            print(f"nothing of {backend} is proven:\n  " + "\n  ".join(checks), file=sys.stderr)
    if all(lacking.values()):
        return 1
    files = {
        file.relative_to(ROOT).as_posix(): json.loads(file.read_text(encoding="utf-8"))
        for file in folder.glob("ops-[0-9]*.json")
    }
    if not files:
        return nothing(f"{folder}: no ops-HEIGHT.json; accepted: a folder in which gpu_check.sh measured the operators")
    calls = json.loads((folder / CALLS).read_text(encoding="utf-8")) if (folder / CALLS).exists() else None
    apart = why_not_together(status, files | ({CALLS: calls} if calls else {}))
    if apart:
        return nothing(*apart)
    found, notes = prove(files, calls, [backend for backend, checks in lacking.items() if not checks])
    try:
        with measured_sources(status["commit"]) as measured:
            entries = {key: (file, digest(measured, *key[:3])) for key, file in found.items()}
    except subprocess.CalledProcessError as error:
        return nothing(error.stderr.decode().strip())
    for backend, operator, (major, minor), dtype in changed(entries):
        del entries[backend, operator, (major, minor), dtype]
        since = f"its sources have changed since {status['commit']}"
        notes.append(f"{backend} {operator} {major}.{minor} {dtype}: {since}")
    print("\n".join(f"proven: {key}" for key in entries) or "nothing is proven")
    print("\n".join(f"left out: {note}" for note in notes))
    failed = [name for name, checks in CHECKS.items() if any(status.get(check) == "failed" for check in checks)]
    table = merged(entries, refuted(PROVEN, files, calls, failed))
    print("".join(f"taken out: {key}\n" for key in PROVEN if key not in table), end="")
    measured_on = {document["machine"]["compute_capability"] for document in files.values()}
    unmeasured = [key for key in table if key not in entries and ".".join(map(str, key[2])) in measured_on]
    print("".join(f"stays, for nothing here refutes it: {key}\n" for key in unmeasured), end="")
    if arguments.write:
        write(table, TABLE)
    return 0


if __name__ == "__main__":
    sys.exit(main())
