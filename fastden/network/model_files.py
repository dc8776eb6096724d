"""The files of a model's folder: replaced whole, and named in errors."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside ``path``. At the end its file takes the name ``path``; after an error it is removed."""
    target = Path(os.path.realpath(path))  # a link stays a link
    temporary = target.with_name(f".fastden-{secrets.token_hex(8)}.tmp")
    try:
        yield temporary
        if target.exists():
            with suppress(PermissionError):  # SMB, FAT and WSL's drives: the mount decides the mode
                shutil.copymode(target, temporary)
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def naming_file(path: Path) -> Iterator[None]:
    """Turns what reading a broken file raises into an error that names it.

    Raises:
        ValueError: the file is no JSON, or no safetensors file.
        RuntimeError: its weights do not fit the network.
    """
    from safetensors import SafetensorError

    try:
        yield
    except RuntimeError as error:  # as PyTorch's load_state_dict
        if type(error).__name__ == "OutOfMemoryError":
            raise
        raise RuntimeError(f"model: {path}: {error}") from error
    except (ValueError, TypeError, SafetensorError) as error:
        raise ValueError(f"model: {path} cannot be read ({error}); accepted: as save_pretrained writes it") from error
