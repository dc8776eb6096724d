"""Loading and saving weights: bundled names, folders and Hugging Face Hub repositories."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from huggingface_hub import PyTorchModelHubMixin, hf_hub_download
from huggingface_hub.constants import CONFIG_NAME, SAFETENSORS_SINGLE_FILE
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
)

WEIGHTS = Path(__file__).parents[1] / "weights"


def models() -> dict[str, Path]:
    """Names of the models that ship with the package, each with its folder (weights, configuration, model card)."""
    return {folder.parent.name: folder.parent for folder in sorted(WEIGHTS.glob("*/model.safetensors"))}


class PretrainedMixin(PyTorchModelHubMixin, library_name="fastden", tags=["image-denoising"], license="apache-2.0"):
    """``from_pretrained`` and ``save_pretrained`` (safetensors), with bundled names that need no network.

    Attributes:
        int8_ranges: ranges of the activations and the fingerprint of the weights that they belong to, for
            ``fuse(model, quality="fast")``; see :func:`fastden.calibrate`. None where they are not known.
    """

    int8_ranges: tuple[dict[str, Any], str] | None = None

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
                model = super()._from_pretrained(model_id=model_id, map_location=map_location, strict=strict, **kwargs)
                model.int8_ranges = _downloaded_ranges(model_id, kwargs)
                return model
            # The mixin does the same, and prints a line to standard output.
            for name in ("revision", "cache_dir", "force_download", "local_files_only", "token"):
                kwargs.pop(name, None)
            model = cls._load_as_safetensor(
                cls(**kwargs), str(Path(model_id) / SAFETENSORS_SINGLE_FILE), map_location, strict
            )
        model.int8_ranges = _ranges_in(Path(model_id))
        return model

    def _save_pretrained(self, save_directory: Path) -> None:
        super()._save_pretrained(save_directory)
        from fastden.network import int8

        if self.int8_ranges is not None and self.int8_ranges[1] == int8.fingerprint(self):  # type: ignore[arg-type]
            int8.save_ranges(save_directory, *self.int8_ranges)


def _ranges_in(folder: Path) -> tuple[dict[str, Any], str] | None:
    from fastden.network import int8  # here, because listing the models needs no PyTorch

    return int8.load_ranges(folder)


def _downloaded_ranges(repository: str, settings: dict[str, Any]) -> tuple[dict[str, Any], str] | None:
    """The ranges of activations in a Hub repository; None where it has none."""
    from fastden.network.int8 import RANGES_FILE

    names = ("revision", "cache_dir", "force_download", "local_files_only", "token")
    given = {name: settings[name] for name in names if name in settings}
    try:
        return _ranges_in(Path(hf_hub_download(repository, RANGES_FILE, **given)).parent)
    except (EntryNotFoundError, LocalEntryNotFoundError, OfflineModeIsEnabled):
        return None
