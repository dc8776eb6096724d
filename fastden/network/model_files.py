"""The files of a model's folder, named in errors."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


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
    except RecursionError as error:
        raise ValueError(f"model: {path} is nested too deeply; accepted: as save_pretrained writes it") from error
    except RuntimeError as error:  # as PyTorch's load_state_dict
        if type(error).__name__ == "OutOfMemoryError":
            raise
        raise RuntimeError(f"model: {path}: {error}") from error
    except (ValueError, TypeError, SafetensorError) as error:
        raise ValueError(f"model: {path} cannot be read ({error}); accepted: as save_pretrained writes it") from error
