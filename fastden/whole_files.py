"""Writing files that appear under their names whole or not at all."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import secrets
import shutil
import stat
import threading
from collections.abc import Collection, Iterator
from pathlib import Path

from fastden.errors import UserError

#: The error of an output that is there, and what its user can do.
EXISTS, INSTEAD = "exists already", "; accepted: another name, or overwrite (--overwrite)"
_TEMPORARY = re.compile(r"\.fastden-[0-9a-f]{16}\.tmp(\.\w+)?")
_in_progress: dict[Path, threading.Thread] = {}


def reason(error: OSError) -> str:
    """The system's message."""
    return error.strerror or str(error)


def check_target(path: str | Path, overwrite: bool) -> None:
    """Raise UserError where ``path`` cannot be written.

    It exists (and ``overwrite`` is off), or its folder does not, or no file can be made in that folder.
    """
    target = Path(os.path.realpath(path))
    try:
        if target.exists():
            if not target.is_file():
                raise UserError(f"{path}: exists and is not a regular file")
            if not overwrite:
                raise _exists(path)
        elif target.is_symlink():
            raise UserError(f"{path}: is a link that leads to itself")
        elif not target.parent.is_dir():
            raise UserError(f"{path}: the folder {target.parent} does not exist; accepted: a folder that exists")
        if not os.access(target.parent, os.W_OK | os.X_OK):  # an existing file is replaced by a new one
            raise UserError(f"{path}: cannot be written: files cannot be made in the folder {target.parent}")
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {reason(error)}") from error


def check_readable(path: str | Path) -> None:
    """Raise UserError for a device, such as /dev/zero, which has no end, for a socket, and for a named pipe.

    Nobody may ever write to a named pipe, and reading would wait for ever.
    A pipe without a name has a writer and an end: a shell's <(...), standard input.
    """
    try:
        mode = os.stat(path).st_mode
    except OSError:  # reading tells what is wrong
        return
    if stat.S_ISCHR(mode) or stat.S_ISBLK(mode):
        raise UserError("is a device; accepted: a file")
    if stat.S_ISSOCK(mode):
        raise UserError("is a socket; accepted: a file")
    # On Linux a pipe without a name is a link that leads to no name, on macOS a file in /dev/fd.
    real = os.path.realpath(path)
    if stat.S_ISFIFO(mode) and os.path.lexists(real) and not real.startswith("/dev/fd/"):
        raise UserError("is a named pipe; accepted: a file")


def _exists(path: str | Path) -> UserError:
    return UserError(f"{path}: {EXISTS}{INSTEAD}")


@contextlib.contextmanager
def whole_file(path: Path, suffix: str = "", *, overwrite: bool = True) -> Iterator[Path]:
    """:func:`replacing` for a user's file.

    Args:
        path, suffix: as of :func:`replacing`.
        overwrite: replace a file of this name; otherwise one that another process made in the meantime is an error too.

    Raises:
        UserError: the system refuses, with its reason, or the file exists.
    """
    try:
        with replacing(path, suffix, overwrite=overwrite) as temporary:
            yield temporary
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {reason(error)}") from error


@contextlib.contextmanager
def replacing(path: Path, suffix: str = "", *, overwrite: bool = True) -> Iterator[Path]:
    """A temporary path beside ``path``. At the end the file there gets the name ``path``; after an error it is removed.

    Args:
        path: of the file to make.
        suffix: of the temporary name, for libraries that choose a format by it.
        overwrite: replace a file of this name; without it, one that is there is an error.

    Raises:
        UserError: the file exists, and ``overwrite`` is off.
        OSError: the system refuses.
    """
    # A link stays a link: its target is replaced.
    target = Path(os.path.realpath(path))
    temporary = target.with_name(f".fastden-{secrets.token_hex(8)}.tmp{suffix}")
    _in_progress[temporary] = threading.current_thread()
    try:
        yield temporary
        if overwrite:
            if target.exists():
                with contextlib.suppress(PermissionError):  # SMB, FAT and WSL's drives: the mount decides the mode
                    shutil.copymode(target, temporary)
            os.replace(temporary, target)
        else:
            _name_once(temporary, target, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
    finally:
        _in_progress.pop(temporary, None)


def _name_once(temporary: Path, target: Path, path: Path) -> None:
    """Give a file its name where no file has it. ``path`` is the user's name for ``target``.

    Raises:
        UserError: a file has the name.
    """
    try:
        os.link(temporary, target)  # unlike os.replace and POSIX's rename, it fails where the name exists
    except FileExistsError as error:
        raise _exists(path) from error
    except OSError:  # some file systems have no links, such as FAT
        if os.path.lexists(target):
            raise _exists(path) from None
        os.replace(temporary, target)
    else:
        temporary.unlink()


def write_synced(path: Path, data: bytes | memoryview) -> None:
    """Write a new file, and flush it to the disk."""
    with path.open("xb") as file:
        file.write(data)
        file.flush()
        # Some file systems report a full disk only here.
        os.fsync(file.fileno())


def sync(path: Path) -> None:
    """Flush a file that a library has written to the disk."""
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def write_bytes(path: Path, data: bytes | memoryview, *, overwrite: bool = True) -> None:
    """Write a whole file or none: a temporary file beside ``path``, which is then renamed. As :func:`whole_file`."""
    with whole_file(path, overwrite=overwrite) as temporary:
        write_synced(temporary, data)


def drop_unfinished(threads: Collection[threading.Thread]) -> None:
    """Remove what these threads are writing and have not finished."""
    for temporary, thread in list(_in_progress.items()):
        if thread in threads:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)


def remove_leftovers(folder: Path) -> None:
    """Remove what a killed process has left half-written in ``folder``; no other process may be writing there."""
    with contextlib.suppress(OSError):
        for path in Path(os.path.realpath(folder)).iterdir():  # as the names in _in_progress
            if _TEMPORARY.fullmatch(path.name) and path not in _in_progress:
                path.unlink(missing_ok=True)


def digest(path: str | Path) -> str:
    """SHA-256 of a file, hexadecimal."""
    sha = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            sha.update(block)
    return sha.hexdigest()
