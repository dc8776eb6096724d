"""Loading and saving weights: bundled names, folders and Hugging Face Hub repositories."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from huggingface_hub import PyTorchModelHubMixin
from huggingface_hub.constants import CONFIG_NAME, SAFETENSORS_SINGLE_FILE
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled

WEIGHTS = Path(__file__).parents[1] / "weights"


def models() -> dict[str, Path]:
    """Names of the models that ship with the package, each with its folder (weights, configuration, model card)."""
    return {folder.parent.name: folder.parent for folder in sorted(WEIGHTS.glob("*/model.safetensors"))}


class PretrainedMixin(PyTorchModelHubMixin, library_name="fastden", tags=["image-denoising"], license="apache-2.0"):
    """``from_pretrained`` and ``save_pretrained`` (safetensors), with bundled names that need no network."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **kwargs: Any) -> Any:
        """Load a network, in evaluation mode.

        Args:
            pretrained_model_name_or_path: a name of :func:`fastden.models`, a folder written by ``save_pretrained``,
                or a Hugging Face Hub repository ``owner/name``.
            **kwargs: passed to ``huggingface_hub.PyTorchModelHubMixin.from_pretrained``.

        Raises:
            ValueError: not a bundled name, a folder with both files, or a repository that can be downloaded.
        """
        name = str(pretrained_model_name_or_path)
        accepted = (
            f"accepted: {', '.join(models()) or 'no bundled names'}, a folder with config.json and model.safetensors,"
            " or a Hugging Face Hub id owner/name"
        )
        folder = models().get(name, Path(name))
        # Without this the mixin builds a network with default arguments, or keeps random weights, if a file or a key
        # is missing.
        kwargs.setdefault("strict", True)
        if folder.is_dir():
            missing = [file for file in (CONFIG_NAME, SAFETENSORS_SINGLE_FILE) if not (folder / file).is_file()]
            if missing:
                raise ValueError(f"model: {name!r} holds no {' and no '.join(missing)}; {accepted}")
            return super().from_pretrained(str(folder), **kwargs)
        if name.count("/") != 1:
            raise ValueError(f"model: {name!r}; {accepted}")
        try:
            return super().from_pretrained(name, **kwargs)
        except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
            raise ValueError(f"model: {name!r}: {str(error).splitlines()[0]}; {accepted}") from error

    @classmethod
    def _from_pretrained(cls, *, model_id: str, map_location: str = "cpu", strict: bool = True, **kwargs: Any) -> Any:
        import torch  # here, because listing the models needs none

        # The caller may have set a device context, such as torch.device("meta"). The network would be built there and
        # lose its weights.
        with torch.device(map_location):
            if not Path(model_id).is_dir():
                return super()._from_pretrained(model_id=model_id, map_location=map_location, strict=strict, **kwargs)
            # The mixin does the same, and prints a line to standard output.
            for name in ("revision", "cache_dir", "force_download", "local_files_only", "token"):
                kwargs.pop(name, None)
            return cls._load_as_safetensor(
                cls(**kwargs), str(Path(model_id) / SAFETENSORS_SINGLE_FILE), map_location, strict
            )
