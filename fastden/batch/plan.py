"""Which files a command reads and where each result goes, decided before any work starts."""

from __future__ import annotations

import glob
import os
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import takewhile
from pathlib import Path

from fastden.errors import UserError
from fastden.images.codec import SUFFIXES, format_for, format_of_suffix
from fastden.images.finder import find_images, has_image_name, is_left_out, is_regular, left_out_note
from fastden.images.formats import result_suffix
from fastden.images.strips import read_header

#: The suffix that each format gets when ``--format`` renames a file.
SUFFIX_OF = {"jpeg": ".jpg", "png": ".png", "tiff": ".tif", "webp": ".webp", "avif": ".avif", "heic": ".heic"}

#: Files that the error of an output names, of those that would share it.
NAMED = 3


@dataclass(frozen=True)
class Job:
    """One image: read ``source``, write ``target``."""

    source: Path
    target: Path


class InputError(UserError, OSError):
    """An input that gives no picture. Of several inputs the others are done: ``filename`` names it in the report."""

    def __init__(self, message: str, filename: str | Path) -> None:
        super().__init__(message)
        self.filename = str(filename)

    def __str__(self) -> str:  # OSError's would be the number, the system's text and the name
        return str(self.args[0])


def plan(
    inputs: list[str],
    output: str | Path,
    *,
    recursive: bool = False,
    format_name: str | None = None,
    unreadable: list[OSError] | None = None,
    made: Callable[[Path], bool] | None = None,
    left_out: list[Path] | None = None,
) -> list[Job]:
    """One job for each input file, in order.

    Args:
        inputs: files, folders (their images by suffix) and glob patterns (``**`` descends).
        output: a file for one input file, where it has a suffix and is no folder; else a folder. Text that ends in a
            separator is a folder, whatever its suffix; a ``Path`` has lost the separator.
        recursive: descend into the folders, and keep their structure in ``output``.
        format_name: of the results; the inputs' suffixes otherwise.
        unreadable: as in :func:`find_images`; of patterns too. Of several inputs it also gets the error of each that is
            not there or holds no image, and that of each file whose output another file would have, too. None raises
            the first, and so does a run in which nothing is left to do.
        made: whether the run that is resumed made a file, which is then not an input; see
            :func:`fastden.batch.manifest.made_before`.

    Raises:
        InputError: an input that does not exist or holds no image; two inputs with one output.
        UserError: an output that is another one's input, or cannot be.
    """
    if not inputs:
        raise UserError("input: none; accepted: one or several files, folders and glob patterns")
    if "" in inputs:
        raise UserError("input: ''; accepted: files, folders and glob patterns")
    if "-" in inputs and not Path("-").exists():
        raise UserError("input: -; accepted: files, folders and glob patterns (standard input is not read)")
    check_no_url(output, "output")
    as_folder, output = is_folder(output), Path(output)
    single = len(inputs) == 1 and _is_file(inputs[0])
    if single and not as_folder and output.suffix:
        format_for(output, format_name)
        return [Job(Path(inputs[0]), output)]
    if len(inputs) == 1 or unreadable is None:
        for name in inputs:  # before the output is checked: with a missing input its message would mislead
            _check_exists(name)
    if single and output.exists() and not as_folder:
        raise UserError(f"output: {output} is a file without an image's suffix; accepted: an image file, or a folder")
    if output.exists() and not output.is_dir():
        accepted = "accepted" if single else "accepted for more than one input"
        raise UserError(f"output: {output} is a file; {accepted}: a folder")
    if not single and not as_folder and format_of_suffix(output.suffix):
        raise UserError(f"output: {output} names a file; accepted for more than one input: a folder")
    jobs = []
    for source, relative in _sources(inputs, output, recursive, unreadable, made or (lambda path: False), left_out):
        jobs.append(Job(source, output / relative.with_suffix(suffix_of_result(source.suffix, format_name))))
    return _without_collisions(jobs, unreadable)


def suffix_of_result(suffix: str, format_name: str | None) -> str:
    """The suffix of a result for an input of that suffix, which stays where it says the format already."""
    if format_name is None:
        return result_suffix(suffix)
    return suffix if SUFFIXES.get(suffix.lower()) == format_name else SUFFIX_OF[format_name]


def format_of_result(job: Job, max_pixels: int) -> str:
    """The format of a job's output.

    Raises:
        UserError: it cannot be written. An input of a kind that is not read keeps its suffix, such as ``.bmp``, and
            then the error is that of reading it.
    """
    try:
        return format_for(job.target)
    except UserError:
        if job.source.is_file():
            read_header(job.source, max_pixels=max_pixels, several=True)
        raise


def check_no_url(name: str | Path, argument: str) -> None:
    """Raise UserError for a URL, of which ``Path`` would make a folder here, such as ``s3:``."""
    if isinstance(name, str) and "://" in name:
        raise UserError(f"{argument}: {name} is a URL; accepted: a path, or URLs with --engine ray")


def is_folder(name: str | Path) -> bool:
    """Whether ``name`` is a folder that exists, or text that ends in a separator and so means one."""
    separators = tuple(filter(None, (os.sep, os.altsep)))
    return Path(name).is_dir() or (isinstance(name, str) and name.endswith(separators))


def _is_file(name: str) -> bool:
    return Path(name).exists() and not Path(name).is_dir()


def _check_exists(name: str) -> None:
    """Raise InputError for the name of nothing; a pattern is none."""
    if Path(name).exists() or glob.has_magic(name):
        return
    why = "is a link that leads nowhere" if Path(name).is_symlink() else "does not exist"
    raise InputError(f"input: {name} {why}; accepted: files, folders and glob patterns", name)


def _sources(
    inputs: list[str],
    output: Path,
    recursive: bool,
    unreadable: list[OSError] | None,
    made: Callable[[Path], bool],
    left_out: list[Path] | None,
) -> list[tuple[Path, Path]]:
    """Pairs of an input file and its path below the output folder."""
    sources: dict[Path, Path] = {}
    errors: list[OSError] = []
    for name in inputs:
        try:
            sources.update(_sources_of(name, output, recursive, unreadable, made, left_out, alone=len(inputs) == 1))
        except OSError as error:
            if unreadable is None:
                raise
            errors.append(error)
    if not sources:
        if errors:
            raise errors[0]
        raise UserError(f"input: {', '.join(inputs)}: results of the run that is resumed; accepted: its inputs")
    if unreadable is not None:
        unreadable += errors
    return list(sources.items())


def _sources_of(
    name: str,
    output: Path,
    recursive: bool,
    unreadable: list[OSError] | None,
    made: Callable[[Path], bool],
    left_out: list[Path] | None,
    *,
    alone: bool,
) -> dict[Path, Path]:
    """The files of one input, each with its path below the output folder; ``alone``: there is no other input."""
    path = Path(name)
    if not path.is_dir():
        _check_exists(name)
        if path.exists():
            return {} if made(path) else {path: Path(path.name)}
        return {file: Path(file.name) for file in expand(name, output, unreadable, made, left_out)}
    others: list[Path] = []
    images_here = find_images(path, recursive, unreadable, others)
    others = [other for other in others if not _written_before(other, path, output)]
    images = [image for image in images_here if not (_written_before(image, path, output) or made(image))]
    # The pattern photos/* of a shell names the output folder photos/clean too, once it is there.
    if images or alone or os.path.realpath(path) != os.path.realpath(output):
        if images_here and not images:
            raise InputError(f"input: all images in {path} are results of earlier runs; accepted: their inputs", path)
        if not images:
            hint = "" if recursive else ", --recursive to descend"
            told = f" ({left_out_note(others)})" if others else ""
            raise InputError(f"input: no images in {path}{told}; accepted suffixes: {', '.join(SUFFIXES)}{hint}", path)
    if left_out is not None:
        left_out += others
    return {image: image.relative_to(path) for image in images}


def expand(
    pattern: str,
    output: Path,
    unreadable: list[OSError] | None = None,
    made: Callable[[Path], bool] = lambda path: False,
    left_out: list[Path] | None = None,
) -> list[Path]:
    """The files that a glob pattern matches, sorted, without results of earlier runs.

    Of a pattern that names no suffix, such as ``photos/*``, only images by their names, as of folders.

    Args:
        pattern, output, unreadable, made, left_out: as of :func:`plan`.

    Raises:
        InputError: nothing matches.
        OSError: a folder cannot be read, and ``unreadable`` is None or nothing matches.
    """
    matches = sorted(Path(match) for match in glob.glob(pattern, recursive=True))
    top = Path(*takewhile(lambda part: not glob.has_magic(part), Path(pattern).parts))
    errors = _passed_over(pattern)
    files = [match for match in matches if is_regular(match, errors)]
    files = [file for file in files if not _written_before(file, top, output)]
    files = [file for file in _once(files) if not made(file)]
    suffix = Path(pattern).suffix
    if files and (not suffix or glob.has_magic(suffix)):
        others = [file for file in files if is_left_out(file)]
        if left_out is not None:
            left_out += others
        files = [file for file in files if has_image_name(file)]
        if not files and not errors:
            told = f" ({left_out_note(others)})" if others else ""
            message = f"input: no images match {pattern}{told}; accepted suffixes: {', '.join(SUFFIXES)}"
            raise InputError(message, pattern)
    if errors and (unreadable is None or not files):
        raise errors[0]
    if unreadable is not None:
        unreadable += errors
    if not files:
        raise InputError(f"input: nothing matches {pattern}", pattern)
    return files


def _passed_over(pattern: str) -> list[OSError]:
    """The errors of folders under ``pattern`` that cannot be read: glob does not report them."""
    parts = Path(pattern).parts
    first = next(index for index, part in enumerate(parts) if glob.has_magic(part))
    folders: set[str] = set()
    for index in range(first, len(parts)):
        above = parts[: index + 1] if parts[index] == "**" else parts[:index]
        folders.update(glob.glob(os.path.join(*above, ""), recursive=True) if above else [os.curdir])
    errors = []
    for folder in sorted(folders):
        try:
            os.scandir(Path(folder)).close()
        except OSError as error:
            errors.append(error)
    return errors


def _once(files: list[Path]) -> list[Path]:
    """Drop files that ``**`` found again through a link to a folder; a link to a file counts as a file."""
    files_once = {os.path.join(os.path.realpath(file.parent), file.name): file for file in reversed(files)}
    return sorted(files_once.values())


def _written_before(image: Path, folder: Path, output: Path) -> bool:
    """Whether ``image`` is a result of an earlier run: it lies in an output folder inside the input ``folder``."""
    top, below = os.path.realpath(folder), os.path.realpath(output)
    inside = below != top and below.startswith(top + os.sep)
    return inside and os.path.realpath(image).startswith(below + os.sep)


def collisions(sources: Iterable[Sequence[tuple[str | Path, str | Path]]]) -> list[InputError]:
    """The errors of files that would share an output.

    Nobody can tell which of the results is wanted, so none is made, and each of these files has failed. The others are
    done: a pair among thousands of pictures must not stop them, and none of its files is touched.

    Args:
        sources: pairs of a file and its output; those in one sequence have one output.
    """
    errors = []
    for same in sources:
        if len(same) > 1:
            for source, target in same:
                names = [str(source), *(str(other) for other, _ in same if other != source)]
                shown = f"{', '.join(names[:NAMED])}{f' and {len(names) - NAMED} more' * (len(names) > NAMED)}"
                why = f"would all be written to {target}; accepted: different names"
                errors.append(InputError(f"output: {shown} {why}", source))
    return errors


def _without_collisions(jobs: list[Job], unreadable: list[OSError] | None) -> list[Job]:
    """The jobs that share their output with no other; ``unreadable`` gets the errors of those that do."""
    by_target = defaultdict(list)
    for job in jobs:
        by_target[_identity(job.target)].append(job)
    errors = collisions([(job.source, job.target) for job in same] for same in by_target.values())
    if errors and (unreadable is None or len(errors) == len(jobs)):
        raise errors[0]
    if unreadable is not None:
        unreadable += errors
    alone = [job for job in jobs if len(by_target[_identity(job.target)]) == 1]
    writers = {_identity(job.target): job for job in alone}
    for job in jobs:
        # Chance would decide whether it is read before or after it is replaced.
        writer = writers.get(_identity(job.source), job)
        if writer is not job:
            raise UserError(f"output: {writer.target}, of {writer.source}, is an input too; accepted: another folder")
    return alone


def _identity(path: Path) -> str:
    real = os.path.normcase(os.path.realpath(path))
    # On a file system that ignores case one would overwrite the other.
    return real.casefold() if ignores_case(os.path.dirname(real)) else real


@lru_cache(maxsize=4096)
def ignores_case(folder: str) -> bool:
    """Whether names in ``folder``, or in the nearest folder above that exists, are the same whatever their case."""
    parent, name = os.path.split(folder)
    if not name:
        return sys.platform in ("win32", "darwin")
    if name == name.swapcase() or not os.path.exists(folder):
        return ignores_case(parent)
    try:
        return os.path.samefile(folder, os.path.join(parent, name.swapcase()))
    except OSError:
        return False
