"""Load and save weights: bundled names, folders and Hugging Face Hub repositories."""

from __future__ import annotations

import inspect
import json
import os
import stat
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from fastden.network.model_files import naming_file

if TYPE_CHECKING:
    import torch
    from huggingface_hub import PyTorchModelHubMixin
    from typing_extensions import Self

    from fastden.network.own_estimator import OwnEstimator

# huggingface_hub is imported only where the Hub or a model card is needed. Its import takes 0.3 s, a fifth of PyTorch's
# import.

#: A model's files.
CONFIG_FILE, WEIGHTS_FILE, CARD_FILE = "config.json", "model.safetensors", "README.md"
#: Arguments of ``from_pretrained`` that go to the Hub's download.
DOWNLOAD = ("revision", "cache_dir", "force_download", "local_files_only", "token")
WEIGHTS = Path(__file__).parents[1] / "weights"


def models() -> dict[str, Path]:
    """Names of the models that ship with the package, each with its folder (weights, configuration, model card)."""
    return {folder.parent.name: folder.parent for folder in sorted(WEIGHTS.glob("*/model.safetensors"))}


def model_folder(model: str | Path) -> Path:
    """Where a model lies: text may be a bundled name, a ``Path`` is a folder of the user's, whatever its name."""
    return model if isinstance(model, Path) else models().get(model, Path(model))


def files_of(model: str | Path, download: Mapping[str, Any] | None = None, *, card: bool = False) -> Path:
    """The folder that holds a model's files; those of a Hub repository are downloaded first.

    Args:
        model: as :meth:`PretrainedMixin.from_pretrained` takes it.
        download: arguments of ``huggingface_hub.hf_hub_download``, of :data:`DOWNLOAD`.
        card: download the model card too.

    Raises:
        TypeError, ValueError: see :meth:`PretrainedMixin.from_pretrained`.
    """
    folder = local_files(model)
    return _downloaded(str(model), dict(download or {}), card) if folder is None else folder


def local_files(model: str | Path) -> Path | None:
    """The folder that holds a model's files on this machine; None for the id of a Hub repository, which is not asked.

    Raises:
        TypeError, ValueError: see :meth:`PretrainedMixin.from_pretrained`.
    """
    if not isinstance(model, str | Path):
        raise TypeError(f"model: {type(model).__name__}; accepted: a bundled name, a folder or a Hugging Face Hub id")
    name, folder = str(model), model_folder(model)
    if not name:  # else the working directory
        raise ValueError(f"model: {name!r}; {_accepted()}")
    if folder.is_dir():
        missing = [file for file in (CONFIG_FILE, WEIGHTS_FILE) if not (folder / file).is_file()]
        if missing:
            raise ValueError(f"model: {name!r} holds no {' and no '.join(missing)}; {_accepted()}")
        return folder
    if isinstance(model, Path):
        raise ValueError(f"model: {name!r}, a Path but no folder that exists; {_accepted()} as text")
    if "/" not in name and not name.startswith((".", "~")):
        raise ValueError(f"model: {name!r}; {_accepted()}")
    owner, _, repository = name.partition("/")
    # Asking the Hub takes 20 s where there is no network: a folder's name is not asked for.
    if not owner[:1].isalnum() or not repository or "/" in repository or Path(owner).is_dir():
        raise ValueError(f"model: {name!r}, no folder that exists; {_accepted()}")
    return None


def _accepted() -> str:
    return (
        f"accepted: {', '.join(models()) or 'no bundled names'}, a folder with {CONFIG_FILE} and {WEIGHTS_FILE},"
        " or a Hugging Face Hub id owner/name"
    )


class PretrainedMixin:
    """``from_pretrained``, ``save_pretrained`` and ``push_to_hub``, with bundled names that need no network.

    A model's folder holds ``config.json``, the arguments of the class, and ``model.safetensors``. The class keeps each
    of its arguments as an attribute of the same name.

    Attributes:
        int8_ranges: ranges of the activations and the fingerprint of the weights that they belong to, for
            ``fuse(model, quality="fast")``; see :func:`fastden.calibrate`. None where they are not known.
        estimator: of the noise level, trained with this model; where the level is to be estimated, it is asked. None
            stands for the bundled one.
    """

    int8_ranges: tuple[dict[str, Any], str] | None = None
    estimator: OwnEstimator | None = None

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        map_location: str | torch.device = "cpu",
        strict: bool = True,
        **kwargs: Any,
    ) -> Self:
        """Load a network, in evaluation mode.

        Args:
            pretrained_model_name_or_path: a name of :func:`fastden.models`, a folder written by ``save_pretrained``,
                or a Hugging Face Hub repository ``owner/name``. A ``Path`` is a folder, even if a bundled model or a
                repository has its name.
            map_location: device of the weights.
            strict: whether missing or unknown names of weights are errors.
            **kwargs: ``revision``, ``cache_dir``, ``force_download``, ``local_files_only`` and ``token`` go to
                ``huggingface_hub.hf_hub_download``. All others are arguments of the class; they replace the saved ones.

        Raises:
            ValueError: the name is not a bundled name, a folder with both files, or a repository that can be
                downloaded (``models/mine`` is a folder where there is a folder ``models``); the device is none that
                PyTorch has here; or an argument asks for weights of other shapes.
            TypeError: it is no text or Path, or ``kwargs`` has another name.
        """
        download = {key: kwargs.pop(key) for key in DOWNLOAD if key in kwargs}
        known = inspect.signature(cls).parameters
        if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in known.values()):
            for key in kwargs.keys() - known.keys():
                accepted = ", ".join((*DOWNLOAD, *known))
                raise TypeError(f"{key}: {kwargs[key]!r}, an argument that is not known; accepted: {accepted}")
        from fastden.network.devices import parse_device  # here, as a list of the models does not need PyTorch

        if map_location is None:
            raise ValueError("map_location: None; accepted: a device, such as cpu or cuda")
        device = str(parse_device(map_location, any_kind=True, name="map_location"))
        if device.partition(":")[0] == "meta":
            raise ValueError(f"map_location: {str(map_location)!r}, which holds no weights; accepted: another device")
        folder = files_of(pretrained_model_name_or_path, download)
        return cls._from_folder(folder, device, strict, kwargs)

    @classmethod
    def _from_folder(
        cls, folder: Path, map_location: str, strict: bool, arguments: dict[str, Any], dtype: torch.dtype | None = None
    ) -> Self:
        """The network in a folder; ``dtype`` None is the caller's default, to which the weights are rounded."""
        import torch  # imported here: a list of the models does not need it
        from safetensors.torch import load_model

        from fastden.network import int8
        from fastden.network.own_estimator import OwnEstimator
        from fastden.ops.modes import Undrawn

        with naming_file(folder / CONFIG_FILE):
            saved = dict(json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8")))
        known = inspect.signature(cls).parameters
        # Classes of others may hold what no file does. A device context of the caller's, such as meta, does not count.
        read = strict and cls.__module__.startswith("fastden.")
        own = {key: value for key, value in saved.items() if key in known and key not in arguments}
        try:
            with torch.device(map_location), Undrawn() if read else nullcontext():
                model: Any = cls(**own, **arguments)
        except ValueError as error:  # it names the argument, which the caller may have given
            if str(error).split(":")[0] not in own:
                raise
            raise ValueError(f"model: {folder / CONFIG_FILE}: {error}") from error
        for key in ("noise_level_input", "image_channels"):  # the shapes of conv0 and out follow from these
            if key in saved and key in arguments and arguments[key] != saved[key] and hasattr(model, key):
                change = f" (then .adapt({key}={arguments[key]!r}))" if key == "noise_level_input" else ""
                raise ValueError(f"{key}: {arguments[key]!r}; accepted: {saved[key]!r}, as in {folder}{change}")
        if dtype is not None:
            model.to(dtype)
        with torch.device(map_location), naming_file(folder / WEIGHTS_FILE):
            load_model(model, folder / WEIGHTS_FILE, strict=strict, device=map_location)
        model.int8_ranges = int8.load_ranges(folder)
        model.estimator = OwnEstimator.load(folder)
        loaded: Self = model.eval()
        return loaded

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> str | None:
        """Write a folder with configuration, weights and model card; ``kwargs`` are those of ``PyTorchModelHubMixin``.

        Files that are there are replaced when all new ones are written; a model card stays.
        """
        folder = Path(os.path.abspath(save_directory))
        folder.mkdir(parents=True, exist_ok=True)
        upload, repository = kwargs.pop("push_to_hub", False), kwargs.pop("repo_id", None)
        own = {name: kwargs.pop(name) for name in ("config", "model_card_kwargs") if name in kwargs}
        with TemporaryDirectory(prefix=".fastden-", dir=folder) as temporary:
            made = Path(temporary) / "model"
            self._on_hub().save_pretrained(made, **own)
            usual = (made / CONFIG_FILE).stat().st_mode
            for file in list(made.iterdir()):
                target = folder / file.name
                if file.name != CARD_FILE or not target.exists():
                    # safetensors makes files that their owner alone may read. Others get the mode of the file that they
                    # replace, or of one that Python made here.
                    file.chmod(stat.S_IMODE(target.stat().st_mode if target.exists() else usual))
                    os.replace(file, target)
            for name in self._files_it_lacks():  # those of another model, which was here before
                (folder / name).unlink(missing_ok=True)
        # What is saved stays, if the upload fails.
        return self.push_to_hub(repository or folder.name, **own, **kwargs) if upload else None

    def push_to_hub(self, repo_id: str, **kwargs: Any) -> str:
        """Upload to the Hugging Face Hub; arguments go to ``huggingface_hub.PyTorchModelHubMixin.push_to_hub``."""
        some, lacking = kwargs.get("allow_patterns") or kwargs.get("ignore_patterns"), self._files_it_lacks()
        if lacking and not some:  # those of another model, which was there before
            others = kwargs.get("delete_patterns") or []
            kwargs["delete_patterns"] = [*([others] if isinstance(others, str) else others), *lacking]
        return self._on_hub().push_to_hub(repo_id, **kwargs)

    def _on_hub(self) -> PyTorchModelHubMixin:
        """An object that the Hub's own library can save and upload; it stands for this network."""
        from huggingface_hub import PyTorchModelHubMixin

        network = self

        # No licence: whoever trained a network chooses it, and writes it into the card.
        class OnHub(PyTorchModelHubMixin, library_name="fastden", tags=["image-denoising"]):
            def _save_pretrained(self, save_directory: Path) -> None:
                network._save_weights(save_directory)

        saved = OnHub()
        names = [name for name in inspect.signature(type(self)).parameters if hasattr(self, name)]
        saved._hub_mixin_config = {name: getattr(self, name) for name in names}
        return saved

    def _save_weights(self, folder: Path) -> None:
        from safetensors.torch import save_model

        from fastden.network import int8

        network: Any = self
        save_model(network, str(folder / WEIGHTS_FILE))
        if self.int8_ranges is not None and self._has_own_ranges():
            int8.save_ranges(folder, *self.int8_ranges)
        if self.estimator is not None:
            self.estimator.save(folder)

    def _has_own_ranges(self) -> bool:
        """Whether it has ranges of activations, and they belong to its weights as they are now."""
        from fastden.network import int8

        network: Any = self
        return self.int8_ranges is not None and self.int8_ranges[1] == int8.fingerprint(network)

    def _files_it_lacks(self) -> list[str]:
        """The files of a model's folder that this network does not write."""
        from fastden.network.int8 import RANGES_FILE
        from fastden.network.own_estimator import ESTIMATOR_FILE

        has = {ESTIMATOR_FILE: self.estimator is not None, RANGES_FILE: self._has_own_ranges()}
        return [file for file, there in has.items() if not there]


def _downloaded(repository: str, settings: dict[str, Any], card: bool) -> Path:
    """Download a Hub repository's files, and return their folder.

    Raises:
        ValueError: the repository does not exist, or cannot be reached.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import (
        EntryNotFoundError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
    )

    from fastden.network.int8 import RANGES_FILE
    from fastden.network.own_estimator import ESTIMATOR_FILE

    needed, others = (CONFIG_FILE, WEIGHTS_FILE), (RANGES_FILE, ESTIMATOR_FILE, *([CARD_FILE] if card else []))
    for file in (*needed, *others):
        try:
            path = Path(hf_hub_download(repository, file, **settings))
        except (LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
            if file in others and (file != ESTIMATOR_FILE or _may_lack(repository, file, settings)):
                continue
            why = f"the Hugging Face Hub cannot be reached, and no earlier download has its {file}"
            if file == ESTIMATOR_FILE:  # a network without the estimator that was trained with it denoises, and worse
                why += "; local_files_only=True or HF_HUB_OFFLINE=1 loads it as it is"
            raise ValueError(f"model: {repository!r}: {why}; {_accepted()}") from error
        except HFValidationError as error:  # before anything is asked for
            raise ValueError(f"model: {repository!r}, no folder that exists; {_accepted()}") from error
        except (HfHubHTTPError, EntryNotFoundError) as error:
            if file in others and isinstance(error, EntryNotFoundError):  # not every network has them
                continue
            raise ValueError(f"model: {repository!r}: {str(error).splitlines()[0]}; {_accepted()}") from error
        if file == WEIGHTS_FILE:
            folder = path.parent
    return folder


def _may_lack(repository: str, file: str, settings: Mapping[str, Any]) -> bool:
    """Whether a file that cannot be downloaded now is known not to exist, or the user wants no connection."""
    from huggingface_hub import _CACHED_NO_EXIST, constants, try_to_load_from_cache

    if settings.get("local_files_only") or constants.HF_HUB_OFFLINE:
        return True
    where = {key: settings[key] for key in ("cache_dir", "revision") if key in settings}
    return try_to_load_from_cache(repository, file, **where) is _CACHED_NO_EXIST
